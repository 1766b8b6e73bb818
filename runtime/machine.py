"""Gathers what there is to know of this machine, from its files, its tools and child processes."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import board
from .cuda import NAMES as CUDA_BINDINGS
from .probes import Answer, ask, run

LIBRARIES = ("tensorrt", "onnxruntime", "openvino", "cv2")
# It runs operators of remote services alone.
NOT_LOCAL = "AzureExecutionProvider"
_FOLDERS = (
    "usr/lib/aarch64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/lib",
    "usr/local/tensorrt/lib",
    "usr/local/cuda/lib64",
)
_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total",
        "--format=csv,noheader")  # fmt: skip


@dataclass(frozen=True)
class Interpreter:
    """A Python: its version as in `3.10`, and where it is installed."""

    version: str
    executable: str
    prefix: str
    base: str
    sees_system: bool

    @property
    def in_venv(self) -> bool:
        return self.prefix != self.base


def this_interpreter() -> Interpreter:
    """The Python that runs this. It sees the system's packages where it is the system's own, or a
    virtual environment of that one, made to see them."""
    in_venv = sys.prefix != sys.base_prefix
    settings = _text(Path(sys.prefix) / "pyvenv.cfg").lower().replace(" ", "")
    visible = not in_venv or "include-system-site-packages=true" in settings
    return Interpreter(
        f"{sys.version_info[0]}.{sys.version_info[1]}",
        sys.executable,
        sys.prefix,
        sys.base_prefix,
        visible and sys.base_prefix == "/usr",
    )


@dataclass(frozen=True)
class Facts:
    """What was found; what was not is empty or None.

    `system` is the ID in os-release, such as `ubuntu`; `nvinfer` is the version of the system's
    TensorRT, and `bindings` the Pythons it is there for. `answers` are by library, `cuda` by CUDA
    binding, `providers` by ONNX Runtime's execution provider. `free` is in bytes.
    """

    interpreter: Interpreter
    cpu: board.Cpu | None = None
    memory: board.Memory | None = None
    free: int | None = None
    system: str = ""
    container: bool = False
    model: str = ""
    l4t: board.Release = ()
    jetpack_package: str = ""
    power: board.PowerMode | None = None
    gpu: board.Gpu | None = None
    gpu_on_bus: bool = False
    driver: str = ""
    driver_cuda: str = ""
    gpu_error: str = ""
    toolkit: str = ""
    nvinfer: str = ""
    bindings: tuple[str, ...] = ()
    answers: dict[str, Answer] = field(default_factory=dict)
    cuda: dict[str, Answer] = field(default_factory=dict)
    providers: dict[str, Answer] = field(default_factory=dict)

    @property
    def jetson(self) -> bool:
        return bool(self.l4t) or "Jetson" in self.model

    @property
    def jetpack(self) -> board.Jetpack | None:
        return board.jetpack(self.l4t)

    def answer(self, library: str) -> Answer:
        return self.answers.get(library, Answer(missing=True))

    def provider(self, name: str) -> Answer:
        return self.providers.get(name, Answer(missing=True))


def gather(
    root: Path = Path("/"),
    where: Path = Path("."),
    *,
    run: Callable[..., str] = run,
    ask: Callable[..., Answer] = ask,
    interpreter: Interpreter | None = None,
) -> Facts:
    """All facts of the machine whose files lie under `root`; `where` is a place on its disk."""
    packages = board.packages(
        _text(root / "var/lib/dpkg/status"), {"nvidia-jetpack", "nvidia-l4t-core"}
    )
    l4t = board.l4t_release(_text(root / "etc/nv_tegra_release")) or board.release_of(
        packages.get("nvidia-l4t-core", "")
    )
    model = board.device_tree_text(_text(root / "proc/device-tree/model"))
    driver = board.driver_version(_text(root / "proc/driver/nvidia/version"))
    gpu, answer = _gpu(model, driver, run, ask)
    answers = {name: ask(name) for name in LIBRARIES}
    return Facts(
        interpreter=interpreter or this_interpreter(),
        cpu=board.cpu(_text(root / "proc/cpuinfo")),
        memory=board.memory(_text(root / "proc/meminfo")),
        free=_free(where),
        system=board.system_id(_text(root / "etc/os-release")),
        container=(root / ".dockerenv").exists() or (root / "run/.containerenv").exists(),
        model=model,
        l4t=l4t,
        jetpack_package=packages.get("nvidia-jetpack", ""),
        power=board.power_mode(run("nvpmodel", "-q"), _text(root / "etc/nvpmodel.conf")),
        gpu=gpu,
        gpu_on_bus=_on_bus(root),
        driver=driver or (gpu.driver if gpu else ""),
        driver_cuda=answer.value.get("cuda", ""),
        gpu_error=answer.error,
        toolkit=board.toolkit_version(_text(root / "usr/local/cuda/version.json")),
        nvinfer=_nvinfer(root),
        bindings=_bindings(root),
        answers=answers,
        cuda={name: ask("cuda", name) for name in CUDA_BINDINGS},
        providers=_providers(answers["onnxruntime"], ask),
    )


def _text(path: Path) -> str:
    """A file's text, whatever its bytes; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gpu(
    model: str, driver: str, run: Callable[..., str], ask: Callable[..., Answer]
) -> tuple[board.Gpu | None, Answer]:
    """The first GPU, and what CUDA's driver library says, without which nothing can use it.

    A Jetson's nvidia-smi, where it has one, does not know much.
    """
    answer = ask("gpu")
    name, capability = answer.value.get("name", ""), answer.value.get("capability", "")
    listed = (board.gpus(run(*_SMI)) or [board.Gpu("", "", "")])[0]
    found = board.Gpu(
        listed.name or name or (model if board.jetson_capability(model) else ""),
        listed.driver or driver,
        capability or listed.capability or board.jetson_capability(model),
        listed.memory,
    )
    return (found if found.name else None), answer


def _on_bus(root: Path) -> bool:
    """Whether an NVIDIA display or 3D controller is on the PCI bus, with or without a driver."""
    devices = (root / "sys/bus/pci/devices").glob("*/vendor")
    return any(
        _text(vendor).strip() == "0x10de" and _text(vendor.with_name("class")).startswith("0x03")
        for vendor in devices
    )


def _nvinfer(root: Path) -> str:
    """The newest version in the names of the system's libnvinfer files."""
    places = [*_FOLDERS, *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]
    folders = [root / place.lstrip("/") for place in places]
    names = [path.name for folder in folders for path in folder.glob("libnvinfer.so.*")]
    versions = [board.release_of(board.library_version(name)) for name in names]
    return board.dotted(max(versions, default=()))


def _bindings(root: Path) -> tuple[str, ...]:
    """The Pythons, as in `3.10`, for which the system has TensorRT's package."""
    found = (root / "usr/lib").glob("python3*/dist-packages/tensorrt/__init__.py")
    return tuple(sorted({path.parts[-4].removeprefix("python") for path in found}))


def _providers(onnxruntime: Answer, ask: Callable[..., Answer]) -> dict[str, Answer]:
    listed = onnxruntime.value.get("providers", [])
    return {name: ask("provider", name) for name in listed if name != NOT_LOCAL}


def _free(where: Path) -> int | None:
    """Free bytes of the disk that holds `where`, or the folder nearest to it that exists."""
    place = next((p for p in (where.absolute(), *where.absolute().parents) if p.exists()), None)
    try:
        return shutil.disk_usage(place).free if place else None
    except OSError:
        return None
