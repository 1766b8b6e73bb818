"""The bundle's manifest (format 1): its fields, reading and writing.

`manifest.json` is the only entry point of a bundle. Every other file is named in it, with its
size and SHA-256. Fields of later minor versions are kept when a manifest is read and written
again; another major version is refused.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .errors import BundleError, MissingFile, UnsupportedFormat

NAME = "manifest.json"
FORMAT = "1.0"
MAX_BYTES = 16 << 20

Pixels = Annotated[int, msgspec.Meta(gt=0, le=4096)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Channels = tuple[float, float, float]
Scale = Annotated[float, msgspec.Meta(gt=0)]


class ImageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a frame becomes the image encoder's input: the preprocessing the model was trained with.

    `fit` is what happens to the aspect ratio: `crop` resizes the short side and crops the centre,
    `squash` ignores it, `pad` resizes the long side and fills with the gray level `fill`.
    Mean and standard deviation are of RGB in [0, 1]; they are applied inside the encoder.
    """

    height: Pixels
    width: Pixels
    mean: Channels
    std: Channels
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fit: Literal["crop", "squash", "pad"] = "crop"
    fill: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0


class TextSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a text becomes token ids: cleaning, special tokens and length."""

    context_length: Annotated[int, msgspec.Meta(gt=0, le=4096)]
    start_id: TokenId | None
    end_id: TokenId | None
    pad_id: TokenId
    cleaning: Literal["lower", "whitespace", "canonicalize"]
    templates: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """From cosines to scores: `activation(logit_scale * cosine + logit_bias)`."""

    logit_scale: Scale
    logit_bias: float
    activation: Literal["softmax", "sigmoid"]


class Precision(msgspec.Struct, frozen=True, kw_only=True):
    """One precision of the image encoder and the figures that accepted or rejected it."""

    image: str
    status: Literal["accepted", "rejected"]
    figures: dict[str, float]
    float_layers: tuple[str, ...] = ()


class TextPrecision(msgspec.Struct, frozen=True, kw_only=True):
    """The text encoder in another precision than fp32, and the figures that decided on it."""

    file: str
    status: Literal["accepted", "rejected"]
    figures: dict[str, float]
    float_layers: tuple[str, ...] = ()


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Size and hash of one file of the bundle."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """Where the encoders came from."""

    name: str
    source: str
    weights_sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    embedding_dim: Annotated[int, msgspec.Meta(gt=0)]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the runtime knows about a bundle before it opens another file."""

    format: str
    model: Model
    image: ImageSpec
    text: TextSpec
    head: Head
    precisions: Annotated[dict[str, Precision], msgspec.Meta(min_length=1)]
    text_encoder: str
    text_precisions: dict[str, TextPrecision] = {}
    tokenizer: str
    prompts: dict[str, str] = {}
    golden: str | None = None
    files: dict[str, FileEntry]


def read(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """Reads `folder/manifest.json`; returns it typed, and raw with the fields this release
    does not know.

    Raises MissingFile, or UnsupportedFormat naming the field that is wrong.
    """
    path = folder / NAME
    if not path.is_file():
        hint = f"make one with `edgeclip export CHECKPOINT {folder}`"
        raise MissingFile(f"{folder} is not a bundle: it has no {NAME}; {hint}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnsupportedFormat(f"{path} is larger than {MAX_BYTES >> 20} MiB")
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        _check_version(raw, path)
        manifest = msgspec.convert(raw, Manifest)
        _check_references(manifest, path)
        return manifest, raw
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UnsupportedFormat(
            f"{path} is not a valid manifest: {error}; export the bundle again"
        ) from error


def _check_version(raw: dict[str, Any], path: Path) -> None:
    version = str(raw.get("format", "missing"))
    if version.partition(".")[0] != FORMAT.partition(".")[0]:
        raise UnsupportedFormat(
            f"{path} has format {version}, this release reads {FORMAT}; "
            "update edgeclip, or export the bundle again"
        )


def _check_references(manifest: Manifest, path: Path) -> None:
    """Every file that is named is listed, and every template takes a label."""
    named = {precision.image for precision in manifest.precisions.values()}
    named |= {precision.file for precision in manifest.text_precisions.values()}
    named |= {manifest.text_encoder, manifest.tokenizer, *manifest.prompts.values()}
    named |= {manifest.golden} if manifest.golden else set()
    for name in sorted(named - set(manifest.files)):
        raise UnsupportedFormat(f"{path} does not list the file {name!r}; export the bundle again")
    for template in manifest.text.templates:
        if "{}" not in template:
            raise UnsupportedFormat(f"{path}: the template {template!r} has no {{}} for the label")


def write(folder: Path, manifest: Manifest, raw: dict[str, Any] | None = None) -> None:
    """Writes `folder/manifest.json`; what `raw` (from `read`) holds beyond `manifest` is kept."""
    merged = _merge(raw or {}, msgspec.to_builtins(manifest))
    text = json.dumps(merged, indent=2, ensure_ascii=False)
    beside = folder / f".{NAME}.new"
    beside.unlink(missing_ok=True)  # what a crash left; or a link, which is not written through
    with beside.open("x", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())  # or a power cut may leave the new name with nothing in it
    beside.replace(folder / NAME)


_TABLES = {"precisions", "text_precisions", "prompts", "files"}


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """New values over old; unknown fields of records stay, entries dropped from tables go."""
    merged = {**old, **new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            kept = {k: v for k, v in before.items() if key not in _TABLES or k in value}
            merged[key] = _merge(kept, value)
    return merged
