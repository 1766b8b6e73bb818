"""Trains a CLIP: step by step, with a state to go on from and a checkpoint after every epoch."""

import contextlib
import copy
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console

from calibration.pairs import Bad, check_bad
from runtime.errors import DataError
from runtime.folders import check_target

from .batches import Batch, PairBatches, loader
from .devices import First, gather, gather_objects, make_fabric
from .distill_objective import DistillObjective
from .interrupts import Interrupts
from .log import RunLog
from .model import CONFIG, ClipModel
from .objective import Objective
from .options import FREE_ON_RESUME, TrainOptions
from .prepare import Material, prepare
from .qat import fake_quantize
from .qat_ranges import CALIBRATION, calibrate
from .results import Results, has_ended
from .rows import TableRows
from .run import Run
from .shards import Shards
from .start import settled
from .state import NAME, load_state, save_state

Told = Callable[[Mapping[str, Any]], None]
"""Is told of each epoch's figures; what it raises ends the training."""


def nobody(figures: Mapping[str, Any]) -> None:
    """Nobody is told."""


def train(
    options: TrainOptions,
    quiet: bool = False,
    told: Told = nobody,
) -> dict[str, Any]:
    """Trains and writes the checkpoint folder `options.out`; returns what training.json holds.
    `told` is told of each epoch's figures, in the first process.

    After each epoch the folder is whole and of that epoch. Every `checkpoint_every` steps, and
    when it is interrupted, the run leaves its state in `options.run`, to go on by `resume`.
    Raises DataError for data or options that do not work, GateFailed where the guard fails.
    """
    return run(Training, settled(options), quiet, told)


def run(kind: type["Training"], options: TrainOptions, quiet: bool, told: Told) -> dict[str, Any]:
    """Begins a run of some kind, or goes on with it; returns its record."""
    state = _state(options)
    if state:
        _require_same(options, json.loads(state["record"])["options"], FREE_ON_RESUME)
    fabric = make_fabric(options)
    _require_shared(options, state)
    console = Console(stderr=True, quiet=quiet or not fabric.is_global_zero)
    if options.resume and not state:
        console.print(f"there is no state in {options.run} yet: the run begins")
    with torch.random.fork_rng(devices=[]):
        return kind(options, fabric, console, state, told).fit()


def _state(options: TrainOptions) -> dict[str, Any] | None:
    """The state to go on from; None where the run is to begin. Raises DataError where it is not
    clear which."""
    unfinished = (options.run / NAME).is_file()
    if unfinished and options.resume:
        return load_state(options.run)
    if unfinished and not options.force:
        raise DataError(
            f"{options.run} holds a run that did not end: go on with it by --resume, or start "
            "anew by --force"
        )
    if options.resume and not options.force and has_ended(options.out):
        raise DataError(f"--resume: the run of {options.out} has ended; --force trains anew")
    going_on = options.resume and options.run.is_dir()
    check_target(options.out, CONFIG, options.force or going_on)
    return None


def _require_same(options: TrainOptions, before: Mapping[str, Any], free: Collection[str]) -> None:
    """Raises DataError where the run that is gone on with had another option."""
    for name, value in options.describe().items():
        mixes = name == "wise_ft" and None not in (value, before.get(name))  # in the end alone
        if name not in free and not mixes and before.get(name) != value:
            flag = "--" + name.replace("_", "-")
            was = before.get(name)
            raise DataError(f"--resume: {flag} was {was}, and is {value} now; it must stay")


def _require_shared(options: TrainOptions, state: Mapping[str, Any] | None) -> None:
    """Raises DataError where the processes do not find the same state: OUT is not shared."""
    if len(set(gather_objects(state["step"] if state else None))) > 1:
        raise DataError(
            f"--resume: the machines have different states in {options.run}: OUT must be in a "
            "folder that all of them share"
        )


