"""`edgeclip distill`: a small CLIP that learns from a large one, on pictures without labels.

The options are the fields of DistillOptions: the command is made from them.
"""

import json
from typing import Any

from .cli import is_first_process
from .distill_options import DistillOptions


def distill(**chosen: Any) -> dict[str, Any]:
    """Distil a large CLIP into a small one, on your own pictures, without labels."""
    from runtime.label_sets import read_templates

    as_json = chosen.pop("as_json")
    chosen["templates"] = read_templates(chosen["templates"]) if chosen["templates"] else ()
    options = DistillOptions(**{**chosen, "images": tuple(chosen["images"] or ())})
    from .distill import distill as run

    record = run(options, quiet=as_json)
    if is_first_process():
        print(json.dumps(record, indent=2) if as_json else f"wrote {options.out}")
    return record
