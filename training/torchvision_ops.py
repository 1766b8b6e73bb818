"""Lets torchvision be imported where its compiled operators do not load.

PyPI's torchvision is built against CUDA. Beside a CPU-only or a Jetson's own torch its binary does
not load, and then `import torchvision` ends in "operator torchvision::nms does not exist". Only
its transforms are used here, which need no operators; so the two missing names are declared.
"""

import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for operator in ("nms", "qnms"):
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{operator}", signature)
    import torchvision  # noqa: F401
