"""`runtime.load` and `runtime.classify`: one bundle, one module-level classifier."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from .bundle import Bundle
from .classifier import Classifier, Source
from .errors import BundleError, DataError
from .frames import Box, Color
from .label_sets import Labels
from .prediction import Prediction
from .text_cache import machine_cache

_lock = threading.Lock()
_current: Classifier | None = None


def load(
    bundle: str | Path,
    labels: Labels | None = None,
    *,
    prompts: str | None = None,
    templates: Sequence[str] | None = None,
    backend: str = "auto",
    precision: str = "auto",
    text_precision: str = "fp32",
    threshold: float | None = None,
    threads: int | None = None,
) -> Classifier:
    """Loads a bundle folder and makes it the one that `runtime.classify` uses.

    Labels come from `labels` (a list, a mapping to synonyms, or a label set with negative prompts,
    groups and background: see `runtime.label_sets`), from the bundle's prompt bank named `prompts`,
    or, with neither, from its bank "default" where it has one. A prediction whose score is below
    `threshold` is `unknown`; by default as it was fitted with the prompt bank, if it was.
    `text_precision` is that of the text encoder which embeds labels that are not in a prompt bank.
    Their embeddings are kept for the next time in $EDGECLIP_CACHE, or ~/.cache/edgeclip, and so is
    which `backend` and `precision` is the fastest here: what of them is "auto" is measured once
    (see `runtime.opening`), and noted in `notes`. Name both for the same results everywhere.
    Raises BundleError, BackendUnavailable or DataError.

        clf = runtime.load("bundle", labels=["a cat", "a dog"])
        print(clf.classify(frame).label)
    """
    if labels is not None and prompts is not None:
        raise DataError("give labels= or prompts=, not both")
    if templates is not None and labels is None:
        raise DataError("templates go with labels: a prompt bank has its own")
    classifier = Classifier(
        Bundle(bundle),
        backend=backend,
        precision=precision,
        text_precision=text_precision,
        threads=threads,
    )
    classifier.threshold = threshold
    classifier.text_cache = machine_cache()
    if labels is not None:
        classifier.set_labels(labels, templates)
    elif prompts is not None:
        classifier.use_prompts(prompts)
    elif "default" in classifier.bundle.manifest.prompts:
        classifier.use_prompts("default")
    global _current
    with _lock:
        _current = classifier
    return classifier


def classify(frame: Source, color: Color = "bgr", roi: Box | None = None) -> Prediction:
    """Classifies a frame with the bundle loaded last, or the one that $EDGECLIP_BUNDLE names.

    Raises as `Classifier.classify` does, and BundleError where there is no bundle.
    """
    classifier = _current
    if classifier is None:
        folder = os.environ.get("EDGECLIP_BUNDLE")
        if not folder:
            raise BundleError(
                "no bundle is loaded: call runtime.load(folder) first, or set EDGECLIP_BUNDLE"
            )
        classifier = load(folder)
    return classifier.classify(frame, color, roi)
