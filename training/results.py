"""What a run reaches, epoch by epoch: figures, the checkpoint folder, and its report."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from rich.progress import Progress
from torch import Tensor

from calibration.evaluation import Evaluation
from calibration.pairs import Bad, Pairs, count
from calibration.report import write_report
from calibration.sections import Report
from runtime.errors import DataError
from runtime.folders import new_folder

from .finetune import Figures, Guard, curve, mix, mixture_fails, no_epoch_holds
from .heldout import HeldOut
from .model import CONFIG, RECORD, WEIGHTS, ClipModel, save
from .options import TrainOptions
from .prepare import Material, describe
from .qat import set_steps
from .quantization import read_quantization

REPORT = "report"
ENDED = "ended"
_PACKAGES = ("edgeclip", "torch", "open_clip_torch", "timm", "lightning-fabric", "numpy")


def has_ended(folder: Path) -> bool:
    """Whether a checkpoint folder is of a run that came to its end."""
    try:
        return bool(json.loads((folder / RECORD).read_text(encoding="utf-8")).get(ENDED))
    except (OSError, ValueError, AttributeError):
        return False


class Results:
    """Evaluates and writes the model `shown`: the trained one, or its average.

    `record` becomes training.json; `bad` are the items that could not be used, by name.
    """

    def __init__(self, options: TrainOptions, material: Material, shown: ClipModel) -> None:
        self.options, self._material, self.shown = options, material, shown
        self.progress = Progress(disable=True)
        self._val = HeldOut(options.val, options, shown.image) if options.val else None
        self._guarded = HeldOut(options.guard, options, shown.image) if options.guard else None
        if self._guarded and self._guarded.pairs.targets is None:
            raise DataError(f"--guard {options.guard} has captions: it takes labels")
        if options.wise_ft is not None and shown.fresh:
            raise DataError(
                "--wise-ft mixes with the start: give all of the model one by --init; random is "
                f"{min(shown.fresh)}"
            )
        self._start: dict[str, Tensor] = {}
        if options.wise_ft is not None:
            self._start = {k: v.cpu().clone() for k, v in shown.model.state_dict().items()}
        self._replaces = options.force or options.resume
        self._guard: Guard | None = None
        self.record = self._new_record()
        self.bad: dict[str, Bad] = {}
        for source in material.sources:
            self.bad |= {bad.item: bad for bad in getattr(source, "pairs", _NONE).bad}

    def begin(self) -> None:
        """Measures the start on the guard's data, if there is a guard."""
        if self._guarded and "guard_start" not in self.record:
            self.record["guard_start"] = self._guard_top1()
        if self._guarded:
            self._guard = Guard(self.record["guard_start"], self.options.guard_drop)

    def resume(self, record: dict[str, Any], bad: Sequence[Sequence[Any]]) -> None:
        """Takes up the record and the bad items of a run that goes on."""
        self.record |= {k: v for k, v in record.items() if k not in ("options", "versions")}
        self.bad = {name: Bad(name, *more) for name, *more in bad}

    def epoch(self, weights: Mapping[str, Tensor], figures: dict[str, Any]) -> bool:
        """Evaluates an epoch's weights and writes the checkpoint; `figures` go into the record.

        Returns False where the guard does not hold, and goes back to the epoch before. Where there
        is none it raises GateFailed; with --wise-ft the mixture decides.
        """
        self.shown.model.load_state_dict(weights)
        figures |= self._figures()
        first = not self.record["epochs"]
        self.record["epochs"].append(figures)
        if self._guard and not self._guard.holds(figures["guard_top1"]):
            if not first:
                self._go_back()
            elif self.options.wise_ft is None:
                raise no_epoch_holds(self._guard, figures["guard_top1"])
            self.record["stopped_by_guard"] = True
            return False
        with new_folder(self.options.out, CONFIG, self._replaces or not first) as folder:
            self._save(folder)
        return True

    def _go_back(self) -> None:
        """Leaves in `shown` what the checkpoint of the epoch before has."""
        folder = self.options.out
        kept = safetensors.torch.load_file(folder / WEIGHTS)
        self.shown.model.load_state_dict(kept, strict=not self.options.qat)
        if ranges := read_quantization(folder, folder / WEIGHTS):
            set_steps(self.shown, ranges.input_steps)

    def finish(self, steps: Sequence[Mapping[str, float]]) -> None:
        """Mixes with the start, if asked, and writes the last checkpoint with its report."""
        points = self._mixed() if self.options.wise_ft is not None else []
        self.record |= {"bad": count(self._all_bad()), ENDED: True}
        with new_folder(self.options.out, CONFIG, True) as folder:
            self._save(folder)
            (folder / REPORT).mkdir()
            write_report(folder / REPORT, self._report(steps, points))

    def _mixed(self) -> list[Figures]:
        """Leaves the mixture that --wise-ft names in `shown`; returns the curve of all."""
        trained = {k: v.detach().clone() for k, v in self.shown.model.state_dict().items()}

        def measure(weights: dict[str, Tensor]) -> Figures:
            self.shown.model.load_state_dict(weights)
            return self._figures()

        points = curve(self._start, trained, measure) if self._val or self._guarded else []
        alpha = self.options.wise_ft
        assert alpha is not None
        self.record["wise_ft"] = {"alpha": alpha, "curve": points}
        self.shown.model.load_state_dict(mix(self._start, trained, alpha))
        if self._guard and not self._guard.holds(top1 := self._guard_top1()):
            raise mixture_fails(self._guard, top1, points)
        return [point for point in points if len(point) > 1]  # a tiny --val gives no figure

    def _figures(self) -> Figures:
        figures: Figures = {}
        if self._val:
            figures |= self._evaluate(self._val).figures
        if self._guarded:
            figures["guard_top1"] = self._guard_top1()
        return figures

    def _guard_top1(self) -> float:
        assert self._guarded
        return self._evaluate(self._guarded).figures["top1"]

    def _evaluate(self, data: HeldOut) -> Evaluation:
        return data.evaluate(self.shown, self._material.tokenizer, self.progress)

    def _all_bad(self) -> tuple[Bad, ...]:
        """What could not be used, in training and to measure it."""
        held_out = [bad for data in (self._val, self._guarded) if data for bad in data.bad]
        return (*self.bad.values(), *held_out)

    def _save(self, folder: Path) -> None:
        save(self.shown, folder, self.record)
        if self.shown.config["text_cfg"].get("hf_tokenizer_name"):
            (folder / "tokenizer.json").write_bytes(self._material.tokenizer_json)

    def _report(self, steps: Sequence[Mapping[str, float]], points: Sequence[Figures]) -> Report:
        options = self.options
        return Report(
            title=f"{self.shown.name} trained on {Path(options.data).name}",
            about={
                "model": self.shown.name,
                "start": self.record["start"],
                "data": ", ".join([options.data, *options.mix]),
                "weights": self._weights(),
                "evaluated on": str(options.val or "nothing: there was no --val"),
            },
            evaluation=self._evaluate(self._val) if self._val else None,
            history=self.record["epochs"],
            steps=steps,
            wise_ft=points,
            bad=self._all_bad(),
        )

    def _weights(self) -> str:
        """Which weights the checkpoint has, in words."""
        ended = bool(self.record.get("stopped_by_guard"))
        words = f"of epoch {len(self.record['epochs']) - ended}"
        if ended:
            words += f"; the next one lost more than --guard-drop {self.options.guard_drop:g}"
        if self.options.ema:
            words += "; averaged (--ema)"
        if self.options.qat:
            words += f"; measured as int{self.options.qat_bits} (--qat)"
        if self.options.wise_ft is not None:
            words += f"; mixed with the start, alpha {self.options.wise_ft:g}"
        return words

    def _new_record(self) -> dict[str, Any]:
        return {
            "model": self.shown.name,
            "options": self.options.describe(),
            "start": self.shown.source,
            "data": self._material.data,
            "val": None if self._val is None else describe(str(self.options.val), self._val.pairs),
            "guard": self._guarded and describe(str(self.options.guard), self._guarded.pairs),
            "versions": {name: _version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "seconds": 0.0,
            "epochs": [],
        }


_NONE = Pairs((), (), ())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
