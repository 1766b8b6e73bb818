"""What a log that cannot be written does: nothing."""

import logging
import sys
from collections.abc import Iterator

import pytest

from runtime.log import log, set_up


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, level = logging.getLogger(), log.level
    handlers, root_level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(root_level)
    log.setLevel(level)


class Gone:
    """A terminal or pipe whose other end is closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_log_that_nobody_reads_ends_nothing(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(format)
    monkeypatch.setattr(sys, "stderr", Gone())
    log.warning("a camera is lost")
