"""Searches the options of a training: trials that do badly end early, the best one stays.

Optuna proposes the values (TPE, Bergstra et al. 2011) and ends a trial whose figure after an epoch
is below the median of the others at that epoch. Everything is in the folder OUT.search: the study
(`study.db`), each trial's log, `search.json`, and `search.png`, which shows what mattered.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from sqlalchemy.engine import URL

from runtime.errors import DataError, EdgeClipError
from runtime.folders import check_target, new_folder

from .model import CONFIG, RECORD
from .search_chart import chart
from .search_space import Options, changed, given, propose, write_config
from .state import NAME as STATE
from .trainer import Told

STUDY = "study.db"
_UNSEEN_FIRST = 3  # trials that are never ended early: there is no median before
_ERROR = "error"  # what made a trial fail
_TO_TELL = 5  # trials, for a word on what mattered
_FREE = ("force", "resume", "workers", "cache", "out")  # what may differ where a search goes on


@dataclass(frozen=True)
class Search(Generic[Options]):
    """A search over `trials` trainings with `options`, which write to `options.out`.

    `train` trains with options and tells of each epoch; `config` is the model's, empty where it
    begins from weights that fit no other. `names` are of `search_space.ALL`. The first trial is of
    the options as they are: no result is worse than theirs.
    """

    options: Options
    trials: int
    names: tuple[str, ...]
    config: Mapping[str, Any]
    train: Callable[[Options, Told], dict[str, Any]]
    model_option: str = "model"
    """The option that takes a model's config."""
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def run(self) -> dict[str, Any]:
        """Runs what is left of the trials; leaves the best one's checkpoint in `options.out`, and
        returns its record with the search's result in it.

        Raises DataError where the options cannot be searched, or the folder holds another search.
        """
        options = self.options
        check_target(options.out, CONFIG, options.force or self._goes_on)
        varied = list(given(options, self.config, self.names))
        if not varied:
            raise DataError(
                f"a search over {', '.join(self.names)} varies nothing: this model begins with "
                "weights that are there, or has none of that"
            )
        self._begin()
        self.console.print(f"the search varies {', '.join(varied)}")
        with self._study() as study:
            while (ended := len(_ended(study)) + len(_failed(study))) < self.trials:
                self.console.print(f"trial {ended + 1} of {self.trials}")
                self._trial(study, study.ask())
            return self._finish(study)

    @property
    def folder(self) -> Path:
        """The folder beside `out` for what belongs to the search."""
        out = self.options.out
        return out.with_name(out.name + ".search")

    @property
    def _goes_on(self) -> bool:
        return self.options.resume and (self.folder / STUDY).is_file()

    def _begin(self) -> None:
        options = self.options
        if not options.is_compared:
            raise DataError("--search compares trials on held-out data: give them by --val")
        if self.trials < 1:
            raise DataError(f"--search takes a number of trials of 1 or more, not {self.trials}")
        if self.folder.exists() and not options.resume:
            if not options.force:
                raise DataError(
                    f"{self.folder} holds a search: go on with it by --resume, or start anew by "
                    "--force"
                )
            check_target(self.folder, STUDY, overwrite=True)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _study(self) -> Iterator[optuna.Study]:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = URL.create("sqlite", database=str(self.folder / STUDY))
        storage = optuna.storages.RDBStorage(url.render_as_string())
        try:
            study = optuna.create_study(
                storage=storage,
                study_name="search",
                direction="maximize",
                # Rates that rise slowly look bad at first: the first half is never the last.
                pruner=optuna.pruners.MedianPruner(_UNSEEN_FIRST, (self.options.epochs + 1) // 2),
                load_if_exists=True,
            )
            self._check_same(study)
            self._take_up(study)
            # Other proposals after a --resume than those that were made before.
            seed = self.options.seed + len(study.trials)
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
            yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def _check_same(self, study: optuna.Study) -> None:
        described = self.options.describe()
        now = {name: value for name, value in described.items() if name not in _FREE}
        now |= {"search": list(self.names), "config": dict(self.config)}
        before = study.user_attrs.get("options")
        if before is None:
            study.set_user_attr("options", now)
            study.enqueue_trial(given(self.options, self.config, self.names))
        elif wrong := [name for name in now if before.get(name) != now[name]]:
            raise DataError(
                f"--resume: the search in {self.folder} is another one: {', '.join(wrong)} must "
                "stay as it was"
            )

    def _take_up(self, study: optuna.Study) -> None:
        """What was under way when the search was ended is tried again."""
        for trial in study.trials:
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params, skip_if_exists=False)

    def _trial(self, study: optuna.Study, trial: optuna.Trial) -> None:
        values = propose(trial, self.options, self.config, self.names)
        out = self.folder / f"trial-{trial.number:03}"
        changes: dict[str, Any] = {"out": out, "force": True, "resume": False}
        config = self.folder / f"model-{trial.number:03}.json"
        if write_config(self.config, values, config):
            changes[self.model_option] = str(config)
        self.console.print("  " + ", ".join(f"{k} {_shown(v)}" for k, v in values.items()))
        epochs = _Epochs(trial)
        try:
            self.train(changed(self.options, values, **changes), epochs)
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
            self.console.print(f"  ended after epoch {epochs.number}: {epochs.best:.1%}")
            self._remove(trial.number)
        except (EdgeClipError, torch.OutOfMemoryError) as error:
            if not _ended(study):  # the options as they are
                raise
            trial.set_user_attr(_ERROR, str(error))
            study.tell(trial, state=TrialState.FAIL)
            self.console.print(f"  failed: {error}")
            self._remove(trial.number)
        else:
            study.tell(trial, epochs.last)
            self.console.print(f"  {epochs.last:.1%}")
            self._keep_best(study)

    def _keep_best(self, study: optuna.Study) -> None:
        """Checkpoints of all but the best trial are removed; their logs stay."""
        for trial in study.trials:
            if trial.number != study.best_trial.number:
                self._remove(trial.number)

    def _remove(self, number: int) -> None:
        """Removes the weights of a trial, and the state that one which did not end has left."""
        out = self.folder / f"trial-{number:03}"
        shutil.rmtree(out, ignore_errors=True)
        out.with_name(f"{out.name}.run").joinpath(STATE).unlink(missing_ok=True)

    def _finish(self, study: optuna.Study) -> dict[str, Any]:
        best = self.folder / f"trial-{study.best_trial.number:03}"
        result = _result(study)
        text = json.dumps(result, indent=2, ensure_ascii=False)
        (self.folder / "search.json").write_text(text + "\n", encoding="utf-8")
        chart(result).savefig(self.folder / "search.png")
        record: dict[str, Any] = json.loads((best / RECORD).read_text(encoding="utf-8"))
        record["options"]["out"] = str(self.options.out)
        record["search"] = result
        overwrite = self.options.force or self.options.resume
        with new_folder(self.options.out, CONFIG, overwrite) as folder:
            shutil.copytree(best, folder, dirs_exist_ok=True)
            text = json.dumps(record, indent=2, ensure_ascii=False)
            (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        return record


class _Epochs:
    """Tells Optuna what a trial reaches, and ends the trial where that is too little."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial
        self.number, self.last, self.best = 0, 0.0, 0.0

    def __call__(self, figures: Mapping[str, Any]) -> None:
        self.number += 1
        self.last = merit(figures)
        self.best = max(self.best, self.last)
        self._trial.report(self.last, self.number)
        if self._trial.should_prune():
            raise optuna.TrialPruned


def merit(figures: Mapping[str, Any]) -> float:
    """What trainings are compared by: on captions the mean of both R@10, of R@5 or R@1 where there
    are too few; top-1 on labels; else how often a student agrees with its teacher, or how near its
    embeddings are. Raises DataError where there is nothing of that."""
    for k in (10, 5, 1):
        both = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image")]
        if all(name in figures for name in both):
            return sum(float(figures[name]) for name in both) / 2
    for name in ("top1", "agreement", "teacher_cosine"):
        if name in figures:
            return float(figures[name])
    raise DataError("--val has too little to compare trainings on")


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def _failed(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that their options have made fail; not those that were interrupted."""
    return [t for t in study.trials if _ERROR in t.user_attrs]


def _result(study: optuna.Study) -> dict[str, Any]:
    """The search for JSON: its trials, the best one, and how much each option mattered."""
    return {
        "best": study.best_trial.number,
        "reached": study.best_value,
        "values": study.best_params,
        "importance": _importance(study),
        "trials": [_described(trial) for trial in _ended(study)],
        "failed": [
            {"number": t.number, "values": t.params, "error": t.user_attrs[_ERROR]}
            for t in _failed(study)
        ],
    }


def _described(trial: FrozenTrial) -> dict[str, Any]:
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    return {
        "number": trial.number,
        "values": trial.params,
        "epochs": [round(value, 6) for _, value in sorted(trial.intermediate_values.items())],
        "ended_early": trial.state == TrialState.PRUNED,
        "seconds": round(seconds, 1),
    }


def _importance(study: optuna.Study) -> dict[str, float]:
    """The share of each option in how the figures differ (fANOVA, Hutter et al. 2014) at the last
    epoch that all trials have reached; empty where there are too few, or all are the same."""
    ended = _ended(study)
    epoch = min((max(trial.intermediate_values) for trial in ended), default=0)
    reached = [(trial, trial.intermediate_values[epoch]) for trial in ended]
    if len(reached) < _TO_TELL or len({figure for _, figure in reached}) == 1:
        return {}
    whole = optuna.create_study(direction="maximize")
    for trial, figure in reached:
        whole.add_trial(
            optuna.trial.create_trial(
                value=figure, params=trial.params, distributions=trial.distributions
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(whole, evaluator=evaluator)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
