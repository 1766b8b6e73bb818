"""What can go wrong, as one tree.

EdgeClipError
├── BundleError             the bundle folder cannot be used
│   ├── MissingFile         a file that it needs is not there
│   ├── ChecksumMismatch    a file is not the one that was exported
│   └── UnsupportedFormat   a file is of another format or version, or malformed
├── BackendUnavailable      an inference backend cannot run here
├── FrameError              a frame, picture or video cannot be read
├── DataError               training data, labels or options are not usable
└── GateFailed              a file was made, but does not do what it must

Every message names the file, field or flag, and the way out.
"""


class EdgeClipError(Exception):
    """Base of every error that edgeclip raises on purpose."""

    exit_code = 2


class BundleError(EdgeClipError):
    """The bundle cannot be used."""


class MissingFile(BundleError):
    """A file of the bundle is not there."""


class ChecksumMismatch(BundleError):
    """A file of the bundle is not the one that its manifest describes."""


class UnsupportedFormat(BundleError):
    """A file of the bundle is malformed, or of a version that this release cannot read."""


class BackendUnavailable(EdgeClipError):
    """An inference backend, or a package that it needs, is missing."""


class FrameError(EdgeClipError):
    """A frame, picture or video is not one that can be classified."""


class DataError(EdgeClipError):
    """Training data, labels, templates or options are not usable."""


class GateFailed(EdgeClipError):
    """A result was produced and measured, and is not good enough to ship."""

    exit_code = 3
