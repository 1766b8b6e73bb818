"""`edgeclip train`: a checkpoint from pictures with captions or labels."""

import json
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli import Force, Templates


def train(
    data: Annotated[
        Path,
        typer.Argument(help="CSV (file,caption or file,label), or a folder <class>/<picture>."),
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    val: Annotated[Path | None, typer.Option(help="Validation data, like DATA.")] = None,
    model: Annotated[
        str, typer.Option(help="open_clip model, `nano`, a config (.json), or a checkpoint folder.")
    ] = "ViT-B-32",
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip weights tag to start from (default: random).")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json, for models that need their own.")
    ] = None,
    templates: Templates = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Pairs a step; larger contrasts more.")] = 128,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = 5e-4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.1,
    warmup: Annotated[float, typer.Option(help="Share of the steps with rising rate.")] = 0.1,
    grad_clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Seed of weights, order and captions.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first bad picture or row.")
    ] = False,
    force: Force = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record as JSON, nothing else.")
    ] = False,
) -> None:
    """Train or fine-tune a CLIP on your own pictures."""
    from runtime.prompts import DEFAULT_TEMPLATES, read_templates

    from .options import TrainOptions
    from .trainer import train as run

    options = TrainOptions(
        data=data,
        out=out,
        val=val,
        model=model,
        pretrained=pretrained,
        tokenizer=tokenizer,
        templates=read_templates(templates) if templates else DEFAULT_TEMPLATES,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        grad_clip=grad_clip,
        precision=precision,
        seed=seed,
        strict=strict,
        force=force,
    )
    record = run(options, quiet=as_json)
    print(json.dumps(record, indent=2) if as_json else f"wrote {out}")
