"""`edgeclip distill`: from a teacher and unlabelled pictures to a student, and on to its bundle.

The options are the fields of DistillOptions: the command is made from them.
"""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from training.cli import is_first_process, offer, signature
from training.distill_options import DistillOptions, is_offered
from training.search_cli import PARAMETERS, searched

if TYPE_CHECKING:
    from rich.console import Console

Bundle = Annotated[
    Path | None,
    typer.Option(help="Also export the student there, calibrated on --images, and time it."),
]


Budget = Annotated[
    float | None,
    typer.Option(help="Instead of --student: try presets that take so many ms a frame here."),
]
Backend = Annotated[
    Literal["onnxruntime", "openvino"], typer.Option(help="What --budget-ms is measured on.")
]


def distill(**chosen: Any) -> None:
    """Distil a large CLIP into a small one, on your own pictures, without labels."""
    from rich.console import Console

    from runtime.label_sets import read_templates

    as_json, bundle = chosen.pop("as_json"), chosen.pop("bundle")
    budget, backend = chosen.pop("budget_ms"), chosen.pop("backend")
    trials, over = chosen.pop("search"), chosen.pop("search_over")
    console = Console(stderr=True, quiet=as_json, highlight=False, markup=False)
    chosen["templates"] = read_templates(chosen["templates"]) if chosen["templates"] else ()
    names = _students(chosen, budget, backend, console)
    options = DistillOptions(**{**chosen, "images": tuple(chosen["images"] or ())})
    if bundle:
        from runtime.folders import check_target
        from runtime.manifest import NAME

        check_target(bundle.expanduser(), NAME, options.force)
        _check_bundle(options, bundle)
    from training.distill import distill as run

    if names:
        from .budget import best_of

        options = best_of(names, options, run, console)
    if trials:  # they, and the bundle's report, ask the teacher once
        cache = options.cache or options.out.with_name(options.out.name + ".teacher")
        options = dataclasses.replace(options, cache=cache)
    record = None
    if bundle and options.resume and not trials:  # what was cut off may have been the export
        record = _finished(options)
    if record is None:
        record = _searched(options, trials, over) if trials else run(options, quiet=as_json)
    if not is_first_process():
        return
    if bundle:
        from .distilled_bundle import bundle_student

        record["bundle"] = bundle_student(options, bundle.expanduser(), quiet=as_json)
    print(json.dumps(record, indent=2) if as_json else f"wrote {options.out}")


def _check_bundle(options: DistillOptions, bundle: Path) -> None:
    """Raises DataError now, not after the training, for what cannot be exported: the teacher's text
    tower is the student's."""
    from runtime.errors import DataError
    from training.fake_quant import BITS
    from training.teacher import open_teacher

    from .towers import text_tower

    if bundle.expanduser().resolve() == options.out.resolve():
        raise DataError(f"--bundle {bundle} is where the student goes: name another folder")
    if options.qat and options.qat_bits != BITS:
        raise DataError(f"--bundle has int8: leave out --qat-bits {options.qat_bits}, or --bundle")
    if options.student_text is None:
        text_tower(open_teacher(options.teacher))


def _finished(options: DistillOptions) -> dict[str, Any] | None:
    """The record of this very run, if it has come to its end."""
    from training.distill import settled
    from training.model import RECORD
    from training.options import FREE_ON_RESUME
    from training.results import has_ended

    if not has_ended(options.out):
        return None
    record: dict[str, Any] = json.loads((options.out / RECORD).read_text(encoding="utf-8"))
    now = settled(options).describe()
    other = [k for k, v in now.items() if k not in FREE_ON_RESUME and record["options"].get(k) != v]
    return None if other else record


def _students(
    chosen: dict[str, Any], budget: float | None, backend: str, console: "Console"
) -> list[str]:
    """The students to try; the first is chosen for the while. Empty without --budget-ms."""
    if budget is None:
        return []
    from .budget import check, proposed

    check(chosen)
    names = proposed(budget, backend, console)
    chosen["student"] = names[0]
    return names


def _searched(options: DistillOptions, trials: int, over: str) -> dict[str, Any]:
    from training.distill import distill as run
    from training.model import create

    folder, named = Path(options.student).expanduser().is_dir(), ":" in options.student
    trained = folder or named or options.init_image is not None
    return searched(
        options,
        trials,
        over,
        {} if trained else create(options.student).config,
        lambda own, told: run(own, quiet=True, told=told),
        model_option="student",
    )


def _extra(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


_EXTRA = (
    _extra("bundle", None, Bundle),
    _extra("budget_ms", None, Budget),
    _extra("backend", "onnxruntime", Backend),
    *PARAMETERS,
)
offer(distill, signature(DistillOptions, is_offered, *_EXTRA))
