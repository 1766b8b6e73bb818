"""The precisions of a bundle beside fp32: made and judged on the user's frames, then written."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from rich.console import Console
from rich.progress import Progress

from calibration.confidence import Confidence, fit
from calibration.coverage import coverage
from calibration.frame_set import FrameSet
from calibration.gate import Judge, Limits, check_limits
from calibration.precisions import (
    BATCH,
    Batches,
    Candidate,
    half_candidate,
    int8_candidate,
    int8_half_candidate,
    trained_candidate,
)
from calibration.sampling import sample
from calibration.sensitivity import encoder
from calibration.unknown import names_some
from runtime.classifier import Classifier
from runtime.errors import DataError
from runtime.head import cosines_of
from runtime.label_sets import Labels
from runtime.manifest import Head, Precision
from runtime.prompts import PromptBank, build_bank

from .trained_ranges import Trained

PRECISIONS = ("fp16", "int8", "int8_fp16")
TRAINED = "the ranges of int8 are those of the training (--qat), not calibrated"
FEW = 30  # frames: fewer say little
CALIBRATION_SHARE = 0.6  # of --calibrate, where there is no --judge; the rest judges


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Frames to calibrate and to judge on, and what a precision may cost on them.

    `calibrate` and `judge` are pictures, folders, tables and videos; without `judge` some of the
    frames of `calibrate` are set apart. `frames` is the most of each. `precisions` are those to
    make beside fp32, int8 ones only where there are frames; `max_bad` is the share of the frames
    that may be unreadable; `text_int8` asks for an int8 text
    encoder. Raises DataError for limits and precisions that are none.
    """

    calibrate: tuple[Path, ...] = ()
    judge: tuple[Path, ...] = ()
    frames: int = 512
    max_bad: float = 0.01
    precisions: tuple[str, ...] = PRECISIONS
    limits: Limits = Limits()
    allow_rejected: bool = False
    text_int8: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_limits(self.limits)
        if self.judge and not self.calibrate:
            raise DataError("--judge goes with --calibrate: int8 needs frames for its ranges too")
        if self.frames < 1:
            raise DataError(f"--frames must be at least 1, it is {self.frames}")
        for name in self.precisions:
            if name not in PRECISIONS:
                raise DataError(f"--precisions: {name!r} is none of {', '.join(PRECISIONS)}")
        if "int8_fp16" in self.precisions and "int8" not in self.precisions:
            raise DataError("--precisions: int8_fp16 is made from int8, ask for both")


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """The precisions beside fp32, and the frames that they were made and judged on (None: the
    exporter's own test patterns). `notes` say what of it a user should know."""

    candidates: tuple[Candidate, ...]
    calibration: FrameSet | None = None
    judged: FrameSet | None = None
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    flips: tuple[tuple[str, NDArray[np.uint8], str, str], ...] = ()
    """Frames whose label int8 changed: name, picture, fp32's label, int8's."""
    confidence: Mapping[str, Confidence] = field(default_factory=dict)
    """What makes scores believable, by precision; of the bundle's own labels alone."""
    judge: Judge | None = None
    """What judged them, where there are frames."""
    ranges: Path | None = None
    """Where the ranges were kept while they were gathered; not needed any more."""


@contextlib.contextmanager
def make_precisions(
    options: CalibrationOptions,
    classifier: Classifier,
    labels: Labels | None,
    patterns: NDArray[np.uint8],
    console: Console,
    trained: Trained | None = None,
) -> Iterator[Made]:
    """Yields fp16, and int8 where there are frames, of the bundle that `classifier` has open; int8
    by the ranges of its training, where it was `trained` so.

    The frames lie in a temporary file while the block runs. Ranges that were gathered are kept
    beside the bundle until it is whole, so that an export that was cut off goes on.
    """
    folder = classifier.bundle.folder
    file = classifier.bundle.manifest.precisions["fp32"].image
    model = onnx.load(classifier.bundle.file(file))
    with tempfile.TemporaryDirectory(prefix=".frames-", dir=folder.parent) as store:
        with Progress(console=console, transient=True, disable=console.quiet) as progress:
            if options.calibrate:
                sets = _frames(options, classifier, Path(store), progress)
                made = _on_frames(model, sets, options, classifier, labels, progress, trained)
            else:
                made = _on_patterns(model, patterns, options, progress)
        yield made


