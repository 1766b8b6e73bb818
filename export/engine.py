"""Builds a TensorRT engine from an encoder file, on the device that will run it.

One way through TensorRT 8.6 to 11: the precision is in the file. Networks are strongly typed where
TensorRT can (from 10 on); 8.6 is told by flags, and so is a 10.x that refuses the file otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.engine_file import Platform
from runtime.errors import BackendUnavailable
from runtime.trt import tensorrt
from runtime.trt_plan import quiet_logger

Advance = Callable[[str, int, int], None]
STRONG = 10  # the first major version with strongly typed networks
VOLTA = (7, 0)
_FLOAT_LAYERS = {"NORMALIZATION", "REDUCE"}
_GEMMS = {"CONVOLUTION", "MATRIX_MULTIPLY"}


class BuildFailed(BackendUnavailable):
    """TensorRT does not make an engine of this file on this device."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an engine is built.

    `batches` are the smallest, best and largest batch; equal ones make a static engine. `workspace`
    is the most memory in bytes that a layer may use while it runs, `level` the effort of the
    search, 0 to 5. `dla` is the number of a deep learning accelerator, for CNNs alone. Engines
    that are `version_compatible` or `hardware_compatible` run in more places and more slowly: see
    runtime.engine_file. Without `external_tactics` TensorRT 8 and 10 do without cuBLAS and cuDNN.
    """

    batches: tuple[int, int, int] = (1, 1, 1)
    workspace: int | None = None
    level: int | None = None
    dla: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    external_tactics: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A serialised engine, the timing cache that its build leaves, and how it was built."""

    content: bytes
    timing: bytes
    strongly_typed: bool
    flags: tuple[str, ...]


def require_compatibility(options: BuildOptions, here: Platform) -> None:
    """Raises BackendUnavailable where a compatibility that is asked for cannot be had here.

    After NvInfer.h on kVERSION_COMPATIBLE and kAMPERE_PLUS, and TensorRT's developer guide.
    """
    against = here.against_hardware_compatible()
    if options.hardware_compatible and against:
        raise BackendUnavailable(f"{against}: build without --hardware-compatible")
    if options.version_compatible and here.capability < VOLTA:
        raise BackendUnavailable(
            f"version compatible engines are for GPUs from Volta on, not {here.gpu}: build without "
            "--version-compatible"
        )


def build(
    onnx: Path,
    precision: str,
    options: BuildOptions,
    timing: bytes = b"",
    advance: Advance = lambda _phase, _step, _of: None,
) -> Plan:
    """Builds the engine of an encoder file with a dynamic first axis.

    `timing` is what an earlier build on this device left; `advance` is called with a phase, its
    step and its number of steps, where TensorRT tells them. Raises BuildFailed with TensorRT's own
    words, and BackendUnavailable where there is no TensorRT or no GPU.
    """
    trt = tensorrt()
    flags = hasattr(trt.BuilderFlag, "FP16")  # 11 knows strong types alone
    if int(trt.__version__.split(".")[0]) >= STRONG and not (flags and options.dla is not None):
        try:
            return _Build(trt, precision, options, advance, strong=True).run(onnx, timing)
        except BuildFailed:
            if not flags:
                raise
    return _Build(trt, precision, options, advance, strong=False).run(onnx, timing)


