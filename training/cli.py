"""`edgeclip train`: a checkpoint from pictures with captions or labels.

The options are the fields of TrainOptions: the command is made from them.
"""

import inspect
import json
import os
from typing import Annotated, Any, get_type_hints

import typer

from .options import TrainOptions


def train(**chosen: Any) -> None:
    """Train or fine-tune a CLIP on your own pictures."""
    from runtime.label_sets import read_templates

    as_json = chosen.pop("as_json")
    chosen["templates"] = read_templates(chosen["templates"]) if chosen["templates"] else ()
    options = TrainOptions(**{**chosen, "mix": tuple(chosen["mix"] or ())})
    from .trainer import train as run

    record = run(options, quiet=as_json)
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":  # not the first process
        return
    print(json.dumps(record, indent=2) if as_json else f"wrote {options.out}")


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
    extra = inspect.Parameter(
        "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=as_json
    )
    return inspect.Signature([*parameters, extra])


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {p.name: p.annotation for p in train.__signature__.parameters.values()}  # type: ignore[attr-defined]
