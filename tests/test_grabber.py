"""What a grabber does when its source is lost, hangs, breaks, or comes too fast."""

import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
from fake_capture import CAMERA, FILE, Fake, Fakes, taken, until

from runtime import grabber as grabber_module
from runtime.errors import BackendUnavailable, FrameError
from runtime.frames import Frame
from runtime.grabber import Grabber
from runtime.pace import Pace


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grabber_module, "FIRST_PAUSE", 0.02)


def test_a_camera_that_is_lost_is_opened_again() -> None:
    fakes = Fakes(FrameError("no"), Fake(2, fps=20), FrameError("no"), Fake(2, fps=20))
    grabber = Grabber(CAMERA, opens=fakes)
    assert [g.number for g in taken(grabber, 4)] == [0, 1, 2, 3]
    until(lambda: grabber.state == "lost" and grabber.reason == "it is unplugged")
    assert grabber.counters.reconnects >= 4 and fakes.opened >= 5
    grabber.close()
    assert grabber.state == "closed" and grabber.take(0.1) is None


def test_a_driver_that_raises_anything_ends_nothing() -> None:
    grabber = Grabber(CAMERA, opens=Fakes(RuntimeError("ioctl"), Fake(1)))
    assert taken(grabber, 1)
    grabber.close()


def test_a_camera_that_hangs_is_left_and_opened_again() -> None:
    hanging = Fake(1, hangs=True)
    grabber = Grabber(CAMERA, stall=0.1, opens=Fakes(hanging, Fake(fps=100)))
    numbers = [g.number for g in taken(grabber, 3)]
    assert numbers[0] == 0 and numbers == sorted(set(numbers)) and len(numbers) == 3
    assert (grabber.counters.hangs, grabber.state) == (1, "live")
    hanging.freed.set()
    until(lambda: hanging.closed)
    grabber.close()


class Slow(Fake):
    """Takes long to be closed, and fails at that."""

    def close(self) -> None:
        self.freed.wait(5)
        self.closed = True
        raise RuntimeError("ioctl")


def test_a_lost_camera_is_told_before_it_is_closed_and_opened_again_after_it() -> None:
    slow = Slow(1)
    fakes = Fakes(slow, Fake(fps=100))
    grabber = Grabber(CAMERA, opens=fakes)
    until(lambda: grabber.state == "lost")
    assert not slow.closed and fakes.opened == 1
    slow.freed.set()
    until(lambda: grabber.state == "live")
    assert slow.closed and grabber.counters.reconnects == 1
    grabber.close()


@dataclass
class Stuck(Fake):
    """Hangs in one of its methods until it is freed."""

    where: str = "close"

    def retrieve(self) -> Frame:
        if self.where == "retrieve":
            self.freed.wait()
        return super().retrieve()

    def close(self) -> None:
        if self.where == "close":
            self.freed.wait()
        super().close()


@pytest.mark.parametrize("where", ["retrieve", "close"])
def test_a_camera_that_hangs_as_it_decodes_or_closes_is_left_too(where: str) -> None:
    stuck = Stuck(3, where=where)
    grabber = Grabber(CAMERA, stall=0.1, opens=Fakes(stuck, Fake(fps=50)))
    until(lambda: grabber.state == "live" and grabber.counters.hangs == 1)
    stuck.freed.set()
    until(lambda: stuck.closed)
    assert grabber.counters.hangs == 1 and taken(grabber, 3)
    grabber.close()


class Raises(Fake):
    """Its second frame makes the driver raise something of its own."""

    def retrieve(self) -> Frame:
        if self.count == 2:
            raise MemoryError("no more")
        return super().retrieve()


def test_a_frame_of_which_the_driver_raises_anything_is_broken() -> None:
    grabber = Grabber(FILE, opens=Fakes(Raises(4, live=False)))
    assert [grabbed.number for grabbed in taken(grabber, 4)] == [0, 2, 3]
    assert (grabber.counters.seen, grabber.counters.broken) == (4, 1)
    grabber.close()


