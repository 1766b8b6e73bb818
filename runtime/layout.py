"""How the rows of a prompt bank stand to each other, as index arrays made once for all frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .label_sets import LabelSet

Index = NDArray[np.intp]
Path = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Tree:
    """Labels in groups, in groups. `groups` are their names, a group before those within it.

    `members` are the labels of one group after the other, and `starts` where each begins.
    `children` are what the whole, then each group, holds: a label n is n, a group g is N + g.
    `above` are the groups of each label, coarse to fine.
    """

    groups: tuple[str, ...]
    members: Index
    starts: Index
    children: tuple[Index, ...]
    above: tuple[tuple[int, ...], ...]

    def of_groups(self, values: NDArray[Any], over: np.ufunc) -> NDArray[Any]:
        """Each group's sum (`np.add`) or maximum of its labels' values [..., N]: [..., G]."""
        found: NDArray[Any] = over.reduceat(values[..., self.members], self.starts, axis=-1)
        return found

    def best(self, values: NDArray[Any]) -> int:
        """The label that is found from coarse to fine by the values [N + G] of labels and groups:
        the best of the whole, then the best within that."""
        count, place = len(self.above), 0
        while True:
            children = self.children[place]
            chosen = int(children[values[children].argmax()])
            if chosen < count:
                return chosen
            place = chosen - count + 1


@dataclass(frozen=True, eq=False)
class Layout:
    """Rows of a bank: N labels, then what competes with them (`LabelSet.others`).

    `negated` are the labels with negative prompts; their rows follow each other in `negatives`,
    and `starts` is where each label's begin. `background` are the rows of the background texts.
    """

    negated: Index
    negatives: Index
    starts: Index
    background: Index
    texts: tuple[str, ...]
    tree: Tree | None


def layout_of(labels: LabelSet) -> Layout:
    """The layout of a bank of these labels."""
    place = {text: len(labels.labels) + n for n, text in enumerate(labels.others)}
    rows = [[place[text] for text in label.negatives] for label in labels.labels]
    sizes = [len(own) for own in rows if own]
    return Layout(
        negated=_index(n for n, own in enumerate(rows) if own),
        negatives=_index(row for own in rows for row in own),
        starts=_index(np.cumsum([0, *sizes[:-1]])) if sizes else _index(()),
        background=_index(place[text] for text in labels.background),
        texts=labels.background,
        tree=_tree(labels) if labels.groups else None,
    )


def _tree(labels: LabelSet) -> Tree:
    paths = labels.groups
    above = tuple(
        tuple(paths.index(label.groups[:end]) for end in range(1, len(label.groups) + 1))
        for label in labels.labels
    )
    members = [[n for n, own in enumerate(above) if g in own] for g in range(len(paths))]
    children = [_children(labels, paths, path) for path in ((), *paths)]
    return Tree(
        groups=tuple(path[-1] for path in paths),
        members=_index(n for own in members for n in own),
        starts=_index(np.cumsum([0, *(len(own) for own in members[:-1])])),
        children=tuple(children),
        above=above,
    )


def _children(labels: LabelSet, paths: Sequence[Path], path: Path) -> Index:
    """What the group with this path, () being the whole, holds itself."""
    count = len(labels.labels)
    leaves = [n for n, label in enumerate(labels.labels) if label.groups == path]
    return _index([*leaves, *(count + g for g, sub in enumerate(paths) if sub[:-1] == path)])


def _index(values: Any) -> Index:
    return np.fromiter(values, dtype=np.intp)
