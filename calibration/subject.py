"""What is evaluated: a model's two encoders, whatever runs them, held against a data file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from runtime.bundle import Bundle
from runtime.classifier import Classifier
from runtime.frames import Frame
from runtime.manifest import Head, ImageSpec

from .embed import Pictures, embed_pictures
from .evaluation import Evaluation, evaluate
from .metrics import Floats
from .pairs import Pairs, check_bad, read_pairs


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that can be evaluated.

    `encode` takes uint8 RGB [N, H, W, 3] as `image` says and `embed_text` N texts; both give unit
    rows [N, D]. `about` says in words what it is and what runs it.
    """

    about: Mapping[str, str]
    image: ImageSpec
    head: Head
    templates: tuple[str, ...]
    encode: Callable[[Frame], Floats]
    embed_text: Callable[[Sequence[str]], Floats]


def bundle_subject(folder: Path, backend: str = "auto", precision: str = "auto") -> Subject:
    """A bundle on a backend and in a precision. Raises BundleError or BackendUnavailable."""
    classifier = Classifier(Bundle(folder), backend=backend, precision=precision)
    made = classifier.bundle.manifest

    def encode(frames: Frame) -> Floats:  # one by one, as `classify` embeds the frames of a camera
        return np.stack([classifier.embed(frame, "rgb") for frame in frames])

    return Subject(
        about={
            "model": made.model.name,
            "weights": f"bundle {folder} ({made.model.source})",
            "runs on": f"{classifier.precision} on {classifier.backend}",
        },
        image=made.image,
        head=made.head,
        templates=made.text.templates,
        encode=encode,
        embed_text=classifier.embed_text,
    )


def measure(
    subject: Subject,
    source: Path,
    templates: Sequence[str] | None = None,
    max_bad: float = 0.01,
    quiet: bool = False,
) -> tuple[Pairs, Evaluation]:
    """Evaluates a model on a CSV or folder (see `read_pairs`); returns what was used, and the
    evaluation. Progress goes to stderr, unless `quiet`.

    `templates` (default: the subject's) go with labels. Raises DataError where more than the share
    `max_bad` of the items is bad, and GateFailed where the model gives no numbers.
    """
    templates = subject.templates if templates is None else templates
    pairs = read_pairs(source.expanduser(), templates)
    check_bad(pairs.bad, len(pairs) + len(pairs.bad), max_bad, source)
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("Encoding pictures", total=len(pairs))
        pairs, images = embed_pictures(
            pairs,
            Pictures(pairs.files, subject.image),
            subject.encode,
            lambda n: progress.advance(task, n),
        )
        check_bad(pairs.bad, len(pairs) + len(pairs.bad), max_bad, source)
        progress.add_task("Encoding texts", total=None)
        return pairs, evaluate(pairs, images, subject.embed_text, subject.head, templates)