def test_frames_that_the_source_passed_over_are_dropped() -> None:
    grabber = Grabber(CAMERA, opens=Fakes(Fake(2, missed=3)))
    until(lambda: grabber.counters.reconnects >= 1)
    grabber.close()
    counters = grabber.counters
    assert counters.seen == 8 == counters.dropped + counters.taken


def test_no_more_than_a_few_threads_hang() -> None:
    before = threading.active_count()
    hanging = [Fake(0, hangs=True) for _ in range(20)]
    fakes = Fakes(*hanging)
    grabber = Grabber(CAMERA, stall=0.05, opens=fakes)
    until(lambda: grabber.state == "stalled" and "hang too" in grabber.reason)
    assert grabber.counters.hangs == 3
    assert threading.active_count() - before == 4 and fakes.opened == 4
    hanging[0].freed.set()
    until(lambda: grabber.state == "stalled" and fakes.opened == 5)
    for fake in hanging:
        fake.freed.set()
    grabber.close()
    until(lambda: threading.active_count() == before)


def test_many_broken_frames_in_a_row_open_the_camera_again() -> None:
    grabber = Grabber(CAMERA, opens=Fakes(Fake(broken=range(1000)), Fake(1)))
    assert taken(grabber, 1)[0].number == 100
    assert grabber.counters.broken == 100
    grabber.close()


def test_a_reason_can_be_written_as_json() -> None:
    grabber = Grabber(FILE, opens=Fakes(FrameError("caf\udce9.jpg is broken")))
    assert grabber.take(5) is None and grabber.reason == "caf?.jpg is broken"


def test_a_missing_reader_is_no_camera_to_wait_for() -> None:
    grabber = Grabber(CAMERA, opens=Fakes(BackendUnavailable("no GStreamer")))
    assert grabber.take(5) is None and grabber.state == "ended"
    assert isinstance(grabber.error, BackendUnavailable) and grabber.reason == "no GStreamer"


def test_a_file_waits_for_who_takes_its_frames() -> None:
    grabber = Grabber(FILE, opens=Fakes(Fake(5, fps=1000, live=False)))
    time.sleep(0.05)
    assert [g.number for g in taken(grabber, 9)] == [0, 1, 2, 3, 4]
    assert grabber.counters.dropped == 0


@pytest.mark.realtime
def test_a_file_in_real_time_drops_what_comes_too_late() -> None:
    grabber = Grabber(FILE, realtime=True, opens=Fakes(Fake(20, fps=50, live=False)))
    start = time.monotonic()
    found = []
    while grabbed := grabber.take(5):
        found.append(grabbed)
        assert abs(grabbed.time_captured - start - grabbed.time) < 0.1
        time.sleep(0.1)
    assert 0.35 < time.monotonic() - start < 0.9
    counters = grabber.counters
    assert 3 <= len(found) <= 6 and counters.dropped + len(found) == 20 == counters.seen


def test_closing_ends_a_reader_that_waits() -> None:
    grabber = Grabber(FILE, opens=Fakes(Fake(5, live=False)))
    until(lambda: grabber.has_news)
    grabber.close()
    assert not any("edgeclip reads" in t.name for t in threading.enumerate() if t.is_alive())


@pytest.mark.parametrize("native, limit, wanted", [(30, 10, 100), (25, 10, 100), (12.5, 20, 125)])
def test_frames_are_thinned_to_the_rate(native: float, limit: float, wanted: int) -> None:
    pace, rng = Pace(limit, paced=False), np.random.default_rng(0)
    times = np.arange(round(10 * native)) / native
    assert abs(sum(pace.wants(time) for time in times) - wanted) <= 1
    pace = Pace(limit, paced=False)
    shaken = np.sort(times + rng.uniform(-0.3, 0.3, len(times)) / native)
    assert abs(sum(pace.wants(time) for time in shaken) - wanted) <= wanted * 0.06
