"""Where frames come from, as one text: a camera, an address, a file, a folder, or a pipe.

    0    /dev/video0    v4l2:///dev/video0?width=1280&height=720&fps=30&format=MJPG
    rtsp://user:password@host/path    http://host/stream.mjpg    https://...
    csi://0?width=1280&height=720&fps=30&flip=2          a Jetson's CSI camera, through GStreamer
    gst:v4l2src ! videoconvert ! video/x-raw,format=BGR ! appsink        any GStreamer pipeline
    video.mp4    file:///data/video.mp4    a-folder-of-pictures    picture.jpg
    -?width=640&height=480&color=bgr&fps=15              raw frames from the standard input

What follows `?` in an address is the camera's own, and never edgeclip's.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl, unquote

from .errors import DataError, FrameError
from .frames import MAX_PIXELS, Color
from .sources import PICTURES, check_name

Kind = Literal["v4l2", "rtsp", "http", "csi", "gst", "video", "pictures", "stdin"]
FORMS = (
    "0, /dev/video0, v4l2:///dev/video0?width=1280&height=720, rtsp://..., http://..., csi://0, "
    "gst:PIPELINE ! appsink, a video, a folder of pictures, or -?width=640&height=480"
)
# Names of what is secret: in an address, its path (as XMEye's cameras have it) or a pipeline.
_SECRET = re.compile(
    r"([\w-]*(?:user|usr|login|pass|pwd|pw|token|key|secret|auth|sig|session|cred)[\w-]*=)"
    r"(?:\"[^\"]*\"|[^&/?;\s]*?(?=_\w+=|[&/?;\s]|$))",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"://[^\s\"']*@")  # within other text
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*:/+).*@|^[^@/\s=]*:[^@]*@", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Options:
    """What a source is asked for; 0 and "" leave it to the camera."""

    width: int = 0
    height: int = 0
    fps: float = 0.0
    color: Color = "bgr"
    """The order of the channels of frames from a pipe."""
    format: str = ""
    """A camera's own pixel format as four letters: MJPG, YUYV."""
    flip: int = 0
    """The flip-method of nvvidconv: 2 turns the picture upside down."""


@dataclass(frozen=True)
class SourceSpec:
    """A source: its kind, its address (device, address, pipeline or path) and its options."""

    kind: Kind
    address: str = field(repr=False)  # may hold a password
    options: Options = Options()

    @property
    def live(self) -> bool:
        """Whether frames come by themselves, and the source is opened again when it is lost."""
        return self.kind in ("v4l2", "rtsp", "http", "csi", "gst")

    @property
    def shown(self) -> str:
        """The source as it may be printed: without user names, passwords and tokens."""
        name = {"csi": "csi://", "gst": "gst:"}.get(self.kind, "")
        return "-" if self.kind == "stdin" else name + hide_secrets(self.address)


def hide_secrets(text: str) -> str:
    """The text with what looks like a login, password or token as `***`: of an address all before
    its last @, whatever signs a password has, and however the address is mistyped."""
    if address := _ADDRESS.match(text):
        text = f"{address[1] or ''}***@{text[address.end() :]}"
    return _SECRET.sub(r"\1***", _LOGIN.sub("://***@", text))


def parse_source(text: str | Path) -> SourceSpec:
    """The source that a text names (see above).

    Raises DataError for one that is malformed, FrameError where there is no such file or folder, or
    its name is not UTF-8.
    """
    text = str(text).strip()
    check_name(hide_secrets(text))
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if text.isdecimal():
        return SourceSpec("v4l2", str(int(text)))
    if text.startswith("gst:"):
        return SourceSpec("gst", _pipeline(text))
    if text == "-" or text.startswith("-?"):
        return SourceSpec("stdin", "-", _stdin_options(text))
    if text.startswith("/dev/video"):
        return SourceSpec("v4l2", text)
    if not separator:
        return _of_path(Path(text).expanduser())
    if scheme in ("v4l2", "csi"):
        address, _, query = rest.partition("?")
        return _device(text, scheme, address, query)
    if scheme == "file":
        return _of_path(Path(unquote(rest)))
    if scheme in ("rtsp", "rtsps", "http", "https") and rest:
        return SourceSpec("rtsp" if scheme.startswith("rtsp") else "http", text)
    raise DataError(f"{hide_secrets(text)!r} is not a source; use {FORMS}")


