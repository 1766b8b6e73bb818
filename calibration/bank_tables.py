"""What `edgeclip prompts` shows of prompt banks: as JSON, and as tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from runtime.bank_store import is_bound
from runtime.bundle import Bundle
from runtime.label_sets import Label
from runtime.prompts import PromptBank

from .bank_fit import BankFit
from .confusable import Pair


def summary(bundle: Bundle, name: str, bank: PromptBank) -> dict[str, Any]:
    """A bank in one JSON object. `bound` is false for one that another text encoder made."""
    known = bank.made_of
    return {
        "name": name,
        "labels": len(bank.labels),
        "groups": len(known.groups),
        "negatives": sum(len(label.negatives) for label in known.labels),
        "background": len(known.background),
        "templates": list(bank.templates),
        "fitted": sorted(bank.fitted),
        "bound": is_bound(bank, bundle.manifest),
        "file": bundle.manifest.prompts.get(name),
    }


def whole(bundle: Bundle, name: str, bank: PromptBank) -> dict[str, Any]:
    """The same with the label set in its long form, which `--labels FILE.json` takes; None where
    the bank is of an older release, which did not write down more than the labels."""
    label_set = None
    if bank.label_set is not None:
        label_set = bank.label_set.as_given() | {"templates": list(bank.templates)}
    fitted = {
        precision: {"threshold": found.threshold, "measure": found.measure}
        for precision, found in bank.fitted.items()
    }
    return summary(bundle, name, bank) | {"fitted": fitted, "label_set": label_set}


def pairs_as_json(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Pairs of labels that may be confused."""
    return [
        {key: round(value, 6) if isinstance(value, float) else value for key, value in fields}
        for fields in (dataclasses.asdict(pair).items() for pair in pairs)
    ]


def print_banks(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A row for each bank's summary."""
    table = Table(title=escape(title), title_justify="left")
    for column in ("bank", "labels", "groups", "not", "background", "templates", "fitted to", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        counts = (row["labels"], row["groups"], row["negatives"], row["background"])
        table.add_row(
            escape(row["name"]),
            *(str(count or "") for count in counts),
            escape(_first(row["templates"])),
            ", ".join(row["fitted"]),
            "" if row["bound"] else "[red]stale: of another text encoder; make it again[/]",
        )
    Console().print(table)


def print_bank(name: str, bank: PromptBank) -> None:
    """Groups, labels and what they are embedded by, as a tree."""
    known = bank.made_of
    root = Tree(escape(f"{name}: {len(bank.labels)} labels"))
    root.add(escape("templates: " + " | ".join(bank.templates)))
    for precision, found in sorted(bank.fitted.items()):
        limit = f"unknown where {found.measure} is below {found.threshold:.3f}"
        root.add(f"fitted to {precision}: {limit}")
    branches: dict[tuple[str, ...], Tree] = {(): root}
    for path in known.groups:
        branches[path] = branches[path[:-1]].add(f"[bold]{escape(path[-1])}[/]")
    for label in known.labels:
        branches[label.groups].add(_line(label, bank.label_set is not None))
    for text in known.background:
        root.add(f"[dim]background:[/] {escape(text)}")
    Console().print(root)


def print_pairs(pairs: Sequence[Pair], title: str) -> None:
    """A row for each pair that may be confused."""
    table = Table(title=escape(title), title_justify="left")
    for column in ("label", "and", "cosine", "share", "distance", ""):
        table.add_column(column, overflow="fold")
    for pair in pairs:
        other = escape(pair.other)
        table.add_row(
            escape(pair.label),
            other if pair.kind == "label" else f"{other} [dim]({pair.kind})[/]",
            f"{pair.cosine:.3f}",
            f"{100 * pair.share:.1f} %",
            f"{pair.distance:.2f}x",
            "[red]too close[/]" if pair.too_close else "",
        )
    Console().print(table)
    Console().print(
        "share: what the other gets of a frame that lies exactly on the label; 5 % is too much\n"
        "distance: 1 - cosine, against that of the median pair of labels",
        style="dim",
        soft_wrap=True,
    )


def fit_as_json(name: str, found: BankFit) -> dict[str, Any]:
    """What a bank was fitted to, and how well it fits."""
    return {
        "bank": name,
        "known_frames": found.known,
        "unknown_frames": found.unknown,
        "precisions": {key: msgspec.to_builtins(fit) for key, fit in found.fits.items()},
        "skipped": dict(found.skipped),
    }


def print_fit(name: str, found: BankFit) -> None:
    """A row for each precision that a bank was fitted to."""
    frames = f"{found.known} frames" + (f", {found.unknown} of no label" if found.unknown else "")
    table = Table(title=escape(f"{name}, fitted to {frames}"), title_justify="left")
    for column in ("precision", "scale", "ECE", "unknown below", "false alarms", "AUROC", "found"):
        table.add_column(column, overflow="fold")
    for precision, fit in found.fits.items():
        limit = fit.limit
        table.add_row(
            precision,
            f"{fit.head.logit_scale:.1f}",
            "" if fit.ece_after is None else f"{fit.ece_before:.3f} -> {fit.ece_after:.3f}",
            f"{limit.measure} {limit.threshold:.3f}",
            _percent(limit.false_alarms),
            "" if limit.auroc is None else f"{limit.auroc:.3f}",
            _percent(limit.found),
        )
    Console().print(table)
    for precision, fit in found.fits.items():
        Console().print(f"{precision}: {escape(fit.how)}", style="dim", soft_wrap=True)
    for precision, why in found.skipped.items():
        Console().print(f"{precision} was not fitted: {escape(why)}", soft_wrap=True)
    Console().print(
        "false alarms: known frames, held out, that are called unknown\n"
        "AUROC: how well frames of no label are told (without such frames: of hidden labels)\n"
        "found: the share of the frames of no label that are called unknown",
        style="dim",
        soft_wrap=True,
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _first(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
    return (texts[0] if texts else "") + more


def _line(label: Label, told: bool) -> str:
    """A label with its prompts; those of an older release's bank are not known."""
    parts = [escape(label.name)]
    if told and label.synonyms not in ((), (label.name,)):
        parts.append("[dim]=[/] " + escape(" | ".join(label.synonyms)))
    if label.prompts:
        parts.append("[dim]prompts[/] " + escape(" | ".join(label.prompts)))
    if label.negatives:
        parts.append("[dim]not[/] " + escape(" | ".join(label.negatives)))
    return "  ".join(parts)
