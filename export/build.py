"""Engines for the device that is here, from a bundle: each is tested before it counts."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from calibration.gate import Limits, check_limits
from runtime.bundle import Bundle
from runtime.cuda import open_cuda
from runtime.engine_file import FOLDER, EngineInfo, Kind, Platform, info_path
from runtime.errors import BackendUnavailable, BundleError, DataError, GateFailed
from runtime.trt import platform

from .engine import STRONG, BuildOptions, require_compatibility
from .engine_child import Request

LADDER = ("int8_fp16", "int8", "fp16", "fp32")  # from the fastest, as a rule
FEW = 8  # golden inputs, of which none may be named otherwise
_BUILDING = ".build-"
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What to build of a bundle, and what an engine may cost against the bundle's fp32.

    `precision` is one of the bundle's, or "auto": the first of the ladder int8_fp16 (TensorRT 10
    on), int8, fp16, fp32 that the bundle accepts, that builds here, and that holds the gate.
    """

    bundle: Path
    precision: str = "auto"
    text: bool = True
    build: BuildOptions = field(default_factory=BuildOptions)
    min_cosine: float = 0.99
    min_agreement: float = 0.99

    def __post_init__(self) -> None:
        check_limits(Limits(min_cosine=self.min_cosine, min_agreement=self.min_agreement))


def build_engines(options: EngineOptions, tell: Tell = lambda *_: None) -> list[EngineInfo]:
    """Builds the engines of the image encoder and, with `text`, of the text encoder.

    Each is built and tested in a process of its own, and takes its place in `engines/` when it is
    sound; until then the last good one stays. Raises BackendUnavailable where nothing builds, and
    GateFailed where what was built is too far from fp32.
    """
    bundle = Bundle(options.bundle)
    if not bundle.manifest.golden:
        raise BundleError(
            f"{options.bundle} has no golden frames to test engines on; export it again"
        )
    here = platform(open_cuda())
    require_compatibility(options.build, here)
    found = [_first(options, bundle, here, "image", _ladder(options, bundle, here), tell)]
    if options.text:
        plain = dataclasses.replace(options.build, dla=None)  # attention runs on none
        options = dataclasses.replace(options, build=plain)
        found.append(_first(options, bundle, here, "text", ["fp32"], tell))
    return found


def _ladder(options: EngineOptions, bundle: Bundle, here: Platform) -> list[str]:
    have = bundle.manifest.precisions
    if options.precision != "auto":
        if options.precision not in have:
            raise DataError(
                f"{bundle.folder} has no precision {options.precision!r}; it has: {', '.join(have)}"
            )
        return [options.precision]
    strong = int(here.tensorrt.split(".")[0]) >= STRONG
    return [
        name
        for name in LADDER
        if name in have and have[name].status == "accepted" and (strong or name != "int8_fp16")
    ]


def _first(
    options: EngineOptions,
    bundle: Bundle,
    here: Platform,
    kind: Kind,
    ladder: list[str],
    tell: Tell,
) -> EngineInfo:
    """The first engine of the ladder that is sound, in its place."""
    steps: list[str] = []
    gate = False
    for precision in ladder:
        try:
            return _built(options, bundle, here, kind, precision, tuple(steps), tell)
        except (BackendUnavailable, GateFailed) as error:
            gate |= isinstance(error, GateFailed)
            steps.append(f"{precision}: {error}")
    raise (GateFailed if gate else BackendUnavailable)(
        f"no engine of the {kind} encoder was built; {' | '.join(steps)}"
    )


