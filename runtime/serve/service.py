"""What the server serves: one classifier, its cameras, and the answers about both, without HTTP."""

import asyncio
import contextlib
import io
import time
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ..classifier import Classifier
from ..errors import DataError, EdgeClipError, FrameError
from ..frames import read_picture
from ..label_sets import parse_labels
from ..prediction import Prediction
from .camera_loop import CameraLoop
from .hub import Hub
from .limits import LONGEST_NAME
from .metrics import Metrics
from .past import past_json
from .pictures import Pictures
from .pool import Pool
from .refusal import Refusal

if TYPE_CHECKING:
    from ..label_sets import Labels

MOST_SCANS = 100  # of a JPEG: each may cost as much time as the whole picture
MOST_TEXTS = 2000  # in a label set: each is run through the text encoder
SAMPLE = 0.5  # seconds for which a source's history is not looked up again


class Service:
    """Everything behind the server's addresses. `cameras` is None where there is no source;
    pictures that are sent have at most `max_pixels`, each of which takes some 6 bytes."""

    def __init__(
        self,
        classifier: Classifier,
        cameras: CameraLoop | None = None,
        max_pixels: int = 25_000_000,
    ) -> None:
        self.classifier, self.cameras, self._max_pixels = classifier, cameras, max_pixels
        self.hub = cameras.hub if cameras else Hub([])
        self.pictures, self.metrics = Pictures(), Metrics()
        # One at a time: a backend has threads of its own, and two fight for the cores.
        self.classifying = Pool("classifies", 1, 32)
        self.labelling = Pool("labels", 1, 4)
        self.reading = Pool("history", 1, 16)
        self.began = time.monotonic()
        self._state: tuple[int, str] = (-1, "")
        self._expecting: asyncio.Future[None] | None = None
        self._pasts: dict[int, tuple[float, dict[str, Any]]] = {}

    @property
    def problem(self) -> str | None:
        """Why the server is not well, or None."""
        return self.cameras.problem if self.cameras else None

    @property
    def unready(self) -> str | None:
        """Why the server does not do its work yet, or None."""
        if self.cameras is None or self.cameras.ready:
            return None
        return self.problem or "no source gives frames"

    def sources(self) -> list[dict[str, Any]]:
        """What became of each source's frames."""
        found = self.cameras.stats() if self.cameras else []
        return [msgspec.to_builtins(stats) for stats in found]

    def state_json(self, events: list[dict[str, Any]], pictures: list[int]) -> str:
        """A message of `/live`. What is alike for all clients is written once for a version."""
        version, text = self._state
        if version != self.hub.news.version:
            version = self.hub.news.version
            shown = {"sources": self._rows(), "labels": self.classifier.labels}
            text = msgspec.json.encode(shown).decode()[1:-1]
            self._state = version, text
        own = msgspec.json.encode({"events": events, "pictures": pictures}).decode()
        return f"{{{text},{own[1:]}"

    def history(self, index: int) -> dict[str, Any]:
        """The spans and curves of a source; see `past.past_json`."""
        at, found = self._pasts.get(index, (0.0, {}))
        if self.cameras and (not found or time.monotonic() - at > SAMPLE):
            source = self.hub.sources[index]
            past = self.cameras.watch.history.sources.get(source.source)
            found = past_json(past, dict(source.began), self.classifier.labels)
            self._pasts[index] = time.monotonic(), found
        return found

    def classify(self, content: bytes, top: int) -> dict[str, Any]:
        """What a picture file's content shows. Raises FrameError."""
        start = time.perf_counter()
        frame = read_picture(_checked(content), max_pixels=self._max_pixels)
        decoded = time.perf_counter()
        found = self.classifier.classify(frame, "rgb")
        return _shown(found, top, (decoded - start) * 1e3)

    def labels(self) -> dict[str, Any]:
        """The labels, and the set that they are from where that is known."""
        bank = self.classifier.require_bank()
        given = bank.label_set.as_given() if bank.label_set else None
        return {"labels": bank.labels, "set": given}

    def expect_labels(self) -> None:
        """Has the text encoder opened, which may take seconds, before other labels come: somebody
        has opened the page. What fails now fails again, and is told, when they do."""
        if not self._expecting:
            self._expecting = asyncio.ensure_future(self._open_text())

    async def _open_text(self) -> None:
        with contextlib.suppress(EdgeClipError, OSError, Refusal):
            await self.labelling.run(self.classifier.open_text)

    def set_labels(self, given: "Labels") -> dict[str, Any]:
        """Classifies into other labels from the next frame on. Raises DataError."""
        label_set = parse_labels(given)
        templates = label_set.templates or self.classifier.bundle.manifest.text.templates
        names = sum(len(label.synonyms) for label in label_set.labels) + len(label_set.others)
        texts = names * len(templates) + sum(len(label.prompts) for label in label_set.labels)
        if texts > MOST_TEXTS:
            raise DataError(
                f"these labels make {texts} texts with {len(templates)} templates; "
                f"this server embeds at most {MOST_TEXTS}: make a prompt bank with edgeclip prompts"
            )
        for name in label_set.names:
            if len(name) > LONGEST_NAME:
                raise DataError(
                    f"the label {name[:20]!r}... has {len(name)} letters, at most {LONGEST_NAME} "
                    "are taken: give what is longer as its prompts"
                )
        self.classifier.set_labels(label_set)
        self.hub.news.tell()
        return self.labels()

    def info(self) -> dict[str, Any]:
        """What runs here."""
        from importlib.metadata import version

        clf = self.classifier
        return {
            "bundle": clf.bundle.folder.name,
            "model": clf.bundle.manifest.model.name,
            "backend": clf.backend,
            "precision": clf.precision,
            "labels": len(clf.labels),
            "version": version("edgeclip"),
            "uptime_s": round(time.monotonic() - self.began, 1),
            "sources": [source.source for source in self.hub.sources],
        }

    def close(self) -> None:
        """Lets go of the threads. What is under way is waited for."""
        self.pictures.close()
        for pool in (self.classifying, self.labelling, self.reading):
            pool.close()

    def _rows(self) -> list[dict[str, Any]]:
        rows = [source.row() for source in self.hub.sources]
        for row, stats in zip(rows, self.cameras.stats() if self.cameras else (), strict=True):
            row["fps"], row["p50_ms"] = round(stats.fps, 1), round(stats.p50_ms, 1)
        return rows


class _Body(io.BytesIO):
    """A request's body, as errors name it."""

    def __str__(self) -> str:
        return "the body"


def _checked(content: bytes) -> _Body:
    """Raises FrameError for what is no picture, or one that takes hours to decode."""
    if not content:
        raise FrameError("the body is empty: send the bytes of a picture file")
    if content[:2] == b"\xff\xd8" and (scans := content.count(b"\xff\xda")) > MOST_SCANS:
        raise FrameError(f"the JPEG has {scans} scans; at most {MOST_SCANS} are decoded")
    return _Body(content)


def _shown(found: Prediction, top: int, decode_ms: float) -> dict[str, Any]:
    timings = {"decode": decode_ms, **cast(dict[str, float], found.timings)}
    return {
        "label": found.label,
        "score": round(found.score, 6),
        "cosine": round(found.cosine, 6),
        "unknown": found.unknown,
        "path": found.path,
        "background": found.background,
        "top": [[label, round(score, 6)] for label, score in found.top(top)],
        "ms": {stage: round(ms, 3) for stage, ms in timings.items()},
    }
