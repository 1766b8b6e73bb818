"""The conditions under which something is measured: power mode, clocks, temperatures, memory."""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import board
from .probes import run as run_command

MIB = 1 << 20
_SMI = ("nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu", "--format=csv,noheader,nounits")
# Where Linux has the clock of a Jetson's GPU: 17000000.gpu, and .ga10b, .gv11b before JetPack 6.
_JETSON_GPU = ("*.gpu", "*.g[avb][12][01]b", "gpu-gpc-0")


@dataclass(frozen=True)
class Conditions:
    """What the machine tells; the rest is None or empty. `busy` is the number of processes that
    ran or waited for a processor, on average over the last minute, on all `cores`."""

    power_mode: str = ""
    governor: str = ""
    cpu_mhz: int | None = None
    gpu_mhz: int | None = None
    celsius: dict[str, float] = field(default_factory=dict)
    available_mib: int | None = None
    busy: float | None = None
    cores: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts: list[tuple[str, Any]] = [
            ("power mode {}", self.power_mode or None),
            ("governor {}", self.governor or None),
            ("CPU {} MHz", self.cpu_mhz),
            ("GPU {} MHz", self.gpu_mhz),
            ("{:.0f} °C at most", max(self.celsius.values(), default=None)),
            ("{} MiB available", self.available_mib),
            ("load {:.1f}", self.busy),
            ("{} cores", self.cores),
        ]
        return ", ".join(text.format(value) for text, value in parts if value is not None)


def conditions(root: Path = Path("/"), run: Callable[..., str] = run_command) -> Conditions:
    """Those of now, on the machine whose files lie under `root`. Never raises."""
    mode = board.power_mode(run("nvpmodel", "-q"), "")
    memory = board.memory(_text(root / "proc/meminfo"))
    gpu_mhz, gpu_celsius = _smi(run(*_SMI))
    celsius = _thermal_zones(root / "sys/class/thermal")
    if gpu_celsius is not None:
        celsius["GPU"] = float(gpu_celsius)
    load = _text(root / "proc/loadavg").split()
    cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    return Conditions(
        power_mode=mode.name if mode else "",
        governor=_text(cpus[0] / "scaling_governor").strip() if cpus else "",
        cpu_mhz=_fastest(cpus, "scaling_cur_freq", 1000),
        gpu_mhz=gpu_mhz or _jetson_gpu(root / "sys/class/devfreq"),
        celsius=celsius,
        available_mib=memory.available // MIB if memory else None,
        busy=float(load[0]) if load else None,
        cores=os.cpu_count(),
    )


def process_memory(root: Path = Path("/")) -> tuple[float, float] | None:
    """MiB of memory that this process has now (RSS), and had at most; None where the system has no
    /proc."""
    sizes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", _text(root / "proc/self/status"), re.M))
    if len(sizes) < 2:
        return None
    return int(sizes["VmRSS"]) / 1024, int(sizes["VmHWM"]) / 1024


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: what the machine has available, or what is left of a
    container's limit. None where the system has no /proc."""
    memory, taken = board.memory(_text(root / "proc/meminfo")), process_memory(root)
    if memory is None or taken is None:
        return None
    limit = _text(root / "sys/fs/cgroup/memory.max").strip()  # cgroup 2; "max" is none
    left = int(limit) - int(taken[0] * MIB) if limit.isdecimal() else memory.available
    return max(0, min(memory.available, left))


def _smi(csv: str) -> tuple[int | None, int | None]:
    """The first GPU's clock in MHz and temperature, from a line such as `1980, 41`."""
    line = next(iter(csv.splitlines()), "")
    cells = [int(cell) if cell.strip().isdecimal() else None for cell in line.split(",")]
    return (cells[0], cells[1]) if len(cells) == 2 else (None, None)


def _jetson_gpu(folder: Path) -> int | None:
    return _fastest([p for name in _JETSON_GPU for p in folder.glob(name)], "cur_freq", 1_000_000)


def _fastest(folders: list[Path], name: str, per_mhz: int) -> int | None:
    """The highest clock in the files `name` of folders, in MHz."""
    clocks = [text.strip() for folder in folders if (text := _text(folder / name))]
    return max((int(clock) // per_mhz for clock in clocks if clock.isdecimal()), default=None)


def _thermal_zones(folder: Path) -> dict[str, float]:
    """Degrees by sensor. A sensor that is off cannot be read, or says something absurd."""
    found = {}
    for zone in sorted(folder.glob("thermal_zone*")):
        degrees = _text(zone / "temp").strip()
        if re.fullmatch(r"-?\d{1,6}", degrees) and -50_000 < int(degrees) < 150_000:
            found[_text(zone / "type").strip() or zone.name] = int(degrees) / 1000
    return found


def _text(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
