"""The stub of CUDA's libraries (cuda_stub.c): compiled, loaded, and put in the place of the real
ones."""

import ctypes
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import fake_cuda_bindings
import fake_pycuda
import pytest

from runtime import cuda_ctypes, cuda_graphs

BINDINGS = "cuda.bindings.runtime"
SOURCE = Path(__file__).parent / "cuda_stub.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")


def compile_stub(folder: Path) -> Path:
    """Compiles the stub into `folder`, under the name that it is found by.

    It has no soname: a process that loaded it by its path still gets the real one by the name.
    """
    assert COMPILER
    library = folder / "libcudart.so.12"
    # -Bsymbolic: beside a PyTorch for CUDA the real library would answer its calls to itself.
    flags = "-std=gnu11 -Wall -Wextra -O1 -shared -fPIC -pthread -Wl,-Bsymbolic".split()
    command = [COMPILER, *flags, "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return library


def load(path: Path) -> Any:
    """The stub for its own functions: stub_fail(name, code), stub_live(), stub_hold(0 or 1),
    stub_waiting(), stub_slow_copies(ms), stub_is_mapped(pointer), stub_is_capturing(stream)."""
    library = ctypes.CDLL(str(path))
    library.cudaGetErrorName.restype = library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def install(monkeypatch: pytest.MonkeyPatch, path: Path) -> Any:
    """The stub in the place of every binding in this process; returns it loaded."""
    loaded = load(path)
    monkeypatch.setattr(cuda_ctypes, "LIBRARIES", (str(path),))
    monkeypatch.setattr(cuda_graphs, "LIBRARY", str(path))
    for name in ("pycuda", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, fake in (("pycuda.driver", fake_pycuda), (BINDINGS, fake_cuda_bindings)):
        monkeypatch.setattr(fake, "library", loaded)
        monkeypatch.setitem(sys.modules, name, fake)
    return loaded
