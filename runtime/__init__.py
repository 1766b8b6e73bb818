"""Classifies camera frames with a bundle, without torch.

import runtime

clf = runtime.load("bundle", labels=["a cat", "a dog"])
print(clf.classify(frame).label)
"""

from .api import classify, load
from .classifier import Classifier
from .errors import (
    BackendUnavailable,
    BundleError,
    ChecksumMismatch,
    DataError,
    EdgeClipError,
    FrameError,
    GateFailed,
    MissingFile,
    UnsupportedFormat,
)
from .prediction import Prediction
from .stream import Seen, Stream

__all__ = [
    "BackendUnavailable",
    "BundleError",
    "ChecksumMismatch",
    "Classifier",
    "DataError",
    "EdgeClipError",
    "FrameError",
    "GateFailed",
    "MissingFile",
    "Prediction",
    "Seen",
    "Stream",
    "UnsupportedFormat",
    "classify",
    "load",
]
