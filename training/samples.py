"""One tar file of pictures and captions, on disk or by http, read sample by sample.

A sample is the members of one name: `0001.jpg` with `0001.txt` (its caption), or with `0001.json`
that has "caption" (a text or a list of them) or "label".
"""

import contextlib
import http.client
import itertools
import json
import lzma
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

from webdataset.tariterators import base_plus_ext, group_by_keys

from calibration.pairs import Bad, caption_fault

PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER = 1 << 28  # bytes of a picture or a text; a larger one is passed over
MAX_HEADER = 1 << 20  # bytes of a long name or the like; no sound file has more
MAX_CAPTIONS = 16
TRIES, TIMEOUT = 3, 60  # of a download; seconds
UNREADABLE = "unreadable or cut-off shard"
DAMAGE = (
    *(OSError, EOFError, ValueError, OverflowError, http.client.HTTPException),
    *(tarfile.TarError, zlib.error, lzma.LZMAError),
)
"""What reading a tar file raises, be it missing, damaged or hostile."""
_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_KINDS = (*PICTURES, "txt", "json")
_LATER = (408, 429)  # a server's refusals that may end


class Sample(NamedTuple):
    """One picture as a file's bytes, and its true captions."""

    name: str
    picture: bytes
    texts: tuple[str, ...]


def read_shard(url: str, templates: Sequence[str], expected: int = 1) -> Iterator[Sample | Bad]:
    """Every sample of one tar file in its order; what is wrong comes as a Bad.

    A tar file that is damaged or cut off gives what it holds up to there, then one Bad for all
    that it has less than `expected`.
    """
    found = 0
    faults: list[str] = []
    for raw in group_by_keys(_members(url, faults), handler=lambda _: True):
        found += 1
        yield _sample(f"{url}:{raw['__key__']}", raw, templates)
    if faults:
        yield Bad(url, f"{UNREADABLE} ({faults[0]})", max(1, expected - found))


class _Member(tarfile.TarInfo):
    """A member of an archive; after a damaged one tarfile would say that the archive ends."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ("EOFHeaderError", "EmptyHeaderError"):
                raise
            raise tarfile.ReadError(f"a damaged member: {error}") from error

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        """Headers in members of their own are held in memory, however long they say they are."""
        if self.type in _HEADERS and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def _members(url: str, faults: list[str]) -> Iterator[dict[str, Any]]:
    """The pictures and texts in a tar file, as `group_by_keys` takes them, up to a fault."""
    try:
        with (
            open_shard(url) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive,
        ):
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]
                if member.isreg() and member.size <= MAX_MEMBER and _kind(member) in _KINDS:
                    content = cast(BinaryIO, archive.extractfile(member)).read()
                    yield {"fname": member.name, "data": content, "__url__": url}
    except DAMAGE as error:
        faults.append(type(error).__name__)


def is_picture(member: tarfile.TarInfo) -> bool:
    """Whether a member is a sample's picture."""
    return member.isreg() and _kind(member) in PICTURES


def _kind(member: tarfile.TarInfo) -> str:
    """What comes after the name of the sample: WebDataset splits at the first dot."""
    return str(base_plus_ext(member.name)[1]).lower()


def _sample(name: str, raw: dict[str, Any], templates: Sequence[str]) -> Sample | Bad:
    picture = next((raw[kind] for kind in PICTURES if kind in raw), None)
    if picture is None:
        return Bad(name, f"no picture (.{', .'.join(PICTURES)})")
    try:
        texts = _texts(raw, templates)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return Bad(name, f"unreadable caption ({type(error).__name__})")
    usable = tuple(text for text in texts if not caption_fault(text))
    if not usable:
        return Bad(name, caption_fault(texts[0]) if texts else "no caption")
    return Sample(name, picture, usable[:MAX_CAPTIONS])


def _texts(raw: dict[str, Any], templates: Sequence[str]) -> tuple[str, ...]:
    """The captions in a sample. Raises ValueError or TypeError for what is not as it should be."""
    if "txt" in raw:
        return (raw["txt"].decode("utf-8-sig").strip(),)
    if "json" not in raw:
        return ()
    fields = json.loads(raw["json"])
    caption, label = fields.get("caption"), fields.get("label")
    found = caption if isinstance(caption, list) else [] if caption is None else [caption]
    if not found and label is not None:
        found = [template.replace("{}", label) for template in templates]
    if not all(isinstance(text, str) for text in found):
        raise TypeError("captions are texts")
    return tuple(text.strip() for text in found)


def is_url(text: str) -> bool:
    """Whether a shard comes from the net."""
    return text.startswith(("http://", "https://"))


@contextlib.contextmanager
def open_shard(url: str) -> Iterator[BinaryIO]:
    """A shard's bytes: a file's, or a download's. No other scheme, and no shell, is used."""
    with _download(url) if is_url(url) else open(url, "rb") as stream:
        yield stream


def _download(url: str) -> BinaryIO:
    """Tries a few times, but for what the server refuses."""
    opener = urllib.request.OpenerDirector()  # the usual one would also follow to ftp
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    for attempt in itertools.count(1):
        try:
            return cast(BinaryIO, opener.open(url, timeout=TIMEOUT))
        except (OSError, http.client.HTTPException) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else 0
            if attempt == TRIES or (400 <= code < 500 and code not in _LATER):
                raise
            time.sleep(2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")
