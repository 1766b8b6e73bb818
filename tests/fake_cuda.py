"""The stub of CUDA's runtime library (cuda_stub.c): compiled, and loaded for its own functions."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "cuda_stub.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")


def compile_stub(folder: Path) -> Path:
    """Compiles the stub into `folder`, under the name that it is found by.

    It has no soname: a process that loaded it by its path still gets the real one by the name.
    """
    assert COMPILER
    library = folder / "libcudart.so.12"
    flags = "-std=gnu11 -Wall -Wextra -O1 -shared -fPIC -pthread".split()
    command = [COMPILER, *flags, "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return library


def load(path: Path) -> Any:
    """The stub for its own functions: stub_fail(name, code), stub_live(), stub_hold(0 or 1),
    stub_waiting()."""
    library = ctypes.CDLL(str(path))
    library.cudaGetErrorName.restype = library.cudaGetErrorString.restype = ctypes.c_char_p
    return library
