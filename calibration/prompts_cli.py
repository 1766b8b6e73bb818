"""`edgeclip prompts`: a bundle's prompt banks, listed, made, shown, tried and taken out."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli import Labels, Templates

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.prompts import PromptBank

    from .bank_fit import BankFit

Name = Annotated[str | None, typer.Option(help="The bank to make, or to look at.")]
Show = Annotated[str | None, typer.Option(help="Print a bank: labels, prompts, groups.")]
Confusable = Annotated[
    bool, typer.Option("--show-confusable", help="Name labels that lie too close together.")
]
Test = Annotated[
    list[Path] | None,
    typer.Option(help="Classify this picture, video or folder with the bank; repeatable."),
]
Fit = Annotated[
    list[Path] | None,
    typer.Option(
        help="Fit scores and the limit of unknown to the camera's frames: a picture, video, "
        "folder or table, with labels (class folders) or without; repeatable."
    ),
]
Unknown = Annotated[
    list[Path] | None, typer.Option(help="With --fit: frames that show none of the labels.")
]
Keep = Annotated[
    float,
    typer.Option(
        min=0.01, max=1, help="With --fit: share of known frames that are not to be unknown."
    ),
]
MaxBad = Annotated[
    float, typer.Option(min=0, max=1, help="With --fit: share of frames that may be unreadable.")
]
Remove = Annotated[str | None, typer.Option(help="Take a bank out of the bundle.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a bank of that name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, an object a line.")]


def prompts(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    labels: Labels = None,
    templates: Templates = None,
    name: Name = None,
    show: Show = None,
    confusable: Confusable = False,
    test: Test = None,
    fit: Fit = None,
    unknown: Unknown = None,
    keep: Keep = 0.95,
    max_bad: MaxBad = 0.01,
    remove: Remove = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """List, make, show, try and fit a bundle's prompt banks.

    --labels with --name stores a bank. Without --name, --show-confusable and --test look at the
    labels, and store nothing. --fit changes a stored bank.
    """
    from runtime.bundle import Bundle
    from runtime.errors import DataError

    opened = Bundle(bundle)
    asked = _Asked(
        labels=labels,
        templates=templates,
        name=name,
        confusable=confusable,
        test=test,
        fit=fit,
        unknown=unknown,
        keep=keep,
        max_bad=max_bad,
        force=force,
        as_json=as_json,
    )
    others = (labels, templates, name, fit, asked.looks or None)
    _check_alone({"--remove": remove, "--show": show}, others)
    if unknown and not fit:
        raise DataError("--unknown goes with --fit FRAMES, frames that do show the labels")
    if remove is not None:
        _remove(bundle, remove, as_json)
    elif show is not None:
        _show(opened, show, as_json)
    elif labels is not None:
        _make(opened, labels, asked)
    elif templates:
        raise DataError("--template goes with --labels: a prompt bank has its own")
    elif fit or asked.looks:
        _use(opened, asked)
    elif name is not None:
        raise DataError(f"what of the bank? --show {name}, or --name with --labels FILE to make it")
    else:
        _list(opened, as_json)


@dataclass(frozen=True)
class _Asked:
    """The options that go together."""

    labels: str | None
    templates: list[str] | None
    name: str | None
    confusable: bool
    test: list[Path] | None
    fit: list[Path] | None
    unknown: list[Path] | None
    keep: float
    max_bad: float
    force: bool
    as_json: bool

    @property
    def looks(self) -> bool:
        """Whether a bank is to be looked at."""
        return self.confusable or bool(self.test)


def _make(bundle: "Bundle", labels: str, asked: _Asked) -> None:
    """Makes a bank of labels; stores it where it has a name, fits it, and looks at it."""
    from runtime.bank_store import check_name
    from runtime.errors import DataError

    if asked.name is not None:
        check_name(bundle, asked.name, replace=asked.force)
    elif asked.fit or not asked.looks:
        raise DataError(
            "name the bank to store these labels in: --name default; or look at them first: "
            "--show-confusable, --test FRAMES"
        )
    bank = _build(bundle, labels, asked.templates)
    if asked.name is not None:
        fitted = _fit(bundle, bank, asked) if asked.fit else None
        bank = fitted.bank if fitted else bank
        _store(bundle.folder, asked.name, bank, asked.force, asked.as_json)
        if fitted:
            _tell(asked.name, fitted, asked.as_json)
    _look(bundle.folder, bank, asked)


def _use(bundle: "Bundle", asked: _Asked) -> None:
    """Fits a stored bank, and looks at it."""
    from runtime.bank_store import bank_of, is_bound, store_bank
    from runtime.errors import BundleError

    name = _name(bundle, asked.name)
    bank = bank_of(bundle, name)
    if not is_bound(bank, bundle.manifest):
        raise BundleError(
            f"the bank {name!r} was made by another text encoder: make it again (--labels, --name "
            f"{name}, --force)"
        )
    if asked.fit:
        fitted, read = _fit(bundle, bank, asked), bundle.manifest.prompts[name]
        bank = fitted.bank
        store_bank(bundle.folder, name, bank, replace=True, read=read)
        _tell(name, fitted, asked.as_json)
    _look(bundle.folder, bank, dataclasses.replace(asked, name=name))


def _check_alone(alone: Mapping[str, str | None], others: Sequence[object]) -> None:
    """Raises DataError where an option that stands alone has company."""
    from runtime.errors import DataError

    given = [option for option, value in alone.items() if value is not None]
    if len(given) > 1 or (given and any(other is not None for other in others)):
        raise DataError(f"{given[0]} stands alone: leave out the other options")


def _name(bundle: "Bundle", name: str | None) -> str:
    """The bank to look at: the one named, "default", or the only one."""
    from runtime.errors import DataError

    have = list(bundle.manifest.prompts)
    if name is None and "default" not in have and len(have) != 1:
        listed = ", ".join(have) or "none yet; make one with --labels FILE --name NAME"
        raise DataError(f"name the bank to look at with --name; {bundle.folder} has: {listed}")
    return name or ("default" if "default" in have else have[0])


def _list(bundle: "Bundle", as_json: bool) -> None:
    from runtime.bank_store import banks_of

    from .bank_tables import print_banks, summary

    rows = [summary(bundle, name, bank) for name, bank in banks_of(bundle).items()]
    if as_json:
        _print_json({"bundle": str(bundle.folder), "banks": rows})
    elif rows:
        print_banks(rows, str(bundle.folder))
    else:
        print(f"{bundle.folder} has no prompt bank; make one with --labels FILE --name default")


def _show(bundle: "Bundle", name: str, as_json: bool) -> None:
    from runtime.bank_store import bank_of

    from .bank_tables import print_bank, whole

    bank = bank_of(bundle, name)
    if as_json:
        _print_json(whole(bundle, name, bank))
    else:
        print_bank(name, bank)


def _build(bundle: "Bundle", labels: str, templates: list[str] | None) -> "PromptBank":
    """A bank of labels from the command line, embedded anew: what a bundle holds comes from its own
    text encoder, not from what this machine remembers."""
    from runtime.classifier import Classifier
    from runtime.label_sets import read_labels, read_templates

    given = read_labels(labels)
    if find_spec("onnxruntime"):  # where both are named nothing is measured
        classifier = Classifier(bundle, backend="onnxruntime", precision="fp32")
    else:
        classifier = Classifier(bundle)
    classifier.set_labels(given, read_templates(templates) if templates else None)
    return classifier.require_bank()


def _store(bundle: Path, name: str, bank: "PromptBank", force: bool, as_json: bool) -> None:
    from runtime.bank_store import store_bank
    from runtime.bundle import Bundle

    from .bank_tables import summary

    store_bank(bundle, name, bank, replace=force)
    if as_json:
        _print_json({"stored": summary(Bundle(bundle), name, bank)})
    else:
        print(f"stored the bank {name!r} of {len(bank.labels)} labels in {bundle}")


def _fit(bundle: "Bundle", bank: "PromptBank", asked: _Asked) -> "BankFit":
    """A bank fitted to frames, not stored yet."""
    from .bank_fit import fit_bank

    return fit_bank(
        bundle,
        bank,
        asked.fit or [],
        asked.unknown or [],
        recall=asked.keep,
        max_bad=asked.max_bad,
        backend="onnxruntime" if find_spec("onnxruntime") else "auto",
        quiet=asked.as_json,
    )


def _tell(name: str, fitted: "BankFit", as_json: bool) -> None:
    from .bank_tables import fit_as_json, print_fit

    if as_json:
        _print_json({"fitted": fit_as_json(name, fitted)})
    else:
        print_fit(name, fitted)


def _remove(bundle: Path, name: str, as_json: bool) -> None:
    from runtime.bank_store import remove_bank

    remove_bank(bundle, name)
    if as_json:
        _print_json({"removed": name})
    else:
        print(f"removed the bank {name!r} from {bundle}")


def _look(bundle: Path, bank: "PromptBank", asked: _Asked) -> None:
    """Looks at a bank, which lies in the bundle under a name, or was made of these labels."""
    from runtime.bundle import Bundle
    from runtime.cli import classify

    from .bank_tables import pairs_as_json, print_pairs
    from .confusable import confusable

    if asked.confusable:
        pairs = confusable(bank, Bundle(bundle).manifest.head)
        if asked.as_json:
            _print_json({"pairs": pairs_as_json(pairs)})
        elif pairs:
            print_pairs(pairs, f"The closest of {len(bank.labels)} labels")
        else:
            print("there is but one label: it cannot be confused")
    if asked.test:
        stored = asked.name is not None
        classify(
            bundle,
            asked.test,
            labels=None if stored else asked.labels,
            templates=None if stored else asked.templates,
            prompts=asked.name,
            as_json=asked.as_json,
        )


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False))
