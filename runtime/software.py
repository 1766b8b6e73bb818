"""What the installed libraries, and a bundle, mean for edgeclip."""

from pathlib import Path

from . import mend
from .bundle import Bundle
from .errors import BundleError, MissingFile
from .findings import Item
from .machine import NOT_LOCAL, Facts


def of_software(facts: Facts) -> list[Item]:
    """A row for each library, and for each provider that ONNX Runtime lists."""
    return [
        _tensorrt(facts),
        _bindings(facts),
        _onnxruntime(facts),
        *_providers(facts),
        _openvino(facts),
        _opencv(facts),
    ]


def _tensorrt(facts: Facts) -> Item:
    answer = facts.answer("tensorrt")
    version = str(answer.value.get("version", ""))
    found = version or (f"{facts.nvinfer} on the system" if facts.nvinfer else answer.why())
    if mend.too_old(version or facts.nvinfer):
        means = "backend tensorrt needs 8.6 or later"
        return Item("TensorRT", "warning", found, means, mend.tensorrt(facts))
    if builds := answer.value.get("builds"):
        return Item("TensorRT", "warning", found, f"it loads, but cannot work here: {builds}")
    if version:
        early = version.startswith("8.")
        means = "it takes fp32, fp16 and int8 bundles, not int8_fp16" if early else ""
        return Item("TensorRT", "ok", found, means)
    if facts.nvinfer:
        means = f"this Python does not import it: {answer.error}"
        return Item("TensorRT", "warning", found, means, mend.tensorrt(facts))
    wanted = mend.tensorrt(facts) if facts.gpu else ""
    return Item("TensorRT", "missing", found, "backend tensorrt needs it, and a GPU", wanted)


def _bindings(facts: Facts) -> Item:
    found = [name for name, answer in facts.cuda.items() if answer.ok]
    if found:
        return Item("CUDA bindings", "ok", ", ".join(found))
    names = ", ".join(facts.cuda)
    if facts.gpu is None:
        return Item("CUDA bindings", "missing", f"none of {names}", "none is needed without a GPU")
    *_, last = (answer.error for answer in facts.cuda.values())  # the one that needs no package
    means = f"backend tensorrt needs one of them; {last}"
    return Item("CUDA bindings", "missing", f"none of {names} works", means, mend.bindings(facts))


def _onnxruntime(facts: Facts) -> Item:
    answer = facts.answer("onnxruntime")
    if not answer.ok:
        means, wanted = "backend onnxruntime needs it", mend.onnxruntime(facts)
        return Item("ONNX Runtime", "missing", answer.why(), means, wanted)
    installed = answer.value["packages"]
    found = ", ".join(f"{name} {version}" for name, version in installed.items())
    if len(installed) > 1:
        means = "they share their files, and one overwrites the other's: keep one"
        return Item("ONNX Runtime", "warning", found, means, mend.one_onnxruntime(facts))
    return Item("ONNX Runtime", "ok", found or answer.value["version"])


def _providers(facts: Facts) -> list[Item]:
    return [
        _provider(facts, name) for name in facts.answer("onnxruntime").value.get("providers", [])
    ]


def _provider(facts: Facts, name: str) -> Item:
    answer = facts.provider(name)
    if name == NOT_LOCAL:
        return Item(name, "ok", "not tried: it is for remote services")
    if answer.ok:
        return Item(name, "ok", "ran a model")
    means = "ONNX Runtime lists it, but it does not run here"
    gpu = name in ("CUDAExecutionProvider", "TensorrtExecutionProvider")
    wanted = mend.provider(facts, answer.error) if gpu else mend.onnxruntime(facts)
    return Item(name, "warning", answer.error, means, wanted)


def _openvino(facts: Facts) -> Item:
    answer = facts.answer("openvino")
    if answer.ok:
        devices = ", ".join(answer.value["devices"])
        return Item("OpenVINO", "ok", f"{answer.value['version']}, devices {devices}")
    means = "backend openvino needs it"
    return Item("OpenVINO", "missing", answer.why(), means, mend.openvino(facts))


def _opencv(facts: Facts) -> Item:
    answer = facts.answer("cv2")
    if not answer.ok:
        means = "pictures work without it; videos, cameras and NV12 frames do not"
        return Item("OpenCV", "missing", answer.why(), means, mend.opencv(facts))
    version = answer.value["version"]
    if answer.value["gstreamer"]:
        return Item("OpenCV", "ok", f"{version} with GStreamer")
    found = f"{version} without GStreamer"
    if facts.jetson and mend.runs_on_system(facts):
        means = "CSI cameras and the hardware decoder need GStreamer, which the system's has"
        return Item("OpenCV", "warning", found, means, mend.opencv(facts))
    return Item("OpenCV", "ok", found, "USB cameras and videos work, GStreamer pipelines do not")


def of_bundle(folder: Path) -> Item:
    """Whether a bundle opens with every file as it was exported, and its precisions."""
    try:
        bundle = Bundle(folder)
        for name in bundle.manifest.files:
            bundle.file(name)
    except MissingFile as error:
        return Item("bundle", "missing", str(folder), str(error))
    except BundleError as error:
        return Item("bundle", "warning", str(folder), str(error))
    listed = bundle.manifest.precisions.items()
    precisions = ", ".join(f"{name} ({made.status})" for name, made in listed)
    return Item("bundle", "ok", str(folder), f"precisions: {precisions}")
