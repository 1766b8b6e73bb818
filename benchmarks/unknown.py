"""How well a bundle knows that it does not know: labels left out, fitted on one half, measured on
the other.

    python benchmarks/unknown.py BUNDLE DATA [--hide 2] [--pairs 5]

DATA is a folder of class folders whose names are labels. Some of the labels are hidden in turn;
half of the others' pictures fit the head and the limit of "unknown" (with their labels, without
them, and with the hidden labels' own pictures), the other half is measured. Prints the area under
the ROC curve of known against unknown frames, the share of rightly named known frames that are
called unknown (5 % is promised), of unknown ones that are, and the expected calibration error.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np

from calibration.confidence import fit
from calibration.embed import BATCH
from calibration.metrics import (
    Counts,
    Floats,
    auroc,
    expected_calibration_error,
    reliability,
)
from calibration.sampling import sample
from runtime.bundle import Bundle
from runtime.classifier import Classifier
from runtime.manifest import Head
from runtime.prediction import scores_of
from runtime.unknown import measured


def embedded(classifier: Classifier, data: Path) -> tuple[Floats, Counts, tuple[str, ...]]:
    """Unit rows [N, D] of the pictures, their labels' numbers [N], and the labels."""
    with tempfile.TemporaryDirectory() as folder:
        frames = sample([data], classifier.bundle.manifest.image, 10_000, 0, Path(folder) / "f")
        rows = np.concatenate([classifier._image(batch) for batch in frames.batches(BATCH)])
    return rows, np.array(frames.targets), frames.classes


def measure(
    cosines: Floats, targets: Counts, hidden: tuple[int, ...], head: Head, way: str
) -> tuple[float, float, float, float, str]:
    """AUROC, false alarms, unknown frames found, ECE, and the measure that was taken."""
    keep = [n for n in range(cosines.shape[1]) if n not in hidden]
    cosines, known = cosines[:, keep], ~np.isin(targets, hidden)
    names = np.searchsorted(keep, targets).clip(max=len(keep) - 1)
    first = np.random.default_rng(0).permutation(len(targets)) % 2 == 0
    found = fit(
        cosines[first & known],
        None if way == "unlabelled" else names[first & known],
        head,
        unknown=cosines[first & ~known] if way == "with unknown" else None,
    )
    scores = scores_of(cosines, found.head)
    values = measured(found.limit.measure, cosines, scores, found.head)
    right = known & ~first & (cosines.argmax(axis=1) == names)
    if way == "unlabelled":  # the promise is of all known frames
        right = known & ~first
    strange = ~known & ~first
    shown = known & ~first
    bins = reliability(scores[shown].max(axis=1), (cosines.argmax(axis=1) == names)[shown])
    return (
        auroc(values[shown], values[strange]),
        float((values[right] < found.limit.threshold).mean()),
        float((values[strange] < found.limit.threshold).mean()),
        expected_calibration_error(bins),
        found.limit.measure,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--hide", type=int, default=2)
    parser.add_argument("--most", type=int, default=45, help="sets of hidden labels")
    parser.add_argument("--precision", default="int8")
    options = parser.parse_args()
    classifier = Classifier(
        Bundle(options.bundle), backend="onnxruntime", precision=options.precision
    )
    rows, targets, classes = embedded(classifier, options.data)
    classifier.set_labels(classes)
    cosines = rows @ classifier.require_bank().embeddings.T
    sets = list(itertools.combinations(range(len(classes)), options.hide))[: options.most]
    head = classifier.bundle.manifest.head
    print(f"{classifier!r}, {len(rows)} pictures, {len(sets)} sets of {options.hide} hidden labels")
    print("fitted          AUROC (worst)   false alarms (worst)  unknown found  ECE (worst)")
    for way in ("labelled", "unlabelled", "with unknown"):
        found = [measure(cosines, targets, hidden, head, way) for hidden in sets]
        area, alarms, told, ece = np.array([row[:4] for row in found]).T
        print(
            f"{way:14s}  {area.mean():.3f} ({area.min():.3f})   "
            f"{100 * alarms.mean():5.1f} % ({100 * alarms.max():.1f})         "
            f"{100 * told.mean():5.1f} %        {ece.mean():.3f} ({ece.max():.3f})  "
            f"{sorted({row[4] for row in found})}"
        )


if __name__ == "__main__":
    main()
