"""Label sets: what frames are told apart by, as users give it in Python or JSON.

The short forms are a list of labels, and a mapping from each label to its synonyms:

    ["a cat", "a dog"]
    {"cat": ["a cat", "a kitten"], "dog": ["a dog", "a puppy"]}

The long form is a mapping with the key `labels` (a label of that very name needs this form too):

    {
      "labels": {
        "cat": ["a cat", "a kitten"],
        "dog": {"synonyms": ["a dog"], "prompts": ["a pug, seen from above"], "not": ["a toy dog"]},
        "vehicle": {"labels": {"car": {}, "truck": ["a truck", "a lorry"]}}
      },
      "background": ["an empty room", "a blurred picture"],
      "templates": ["a photo of {}", "a dark photo of {}"]
    }

- A label's value is the list of its synonyms, or an object. `synonyms` are put into each template
  (default: the label's own name), `prompts` are taken as they stand. A label's embedding is the
  mean of them all.
- `not` lists negative prompts, put into the templates. Where one fits a frame better than the label
  does, the label is ruled out for that frame.
- A value with `labels` is a group, not a label: of a list or a mapping like the one around it, at
  any depth. Frames are named coarse to fine: the best group first, then the best within it.
- `background` is what is none of the labels, put into the templates: where it fits a frame best,
  the frame is `unknown`.
- `templates` take the place of the bundle's own.

Everything but `labels` may be left out. A mapping without the key `labels` may hold such objects
too: it is what stands after `labels` in the long form.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .errors import DataError

DEFAULT_TEMPLATES = ("a photo of {}",)
DEEPEST = 32  # groups within groups
_SET = ("labels", "background", "templates")
_LABEL = ("synonyms", "prompts", "not")


@dataclass(frozen=True)
class Label:
    """A label: its name, what it is embedded by, and the groups that it is in, coarse to fine."""

    name: str
    synonyms: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def texts(self, templates: Sequence[str]) -> list[str]:
        """Every text whose mean is the label's embedding."""
        return [
            *(text for name in self.synonyms for text in filled(name, templates)),
            *self.prompts,
        ]


