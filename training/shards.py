"""WebDataset shards: tar files of pictures and captions, found, counted, and read as a stream."""

import contextlib
import glob
import itertools
import json
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import braceexpand

from calibration.pairs import Bad
from runtime.errors import DataError

from .samples import DAMAGE, Sample, is_picture, is_url, open_shard, read_shard

SHUFFLE, SHUFFLE_BYTES = 500, 1 << 27  # samples held in memory, a process, to mix neighbours
_SUFFIX = re.compile(r"\.(tar|tgz|tar\.gz)$")


@dataclass(frozen=True)
class Shards:
    """Tar files by path or URL, and how many samples they hold."""

    urls: tuple[str, ...]
    samples: int
    templates: tuple[str, ...]
    resampled: bool = False
    expected: int = 1
    """About how many a file holds, as far as that is known: what a damaged one has lost."""

    def stream(
        self, seed: Sequence[int], reader: int, readers: int, known_bad: frozenset[str]
    ) -> Iterator[Sample | Bad]:
        """Samples without end, for one of `readers` processes, in an order that `seed` fixes.

        Every shard goes to one reader, and every sample comes once a pass. Where there are fewer
        shards than readers, each reads all of them and gives its share of the samples. With
        `resampled` each reader draws shards of its own. What cannot be used comes as a Bad;
        samples named in `known_bad` are passed over.
        """
        mixing = random.Random(repr((*seed, reader)))
        barren: set[str] = set()
        for number, urls in enumerate(self._passes(seed, reader, readers)):
            items = self._samples(urls, barren)
            if len(self.urls) < readers and not self.resampled:
                items = itertools.islice(items, (reader + number) % readers, None, readers)
            for item in _mixed(items, mixing):
                if not (isinstance(item, Sample) and item.name in known_bad):
                    yield item

    def _passes(self, seed: Sequence[int], reader: int, readers: int) -> Iterator[list[str]]:
        """The shards of each pass."""
        rng = random.Random(repr((*seed, reader if self.resampled else 0)))
        while self.resampled:
            yield rng.choices(self.urls, k=len(self.urls))
        while True:
            urls = rng.sample(self.urls, len(self.urls))
            yield urls[reader::readers] if len(urls) >= readers else urls

    def _samples(self, urls: Sequence[str], barren: set[str]) -> Iterator[Sample | Bad]:
        """What is in some shards; `barren` are the ones in which nothing was found."""
        for url in urls:
            barren.add(url)
            for item in read_shard(url, self.templates, self.expected):
                if isinstance(item, Sample):
                    barren.discard(url)
                yield item
            if len(barren) == len(set(self.urls)):
                raise DataError(f"no shard has a usable sample; the last was {url}")


def _mixed(items: Iterable[Sample | Bad], rng: random.Random) -> Iterator[Sample | Bad]:
    """Each item at random among its neighbours: as many as are held."""
    held: list[Sample | Bad] = []
    room = SHUFFLE_BYTES
    for item in items:
        held.append(item)
        room -= _bytes(item)
        while len(held) > SHUFFLE or room < 0:
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            room += _bytes(held[-1])
            yield held.pop()
    rng.shuffle(held)
    yield from held


def _bytes(item: Sample | Bad) -> int:
    return len(item.picture) if isinstance(item, Sample) else 0


def is_shards(source: str) -> bool:
    """Whether a data source is given as tar files, or as a folder of them."""
    return bool(_SUFFIX.search(source)) or (os.path.isdir(source) and bool(_tars_in(source)))


def open_shards(
    source: str,
    templates: tuple[str, ...],
    resampled: bool = False,
    samples: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Shards:
    """Finds the shards of `source`: a path or URL with {000..099} or wildcards, or a folder.

    `samples` is how many they hold; without it they are counted: from `sizes.json` beside them
    (as open_clip has it), else by going through every file. Raises DataError.
    """
    urls = _expand(source)
    missing = [url for url in urls if not is_url(url) and not os.path.isfile(url)]
    if missing or not urls:
        hint = "; from the net they come by http:// or https://" if "://" in source else ""
        raise DataError(f"there is no shard {missing[0] if missing else source}{hint}")
    expected = 1
    if samples is None:
        samples = sum(_sizes(urls) or _count(urls, advance))
        expected = samples // len(urls)
    if not samples:
        raise DataError(f"{source} holds no samples (pictures with a .txt or .json each)")
    return Shards(tuple(urls), samples, templates, resampled, expected)


def _expand(source: str) -> list[str]:
    if os.path.isfile(source):
        return [source]
    if os.path.isdir(source):
        return _tars_in(source)
    try:
        urls = list(braceexpand.braceexpand(source))
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error
    return list(itertools.chain.from_iterable(map(_matching, urls)))


def _matching(url: str) -> list[str]:
    wild = not is_url(url) and any(mark in url for mark in "*?[")
    return sorted(glob.glob(url)) if wild else [url]


def _tars_in(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error}") from error
    return [f"{folder}/{n}" for n in names if _SUFFIX.search(n) and not n.startswith(".")]


def _sizes(urls: Sequence[str]) -> list[int] | None:
    """The samples of each shard by the `sizes.json` beside it, if all are listed."""
    listed: dict[str, Any] = {}
    try:
        for folder in dict.fromkeys(url.rpartition("/")[0] for url in urls):
            with open_shard(f"{folder}/sizes.json" if folder else "sizes.json") as stream:
                listed[folder] = json.load(stream)
        parts = [url.rpartition("/") for url in urls]
        return [int(listed[folder][name]) for folder, _, name in parts]
    except (*DAMAGE, LookupError, TypeError):
        return None


def _count(urls: Sequence[str], advance: Callable[[], None]) -> Iterator[int]:
    """Pictures in each shard, by its table of members."""
    if any(map(is_url, urls)):
        raise DataError(
            "shards from the net are not counted: give --epoch-size, or put a sizes.json "
            'such as {"000.tar": 10000} beside them'
        )
    for url in urls:
        count = 0
        with contextlib.suppress(*DAMAGE), tarfile.open(url) as archive:
            for member in archive:
                count += is_picture(member)
                archive.members.clear()  # type: ignore[attr-defined]
        advance()
        yield count
