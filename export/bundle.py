"""From a checkpoint to a bundle: writes the encoders, proves them, publishes the folder whole."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from calibration import parity
from calibration.metrics import Floats
from calibration.parity import Parity
from runtime import manifest
from runtime.backends import Border
from runtime.bank_file import load_bank, save_bank
from runtime.bundle import Bundle, describe
from runtime.classifier import Classifier
from runtime.errors import DataError, PrecisionRefused
from runtime.folders import check_target, new_folder
from runtime.label_sets import Labels, parse_labels
from runtime.manifest import Manifest, Model, Precision
from runtime.ort import OrtEncoder
from runtime.tokenizer import Tokenizer
from runtime.unknown import Fitted
from training.evaluate import head, normalise
from training.model import ClipModel, create
from training.quantization import NAME as QUANTIZATION
from training.text import text_side

from .golden import write_golden
from .precisions import CalibrationOptions, Made, make_precisions, write_precisions
from .report import write_report
from .text_precisions import (
    MadeTexts,
    choose_texts,
    make_text_precisions,
    write_text_precisions,
)
from .to_onnx import write_onnx
from .towers import ImageEncoder, TextEncoder
from .trained_ranges import Trained, read_trained

IMAGE, TEXT, TOKENIZER = "image.fp32.onnx", "text.fp32.onnx", "tokenizer.json"
BATCHES = (1, 3, 8)
MIN_COSINE = 0.99999
# Short, long, empty, digits, other scripts: the text encoder must hold on all of them.
PROBES = (
    "a photo of a cat", "", "two dogs, 3 cats & 2024 birds", "naïve café",
    "一只猫", "a " * 200 + "cat", "A LOUD LABEL!", "🙂 emoji",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to."""

    checkpoint: str
    bundle: Path
    pretrained: str | None = None
    tokenizer: Path | None = None

    # prompt banks, by name
    labels: Labels | None = None
    templates: tuple[str, ...] | None = None
    """What labels are put into (default: the templates that the model was trained with)."""

    precisions: CalibrationOptions = CalibrationOptions()

    seed: int = 0
    """Of the random weights, where neither a folder nor a pretrained tag is given."""
    force: bool = False
    """Replace the bundle folder if it exists."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bundle", self.bundle.expanduser())
        if self.templates and self.labels is not None and parse_labels(self.labels).templates:
            raise DataError("--labels has templates of its own: give them there, or by --template")


def export_bundle(options: ExportOptions, quiet: bool = False) -> Manifest:
    """Exports a checkpoint folder or an open_clip model as a bundle (format 1).

    The files are compared with the PyTorch model before the folder appears. Raises DataError for
    a model that cannot be exported, and GateFailed where the files differ from the model; then
    there is no bundle. PrecisionRefused is raised where a precision costs too much: the bundle is
    there then, without it (or, if that was asked for, with it marked as rejected).
    """
    console = Console(stderr=True, quiet=quiet)
    check_target(options.bundle, manifest.NAME, options.force)
    clip = create(options.checkpoint, options.pretrained, options.seed)
    trained = read_trained(clip) if "int8" in options.precisions.precisions else None
    templates = options.templates or clip.templates
    content, text = text_side(clip, options.tokenizer, templates)
    tokenizer = Tokenizer(content, text)
    texts = choose_texts(options.precisions, options.labels, tokenizer, PROBES)
    _announce(clip, trained, options, console)
    with new_folder(options.bundle, manifest.NAME, options.force) as folder:
        (folder / TOKENIZER).write_bytes(content)
        with console.status("Writing the encoders"):
            _write_encoders(clip, text.end_id, folder)
        with console.status("Comparing them with the model"):
            rows = compare(clip, tokenizer, folder)
        parity.require(rows, MIN_COSINE)
        made = Manifest(
            format=manifest.FORMAT,
            model=_model(clip),
            image=clip.image,
            text=text,
            head=head(clip),
            precisions={"fp32": Precision(image=IMAGE, status="accepted", figures=_figures(rows))},
            text_encoder=TEXT,
            tokenizer=TOKENIZER,
            files=_files(folder),
        )
        made = msgspec.structs.replace(made, prompts=_write_prompts(options, made, folder))
        manifest.write(folder, msgspec.structs.replace(made, files=_files(folder)))
        patterns = probe_frames(clip.image.height, clip.image.width)
        with make_precisions(
            options.precisions, _classifier(folder), options.labels, patterns, console, trained
        ) as others:
            made_texts = make_text_precisions(
                options.precisions, folder / TEXT, texts, tokenizer, options.labels, others, console
            )
            made, refused = _write_judged(others, made_texts, made, folder, options)
            golden = write_golden(folder / IMAGE, folder / TEXT, others, texts, patterns, folder)
            made = msgspec.structs.replace(made, golden=golden)
            write_report(folder, made, rows, others, made_texts)
        made = msgspec.structs.replace(made, files=_files(folder))
        manifest.write(folder, made)
        made, _ = manifest.read(folder)  # what would be refused later is refused now
    if others.ranges:
        others.ranges.unlink(missing_ok=True)
    if refused:
        raise PrecisionRefused(_refusal(refused, options))
    return made


def _announce(
    clip: ClipModel, trained: Trained | None, options: ExportOptions, console: Console
) -> None:
    """Says what a user may not expect of this model's bundle."""
    if trained and options.precisions.calibrate:
        console.print(f"int8 by the ranges of the training ({QUANTIZATION}), not by calibration")
    elif trained:
        console.print(
            "[yellow]no int8, though it was trained: --calibrate has frames to judge it[/]"
        )
    if clip.source == "random weights":
        console.print("[yellow]random weights: this bundle is good for measuring speed only[/]")


