"""A source's past for a chart: when labels were there, and a few hundred points of their scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..history import Past

MOST_POINTS, MOST_CURVES, MOST_SPANS = 600, 8, 500


def past_json(
    past: Past | None, began: Mapping[tuple[str, bool], float], labels: Sequence[str]
) -> dict[str, Any]:
    """For JSON: the newest spans, with those that go on (`began`: when, by label and whether it is
    a rule), and the curves of those labels that scored best. May be called while frames come."""
    shown: dict[str, Any] = {"labels": labels, "start": 0.0, "end": 0.0, "spans": [], "curves": {}}
    if past is None:
        return shown
    shown |= {"start": round(past.start, 3), "end": round(past.end, 3)}
    over = list(past.spans)[-MOST_SPANS:]
    spans = [(span.label, span.start, span.end, span.rule, False) for span in over]
    spans += [(label, start, past.end, rule, True) for (label, rule), start in began.items()]
    shown["spans"] = [
        {
            "label": label,
            "start": round(start, 3),
            "end": round(end, 3),
            "rule": rule,
            "open": goes_on,
        }
        for label, start, end, rule, goes_on in spans
    ]
    shown["curves"] = _curves(past, frozenset(labels))
    return shown


def _curves(past: Past, labels: frozenset[str]) -> dict[str, list[list[float]]]:
    """The (time, score) of the labels with the highest peaks, in the last half hour."""
    samples = list(past.recent)
    samples = samples[:: -(-len(samples) // MOST_POINTS) or 1]
    curves: dict[str, list[list[float]]] = {}
    for time, names, values in samples:
        for name, value in zip(names, values.tolist(), strict=True):
            if name in labels:
                curves.setdefault(name, []).append([round(time, 3), round(value, 4)])
    best = sorted(curves, key=lambda name: -max(score for _, score in curves[name]))
    return {name: curves[name] for name in best[:MOST_CURVES]}
