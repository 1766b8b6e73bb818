"""Banks that are fitted to frames of the user's camera."""

from pathlib import Path

import numpy as np
import pytest
from conftest import square, write_squares
from PIL import Image

from calibration.bank_fit import BankFit, fit_bank
from runtime.bundle import Bundle
from runtime.classifier import Classifier
from runtime.errors import DataError
from runtime.prompts import PromptBank

GRAY = (130, 130, 130)


def write_gray(folder: Path, number: int) -> Path:
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True)
    for n in range(number):
        Image.fromarray(square(GRAY, rng)).save(folder / f"{n}.png")
    return folder


def bank_of(classifier: Classifier) -> PromptBank:
    classifier.use_prompts("default")
    return classifier.require_bank()


@pytest.fixture(scope="module")
def classifier(every_precision: Path) -> Classifier:
    return Classifier(Bundle(every_precision), backend="onnxruntime", precision="fp32")


@pytest.fixture(scope="module")
def labelled(classifier: Classifier, tmp_path_factory: pytest.TempPathFactory) -> BankFit:
    frames = write_squares(tmp_path_factory.mktemp("camera") / "frames", each=20, seed=5)
    write_gray(frames / "gray", 20)  # a label that the bank does not have
    return fit_bank(classifier.bundle, bank_of(classifier), [frames], quiet=True)


def test_every_precision_is_fitted(labelled: BankFit, classifier: Classifier) -> None:
    accepted = {n for n, p in classifier.bundle.manifest.precisions.items()}
    assert set(labelled.fits) | set(labelled.skipped) == accepted
    assert {"fp32", "int8"} <= set(labelled.fits)
    for name, found in labelled.fits.items():
        assert labelled.bank.fitted[name].threshold == found.limit.threshold
        assert labelled.bank.fitted[name].head == found.head
        assert found.ece_after is not None and found.ece_after < 0.1


def test_frames_of_other_labels_are_unknown_ones(labelled: BankFit) -> None:
    assert (labelled.known, labelled.unknown) == (60, 20)
    limit = labelled.fits["fp32"].limit
    assert limit.auroc is not None and limit.auroc > 0.9
    assert limit.found is not None and limit.found > 0.5


def test_frames_without_labels_are_all_known(classifier: Classifier, tmp_path: Path) -> None:
    frames = write_squares(tmp_path / "frames", each=20, seed=6) / "red"
    before = bank_of(classifier)
    found = fit_bank(classifier.bundle, before, [frames], quiet=True)
    assert (found.known, found.unknown) == (20, 0)
    assert found.bank.fitted["fp32"].head == before.fitted["fp32"].head  # of the export
    assert found.fits["fp32"].ece_after is None
    assert found.fits["int8"].limit.found is None


def test_frames_of_nothing_known_can_be_given_apart(classifier: Classifier, tmp_path: Path) -> None:
    frames = write_squares(tmp_path / "frames", each=20, seed=6) / "red"
    gray = write_gray(tmp_path / "gray", 9)
    found = fit_bank(classifier.bundle, bank_of(classifier), [frames], [gray], quiet=True)
    assert (found.known, found.unknown) == (20, 9)
    assert found.fits["fp32"].limit.found is not None


def test_labels_that_the_bank_does_not_have_are_named(
    classifier: Classifier, tmp_path: Path
) -> None:
    write_gray(tmp_path / "frames" / "gray", 4)
    write_gray(tmp_path / "frames" / "grey", 4)
    with pytest.raises(DataError, match="the frames have gray, grey, the bank red, green"):
        fit_bank(classifier.bundle, bank_of(classifier), [tmp_path / "frames"], quiet=True)
