"""What `edgeclip serve` costs, and whether hostile clients slow its cameras.

    python benchmarks/serve.py BUNDLE [--rounds 300] [--seconds 5]

First POST /classify against `classify` of the same picture's file in this process, both in turn,
and 200 requests of 8 clients at once. Then two cameras of 15 frames a second (MJPEG, each in a
process of its own), and how many of their frames are classified while clients do their worst.
"""

import argparse
import http.client
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from websockets.sync.client import connect

import runtime

FPS, CAMERAS = 15, 2
ROOT = Path(__file__).parent.parent
CAMERA = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from mjpeg_server import MjpegServer, steady
with MjpegServer(lambda n: steady({FPS}, (640, 480))) as camera:
    print(camera.url, flush=True)
    sys.stdin.read()
"""


def picture(size: tuple[int, int] = (640, 480)) -> bytes:
    """A JPEG of that size with as much in it as a photo."""
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3)).save(content, "JPEG", quality=90)
    return content.getvalue()


class Server:
    """`edgeclip serve` in a process of its own."""

    def __init__(self, bundle: Path, *arguments: str) -> None:
        command = [sys.executable, "-c", "from export.cli import main; main()", "serve",
                   str(bundle), "--port", "0", *arguments]  # fmt: skip
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self._process.stderr is not None
        self.lines: list[str] = []
        self.port = 0
        for line in self._process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise SystemExit("".join(self.lines))
        self._reader = threading.Thread(target=self.lines.extend, args=(self._process.stderr,))
        self._reader.start()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def classified(self) -> tuple[float, list[int]]:
        """When, and how many frames each camera has had classified."""
        connection = self.connection()
        for _ in range(50):  # it may be busy sending others away
            try:
                connection.request("GET", "/sources")
                response = connection.getresponse()
                found = json.loads(response.read())
                if response.status == 200:
                    return time.monotonic(), [source["classified"] for source in found]
            except OSError:
                pass
            connection.close()
            time.sleep(0.05)
        raise SystemExit("the server does not answer any more")

    def end(self) -> None:
        self._process.terminate()
        print(f"the server ended with code {self._process.wait(30)}")
        self._reader.join()


def compare(server: Server, bundle: Path, content: bytes, rounds: int) -> None:
    """Prints how much longer a request takes than a call."""
    classifier = runtime.load(bundle, backend="onnxruntime", precision="fp32")
    connection = server.connection()
    called: list[float] = []
    asked: list[float] = []
    label = ["", ""]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.jpg"
        path.write_bytes(content)

        def call() -> float:
            start = time.perf_counter()
            label[0] = classifier.classify(path).label
            return (time.perf_counter() - start) * 1e3

        def ask() -> float:
            start = time.perf_counter()
            connection.request("POST", "/classify", content, {"Content-Type": "image/jpeg"})
            label[1] = json.loads(connection.getresponse().read())["label"]
            return (time.perf_counter() - start) * 1e3

        for n in range(rounds + 20):
            first = call() if n % 2 else None  # in turn: who comes first finds the caches cold
            asked.append(ask())
            called.append(call() if first is None else first)
            assert label[0] == label[1], label
    called, asked = called[20:], asked[20:]
    for name, times in (("classify()", called), ("POST /classify", asked)):
        p50, p90, p99 = np.percentile(times, (50, 90, 99))
        print(f"{name:15} p50 {p50:6.2f}  p90 {p90:6.2f}  p99 {p99:6.2f} ms")
    more = statistics.median(asked) - statistics.median(called)
    print(f"a request takes {more:.2f} ms more than a call (p50)")


def crowd(server: Server, content: bytes) -> None:
    """Prints what became of 200 requests of 8 clients at once."""

    def client(_: int) -> list[int]:
        connection, statuses = server.connection(), []
        for _ in range(25):
            connection.request("POST", "/classify", content)
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
        return statuses

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as clients:
        statuses = [status for found in clients.map(client, range(8)) for status in found]
    seconds = time.perf_counter() - start
    print(f"8 clients at once: {statuses.count(200)} of {len(statuses)} answered with 200, "
          f"{len(statuses) / seconds:.0f} a second")  # fmt: skip


@contextmanager
def cameras() -> Iterator[list[str]]:
    """The addresses of cameras, each in a process of its own."""
    processes = [
        subprocess.Popen([sys.executable, "-c", CAMERA], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for _ in range(CAMERAS)
    ]  # fmt: skip
    try:
        yield [process.stdout.readline().strip() for process in processes if process.stdout]
    finally:
        for process in processes:
            process.communicate()


Attack = Callable[[Server, threading.Event], None]


def measure(server: Server, name: str, attack: Attack | None, seconds: float) -> float:
    """Prints and returns the frames a second that are classified meanwhile."""
    over = threading.Event()
    thread = threading.Thread(target=attack, args=(server, over)) if attack else None
    if thread:
        thread.start()
        time.sleep(0.5)
    began, before = server.classified()
    time.sleep(seconds)
    ended, after = server.classified()
    over.set()
    if thread:
        thread.join()
    rates = [(b - a) / (ended - began) for a, b in zip(before, after, strict=True)]
    shown = " ".join(f"{rate:5.1f}" for rate in rates)
    print(f"{name:44} {shown} frames/s  {sum(rates) / (FPS * CAMERAS):5.0%}", flush=True)
    return sum(rates)


def raw(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


HEAD = b"POST /classify HTTP/1.1\r\nHost: localhost\r\n"


def endless(server: Server, over: threading.Event) -> None:
    """Bodies without an end, one after the other."""
    while not over.is_set():
        with raw(server) as connection:
            try:
                connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
                while not over.is_set():
                    connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
            except OSError:
                pass


def slow_senders(server: Server, over: threading.Event) -> None:
    """Fifty that send a byte now and then, of heads and of bodies."""
    opened = [raw(server) for _ in range(50)]
    for connection in opened[:25]:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
    while not over.wait(0.5):
        for connection in opened:
            try:
                connection.sendall(b"x")
            except OSError:
                pass
    for connection in opened:
        connection.close()


def thousand(server: Server, over: threading.Event) -> None:
    """A thousand connections, again and again."""
    while not over.is_set():
        opened = []
        for _ in range(1000):
            try:
                opened.append(raw(server))
            except OSError:
                pass
        over.wait(0.5)
        for connection in opened:
            connection.close()


def pictures(server: Server, over: threading.Event) -> None:
    """Bad pictures, from four clients."""
    bad = [b"", b"GIF89a" + bytes(1000), picture()[:-5000], b"\x89PNG\r\n\x1a\n" + bytes(100)]
    data = ROOT.parent / "shared" / "data" / "badimages" / "files"
    bad += [path.read_bytes() for path in sorted(data.glob("*"))]

    def client(number: int) -> None:
        connection = server.connection()
        while not over.is_set():
            for content in bad[number::4]:
                try:
                    connection.request("POST", "/classify", content)
                    connection.getresponse().read()
                except (OSError, http.client.HTTPException):
                    connection.close()
                time.sleep(0.02)

    with ThreadPoolExecutor(4) as clients:
        list(clients.map(client, range(4)))


def deaf(server: Server, over: threading.Event) -> None:
    """Eight watchers that ask for the largest pictures and read none."""
    ask = json.dumps({"next": list(range(CAMERAS)), "width": 1920})

    def watch(_: int) -> None:
        address = f"ws://127.0.0.1:{server.port}/live"
        with connect(address, max_queue=1, close_timeout=0.1) as watcher:
            while not over.wait(0.05):
                watcher.send(ask)

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(watch, range(8)))


def watchers(server: Server, over: threading.Event) -> None:
    """Two browsers."""

    def watch(_: int) -> None:
        with connect(f"ws://127.0.0.1:{server.port}/live") as watcher:
            while not over.is_set():
                watcher.send(json.dumps({"next": list(range(CAMERAS)), "width": 640}))
                for _ in json.loads(watcher.recv())["pictures"]:
                    watcher.recv()

    with ThreadPoolExecutor(2) as clients:
        list(clients.map(watch, range(2)))


def hammer(server: Server, over: threading.Event) -> None:
    """Eight clients that classify as fast as they may, and more."""

    def client(_: int) -> None:
        connection, content = server.connection(), picture()
        while not over.is_set():
            connection.request("POST", "/classify", content)
            connection.getresponse().read()

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(client, range(8)))


def junk(server: Server, over: threading.Event) -> None:
    """What is no HTTP, wrong addresses and methods, as fast as they go."""
    tries = [b"\x16\x03\x01\x02\x00" * 20, b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
             b"GET /" + b"a" * 60_000, b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n"]  # fmt: skip
    while not over.is_set():
        for content in tries:
            try:
                with raw(server) as connection:
                    connection.sendall(content)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1000)
            except OSError:
                pass


ATTACKS: dict[str, Attack | None] = {
    "quiet": None,
    "two browsers watch": watchers,
    "8 watchers that read nothing": deaf,
    "endless bodies": endless,
    "50 slow senders": slow_senders,
    "1,000 connections, again and again": thousand,
    "bad pictures": pictures,
    "junk, as fast as it goes": junk,
    "8 clients classify without a pause": hammer,
    "quiet again": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    fixed = "--backend", "onnxruntime", "--precision", "fp32"
    content = picture()
    print(f"a JPEG of 640 x 480 with {len(content) / 1024:.0f} KiB")
    server = Server(options.bundle, "--rate", "0", *fixed)
    compare(server, options.bundle, content, options.rounds)
    server.end()
    server = Server(options.bundle, *fixed)
    crowd(server, content)
    server.end()
    with cameras() as urls:
        given = [argument for url in urls for argument in ("--source", url)]
        server = Server(options.bundle, *given, *fixed)
        time.sleep(3)
        rates = {n: measure(server, n, a, options.seconds) for n, a in ATTACKS.items()}
        server.end()
    base = max(rates["quiet"], rates["quiet again"])
    worst = min(rates, key=lambda name: rates[name])
    print(f"the least: {rates[worst] / base:.0%} of the quiet rate ({worst})")
    refused = [line for line in server.lines if "refused" in line]
    print(f"{len(refused)} lines of the log are of refusals, such as:")
    print("".join(dict((line.split(":")[2], line) for line in refused).values()))


if __name__ == "__main__":
    main()
