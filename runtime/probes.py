"""What really loads here, asked in child processes: a library may be listed and not load, crash
the process or hang in its driver, and none of that must take `edgeclip doctor` down.
"""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import EdgeClipError

SECONDS = 60.0
# An ONNX file that computes y = relu(x) on float32 [1]: IR 8, opset 13.
RELU = (
    b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04'
    b"\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
# The child imports from where this process does, and answers its first argument.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from runtime.probes import answer; answer(*sys.argv[2:])"
)


@dataclass(frozen=True)
class Answer:
    """What a child said, or why it said nothing; `missing` where the package is not installed."""

    value: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    missing: bool = False

    @property
    def ok(self) -> bool:
        return not self.error and not self.missing

    def why(self) -> str:
        """What is wrong, for a sentence."""
        return "not installed" if self.missing else f"it does not load: {self.error}"


def run(*command: str, seconds: float = 10.0) -> str:
    """What a command prints; empty where it is not there, fails or does not end."""
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def ask(question: str, *arguments: str, seconds: float = SECONDS) -> Answer:
    """Has a child process answer one of `QUESTIONS`. Never raises for what happens there."""
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), question, *arguments]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        out, said = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver: left behind
            child.communicate(timeout=5)
        return Answer(error=f"it did not answer within {seconds:g} seconds")
    return _answer_of(out, said.decode(errors="replace"), child.returncode)


def _answer_of(out: bytes, said: str, code: int) -> Answer:
    try:
        answer = Answer(**json.loads(out))
    except (ValueError, TypeError):
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Answer(error=f"its process crashed ({ended}){_last_line(said)}")
    if answer.error and (library := re.search(r"\S+\.so[.\d]*: cannot open[^\n]*", said)):
        return Answer(error=library[0])  # says more than the exception does
    return answer


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f": {lines[-1][:200]}" if lines else ""


def answer(question: str, *arguments: str) -> None:
    """The child: writes its answer, and ends at once, so that no clean-up can spoil it."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    reply: dict[str, Any]
    try:
        reply = {"value": QUESTIONS[question](*arguments)}
    except ModuleNotFoundError as error:
        reply = {"error": str(error), "missing": error.name in MODULES}
    except EdgeClipError as error:
        reply = {"error": str(error)}
    except Exception as error:
        reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    os.write(out, json.dumps(reply).encode())
    os._exit(0)


def _versions(*names: str) -> dict[str, str]:
    """The installed ones among these distributions."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _tensorrt() -> dict[str, Any]:
    import tensorrt

    try:
        tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
        builds = ""
    except Exception as error:
        builds = f"{type(error).__name__}: {error}"
    return {"version": str(tensorrt.__version__), "builds": builds}


def _onnxruntime() -> dict[str, Any]:
    import onnxruntime

    return {
        "version": str(onnxruntime.__version__),
        "providers": list(onnxruntime.get_available_providers()),
        "packages": _versions("onnxruntime", "onnxruntime-gpu"),
    }


def _provider(name: str) -> dict[str, Any]:
    """Runs the tiny model on one execution provider, without falling back to the CPU."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if name != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if hasattr(onnxruntime, "preload_dlls"):  # CUDA from pip's packages
            onnxruntime.preload_dlls()
        if name == "TensorrtExecutionProvider":  # and TensorRT, which importing it loads
            with contextlib.suppress(ImportError):
                import tensorrt  # noqa: F401
    session = onnxruntime.InferenceSession(RELU, options, providers=[name])
    if name not in session.get_providers():
        raise RuntimeError(f"the session runs on {session.get_providers()} instead")
    (result,) = session.run(None, {"x": np.array([-1], np.float32)})
    if result[0] != 0:
        raise RuntimeError(f"it computes relu(-1) = {result[0]}")
    return {}


def _openvino() -> dict[str, Any]:
    import numpy as np
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(RELU), "CPU")
    compiled({"x": np.array([-1], np.float32)})
    version = str(openvino.__version__).partition("-")[0]  # its build follows
    return {"version": version, "devices": list(core.available_devices)}


def _cv2() -> dict[str, Any]:
    import cv2

    return {
        "version": str(cv2.__version__),
        "gstreamer": bool(cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER)),
        "packages": _versions(
            "opencv-python",
            "opencv-python-headless",
            "opencv-contrib-python",
            "opencv-contrib-python-headless",
        ),
    }


def _cuda(name: str) -> dict[str, Any]:
    """Opens the GPU by one of the CUDA bindings, as an engine does."""
    from .cuda import open_cuda

    return {"gpu": open_cuda(name).device().name}


def _gpu() -> dict[str, Any]:
    """The first GPU, by CUDA's driver library; attributes by their numbers in cuda.h."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        code = getattr(cuda, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} fails with CUDA error {code}")

    call("cuInit", 0)
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    version, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(version))
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDeviceGetName", name, len(name), device)
    call("cuDeviceGetAttribute", ctypes.byref(major), 75, device)
    call("cuDeviceGetAttribute", ctypes.byref(minor), 76, device)
    return {
        "name": name.value.decode(errors="replace"),
        "capability": f"{major.value}.{minor.value}",
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "gpu": _gpu,
    "tensorrt": _tensorrt,
    "onnxruntime": _onnxruntime,
    "provider": _provider,
    "openvino": _openvino,
    "cv2": _cv2,
    "cuda": _cuda,
}
MODULES = {"tensorrt", "onnxruntime", "openvino", "cv2"}
