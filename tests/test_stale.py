"""A frame that waited for too long, since its camera died, is dropped; and every one is counted."""

import time

import pytest
from fake_capture import CAMERA, Fake, Fakes

from runtime.grabber import Grabber
from runtime.pace import Rhythm


def until_seen(grabber: Grabber, count: int) -> None:
    limit = time.monotonic() + 5
    while grabber.counters.seen < count:
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_the_last_frame_of_a_camera_that_died_is_not_taken_late() -> None:
    grabber = Grabber(CAMERA, opens=Fakes(Fake(10, fps=50)))
    until_seen(grabber, 10)
    assert grabber.has_news
    time.sleep(0.15)
    assert grabber.take() is None and not grabber.has_news
    counters = grabber.counters
    assert (counters.seen, counters.dropped, counters.taken) == (10, 10, 0)
    grabber.close()


def test_a_frame_that_just_came_is_taken() -> None:
    hanging = Fake(10, fps=10, hangs=True)
    grabber = Grabber(CAMERA, opens=Fakes(hanging))
    until_seen(grabber, 10)
    grabbed = grabber.take(0.1)
    assert grabbed and grabbed.number == 9
    hanging.freed.set()
    grabber.close()


def test_when_it_was_closed_every_frame_is_accounted_for() -> None:
    for _ in range(20):
        grabber = Grabber(CAMERA, opens=Fakes(Fake(fps=1000)))
        grabber.take(1)
        until_seen(grabber, 5)
        grabber.close()
        counters = grabber.counters
        assert counters.seen == counters.taken + counters.dropped


@pytest.mark.parametrize(
    "gaps",
    [[0.1] * 8, [0.1, 0.1, 0.1, 3.0], [0.0, 0.0, 0.0, 1.0] * 4, [0.3] * 9 + [0.1] * 16],
)
def test_what_is_stale_depends_on_the_rate(gaps: list[float]) -> None:
    rhythm, now = Rhythm(), 100.0
    assert not rhythm.is_stale(0.0, now)
    for gap in [0.0, *gaps]:
        now += gap
        rhythm.came(now)
    assert not rhythm.is_stale(now, now + 0.19) and rhythm.is_stale(now, now + 0.21)
    rhythm.begin()
    rhythm.came(now)
    assert not rhythm.is_stale(now - 9, now)