def _write_encoders(clip: ClipModel, end_id: int | None, folder: Path) -> None:
    frames = torch.zeros(2, clip.image.height, clip.image.width, 3, dtype=torch.uint8)
    tokens = torch.zeros(2, clip.context_length, dtype=torch.int32)
    for encoder, example, name, file in (
        (ImageEncoder(clip), frames, "frames", IMAGE),
        (TextEncoder(clip, end_id), tokens, "tokens", TEXT),
    ):
        try:
            write_onnx(encoder, example, name, folder / file)
        except OSError:  # the disk, not the model
            raise
        except Exception as error:  # PyTorch's, onnx's and protobuf's errors share no base
            raise DataError(f"{clip.name} cannot be exported: {error}") from error


def compare(clip: ClipModel, tokenizer: Tokenizer, folder: Path) -> list[Parity]:
    """Parity of both encoder files with open_clip's own model, at each batch size."""
    frames = probe_frames(clip.image.height, clip.image.width)
    tokens = tokenizer(PROBES)

    @torch.inference_mode()
    def image(batch: NDArray[Any]) -> Floats:
        pixels = normalise(torch.from_numpy(batch), clip.image)
        return np.asarray(clip.model.encode_image(pixels, normalize=True).numpy())

    @torch.inference_mode()
    def text(batch: NDArray[Any]) -> Floats:
        ids = torch.from_numpy(batch).long()
        return np.asarray(clip.model.encode_text(ids, normalize=True).numpy())

    clip.model.eval()
    dim = int(clip.config["embed_dim"])
    image_file = OrtEncoder(folder / IMAGE, Border("frames", frames.shape[1:], dim))
    rows = parity.measure("image", image, image_file, frames, BATCHES)
    text_file = OrtEncoder(folder / TEXT, Border("tokens", tokens.shape[1:], dim))
    return rows + parity.measure("text", text, text_file, tokens, BATCHES)


def probe_frames(height: int, width: int) -> NDArray[np.uint8]:
    """Eight frames, uint8 [8, H, W, 3]: noise from fine to coarse, black and white."""
    rng = np.random.default_rng(0)
    frames = np.zeros((8, height, width, 3), dtype=np.uint8)
    frames[1] = 255
    for row, cell in enumerate((1, 2, 4, 8, 16, 32), start=2):
        noise = rng.integers(0, 256, (-(-height // cell), -(-width // cell), 3), dtype=np.uint8)
        frames[row] = noise.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    return frames


def _write_prompts(options: ExportOptions, made: Manifest, folder: Path) -> dict[str, str]:
    """Writes the default prompt bank as the runtime itself computes it, from the files so far."""
    if options.labels is None:
        return {}
    manifest.write(folder, made)
    classifier = _classifier(folder)
    classifier.set_labels(options.labels)
    name = "prompts/default.safetensors"
    (folder / "prompts").mkdir()
    save_bank(classifier.require_bank(), folder / name)
    return {"default": name}


def _classifier(folder: Path) -> Classifier:
    return Classifier(Bundle(folder), backend="onnxruntime", precision="fp32")


def _write_judged(
    others: Made, texts: MadeTexts, made: Manifest, folder: Path, options: ExportOptions
) -> tuple[Manifest, list[str]]:
    """Writes what was accepted beside fp32; returns the manifest with it, and what was refused."""
    allow = options.precisions.allow_rejected
    images, refused = write_precisions(others, folder, allow)
    text, refused_texts = write_text_precisions(texts, folder, allow)
    made = msgspec.structs.replace(made, precisions=made.precisions | images, text_precisions=text)
    _write_confidence(others, made, folder)
    return made, refused + refused_texts


def _refusal(refused: Sequence[str], options: ExportOptions) -> str:
    what = "is marked as rejected in" if options.precisions.allow_rejected else "is not in"
    return (
        f"{'; '.join(refused)}. It {what} {options.bundle}. More frames, or frames more like "
        "those of the camera (--calibrate), may help, and for the text encoder more labels or "
        "captions; so do looser limits, or --allow-rejected to study the file"
    )


def _write_confidence(others: Made, made: Manifest, folder: Path) -> None:
    """Puts into the default prompt bank what was fitted to frames."""
    if not others.confidence:
        return
    file = folder / made.prompts["default"]
    encoder = describe(folder / TEXT).sha256
    bank = load_bank(file, encoder, made.model.embedding_dim)
    fitted = {
        name: Fitted(head=found.head, threshold=found.limit.threshold, measure=found.limit.measure)
        for name, found in others.confidence.items()
        if name in made.precisions
    }
    save_bank(dataclasses.replace(bank, fitted=fitted), file)


def _model(clip: ClipModel) -> Model:
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return Model(
        name=clip.name,
        source=clip.source,
        weights_sha256=digest.hexdigest(),
        embedding_dim=int(clip.config["embed_dim"]),
    )


def _figures(rows: Sequence[Parity]) -> dict[str, float]:
    worst = min(row.cosine_min for row in rows if row.encoder == "image")
    return {"parity_cosine_min": worst}


def _files(folder: Path) -> dict[str, manifest.FileEntry]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != manifest.NAME)
    return {p.relative_to(folder).as_posix(): describe(p) for p in paths}
