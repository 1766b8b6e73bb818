"""Fits a prompt bank to frames of the user's camera: scores that can be believed, and when a frame
is of none of the labels."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from runtime.backends import Encoder
from runtime.bundle import Bundle
from runtime.errors import DataError, EdgeClipError
from runtime.head import Cosines, cosines_of
from runtime.opening import open_image
from runtime.prompts import PromptBank
from runtime.unknown import Fitted

from .confidence import Confidence, fit
from .embed import BATCH
from .frame_set import FrameSet
from .metrics import Counts, Floats
from .sampling import sample

MOST = 2000  # frames of each kind
SEED = 0


@dataclass(frozen=True, eq=False)
class Shown:
    """Frames and what they show: a bank's labels by number (`targets` int64 [N], None where nobody
    says), or, `others`, none of them."""

    frames: FrameSet
    targets: Counts | None
    others: Sequence[tuple[FrameSet, Sequence[int]]]
    rows: Sequence[int]


@dataclass(frozen=True, eq=False)
class BankFit:
    """A bank with what was fitted, how well it fits in each precision, and the precisions that
    could not be run here, with the reason."""

    bank: PromptBank
    fits: Mapping[str, Confidence]
    skipped: Mapping[str, str]
    known: int
    unknown: int


def fit_bank(
    bundle: Bundle,
    bank: PromptBank,
    frames: Sequence[Path],
    unknown: Sequence[Path] = (),
    *,
    recall: float = 0.95,
    backend: str = "onnxruntime",
    max_bad: float = 0.01,
    quiet: bool = False,
) -> BankFit:
    """Fits a bank's head and limit of "unknown" in each accepted precision of a bundle.

    `frames` (see `sample`) show the bank's labels; where they say which (class folders, tables),
    those of other labels count as unknown. `unknown` show none of them. The share `recall` of known
    frames is to be kept, the share `max_bad` of all may be unreadable. See `confidence.fit`.
    Raises DataError.
    """
    fits: dict[str, Confidence] = {}
    skipped: dict[str, str] = {}
    reference: Floats | None = None
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=console, transient=True, disable=quiet) as progress,
    ):
        progress.add_task("Reading frames", total=None)
        shown = _shown(bundle, bank, frames, unknown, Path(folder), max_bad)
        for name in _accepted(bundle):
            progress.add_task(f"Embedding them in {name}", total=None)
            try:
                encode = open_image(bundle, backend, name, None).encoder
            except EdgeClipError as error:
                skipped[name] = str(error)
                continue
            known, others = _cosines(shown, encode, bank)
            reference = known.all if name == "fp32" else reference
            fits[name] = _fitted(
                bundle, bank, name, (known, shown.targets, others), reference, recall
            )
    if not fits:
        why = "; ".join(dict.fromkeys(skipped.values()))
        raise DataError(f"no precision of {bundle.folder} runs here: {why}")
    unknown_frames = sum(len(rows) for _, rows in shown.others)
    return BankFit(_with(bank, fits), fits, skipped, len(shown.rows), unknown_frames)


def _accepted(bundle: Bundle) -> list[str]:
    """The accepted precisions, fp32 first: the others may be fitted to its scores."""
    entries = bundle.manifest.precisions.items()
    accepted = [name for name, entry in entries if entry.status == "accepted"]
    return sorted(accepted, key=lambda name: name != "fp32")


def _fitted(
    bundle: Bundle,
    bank: PromptBank,
    name: str,
    seen: tuple[Cosines, Counts | None, Cosines | None],
    reference: Floats | None,
    recall: float,
) -> Confidence:
    """Without labels the head stays what was fitted to some before, or is fitted to what fp32's
    cosines say."""
    known, targets, others = seen
    before = bank.fitted.get(name)
    head = before.head if before and targets is None else bundle.manifest.head
    if before or name == "fp32":
        reference = None
    return fit(
        known,
        targets,
        head,
        reference=reference,
        unknown=others,
        recall=recall,
        labels=len(bank.labels),
    )


def _with(bank: PromptBank, fits: Mapping[str, Confidence]) -> PromptBank:
    fitted = {
        name: Fitted(head=f.head, threshold=f.limit.threshold, measure=f.limit.measure)
        for name, f in fits.items()
    }
    return dataclasses.replace(bank, fitted=dict(bank.fitted) | fitted)


def _shown(
    bundle: Bundle,
    bank: PromptBank,
    frames: Sequence[Path],
    unknown: Sequence[Path],
    folder: Path,
    max_bad: float,
) -> Shown:
    spec = bundle.manifest.image
    drawn = sample(frames, spec, MOST, SEED, folder / "known", max_bad)
    rows: list[int] = list(range(len(drawn)))
    others: list[tuple[FrameSet, Sequence[int]]] = []
    targets = None
    if drawn.targets is not None:
        place = {label: number for number, label in enumerate(bank.labels)}
        of_bank = [place.get(label, -1) for label in drawn.labels() or ()]
        rows = [row for row in rows if of_bank[row] >= 0]
        targets = np.array([of_bank[row] for row in rows], np.int64)
        if not rows:
            raise DataError(
                f"none of the frames is labelled as the bank's labels are: the frames have "
                f"{', '.join(drawn.classes[:5])}, the bank {', '.join(bank.labels[:5])}"
            )
        left = [row for row in range(len(drawn)) if of_bank[row] < 0]
        others += [(drawn, left)] if left else []
    if unknown:
        strange = sample(unknown, spec, MOST, SEED, folder / "unknown", max_bad)
        others.append((strange, range(len(strange))))
    return Shown(drawn, targets, others, rows)


def _cosines(shown: Shown, encode: Encoder, bank: PromptBank) -> tuple[Cosines, Cosines | None]:
    """Cosines of the known frames with the bank, and of the unknown ones."""

    def of(*seen: tuple[FrameSet, Sequence[int]]) -> Cosines:
        batches = (batch for frames, rows in seen for batch in frames.batches(BATCH, rows))
        return cosines_of(np.concatenate([encode(batch) for batch in batches]), bank)

    return of((shown.frames, shown.rows)), of(*shown.others) if shown.others else None