def _of_path(path: Path) -> SourceSpec:
    if not os.path.exists(path):
        raise FrameError(
            f"there is no file or folder {hide_secrets(str(path))}; a source is {FORMS}"
        )
    pictures = path.is_dir() or path.suffix.lower() in PICTURES
    return SourceSpec("pictures" if pictures else "video", str(path))


def _pipeline(text: str) -> str:
    pipeline = text.removeprefix("gst:").strip()
    if not re.search(r"!\s*appsink\b[^!]*$", pipeline):
        raise DataError(
            f"the pipeline {hide_secrets(pipeline)!r} does not end in an appsink; "
            "end it in: ! videoconvert ! video/x-raw,format=BGR ! appsink"
        )
    return pipeline


def _device(text: str, scheme: str, address: str, query: str) -> SourceSpec:
    if scheme == "csi":
        options = _options(text, query, {"width", "height", "fps", "flip"})
        if not address.isdecimal():
            raise DataError(f"{text!r}: a CSI camera is a number: csi://0")
        return SourceSpec("csi", address, options)
    if not re.fullmatch(r"\d+|/dev/[\w/.:-]+", address):
        raise DataError(f"{text!r}: a V4L2 camera is a device: v4l2:///dev/video0")
    return SourceSpec("v4l2", address, _options(text, query, {"width", "height", "fps", "format"}))


def _stdin_options(text: str) -> Options:
    options = _options(text, text[2:], {"width", "height", "fps", "color"})
    if not options.width or not options.height:
        raise DataError(f"{text!r}: say how large raw frames are: -?width=640&height=480")
    if options.color == "nv12" and (options.width % 2 or options.height % 2):
        raise DataError(f"{text!r}: the sides of NV12 frames are even")
    return options


def _options(text: str, query: str, known: set[str]) -> Options:
    values: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise DataError(f"{text!r}: options are written ?name=value&name=value") from None
    for name, value in pairs:
        if name not in known or name in values:
            why = "is given twice" if name in values else "is not known here"
            raise DataError(f"{text!r}: {name!r} {why}; there are {', '.join(sorted(known))}")
        values[name] = _value(text, name, value)
    options = Options(**values)
    if bool(options.width) != bool(options.height):
        raise DataError(f"{text!r}: width and height go together")
    if options.width * options.height > MAX_PIXELS:
        raise DataError(f"{text!r}: frames have at most {MAX_PIXELS:,} pixels")
    return options


def _value(text: str, name: str, value: str) -> object:
    read, good, expected = _VALUES[name]
    try:
        result = read(value)
        if good(result):
            return result
    except ValueError:
        pass
    raise DataError(f"{text!r}: {name}={value!r} is not {expected}")


_Rule = tuple[Callable[[str], Any], Callable[[Any], bool], str]
_SIDE: _Rule = (int, lambda side: 0 < side <= 32768, "a number of pixels from 1 to 32768")
_VALUES: dict[str, _Rule] = {
    "width": _SIDE,
    "height": _SIDE,
    "fps": (float, lambda fps: 0 < fps <= 1000, "a number of frames a second, up to 1000"),
    "flip": (int, lambda flip: 0 <= flip <= 7, "a flip-method from 0 to 7"),
    "color": (str, lambda color: color in get_args(Color), f"one of {', '.join(get_args(Color))}"),
    "format": (str, lambda name: bool(re.fullmatch(r"\w{4}", name)), "four letters, as MJPG"),
}
