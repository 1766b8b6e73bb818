"""Rules over labels in time, as `person > 0.6 for 2s`.

    rule     = any [ "for" duration ]
    any      = all { "or" all }
    all      = term { "and" term }
    term     = "not" term | "(" any ")" | name [ comparison number ]
    name     = word { word } | a text in "double" or 'single' quotes
    comparison = ">" | ">=" | "<" | "<="
    number   = 0 to 1, or 0% to 100%
    duration = number ( "ms" | "s" | "m" | "min" | "h" )

A name is a label or a group of labels, and stands for its score; alone it means `name > 0.5`.
Quotes are only needed for names with other characters than letters, digits, "-" and "_", or with
one of the words and, or, not, for. `not` binds closest, then `and`, then `or`; `for` is of the
whole rule: it fires once that has been true for so long, and is cleared by the first frame for
which it is not.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .errors import DataError
from .event import Event, Kind

Holds = Callable[[Mapping[str, float]], bool]
"""Whether scores, by name, are as a condition says."""

_TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>"[^"]*"|'[^']*')|(?P<sign>>=|<=|>|<|\(|\))"""
    r"""|(?P<number>\d+\.?\d*|\.\d+)(?P<unit>%|[a-z]+\b)?(?![\w.-])|(?P<word>[\w-]+))"""
)
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_KEYWORDS = ("and", "or", "not", "for")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": lambda score, limit: score > limit,
    ">=": lambda score, limit: score >= limit,
    "<": lambda score, limit: score < limit,
    "<=": lambda score, limit: score <= limit,
}


class Rule:
    """A rule of one source; make it with `Rule.parse`."""

    def __init__(self, text: str, holds: Holds, duration: float, names: frozenset[str]) -> None:
        self.text, self.duration, self.names = text, duration, names
        self._holds = holds
        self._since: float | None = None
        self.fired = False
        """Whether it has fired and is not cleared."""

    @classmethod
    def parse(cls, text: str, names: Iterable[str]) -> "Rule":
        """The rule that a text says of these labels and groups. Raises DataError, with the place
        in the text marked."""
        parser = _Parser(text, frozenset(names))
        try:
            holds, duration = parser.rule()
        except RecursionError:
            raise DataError("a rule of so many parentheses cannot be read") from None
        return cls(text, holds, duration, frozenset(parser.used))

    def anew(self) -> "Rule":
        """The same rule for another source."""
        return Rule(self.text, self._holds, self.duration, self.names)

    def update(self, source: str, time: float, scores: Mapping[str, float]) -> list[Event]:
        """What the scores of a frame do to the rule: nothing, or one event, "fired" or "cleared".

        `time` is the frame's own in seconds. A name without a score counts as 0.
        """
        if not self._holds(scores):
            return self.end(source, time)
        if self._since is None:
            self._since = time
        if self.fired or time - self._since < self.duration:
            return []
        self.fired = True
        return [self._event("fired", source, time)]

    def end(self, source: str, time: float) -> list[Event]:
        """Clears the rule where it has fired: the source has ended, or was lost."""
        events = [self._event("cleared", source, time)] if self.fired else []
        self._since, self.fired = None, False
        return events

    def _event(self, kind: Kind, source: str, time: float) -> Event:
        since = time if self._since is None else self._since
        return Event(kind, self.text, source, time, time - since)


@dataclass(frozen=True)
class _Token:
    """A piece of a rule: its text, where it begins, and what it is."""

    text: str
    place: int
    kind: str
    value: float = 0.0
    unit: str = ""


class _Parser:
    """Reads a rule by recursive descent: a method for each line of the grammar."""

    def __init__(self, text: str, names: frozenset[str]) -> None:
        self._text, self._names = text, names
        self._tokens = list(self._split())
        self._at = 0
        self.used: list[str] = []

    def rule(self) -> tuple[Holds, float]:
        holds = self._any()
        duration = self._duration() if self._takes("for") else 0.0
        if self._next.kind != "end":
            raise self._error(f"{self._next.text!r} is not expected here", self._next)
        return holds, duration

    def _any(self) -> Holds:
        parts = [self._all()]
        while self._takes("or"):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else lambda scores: any(p(scores) for p in parts)

    def _all(self) -> Holds:
        parts = [self._term()]
        while self._takes("and"):
            parts.append(self._term())
        return parts[0] if len(parts) == 1 else lambda scores: all(p(scores) for p in parts)

    def _term(self) -> Holds:
        if self._takes("not"):
            part = self._term()
            return lambda scores: not part(scores)
        if self._takes("("):
            whole = self._any()
            if not self._takes(")"):
                raise self._error("a ) is missing", self._next)
            return whole
        name = self._name()
        sign = self._next.text if self._next.text in _COMPARE else ""
        self._at += bool(sign)
        limit = self._limit() if sign else 0.5
        compare = _COMPARE[sign or ">"]
        return lambda scores: compare(scores.get(name, 0.0), limit)

    def _name(self) -> str:
        first, words = self._next, []
        if first.kind == "quoted":
            self._at += 1
            words = [first.text[1:-1]]
        else:
            while self._next.kind in ("word", "number"):
                words.append(self._next.text)
                self._at += 1
        name = " ".join(words)
        if not words:
            raise self._error("a label is expected", first)
        if name not in self._names:
            known = ", ".join(sorted(self._names)[:20]) + (", ..." if len(self._names) > 20 else "")
            raise self._error(f"there is no label or group {name!r}, only {known}", first)
        self.used.append(name)
        return name

    def _limit(self) -> float:
        token = self._next
        if token.kind != "number" or token.unit not in ("", "%"):
            raise self._error("a score is expected, as in > 0.6", token)
        value = token.value / 100 if token.unit else token.value
        if value > 1:
            raise self._error("a score is 0 to 1 (or 0% to 100%)", token)
        self._at += 1
        return value

    def _duration(self) -> float:
        token = self._next
        self._at += 1
        if token.kind != "number":
            raise self._error("a time is expected, as in 2s", token)
        unit = token.unit
        if not unit and self._next.kind == "word":
            unit = self._next.text
            self._at += 1
        if unit not in _UNITS:
            raise self._error(f"a time has one of the units {', '.join(_UNITS)}", token)
        return token.value * _UNITS[unit]

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _takes(self, text: str) -> bool:
        found = self._next.text == text and self._next.kind in ("keyword", "sign")
        self._at += found
        return found

    def _split(self) -> Iterable[_Token]:
        place, end = 0, len(self._text.rstrip())
        while place < end:
            found = _TOKEN.match(self._text, place)
            if found is None:
                place += len(self._text[place:]) - len(self._text[place:].lstrip())
                wrong = _Token(self._text[place], place, "wrong")
                raise self._error(f"{wrong.text!r} is not understood", wrong)
            yield self._token(found)
            place = found.end()
        yield _Token("the end", end, "end")

    def _token(self, found: re.Match[str]) -> _Token:
        kind = "number" if found["number"] else str(found.lastgroup)
        text = found[0].lstrip()
        if kind == "word" and text in _KEYWORDS:
            kind = "keyword"
        value = float(found["number"]) if kind == "number" else 0.0
        return _Token(text, found.end() - len(text), kind, value, found["unit"] or "")

    def _error(self, what: str, token: _Token) -> DataError:
        marked = f"{self._text[: token.place]}>>>{self._text[token.place :]}"
        return DataError(f"the rule {marked!r} cannot be read at >>>: {what}")