@dataclass(frozen=True)
class LabelSet:
    """Labels, and what is none of them. `templates` are None where the set has none of its own.

    Raises DataError where a name or text is given twice, or contradicts another.
    """

    labels: tuple[Label, ...]
    background: tuple[str, ...] = ()
    templates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.labels:
            raise DataError("at least one label is needed")
        _check_once("labels and groups", [*self.names, *(path[-1] for path in self.groups)])
        _check_once("background texts", self.background)
        named_by = {text: label.name for label in self.labels for text in label.synonyms}
        for text in self.background:
            if text in named_by:
                raise DataError(
                    f"{text!r} is background, and a synonym of the label {named_by[text]!r}: "
                    "leave one of them out"
                )
        for label in self.labels:
            for text in label.negatives:
                if text in named_by:
                    raise DataError(
                        f"{text!r} is in 'not' of the label {label.name!r}, and a synonym of the "
                        f"label {named_by[text]!r}: leave it out of 'not', labels compete anyway"
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names."""
        return tuple(label.name for label in self.labels)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Every group, by its path from the coarsest one: ("animal",), ("animal", "pet")."""
        paths = (
            label.groups[:end] for label in self.labels for end in range(1, len(label.groups) + 1)
        )
        return tuple(dict.fromkeys(paths))

    @property
    def others(self) -> tuple[str, ...]:
        """What competes with the labels: negative prompts and background, each text once."""
        negatives = [text for label in self.labels for text in label.negatives]
        return tuple(dict.fromkeys([*negatives, *self.background]))

    def as_given(self) -> dict[str, Any]:
        """The set in its long form, for JSON: `parse_labels` makes the same of it."""
        tree: dict[str, Any] = {}
        for label in self.labels:
            branch = tree
            for group in label.groups:
                branch = branch.setdefault(group, {"labels": {}})["labels"]
            branch[label.name] = _as_given(label)
        given: dict[str, Any] = {"labels": tree}
        if self.background:
            given["background"] = list(self.background)
        if self.templates is not None:
            given["templates"] = list(self.templates)
        return given


Entry: TypeAlias = Sequence[str] | Mapping[str, Any]
"""What users give for a label: see the forms above."""
Labels: TypeAlias = Sequence[str] | Mapping[str, Any] | LabelSet
"""What users give for all of them."""


def parse_labels(given: Labels) -> LabelSet:
    """Checks what a user gives. Raises DataError, naming the label and what to do about it."""
    if isinstance(given, LabelSet):
        return given
    if not isinstance(given, Mapping) or "labels" not in given:
        return LabelSet(tuple(_labels(given, ())))
    _check_keys(given, _SET, "a label set (a mapping with the key 'labels')")
    templates = given.get("templates")
    return LabelSet(
        tuple(_labels(given["labels"], ())),
        _texts(given.get("background", ()), "the background is", least=0),
        None if templates is None else check_templates(templates),
    )


def parse_label(name: str, given: Entry | None = None, groups: Sequence[str] = ()) -> Label:
    """Checks one label: its synonyms, or an object (see above), and the names of the groups that
    it is in, coarse to fine. Raises DataError."""
    _check_text(name)
    path = _texts(groups, f"the groups of {name!r} are", least=0)
    _check_depth(path)
    if isinstance(given, Mapping) and "labels" in given:
        raise DataError(f"{name!r} is a group: labels are added one at a time")
    return _label(name, {} if given is None else given, path)


def filled(text: str, templates: Sequence[str]) -> list[str]:
    """The text in each template."""
    return [template.replace("{}", text) for template in templates]


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the templates as a tuple; raises DataError for one without `{}`, or for none."""
    listed = isinstance(templates, Sequence) and not isinstance(templates, str)
    if not listed or not templates:
        raise DataError("templates are a non-empty list of texts with {} where the label goes")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise DataError(f"the template {template!r} has no {{}} where the label goes")
    return tuple(templates)


def read_labels(given: str) -> LabelSet:
    """Labels from the command line: a file (a label a line, or JSON in any form above), or texts
    with commas between them. Raises DataError."""
    path = _path(given)
    if path.suffix not in (".txt", ".json") and not os.path.isfile(path):
        return parse_labels([name.strip() for name in given.split(",") if name.strip()])
    content = _read_text(path)
    try:
        return parse_labels(read_json(content) if path.suffix == ".json" else _lines(content))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_json(content: str | bytes) -> Any:
    """JSON in which no key of an object is given twice: the first would be lost. Raises DataError
    for that, ValueError and RecursionError for what is no JSON."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once("keys of one object", [key for key, _ in pairs])
        return dict(pairs)

    return json.loads(content, object_pairs_hook=once)


def read_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Templates from the command line: texts with {}, or one file with a template a line."""
    if len(given) == 1 and "{}" not in given[0]:
        if not os.path.isfile(_path(given[0])):
            raise DataError(f"{given[0]!r} is neither a template with {{}} nor a file of templates")
        given = _lines(_read_text(_path(given[0])))
    return check_templates(given)


def _labels(given: Any, groups: tuple[str, ...]) -> list[Label]:
    """The labels of a list or mapping that stands in these groups."""
    _check_depth(groups)
    if not isinstance(given, Mapping):
        return [_label(name, {}, groups) for name in _names(given, groups)]
    found: list[Label] = []
    for name, entry in given.items():
        _check_text(name)
        if not isinstance(entry, Mapping) or "labels" not in entry:
            found.append(_label(name, entry, groups))
            continue
        _check_keys(entry, ("labels",), f"the group {name!r}")
        members = _labels(entry["labels"], (*groups, name))
        if not members:
            raise DataError(f"the group {name!r} has no labels: give it some, or leave it out")
        found += members
    return found


def _names(given: Any, groups: tuple[str, ...]) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        of = f" of the group {groups[-1]!r}" if groups else ""
        raise DataError(f"labels{of} are a list of texts, or a mapping, not {given!r}")
    names = list(given)
    for name in names:
        _check_text(name)
    return names


def _label(name: str, given: Any, groups: tuple[str, ...]) -> Label:
    if not isinstance(given, Mapping):
        return Label(name, _texts(given, f"the synonyms of {name!r} are"), groups=groups)
    _check_keys(given, _LABEL, f"the label {name!r} (a group has the key 'labels')")
    found = {
        key: _texts(value, f"{key!r} of {name!r} is", least=key != "not")
        for key, value in given.items()
    }
    prompts = found.get("prompts", ())
    synonyms = found.get("synonyms", () if prompts else (name,))
    return Label(name, synonyms, prompts, found.get("not", ()), groups)


def _as_given(label: Label) -> Any:
    if not label.prompts and not label.negatives:
        return list(label.synonyms)
    fields = zip(_LABEL, (label.synonyms, label.prompts, label.negatives), strict=True)
    return {key: list(texts) for key, texts in fields if texts}


def _texts(value: Any, what: str, least: int = 1) -> tuple[str, ...]:
    """A list of texts that say something. Raises DataError, beginning with `what`."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) < least:
        raise DataError(f"{what} a list of texts, not {value!r}")
    for text in value:
        _check_text(text)
    return tuple(value)


def _check_text(text: object) -> None:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"a label, synonym or prompt is a text that is not empty, not {text!r}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{text!r} holds half a character, which no text file can")


def _check_depth(groups: Sequence[str]) -> None:
    if len(groups) > DEEPEST:
        raise DataError(f"the group {groups[-1]!r} lies more than {DEEPEST} groups deep")


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise DataError(f"{what} has no field {key!r}; it has: {', '.join(known)}")


def _check_once(what: str, texts: Sequence[str]) -> None:
    twice = sorted(text for text, count in Counter(texts).items() if count > 1)
    if twice:
        raise DataError(f"these {what} are given more than once: {', '.join(twice)}")


def _lines(content: str) -> list[str]:
    return [line.strip() for line in content.splitlines() if line.strip()]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a text file: {error}") from error


def _path(given: str) -> Path:
    """It may be a text such as "~cat": then there is no such file."""
    try:
        return Path(given).expanduser()
    except RuntimeError:  # no such user
        return Path(given)
