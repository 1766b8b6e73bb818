"""The page of `edgeclip serve` in a real browser, with a camera whose colour the tests set."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLORS, ROOT, square
from mjpeg_server import MjpegServer
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
pytest.importorskip("uvicorn", reason="needs edgeclip[serve]")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
CALM = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
expect = sync_api.expect
SHOWN = 5000  # ms within which the page shows what the server knows
Shown = Callable[..., Any]


class Camera(MjpegServer):
    """Shows noisy squares of one colour, 20 a second, to any number of viewers."""

    def __init__(self) -> None:
        self.color = "red"
        super().__init__(lambda connection: self._pictures())

    def _pictures(self) -> Iterator[bytes | float]:
        rng = np.random.default_rng(5)
        while True:
            yield picture(square(COLORS[self.color], rng))
            yield 0.05


def picture(rgb: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(rgb).save(content, "JPEG", quality=90)
    return content.getvalue()


class Served:
    """`edgeclip serve` in a process of its own; `url` is where it listens."""

    def __init__(self, bundle: Path, *more: object, port: int = 0) -> None:
        command = [sys.executable, "-c", "from export.cli import main; main()", "serve", bundle,
                   "--labels", ",".join(COLORS), "--precision", "fp32", "--backend", "onnxruntime",
                   "--dwell", 0.3, "--smooth", 0.2, "--port", port, *more]  # fmt: skip
        self._process = subprocess.Popen(
            [str(part) for part in command], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.said = ""
        self.url = self._address()
        self.port = int(self.url.rpartition(":")[2])

    def _address(self) -> str:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.said += line
            if found := re.search(r"serving on (http://\S+)", line):
                return found[1]
        raise AssertionError(self.said)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def set_labels(self, given: object) -> None:
        request = urllib.request.Request(
            f"{self.url}/labels", json.dumps(given).encode(), method="PUT",
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        urllib.request.urlopen(request, timeout=10).close()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=30)


@contextmanager
def served(bundle: Path, *more: object, port: int = 0) -> Iterator[Served]:
    server = Served(bundle, *more, port=port)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def camera() -> Iterator[Camera]:
    camera = Camera()
    with camera:
        yield camera


@pytest.fixture(scope="module")
def running(bundle: Path, camera: Camera) -> Iterator[Served]:
    """One server for all tests, with a camera that lives and one that does not."""
    with served(
        bundle, "--source", camera.url, "--source", "http://127.0.0.1:9/gone.mjpg"
    ) as server:
        yield server


@pytest.fixture
def server(running: Served, camera: Camera) -> Served:
    camera.color = "red"
    running.set_labels(list(COLORS))
    return running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CALM)
        yield browser
        browser.close()


@pytest.fixture
def shown(browser: Any) -> Iterator[Shown]:
    """Opens a page in a browser of its own. At the end none may have had an error: console
    messages, exceptions, and what its Content-Security-Policy forbids."""
    wrong: list[str] = []
    contexts = []

    def show(url: str, width: int = 1280, height: int = 800, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => "
            "console.error('CSP: ' + event.violatedDirective + ' ' + event.blockedURI))"
        )
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        return page

    show.wrong = wrong  # type: ignore[attr-defined]
    yield show
    for context in contexts:
        context.close()
    assert not wrong


def verdict(page: Any) -> Any:
    return page.locator("#verdict-label")


def test_it_shows_what_the_camera_shows(server: Served, camera: Camera, shown: Shown) -> None:
    page = shown(server.url)
    expect(verdict(page)).to_have_text("red", timeout=SHOWN)
    expect(page.locator("#state")).to_have_text("live")
    expect(page.locator("#link-text")).to_have_text("Connected")
    expect(page.locator("#bars li.active")).to_contain_text("red")
    expect(page.locator("#fps")).to_have_text(re.compile(r"^\d+\.\d$"))
    expect(page.locator("#age")).to_have_text(re.compile(r"^\d+(\.\d)? ms$"))
    assert page.locator("#bars .label").all_text_contents() == list(COLORS)
    red, green, _ = page.evaluate(
        "() => { const screen = document.getElementById('screen');"
        "const all = screen.getContext('2d').getImageData(0, 0, screen.width, screen.height).data;"
        "const most = [0, 0, 0]; all.forEach((value, n) => "
        "{ if (n % 4 < 3) most[n % 4] = Math.max(most[n % 4], value); }); return most; }"
    )
    assert red > 180 and green < 140
    camera.color = "blue"
    expect(verdict(page)).to_have_text("blue", timeout=SHOWN)
    began = page.locator("#events li.started").first
    expect(began).to_contain_text("blue", timeout=SHOWN)
    assert began.locator("img").evaluate("image => image.naturalWidth") > 8
    expect(page.locator("#timeline")).to_have_attribute("aria-label", re.compile("blue"))


def test_labels_changed_in_it_change_the_results(server: Served, shown: Shown) -> None:
    page, other = shown(server.url), shown(server.url, 390, 844)
    expect(verdict(page)).to_have_text("red", timeout=SHOWN)
    page.get_by_role("button", name="Clear").click()
    page.keyboard.type("a red square, a blue square\n")  # where the focus is now
    expect(verdict(page)).to_have_text("a red square", timeout=3000)
    expect(page.locator("#said")).to_have_text("2 labels in use")
    assert server.get("/labels")["labels"] == ["a red square", "a blue square"]
    expect(other.locator("#chips .name")).to_have_text(["a red square", "a blue square"])
    other.get_by_role("button", name="Remove a red square").click()
    other.get_by_role("button", name="Apply").click()
    expect(verdict(page)).to_have_text("a blue square", timeout=3000)
    expect(page.locator("#chips .name")).to_have_text(["a blue square"])


def test_pasted_lines_are_labels(server: Served, shown: Shown) -> None:
    page = shown(server.url)
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Add labels, with commas between them").evaluate(
        "(entry) => { const pasted = new DataTransfer();"
        "pasted.setData('text', 'a red square\\na blue square, red\\n\\n');"
        "entry.dispatchEvent(new ClipboardEvent('paste', {clipboardData: pasted})); }"
    )
    expect(page.locator("#chips .name")).to_have_text(["a red square", "a blue square", "red"])


def test_unknown_is_said_plainly(server: Served, shown: Shown) -> None:
    server.set_labels({"labels": ["blue"], "background": ["red"]})
    page = shown(server.url)
    expect(verdict(page)).to_have_text("unknown", timeout=SHOWN)
    expect(page.locator("#verdict-score")).to_have_text("")


def test_what_the_server_refuses_is_said_beside_the_labels(server: Served, shown: Shown) -> None:
    page = shown(server.url)
    said, text = page.locator("#said"), page.get_by_role("textbox", name="Labels as JSON")
    expect(page.locator("#chips .name")).to_have_text(list(COLORS), timeout=SHOWN)
    page.get_by_role("button", name="JSON").click()
    assert json.loads(text.input_value()) == server.get("/labels")["set"]
    for given, error in (
        ('{"labels": {"cat": {"prompt": ["a cat"]}}}', "no field 'prompt'"),
        ('{"labels": {"cat": ["a cat"], "cat": ["a dog"]}}', "more than once"),
        ("[red", "JSON"),
    ):
        text.fill(given)
        page.get_by_role("button", name="Apply").click()
        expect(said).to_contain_text(error)
        expect(said).to_have_class(re.compile("wrong"))
        assert text.input_value() == given
    assert server.get("/labels")["labels"] == list(COLORS)
    shown.wrong.clear()  # type: ignore[attr-defined] # the browser notes every answer of 4xx
    text.fill('{"labels": {"warm": {"labels": ["red"]}, "cold": {"labels": ["blue"]}}}')
    page.keyboard.press("Control+Enter")
    expect(said).to_have_text("2 labels in use")
    page.get_by_role("button", name="JSON").click()
    expect(page.locator("#chips .name")).to_have_text(["warm / red", "cold / blue"])


def test_long_forms_survive_the_chips(server: Served, shown: Shown) -> None:
    page = shown(server.url)
    given = {
        "labels": {"warm": {"labels": {"red": ["red", "crimson"]}}, "__proto__": ["blue"]},
        "background": ["nothing at all"],
        "templates": ["one {}"],
    }
    page.get_by_role("button", name="JSON").click()
    page.get_by_role("textbox", name="Labels as JSON").fill(json.dumps(given))
    page.get_by_role("button", name="JSON").click()
    entry = page.get_by_label("Add labels, with commas between them")
    entry.fill("7")
    entry.press("Enter")
    expect(page.locator("#said")).to_have_text("3 labels in use")
    assert server.get("/labels")["set"] == {**given, "labels": {**given["labels"], "7": ["7"]}}  # type: ignore[dict-item]


def test_a_label_is_text_and_never_runs(server: Served, shown: Shown) -> None:
    hostile = '<img src=x onerror="window.ran=1">'
    server.set_labels([hostile, "</script><script>window.ran=1</script>"])
    page = shown(server.url)
    expect(page.locator("#chips .name").first).to_have_text(hostile, timeout=SHOWN)
    expect(page.locator("#bars .label").first).to_have_text(hostile)
    expect(page.locator("#events .label").first).to_contain_text("window.ran", timeout=SHOWN)
    assert page.evaluate("() => window.ran") is None
    assert page.locator("main script, main img[onerror]").count() == 0


def test_a_source_is_chosen_by_keyboard_and_says_why_it_is_lost(
    server: Served, shown: Shown
) -> None:
    page = shown(server.url)
    tiles = page.locator("#tiles button")
    expect(tiles).to_have_count(2, timeout=SHOWN)
    expect(tiles.first).to_have_attribute("aria-pressed", "true")
    tiles.nth(1).focus()
    page.keyboard.press("Enter")
    expect(tiles.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#notice")).to_be_visible()
    reason = server.get("/sources")[1]["reason"]
    assert reason
    expect(page.locator("#state")).to_contain_text(server.get("/sources")[1]["state"])
    assert page.locator("#screen").evaluate("screen => screen.width") == 1
    tiles.first.click()
    expect(page.locator("#notice")).to_be_hidden()
    assert page.locator("#screen").evaluate("screen => screen.width") > 1


def test_a_picture_is_classified(server: Served, shown: Shown, tmp_path: Path) -> None:
    page = shown(server.url)
    content = picture(square(COLORS["blue"], np.random.default_rng(2)))
    (tmp_path / "blue.jpg").write_bytes(content)
    (tmp_path / "torn.jpg").write_bytes(content[:200])
    page.locator("#file").set_input_files(tmp_path / "blue.jpg")
    expect(page.locator("#try-said")).to_contain_text("blue", timeout=SHOWN)
    expect(page.locator("#try-bars li.active")).to_contain_text("blue")
    expect(page.locator("#try-picture")).to_be_visible()
    page.locator("#file").set_input_files(tmp_path / "torn.jpg")
    expect(page.locator("#try-said")).to_have_class("wrong")
    expect(page.locator("#try-said")).to_contain_text("torn.jpg")
    expect(page.locator("#try-bars")).to_be_hidden()
    shown.wrong.clear()  # type: ignore[attr-defined] # the browser notes every answer of 4xx


def test_a_hidden_page_asks_for_nothing(server: Served, shown: Shown) -> None:
    page = shown(server.url)
    expect(verdict(page)).to_have_text("red", timeout=SHOWN)
    sent: list[Any] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame)))
    turn = (
        "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, "
        "configurable: true}); document.dispatchEvent(new Event('visibilitychange')); }"
    )
    page.evaluate(turn, True)
    expect(page.locator("#link-text")).to_have_text("Paused")
    page.wait_for_timeout(100)
    number = page.evaluate("() => performance.getEntriesByType('resource').length")
    page.wait_for_timeout(300)
    assert not sent
    assert page.evaluate("() => performance.getEntriesByType('resource').length") == number
    page.evaluate(turn, False)
    expect(page.locator("#link-text")).to_have_text("Connected", timeout=SHOWN)
    assert sent


def test_browsers_that_stop_reading_do_not_slow_the_camera(
    server: Served, browser: Any, shown: Shown
) -> None:
    page = shown(server.url)
    expect(verdict(page)).to_have_text("red", timeout=SHOWN)
    client = pytest.importorskip("websockets.sync.client")
    url = server.url.replace("http", "ws") + "/live"
    never = {"max_queue": 1, "close_timeout": 0.1}
    with client.connect(url, **never) as one, client.connect(url, **never) as two:
        for _ in range(200):  # each answer has a picture; none is ever read
            one.send('{"next": [0], "width": 1280}')
            two.send('{"next": [0], "width": 1280}')
        before, start = server.get("/sources")[0], time.monotonic()
        page.wait_for_timeout(1000)
        after, seconds = server.get("/sources")[0], time.monotonic() - start
    seen = after["seen"] - before["seen"]
    assert seen > 10 * seconds  # of the 20 a second that the camera gives
    assert after["classified"] - before["classified"] >= 0.8 * seen
    expect(page.locator("#link-text")).to_have_text("Connected")


def test_a_message_that_comes_late_keeps_the_past(server: Served, shown: Shown) -> None:
    page = shown(server.url)
    found = page.evaluate(
        """async () => {
            const { Track } = await import("/track.js");
            const track = new Track();
            const rule = { label: "red > 0.5", start: 10, end: 99, rule: true, open: true };
            const curves = { red: [[10, 0.5], [100, 0.5]] };
            track.load({ start: 0, end: 100, spans: [rule], curves });
            const at = (time) => track.see({ time, scores: [["red", 0.9]], active: [] });
            at(99.95);
            at(130);
            const row = track.rows(100, ["red"], 5).find((row) => row.rule);
            const kept = [track.start, track.end, row?.weight];
            at(3);
            return [...kept, track.start];
        }"""
    )
    assert found == [0, 130, 31, 3]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_moves_or_sticks_out(
    width: int, scheme: str, server: Served, camera: Camera, shown: Shown
) -> None:
    server.set_labels(["red", "blue", "a very long label that no row has room for " * 3])
    page = shown(server.url, width, 800, color_scheme=scheme)
    expect(verdict(page)).to_have_text("red", timeout=SHOWN)
    expect(page.locator("#events li").first).to_be_visible(timeout=SHOWN)
    where = (
        "() => ['picture', 'bars', 'prompts', 'timeline', 'fps', 'age'].map((id) => "
        "{ const box = document.getElementById(id).getBoundingClientRect(); "
        "return [box.x, box.y, box.width, box.height]; })"
    )
    before = page.evaluate(where)
    camera.color = "blue"
    expect(verdict(page)).to_have_text("blue", timeout=SHOWN)
    assert page.evaluate(where) == before
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('button, input, textarea, canvas')].filter((found) => "
        "!found.ariaLabel && !found.textContent.trim() && !found.closest('label') && "
        "found.ariaHidden !== 'true').map((found) => found.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.slow
def test_a_server_that_goes_and_returns(bundle: Path, camera: Camera, shown: Shown) -> None:
    with served(bundle, "--source", camera.url) as server:
        page = shown(server.url)
        expect(verdict(page)).to_have_text(camera.color, timeout=SHOWN)
    expect(page.locator("#lost-text")).to_contain_text("did not answer", timeout=SHOWN)
    expect(page.locator("#link-text")).to_have_text("Disconnected")
    with served(bundle, "--source", camera.url, port=server.port):
        page.get_by_role("button", name="Try now").click()
        expect(page.locator("#link-text")).to_have_text("Connected", timeout=SHOWN)
        expect(page.locator("#lost")).to_be_hidden()
        page.close()
    shown.wrong.clear()  # type: ignore[attr-defined] # the browser notes connections it cannot make
