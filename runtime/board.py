"""What a machine's own files and tools say, read from their text.

Every function takes text and returns a value, `None` or an empty one where the text does not say.
None raises: files are cut off, of another release, or not what their name promises.
"""

import json
import re
from dataclasses import dataclass

Release = tuple[int, ...]  # 36.4.3 is (36, 4, 3)


@dataclass(frozen=True)
class Jetpack:
    """A JetPack release, and what it brings: the TensorRT, CUDA and Python of its packages."""

    version: str
    tensorrt: str
    cuda: str
    python: str


_JETPACK_4 = Jetpack("4", "8.2", "10.2", "3.6")
# After NVIDIA's JetPack archive. A release that is not named takes the one before it.
_JETPACKS: dict[Release, Jetpack] = {
    (32,): _JETPACK_4,
    (34,): Jetpack("5.0 DP", "8.4", "11.4", "3.8"),
    (35, 1): Jetpack("5.0.2", "8.4", "11.4", "3.8"),
    (35, 2): Jetpack("5.1", "8.5", "11.4", "3.8"),
    (35, 3): Jetpack("5.1.1", "8.5", "11.4", "3.8"),
    (35, 4): Jetpack("5.1.2", "8.5", "11.4", "3.8"),
    (35, 5): Jetpack("5.1.3", "8.5", "11.4", "3.8"),
    (35, 6): Jetpack("5.1.4", "8.5", "11.4", "3.8"),
    (36, 2): Jetpack("6.0 DP", "8.6", "12.2", "3.10"),
    (36, 3): Jetpack("6.0", "8.6", "12.2", "3.10"),
    (36, 4): Jetpack("6.1", "10.3", "12.6", "3.10"),
    (36, 4, 3): Jetpack("6.2", "10.3", "12.6", "3.10"),
    (36, 4, 4): Jetpack("6.2.1", "10.3", "12.6", "3.10"),
    (36, 5): Jetpack("6.2.2", "10.3", "12.6", "3.10"),
    (38, 2): Jetpack("7.0", "10.13", "13.0", "3.12"),
    (38, 4): Jetpack("7.1", "10.13", "13.0", "3.12"),
    (39, 2): Jetpack("7.2", "10.16", "13.2", "3.12"),
    (39, 2, 1): Jetpack("7.2.1", "10.16", "13.2", "3.12"),
}


def jetpack(release: Release) -> Jetpack | None:
    """The JetPack of an L4T release; None where its major release is not known."""
    known = [key for key in _JETPACKS if key[:1] == release[:1] and key <= release]
    return _JETPACKS[max(known)] if known else None


def l4t_release(text: str) -> Release:
    """The release in /etc/nv_tegra_release: `# R36 (release), REVISION: 4.3, ...`."""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*(\d+(?:\.\d+)*)", text)
    return release_of(f"{found[1]}.{found[2]}") if found else ()


def release_of(version: str) -> Release:
    """The numbers at the start of a version: `36.4.3-20250107174145` is (36, 4, 3)."""
    found = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def dotted(release: Release) -> str:
    return ".".join(str(part) for part in release)


def packages(text: str, names: set[str]) -> dict[str, str]:
    """The versions of installed packages among `names`, from /var/lib/dpkg/status."""
    found = {}
    for entry in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^(Package|Status|Version): *(.*?) *$", entry, re.MULTILINE))
        if fields.get("Package") in names and fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields.get("Version", "")
    return found


def system_id(text: str) -> str:
    """The ID in /etc/os-release: `ubuntu`, `debian`."""
    found = re.search(r"""^ID=["']?([\w.-]+)""", text, re.MULTILINE)
    return found[1] if found else ""


def device_tree_text(text: str) -> str:
    """A device tree's string, which ends in NUL: `NVIDIA Jetson Orin Nano ...\\0`."""
    words = " ".join(text.partition("\0")[0].split())
    return "".join(letter for letter in words if letter.isprintable())


# Compute capabilities of Jetson modules, by a word of their names; the first that fits.
_CAPABILITIES = (
    ("Thor", "11.0"),
    ("Orin", "8.7"),
    ("Xavier", "7.2"),
    ("Jetson-AGX", "7.2"),  # AGX Xavier's name for itself
    ("TX2", "6.2"),
    ("Nano", "5.3"),
    ("TX1", "5.3"),
)