def _built(
    options: EngineOptions,
    bundle: Bundle,
    here: Platform,
    kind: Kind,
    precision: str,
    steps: tuple[str, ...],
    tell: Tell,
) -> EngineInfo:
    engines = bundle.folder.resolve() / FOLDER
    try:
        with _alone(engines), tempfile.TemporaryDirectory(prefix=_BUILDING, dir=engines) as name:
            folder, timing = Path(name), engines / f"{here.slug()}.timing"
            request = Request(
                bundle=str(bundle.folder.resolve()),
                kind=kind,
                precision=precision,
                options=options.build,
                timing=str(timing) if timing.is_file() else "",
            )
            info = msgspec.structs.replace(_in_child(request, folder, tell), steps=steps)
            (folder / "timing.cache").replace(timing)
            _judge(info, options)
            slug = here.slug(info.version_compatible, info.hardware_compatible)
            _publish(info, folder, info_path(bundle, kind, precision, slug))
    except OSError as error:
        raise DataError(f"{engines} cannot be written: {error}") from error
    return info


def _in_child(request: Request, folder: Path, tell: Tell) -> EngineInfo:
    """Builds in a process of its own; its end, whatever it is, does not end this one."""
    path = folder / "request.json"
    path.write_bytes(msgspec.json.encode(request))
    log = folder / "log"
    code = _run([sys.executable, "-m", "export.engine_child", str(path)], log, tell)
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    result = folder / "result.json"
    if code or not result.is_file():
        why = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        memory = " (out of memory? fewer batches, or a smaller --workspace)" if code == -9 else ""
        raise BackendUnavailable(f"the build {why}{memory} {' '.join(said)}".rstrip())
    content = json.loads(result.read_text(encoding="utf-8"))
    if "error" in content:
        raise BackendUnavailable(content["error"])
    return msgspec.convert(content["info"], EngineInfo)


def _run(command: list[str], log: Path, tell: Tell) -> int:
    """Runs a process, its stderr into `log`, to its end, or ours; returns its exit code."""
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            cwd=log.parent,  # where no file of the caller's can be taken for a module
        ) as child,
    ):
        try:
            for step in _progress(child):
                tell(*step)
            return child.wait()
        except BaseException:
            child.kill()
            raise


def _progress(child: "subprocess.Popen[str]") -> Iterator[tuple[str, int, int]]:
    assert child.stdout is not None
    for line in child.stdout:
        try:
            step = json.loads(line)
            yield step["phase"], step["step"], step["of"]
        except (ValueError, KeyError, TypeError):  # what a library prints
            continue


def _judge(info: EngineInfo, options: EngineOptions) -> None:
    """Raises GateFailed where the engine is too far from fp32. One flip may be, but of very few."""
    figures = info.figures
    if figures["cosine_p1"] < options.min_cosine:
        raise GateFailed(
            f"cosine with fp32 is {figures['cosine_p1']:.4f} at the 1st percentile, "
            f"less than --min-cosine {options.min_cosine:g}"
        )
    few = 1.0 if figures["inputs"] >= FEW else 0.0
    allowed = max(few, (1 - options.min_agreement) * figures["inputs"])
    if figures.get("flips", 0) > allowed:
        raise GateFailed(
            f"{figures['flips']:.0f} of {figures['inputs']:.0f} golden frames change their label, "
            f"more than --min-agreement {options.min_agreement:g} allows"
        )


def _publish(info: EngineInfo, folder: Path, path: Path) -> None:
    """Puts plan and sidecar in their place: the engine counts from the last rename on."""
    (folder / "engine.plan").replace(path.with_name(info.plan))
    sidecar = folder / "sidecar.json"
    sidecar.write_text(json.dumps(msgspec.to_builtins(info), indent=2) + "\n", encoding="utf-8")
    sidecar.replace(path)
    for plan in path.parent.glob(f"{path.stem}.*.plan"):
        if plan.name != info.plan:
            plan.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(engines: Path) -> Iterator[None]:
    """Has the folder of the engines for one build: two would remove each other's plans. What
    builds that were killed have left there goes. Raises DataError where another build runs."""
    engines.mkdir(exist_ok=True)
    lock = os.open(engines, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another build is at work in {engines}; wait for its end") from error
        for left in engines.glob(f"{_BUILDING}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(lock)
