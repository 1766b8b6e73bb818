"""What the machine itself means for edgeclip: board, processors, memory, driver."""

from dataclasses import dataclass
from typing import Literal

from . import mend
from .board import dotted, release_of
from .machine import Facts

Status = Literal["ok", "missing", "warning"]
GIB = 1 << 30


@dataclass(frozen=True)
class Item:
    """One thing: what was found, what that means for edgeclip, and the command that mends it."""

    name: str
    status: Status
    found: str
    means: str = ""
    mend: str = ""


def of_machine(facts: Facts) -> list[Item]:
    """A row for each part of the machine; a Jetson has two more."""
    jetson = [_jetpack(facts), _power(facts)] if facts.jetson else []
    checks = (_cpu, _memory, _disk, _gpu, _driver, _toolkit, _python)
    return [_board(facts), *jetson, *(check(facts) for check in checks)]


def _board(facts: Facts) -> Item:
    if facts.model:
        return Item("board", "ok", facts.model)
    if facts.jetson:
        means = "/proc/device-tree/model cannot be read, as in some containers"
        return Item("board", "warning", "a Jetson that does not name itself", means)
    return Item("board", "ok", "no device tree: a PC, a server or a virtual machine")


def _jetpack(facts: Facts) -> Item:
    if not facts.l4t:
        means = "nothing here names the L4T release; a container does not see the host's"
        mount = "docker run -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro ..."
        return Item("JetPack", "missing", "not known", means, mount)
    pack = facts.jetpack
    package = dotted(release_of(facts.jetpack_package))
    version = package or (pack.version if pack else "unknown")
    found = f"JetPack {version} (L4T {dotted(facts.l4t)})"
    if pack is None:
        return Item("JetPack", "warning", found, "this release of edgeclip does not know it")
    means = f"it brings TensorRT {pack.tensorrt}, CUDA {pack.cuda}, Python {pack.python}"
    if mend.too_old(pack.tensorrt):
        means += "; edgeclip needs TensorRT 8.6 or later, so the GPU is not used"
        return Item("JetPack", "warning", found, means, mend.newer_jetpack(facts))
    return Item("JetPack", "ok", found, means)


def _power(facts: Facts) -> Item:
    power = facts.power
    if power is None:
        means = "how fast it may run is not known; a container does not see it, the host does"
        return Item("power mode", "missing", "nvpmodel does not say", means, "sudo nvpmodel -q")
    if power.fastest is None or power.name == power.fastest[1]:
        return Item("power mode", "ok", power.name)
    number, name = power.fastest
    means = f"it limits the clocks; {name} does not, if cooling and power supply allow"
    return Item("power mode", "warning", power.name, means, f"sudo nvpmodel -m {number}")


def _cpu(facts: Facts) -> Item:
    cpu = facts.cpu
    if cpu is None:
        return Item("CPU", "warning", "/proc/cpuinfo does not say")
    found = f"{cpu.model}, {cpu.cores} logical cores"
    if cpu.int8:
        means = "int8 can be faster than fp32 on it"
        return Item("CPU", "ok", f"{found}, {', '.join(cpu.int8)}", means)
    wanted = "dotprod or i8mm" if cpu.arm else "AVX-512 VNNI, AVX VNNI or AMX"
    means = f"it has no {wanted}: int8 saves memory on it, but hardly time"
    return Item("CPU", "warning", found, means)


def _memory(facts: Facts) -> Item:
    memory = facts.memory
    if memory is None:
        return Item("memory", "warning", "/proc/meminfo does not say")
    sizes = (memory.total / GIB, memory.available / GIB, memory.swap / GIB)
    found = "{:.1f} GiB, {:.1f} available, swap {:.1f}".format(*sizes)
    if memory.available >= 2 * GIB:
        return Item("memory", "ok", found)
    means = "building an engine, or a large model, may be killed: close other programs"
    if memory.swap:
        return Item("memory", "warning", found, means)
    return Item("memory", "warning", found, f"{means}, or add swap", mend.swap())


def _disk(facts: Facts) -> Item:
    if facts.free is None:
        return Item("disk", "warning", "its free space is not known")
    found = f"{facts.free / GIB:.1f} GiB free"
    if facts.free >= 2 * GIB:
        return Item("disk", "ok", found)
    means = "bundles and engines may not fit"
    return Item("disk", "warning", found, means, mend.pip(facts, "cache purge"))


def _gpu(facts: Facts) -> Item:
    gpu = facts.gpu
    if gpu is None and facts.gpu_on_bus:
        found = "an NVIDIA GPU whose driver does not answer"
        return Item("GPU", "warning", found, "it is not used", mend.driver(facts))
    if gpu is None:
        return Item("GPU", "missing", "no NVIDIA GPU", "onnxruntime and openvino run on the CPU")
    capability = f"compute capability {gpu.capability or 'unknown'}"
    found = ", ".join(part for part in (gpu.name, capability, gpu.memory) if part)
    if facts.gpu_error:
        means = f"CUDA does not open it, so nothing can use it: {facts.gpu_error}"
        return Item("GPU", "warning", found, means, mend.driver(facts))
    return Item("GPU", "ok", found)


def _driver(facts: Facts) -> Item:
    newest = f"for CUDA up to {facts.driver_cuda}" if facts.driver_cuda else ""
    if facts.driver or newest:
        return Item("driver", "ok", " ".join(filter(None, (facts.driver, newest))))
    if facts.jetson:
        return Item("driver", "ok", "L4T's own, without a version")
    if facts.gpu_on_bus:
        return Item("driver", "missing", "none", "the GPU is not used", mend.driver(facts))
    return Item("driver", "missing", "none", "none is needed without an NVIDIA GPU")


def _toolkit(facts: Facts) -> Item:
    if facts.toolkit:
        return Item("CUDA toolkit", "ok", facts.toolkit)
    found = "not in /usr/local/cuda"
    if facts.jetson:
        means = "a Jetson's TensorRT uses its libraries"
        return Item("CUDA toolkit", "missing", found, means, mend.JETPACK)
    if facts.gpu is None:
        return Item("CUDA toolkit", "missing", found, "none is needed without an NVIDIA GPU")
    return Item("CUDA toolkit", "missing", found, "pip's packages bring what is needed of it")


def _python(facts: Facts) -> Item:
    python = facts.interpreter
    kind = "a virtual environment" if python.in_venv else "no virtual environment"
    found = f"{python.version} in {python.prefix}, {kind}"
    hidden = facts.nvinfer and not python.sees_system and not facts.answer("tensorrt").ok
    if not hidden or mend.too_old(facts.nvinfer):
        return Item("Python", "ok", found)
    means = "it does not see the system's packages, and TensorRT is one of them"
    return Item("Python", "warning", found, means, mend.tensorrt(facts))
