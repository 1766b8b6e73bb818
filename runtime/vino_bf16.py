"""Whether OpenVINO may compute a bundle's image encoder in bf16: as the golden frames say.

By bf16 a CPU that has it is up to twice as fast at what a reduced precision left in float; what it
costs depends on the model. fp32 is never computed so: it is what the others are held against.
"""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .backends import image_border
from .bank_file import read_bank
from .bundle import Bundle
from .golden import load_golden
from .remembered import recall, remember, this_machine
from .vino import VinoEncoder, computes_bf16

KIND = "openvino-bf16"
MIN_COSINE = 0.999  # with no label changed: at 0.997 a MobileNet changed 4 % of photos' labels


class Deviation(msgspec.Struct, frozen=True):
    """How far embeddings are from fp32's on so many golden frames: cosine at the first percentile,
    and how many frames change their label (0 where the bundle has no labels)."""

    frames: int
    cosine_p1: float
    flips: int

    @property
    def small(self) -> bool:
        return self.cosine_p1 >= MIN_COSINE and self.flips == 0

    def __str__(self) -> str:
        return (
            f"on {self.frames} golden frames cosine {self.cosine_p1:.4f} with fp32 at the 1st "
            f"percentile, {self.flips} labels changed"
        )


def open_vino(
    bundle: Bundle, precision: str, threads: int | None
) -> tuple[VinoEncoder, tuple[str, ...]]:
    """The image encoder, and what is to be noted of it. fp32 is computed in f32, the others in bf16
    where the CPU has that and the golden frames allow it; they are asked once and remembered."""
    made = bundle.manifest
    path, border = bundle.file(made.precisions[precision].image), image_border(made)
    if precision == "fp32" or not computes_bf16():
        return VinoEncoder(path, border, threads), ()
    if made.golden is None:
        note = "openvino does not use bf16: the bundle has no golden frames; export it again"
        return VinoEncoder(path, border, threads), (note,)
    key = {"format": 1, "files": _files(bundle, precision), **this_machine()}
    found = recall(KIND, key, Deviation)
    notes: tuple[str, ...] = ()
    if found is None or found.small:
        encoder = VinoEncoder(path, border, threads, "bf16")
        if found is None:
            found = deviation(encoder, bundle)
            notes = (remember(KIND, key, found),)
        if found.small:
            return encoder, (f"openvino uses bf16: {found}", *notes)
    return VinoEncoder(path, border, threads), (f"openvino does not use bf16: {found}", *notes)


def deviation(encoder: VinoEncoder, bundle: Bundle) -> Deviation:
    """Of an encoder on the golden frames, each run by itself, as a camera's are."""
    golden = load_golden(bundle.file(str(bundle.manifest.golden)), bundle.manifest)
    rows = np.concatenate([encoder(golden.frames[n : n + 1]) for n in range(len(golden.frames))])
    cosines = np.nan_to_num((rows * golden.embeddings).sum(axis=1), nan=-1.0)
    bank, flips = _bank(bundle), 0
    if bank is not None:
        same = (rows @ bank.T).argmax(axis=1) == (golden.embeddings @ bank.T).argmax(axis=1)
        flips = int((~same).sum())
    return Deviation(len(rows), float(np.quantile(cosines, 0.01)), flips)


def _bank(bundle: Bundle) -> NDArray[np.float32] | None:
    """The default labels' rows; None where there are none of this text encoder."""
    made = bundle.manifest
    if "default" not in made.prompts:
        return None
    bank = read_bank(bundle.file(made.prompts["default"]), made.model.embedding_dim)
    return bank.embeddings if bank.text_encoder == made.files[made.text_encoder].sha256 else None


def _files(bundle: Bundle, precision: str) -> dict[str, Any]:
    """The hashes of what the golden frames' verdict depends on."""
    made = bundle.manifest
    names = [made.precisions[precision].image, str(made.golden), made.prompts.get("default")]
    return {name: made.files[name].sha256 for name in names if name}
