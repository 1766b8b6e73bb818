"""A frame as it was grabbed, and the names of what becomes of a source and its frames."""

from dataclasses import dataclass
from typing import Literal

from .frames import Color, Frame

State = Literal["connecting", "live", "stalled", "lost", "ended", "closed"]


@dataclass(frozen=True, eq=False)
class Grabbed:
    """One frame: uint8 in the channel order `color`, the `number`-th that the source gave (from
    0, with those that were dropped). `time` is its place in a file in seconds, or of a live source
    the seconds since `began`; `time_captured` is of `time.monotonic`, `wall` of `time.time`."""

    frame: Frame
    color: Color
    number: int
    time: float
    time_captured: float
    wall: float
    source: str


@dataclass
class Counters:
    """What became of frames: of those `seen` some were passed over for `fps` (`thinned`), could
    not be decoded (`broken`), or were replaced by newer ones or too old before they were taken
    (`dropped`); the others were `taken`, but for one that may be decoded and one that may wait, of
    which none are left when the source was closed."""

    seen: int = 0
    thinned: int = 0
    broken: int = 0
    dropped: int = 0
    taken: int = 0
    reconnects: int = 0
    hangs: int = 0
