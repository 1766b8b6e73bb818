"""The commands that mend a machine, by what it is: a Jetson, a machine with an NVIDIA GPU, or one
with a CPU alone.
"""

from . import board
from .machine import Facts
from .trt import OLDEST

OLDEST_PYTHON = (3, 10)
JETPACK = "sudo apt-get update && sudo apt-get install nvidia-jetpack"
_JETSON_WHEELS = "https://pypi.jetson-ai-lab.io/jp6/cu126"  # Python 3.10, CUDA 12.6


def pip(facts: Facts, arguments: str) -> str:
    return f"{facts.interpreter.executable} -m pip {arguments}"


def tensorrt_version(facts: Facts) -> str:
    """The TensorRT that is here, importable or not, or that the board's JetPack would bring."""
    promised = facts.jetpack.tensorrt if facts.jetpack else ""
    return str(facts.answer("tensorrt").value.get("version", "")) or facts.nvinfer or promised


def too_old(version: str) -> bool:
    release = board.release_of(version)
    return bool(release) and release < OLDEST


def newer_jetpack(facts: Facts) -> str:
    """The way to a TensorRT that is new enough, if the board has one."""
    if "Orin" in facts.model:
        return "flash JetPack 6.2 or later: https://developer.nvidia.com/embedded/jetpack-archive"
    return "use the backend onnxruntime: no JetPack with TensorRT 8.6 supports this board"


def runs_on_system(facts: Facts) -> bool:
    """Whether the system's Python, which a Jetson's own libraries are for, can run edgeclip."""
    return facts.jetpack is None or board.release_of(facts.jetpack.python) >= OLDEST_PYTHON


def tensorrt(facts: Facts) -> str:
    """How to make `import tensorrt` work."""
    if facts.jetson and too_old(tensorrt_version(facts)):
        return newer_jetpack(facts)
    if not facts.nvinfer:
        return JETPACK if facts.jetson else pip(facts, "install 'edgeclip[tensorrt]'")
    if not facts.bindings:
        return "sudo apt-get install python3-libnvinfer"
    if facts.interpreter.sees_system and serves(facts):
        return "sudo apt-get install --reinstall python3-libnvinfer"
    return system_venv(facts)


def serves(facts: Facts) -> bool:
    """Whether the system has TensorRT's package for this Python's version."""
    return facts.interpreter.version in facts.bindings or "3" in facts.bindings


def system_venv(facts: Facts) -> str:
    """How to see the system's packages: this virtual environment made anew in its place, which
    keeps what is installed in it, or another one where it is of another Python."""
    python = facts.interpreter
    make = "/usr/bin/python3 -m venv --system-site-packages"
    if python.in_venv and python.base == "/usr" and serves(facts):
        return f"{make} {python.prefix}"
    return f"{make} ~/edgeclip-venv && ~/edgeclip-venv/bin/pip install edgeclip"


def bindings(facts: Facts) -> str:
    """How to get a CUDA binding: libcudart comes with JetPack."""
    if facts.jetson:
        return JETPACK
    newest = board.release_of(facts.driver_cuda)
    below = f"<{newest[0] + 1}" if newest else ""
    return pip(facts, f"install 'cuda-bindings{below}'")


def openvino(facts: Facts) -> str:
    return pip(facts, "install 'edgeclip[openvino]'")


def onnxruntime(facts: Facts) -> str:
    """On a Jetson without the extra, which would hide the system's OpenCV."""
    return pip(facts, "install onnxruntime" if facts.jetson else "install 'edgeclip[cpu]'")


def one_onnxruntime(facts: Facts) -> str:
    """How to keep one of onnxruntime and onnxruntime-gpu: pip mixes their files."""
    both = pip(facts, "uninstall --yes onnxruntime onnxruntime-gpu")
    return f"{both} && {onnxruntime_gpu(facts) or onnxruntime(facts)}"


def onnxruntime_gpu(facts: Facts) -> str:
    """How to get ONNX Runtime with CUDA; empty where no wheel is known to have kernels for it."""
    if facts.gpu is None:
        return ""
    if not facts.jetson:
        return pip(facts, "install --upgrade 'onnxruntime-gpu[cuda,cudnn]'")
    if (36, 4) <= facts.l4t < (37,) and facts.interpreter.version == "3.10":
        return pip(facts, f"install --index-url {_JETSON_WHEELS} onnxruntime-gpu")
    return ""


def provider(facts: Facts, error: str) -> str:
    """How to get ONNX Runtime's GPU providers: by the other package, before which this one goes;
    the wheels' TensorRT provider was built for TensorRT 10."""
    if "libnvinfer.so.10" in error and not facts.jetson:
        return pip(facts, "install 'tensorrt>=10,<11'")
    command = onnxruntime_gpu(facts)
    installed = facts.answer("onnxruntime").value.get("packages", {})
    if command and "onnxruntime" in installed:
        return f"{pip(facts, 'uninstall --yes onnxruntime')} && {command}"
    return command


def driver(facts: Facts) -> str:
    """How to make CUDA open the GPU."""
    if facts.container:
        return f"docker run {'--runtime nvidia' if facts.jetson else '--gpus all'} ..."
    if facts.jetson:
        return JETPACK
    if facts.system == "debian":
        return "sudo apt-get install nvidia-driver && sudo reboot"
    if facts.system == "ubuntu":
        return "sudo ubuntu-drivers install && sudo reboot"
    return "install the driver: https://www.nvidia.com/drivers"


def swap() -> str:
    make = "sudo fallocate -l 4G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile"
    return f"{make} && sudo swapon /swapfile"


def opencv(facts: Facts) -> str:
    """How to get an OpenCV with GStreamer on a Jetson, any OpenCV elsewhere."""
    installed = facts.answer("cv2").value.get("packages", {})
    if not facts.jetson or not runs_on_system(facts):
        return pip(facts, "install opencv-python-headless")
    if installed:
        return pip(facts, f"uninstall --yes {' '.join(installed)}")
    if not facts.interpreter.sees_system:
        return system_venv(facts)
    return JETPACK
