"""Opens a bundle's encoders on a backend: which one, in which precision, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from .backends import NAMES, Encoder, image_border, text_border
from .bundle import Bundle
from .engine_file import FOLDER, Kind, built_precisions, find_engine
from .errors import BackendUnavailable, BundleError

_ON_GPU = ("ort-cuda", "ort-tensorrt")  # ONNX Runtime's


@dataclass(frozen=True)
class Opened:
    """An image encoder that is ready to run. `notes` say why another backend was not taken."""

    encoder: Encoder
    backend: str
    precision: str
    notes: tuple[str, ...] = ()


def open_image(bundle: Bundle, backend: str, precision: str, threads: int | None) -> Opened:
    """Opens the image encoder. `backend` "auto" is TensorRT where the bundle has an engine for
    this device, else ONNX Runtime on the CPU. `precision` "auto" is the fastest engine; fp32 on
    the CPU; fp16, where it was accepted, in ONNX Runtime on the GPU.

    Raises BackendUnavailable, naming what to install or to build, and BundleError.
    """
    if backend not in ("auto", *NAMES):
        raise BackendUnavailable(
            f"there is no backend {backend!r}; this release has {', '.join(NAMES)} (or 'auto')"
        )
    if backend == "tensorrt":
        return _engine(bundle, precision)
    if backend in _ON_GPU:
        return _gpu_session(bundle, backend, precision, threads)
    notes: tuple[str, ...] = ()
    if backend == "auto" and any((bundle.folder / FOLDER).glob("image.*.json")):
        try:
            return _engine(bundle, precision)
        except BackendUnavailable as error:
            notes = (f"tensorrt: {error}",)
    return _session(bundle, precision, threads, notes)


def open_text(bundle: Bundle, backend: str, precision: str, threads: int | None) -> Encoder:
    """Opens the text encoder on a backend that `open_image` chose. Raises as that does.

    With `ort-tensorrt` the CUDA provider runs it: texts come in batches of every size, and TensorRT
    would build an engine for each.
    """
    name = text_file(bundle, precision)
    if backend == "tensorrt":
        if precision != "fp32":
            raise BackendUnavailable(
                f"engines of the text encoder are built of its fp32 form; {precision} runs on the "
                "backend onnxruntime"
            )
        return _open_engine(bundle, "text", precision)
    if backend in _ON_GPU:
        return _on_gpu(bundle, name, "text", "ort-cuda", precision, threads)
    _require_onnxruntime()
    from .ort import OrtEncoder

    return OrtEncoder(bundle.file(name), text_border(bundle.manifest), threads)


def text_file(bundle: Bundle, precision: str) -> str:
    """The name of the text encoder of this precision. Raises BundleError."""
    made = bundle.manifest
    if precision == "fp32":
        return made.text_encoder
    if precision not in made.text_precisions:
        have = ", ".join(["fp32", *made.text_precisions])
        raise BundleError(
            f"{bundle.folder} has no text encoder of the precision {precision!r}; it has: {have}"
        )
    return made.text_precisions[precision].file


def _session(bundle: Bundle, precision: str, threads: int | None, notes: tuple[str, ...]) -> Opened:
    _require_onnxruntime()
    from .ort import OrtEncoder

    precision = _choose_precision(bundle, precision, "fp32")
    path = bundle.file(bundle.manifest.precisions[precision].image)
    encoder = OrtEncoder(path, image_border(bundle.manifest), threads)
    return Opened(encoder, "onnxruntime", precision, notes)


def _gpu_session(bundle: Bundle, backend: str, precision: str, threads: int | None) -> Opened:
    precision = _choose_precision(bundle, precision, "fp16", "fp32")
    name = bundle.manifest.precisions[precision].image
    encoder = _on_gpu(bundle, name, "image", backend, precision, threads)
    return Opened(encoder, backend, precision)


def _on_gpu(
    bundle: Bundle, name: str, kind: Kind, backend: str, precision: str, threads: int | None
) -> Encoder:
    """A file of the bundle in ONNX Runtime on the GPU. Its TensorRT names what it keeps without
    regard to weights, so each file has a folder of its own."""
    _require_onnxruntime("gpu")
    from .ort_gpu import GpuEncoder

    path = bundle.file(name)
    cache = bundle.folder / FOLDER / "ort" / bundle.manifest.files[name].sha256[:16]
    border = (image_border if kind == "image" else text_border)(bundle.manifest)
    return GpuEncoder(path, border, backend, precision, cache, threads)


def _require_onnxruntime(extra: str = "cpu") -> None:
    if find_spec("onnxruntime") is None:
        raise BackendUnavailable(
            f"ONNX Runtime is not installed: pip install 'edgeclip[{extra}]', or use another "
            "backend; edgeclip doctor says which will work here"
        )


def _choose_precision(bundle: Bundle, precision: str, *best: str) -> str:
    """`auto` takes the first of `best` that was accepted, else the first accepted one."""
    have = bundle.manifest.precisions
    if precision != "auto":
        if precision not in have:
            raise BundleError(
                f"{bundle.folder} has no precision {precision!r}; it has: {', '.join(have)}"
            )
        return precision
    accepted = [name for name, entry in have.items() if entry.status == "accepted"]
    if not accepted:
        raise BundleError(f"{bundle.folder} has no accepted precision; name one with precision=")
    return next((name for name in best if name in accepted), accepted[0])


def _engine(bundle: Bundle, precision: str) -> Opened:
    from .cuda import open_cuda
    from .trt import platform

    if precision == "auto":
        here = platform(open_cuda())
        built = built_precisions(bundle, here)
        if not built:
            raise BackendUnavailable(
                f"{bundle.folder} has no TensorRT engine for {here.gpu} and TensorRT "
                f"{here.tensorrt}; build one here with `edgeclip build {bundle.folder}`"
            )
        return _first_engine(bundle, built)
    return Opened(_open_engine(bundle, "image", precision), "tensorrt", precision)


def _first_engine(bundle: Bundle, precisions: Sequence[str]) -> Opened:
    """The first of several engines that opens; what is wrong with those before it is noted."""
    notes: list[str] = []
    for precision in precisions:
        try:
            encoder = _open_engine(bundle, "image", precision)
        except BackendUnavailable as error:
            notes.append(str(error))
        else:
            return Opened(encoder, "tensorrt", precision, tuple(notes))
    raise BackendUnavailable(" ".join(notes))


def _open_engine(bundle: Bundle, kind: Kind, precision: str) -> Encoder:
    from .cuda import open_cuda
    from .trt import TrtEncoder, platform

    cuda = open_cuda()
    plan, info = find_engine(bundle, kind, precision, platform(cuda))
    border = (image_border if kind == "image" else text_border)(bundle.manifest)
    return TrtEncoder(plan, info, border, cuda)
