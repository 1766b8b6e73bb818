"""Machines to examine, as files and answers: written after NVIDIA's documentation and what people
print of theirs in public, not taken from devices.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.machine import Interpreter
from runtime.probes import Answer

GIB = 1 << 30
MISSING = Answer(error="No module named", missing=True)
VENV = Interpreter("3.10", "/home/me/env/bin/python", "/home/me/env", "/usr", False)
SYSTEM_VENV = Interpreter("3.10", "/home/me/env/bin/python", "/home/me/env", "/usr", True)
NEW_VENV = Interpreter("3.12", "/home/me/env/bin/python", "/home/me/env", "/usr", True)
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
CPU = "CPUExecutionProvider"
Answers = dict[tuple[str, ...], Answer]


@dataclass(frozen=True)
class Machine:
    """Files by path, what commands print, what children answer (by their arguments), a Python."""

    files: dict[str, str | bytes]
    prints: dict[str, str] = field(default_factory=dict)
    answers: Answers = field(default_factory=dict)
    python: Interpreter = VENV

    def lay(self, root: Path) -> dict[str, Any]:
        """Writes the files under a folder; returns the arguments of `doctor.examine`."""
        for name, content in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

        def run(*command: str) -> str:
            return self.prints.get(command[0], "")

        def ask(*question: str) -> Answer:
            return self.answers.get(question, MISSING)

        return {"root": root, "run": run, "ask": ask, "interpreter": self.python}


def tegra(release: str) -> str:
    major, _, revision = release.partition(".")
    return (
        f"# R{major} (release), REVISION: {revision}, GCID: 12345678, BOARD: generic, "
        "EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n"
        "TARGET_USERSPACE_LIB_DIR=nvidia\n"
    )


def dpkg(**versions: str) -> str:
    entries = [
        f"Package: {name.replace('_', '-')}\nStatus: install ok installed\nPriority: standard\n"
        f"Architecture: arm64\nVersion: {version}\nDescription: NVIDIA\n More of it\n"
        for name, version in versions.items()
    ]
    return "\n".join(["Package: bash\nStatus: install ok installed\nVersion: 5.1\n", *entries])


def meminfo(total: int, available: int, swap: int) -> str:
    sizes = {"MemTotal": total, "MemFree": 1, "MemAvailable": available, "SwapTotal": swap}
    return "".join(f"{name}:{size * 1024:>14} kB\n" for name, size in sizes.items())  # MiB


def arm(cores: int, part: str, more: str = "") -> str:
    features = f"fp asimd evtstrm aes pmull sha1 sha2 crc32 {more}"
    one = (
        f"BogoMIPS\t: 62.50\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"
    )
    return "".join(f"processor\t: {n}\n{one}\n" for n in range(cores))


def x86(cores: int, name: str, more: str = "") -> str:
    one = f"vendor_id\t: GenuineIntel\nmodel name\t: {name}\nflags\t\t: fpu sse4_2 avx2 {more}\n"
    return "".join(f"processor\t: {n}\n{one}\n" for n in range(cores))


def modes(*names: str) -> str:
    head = "# FORMAT:\n# < POWER_MODEL ID=id_num NAME=mode_name >\n"
    bodies = [f"< POWER_MODEL ID={n} NAME={name} >\nCPU_ONLINE CORE_0 1\n"
              for n, name in enumerate(names)]  # fmt: skip
    return head + "\n".join(bodies) + "\n< PM_CONFIG DEFAULT=0 >\n"


def nvinfer(version: str, python: str) -> dict[str, str | bytes]:
    """The system's TensorRT library and its package for a Python."""
    folder = "usr/lib/aarch64-linux-gnu"
    major = version.partition(".")[0]
    return {
        f"{folder}/libnvinfer.so.{version}": b"",
        f"{folder}/libnvinfer.so.{major}": b"",
        f"usr/lib/python{python}/dist-packages/tensorrt/__init__.py": "",
    }


