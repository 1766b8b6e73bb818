"""What can go wrong, as one tree.

EdgeClipError
├── BundleError             the bundle folder cannot be used
│   ├── MissingFile         a file that it needs is not there
│   ├── ChecksumMismatch    a file is not the one that was exported
│   └── UnsupportedFormat   a file is of another format or version, or malformed
├── BackendUnavailable      an inference backend cannot run here
│   └── CudaError           a call of CUDA failed
├── FrameError              a frame, picture or video cannot be read
├── DataError               training data, labels or options are not usable
└── GateFailed              a file was made, but does not do what it must
    └── PrecisionRefused    the bundle is there, but a precision of it costs too much

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


# CUDA's errors after which no call of the process works any more (driver_types.h), and their text,
# which is all that pycuda tells.
_LOST = {
    "cudaErrorCudartUnloading": "driver shutting down",
    "cudaErrorDevicesUnavailable": "CUDA-capable device(s) is/are busy or unavailable",
    "cudaErrorDeviceUninitialized": "invalid device context",
    "cudaErrorECCUncorrectable": "uncorrectable ECC error encountered",
    "cudaErrorNvlinkUncorrectable": "uncorrectable NVLink error detected during the execution",
    "cudaErrorContained": "Invalid access of peer GPU memory over nvlink or a hardware error",
    "cudaErrorIllegalAddress": "an illegal memory access was encountered",
    "cudaErrorLaunchTimeout": "the launch timed out and was terminated",
    "cudaErrorContextIsDestroyed": "context is destroyed",
    "cudaErrorAssert": "device-side assert triggered",
    "cudaErrorHardwareStackError": "hardware stack error",
    "cudaErrorIllegalInstruction": "an illegal instruction was encountered",
    "cudaErrorMisalignedAddress": "misaligned address",
    "cudaErrorInvalidAddressSpace": "operation not supported on global/shared address space",
    "cudaErrorInvalidPc": "invalid program counter",
    "cudaErrorLaunchFailure": "unspecified launch failure",
    "cudaErrorExternalDevice": "an async error has occured in external entity outside of CUDA",
    "cudaErrorUnknown": "unknown error",
}


class CudaError(BackendUnavailable):
    """A call of CUDA failed: `call` is the function, `error` CUDA's name of the error ("" where it
    is not known) and `text` what CUDA says of it."""

    def __init__(self, call: str, error: str, text: str) -> None:
        self.call, self.error, self.text = call, error, text
        what = f"{error} ({text})" if error else text
        out = "; the GPU is lost to this process: start it again" if self.lost else ""
        super().__init__(f"CUDA failed in {call}: {what}{out}")

    @property
    def lost(self) -> bool:
        """Whether CUDA cannot be used any more by this process."""
        return self.error in _LOST or self.text in _LOST.values()


class FrameError(EdgeClipError):
    """A frame, picture or video is not one that can be classified."""


class DataError(EdgeClipError):
    """Training data, labels, templates or options are not usable."""


class GateFailed(EdgeClipError):
    """A result was produced and measured, and is not good enough to ship."""

    exit_code = 3


class PrecisionRefused(GateFailed):
    """A bundle was written, but a precision of it costs too much."""