def _on_patterns(
    model: ModelProto,
    patterns: NDArray[np.uint8],
    options: CalibrationOptions,
    progress: Progress,
) -> Made:
    def batches() -> Iterator[NDArray[np.uint8]]:
        yield patterns

    note = "no frames were given (--calibrate): fp16 was judged on test patterns, int8 not made"
    if "fp16" not in options.precisions:
        return Made(candidates=(), notes=(note,))
    judge = Judge(batches, encoder(model)(patterns))
    half = half_candidate(model, batches, judge, options.limits, progress)
    return Made(candidates=(half,), notes=(note,))


def _frames(
    options: CalibrationOptions, classifier: Classifier, store: Path, progress: Progress
) -> tuple[FrameSet, FrameSet]:
    """The frames to calibrate on, and those to judge on."""
    spec = classifier.bundle.manifest.image

    def drawn(sources: Sequence[Path], most: int, name: str) -> FrameSet:
        """At most so many frames of the sources, as the encoder gets them."""
        task = progress.add_task(f"{name} frames", total=most)
        found = sample(
            [source.expanduser() for source in sources],
            spec,
            most,
            options.seed,
            store / name,
            options.max_bad,
            advance=lambda n: progress.advance(task, n),
        )
        progress.remove_task(task)
        return found

    if options.judge:
        first = drawn(options.calibrate, options.frames, "calibration")
        return first, _apart(first, drawn(options.judge, options.frames, "judging"))
    both = drawn(options.calibrate, round(options.frames / CALIBRATION_SHARE), "calibration")
    return both.split(CALIBRATION_SHARE, options.seed)


def _apart(calibration: FrameSet, judged: FrameSet) -> FrameSet:
    """The judging frames that were not calibrated on."""
    known = set(calibration.sha256)
    rows = [row for row, digest in enumerate(judged.sha256) if digest not in known]
    if not rows:
        raise DataError("--judge holds only frames that are calibrated on: name other ones")
    return judged.keep(rows)


def _on_frames(
    model: ModelProto,
    sets: tuple[FrameSet, FrameSet],
    options: CalibrationOptions,
    classifier: Classifier,
    labels: Labels | None,
    progress: Progress,
    trained: Trained | None,
) -> Made:
    calibration, judged = sets
    bank = _bank(classifier, labels, judged)
    names = bank.labels if bank else ()
    targets, notes = _targets(judged, names)
    encode = encoder(model)
    reference = np.concatenate([encode(batch) for batch in judged.batches(BATCH)])
    embeddings = bank.embeddings if bank else None
    judge = Judge(lambda: judged.batches(BATCH), reference, embeddings, targets)

    def frames() -> Iterator[NDArray[np.uint8]]:
        return calibration.batches(BATCH)

    cache = ranges_file(classifier.bundle.folder, model, calibration)
    candidates = tuple(_candidates(model, frames, judge, options, progress, cache, trained))
    fitted = bank if labels is not None else None
    head = classifier.bundle.manifest.head
    confidence = _confidence(fitted, head, candidates, judge) if fitted else {}
    unfitted = [name for name in ("fp32", *(c.name for c in candidates)) if name not in confidence]
    if fitted and unfitted:
        notes += (f"no score was fitted: {unfitted[0]} names none of the frames rightly",)
    if len(judged) < FEW:
        notes += (f"{len(judged)} different frames say little of a precision: --judge 100 or more",)
    return Made(
        candidates=candidates,
        calibration=calibration,
        judged=judged,
        labels=names,
        notes=(*coverage(calibration, names).notes(), *notes, *([TRAINED] if trained else [])),
        flips=tuple(_flips(candidates, judge, judged, names)),
        confidence=confidence,
        judge=judge,
        ranges=cache,
    )


def _candidates(
    model: ModelProto,
    frames: Batches,
    judge: Judge,
    options: CalibrationOptions,
    progress: Progress,
    cache: Path,
    trained: Trained | None,
) -> Iterator[Candidate]:
    """Each precision that is asked for, in turn."""
    if "fp16" in options.precisions:
        yield half_candidate(model, frames, judge, options.limits, progress)
    if "int8" in options.precisions:
        if trained:
            own, ranges = trained.applied(model)
            int8 = trained_candidate(own, ranges, trained.encode, judge, options.limits, progress)
        else:
            int8 = int8_candidate(model, frames, judge, options.limits, progress, cache)
        yield int8
        if "int8_fp16" in options.precisions:
            yield int8_half_candidate(int8, frames, progress)