def version_json(version: str) -> str:
    return '{"cuda": {"name": "CUDA SDK", "version": "' + version + '"}}'


def gpu(name: str, capability: str, cuda: str) -> Answer:
    return Answer({"name": name, "capability": capability, "cuda": cuda})


def onnxruntime(*providers: str, **packages: str) -> Answer:
    installed = {name.replace("_", "-"): version for name, version in packages.items()}
    version = next(iter(installed.values()))
    return Answer({"version": version, "providers": providers, "packages": installed})


def opencv(gstreamer: bool, **packages: str) -> Answer:
    installed = {name.replace("_", "-"): version for name, version in packages.items()}
    return Answer({"version": "4.8.0", "gstreamer": gstreamer, "packages": installed})


NO_TENSORRT: Answers = {("tensorrt",): Answer(error="No module named 'tensorrt'", missing=True)}
ORT_CPU: Answers = {
    ("onnxruntime",): onnxruntime("AzureExecutionProvider", CPU, onnxruntime="1.23.2"),
    ("provider", CPU): Answer(),
}

ORIN_NANO = Machine(  # JetPack 6.2, a virtual environment that does not see the system
    {
        "etc/nv_tegra_release": tegra("36.4.3"),
        "etc/os-release": 'NAME="Ubuntu"\nID=ubuntu\nVERSION_ID="22.04"\n',
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit "
        "Super\0",
        "etc/nvpmodel.conf": modes("15W", "25W", "MAXN_SUPER", "7W"),
        "var/lib/dpkg/status": dpkg(
            nvidia_jetpack="6.2+b77", nvidia_l4t_core="36.4.3-20250107174145"
        ),
        "proc/meminfo": meminfo(7620, 5200, 3810),
        "proc/cpuinfo": arm(6, "0xd42", "atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"),
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  "
        "540.4.0  Release Build  (builder@host)  Tue Jan  7 17:35:12 PST 2025\nGCC version:  \n",
        "usr/local/cuda/version.json": version_json("12.6.68"),
        **nvinfer("10.3.0", "3.10"),
    },
    {"nvpmodel": "NV Power Mode: 15W\n0\n", "nvidia-smi": "Orin (nvgpu), 540.4.0, [N/A], [N/A]\n"},
    {
        **ORT_CPU,
        **NO_TENSORRT,
        ("gpu",): gpu("Orin", "8.7", "12.6"),
        ("cuda", "ctypes"): Answer({"gpu": "Orin"}),
        ("cv2",): opencv(False, opencv_python_headless="4.12.0"),
    },
)

AGX_ORIN = Machine(  # JetPack 6.0, and everything of the system's is seen
    {
        "etc/nv_tegra_release": tegra("36.3.0"),
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "etc/nvpmodel.conf": modes("MAXN", "15W", "30W", "50W"),
        "var/lib/dpkg/status": dpkg(nvidia_l4t_core="36.3.0-20240506102626"),
        "proc/meminfo": meminfo(62800, 50000, 31400),
        "proc/cpuinfo": arm(12, "0xd42", "asimddp"),
        "usr/local/cuda/version.json": version_json("12.2.140"),
        **nvinfer("8.6.2", "3.10"),
    },
    {"nvpmodel": "NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN\n0\n"},
    {
        **ORT_CPU,
        ("tensorrt",): Answer({"version": "8.6.2", "builds": ""}),
        ("gpu",): gpu("Orin", "8.7", "12.2"),
        ("cuda", "pycuda"): Answer({"gpu": "Orin"}),
        ("cv2",): opencv(True),
    },
    SYSTEM_VENV,
)

