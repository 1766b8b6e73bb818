"""The classifier: a bundle's encoders and one prompt bank, ready for frames."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .backends import Encoder
from .bank_file import load_bank
from .bundle import Bundle
from .errors import (
    BackendUnavailable,
    BundleError,
    DataError,
    FrameError,
    MissingFile,
    UnsupportedFormat,
)
from .frames import Box, Color, Colors, Frame
from .head import predictions
from .label_sets import Entry, Labels, parse_label, parse_labels
from .opening import open_image, open_text, text_file
from .prediction import Prediction
from .preprocess import preprocess, preprocess_regions
from .prompts import Embeddings, PromptBank, build_bank, with_label, without_label
from .text_cache import TextCache, maker_of
from .tokenizer import Tokenizer

Source = Frame | str | Path
TEXT_BATCH = 64


class Classifier:
    """Classifies frames with the bundle in a folder; use `runtime.load` to make one.

    Thread-safe: frames may be classified from several threads while labels change.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = "auto",
        precision: str = "auto",
        text_precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        self.bundle = bundle
        self._text_file = text_file(bundle, text_precision)
        opened = open_image(bundle, backend, precision, threads)
        self.backend, self.precision = opened.backend, opened.precision
        self._auto = backend == "auto"
        self.notes = opened.notes
        """What `auto` measured and took, and why it took nothing else."""
        self._chosen = f" ({opened.chosen})" if opened.chosen else ""
        self.text_precision = text_precision
        self.threads = threads
        self.threshold: float | None = None
        """The score below which a frame is `unknown`; None: as it was fitted with the labels."""
        self.bank: PromptBank | None = None
        self._image = opened.encoder
        self._text: tuple[Tokenizer, Encoder] | None = None
        self._text_lock = threading.Lock()
        self.text_cache: TextCache | None = None
        """Where embeddings of texts are kept, and looked up before the text encoder is opened."""
        self._bank_lock = threading.Lock()  # of those who change the labels; frames never wait

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that frames are classified into; empty before any were set."""
        return self.bank.labels if self.bank else ()

    def classify(self, frame: Source, color: Color = "bgr", roi: Box | None = None) -> Prediction:
        """Classifies one frame: uint8 [H, W, 3] BGR (see `color`), or the path of a picture; or of
        it the part `roi` = (x, y, width, height) in pixels, as if that were the whole frame.

        Raises FrameError for a bad frame or part, DataError where there are no labels.
        """
        return self.classify_batch([frame], color, roi)[0]

    def classify_batch(
        self, frames: Sequence[Source], color: Colors = "bgr", roi: Box | None = None
    ) -> list[Prediction]:
        """Classifies frames, also of different sizes, in one run of the encoder; with `roi` the
        same part of each. `color` is of all frames, or a list with that of each."""
        if isinstance(frames, str | Path):
            raise FrameError(f"classify_batch takes a list of frames, not the one path {frames}")
        return self._predictions(lambda: self._pixels(frames, color, roi))

    def classify_regions(
        self, frame: Source, regions: Sequence[Box], color: Color = "bgr"
    ) -> list[Prediction]:
        """Classifies parts (x, y, width, height) of one frame, such as a detector found, in one run
        of the encoder; nothing where there are none. Raises as `classify`."""
        if not len(regions):
            return []
        spec = self.bundle.manifest.image
        return self._predictions(lambda: preprocess_regions(frame, regions, spec, color))

    def _predictions(self, pixels: Callable[[], Frame]) -> list[Prediction]:
        """What frames are taken for, from what makes the encoder's input; with its timings."""
        bank = self.require_bank()
        start = time.perf_counter()
        batch = pixels()
        ready = time.perf_counter()
        embeddings = self._image(batch)
        encoded = time.perf_counter()
        timings = {"preprocess": (ready - start) * 1e3, "encode": (encoded - ready) * 1e3}
        found = predictions(
            embeddings @ bank.rows.T,
            bank,
            self.bundle.manifest.head,
            precision=self.precision,
            threshold=self.threshold,
            timings=timings,
            backend=self.backend,
        )
        timings["head"] = (time.perf_counter() - encoded) * 1e3
        return found

    def embed(
        self, frame: Source, color: Color = "bgr", roi: Box | None = None
    ) -> NDArray[np.float32]:
        """The unit embedding of a frame, or of a part of it as in `classify`: float32 [D]."""
        embedding: NDArray[np.float32] = self._image(self._pixels([frame], color, roi))[0]
        return embedding

    def gpu_stages(self, frame: Source, color: Color = "bgr") -> dict[str, float]:
        """The GPU's own milliseconds for one frame: upload, engine, download. Empty where the
        backend does not tell: only `tensorrt` does."""
        timed = getattr(self._image, "timed", None)
        return dict(timed(self._pixels([frame], color))) if timed else {}

    def open_text(self) -> None:
        """Opens the text encoder now, and not when a text is embedded first."""
        self._text_encoder()

    def embed_text(self, texts: Sequence[str]) -> Embeddings:
        """The unit embeddings of texts, float32 [N, D]. Raises DataError for what is no text."""
        if isinstance(texts, str):
            raise DataError(f"embed_text takes a list of texts, not the one text {texts!r}")
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"texts are embedded, not {text!r}")
        if self.text_cache is None:
            return self._embed_text(texts)
        made = self.bundle.manifest
        made_by = maker_of(made, self._text_file, self.backend)
        rows = self.text_cache.embed(texts, made_by, made.model.embedding_dim, self._embed_text)
        self._note(self.text_cache.problem)
        return rows

    def set_labels(self, labels: Labels, templates: Sequence[str] | None = None) -> None:
        """Classifies the next frames into `labels`: a list, a mapping to synonyms, or with negative
        prompts, groups and background in one of the forms of `runtime.label_sets`.

        Each name is put into each template (default: the label set's, else the bundle's own).
        Frames that are being classified keep the labels that they began with. Raises DataError.
        """
        manifest, label_set = self.bundle.manifest, parse_labels(labels)
        if templates is not None and label_set.templates is not None:
            raise DataError(
                "the label set has templates of its own: give them there, or templates="
            )
        with self._bank_lock:
            self.bank = build_bank(
                label_set,
                manifest.text.templates if templates is None else templates,
                self.embed_text,
                manifest.files[self._text_file].sha256,
            )

    def add_label(
        self, label: str, synonyms: Entry | None = None, groups: Sequence[str] = ()
    ) -> None:
        """Classifies the next frames into one label more: only its own prompts are embedded.

        `synonyms` are a list, or an object with `synonyms`, `prompts` and `not` (see
        `runtime.label_sets`; default: the label itself), `groups` the names of the groups that it
        is in, coarse to fine. Heads and thresholds that were fitted to frames are dropped: they
        were fitted for the labels as they were. Raises DataError.
        """
        added = parse_label(label, synonyms, groups)
        with self._bank_lock:
            self.bank = with_label(self.require_bank(), added, self.embed_text)

    def remove_label(self, label: str) -> None:
        """Classifies the next frames without this label; what was fitted is dropped as by
        `add_label`. Raises DataError where there is no such label, or no other."""
        with self._bank_lock:
            self.bank = without_label(self.require_bank(), label)

    def use_prompts(self, name: str) -> None:
        """Classifies the next frames with a prompt bank that lies in the bundle, also one that was
        put there since this bundle was loaded. Raises BundleError."""
        try:
            bank = self._stored_bank(name)
        except MissingFile:  # it was replaced just now
            bank = self._stored_bank(name)
        with self._bank_lock:
            self.bank = bank

    def _stored_bank(self, name: str) -> PromptBank:
        made, bundle = self.bundle.manifest, Bundle(self.bundle.folder)
        if name not in bundle.manifest.prompts:
            have = ", ".join(bundle.manifest.prompts) or "none"
            raise BundleError(f"{bundle.folder} has no prompt bank {name!r}; it has: {have}")
        path = bundle.file(bundle.manifest.prompts[name])
        encoder = made.files[made.text_encoder].sha256
        return load_bank(path, encoder, made.model.embedding_dim)

    def require_bank(self) -> PromptBank:
        """The prompt bank in use. Raises DataError where there is none."""
        bank = self.bank
        if bank is None:
            raise DataError(
                f"{self.bundle.folder} has no prompt bank: "
                "pass labels= to runtime.load, or call set_labels"
            )
        return bank

    def _embed_text(self, texts: Sequence[str]) -> Embeddings:
        tokenizer, encoder = self._text_encoder()
        parts = [
            encoder(tokenizer(texts[start : start + TEXT_BATCH]))
            for start in range(0, len(texts), TEXT_BATCH)
        ]
        dim = self.bundle.manifest.model.embedding_dim
        return np.concatenate(parts) if parts else np.empty((0, dim), dtype=np.float32)

    def _note(self, note: str | None) -> None:
        with self._text_lock:
            if note and note not in self.notes:
                self.notes += (note,)

    def _pixels(self, frames: Sequence[Source], color: Colors, roi: Box | None = None) -> Frame:
        if not len(frames):
            raise FrameError("there is no frame to classify: the list is empty")
        # What is neither is said to be no channel order, as a single one is.
        colors = color if isinstance(color, list | tuple) else [color] * len(frames)
        if len(colors) != len(frames):
            raise FrameError(f"color has {len(colors)} channel orders for {len(frames)} frames")
        spec = self.bundle.manifest.image
        batch = np.empty((len(frames), spec.height, spec.width, 3), dtype=np.uint8)
        for frame, one, pixels in zip(frames, colors, batch, strict=True):
            preprocess(frame, spec, one, roi, out=pixels)
        return batch

    def _text_encoder(self) -> tuple[Tokenizer, Encoder]:
        with self._text_lock:
            if self._text is None:
                manifest = self.bundle.manifest
                content = self.bundle.file(manifest.tokenizer).read_bytes()
                tokenizer = Tokenizer(content, manifest.text)
                self._text = tokenizer, self._open_text()
            return self._text

    def _open_text(self) -> Encoder:
        """The text encoder on the backend of the image encoder; where that was found by `auto` and
        has none, or does not load it, on ONNX Runtime."""
        asked = self.bundle, self.backend, self.text_precision, self.threads
        try:
            return open_text(*asked)
        except (BackendUnavailable, UnsupportedFormat) as error:
            if not self._auto or self.backend == "onnxruntime":
                raise
            encoder = open_text(self.bundle, "onnxruntime", self.text_precision, self.threads)
            self.notes += (f"the text encoder runs on onnxruntime: {error}",)
            return encoder

    def __repr__(self) -> str:
        text = "" if self.text_precision == "fp32" else f"text {self.text_precision}, "
        return (
            f"Classifier({self.bundle.manifest.model.name!r}, {self.precision} on {self._image!r}"
            f"{self._chosen}, {text}{len(self.labels)} labels)"
        )
