"""A student held against its teacher: figures that can be counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import solid

from calibration.against import SHEET, Against, Banks, against
from calibration.report import write_report
from calibration.sections import Report
from runtime.manifest import Head

HEAD = Head(logit_scale=10.0, logit_bias=0.0, activation="softmax")
EYE = np.eye(2, dtype=np.float32)
BANK = Banks(["cat", "[dog]"], EYE, EYE, HEAD)
STUDENT = np.array([[1, 0], [0, 1], [0.6, 0.8], [1, 0]], np.float32)
TEACHER = np.array([[1, 0], [1, 0], [0, 1], [0.8, 0.6]], np.float32)
SIZES = [("multiply-adds", "1", "4")]
BOTH = {"top1": (0.5, 0.8), "something else": (1.0, 1.0)}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = []
    for number in range(4):
        made.append(tmp_path / f"{number}.png")
        made[-1].write_bytes(solid(50 * number, (30, 30)))
    return made


def test_without_labels_there_are_cosines_alone(files: list[Path]) -> None:
    found = against(STUDENT, TEACHER, files, {}, SIZES)
    assert found.cosines["mean"] == pytest.approx((1 + 0 + 0.8 + 0.8) / 4)
    assert found.cosines["p50"] == pytest.approx(0.8) and found.cosines["p1"] < 0.1
    assert found.agreement is None and not found.classes and not found.differences
    assert not list(found.pictures()) and "same label" not in "\n".join(found.markdown())


def test_by_a_bank_both_agree_or_differ(files: list[Path]) -> None:
    found = against(STUDENT, TEACHER, files, {}, SIZES, BANK)
    assert found.agreement == 0.75
    (difference,) = found.differences
    assert (difference.file, difference.label) == (files[1], None)
    assert (difference.student.label, difference.teacher.label) == ("[dog]", "cat")
    cat, dog = found.classes  # what the teacher says counts
    assert cat.pictures == 3 and cat.agreement == pytest.approx(2 / 3) and cat.student is None
    assert (dog.pictures, dog.agreement) == (1, 1)


def test_with_labels_it_is_told_who_is_right(files: list[Path]) -> None:
    found = against(STUDENT, TEACHER, files, BOTH, SIZES, BANK, [0, 1, 1, 1])
    cat, dog = found.classes
    assert (cat.pictures, cat.student, cat.teacher) == (1, 1, 1)
    assert dog.pictures == 3 and dog.student == pytest.approx(2 / 3)
    assert dog.teacher == pytest.approx(1 / 3)
    assert found.differences[0].label == "[dog]"
    assert set(found.figures) == {"top1"}


def test_the_report_tells_it(files: list[Path], tmp_path: Path) -> None:
    found: Against = against(STUDENT, TEACHER, files, BOTH, SIZES, BANK, [0, 1, 1, 1])
    folder = tmp_path / "report"
    folder.mkdir()
    write_report(folder, Report(title="t", about={}, more=[found]))
    text = (folder / "report.md").read_text()
    assert "| multiply-adds | 1 | 4 |" in text and SHEET in text and r"\[dog\]" in text
    assert "| top-1 accuracy | 50.0% | 80.0% | 62.5% |" in text
    assert (folder / SHEET).stat().st_size > 1000
    content = json.loads((folder / "report.json").read_text())["teacher"]
    assert content["figures"]["top1"] == {"student": 0.5, "teacher": 0.8}
    assert content["differences"][0]["teacher"][0][0] == "cat"


def test_each_names_pictures_by_its_own_text_tower(files: list[Path]) -> None:
    swapped = BANK._replace(student=EYE[::-1])
    found = against(STUDENT, TEACHER, files, {}, SIZES, swapped)
    assert found.agreement == 0.25
    assert found.differences[0].student.label == "[dog]" == found.classes[1].label