def ranges_file(folder: Path, model: ModelProto, frames: FrameSet) -> Path:
    """Where the ranges of this encoder on these frames are kept while they are gathered."""
    digest = hashlib.sha256(model.SerializeToString())
    digest.update("".join(frames.sha256).encode())
    return folder.parent / f".edgeclip-ranges-{digest.hexdigest()[:16]}.npz"


def _bank(classifier: Classifier, labels: Labels | None, judged: FrameSet) -> PromptBank | None:
    """The labels that frames are told apart by: the bundle's, else those of the frames."""
    chosen: Labels | None = labels if labels is not None else judged.classes or None
    if chosen is None:
        return None
    templates = classifier.bundle.manifest.text.templates
    return build_bank(chosen, templates, classifier.embed_text, "")


def _targets(
    judged: FrameSet, labels: Sequence[str]
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """The true labels of the judged frames, and a note where there are none."""
    if not labels:
        note = "there are no labels (--labels): precisions were judged by their cosines alone"
        return None, (note,)
    missing = sorted(set(judged.classes) - set(labels))
    if judged.targets is None or missing:
        why = f"their class {missing[0]!r} is not among the labels" if missing else "they have none"
        return None, (f"accuracy was not judged: the frames' true labels are not known ({why})",)
    place = [labels.index(name) for name in judged.classes]
    return np.array([place[target] for target in judged.targets]), ()


def _confidence(
    bank: PromptBank, head: Head, candidates: Sequence[Candidate], judge: Judge
) -> dict[str, Confidence]:
    """Fits the scores of each precision to the judged frames: to their true labels, or, without
    them, to what fp32 says. One that names no frame rightly is left out: there is nothing to fit.
    """
    targets, labels = judge.targets, len(bank.labels)
    reference = cosines_of(judge.reference, bank)
    if not names_some(reference, targets, labels):
        return {}
    found = {"fp32": fit(reference, targets, head, labels=labels)}
    for candidate in candidates:
        encode = encoder(candidate.model)
        embeddings = np.concatenate([encode(batch) for batch in judge.batches()])
        if not np.isfinite(embeddings).all():
            continue
        rows = cosines_of(embeddings, bank)
        if names_some(rows, targets, labels):
            found[candidate.name] = fit(rows, targets, head, reference=reference.all, labels=labels)
    return found


def _flips(
    candidates: Sequence[Candidate], judge: Judge, judged: FrameSet, labels: Sequence[str]
) -> Iterator[tuple[str, NDArray[np.uint8], str, str]]:
    """The frames that int8 takes for something else."""
    candidate = next((found for found in candidates if found.name == "int8"), None)
    rows = candidate.cost.flipped[:24] if candidate else ()
    if not candidate or not rows or judge.bank is None:
        return
    frames = np.concatenate(list(judged.batches(BATCH, rows)))
    before = (judge.reference[list(rows)] @ judge.bank.T).argmax(axis=1)
    after = (encoder(candidate.model)(frames) @ judge.bank.T).argmax(axis=1)
    for row, frame, a, b in zip(rows, frames, before, after, strict=True):
        name = "/".join(Path(judged.names[row]).parts[-2:])
        yield name, frame, labels[a], labels[b]


def write_precisions(
    made: Made, folder: Path, allow_rejected: bool
) -> tuple[dict[str, Precision], list[str]]:
    """Writes the encoders that hold the gate (with `allow_rejected` the others too, so marked);
    returns their entries for the manifest, and what is wrong with the others, in words."""
    written = write_candidates(made.candidates, "image", folder, allow_rejected)
    entries = {name: Precision(image=file, **entry) for name, file, entry in written}
    return entries, refusals(made.candidates)


def write_candidates(
    candidates: Sequence[Candidate], kind: str, folder: Path, allow_rejected: bool
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Writes those that may be in the bundle; yields the name, the file, and what the manifest says
    of each precision."""
    for candidate in candidates:
        if candidate.accepted or allow_rejected:
            file = f"{kind}.{candidate.name}.onnx"
            onnx.save(candidate.model, folder / file)
            yield (
                candidate.name,
                file,
                {
                    "status": "accepted" if candidate.accepted else "rejected",
                    "figures": candidate.figures(),
                    "float_layers": candidate.float_layers,
                },
            )


def refusals(candidates: Sequence[Candidate], prefix: str = "") -> list[str]:
    """What is wrong with those that do not hold the gate, a line each."""
    return [f"{prefix}{c.name}: {'; '.join(c.faults)}" for c in candidates if not c.accepted]
