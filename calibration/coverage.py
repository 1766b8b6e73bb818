"""What a set of frames covers: scenes, light, contrast, detail and labels, and what is missing."""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.frames import Frame

from .frame_set import FrameSet
from .likeness import BITS, Layout, distances, layout

BATCH = 32
USUAL = "100 to 500"
FEW = 100
FEW_SCENES = 10  # where there are five frames or more of each
# Of the 128 answers of two layouts half differ by chance; in at most a quarter, one scene.
SCENE = BITS // 4
DARK, BRIGHT = 40, 215  # mean luma
FLAT = 4  # standard deviation of luma: sensor noise alone
BLURRED = 0.005  # half of 300 photos have 0.47 and more; blurred by 2 pixels, 0.004
NAMED = 3  # labels in a note


class Spread(NamedTuple):
    """Percentiles over the frames: 5, 50 and 95."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Coverage:
    """What frames show.

    `scenes`: how many different views; frames are taken in order, and one whose layout (see
    `likeness`) differs from that of each scene's first frame in more than a quarter of the answers
    begins a new scene. `dark` and `bright`: shares of frames with a mean luma (ITU-R BT.601, 0 to
    255) under 40 and over 215. `flat`: how many frames show nothing. `luma`: of the frames' means;
    `contrast`: of their standard deviations of luma; `detail`: of the variance of their Laplacian,
    as a share of that of luma. `labels`: how many frames of each.
    """

    frames: int
    scenes: int
    dark: float
    bright: float
    flat: int
    luma: Spread
    contrast: Spread
    detail: Spread
    labels: dict[str, int]

    def notes(self) -> list[str]:
        """What may be wrong with the frames and what to do about it, in a sentence each."""
        return [*self._of_number(), *self._of_light(), *self._of_detail(), *self._of_labels()]

    def _of_number(self) -> Iterator[str]:
        if self.frames == 1:
            yield f"one frame is little: {USUAL} are usual"
        elif self.frames < FEW:
            yield f"{self.frames} frames are few: {USUAL} are usual"
        if self.frames > 2 and self.scenes <= max(2, min(self.frames // 5, FEW_SCENES)):
            scenes = "one scene" if self.scenes == 1 else f"{self.scenes} scenes"
            more = "record more places, if the camera will see more"
            yield f"all {self.frames} frames are of {scenes}: {more}"

    def _of_light(self) -> Iterator[str]:
        if not self.dark:
            yield f"no frame is darker than {DARK}: if the camera works at night, add night frames"
        if self.dark > 0.5:
            yield f"{self.dark:.0%} of the frames are darker than {DARK}: add frames by daylight"
        if self.bright > 0.25:
            yield f"{self.bright:.0%} of the frames are brighter than {BRIGHT}: check the exposure"

    def _of_detail(self) -> Iterator[str]:
        if self.flat:
            frames = "1 frame shows" if self.flat == 1 else f"{self.flat} frames show"
            yield f"{frames} one even colour: check that the camera is not covered"
        if self.detail.middle < BLURRED and 2 * self.flat < self.frames:
            yield (
                "half of the frames are blurred, or smaller than the model's input: check the "
                "focus, and the size of the pictures"
            )

    def _of_labels(self) -> Iterator[str]:
        none = [label for label, number in self.labels.items() if not number]
        if len(none) == 1:
            yield f"no frames of the label {none[0]!r}"
        elif none:
            more = f" and {len(none) - NAMED} more" if len(none) > NAMED else ""
            yield f"no frames of {len(none)} labels: {str(none[:NAMED])[1:-1]}{more}"


def coverage(frame_set: FrameSet, labels: Sequence[str] = ()) -> Coverage:
    """Looks at every frame of a set, a few at a time.

    `labels` are further ones that the frames should show; they count where the set has labels.
    """
    scenes = _Scenes()
    looks: list[_Look] = []
    for batch in frame_set.batches(BATCH):
        for frame in batch:
            scenes.add(frame)
            looks.append(_look(frame))
    means, spreads, details = (np.array(values) for values in zip(*looks, strict=True))
    return Coverage(
        frames=len(looks),
        scenes=len(scenes.firsts),
        dark=float((means < DARK).mean()),
        bright=float((means > BRIGHT).mean()),
        flat=int((spreads < FLAT).sum()),
        luma=_spread(means),
        contrast=_spread(spreads),
        detail=_spread(details),
        labels=_count(frame_set, labels),
    )


class _Look(NamedTuple):
    mean: float
    deviation: float
    detail: float


def _look(frame: Frame) -> _Look:
    luma = np.asarray(Image.fromarray(frame).convert("L"), dtype=np.float32)
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    variance = float(luma.var())
    detail = float((around - 4 * luma[1:-1, 1:-1]).var()) / variance if variance else 0.0
    return _Look(float(luma.mean()), variance**0.5, detail)


class _Scenes:
    """The layout of each scene's first frame."""

    def __init__(self) -> None:
        self.firsts: list[Layout] = []

    def add(self, frame: Frame) -> None:
        own = layout(frame)
        if not self.firsts or distances(np.stack(self.firsts), own).min() > SCENE:
            self.firsts.append(own)


def _spread(values: NDArray[np.float64]) -> Spread:
    return Spread(*(float(value) for value in np.percentile(values, (5, 50, 95))))


def _count(frame_set: FrameSet, labels: Sequence[str]) -> dict[str, int]:
    given = frame_set.labels()
    if given is None:
        return {}
    counts = collections.Counter(given)
    return {label: counts[label] for label in dict.fromkeys([*frame_set.classes, *labels])}
