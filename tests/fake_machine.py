"""A machine with a TensorRT of some version and a GPU, neither of them real; and what the tests of
engines do on it."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from conftest import COLORS, square

from export.build import EngineOptions, build_engines
from runtime import cuda_ctypes
from runtime.engine_file import EngineInfo

NEW = "11.4.0"


class Machine:
    """Puts a TensorRT of some version, over the stub of CUDA, where processes find it. Its GPU is
    an Orin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, library: Path, folder: Path) -> None:
        self._patch, self.library = monkeypatch, fake_cuda.load(library)
        package = fake_tensorrt.fake_package(folder)
        monkeypatch.setenv("PYTHONPATH", str(package))
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
        monkeypatch.setenv("FAKE_CUDART", str(library))
        monkeypatch.setattr(cuda_ctypes, "LIBRARIES", (str(library),))

    def has(self, version: str, fault: str = "") -> None:
        """What TensorRT is here from now on, and what goes wrong with it."""
        self._patch.setenv("FAKE_TENSORRT", version)
        self._patch.setenv("FAKE_TENSORRT_FAULT", fault)
        self._patch.setitem(sys.modules, "tensorrt", fake_tensorrt.load(version, fault))

    def has_card(self, capability: str) -> None:
        """The GPU is a card of this compute capability from now on."""
        self._patch.setenv("CUDA_STUB_GPU", capability)


def copied(bundle: Path, folder: Path) -> Path:
    """The same files in another folder: its engines are one test's own."""
    return Path(shutil.copytree(bundle, folder / "bundle", copy_function=os.link))


def built(bundle: Path, **changes: Any) -> list[EngineInfo]:
    """Builds engines of the image encoder, unless told otherwise."""
    return build_engines(EngineOptions(bundle=bundle, **{"text": False, **changes}))


def frames() -> list[Any]:
    """A BGR frame of each colour, in their order."""
    rng = np.random.default_rng(5)
    return [square(color, rng)[..., ::-1].copy() for color in COLORS.values()]
