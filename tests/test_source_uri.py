"""What texts name as sources, and what is never shown of them."""

from pathlib import Path

import pytest

from runtime.errors import DataError, EdgeClipError, FrameError
from runtime.source_uri import Options, hide_secrets, parse_source


@pytest.mark.parametrize(
    "text, kind, address, options",
    [
        ("0", "v4l2", "0", Options()),
        ("/dev/video2", "v4l2", "/dev/video2", Options()),
        (
            "v4l2:///dev/video0?width=1280&height=720&fps=30&format=MJPG",
            "v4l2",
            "/dev/video0",
            Options(width=1280, height=720, fps=30, format="MJPG"),
        ),
        ("rtsp://a/b?channel=1#c", "rtsp", "rtsp://a/b?channel=1#c", Options()),
        ("https://a/b.mjpg", "http", "https://a/b.mjpg", Options()),
        ("csi://1?fps=60&flip=2", "csi", "1", Options(fps=60, flip=2)),
        ("gst:videotestsrc ! appsink drop=1", "gst", "videotestsrc ! appsink drop=1", Options()),
        (
            "-?width=4&height=2&color=nv12",
            "stdin",
            "-",
            Options(width=4, height=2, color="nv12"),
        ),
    ],
)
def test_a_text_names_a_source(text: str, kind: str, address: str, options: Options) -> None:
    spec = parse_source(text)
    assert (spec.kind, spec.address, spec.options) == (kind, address, options)


def test_files_and_folders_are_sources(tmp_path: Path) -> None:
    (tmp_path / "a ? clip.mp4").write_bytes(b"")
    assert parse_source(tmp_path / "a ? clip.mp4").kind == "video"
    assert parse_source(f"file://{tmp_path}/a%20%3F%20clip.mp4").kind == "video"
    assert parse_source(tmp_path).kind == "pictures"
    with pytest.raises(FrameError, match="no file or folder"):
        parse_source("nowhere.mp4")


@pytest.mark.parametrize(
    "text", ["caf\udce9.mp4", "rtsp://bob:geheim@door/caf\udce9", "gst:\udce9"]
)
def test_what_is_no_utf8_does_not_reach_opencv(text: str) -> None:
    """Which ends the process by a segmentation fault."""
    with pytest.raises(FrameError, match="is not UTF-8") as refused:
        parse_source(text)
    assert "geheim" not in str(refused.value)
    str(refused.value).encode()


@pytest.mark.parametrize(
    "text, message",
    [
        ("ftp://a/b", "is not a source"),
        ("rtsp://", "is not a source"),
        ("csi://front", "a CSI camera is a number"),
        ("v4l2://../../etc/passwd", "is a device"),
        ("v4l2:///dev/video0?widht=3", "'widht' is not known here; there are format, fps, height"),
        ("v4l2:///dev/video0?fps=1&fps=2", "given twice"),
        ("v4l2:///dev/video0?fps", r"written \?name=value"),
        ("v4l2:///dev/video0?width=640", "go together"),
        ("csi://0?fps=nan", "fps='nan' is not a number of frames"),
        ("csi://0?flip=9", "flip-method"),
        ("-", "how large raw frames are"),
        ("-?width=0&height=4", "width='0' is not a number of pixels"),
        ("-?width=32768&height=32768", "at most 100,000,000 pixels"),
        ("-?width=3&height=4&color=nv12", "even"),
        ("-?width=4&height=4&color=pink", "one of bgr"),
        ("gst:videotestsrc ! fakesink", "does not end in an appsink"),
    ],
)
def test_a_malformed_source_is_said(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_source(text)


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://bob:geheim@10.0.0.2:554/h264?channel=1",
        "rtsp://bob:ge@geheim@host/x",
        "rtsp://bob:it's geheim\"@host/x",
        "http://bob:ge#geheim@host/x",
        "http://bob:ge/geheim?geheim@host/x",
        "rtsp:/bob:geheim@door/stream",
        "bob:geheim@door/stream",
        "http://cam/x.mjpg?usr=bob&password=geheim&channel=1",
        "http://cam/x.mjpg?access_token=geheim#geheim_token=geheim",
        "rtsp://10.0.0.2/user=bob_password=geheim_channel=1_stream=0.sdp",
        "gst:rtspsrc location=rtsp://h/x user-id=bob user-pw=geheim ! appsink",
        'gst:rtspsrc location="rtsp://bob:geheim@h/x" user-pw="geheim x" ! appsink',
        "ftp://bob:geheim@host/x",
    ],
)
def test_secrets_are_never_shown(text: str) -> None:
    try:
        spec = parse_source(text)
        said = spec.shown + repr(spec)
        assert "channel=1" in said or "channel=1" not in text
    except EdgeClipError as error:
        said = str(error)
    assert "geheim" not in said.replace("geheim_token", "") and "bob" not in said
    assert hide_secrets("rtsp://host/a?channel=1") == "rtsp://host/a?channel=1"
    piped = "rtspsrc location=rtsp://{}@h/x ! appsink"
    assert hide_secrets(piped.format("bob:geheim")) == piped.format("***")
