"""Why a camera's RTSP stream cannot be opened, which OpenCV does not tell."""

import socket
from urllib.parse import urlsplit

from .source_uri import SourceSpec


def why_closed(spec: SourceSpec, timeout: float) -> str:
    """What the camera says when it is asked for its stream (DESCRIBE, RFC 2326), without a login;
    `timeout` seconds are waited twice at most."""
    if spec.address.lower().startswith("rtsps:"):
        return "does not answer, refuses the login, or has no video"
    parts = urlsplit(spec.address)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        status = _describe((parts.hostname or "", parts.port or 554), address, timeout)
    except OSError as error:
        return f"cannot be reached: {error}"
    except ValueError:  # what it says may hold a password with a slash
        return "is no address of the form rtsp://user:password@host:port/path"
    if status.startswith("401"):
        if parts.username is None:
            return "asks for a login: rtsp://user:password@host/path"
        return "refuses the login, or does not have what the address names"
    if status.startswith("404"):
        return f"answers {status}: is the path of the address right?"
    return "has no video that can be read" if status.startswith("200") else f"answers {status}"


def _describe(place: tuple[str, int], address: str, timeout: float) -> str:
    """The status line of the answer, without its version."""
    asked = f"DESCRIBE {address} RTSP/1.0\r\nCSeq: 1\r\nAccept: application/sdp\r\n\r\n"
    with socket.create_connection(place, timeout) as camera:
        camera.sendall(asked.encode())
        line = camera.recv(1000).decode("latin-1").partition("\r\n")[0]
    version, _, status = line.partition(" ")
    if not version.startswith("RTSP/"):
        raise OSError("what answers there does not speak RTSP")
    return "".join(letter for letter in status[:80] if letter.isprintable())
