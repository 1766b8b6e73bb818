"""`edgeclip distill`: from a teacher and unlabelled pictures to a student, and on to its bundle.

The options are the fields of DistillOptions: the command is made from them.
"""

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from training.cli import is_first_process, offer, signature
from training.distill_options import DistillOptions, is_offered

Bundle = Annotated[
    Path | None,
    typer.Option(help="Also export the student there, calibrated on --images, and time it."),
]


def distill(**chosen: Any) -> None:
    """Distil a large CLIP into a small one, on your own pictures, without labels."""
    from runtime.label_sets import read_templates

    as_json, bundle = chosen.pop("as_json"), chosen.pop("bundle")
    chosen["templates"] = read_templates(chosen["templates"]) if chosen["templates"] else ()
    options = DistillOptions(**{**chosen, "images": tuple(chosen["images"] or ())})
    if bundle:
        from runtime.folders import check_target
        from runtime.manifest import NAME

        check_target(bundle.expanduser(), NAME, options.force)
    from training.distill import distill as run

    record = run(options, quiet=as_json)
    if not is_first_process():
        return
    if bundle:
        from .distilled_bundle import bundle_student

        record["bundle"] = bundle_student(options, bundle.expanduser(), quiet=as_json)
    print(json.dumps(record, indent=2) if as_json else f"wrote {options.out}")


_BUNDLE = inspect.Parameter(
    "bundle", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Bundle
)
offer(distill, signature(DistillOptions, is_offered, _BUNDLE))
