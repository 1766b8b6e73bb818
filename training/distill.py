"""Distils a small CLIP: a training run whose targets are the embeddings of a large one."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from runtime.label_sets import DEFAULT_TEMPLATES

from .devices import gather
from .distill_objective import DistillObjective
from .distill_options import DistillOptions
from .distill_prepare import DistillMaterial, prepare_distillation
from .distill_results import DistillResults
from .model import ClipModel, recorded
from .prepare import Material
from .trainer import Told, Training, nobody, run


def distill(options: DistillOptions, quiet: bool = False, told: Told = nobody) -> dict[str, Any]:
    """Distils and writes the checkpoint folder `options.out`; returns what training.json holds.

    States, checkpoints, interruption and errors are those of `trainer.train`. What the teacher says
    is kept in `options.cache`, or in `options.run`, and is never asked for twice.
    """
    return run(_Distillation, settled(options), quiet, told)


def settled(options: DistillOptions) -> DistillOptions:
    """`options` with templates: where none are given, those of the teacher."""
    folder = Path(options.teacher).expanduser()
    usual = recorded(folder)[1] if folder.is_dir() else DEFAULT_TEMPLATES
    return dataclasses.replace(options, templates=options.templates or usual)


class _Distillation(Training):
    """One distillation, from its first step or from a state to its end."""

    options: DistillOptions

    def _prepare(self) -> DistillMaterial:
        return prepare_distillation(self.options, self.fabric, self.console, not self._goes_on)

    def _objective(self, material: Material) -> DistillObjective:
        assert isinstance(material, DistillMaterial)
        bank = None if material.bank is None else torch.from_numpy(material.bank.rows)
        return DistillObjective(self.options, bank, gather)

    def _results(self, material: Material, shown: ClipModel) -> DistillResults:
        assert isinstance(material, DistillMaterial)
        return DistillResults(self.options, material, shown)
