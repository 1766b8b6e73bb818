"""Which backends will work on this machine, and what to do where one will not."""

from dataclasses import dataclass

from . import mend
from .machine import Facts


@dataclass(frozen=True)
class Verdict:
    """Whether a backend works here, why, and what to do if not."""

    backend: str
    works: bool
    because: str
    mend: str = ""


def verdicts(facts: Facts) -> list[Verdict]:
    """One for each backend."""
    checks = (_onnxruntime, _openvino, _tensorrt, _ort_cuda, _ort_tensorrt)
    return [check(facts) for check in checks]


def _onnxruntime(facts: Facts) -> Verdict:
    answer = facts.answer("onnxruntime")
    if not answer.ok:
        because = f"ONNX Runtime: {answer.why()}"
        return Verdict("onnxruntime", False, because, mend.onnxruntime(facts))
    tried = facts.provider("CPUExecutionProvider")
    if not tried.ok:
        because = f"its CPU provider fails: {tried.why()}"
        return Verdict("onnxruntime", False, because, mend.onnxruntime(facts))
    return Verdict("onnxruntime", True, f"ONNX Runtime {answer.value['version']} on the CPU")


def _openvino(facts: Facts) -> Verdict:
    answer = facts.answer("openvino")
    if answer.ok:
        return Verdict("openvino", True, f"OpenVINO {answer.value['version']} on the CPU")
    return Verdict("openvino", False, f"OpenVINO: {answer.why()}", mend.openvino(facts))


def _tensorrt(facts: Facts) -> Verdict:
    version, answer = mend.tensorrt_version(facts), facts.answer("tensorrt")
    if facts.gpu is None:
        return _without_gpu(facts, "tensorrt")
    if mend.too_old(version):
        because = f"TensorRT {version} is too old, 8.6 is the oldest that reads the encoders"
        return Verdict("tensorrt", False, because, mend.tensorrt(facts))
    if facts.gpu_error:
        because = f"CUDA does not open the GPU: {facts.gpu_error}"
        return Verdict("tensorrt", False, because, mend.driver(facts))
    if not answer.ok:
        because = f"TensorRT: {answer.why()}"
        if answer.missing and facts.nvinfer:
            because = f"TensorRT {facts.nvinfer} is on the system, and this Python has none"
        return Verdict("tensorrt", False, because, mend.tensorrt(facts))
    if answer.value["builds"]:
        return Verdict("tensorrt", False, f"TensorRT cannot work: {answer.value['builds']}")
    if not any(answer.ok for answer in facts.cuda.values()):
        return Verdict("tensorrt", False, "no CUDA binding works", mend.bindings(facts))
    return Verdict("tensorrt", True, f"TensorRT {version} on {facts.gpu.name}")


def _ort_cuda(facts: Facts) -> Verdict:
    return _by_provider(facts, "ort-cuda", "CUDAExecutionProvider")


def _ort_tensorrt(facts: Facts) -> Verdict:
    return _by_provider(facts, "ort-tensorrt", "TensorrtExecutionProvider")


def _by_provider(facts: Facts, backend: str, name: str) -> Verdict:
    """A backend that is an execution provider of ONNX Runtime's."""
    if facts.gpu is None:
        return _without_gpu(facts, backend)
    answer = facts.provider(name)
    if answer.ok:
        return Verdict(backend, True, f"{name} ran a model on {facts.gpu.name}")
    because = f"the ONNX Runtime here has no {name}"
    if not answer.missing:
        because = f"{name} is listed, but does not run: {answer.error}"
    command = mend.provider(facts, answer.error)
    if not command:
        because += "; no wheel is known to have it for this board"
        old = mend.too_old(mend.tensorrt_version(facts))
        command = f"use the backend {'onnxruntime' if old else 'tensorrt'}"
    return Verdict(backend, False, because, command)


def _without_gpu(facts: Facts, backend: str) -> Verdict:
    if facts.gpu_on_bus:
        because = "the driver of the NVIDIA GPU does not answer"
        return Verdict(backend, False, because, mend.driver(facts))
    instead = "use onnxruntime or openvino, on the CPU"
    return Verdict(backend, False, "there is no NVIDIA GPU", instead)
