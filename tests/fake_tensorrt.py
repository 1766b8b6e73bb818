"""A stand-in for the package `tensorrt`: the recorded names of one version, and no others.

`tensorrt_api/VERSION.json` holds what the real package's classes and enums have. Whatever a
version lacks raises AttributeError here as it does there. What lies behind the names is our own:
a plan holds the ONNX file, and running it runs that in ONNX Runtime on the addresses that it was
given, so that labels are true. A version compatible plan also says that it holds code, which only
a runtime loads that may. `fake_package` writes a folder that processes import it from;
$FAKE_TENSORRT_FAULT names what goes wrong there.
"""

import ctypes
import enum
import json
import os
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

API = Path(__file__).parent / "tensorrt_api"
VERSIONS = sorted(
    (path.stem for path in API.glob("*.json")), key=lambda v: [int(x) for x in v.split(".")]
)
_OPSETS = {"8": 17, "10": 22, "11": 25}
_LAYERS = {
    "MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "Conv": "CONVOLUTION",
    "LayerNormalization": "NORMALIZATION", "Softmax": "SOFTMAX", "ReduceSum": "REDUCE",
    "ReduceMean": "REDUCE",
}  # fmt: skip
PHASE = "Finding fastest tactics for {ForeignNode[/tower/norm.../tower/MatMul]}"
_NUMPY = {"FLOAT": np.float32, "UINT8": np.uint8, "INT32": np.int32}


class _Member(enum.IntEnum):
    """Converts with int(), compares with its own kind, and never combines, as pybind11's do."""

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(f"unsupported operand type: {self!r}")

    __or__ = __ror__ = __and__ = __rand__ = __lshift__ = __rlshift__ = _refuse

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class _Property:
    def __init__(self, name: str, readonly: bool) -> None:
        self.name, self.readonly = name, readonly

    def __get__(self, obj: Any, owner: type) -> Any:
        return self if obj is None else vars(obj).get(self.name)

    def __set__(self, obj: Any, value: Any) -> None:
        if self.readonly:
            raise AttributeError(f"can't set attribute {self.name!r}")
        vars(obj)[self.name] = value


