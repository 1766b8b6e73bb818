"""What a search may vary of a training, and between which bounds."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from runtime.errors import DataError

if TYPE_CHECKING:
    from optuna import Trial

SEARCHED = ("lr", "batch", "weight_decay", "warmup", "dropout")
"""What is varied by default; `width` on demand: narrower networks are other networks."""
ALL = (*SEARCHED, "width")
_HEAD = 64  # channels of an attention head, as open_clip has them
_SHARES = (1.0, 0.75, 0.5)  # widths of a transformer


class Searchable(Protocol):
    """What a search needs of the options of a training: a dataclass with these fields."""

    @property
    def out(self) -> Path: ...
    @property
    def is_compared(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def force(self) -> bool: ...
    @property
    def resume(self) -> bool: ...
    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    def describe(self) -> dict[str, Any]: ...


Options = TypeVar("Options", bound=Searchable)


def check_names(names: Collection[str]) -> tuple[str, ...]:
    """The names of what is to be varied. Raises DataError for one that is not in `ALL`."""
    wrong = [name for name in names if name not in ALL]
    if wrong or not names:
        raise DataError(f"a search varies {', '.join(ALL)}, not {', '.join(wrong) or 'nothing'}")
    return tuple(names)


def given(options: Searchable, config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The values that the options and the model's config have themselves: the first trial's.

    What the model does not have (dropout, another width) is left out: it is not varied. An empty
    `config` is that of weights which are there already.
    """
    values: dict[str, Any] = {
        "lr": options.lr,
        "batch": options.batch_size,
        "weight_decay": min(max(options.weight_decay, 1e-3), 1.0),
        "warmup": min(options.warmup, 0.5),
    }
    if _is_timm(config):
        values["dropout"] = min(float(config["vision_cfg"].get("timm_drop", 0.0)), 0.5)
    if widths(config):
        values["width"] = next(iter(widths(config)))
    return {name: values[name] for name in names if name in values}


def propose(
    trial: "Trial", options: Searchable, config: Mapping[str, Any], names: Collection[str]
) -> dict[str, Any]:
    """Asks the trial for a value of each name: the rate within a tenth and ten times the one that
    is given, the batch its half, itself or its double."""
    asks: dict[str, Callable[[], Any]] = {
        "lr": lambda: trial.suggest_float("lr", options.lr / 10, options.lr * 10, log=True),
        "batch": lambda: trial.suggest_categorical("batch", batches(options)),
        "weight_decay": lambda: trial.suggest_float("weight_decay", 1e-3, 1.0, log=True),
        "warmup": lambda: trial.suggest_float("warmup", 0.0, 0.5),
        "dropout": lambda: trial.suggest_float("dropout", 0.0, 0.5),
        "width": lambda: trial.suggest_categorical("width", list(widths(config))),
    }
    return {name: asks[name]() for name in given(options, config, names)}


def batches(options: Searchable) -> list[int]:
    """Half the batch, itself and its double."""
    size = options.batch_size
    return [size, max(size // 2, 2), size * 2]


def changed(options: Options, values: Mapping[str, Any], **more: Any) -> Options:
    """The options with the values that are fields of theirs, and with `more`."""
    fields = {"batch_size" if name == "batch" else name: value for name, value in values.items()}
    own = {name: value for name, value in fields.items() if hasattr(options, name)}
    made: Options = dataclasses.replace(cast(Any, options), **{**own, **more})
    return made


def write_config(config: Mapping[str, Any], values: Mapping[str, Any], path: Path) -> bool:
    """Writes the model's config with the dropout and width among `values`; False where there is
    neither, and nothing is written."""
    if not {"dropout", "width"} & set(values):
        return False
    made = copy.deepcopy(dict(config))
    if "dropout" in values:
        made["vision_cfg"]["timm_drop"] = values["dropout"]
    if "width" in values:
        made["vision_cfg"] |= widths(config)[values["width"]]
    path.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return True


def widths(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The widths of a model's image tower, its own first and then narrower ones, each with what it
    changes in `vision_cfg`: of a timm network those that timm has (mobilenetv2_100, _075, _050),
    of open_clip's transformer three quarters and a half. Empty where there is none but its own."""
    vision = config.get("vision_cfg", {})
    if _is_timm(config):
        return _timm_widths(vision["timm_model_name"])
    if not isinstance(vision.get("layers"), int) or "width" not in vision:
        return {}
    head = vision.get("head_width", _HEAD)
    found = {round(vision["width"] * share / head) * head for share in _SHARES} - {0}
    ordered = sorted(found, reverse=True)
    return {str(w): {"width": w} for w in ordered} if len(ordered) > 1 else {}


def _timm_widths(name: str) -> dict[str, dict[str, Any]]:
    import timm

    family, _, own = name.rpartition("_")
    if not re.fullmatch(r"\d{3}", own):
        family, own = name, "100"
    found = {own: name}
    for other in timm.list_models(f"{family}_*"):
        width = other.removeprefix(f"{family}_")
        if re.fullmatch(r"\d{3}", width) and int(width) < int(own):
            found[width] = other
    ordered = sorted(found, key=int, reverse=True)
    return {w: {"timm_model_name": found[w]} for w in ordered} if len(ordered) > 1 else {}


def _is_timm(config: Mapping[str, Any]) -> bool:
    return "timm_model_name" in config.get("vision_cfg", ())
