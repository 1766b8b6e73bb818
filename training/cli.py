"""`edgeclip train`: a checkpoint from pictures with captions or labels.

The options are the fields of TrainOptions: the command is made from them.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from runtime.errors import DataError

from .options import RUN, TrainOptions
from .search_space import SEARCHED

Trials = Annotated[
    int | None,
    typer.Option(
        "--search",
        help="Train so many times with other options; keep the best. OUT.search/search.png shows "
        "what mattered.",
        rich_help_panel=RUN,
    ),
]
Over = Annotated[
    str,
    typer.Option(
        "--search-over", help="What --search varies; width too, on demand.", rich_help_panel=RUN
    ),
]


def train(**chosen: Any) -> None:
    """Train or fine-tune a CLIP on your own pictures."""
    from runtime.label_sets import read_templates

    as_json, trials = chosen.pop("as_json"), chosen.pop("search")
    names = chosen.pop("search_over")
    chosen["templates"] = read_templates(chosen["templates"]) if chosen["templates"] else ()
    options = TrainOptions(**{**chosen, "mix": tuple(chosen["mix"] or ())})
    record = _searched(options, trials, names) if trials else _trained(options, as_json)
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":  # not the first process
        return
    print(json.dumps(record, indent=2) if as_json else f"wrote {options.out}")


def _trained(options: TrainOptions, quiet: bool) -> dict[str, Any]:
    from .trainer import train as run

    return run(options, quiet)


def _searched(options: TrainOptions, trials: int, names: str) -> dict[str, Any]:
    from .model import create
    from .search import Search
    from .search_space import check_names
    from .trainer import train as run

    if options.devices * options.nodes > 1:
        raise DataError("--search runs its trials on one device: leave out --devices and --nodes")
    starts = Path(options.model).expanduser().is_dir()
    search = Search(
        options,
        trials,
        check_names([name.strip() for name in names.split(",")]),
        {} if options.init or options.init_image or starts else create(options.model).config,
        lambda changed, told: run(changed, quiet=True, told=told),
    )
    return search.run()


def _signature() -> inspect.Signature:
    """One parameter for each field: a list where the field is a tuple, as typer wants it."""
    hints = get_type_hints(TrainOptions, include_extras=True)
    parameters = []
    for field in inspect.signature(TrainOptions).parameters.values():
        hint, default = hints[field.name], field.default
        if isinstance(default, tuple):
            hint, default = Annotated[list[str] | None, hint.__metadata__[0]], None
        parameters.append(field.replace(annotation=hint, default=default))
    as_json = Annotated[
        bool, typer.Option("--json", help="Print the record as JSON, nothing else.")
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    extra = [
        inspect.Parameter("search", keyword, default=None, annotation=Trials),
        inspect.Parameter("search_over", keyword, default=",".join(SEARCHED), annotation=Over),
        inspect.Parameter("as_json", keyword, default=False, annotation=as_json),
    ]
    return inspect.Signature([*parameters, *extra])


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {p.name: p.annotation for p in train.__signature__.parameters.values()}  # type: ignore[attr-defined]
