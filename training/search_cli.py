"""`--search` of `edgeclip train` and `edgeclip distill`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from runtime.errors import DataError

from .options import RUN, TrainOptions
from .search_space import SEARCHED, check_names

_TRIALS = Annotated[
    int | None,
    typer.Option(
        "--search",
        help="Train so many times with other options; keep the best. OUT.search/search.png shows "
        "what mattered.",
        rich_help_panel=RUN,
    ),
]
_OVER = Annotated[
    str,
    typer.Option(
        "--search-over", help="What --search varies; width too, on demand.", rich_help_panel=RUN
    ),
]
PARAMETERS = (
    inspect.Parameter("search", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_TRIALS),
    inspect.Parameter(
        "search_over",
        inspect.Parameter.KEYWORD_ONLY,
        default=",".join(SEARCHED),
        annotation=_OVER,
    ),
)


def searched(
    options: TrainOptions,
    trials: int,
    over: str,
    config: Mapping[str, Any],
    train: Callable[[Any, Any], dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """Runs a search, and returns the record of the best trial; see `search.Search`."""
    from .search import Search

    if options.devices * options.nodes > 1:
        raise DataError("--search runs its trials on one device: leave out --devices and --nodes")
    names = check_names([name.strip() for name in over.split(",")])
    return Search(options, trials, names, config, train, **more).run()