class _Recorded:
    """Base of the recorded classes: has and takes the attributes of the recording alone."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name) and not _python(type(self)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


def _python(kind: type) -> bool:
    """Whether a class was derived by Python code: such objects take any attribute."""
    return not getattr(kind, "_recorded", {}).get("own") and kind.__module__ != "tensorrt"


def load(version: str, fault: str = "") -> types.ModuleType:
    """The package as `version` has it. `fault` is what goes wrong, with an optional precision:
    "build-none:int8"."""
    api = json.loads((API / f"{version}.json").read_text(encoding="utf-8"))
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    for dotted, members in api["enums"].items():
        own = [name for name in members if f"{dotted}.{name}" not in api["aliases"]]
        order = [*own, *(name for name in members if name not in own)]
        made = _functional(dotted.rpartition(".")[2], [(n, members[n]) for n in order])
        if "." not in dotted:
            setattr(trt, dotted, made)
        else:
            severity = made
    behaviour = _behaviour(trt, fault)
    for name, record in api["classes"].items():
        setattr(trt, name, _class(name, record, behaviour.get(name, {})))
    trt.ILogger.Severity = severity
    for alias, target in api["aliases"].items():
        if "." not in alias:
            kind, _, member = target.partition(".")
            setattr(trt, alias, getattr(getattr(trt, kind), member))
    return trt  # type: ignore[no-any-return]


def _functional(name: str, members: list[tuple[str, int]]) -> Any:
    make: Any = _Member
    return make(name, members)


def _class(name: str, record: dict[str, Any], behaviour: dict[str, Any]) -> type:
    body: dict[str, Any] = {"__module__": "tensorrt"}
    for attribute, kind in record["attributes"].items():
        if kind == "property":
            body[attribute] = _Property(attribute, attribute in record["readonly"])
        elif kind == "method":
            body[attribute] = _unmodelled(f"{name}.{attribute}")
    for attribute, value in behaviour.items():  # only what the version has
        if attribute.startswith("_") or attribute in body:
            body[attribute] = value
    return type(name, (_Recorded,), body)


def _unmodelled(path: str) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"tensorrt.{path} is recorded and has no behaviour")

    return call


def _new(trt: Any, kind: str, /, **attributes: Any) -> Any:
    """An object of a class that has no constructor."""
    made = object.__new__(getattr(trt, kind))
    vars(made).update(attributes)
    return made


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _precision(model: onnx.ModelProto) -> str:
    operators = {node.op_type for node in model.graph.node}
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    int8 = "QuantizeLinear" in operators
    return ("int8_fp16" if half else "int8") if int8 else "fp16" if half else "fp32"


def _behaviour(trt: Any, fault: str) -> dict[str, dict[str, Any]]:
    """What the methods do."""
    kind, _, only = fault.partition(":")

    def failing(what: str, model: onnx.ModelProto | None = None) -> bool:
        return kind == what and (not only or model is None or only == _precision(model))

    def say(logger: Any, message: str) -> None:
        logger.log(trt.ILogger.Severity.ERROR, message)

    # Builder

    def init_builder(self: Any, logger: Any) -> None:
        if failing("no-gpu"):
            say(logger, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self: Any, flags: int = 0) -> Any:
        flag = trt.NetworkDefinitionCreationFlag
        strong = hasattr(flag, "STRONGLY_TYPED") and bool(flags >> int(flag.STRONGLY_TYPED) & 1)
        explicit = hasattr(flag, "EXPLICIT_BATCH") and bool(flags >> int(flag.EXPLICIT_BATCH) & 1)
        major = int(trt.__version__.split(".")[0])
        assert explicit or major >= 10, "an implicit batch cannot be parsed"
        return _new(trt, "INetworkDefinition", _strong=strong or major >= 11, _model=None)

    def serialize(self: Any, network: Any, config: Any) -> Any:
        model = network._model
        if failing("killed", model):
            os.kill(os.getpid(), 9)
        if failing("build-none", model):
            say(self._logger, "Could not find any implementation for node {ForeignNode}")
            return None
        if failing("out-of-memory", model):
            say(self._logger, "Requested amount of GPU memory could not be allocated: OutOfMemory")
            return None
        if failing("strong-none", model) and network._strong:
            say(self._logger, "Could not infer output types for operation: dequantize")
            return None
        weak = {"FP16", "INT8"} & set(config._flags)
        if (network._strong and weak) or (
            not network._strong and _precision(model) != "fp32" and not weak
        ):
            say(self._logger, f"the flags {config._flags} do not go with this network")
            return None
        assert config._profile is not None and config._profile._shapes, "no profile for the batch"
        if getattr(config, "progress_monitor", None) is not None:
            config.progress_monitor.phase_start(PHASE, None, 2)
            for step in range(2):
                config.progress_monitor.step_complete(PHASE, step)
            config.progress_monitor.phase_finish(PHASE)
        config._cache._entries += 1
        level = config.hardware_compatibility_level
        head = {
            "version": trt.__version__,
            "profile": config._profile._shapes,
            "host_code": "VERSION_COMPATIBLE" in config._flags,
            "hardware": level.name if level else "NONE",
        }
        content = json.dumps(head).encode() + b"\0" + model.SerializeToString()
        return _host(content)

    def _host(content: bytes) -> Any:
        return _Bytes(content)

    def set_cache(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    # network and parser

    def parse(self: Any, content: bytes, path: str | None = None) -> bool:
        model = onnx.load_model_from_string(content)
        opset = max(o.version for o in model.opset_import)
        newest = _OPSETS[trt.__version__.split(".")[0]]
        if failing("parse", model) or opset > newest:
            code = f"No importer registered for op: Strange (opset {opset})"
            attributes: dict[str, Any] = {"desc": code, "node": 7}
            if hasattr(trt.ParserError, "node_name"):
                attributes |= {"node_name": "Strange_0", "node_operator": "Strange"}
            self._errors.append(
                _new(trt, "ParserError", **{k: (lambda v=v: v) for k, v in attributes.items()})
            )
            return False
        self._network._model = model
        return True

    def init_parser(self: Any, network: Any, logger: Any) -> None:
        self._network, self._logger, self._errors = network, logger, []

    def layers_of(self: Any) -> list[Any]:
        if "_layers" not in vars(self):
            layers = []
            for node in self._model.graph.node:
                kind = getattr(trt.LayerType, _LAYERS.get(node.op_type, "ELEMENTWISE"))
                integer = node.op_type in ("Shape", "QuantizeLinear", "Equal")
                dtype = trt.DataType.INT32 if integer else trt.DataType.FLOAT
                tensor = _new(trt, "ITensor", dtype=dtype)
                made = _new(trt, "ILayer", type=kind, num_outputs=1, name=node.name)
                made._tensor = tensor
                layers.append(made)
            self._layers = layers
        return self._layers  # type: ignore[no-any-return]

    def get_input(self: Any, i: int) -> Any:
        value = self._model.graph.input[i]
        shape = tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)
        return _new(trt, "ITensor", name=value.name, shape=shape)

    # runtime

    def init_logger(self: Any, logger: Any) -> None:
        self._logger = logger

    def deserialize(self: Any, content: bytes) -> Any:
        head, _, body = bytes(content).partition(b"\0")
        try:
            found = json.loads(head)
        except ValueError:
            say(self._logger, "Magic tag does not match")
            return None
        if found["host_code"] and not self.engine_host_code_allowed:
            say(self._logger, "The plan holds host code, which is not allowed")
            return None
        if failing("deserialise-none") or not _runs(found):
            say(self._logger, "The engine plan file is not compatible with this version")
            return None
        model = onnx.load_model_from_string(body)
        return _new(
            trt,
            "ICudaEngine",
            num_io_tensors=2,
            _model=model,
            _profile=found["profile"],
            _logger=self._logger,
            _session=onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"]),
        )

    def _runs(head: dict[str, Any]) -> bool:
        built, here = _numbers(head["version"]), _numbers(trt.__version__)
        return built == here or (head["host_code"] and built[0] == here[0] and built < here)

    def value_of(self: Any, name: str) -> Any:
        values = (*self._model.graph.input, *self._model.graph.output)
        return next(value for value in values if value.name == name)

    def dtype(self: Any, name: str) -> Any:
        names = {1: "FLOAT", 2: "UINT8", 6: "INT32"}
        return getattr(trt.DataType, names[value_of(self, name).type.tensor_type.elem_type])

    def shape(self: Any, name: str) -> tuple[int, ...]:
        return tuple(d.dim_value or -1 for d in value_of(self, name).type.tensor_type.shape.dim)

    def context(self: Any, *_: Any) -> Any:
        if failing("no-context"):
            say(self._logger, "OutOfMemory (no further information)")
            return None
        state: dict[str, Any] = {"_addresses": {}, "_shape": None, "_runs": 0, "_kept": []}
        return _new(trt, "IExecutionContext", engine=self, **state)

    def set_shape(self: Any, name: str, size: tuple[int, ...]) -> bool:
        low, _, high = self.engine._profile[name]
        if not low[0] <= size[0] <= high[0]:
            say(self.engine._logger, f"the batch {size[0]} is not in the profile")
            return False
        self._shape = tuple(size)
        return True

    def execute(self: Any, stream: int) -> bool:
        self._runs += 1
        if failing("lost") and self._runs > 1:
            say(self.engine._logger, "CUDA error 700: an illegal memory access was encountered")
            return False
        if failing("no-capture") and stub().stub_is_capturing(ctypes.c_void_p(stream)):
            say(self.engine._logger, "operation not permitted when stream is capturing")
            return False
        self._kept.append(_enqueue(stream, lambda: _compute(self)))  # a graph may replay it
        return True

    def _compute(self: Any) -> None:
        if failing("slow-mapped") and stub().stub_is_mapped(
            ctypes.c_void_p(self._addresses["embeddings"])
        ):
            time.sleep(0.005)
        (name,) = [value.name for value in self.engine._model.graph.input]
        kind = dtype(self.engine, name).name
        batch = _at(self._addresses[name], self._shape, _NUMPY[kind])
        (rows,) = self.engine._session.run(["embeddings"], {name: batch})
        _at(self._addresses["embeddings"], rows.shape, np.float32)[...] = rows

    return {
        "Builder": {
            "__init__": init_builder,
            "num_DLA_cores": 0,
            "create_network": create_network,
            "create_builder_config": lambda self: _new(
                trt, "IBuilderConfig", _flags=[], _profile=None, _cache=None
            ),
            "create_optimization_profile": lambda self: _new(
                trt, "IOptimizationProfile", _shapes={}
            ),
            "build_serialized_network": serialize,
        },
        "IBuilderConfig": {
            "set_flag": lambda self, flag: self._flags.append(flag.name),
            "set_memory_pool_limit": lambda self, pool, size: None,
            "set_tactic_sources": lambda self, sources: True,
            "add_optimization_profile": lambda self, profile: setattr(self, "_profile", profile),
            "create_timing_cache": lambda self, content: (
                _new(trt, "ITimingCache", _entries=int(content or b"0"))
                if (content or b"0").isdigit()
                else None
            ),
            "set_timing_cache": set_cache,
            "get_timing_cache": lambda self: self._cache,
        },
        "ITimingCache": {"serialize": lambda self: str(self._entries).encode()},
        "IOptimizationProfile": {
            "set_shape": lambda self, input, min, opt, max: self._shapes.update(
                {input: (min, opt, max)}
            ),
        },
        "OnnxParser": {
            "__init__": init_parser,
            "parse": parse,
            "num_errors": property(lambda self: len(self._errors)),
            "get_error": lambda self, i: self._errors[i],
        },
        "INetworkDefinition": {
            "num_inputs": property(lambda self: len(self._model.graph.input)),
            "get_input": get_input,
            "num_layers": property(lambda self: len(layers_of(self))),
            "get_layer": lambda self, i: layers_of(self)[i],
        },
        "ILayer": {
            "get_output": lambda self, i: self._tensor,
            "set_output_type": lambda self, i, kind: None,
        },
        "ILogger": {"__init__": lambda self: None},
        "IProgressMonitor": {"__init__": lambda self: None},
        "Runtime": {"__init__": init_logger, "deserialize_cuda_engine": deserialize},
        "ICudaEngine": {
            "get_tensor_name": lambda self, i: [
                v.name for v in (*self._model.graph.input, *self._model.graph.output)
            ][i],
            "get_tensor_mode": lambda self, name: (
                trt.TensorIOMode.INPUT
                if name in [v.name for v in self._model.graph.input]
                else trt.TensorIOMode.OUTPUT
            ),
            "get_tensor_dtype": dtype,
            "get_tensor_shape": shape,
            "create_execution_context": context,
            "create_engine_inspector": lambda self: _new(trt, "EngineInspector", _engine=self),
        },
        "EngineInspector": {
            "get_engine_information": lambda self, format: json.dumps(
                {
                    "Layers": [
                        {"Name": n.name, "Outputs": [{"Format/Datatype": "Row major FP32"}]}
                        for n in self._engine._model.graph.node
                    ]
                }
            ),
        },
        "IExecutionContext": {
            "set_tensor_address": lambda self, name, pointer: bool(
                self._addresses.update({name: pointer}) or True
            ),
            "set_input_shape": set_shape,
            "execute_async_v3": execute,
        },
    }


class _Bytes(bytes):
    """IHostMemory: what bytes() takes."""


def _at(pointer: int, shape: Any, dtype: Any) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_char * size).from_address(pointer)
    return np.frombuffer(buffer, dtype).reshape(shape)


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def stub() -> ctypes.CDLL:
    """The stub CUDA library, where it is loaded already."""
    return ctypes.CDLL(os.environ["FAKE_CUDART"])


def _enqueue(stream: int, work: Any) -> Any:
    """Puts work into a stream of the stub CUDA library, so that graphs record and replay it."""
    library = stub()
    callback = _CALLBACK(lambda _: work())
    library.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p, _CALLBACK, ctypes.c_void_p]
    assert library.cudaLaunchHostFunc(stream, callback, None) == 0
    return callback


def fake_package(folder: Path) -> Path:
    """A folder from which a process imports this as `tensorrt`, of the version that
    $FAKE_TENSORRT names."""
    folder.mkdir(parents=True, exist_ok=True)
    here = str(Path(__file__).parent)
    (folder / "tensorrt.py").write_text(
        "import os, sys\n"
        f"sys.path.append({here!r})\n"
        "import fake_tensorrt\n"
        "found = vars(fake_tensorrt.load(os.environ['FAKE_TENSORRT'], "
        "os.environ.get('FAKE_TENSORRT_FAULT', '')))\n"
        "globals().update((k, v) for k, v in found.items() if k == '__version__' or k[0] != '_')\n"
    )
    return folder
