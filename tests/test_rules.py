"""The grammar of rules, and when they fire."""

import pytest

from runtime.errors import DataError
from runtime.rules import Rule

NAMES = ["person", "dog", "red car", "animal", "and", "wi-fi", "boeing 747", "it's", "a (b)"]
P, D, C = "person", "dog", "red car"


@pytest.mark.parametrize(
    "text, scores, holds",
    [
        ("person > 0.6", {P: 0.7}, True),
        ("person > 0.6", {P: 0.6}, False),
        ("person >= 60%", {P: 0.6}, True),
        ("person < .5", {P: 0.4}, True),
        ("person <= 0.5", {}, True),  # without a score it is 0
        ("person", {P: 0.51}, True),
        ("person", {P: 0.5}, False),
        ("not person", {P: 0.5}, True),
        ("red car > 0.2 and dog > 0.2", {C: 0.3, D: 0.3}, True),
        ("red car > 0.2 and dog > 0.2", {C: 0.3}, False),
        ("person or dog and animal", {P: 1.0}, True),  # `and` binds closer
        ("(person or dog) and animal", {P: 1.0}, False),
        ("not person and dog", {D: 1.0}, True),  # `not` binds closest
        ("not (person and dog)", {D: 1.0}, True),
        ("not not person", {P: 1.0}, True),
        ("'red car'>0.5", {C: 0.6}, True),
        ('"and" and boeing 747', {"and": 1.0, "boeing 747": 1.0}, True),
        ("wi-fi>0.5", {"wi-fi": 0.6}, True),
        ('"it\'s" and "a (b)"', {"it's": 1.0, "a (b)": 1.0}, True),
    ],
)
def test_conditions(text: str, scores: dict[str, float], holds: bool) -> None:
    assert bool(Rule.parse(text, NAMES).update("door", 0.0, scores)) == holds


@pytest.mark.parametrize(
    "text, seconds",
    [("2s", 2), ("0.5 s", 0.5), ("250ms", 0.25), ("2m", 120), ("2 min", 120), ("1.5h", 5400)],
)
def test_durations(text: str, seconds: float) -> None:
    assert Rule.parse(f"person for {text}", NAMES).duration == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text, marked, what",
    [
        ("", ">>>", "a label is expected"),
        ("cat > 0.5", ">>>cat > 0.5", "no label or group 'cat'"),
        ("person > 2", "person > >>>2", "0 to 1"),
        ("person > dog", "person > >>>dog", "a score is expected"),
        ("person > 0.5s", "person > >>>0.5s", "a score is expected"),
        ("person > -1", "person > >>>-1", "a score is expected"),
        ("person and", "person and>>>", "a label is expected"),
        ("(person", "(person>>>", r"a \) is missing"),
        ("person)", "person>>>)", "not expected"),
        ("person for", "person for>>>", "a time is expected"),
        ("person for 2", "person for >>>2", "one of the units"),
        ("person for 2 weeks", "person for >>>2 weeks", "one of the units"),
        ("person for 2s dog", "person for 2s >>>dog", "not expected"),
        ("person & dog", "person >>>& dog", "not understood"),
        ("'person", ">>>'person", "not understood"),
        ("person = 1", "person >>>= 1", "not understood"),
    ],
)
def test_errors_mark_the_place(text: str, marked: str, what: str) -> None:
    with pytest.raises(DataError, match=what) as raised:
        Rule.parse(text, NAMES)
    assert f"the rule {marked!r} cannot be read at >>>" in str(raised.value)


def test_a_rule_too_deep_is_refused() -> None:
    with pytest.raises(DataError, match="parentheses"):
        Rule.parse("(" * 5000 + "person" + ")" * 5000, NAMES)


def test_it_fires_once_it_was_true_for_so_long_and_is_cleared_by_the_first_other_frame() -> None:
    rule = Rule.parse("person > 0.5 for 2s", NAMES)
    scores = [0.9] * 15 + [0.1] + [0.9] * 30 + [0.1] * 10
    events = [e for n, s in enumerate(scores) for e in rule.update("door", n / 10, {P: s})]
    fired, cleared = events
    assert (fired.kind, fired.label, fired.source) == ("fired", "person > 0.5 for 2s", "door")
    assert (fired.time, fired.duration) == pytest.approx((3.6, 2.0))
    assert cleared.kind == "cleared"
    assert (cleared.time, cleared.duration) == pytest.approx((4.6, 3.0))
    assert not rule.fired and rule.end("door", 9.0) == []
