"""MJPEG over HTTP, as cheap cameras send it: JPEGs as the parts of one endless answer.

OpenCV reads it too, but holds the first frames back, squashes all to the first one's size, and
gives up a stream that begins with a broken picture.
"""

import http.client
import io
import os
import socket
import threading
import time
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
    except (ValueError, http.client.InvalidURL):  # which may name a part of the password
        raise FrameError(
            f"{spec.shown} is no address; in a login write %23 for #, %2F for /, %3F for ?"
        ) from None
    except (OSError, http.client.HTTPException) as error:
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
    """The pictures of an open answer. It is decoded what is retrieved, and only that.

    A thread reads them as they come: where decoding takes longer than a camera takes for its next
    picture, they would queue up in the connection, each older than the one before.
    """

    reader = "MJPEG over HTTP"
    color: Color = "rgb"
    fps: float | None = None

    def __init__(self, spec: SourceSpec, answer: Any) -> None:
        self._spec, self._answer = spec, answer
        self._handle = socket.socket(fileno=os.dup(answer.fileno()))
        self._picture = b""
        self._count = self.missed = 0
        self.came: float | None = None
        self.ended = ""
        self._news = threading.Condition()
        self._newest: tuple[bytes, float] | None = None
        self._passed = 0
        self._over = False
        self._thread = threading.Thread(target=self._read, name="edgeclip MJPEG", daemon=True)
        self._thread.start()

    def grab(self) -> bool:
        """Waits for a picture, and takes the newest, not decoded yet; False where the stream is
        over (`ended`)."""
        with self._news:
            self._news.wait_for(lambda: self._newest or self._over)
            if self._newest is None:
                return False
            self._picture, self.came = self._newest
            self._newest = None
            self.missed = self._passed
            self._passed = 0
            self._count += 1 + self.missed
        return True

    def _read(self) -> None:
        why = ""
        try:
            while True:
                picture = self._part()
                with self._news:
                    self._passed += self._newest is not None
                    self._newest = picture, time.monotonic()
                    self._news.notify()
        except TimeoutError:
            why = "no answer in time"
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = f"the connection broke: {error}"
        finally:
            with self._news:
                self.ended, self._over = why, True
                self._news.notify()

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
        self.interrupt()
        self._thread.join()
        self._handle.close()
        self._answer.close()
