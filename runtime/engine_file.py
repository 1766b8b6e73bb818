"""TensorRT engines of a bundle: where they lie, and what they were built from and for.

`engines/` is a cache of this device. A plan is machine code: it is only deserialised where its
sidecar fits the bundle, the TensorRT release and the GPU that are here now, and its hash the
sidecar. The sidecar names the plan, so that a rebuild takes the place of an engine in one step.

Two options of a build widen what a plan fits, as far as NVIDIA's support matrix says and no
further: a version compatible one runs under later releases of the same major version, a hardware
compatible one on every GPU from Ampere on that is no Jetson's. Neither leaves its kind of machine.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from .board import release_of
from .bundle import Bundle, describe
from .errors import BackendUnavailable, BundleError, MissingFile, UnsupportedFormat

FOLDER = "engines"
FORMAT = 1
AMPERE = (8, 0)
_TEGRAS = {(8, 7), (10, 1), (11, 0)}  # Orin, and Thor by CUDA 12's number and by 13's
Kind = Literal["image", "text"]
Positive = Annotated[int, msgspec.Meta(gt=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The sidecar of a plan.

    `precision` is that of the encoder file which it was built from; `steps` say what was tried
    before it and why that failed. `batches` are the smallest, best and largest batch. `figures`
    are those of the self-test: against the bundle's fp32 embeddings, and milliseconds. `layers`
    counts the engine's layers by the type that they give, as TensorRT's inspector tells it.
    A version compatible plan holds code for the host's processor, which TensorRT loads and runs.
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
    system: str
    version_compatible: bool = False
    hardware_compatible: bool = False
    batches: tuple[Positive, Positive, Positive]
    strongly_typed: bool
    flags: tuple[str, ...] = ()
    figures: dict[str, float] = {}
    layers: dict[str, int] = {}
    steps: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Platform:
    """What a plan is bound to: TensorRT's version, the GPU's name and compute capability, and the
    operating system and processor, as "linux-aarch64"."""

    tensorrt: str
    gpu: str
    capability: tuple[int, int]
    system: str

    def slug(self, version_compatible: bool = False, hardware_compatible: bool = False) -> str:
        """A part of a file name: the same on all platforms that an engine may run on."""
        major, minor = self.capability
        gpu = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-") + f"-sm{major}{minor}"
        version = self.tensorrt.partition(".")[0] + ".x" if version_compatible else self.tensorrt
        return f"trt{version}-{'ampere-plus' if hardware_compatible else gpu}-{self.system}"

    def against_hardware_compatible(self) -> str:
        """Why no hardware compatible engine runs here; "" where they do."""
        major, minor = self.capability
        if self.capability < AMPERE:
            return f"{self.gpu} is older than Ampere (compute capability {major}.{minor}, not 8.0)"
        if self.capability in _TEGRAS:
            return f"NVIDIA has no hardware compatible engines for Jetson ({self.gpu})"
        return ""


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


def info_path(bundle: Bundle, kind: Kind, precision: str, slug: str) -> Path:
    """Where the sidecar of an encoder's engine lies, for what `Platform.slug` names."""
    return bundle.folder / FOLDER / f"{kind}.{precision}.{slug}.json"


def _infos(bundle: Bundle, kind: Kind, precision: str, here: Platform) -> list[Path]:
    """The sidecars that there are for this device: its own first, as the fastest."""
    slugs = (here.slug(*compatible) for compatible in itertools.product((False, True), repeat=2))
    paths = (info_path(bundle, kind, precision, slug) for slug in slugs)
    return [path for path in paths if path.is_file()]


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
    if not _runs_under(info, here.tensorrt):
        found.append(f"it was built by TensorRT {info.tensorrt}, here is {here.tensorrt}")
    if info.system != here.system:
        found.append(f"it was built on {info.system}, here is {here.system}")
    if info.hardware_compatible:
        found += filter(None, [here.against_hardware_compatible()])
    elif (info.gpu, info.capability) != (here.gpu, here.capability):
        found.append(
            f"it was built on {info.gpu} (compute capability {info.capability[0]}."
            f"{info.capability[1]}), here is {here.gpu} "
            f"({here.capability[0]}.{here.capability[1]})"
        )
    return found


def _runs_under(info: EngineInfo, tensorrt: str) -> bool:
    if not info.version_compatible:
        return info.tensorrt == tensorrt
    built, here = release_of(info.tensorrt), release_of(tensorrt)
    return built[:1] == here[:1] and built <= here


def find_engine(
    bundle: Bundle, kind: Kind, precision: str, here: Platform
) -> tuple[Path, EngineInfo]:
    """The plan of an encoder for this device, its hash checked, and what it is.

    Where there are several, one of this device's own comes first. Raises BackendUnavailable, with
    the command that builds it, where there is none that fits.
    """
    command = f"edgeclip build {bundle.folder}"
    command += f" --precision {precision}" if kind == "image" else ""
    refused = []
    for path in _infos(bundle, kind, precision, here):
        try:
            info = read_info(path)
        except UnsupportedFormat as error:
            refused.append(str(error))
            continue
        wrong = _wrong(info, path, bundle, kind, precision, here)
        if not wrong:
            return path.with_name(info.plan), info
        refused.append(f"{path} is not used: {'; '.join(wrong)}")
    if refused:
        raise BackendUnavailable(f"{'. '.join(refused)}. Build it again here with `{command}`")
    raise BackendUnavailable(
        f"{bundle.folder} has no TensorRT engine of its {precision} {kind} encoder for "
        f"{here.gpu} and TensorRT {here.tensorrt}; build it here with `{command}`"
    )


def _wrong(
    info: EngineInfo, path: Path, bundle: Bundle, kind: Kind, precision: str, here: Platform
) -> list[str]:
    if (info.kind, info.precision) != (kind, precision):
        return [f"it is of the {info.precision} {info.kind} encoder"]
    return mismatches(info, bundle, here) or list(_damage(path.with_name(info.plan), info))


def built_precisions(bundle: Bundle, here: Platform) -> list[str]:
    """The accepted precisions of the image encoder that have a sidecar for this device, the
    fastest first, as the self-tests measured them."""
    found = {}
    for name, entry in bundle.manifest.precisions.items():
        paths = _infos(bundle, "image", name, here)
        if entry.status == "accepted" and paths:
            found[name] = _milliseconds(paths[0])
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
