"""TensorRT engines of a bundle: where they lie, and what they were built from and for.

`engines/` is a cache of this device. A plan is machine code: it is only deserialised where its
sidecar fits the bundle, the TensorRT release and the GPU that are here now, and its hash the
sidecar. The sidecar names the plan, so that a rebuild takes the place of an engine in one step.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from .bundle import Bundle, describe
from .errors import BackendUnavailable, BundleError, MissingFile, UnsupportedFormat

FOLDER = "engines"
FORMAT = 1
Kind = Literal["image", "text"]
Positive = Annotated[int, msgspec.Meta(gt=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The sidecar of a plan.

    `precision` is that of the encoder file which it was built from; `steps` say what was tried
    before it and why that failed. `batches` are the smallest, best and largest batch. `figures`
    are those of the self-test: against the bundle's fp32 embeddings, and milliseconds. `layers`
    counts the engine's layers by the type that they give, as TensorRT's inspector tells it.
    """

    format: int = FORMAT
    plan: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+\.plan$")]
    kind: Kind
    precision: str
    onnx_sha256: Sha256
    plan_sha256: Sha256
    bytes: Positive
    tensorrt: str
    gpu: str
    capability: tuple[int, int]
    batches: tuple[Positive, Positive, Positive]
    strongly_typed: bool
    flags: tuple[str, ...] = ()
    figures: dict[str, float] = {}
    layers: dict[str, int] = {}
    steps: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Platform:
    """What a plan is bound to: TensorRT's version, the GPU's name and compute capability."""

    tensorrt: str
    gpu: str
    capability: tuple[int, int]

    def slug(self) -> str:
        """A part of a file name."""
        gpu = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        major, minor = self.capability
        return f"trt{self.tensorrt}-{gpu}-sm{major}{minor}"


def encoder_file(bundle: Bundle, kind: Kind, precision: str) -> str:
    """The name of the ONNX file that an engine is built from. Raises UnsupportedFormat."""
    made = bundle.manifest
    if kind == "text":
        return made.text_encoder
    if precision not in made.precisions:
        raise UnsupportedFormat(
            f"{bundle.folder} has no precision {precision!r}; it has: {', '.join(made.precisions)}"
        )
    return made.precisions[precision].image


def info_path(bundle: Bundle, kind: Kind, precision: str, here: Platform) -> Path:
    """Where the sidecar of an encoder's engine for this device lies."""
    return bundle.folder / FOLDER / f"{kind}.{precision}.{here.slug()}.json"


def read_info(path: Path) -> EngineInfo:
    """Reads a sidecar. Raises MissingFile or UnsupportedFormat."""
    if not path.is_file():
        raise MissingFile(f"there is no TensorRT engine {path}")
    try:
        info = msgspec.json.decode(path.read_bytes(), type=EngineInfo)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UnsupportedFormat(f"{path} is not the sidecar of an engine: {error}") from error
    if info.format != FORMAT:
        raise UnsupportedFormat(f"{path} has format {info.format}, this release reads {FORMAT}")
    return info


def mismatches(info: EngineInfo, bundle: Bundle, here: Platform) -> list[str]:
    """Why an engine is not of this bundle, this TensorRT and this GPU, in words."""
    file = encoder_file(bundle, info.kind, info.precision)
    found = []
    if bundle.manifest.files[file].sha256 != info.onnx_sha256:
        found.append(f"it was built from another {file}")
    if info.tensorrt != here.tensorrt:
        found.append(f"it was built by TensorRT {info.tensorrt}, here is {here.tensorrt}")
    if (info.gpu, info.capability) != (here.gpu, here.capability):
        found.append(
            f"it was built on {info.gpu} (compute capability {info.capability[0]}."
            f"{info.capability[1]}), here is {here.gpu} "
            f"({here.capability[0]}.{here.capability[1]})"
        )
    return found


def find_engine(
    bundle: Bundle, kind: Kind, precision: str, here: Platform
) -> tuple[Path, EngineInfo]:
    """The plan of an encoder for this device, its hash checked, and what it is.

    Raises BackendUnavailable, with the command that builds it, where there is none that fits.
    """
    path = info_path(bundle, kind, precision, here)
    command = f"edgeclip build {bundle.folder}"
    command += f" --precision {precision}" if kind == "image" else ""
    try:
        info = read_info(path)
    except MissingFile as error:
        raise BackendUnavailable(
            f"{bundle.folder} has no TensorRT engine of its {precision} {kind} encoder for "
            f"{here.gpu} and TensorRT {here.tensorrt}; build it here with `{command}`"
        ) from error
    except UnsupportedFormat as error:
        raise BackendUnavailable(f"{error}. Build it again here with `{command}`") from error
    plan = path.with_name(info.plan)
    if (info.kind, info.precision) != (kind, precision):
        wrong = [f"it is of the {info.precision} {info.kind} encoder"]
    else:
        wrong = mismatches(info, bundle, here) or list(_damage(plan, info))
    if wrong:
        raise BackendUnavailable(
            f"{path} is not used: {'; '.join(wrong)}. Build it again here with `{command}`"
        )
    return plan, info


def built_precisions(bundle: Bundle, here: Platform) -> list[str]:
    """The accepted precisions of the image encoder that have a sidecar for this device, the
    fastest first, as the self-tests measured them."""
    found = {}
    for name, entry in bundle.manifest.precisions.items():
        path = info_path(bundle, "image", name, here)
        if entry.status == "accepted" and path.is_file():
            found[name] = _milliseconds(path)
    return sorted(found, key=lambda name: found[name])


def _milliseconds(path: Path) -> float:
    try:
        return read_info(path).figures.get("ms", float("inf"))
    except BundleError:  # said where it is opened
        return float("inf")


def _damage(plan: Path, info: EngineInfo) -> Iterator[str]:
    try:
        entry = describe(plan)
    except OSError as error:
        yield f"its plan {plan.name} cannot be read: {error.strerror}"
        return
    if (entry.bytes, entry.sha256) != (info.bytes, info.plan_sha256):
        yield f"the bytes of {plan.name} are not those that were built"