def jetson_capability(model: str) -> str:
    """The compute capability of a Jetson's GPU, by the board's name."""
    return next((sm for word, sm in _CAPABILITIES if word in model), "")


@dataclass(frozen=True)
class PowerMode:
    """The power mode in force, and the one without a limit, where the board has it: (id, name)."""

    name: str
    fastest: tuple[int, str] | None


def power_mode(query: str, configuration: str) -> PowerMode | None:
    """From the output of `nvpmodel -q`, and /etc/nvpmodel.conf, whose modes have numbers that
    differ between boards."""
    current = re.search(r"NV Power Mode:[ \t]*(\S+)", query)
    listed = re.findall(
        r"^<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=([^\s>]+)", configuration, re.MULTILINE
    )
    modes = {name: int(number) for number, name in listed}
    fastest = next((name for name in ("MAXN_SUPER", "MAXN") if name in modes), None)
    if current is None:
        return None
    return PowerMode(current[1], None if fastest is None else (modes[fastest], fastest))


@dataclass(frozen=True)
class Memory:
    """In bytes."""

    total: int
    available: int
    swap: int


def memory(text: str) -> Memory | None:
    """From /proc/meminfo, whose kB are KiB."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d{1,15}) kB", text, re.MULTILINE))
    if "MemTotal" not in sizes:
        return None
    names = ("MemTotal", "MemAvailable", "SwapTotal")
    return Memory(*(int(sizes.get(name, 0)) << 10 for name in names))


_ARM_PARTS = {
    "0x004": "Carmel", "0xd03": "Cortex-A53", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd40": "Neoverse-V1",
    "0xd42": "Cortex-A78AE", "0xd49": "Neoverse-N2", "0xd4f": "Neoverse-V2",
    "0xd83": "Neoverse-V3AE",
}  # fmt: skip
# What makes int8 faster than fp32, as Linux names it and as people do.
_INT8 = {
    "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "amx_int8": "AMX int8",
    "asimddp": "dotprod", "i8mm": "i8mm",
}  # fmt: skip


@dataclass(frozen=True)
class Cpu:
    """Its name, logical cores, instructions for int8; `arm` or not."""

    model: str
    cores: int
    int8: tuple[str, ...]
    arm: bool


def cpu(text: str) -> Cpu | None:
    """From /proc/cpuinfo. ARM names no model there, but its part number."""
    cores = len(re.findall(r"^processor\s*:", text, re.MULTILINE))
    flags = re.search(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if not cores or not flags:
        return None
    has = set(flags[2].split())
    name = re.search(r"^model name\s*:[ \t]*(\S.*?)\s*$", text, re.MULTILINE)
    part = re.search(r"^CPU part\s*:\s*(0x\w+)", text, re.MULTILINE)
    arm_name = _ARM_PARTS.get(part[1], f"part {part[1]}") if part else "unknown"
    int8 = tuple(title for flag, title in _INT8.items() if flag in has)
    return Cpu(name[1] if name else arm_name, cores, int8, flags[1] == "Features")


def driver_version(text: str) -> str:
    """The driver in /proc/driver/nvidia/version: the first dotted number of its NVRM line."""
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


@dataclass(frozen=True)
class Gpu:
    """A GPU; what is not known is empty. `memory` is as `nvidia-smi` says it."""

    name: str
    driver: str
    capability: str
    memory: str = ""


def gpus(csv: str) -> list[Gpu]:
    """From `nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total
    --format=csv,noheader`."""
    rows = [[_known(cell) for cell in line.split(",")] for line in csv.splitlines()]
    return [Gpu(*row) for row in rows if len(row) == 4 and row[0]]


def _known(cell: str) -> str:
    """A cell of nvidia-smi, which says [N/A] or [Not Supported] where it does not know."""
    return "" if cell.strip().startswith(("[", "N/A")) else cell.strip()


def toolkit_version(text: str) -> str:
    """The CUDA toolkit's version, from /usr/local/cuda/version.json."""
    try:
        return str(json.loads(text)["cuda"]["version"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def library_version(name: str) -> str:
    """The version in a library's file name: `libnvinfer.so.10.3.0` is 10.3.0."""
    return dotted(release_of(name.partition(".so.")[2]))
