"""What this machine found out by trying, in a file each in the cache folder: the next process need
not try again. Whoever deletes the files loses time, nothing else."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from . import board
from .cache_folder import cache_folder

Found = TypeVar("Found", bound=msgspec.Struct)
Key = Mapping[str, Any]
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino")


def this_machine() -> dict[str, Any]:
    """What a measurement on the CPU depends on: the CPU, how many cores this process may use, and
    the versions of the backends."""
    about = _text(Path("/proc/cpuinfo"))
    cpu = board.cpu(about)
    flags = {line for line in about.splitlines() if line.startswith(("flags", "Features"))}
    return {
        "cpu": cpu.model if cpu else "unknown",
        "flags": hashlib.sha256("".join(sorted(flags)).encode()).hexdigest()[:16],
        "cores": usable_cores(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def recall(kind: str, key: Key, type: type[Found]) -> Found | None:
    """What was remembered under this key; None where nothing was, or it cannot be read."""
    try:
        content = msgspec.json.decode(place(kind, key).read_bytes())
        return msgspec.convert(content["found"], type) if content["key"] == key else None
    except (OSError, RuntimeError, msgspec.MsgspecError, LookupError, TypeError, ValueError):
        return None  # RuntimeError: there is no home folder


def remember(kind: str, key: Key, found: msgspec.Struct) -> str:
    """Keeps it in a file, whole or not at all; says in words what came of that."""
    content = {"key": key, "found": msgspec.to_builtins(found)}
    try:
        path = place(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(content, indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        return f"not remembered: {error}; name a folder that can be written by EDGECLIP_CACHE"
    return f"remembered in {path}"


def _write(path: Path, text: str) -> None:
    """Beside, then renamed: several processes may write at once."""
    number, name = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def place(kind: str, key: Key) -> Path:
    """The file that this is remembered in."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / kind / f"{digest[:32]}.json"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
