"""Faults of cameras, one after the other as a seeded script has them, each mended after a while."""

import heapq
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mjpeg_camera import SIZES, Camera

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from rtsp_server import RtspServer

Act = Callable[[], None]
GRACE = 1.5  # seconds after which a camera's new rate can be relied upon


class Faults(threading.Thread):
    """Plays the faults until `stop`: a line tells each. `slow` is called with the seconds that the
    model is to take longer. No camera has two faults at once; the first has none at all."""

    def __init__(
        self, cameras: dict[str, Camera], rtsp: dict[str, RtspServer], slow: Callable[[float], None]
    ) -> None:
        super().__init__(name="faults")
        self.count = 0
        self.error: Exception | None = None
        self._cameras, self._rtsp, self._slow = cameras, rtsp, slow
        self._rng = random.Random(7)
        self._over = threading.Event()
        self._rates: dict[str, tuple[float, float]] = {}

    def apart(self, name: str) -> float:
        """Seconds between two frames of a camera, the longest of lately."""
        until, fps = self._rates.get(name, (0.0, 1e9))
        own = self._cameras[name].fps if name in self._cameras else 25.0
        return 1 / (min(own, fps) if time.monotonic() < until else own)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        try:
            self._play()
        except Exception as error:  # it is told where the result is
            self.error = error

    def _play(self) -> None:
        begin = time.monotonic()
        faulty = [*list(self._cameras)[1:], *self._rtsp, "model"]
        mends: list[tuple[float, int, str, Act]] = []
        following = begin + 3
        while not self._over.wait(max(0.0, min([following, *(m[0] for m in mends[:1])])
                                      - time.monotonic())):  # fmt: skip
            if mends and mends[0][0] <= time.monotonic():
                _, _, name, mend = heapq.heappop(mends)
                mend()
                faulty.append(name)
                continue
            following = time.monotonic() + self._rng.uniform(0.5, 3)
            if not faulty:
                continue
            name = faulty.pop(self._rng.randrange(len(faulty)))
            seconds = self._rng.uniform(1, 9)
            what, act, mend = self._rng.choice(self._kinds(name))
            self.count += 1
            print(f"{time.monotonic() - begin:7.1f} s  {name}: {what} for {seconds:.1f} s",
                  flush=True)  # fmt: skip
            act()
            heapq.heappush(mends, (time.monotonic() + seconds, self.count, name, mend))
        for _, _, _, mend in mends:
            mend()

    def _kinds(self, name: str) -> list[tuple[str, Act, Act]]:
        """What may befall a camera, or the model: its name, what does it, and what mends it."""
        if name == "model":
            slow = self._slow
            return [
                ("60 ms slower", lambda: slow(0.06), lambda: slow(0)),
                ("200 ms slower", lambda: slow(0.2), lambda: slow(0)),
            ]
        if server := self._rtsp.get(name):
            return [
                ("killed", server.kill, server.start),
                ("frozen", lambda: server.freeze(True), lambda: server.freeze(False)),
            ]
        return self._of_camera(name, self._cameras[name])

    def _of_camera(self, name: str, camera: Camera) -> list[tuple[str, Act, Act]]:
        def tell(**manners: float) -> Act:
            def act() -> None:
                self._rates[name] = time.monotonic() + GRACE, camera.fps
                camera.tell(**manners)

            return act

        usual = camera.usual
        return [
            ("killed", camera.kill, camera.start),
            ("frozen", lambda: camera.freeze(True), lambda: camera.freeze(False)),
            ("silent", tell(silent=1), tell(silent=0)),
            ("stutters", tell(stutter=0.2), tell(stutter=0)),
            ("some pictures broken", tell(broken=0.3), tell(broken=0)),
            ("all pictures broken", tell(broken=1), tell(broken=0)),
            ("another size", tell(size=self._rng.randrange(1, len(SIZES))), tell(size=0)),
            ("2 frames/s", tell(fps=2), tell(fps=usual)),
            ("60 frames/s", tell(fps=60), tell(fps=usual)),
        ]
