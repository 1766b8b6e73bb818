"""Encoders on the CPU: in ONNX Runtime or OpenVINO, as named, or whichever is fastest here."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

from .backends import Encoder, Opened, image_border, text_border
from .bundle import Bundle
from .choice import Candidate, Timed, choose, noise, trim_memory
from .errors import BackendUnavailable, BundleError, UnsupportedFormat

# In the order in which they are tried: what is fast as a rule first.
_BACKENDS = ("openvino", "onnxruntime")
_PRECISIONS = ("int8", "fp32", "fp16", "int8_fp16")
# No CPU gained by these. (OpenVINO runs fp16 in bf16, where that is allowed.)
_FOR_GPUS = {
    Candidate("onnxruntime", "fp16"),
    Candidate("onnxruntime", "int8_fp16"),
    Candidate("openvino", "int8_fp16"),
}
_TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_EXTRAS = {"onnxruntime": "cpu", "openvino": "openvino"}


def open_image_on_cpu(bundle: Bundle, backend: str, precision: str, threads: int | None) -> Opened:
    """Opens the image encoder on a backend in a precision. What of both is "auto" is measured when
    a bundle is first loaded here, and remembered. Raises BackendUnavailable and BundleError."""
    levels = sorted(precisions(bundle, precision), key=_rank)
    every = [Candidate(name, level) for level in levels for name in _backends(backend)]
    likely = [one for one in every if one not in _FOR_GPUS] or every
    others = [one for one in every if one not in likely]
    try:
        opened = _best(bundle, likely, threads)
        left_out = [f"{one} was left out: it is for GPUs" for one in others]
    except (BackendUnavailable, UnsupportedFormat) as error:
        if not others:
            raise
        for one in likely:  # a bundle that is damaged is refused
            bundle.file(bundle.manifest.precisions[one.precision].image)
        opened = _best(bundle, others, threads)
        left_out = [f"{', '.join(map(str, likely))} was left out: {error}"]
    trim_memory()
    return replace(opened, notes=(*opened.notes, *left_out))


def open_text_on_cpu(bundle: Bundle, name: str, backend: str, threads: int | None) -> Encoder:
    """Opens the text encoder's file `name`. Raises as `open_image_on_cpu` does."""
    require(backend)
    path, border = bundle.file(name), text_border(bundle.manifest)
    with _loading(backend):
        if backend == "openvino":
            from .vino import VinoEncoder

            return VinoEncoder(path, border, threads)
        from .ort import OrtEncoder

        return OrtEncoder(path, border, threads)


def precisions(bundle: Bundle, precision: str) -> list[str]:
    """The one that is named, or for "auto" all that were accepted. Raises BundleError."""
    have = bundle.manifest.precisions
    if precision == "auto":
        accepted = [name for name, entry in have.items() if entry.status == "accepted"]
        if not accepted:
            raise BundleError(
                f"{bundle.folder} has no accepted precision; name one with precision="
            )
        return accepted
    if precision not in have:
        raise BundleError(
            f"{bundle.folder} has no precision {precision!r}; it has: {', '.join(have)}"
        )
    return [precision]


def require(backend: str, extra: str = "") -> None:
    """Raises BackendUnavailable, naming the extra, where a backend's library is not installed."""
    if not _is_installed(backend):
        raise BackendUnavailable(
            f"{_TITLES[backend]} is not installed: pip install "
            f"'edgeclip[{extra or _EXTRAS[backend]}]', or use another backend; "
            "edgeclip doctor says which will work here"
        )


def _is_installed(library: str) -> bool:
    """Whether there is a package of this name; a mere folder, which Python takes for one too, has
    no origin."""
    spec = find_spec(library)
    return spec is not None and spec.origin is not None


def _rank(precision: str) -> tuple[int, str]:
    """Sorts what is likely to be fast to the front."""
    known = precision in _PRECISIONS
    return _PRECISIONS.index(precision) if known else len(_PRECISIONS), precision


def _backends(backend: str) -> Sequence[str]:
    """The one that is named, or for "auto" all that are installed. Raises BackendUnavailable."""
    if backend == "auto":
        installed = [name for name in _BACKENDS if _is_installed(name)]
        if installed:
            return installed
        backend = "onnxruntime"
    require(backend)
    return [backend]


def _best(bundle: Bundle, candidates: Sequence[Candidate], threads: int | None) -> Opened:
    """The only one, or the fastest."""
    if len(candidates) == 1:
        return _open(bundle, candidates[0], threads)
    return _fastest(bundle, candidates, threads)


def _fastest(bundle: Bundle, candidates: Sequence[Candidate], threads: int | None) -> Opened:
    made = bundle.manifest
    names = {each: made.precisions[each.precision].image for each in candidates}
    choice, how = choose(
        {each: made.files[name] for each, name in names.items()},
        noise(made.image.height, made.image.width),
        threads,
        check=lambda: [bundle.file(name) for name in names.values()],
        opened=lambda candidate: _open(bundle, candidate, threads).encoder,
    )
    opened, took, failed = _first(bundle, choice.timed, threads)
    others = ", ".join(str(one) for one in choice.timed if one is not took) or "no other"
    return replace(
        opened,
        notes=(f"auto took {took} ({others}), {how}", *failed, *choice.left_out, *opened.notes),
        chosen=f"the fastest of {len(choice.timed)} here",
    )


def _first(
    bundle: Bundle, timed: Sequence[Timed], threads: int | None
) -> tuple[Opened, Timed, list[str]]:
    """The first that opens; what was remembered may not do so any more, and is noted."""
    failed: list[str] = []
    for one in timed:
        try:
            return _open(bundle, one.candidate, threads), one, failed
        except (BackendUnavailable, UnsupportedFormat) as error:
            failed.append(f"{one.candidate} does not open any more: {error}")
    raise BackendUnavailable("; ".join(failed))


def _open(bundle: Bundle, candidate: Candidate, threads: int | None) -> Opened:
    backend, precision = candidate
    with _loading(backend):
        if backend == "openvino":
            from .vino_bf16 import open_vino

            encoder, notes = open_vino(bundle, precision, threads)
            return Opened(encoder, backend, precision, notes)
        from .ort import OrtEncoder

        path = bundle.file(bundle.manifest.precisions[precision].image)
        return Opened(OrtEncoder(path, image_border(bundle.manifest), threads), backend, precision)


@contextlib.contextmanager
def _loading(backend: str) -> Iterator[None]:
    """Says that a library is installed and does not load."""
    try:
        yield
    except ImportError as error:
        raise BackendUnavailable(
            f"{_TITLES[backend]} is installed, but does not load ({error}); "
            "edgeclip doctor says more"
        ) from error
