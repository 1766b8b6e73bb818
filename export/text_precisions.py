"""The precisions of the text encoder beside fp32: made and judged on texts, then written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto
from rich.console import Console
from rich.progress import Progress

from calibration.gate import Encode
from calibration.precisions import Candidate, half_candidate, int8_candidate
from calibration.sensitivity import encoder
from calibration.text_judge import BATCH, Naming, TextJudge, embedded, naming
from calibration.texts import FEWEST, Texts, Tokens, find_texts, split_texts
from runtime.errors import DataError
from runtime.label_sets import Labels
from runtime.manifest import TextPrecision
from runtime.tokenizer import Tokenizer

from .precisions import CalibrationOptions, Made, refusals, write_candidates


@dataclass(frozen=True, kw_only=True, eq=False)
class MadeTexts:
    """The text encoder's precisions beside fp32, and what texts they were made and judged on.
    `notes` say what of it a user should know."""

    candidates: tuple[Candidate, ...]
    used: Texts
    notes: tuple[str, ...] = ()


def choose_texts(
    options: CalibrationOptions,
    labels: Labels | None,
    tokenizer: Tokenizer,
    probes: Sequence[str],
) -> Texts:
    """The texts to calibrate and to judge on. Raises DataError where they are too few for int8."""
    sources = (*options.calibrate, *options.judge)
    templates = tokenizer.spec.templates
    found = find_texts(sources, labels, templates, probes, options.frames, options.seed)
    texts = split_texts(found, tokenizer, options.seed)
    if options.text_int8 and len(texts.calibration) < FEWEST:
        raise DataError(
            f"--text-int8 takes at least {FEWEST} texts that differ, and there are "
            f"{len(texts.calibration)}: give more --labels or --template, or tables with captions "
            "by --calibrate"
        )
    return texts


def make_text_precisions(
    options: CalibrationOptions,
    file: Path,
    texts: Texts,
    tokenizer: Tokenizer,
    labels: Labels | None,
    others: Made,
    console: Console,
) -> MadeTexts:
    """fp16 of the text encoder in `file`, and int8 where it is asked for.

    They are judged on the texts, and by how they name the frames that judged the image encoder,
    with the same limits.
    """
    model = onnx.load(file)
    encode = encoder(model)
    told = _naming(others, labels, tokenizer, encode)
    judge = TextJudge(texts.judged, embedded(encode, texts.judged), told)
    with Progress(console=console, transient=True, disable=console.quiet) as progress:
        progress.add_task("The text encoder", total=None)
        made = tuple(_candidates(options, model, texts.calibration, judge, progress))
    notes = tuple(_notes(texts, told))
    return MadeTexts(candidates=made, used=texts, notes=notes)


def _naming(
    others: Made, labels: Labels | None, tokenizer: Tokenizer, encode: Encode
) -> Naming | None:
    """The frames that judged the image encoder, where there are labels to name them by."""
    if others.judge is None or not others.labels:
        return None
    return naming(
        others.judge.reference,
        others.judge.targets,
        others.labels if labels is None else labels,
        tokenizer.spec.templates,
        tokenizer,
        encode,
    )


def _candidates(
    options: CalibrationOptions,
    model: ModelProto,
    tokens: Tokens,
    judge: TextJudge,
    progress: Progress,
) -> Iterator[Candidate]:
    def batches() -> Iterator[Tokens]:
        return (tokens[at : at + BATCH] for at in range(0, len(tokens), BATCH))

    if "fp16" in options.precisions:
        yield half_candidate(model, batches, judge, options.limits, progress)
    if options.text_int8:
        yield int8_candidate(model, batches, judge, options.limits, progress)


def _notes(texts: Texts, told: Naming | None) -> Iterator[str]:
    if not texts.apart:
        yield (
            f"there are {len(texts.judged)} texts only: the text encoder was judged on those that "
            "it was calibrated on (more --labels, or captions, give others)"
        )
    if told and len(told.templates) < told.of:
        yield (
            "the text encoder was judged on frames by the labels in the first "
            f"{len(told.templates)} of {told.of} templates"
        )


def write_text_precisions(
    made: MadeTexts, folder: Path, allow_rejected: bool
) -> tuple[dict[str, TextPrecision], list[str]]:
    """Writes the encoders that hold the gate (with `allow_rejected` the others too, so marked);
    returns their entries for the manifest, and what is wrong with the others, in words."""
    written = write_candidates(made.candidates, "text", folder, allow_rejected)
    entries = {name: TextPrecision(file=file, **entry) for name, file, entry in written}
    return entries, refusals(made.candidates, "text ")
