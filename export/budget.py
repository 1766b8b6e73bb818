"""Students that are fast enough here, tried briefly: the best becomes the student."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from runtime.errors import DataError
from runtime.folders import check_target
from training.distill_options import DistillOptions
from training.model import CONFIG
from training.search import merit

from .tower_facts import facts, presets
from .tower_speed import fitting, measured

FOUND = "budget.json"
MOST_TRIED = 4
SHARE = 4  # a trial has the fourth part of the epochs
Distils = Callable[..., dict[str, Any]]


def check(chosen: Mapping[str, Any]) -> None:
    """Raises DataError for options that trials would be lost for."""
    if chosen["student"]:
        raise DataError("--budget-ms finds a student: leave out --student")
    if chosen["devices"] * chosen["nodes"] > 1:
        raise DataError("--budget-ms tries students on one device: leave out --devices and --nodes")
    if chosen["val"] is None and not chosen["held_out"]:
        raise DataError("--budget-ms compares students on held-out pictures: give --val")
    check_target(chosen["out"], CONFIG, chosen["force"] or chosen["resume"])


def proposed(budget_ms: float, backend: str, console: Console) -> list[str]:
    """The presets whose image encoder takes at most so many milliseconds on this backend here, of
    which the largest are tried; the most multiply-adds first. Raises DataError where there is none.
    """
    if not budget_ms > 0:
        raise DataError(f"--budget-ms is a time above 0, not {budget_ms:g}")
    with console.status("Measuring") as status:
        names = fitting(budget_ms, backend, presets(), status.update)[:MOST_TRIED]
        rows = [(name, facts(name), measured(name).ms) for name in names]
    for name, found, ms in rows:
        times = ", ".join(f"{k.partition(' ')[2]} {v:.2f} ms" for k, v in ms.items()
                          if k.startswith(backend))  # fmt: skip
        console.print(f"{name}: {found.multiply_adds / 1e6:,.0f} M multiply-adds; {times}")
    return names


def best_of(
    names: list[str], options: DistillOptions, distil: Distils, console: Console
) -> DistillOptions:
    """Distils into each of the students for a fourth of the epochs; `options` with the one that
    comes nearest to the teacher on held-out pictures. With --resume the one that was found before.
    """
    folder = options.out.with_name(options.out.name + ".budget")
    cache, known = options.cache or folder / "cache", folder / FOUND
    if options.resume and known.is_file():
        best = str(json.loads(known.read_text(encoding="utf-8"))["student"])
        return dataclasses.replace(options, student=best, cache=cache)
    epochs = max(1, options.epochs // SHARE)
    reached: dict[str, float] = {}
    for name in names if len(names) > 1 else ():
        out = folder / Path(name).stem
        trial = dataclasses.replace(
            options, student=name, out=out, cache=cache, epochs=epochs, force=True, resume=False
        )
        reached[name] = merit(distil(trial, quiet=True)["epochs"][-1])
        shutil.rmtree(out)
        console.print(f"{name} after {epochs} epochs: {reached[name]:.1%}")
    best = max(reached, key=lambda name: reached[name]) if reached else names[0]
    console.print(f"the student is {best}")
    folder.mkdir(parents=True, exist_ok=True)
    beside = known.with_name(f".{FOUND}")
    beside.write_text(json.dumps({"student": best, "reached": reached}), encoding="utf-8")
    beside.replace(known)
    return dataclasses.replace(options, student=best, cache=cache)
