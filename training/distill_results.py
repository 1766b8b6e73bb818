"""What a distillation reaches: the student held against its teacher, after each epoch and in the
report."""

from collections.abc import Mapping, Sequence
from typing import Any

from calibration.pairs import Bad
from calibration.sections import Report

from .distill_options import DistillOptions
from .distill_prepare import DistillMaterial
from .finetune import Figures
from .model import ClipModel
from .results import Results


class DistillResults(Results):
    """Compares and writes the student `shown`; otherwise as Results."""

    def __init__(
        self, options: DistillOptions, material: DistillMaterial, shown: ClipModel
    ) -> None:
        self._rivals = material.rivals
        super().__init__(options, material, shown)

    def _figures(self) -> Figures:
        return self._rivals.measure(self.shown, self.progress) if self._rivals else {}

    def _all_bad(self) -> tuple[Bad, ...]:
        return (*self.bad.values(), *(self._rivals.bad if self._rivals else ()))

    def _report(self, steps: Sequence[Mapping[str, float]], points: Sequence[Figures]) -> Report:
        options = self.options
        assert isinstance(options, DistillOptions)
        compared = self._rivals.compare(self.shown, self.progress) if self._rivals else None
        held_out = f"{options.held_out:.0%} of the pictures, held out"
        if compared:
            self.record["against"] = {"sizes": compared.sizes, "cosines": compared.cosines}
        return Report(
            title=f"{self.shown.name} distilled from {options.teacher}",
            about={
                "student": self.shown.name,
                "teacher": options.teacher,
                "start": self.record["start"],
                "pictures to learn from": options.data,
                "text tower": _text_tower(options.student_text, self.record["data"][0]),
                "prompt bank": options.labels or "none: there were no --labels",
                "weights": self._weights(),
                "compared on": str(options.val or (held_out if compared else "nothing")),
            },
            evaluation=self._rivals.student if self._rivals else None,
            history=self.record["epochs"],
            steps=steps,
            bad=self._all_bad(),
            more=[compared] if compared else [],
        )


def _text_tower(wanted: str | None, about: Mapping[str, Any]) -> str:
    """Whose it is, in words."""
    if wanted is None:
        return "the teacher's"
    texts = about["texts"]
    return (
        f"its own ({wanted}), learned from {texts['learned']:,} texts and compared on "
        f"{texts['compared']:,} {'others' if texts['held_out'] else 'of them'}"
    )
