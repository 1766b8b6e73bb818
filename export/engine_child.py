"""The process that builds one engine and tests it: TensorRT may be killed for memory, or crash.

    python -m export.engine_child REQUEST.json

What it comes to lies in the folder of the request afterwards: `engine.plan`, `timing.cache` and
`result.json`. Progress goes to stdout, a JSON object a line.
"""

import ctypes
import dataclasses
import json
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from calibration.metrics import row_cosines
from runtime.backends import image_border, text_border
from runtime.bank_file import load_bank
from runtime.bundle import Bundle, describe
from runtime.cuda import open_cuda
from runtime.engine_file import EngineInfo, Kind, encoder_file
from runtime.errors import EdgeClipError
from runtime.golden import load_golden
from runtime.trt import TrtEncoder, platform

from .engine import BuildOptions, Plan, build

UNIT = 1e-2  # by which the length of an embedding may differ from 1
RUNS = 50


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to build: an encoder of a bundle, how, and the timing cache to begin with."""

    bundle: str
    kind: Kind
    precision: str
    options: BuildOptions
    timing: str = ""


def run(request: Request, folder: Path) -> EngineInfo:
    """Builds and tests the engine, and says what it is."""
    bundle, begin = Bundle(request.bundle), time.perf_counter()
    file = encoder_file(bundle, request.kind, request.precision)
    timing = Path(request.timing).read_bytes() if request.timing else b""
    options = request.options
    if options.workspace is None:  # on a Jetson the rest of it is everybody's memory
        options = dataclasses.replace(options, workspace=open_cuda().memory()[0] // 2)
    plan = build(bundle.file(file), request.precision, options, timing, _tell)
    path = folder / "engine.plan"
    path.write_bytes(plan.content)
    (folder / "timing.cache").write_bytes(plan.timing)
    info = _described(request, bundle, file, plan, path)
    _tell("self-test", 0, 1)
    figures, layers = _tested(bundle, path, info)
    seconds = time.perf_counter() - begin
    return msgspec.structs.replace(info, figures=figures, layers=layers, seconds=seconds)


def _described(request: Request, bundle: Bundle, file: str, plan: Plan, path: Path) -> EngineInfo:
    here, entry, options = platform(open_cuda()), describe(path), request.options
    slug = here.slug(options.version_compatible, options.hardware_compatible)
    stem = f"{request.kind}.{request.precision}.{slug}"
    return EngineInfo(
        plan=f"{stem}.{entry.sha256[:12]}.plan",
        kind=request.kind,
        precision=request.precision,
        onnx_sha256=bundle.manifest.files[file].sha256,
        plan_sha256=entry.sha256,
        bytes=entry.bytes,
        tensorrt=here.tensorrt,
        gpu=here.gpu,
        capability=here.capability,
        system=here.system,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        batches=options.batches,
        strongly_typed=plan.strongly_typed,
        flags=plan.flags,
    )


def _tested(
    bundle: Bundle, plan: Path, info: EngineInfo
) -> tuple[dict[str, float], dict[str, int]]:
    """The engine on the golden inputs: its cosines with fp32, labels kept, milliseconds."""
    made = bundle.manifest
    golden = load_golden(bundle.file(str(made.golden)), made)
    inputs: NDArray[Any] = golden.frames
    reference, border = golden.embeddings, image_border(made)
    if info.kind == "text":
        inputs, reference, border = golden.tokens, golden.text_embeddings, text_border(made)
    encoder = TrtEncoder(plan, info, border, trusted=True)
    rows = encoder(inputs)
    unit = abs(np.linalg.norm(rows, axis=1) - 1) < UNIT  # not so where it is not finite
    cosines = np.where(unit, row_cosines(rows, reference), -1.0)
    figures = {"inputs": float(len(rows)), "cosine_p1": float(np.quantile(cosines, 0.01))}
    bank = _bank(bundle) if info.kind == "image" else None
    if bank is not None:
        same = (rows @ bank.T).argmax(axis=1) == (reference @ bank.T).argmax(axis=1)
        figures["flips"] = float((~same).sum())
    figures["ms"] = _milliseconds(encoder, inputs[:1])
    layers = _layers(encoder.inspected())
    encoder.close()
    return figures, layers


def _bank(bundle: Bundle) -> Any:
    made = bundle.manifest
    if "default" not in made.prompts:
        return None
    path = bundle.file(made.prompts["default"])
    sha256 = made.files[made.text_encoder].sha256
    return load_bank(path, sha256, made.model.embedding_dim).embeddings


def _milliseconds(encoder: TrtEncoder, one: Any) -> float:
    seconds = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        encoder(one)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds)


def _layers(content: str) -> dict[str, int]:
    """How many layers give each type, by the inspector's text, which differs by release."""
    found: Counter[str] = Counter()
    try:
        layers = json.loads(content).get("Layers", [])
    except ValueError:
        return {}
    for layer in layers:
        outputs = layer.get("Outputs") if isinstance(layer, dict) else None
        if outputs:
            words = str(outputs[0].get("Format/Datatype", "other")).lower()
            kinds = ("int8", "fp8", "fp16", "half", "bf16", "fp32", "float", "int32")
            found[next((kind for kind in kinds if kind in words), "other")] += 1
    return dict(found)


def _tell(phase: str, step: int, of: int) -> None:
    print(json.dumps({"phase": phase, "step": step, "of": of}), flush=True)


def _end_with_parent() -> None:
    """Has Linux kill this process when its parent ends, in whatever way: it has the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """Does what the request in the first argument asks for, and writes `result.json` beside it."""
    _end_with_parent()
    path = Path(sys.argv[1])
    request = msgspec.json.decode(path.read_bytes(), type=Request)
    try:
        result: dict[str, Any] = {"info": msgspec.to_builtins(run(request, path.parent))}
    except EdgeClipError as error:
        result = {"error": str(error), "kind": type(error).__name__}
    (path.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