class _Build:
    """One attempt: strongly typed, or by flags."""

    def __init__(
        self, trt: Any, precision: str, options: BuildOptions, advance: Advance, strong: bool
    ) -> None:
        self._trt, self._options, self._advance = trt, options, advance
        self._precision, self._strong = precision, strong
        self._flags: list[str] = []
        self._logger = quiet_logger(trt)
        try:
            self._builder = trt.Builder(self._logger)
        except TypeError as error:  # what the bindings raise for a null pointer
            raise BackendUnavailable(
                f"TensorRT {trt.__version__} finds no GPU that it can use: {self._logger.said()}"
            ) from error

    def run(self, onnx: Path, timing: bytes) -> Plan:
        """Builds the plan. Raises BuildFailed."""
        network = self._network(onnx)
        config = self._builder.create_builder_config()
        self._limits(config)
        self._precisions(config, network)
        self._compatibility(config)
        if self._options.dla is not None:
            self._accelerator(config, network, self._options.dla)
        config.add_optimization_profile(self._profile(network))
        cache = config.create_timing_cache(timing)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        content = self._builder.build_serialized_network(network, config)
        if content is None:
            raise BuildFailed(
                f"TensorRT {self._trt.__version__} builds no engine: {self._logger.said()}"
            )
        times = config.get_timing_cache()
        return Plan(
            content=bytes(content),
            timing=b"" if times is None else bytes(times.serialize()),
            strongly_typed=self._strong,
            flags=tuple(self._flags),
        )

    def _network(self, onnx: Path) -> Any:
        kinds = self._trt.NetworkDefinitionCreationFlag
        kind = kinds.STRONGLY_TYPED if self._strong else kinds.EXPLICIT_BATCH
        network = self._builder.create_network(1 << int(kind))
        self._parser = self._trt.OnnxParser(network, self._logger)  # must outlive the network
        if not self._parser.parse(onnx.read_bytes()):
            found = [self._parser.get_error(i) for i in range(self._parser.num_errors)]
            raise BuildFailed(f"TensorRT cannot read {onnx.name}: {'; '.join(map(_where, found))}")
        return network

    def _limits(self, config: Any) -> None:
        options, trt = self._options, self._trt
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if options.level is not None:
            config.builder_optimization_level = options.level
        if not options.external_tactics and hasattr(trt.TacticSource, "CUBLAS"):
            own = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
            config.set_tactic_sources(sum(1 << int(source) for source in own))
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if hasattr(config, "progress_monitor"):
            config.progress_monitor = _monitor(trt, self._advance)

    def _precisions(self, config: Any, network: Any) -> None:
        """Tells a weakly typed build what the file says: TensorRT would ignore it otherwise."""
        if self._strong or self._precision == "fp32":
            return
        self._set(config, "FP16")
        if self._precision.startswith("int8"):
            self._set(config, "INT8")
        self._set(config, "OBEY_PRECISION_CONSTRAINTS")
        for layer in _in_float(self._trt, network):
            layer.precision = self._trt.float32
            layer.set_output_type(0, self._trt.float32)

    def _compatibility(self, config: Any) -> None:
        if self._options.version_compatible:
            self._set(config, "VERSION_COMPATIBLE")
        if self._options.hardware_compatible:
            # not SAME_COMPUTE_CAPABILITY: from 10.9 on alone, and 10.14 fails on attention with it
            config.hardware_compatibility_level = self._trt.HardwareCompatibilityLevel.AMPERE_PLUS
            self._flags.append("AMPERE_PLUS")

    def _accelerator(self, config: Any, network: Any, core: int) -> None:
        if core >= self._builder.num_DLA_cores:
            raise BuildFailed(
                f"this device has {self._builder.num_DLA_cores} DLA cores, not {core}"
            )
        types = {network.get_layer(i).type for i in range(network.num_layers)}
        if self._trt.LayerType.SOFTMAX in types:
            raise BuildFailed("attention does not run on a DLA: leave --dla out, or take a CNN")
        config.default_device_type = self._trt.DeviceType.DLA
        config.DLA_core = core
        self._set(config, "GPU_FALLBACK")

    def _set(self, config: Any, flag: str) -> None:
        config.set_flag(getattr(self._trt.BuilderFlag, flag))
        self._flags.append(flag)

    def _profile(self, network: Any) -> Any:
        profile = self._builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, *((batch, *rest) for batch in self._options.batches))
        return profile


def _where(error: Any) -> str:
    """A parser's error with its node, as far as the release tells it."""
    if not hasattr(error, "node_name"):
        return f"node {error.node()}: {error.desc()}"
    return f"{error.node_name()} {error.node_operator()}: {error.desc()}"


def _in_float(trt: Any, network: Any) -> list[Any]:
    """The layers that stay in float in a weakly typed build: statistics, and what follows the
    last convolution or product."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    gemms = [i for i, layer in enumerate(layers) if layer.type.name in _GEMMS]
    last = gemms[-1] if gemms else len(layers)
    floats = (trt.float32, trt.float16)
    return [
        layer
        for i, layer in enumerate(layers)
        if (layer.type.name in _FLOAT_LAYERS or i > last)
        and layer.num_outputs == 1
        and layer.get_output(0).dtype in floats
        and layer.type.name != "CONSTANT"
    ]


def _monitor(trt: Any, advance: Advance) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            advance(phase_name, step + 1, self._steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            advance(phase_name, self._steps[phase_name], self._steps[phase_name])

    return Monitor()
