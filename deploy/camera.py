"""Names what a camera sees: a JSON line for every frame, and always the newest one.

    python camera.py BUNDLE [SOURCE] [--labels "a cat,a dog"]

SOURCE is a camera's number (0), its device, an address (rtsp://...), or a GStreamer pipeline that
ends in `appsink`. A camera that is lost is opened again; one that hangs ends the script with code
1, for whoever started it to start it again.
"""

import argparse
import json
import sys
import threading
import time
from typing import Any

import cv2

import runtime

RETRY, HANGS = 2.0, 30.0  # seconds


class Newest:
    """The newest frame of a camera, read by a thread of its own: older ones are dropped."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._frame: Any = None
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def take(self) -> Any:
        """Waits for a frame that was not taken yet. Raises TimeoutError where none comes."""
        with self._news:
            if not self._news.wait_for(lambda: self._frame is not None, HANGS):
                raise TimeoutError(f"no frame came from {self._source} for {HANGS:g} s")
            frame, self._frame = self._frame, None
            return frame

    def _read(self) -> None:
        while True:
            camera = self._opened()
            while (read := camera.read())[0]:
                with self._news:
                    self._frame = read[1]
                    self._news.notify()
            camera.release()
            print(f"{self._source} gives no frames; opening it again", file=sys.stderr, flush=True)
            time.sleep(RETRY)

    def _opened(self) -> Any:
        if "!" in self._source:
            return cv2.VideoCapture(self._source, cv2.CAP_GSTREAMER)
        return cv2.VideoCapture(int(self._source) if self._source.isdigit() else self._source)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("source", nargs="?", default="0")
    parser.add_argument("--labels", help="a,b,c (default: those of the bundle)")
    parser.add_argument("--backend", default="auto", help="tensorrt: never anything else")
    parser.add_argument("--frames", type=int, help="end after so many")
    options = parser.parse_args(arguments)
    labels = options.labels.split(",") if options.labels else None
    try:
        classifier = runtime.load(options.bundle, labels, backend=options.backend)
        print(classifier, *classifier.notes, sep="\n", file=sys.stderr, flush=True)
        camera, count = Newest(options.source), 0
        while count != options.frames:
            print(_line(classifier.classify(camera.take())), flush=True)
            count += 1
    except (runtime.EdgeClipError, TimeoutError) as error:
        sys.exit(str(error))  # code 1


def _line(found: runtime.Prediction) -> str:
    shown = {"time": round(time.time(), 3), "label": found.label, "score": round(found.score, 4)}
    shown |= {"unknown": found.unknown, "ms": round(sum(found.timings.values()), 2)}
    return json.dumps(shown, ensure_ascii=False)


if __name__ == "__main__":
    main()