class Training:
    """One run, from its first step or from `state` to its end. What is learned, and what becomes of
    it, is in `_prepare`, `_objective` and `_results`."""

    def __init__(
        self,
        options: TrainOptions,
        fabric: Fabric,
        console: Console,
        state: dict[str, Any] | None,
        told: Told,
    ) -> None:
        self.options, self.fabric, self.console = options, fabric, console
        self._told, self._goes_on = told, state is not None
        self.first = First(fabric)  # it computes what the others then find on the disk
        material = self.first(self._prepare) or self._prepare()
        self.plan, clip = material.plan, material.clip
        sharded = options.strategy == "fsdp" and fabric.world_size > 1
        whole = copy.deepcopy(clip.model) if sharded else clip.model
        self.batches = PairBatches(
            material.sources,
            material.plan,
            material.maker,
            options.epochs,
            fabric.global_rank,
            fabric.world_size,
        )
        if options.qat:
            self._fake_quantize(clip, calibrated=state is not None)
        total = self.plan.batches * options.epochs
        self.run = Run(fabric, clip, material.towers, options, total, self._objective(material))
        if sharded and fabric.is_global_zero:
            whole.to(fabric.device)  # to be evaluated there
        if self.run.ema:
            whole = self.run.ema.module.model
        self.results = self._results(material, dataclasses.replace(clip, model=whole))
        self._items = sum(map(_size, material.sources)) + len(self.results.bad)
        self._losses: list[float] = []
        self._began = time.perf_counter()
        if state:
            self._take_up(state)

    def _prepare(self) -> Material:
        return prepare(self.options, self.fabric, self.console)

    def _objective(self, material: Material) -> Objective | DistillObjective:
        return Objective(self.options, material.clip, self.batches.most, gather)

    def _results(self, material: Material, shown: ClipModel) -> Results:
        return Results(self.options, material, shown)

    def _fake_quantize(self, clip: ClipModel, calibrated: bool) -> None:
        """Has the image tower compute as its int8 will; the state to go on from has the ranges."""
        fake_quantize(clip, self.options.qat_bits)
        if calibrated:
            return
        with self.console.status("Finding the ranges of the activations"):
            first = itertools.islice(loader(self.batches, self.options.workers), CALIBRATION)
            calibrate(clip, (batch.images for batch in first))

    def fit(self) -> dict[str, Any]:
        """Trains to the end, and writes the report."""
        self.first(self.results.begin)
        with contextlib.ExitStack() as stack:
            log = None
            if self.fabric.is_global_zero:
                log = stack.enter_context(self._log())
                self.results.progress = log.progress
            self._steps(log)
            self.first(lambda: self._finish(log))
        return self.results.record

    def _finish(self, log: RunLog | None) -> None:
        assert log
        self.results.record["seconds"] += round(time.perf_counter() - self._began, 1)
        self.results.finish(log.rows)
        (self.options.run / NAME).unlink(missing_ok=True)

    def _log(self) -> RunLog:
        run, options = self.run, self.options
        return RunLog(options.run, run.number, run.total, options.epochs, self.console)

    def _steps(self, log: RunLog | None) -> None:
        run, every = self.run, self.options.checkpoint_every
        batches = dataclasses.replace(
            self.batches, start=run.number, known_bad=frozenset(self.results.bad)
        )
        with Interrupts(self.fabric.world_size == 1) as interrupts:
            for batch in loader(batches, self.options.workers):
                self._step(batch, log)
                epoch_ends = run.number % self.plan.batches == 0
                if epoch_ends and not self._end_epoch(log):
                    return
                if epoch_ends or run.number % every == 0 or interrupts.asked:
                    self._save()
                if interrupts.asked:
                    where = f"{self.options.run}; go on with it by --resume"
                    self.console.print(f"the state at step {run.number} is in {where}")
                    interrupts.leave()

    def _step(self, batch: Batch, log: RunLog | None) -> None:
        if batch.bad:
            self._note_bad(batch.bad)
        figures = self.run.advance(batch)
        self._losses.append(figures["loss"])
        if log:
            epoch = (self.run.number - 1) // self.plan.batches
            log.step(self.run.number, epoch, self.plan.batch_size, figures)

    def _note_bad(self, items: Iterable[Bad]) -> None:
        known = self.results.bad
        known |= {bad.item: bad for bad in items}
        seen = self.run.number * self.plan.batch_size
        total = max(self._items, seen)  # shards with --epoch-size hold more than an epoch
        check_bad(tuple(known.values()), total, self.options.max_bad, self.options.data)

    def _share_bad(self) -> None:
        """Tells every process what the others could not use: who goes on needs to know it."""
        for items in gather_objects(tuple(self.results.bad.values())):
            self._note_bad(items)

    def _end_epoch(self, log: RunLog | None) -> bool:
        """Evaluates the epoch and writes its checkpoint; whether the run goes on."""
        self._share_bad()
        weights = self.run.weights()
        figures: dict[str, Any] = {
            "epoch": self.run.number // self.plan.batches,
            "loss": sum(self._losses) / len(self._losses),
            "logit_scale": 1 / self.run.temperature(),
        }
        go_on = self.first(lambda: self.results.epoch(weights, figures))
        go_on = bool(self.fabric.broadcast(go_on))
        if log:
            log.epoch(self.run.number, figures)
            if go_on:  # else the run goes back to the epoch before
                self._told(figures)
            else:
                log.say("--guard: that lost too much of what the start could; the run ends here")
        self._losses.clear()
        return go_on

    def _save(self) -> None:
        self._share_bad()
        state = self.run.state()
        now = time.perf_counter()
        record = self.results.record
        record["seconds"] += round(now - self._began, 1)
        self._began = now
        story = {
            "record": json.dumps(record),
            "bad": [list(bad) for bad in self.results.bad.values()],
            "losses": self._losses,
        }
        self.first(lambda: save_state(self.options.run, state | story))

    def _take_up(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. Raises DataError where the run is another one."""
        before, now = json.loads(state["record"]), self.results.record
        shards = any(isinstance(source, Shards) for source in self.batches.sources)
        free = [name for name in FREE_ON_RESUME if not (name == "workers" and shards)]
        _require_same(self.options, before["options"], free)
        if any(before.get(name) != now[name] for name in ("data", "val", "guard")):
            raise DataError("--resume: the data are not those that the run began with")
        self.run.load_state(state)
        self.results.resume(before, state["bad"])
        self._losses = list(state["losses"])
        weights = self.run.weights()
        if self.fabric.is_global_zero:  # sharded weights are gathered there alone
            self.results.shown.model.load_state_dict(weights)


def _size(source: TableRows | Shards) -> int:
    return source.samples if isinstance(source, Shards) else len(source.pairs)
