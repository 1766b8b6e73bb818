"""MJPEG over HTTP, as cheap cameras send it: JPEGs as the parts of one endless answer.

OpenCV reads it too, but holds the first frames back, squashes all to the first one's size, and
gives up a stream that begins with a broken picture.
"""

import http.client
import io
import os
import socket
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from .errors import FrameError
from .frames import Color, Frame, read_picture
from .source_uri import SourceSpec

MAX_PART = 64 << 20  # bytes of one picture
MAX_LINE = 1 << 16


def open_mjpeg(spec: SourceSpec, timeout: float) -> "MjpegCapture | None":
    """Opens an address; None where it answers with something else than MJPEG.

    Raises FrameError where it does not answer, or refuses.
    """
    try:
        answer = _ask(spec.address, timeout)
    except urllib.error.HTTPError as error:
        error.close()
        raise FrameError(f"{spec.shown} answers {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise FrameError(f"{spec.shown} cannot be reached: {why}") from None
    if answer.headers.get_content_maintype() == "multipart":
        return MjpegCapture(spec, answer)
    answer.close()
    return None


def _ask(address: str, timeout: float) -> Any:
    """The open answer; with the login of the address, by Basic or Digest (RFC 7617, RFC 7616)."""
    parts = urlsplit(address)
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    login, separator, place = parts.netloc.rpartition("@")
    plain = urlunsplit(parts._replace(netloc=place))
    if separator:
        user, _, password = login.partition(":")
        passwords.add_password(None, plain, unquote(user), unquote(password))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),  # cameras are near
        urllib.request.HTTPDigestAuthHandler(passwords),
        urllib.request.HTTPBasicAuthHandler(passwords),
    )
    return opener.open(plain, timeout=timeout)


class MjpegCapture:
    """The pictures of an open answer. It is decoded what is retrieved, and only that."""

    reader = "MJPEG over HTTP"
    color: Color = "rgb"
    fps: float | None = None

    def __init__(self, spec: SourceSpec, answer: Any) -> None:
        self._spec, self._answer = spec, answer
        self._handle = socket.socket(fileno=os.dup(answer.fileno()))
        self._picture = b""
        self._count = 0
        self.ended = ""

    def grab(self) -> bool:
        """Reads the next picture, not decoded yet; False where the stream is over (`ended`)."""
        try:
            self._picture = self._part()
        except TimeoutError:
            self.ended = "no answer in time"
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.ended = f"the connection broke: {error}"
        else:
            self._count += 1
            return True
        return False

    def _part(self) -> bytes:
        """The next picture. Raises ConnectionError where there is none, ValueError for nonsense."""
        length = None
        begun = False  # whether a header came: the blank line after it begins the picture
        for _ in range(1000):
            line = self._answer.readline(MAX_LINE)
            if not line:
                raise ConnectionError("the camera ended it")
            name, colon, value = line.decode("latin-1").strip().partition(":")
            if colon and name.lower() == "content-length":
                length = int(value)
            if begun and not name:
                return self._sized(length) if length is not None else self._searched()
            begun = begun or bool(colon)
        raise ValueError("no picture begins where one should")

    def _sized(self, length: int) -> bytes:
        if not 0 <= length <= MAX_PART:
            raise ValueError(f"a picture of {length:,} bytes")
        picture: bytes = self._answer.read(length)
        if len(picture) < length:
            raise ConnectionError("it ended within a picture")
        return picture

    def _searched(self) -> bytes:
        """A picture whose length is not told: up to the line that begins the next part."""
        picture = bytearray()
        while len(picture) <= MAX_PART:
            line = self._answer.readline(MAX_LINE)
            if not line:
                raise ConnectionError("it ended within a picture")
            if line.startswith(b"--") and picture.rstrip(b"\r\n").endswith(b"\xff\xd9"):
                return bytes(picture)
            picture += line
        raise ValueError("a picture without an end")

    def retrieve(self) -> Frame:
        try:
            return read_picture(io.BytesIO(self._picture))
        except FrameError:
            shown = f"frame {self._count} of {self._spec.shown}"
            raise FrameError(f"{shown} is broken, or no picture") from None

    def position(self) -> float | None:
        return None

    def interrupt(self) -> None:
        try:
            self._handle.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already

    def close(self) -> None:
        self._handle.close()
        self._answer.close()
