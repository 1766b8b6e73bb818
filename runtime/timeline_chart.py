"""A picture of labels over time: a row for each label, with its score as a curve and as a bar the
times at which it was there. Drawn with Pillow alone, so that it also works on a device."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from .history import History, Past, Span
from .look import Rgb, color_of, font_of, shortened, text_width

_GROUND, _INK, _PALE, _LINE = (255, 255, 255), (32, 38, 46), (112, 122, 134), (226, 230, 235)
_RULE: Rgb = (60, 66, 74)
_LEFT, _RIGHT, _ROW, _HEAD, _FOOT, _TEXT = 190, 120, 40, 58, 46, 15
_STEPS = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400)
MOST_ROWS = 12


def draw_timeline(
    history: History, labels: Sequence[str], notes: Mapping[str, str], width: int = 1200
) -> Image.Image:
    """The picture, `width` pixels wide and as high as it needs to be; a panel for each source, with
    a line of `notes` on it. Labels have the colours of their positions in `labels`."""
    colors = {label: color_of(n) for n, label in enumerate(labels)}
    panels = [(name, past, _rows(past)) for name, past in history.sources.items()]
    height = sum(_HEAD + _ROW * max(1, len(rows)) + _FOOT for _, _, rows in panels) or _HEAD
    # Twice as large, and halved at the end: Pillow draws shapes without smooth edges.
    picture = Image.new("RGB", (width * 2, height * 2), _GROUND)
    draw, top = ImageDraw.Draw(picture), 0
    for name, past, rows in panels:
        _Panel(draw, width, top, past, colors).draw(name, notes.get(name, ""), rows)
        top += _HEAD + _ROW * max(1, len(rows)) + _FOOT
    return picture.reduce(2)


def _rows(past: Past) -> list[tuple[str, bool]]:
    """The labels and rules that are shown: by how long they were there; where there is room labels
    that never came, by their highest score."""
    total: dict[tuple[str, bool], float] = {}
    for span in past.spans:
        row = (span.label, span.rule)
        total[row] = total.get(row, 0.0) + span.end - span.start
    rows = sorted(total, key=lambda row: (row[1], -total[row]))
    highest: dict[str, float] = {}
    for _, labels, values in past.samples:
        for label, value in zip(labels, values.tolist(), strict=True):
            highest[label] = max(highest.get(label, 0.0), value)
    others = [(label, False) for label in sorted(highest, key=lambda label: -highest[label])]
    rules = [row for row in rows if row[1]]
    found = [row for row in rows if not row[1]]
    found += [row for row in others if row not in total][: max(0, 5 - len(found))]
    return found[: MOST_ROWS - min(len(rules), 4)] + rules[:4]


class _Panel:
    """One source: where its times and rows lie in the picture."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, width: int, top: int, past: Past, colors: dict[str, Rgb]
    ) -> None:
        self._draw, self._past, self._colors = draw, past, colors
        self._width, self._top = width, top
        self._start, self._seconds = past.start, max(past.end - past.start, 1e-3)

    def draw(self, name: str, note: str, rows: Sequence[tuple[str, bool]]) -> None:
        """Draws a source's part of the picture: its name, its labels, and the axis of time."""
        room = self._width - 48
        self._text(24, self._top + 8, shortened(name, 20, room // 2), 20, _INK)
        note = shortened(note, _TEXT, room // 2 - 12)
        self._text(self._width - 24 - text_width(note, _TEXT), self._top + 12, note, _TEXT, _PALE)
        bottom = self._top + _HEAD + _ROW * max(1, len(rows))
        self._axis(self._top + _HEAD, bottom)
        for number, (label, rule) in enumerate(rows):
            self._row(label, rule, self._top + _HEAD + number * _ROW)

    def _row(self, label: str, rule: bool, y: int) -> None:
        color = _RULE if rule else self._colors.get(label, _PALE)
        spans = [s for s in self._past.spans if (s.label, s.rule) == (label, rule)]
        text = shortened(label, _TEXT, _LEFT - 36)
        self._text(24, y + 10, text, _TEXT, _INK if spans else _PALE)
        if not rule:
            self._curve(label, y, color)
        for span in spans:
            self._bar(span, y, color)
        total = sum(span.end - span.start for span in spans)
        share = f"{_clock(total)}   {total / self._seconds:.0%}" if spans else "-"
        x = self._width - 24 - text_width(share, _TEXT)
        self._text(x, y + 10, share, _TEXT, _INK if spans else _PALE)

    def _curve(self, label: str, y: int, color: Rgb) -> None:
        points = [
            (self._x(time) * 2, (y + _ROW - 5 - value * (_ROW - 10)) * 2)
            for time, value in self._past.curve(label)
        ]
        if len(points) > 1:
            floor = (y + _ROW - 5) * 2
            light = _mixed(color, 0.25)
            self._draw.polygon([(points[0][0], floor), *points, (points[-1][0], floor)], fill=light)

    def _bar(self, span: Span, y: int, color: Rgb) -> None:
        left = self._x(span.start)
        right = max(self._x(span.end), left + 2)
        box = left * 2, (y + _ROW - 14) * 2, right * 2, (y + _ROW - 5) * 2
        self._draw.rounded_rectangle(box, 6, fill=color)

    def _axis(self, top: int, bottom: int) -> None:
        room = self._width - _LEFT - _RIGHT
        step = next((s for s in _STEPS if self._seconds / s * 70 <= room), _STEPS[-1])
        for number in range(int(self._seconds / step + 1e-6) + 1):
            x = self._x(self._start + number * step)
            self._line(x, top, x, bottom + 4)
            text = _clock(number * step)
            self._text(x - text_width(text, 13) / 2, bottom + 8, text, 13, _PALE)
        self._line(_LEFT, bottom, self._width - _RIGHT, bottom)

    def _x(self, time: float) -> float:
        share = (time - self._start) / self._seconds
        return _LEFT + min(1.0, max(0.0, share)) * (self._width - _LEFT - _RIGHT)

    def _line(self, x: float, y: float, x2: float, y2: float) -> None:
        self._draw.line((x * 2, y * 2, x2 * 2, y2 * 2), fill=_LINE, width=2)

    def _text(self, x: float, y: float, text: str, size: int, color: Rgb) -> None:
        self._draw.text((x * 2, y * 2), text, fill=color, font=font_of(text, size * 2))


def _mixed(color: Rgb, share: float) -> Rgb:
    red, green, blue = (round(255 - (255 - part) * share) for part in color)
    return red, green, blue


def _clock(seconds: float) -> str:
    """12.5 s as 0:12.5, whole seconds without a fraction; hours as 1:02:03."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    text = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"
