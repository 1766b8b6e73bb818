"""The first runs of a model come before the first frame of a camera."""

import pytest
from fake_capture import CAMERA, FILE, Fake, Fakes
from test_stream import Model, camera

from runtime import warm_up as module
from runtime.stream import Stream


def sizes(model: Model) -> list[int]:
    return [count for count, _ in model.batches]


def test_cameras_begin_when_every_number_of_frames_was_tried() -> None:
    model, fakes = Model(), Fakes(*(Fake(1, fps=100) for _ in range(4)))
    with Stream(model, [camera(n) for n in range(4)], batch=3, opens=fakes) as stream:
        assert sizes(model)[:3] == [1, 2, 3]
        assert next(stream).number == 0
        assert stream.stats()[0].seen == 1


def test_a_slow_model_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 0.03)
    model = Model(0.02)
    with Stream(model, [camera(n) for n in range(8)], opens=Fakes()):
        assert sizes(model) == [1, 2]


def test_files_wait_by_themselves() -> None:
    model = Model()
    with Stream(model, FILE, opens=Fakes(Fake(3, live=False))) as stream:
        assert sizes(model) == [] and len(list(stream)) == 3
    model = Model()
    with Stream(model, FILE, realtime=True, opens=Fakes(Fake(3, live=False))):
        assert sizes(model) == [1]
    with Stream(model, CAMERA, opens=Fakes()):
        assert sizes(model)[-1] == 1
