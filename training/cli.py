"""`edgeclip train`: a checkpoint from pictures with captions or labels.

The options are the fields of TrainOptions: the command is made from them.
"""

import dataclasses
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from .options import TrainOptions
from .search_cli import PARAMETERS, searched


def train(**chosen: Any) -> None:
    """Train or fine-tune a CLIP on your own pictures."""
    from runtime.label_sets import read_templates

    as_json, trials = chosen.pop("as_json"), chosen.pop("search")
    over = chosen.pop("search_over")
    chosen["templates"] = read_templates(chosen["templates"]) if chosen["templates"] else ()
    options = TrainOptions(**{**chosen, "mix": tuple(chosen["mix"] or ())})
    from .trainer import train as run

    if trials:
        if options.lock_image:  # what it says is computed once
            cache = options.cache or options.out.with_name(options.out.name + ".features")
            options = dataclasses.replace(options, cache=cache)
        config = _config(options)
        record = searched(
            options, trials, over, config, lambda own, told: run(own, quiet=True, told=told)
        )
    else:
        record = run(options, quiet=as_json)
    if is_first_process():
        print(json.dumps(record, indent=2) if as_json else f"wrote {options.out}")


def _config(options: TrainOptions) -> dict[str, Any]:
    """The config of a model that begins with random weights; empty for any other: its weights fit
    no other width."""
    if options.init or options.init_image or Path(options.model).expanduser().is_dir():
        return {}
    from .model import create

    return create(options.model).config


def is_first_process() -> bool:
    """Whether this process is the one that prints, where a run has several."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def signature(
    options: type, offered: Callable[[str], bool], *extra: inspect.Parameter
) -> inspect.Signature:
    """One parameter for each field that is `offered`: a list where the field is a tuple, as typer
    wants it. Then --json, and what is `extra`."""
    hints = get_type_hints(options, include_extras=True)
    parameters = []
    for field in inspect.signature(options).parameters.values():
        if not offered(field.name):
            continue
        hint, default = hints[field.name], field.default
        if get_origin(get_args(hint)[0]) is tuple:
            kind = get_args(get_args(hint)[0])[0]
            needed = default is inspect.Parameter.empty
            many: Any = list[kind] if needed else list[kind] | None  # type: ignore[valid-type]
            hint, default = Annotated[many, hint.__metadata__[0]], default if needed else None
        parameters.append(field.replace(annotation=hint, default=default))
    as_json = Annotated[
        bool, typer.Option("--json", help="Print the record as JSON, nothing else.")
    ]
    last = inspect.Parameter(
        "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=as_json
    )
    return inspect.Signature([*parameters, *extra, last])


def offer(command: Callable[..., Any], found: inspect.Signature) -> None:
    """Gives a command that takes any keyword the options of a signature."""
    command.__signature__ = found  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in found.parameters.values()}


offer(train, signature(TrainOptions, lambda _: True, *PARAMETERS))
