"""Opens a bundle's encoders on a backend: which one, in which precision, and why."""

from collections.abc import Sequence
from dataclasses import replace

from .backends import NAMES, Encoder, Opened, image_border, text_border
from .bundle import Bundle
from .engine_file import FOLDER, Kind, built_precisions, find_engine
from .errors import BackendUnavailable, BundleError
from .on_cpu import open_image_on_cpu, open_text_on_cpu, precisions, require

_ON_GPU = ("ort-cuda", "ort-tensorrt")  # ONNX Runtime's


def open_image(bundle: Bundle, backend: str, precision: str, threads: int | None) -> Opened:
    """Opens the image encoder. `backend` "auto" is TensorRT where the bundle has an engine for
    this device, else the fastest on the CPU. `precision` "auto" is the fastest accepted one: of
    engines as they were tested, on the CPU as it is measured when a bundle is first loaded
    (`choice`); in ONNX Runtime on a GPU it is fp16 where that was accepted. Where both are named
    nothing is measured.

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
    found = open_image_on_cpu(bundle, backend, precision, threads)
    return replace(found, notes=notes + found.notes)


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
    return open_text_on_cpu(bundle, name, backend, threads)


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


def _gpu_session(bundle: Bundle, backend: str, precision: str, threads: int | None) -> Opened:
    eligible = precisions(bundle, precision)
    precision = next((name for name in ("fp16", "fp32") if name in eligible), eligible[0])
    name = bundle.manifest.precisions[precision].image
    encoder = _on_gpu(bundle, name, "image", backend, precision, threads)
    return Opened(encoder, backend, precision)


def _on_gpu(
    bundle: Bundle, name: str, kind: Kind, backend: str, precision: str, threads: int | None
) -> Encoder:
    """A file of the bundle in ONNX Runtime on the GPU. Its TensorRT names what it keeps without
    regard to weights, so each file has a folder of its own."""
    require("onnxruntime", "gpu")
    from .ort_gpu import GpuEncoder

    path = bundle.file(name)
    cache = bundle.folder / FOLDER / "ort" / bundle.manifest.files[name].sha256[:16]
    border = (image_border if kind == "image" else text_border)(bundle.manifest)
    return GpuEncoder(path, border, backend, precision, cache, threads)


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
