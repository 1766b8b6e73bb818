"""The ranges that a quantisation-aware training has found: quantization.json beside the weights.

    {"format": 2, "bits": 8, "weights_sha256": "...",
     "input_steps": {"visual.conv1.weight": 0.01953125, ...}}

`input_steps` are the steps of each layer's input by the name of its weight in the checkpoint;
weights have one step for each output channel: the largest magnitude over 127, rounded up to
`calibration.ranges.EXACT_BITS` significant bits, as steps of inputs are.
"""

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec

from runtime.errors import DataError

NAME = "quantization.json"
FORMAT = 2
Step = Annotated[float, msgspec.Meta(gt=0, le=65504)]  # what float16 holds


class Quantization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds; `weights_sha256` is of the weights' file that it belongs to."""

    format: int
    bits: int
    weights_sha256: str
    input_steps: dict[str, Step]


def write_quantization(folder: Path, quantization: Quantization) -> None:
    """Writes it into a checkpoint folder."""
    content = msgspec.json.format(msgspec.json.encode(quantization))
    (folder / NAME).write_bytes(content + b"\n")


def read_quantization(folder: Path, weights: Path) -> Quantization | None:
    """Reads it; None where the checkpoint was not trained so. Raises DataError where the file is
    damaged, of a later format, or of other weights."""
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Quantization)
    except msgspec.DecodeError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if found.format != FORMAT:
        raise DataError(
            f"{file} is of format {found.format}; this release reads {FORMAT}: train with --qat "
            "again, or delete it to have int8 calibrated"
        )
    if hashlib.sha256(weights.read_bytes()).hexdigest() != found.weights_sha256:
        raise DataError(
            f"{file} belongs to other weights than {weights.name} beside it: train with --qat "
            "again, or delete it to have int8 calibrated"
        )
    return found