THOR = Machine(  # JetPack 7.2; ONNX Runtime's own wheel for ARM servers has no kernels for it
    {
        "etc/nv_tegra_release": tegra("39.2.0"),
        "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
        "etc/nvpmodel.conf": modes("MAXN", "120W"),
        "var/lib/dpkg/status": dpkg(nvidia_jetpack="7.2-b123"),
        "proc/meminfo": meminfo(125000, 118000, 0),
        "proc/cpuinfo": arm(14, "0xd83", "asimddp i8mm bf16 sve2"),
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  "
        "595.00  Release Build  (builder@host)\n",
        "usr/local/cuda/version.json": version_json("13.2.1"),
        **nvinfer("10.16.2", "3.12"),
    },
    {"nvpmodel": "NV Power Mode: MAXN\n0\n", "nvidia-smi": "NVIDIA Thor, 595.00, 11.0, [N/A]\n"},
    {
        ("onnxruntime",): onnxruntime(CUDA, CPU, onnxruntime_gpu="1.31.1"),
        ("provider", CPU): Answer(),
        ("provider", CUDA): Answer(error="no kernel image is available for execution"),
        ("tensorrt",): Answer({"version": "10.16.2", "builds": ""}),
        ("gpu",): gpu("NVIDIA Thor", "11.0", "13.2"),
        ("cuda", "cuda-bindings"): Answer({"gpu": "NVIDIA Thor"}),
        ("cuda", "ctypes"): Answer({"gpu": "NVIDIA Thor"}),
        ("cv2",): opencv(True),
    },
    NEW_VENV,
)

XAVIER = Machine(  # JetPack 5.1: its TensorRT is too old, and its Python as well
    {
        "etc/nv_tegra_release": tegra("35.2.1"),
        "proc/device-tree/model": "Jetson-AGX\0",
        "etc/nvpmodel.conf": modes("MAXN", "10W"),
        "proc/meminfo": meminfo(31000, 1500, 0),
        "proc/cpuinfo": arm(8, "0x004", "asimdrdm"),
        **nvinfer("8.5.2", "3.8"),
    },
    {"nvpmodel": "NV Power Mode: MODE_15W_DESKTOP\n7\n"},
    {**ORT_CPU, **NO_TENSORRT, ("gpu",): gpu("Xavier", "7.2", "11.4")},
)

ORIN_JP5 = Machine(
    {**XAVIER.files, "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0"},
    {},
    XAVIER.answers,
)

DESKTOP = Machine(  # both ONNX Runtimes, and one whose TensorRT provider wants release 10
    {
        "etc/os-release": "ID=ubuntu\n",
        "proc/meminfo": meminfo(64000, 48000, 2048),
        "proc/cpuinfo": x86(16, "13th Gen Intel(R) Core(TM) i7-13700K", "avx_vnni"),
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  "
        "Tue Sep 23 09:55:41 UTC 2025\nGCC version:  gcc version 12.3.0\n",
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
    },
    {"nvidia-smi": "NVIDIA GeForce RTX 4070, 580.95.05, 8.9, 12282 MiB\n"},
    {
        ("onnxruntime",): onnxruntime(
            TENSORRT, CUDA, CPU, onnxruntime="1.31.1", onnxruntime_gpu="1.31.1"
        ),
        ("provider", CPU): Answer(),
        ("provider", CUDA): Answer(),
        ("provider", TENSORRT): Answer(error="libnvinfer.so.10: cannot open shared object file"),
        ("tensorrt",): Answer({"version": "11.4.0.12", "builds": ""}),
        ("gpu",): gpu("NVIDIA GeForce RTX 4070", "8.9", "13.0"),
        ("cuda", "cuda-bindings"): Answer({"gpu": "NVIDIA GeForce RTX 4070"}),
        ("openvino",): Answer({"version": "2026.1", "devices": ["CPU"]}),
        ("cv2",): opencv(False, opencv_python="4.12.0"),
    },
    SYSTEM_VENV,
)

RASPBERRY = Machine(  # a Pi 4: no GPU for us, no int8 instructions, little memory
    {
        "etc/os-release": "ID=debian\n",
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/meminfo": meminfo(1900, 900, 0),
        "proc/cpuinfo": arm(4, "0xd08", "cpuid"),
    },
    {},
    {**ORT_CPU, ("gpu",): Answer(error="OSError: libcuda.so.1: cannot open shared object file")},
)
