"""INT8: what is quantised, with which ranges, and that the result is the encoder still."""

import collections
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import COLORS, square
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from calibration import activations, sensitivity
from calibration.activations import Activation, observe
from calibration.gate import Cost, Judge, Limits, check_limits, faults
from calibration.histogram import BINS, Histogram, mse_threshold, thresholds
from calibration.layers import Layer, find_layers
from calibration.metrics import row_cosines
from calibration.quantize import folded, int8_share, quantize
from calibration.ranges import Range, choose_ranges, foldable_inputs, quantized
from calibration.sensitivity import Search, encoder
from runtime.bundle import Bundle
from runtime.errors import DataError, GateFailed
from runtime.preprocess import preprocess

Frames = NDArray[np.uint8]


@pytest.fixture(scope="module")
def model(bundle: Path) -> ModelProto:
    """A vision transformer that was really trained."""
    return onnx.load(bundle / "image.fp32.onnx")


@pytest.fixture(scope="module")
def frames(bundle: Path) -> Frames:
    spec, rng = Bundle(bundle).manifest.image, np.random.default_rng(3)
    colors = [*COLORS.values()] * 24
    return np.stack([preprocess(square(color, rng), spec, "rgb") for color in colors])


@pytest.fixture(scope="module")
def layers(model: ModelProto) -> tuple[Layer, ...]:
    return find_layers(model)


@pytest.fixture(scope="module")
def seen(model: ModelProto, layers: tuple[Layer, ...], frames: Frames) -> dict[str, Activation]:
    return observe(model, layers, batches(frames[:36]))


@pytest.fixture(scope="module")
def ranges(
    model: ModelProto, layers: tuple[Layer, ...], seen: dict[str, Activation]
) -> dict[str, Range]:
    return choose_ranges(model, layers, seen)


def batches(frames: Frames, size: int = 4) -> Iterator[Frames]:
    for start in range(0, len(frames), size):
        yield frames[start : start + size]


def cosines(a: ModelProto, b: ModelProto, frames: Frames) -> NDArray[np.float64]:
    return row_cosines(encoder(a)(frames), encoder(b)(frames))


# Layers


def test_the_linears_and_convolutions_are_found(layers: tuple[Layer, ...]) -> None:
    """Two blocks of four Linears, the patches' convolution, the projection; not the attention's
    products of two activations."""
    assert collections.Counter(layer.operator for layer in layers) == {"Conv": 1, "MatMul": 9}
    assert [layer.title for layer in layers][:3] == [
        "conv1", "transformer.resblocks.0.attn.qkv", "transformer.resblocks.0.attn.out",
    ]  # fmt: skip
    assert layers[0].bias is None and layers[1].bias is not None
    assert layers[0].in_axis == 1 and layers[1].in_axis == 0


# Ranges


def test_a_histogram_grows_with_its_values() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=20_000).astype(np.float32) * np.repeat([0.1, 5, 1, 40], 5000)
    grown = Histogram()
    for part in np.split(values, 10):
        grown.add(part)
    assert grown.counts.sum() == len(values)
    assert grown.largest == pytest.approx(np.abs(values).max())
    expected = np.histogram(np.abs(values), BINS, (0, grown.range))[0]
    # halves of bins are put together: no value is further than a bin from where it belongs
    assert np.abs(np.cumsum(grown.counts) - np.cumsum(expected)).max() <= expected.max()


def test_thresholds_by_hand() -> None:
    histogram = Histogram()
    histogram.add(np.concatenate([np.full(9989, 1.0), np.full(11, 100.0)]).astype(np.float32))
    found = thresholds(histogram)
    assert found["min-max"] == pytest.approx(100.0)
    assert found["percentile 99.9"] == pytest.approx(100.0, rel=0.01)
    assert found["percentile 99.99"] == pytest.approx(100.0, rel=0.01)
    few = Histogram()
    few.add(np.concatenate([np.full(9995, 1.0), np.full(5, 100.0)]).astype(np.float32))
    assert thresholds(few)["percentile 99.9"] == pytest.approx(1.0, rel=0.1)
    assert thresholds(Histogram()) == {"min-max": 1.0}


def test_the_mse_threshold_is_the_best_there_is() -> None:
    values = np.random.default_rng(1).standard_t(3, 50_000).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    best = min(
        np.linspace(0.01, 1, 200) * histogram.largest,
        key=lambda t: float(((quantized(values, t) - values) ** 2).sum()),
    )
    assert mse_threshold(histogram) == pytest.approx(best, rel=0.05)


def test_what_is_seen_does_not_depend_on_the_batches(
    model: ModelProto, layers: tuple[Layer, ...], frames: Frames
) -> None:
    one, other = (observe(model, layers, batches(frames[:24], size)) for size in (4, 8))
    for name in one:
        np.testing.assert_allclose(one[name].channels, other[name].channels, rtol=1e-4)
        assert one[name].histogram.counts.sum() == other[name].histogram.counts.sum()


def test_an_observation_that_was_cut_off_goes_on(
    model: ModelProto,
    layers: tuple[Layer, ...],
    frames: Frames,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activations, "SAVE_EVERY", 2)
    whole = observe(model, layers, batches(frames))
    cache = tmp_path / "ranges.npz"

    def dying() -> Iterator[Frames]:
        for number, batch in enumerate(batches(frames)):
            if number == 9:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        observe(model, layers, dying(), cache)
    ran: list[int] = []
    add = Activation.add

    def noted(self: Activation, *args: Any) -> None:
        ran.append(1)
        add(self, *args)

    monkeypatch.setattr(Activation, "add", noted)
    found = observe(model, layers, batches(frames), cache)
    assert len(ran) == (18 - 8) * len(found)
    for name, own in whole.items():
        np.testing.assert_array_equal(found[name].histogram.counts, own.histogram.counts)
        np.testing.assert_array_equal(found[name].channels, own.channels)
        np.testing.assert_array_equal(found[name].sample, own.sample)
    assert [p.name for p in tmp_path.iterdir()] == ["ranges.npz"]
    cache.write_bytes(cache.read_bytes()[:500])  # a damaged one is made anew
    again = observe(model, layers, batches(frames), cache)
    assert again.keys() == found.keys()


def test_no_numbers_are_an_error(model: ModelProto, frames: Frames) -> None:
    broken = ModelProto()
    broken.CopyFrom(model)
    scale = next(t for t in broken.graph.initializer if t.name == "scale")
    scale.CopyFrom(numpy_helper.from_array(np.full((1, 3, 1, 1), np.nan, np.float32), "scale"))
    with pytest.raises(GateFailed, match="no finite numbers"):
        observe(broken, find_layers(broken), batches(frames[:4]))


# The int8 file


def test_int8_is_the_encoder_still(
    model: ModelProto, layers: tuple[Layer, ...], ranges: dict[str, Range], frames: Frames
) -> None:
    int8 = quantize(folded(model, layers, ranges), layers, ranges)
    assert np.quantile(cosines(model, int8, frames[36:]), 0.01) > 0.999
    for batch in (1, 3):
        assert len(encoder(int8)(frames[:batch])) == batch
    assert len(int8.SerializeToString()) < 0.4 * len(model.SerializeToString())


def test_folding_changes_nothing(
    model: ModelProto, layers: tuple[Layer, ...], ranges: dict[str, Range], frames: Frames
) -> None:
    even = {
        name: dataclasses.replace(
            own, smooth=np.linspace(0.5, 2, 48, dtype=np.float32), folded=True
        )
        for name, own in ranges.items()
        if name in foldable_inputs(model, layers)
    }
    assert len(even) == 4  # two in each block; the last one's output is cut up first
    made = folded(model, layers, {**ranges, **even})
    assert made.SerializeToString() != model.SerializeToString()
    np.testing.assert_allclose(encoder(made)(frames), encoder(model)(frames), atol=2e-6)
    assert len(made.graph.node) == len(model.graph.node)


def test_where_q_and_dq_stand(
    model: ModelProto, layers: tuple[Layer, ...], ranges: dict[str, Range]
) -> None:
    int8 = quantize(folded(model, layers, ranges), layers, ranges)
    onnx.checker.check_model(int8, full_check=True)
    assert [(o.domain, o.version) for o in int8.opset_import] == [("", 17)]
    constants = {t.name: t for t in int8.graph.initializer}
    nodes = {node.output[0]: node for node in int8.graph.node}
    names = {layer.name for layer in layers}
    pairs = [node for node in int8.graph.node if node.op_type == "DequantizeLinear"]
    for pair in pairs:
        (taker,) = {n.name for n in int8.graph.node if pair.output[0] in n.input}
        assert taker in names
        zero = numpy_helper.to_array(constants[pair.input[2]])
        assert zero.dtype == np.int8 and not zero.any()  # symmetric
    for layer in layers:
        node = next(n for n in int8.graph.node if n.name == layer.name)
        weight = nodes[node.input[1]]
        assert constants[weight.input[0]].data_type == TensorProto.INT8
        assert numpy_helper.to_array(constants[weight.input[1]]).ndim == 1  # by channel
        assert nodes[nodes[node.input[0]].input[0]].op_type == "QuantizeLinear"


def test_one_pair_for_a_tensor_that_feeds_several_layers() -> None:
    model = two_linears()
    layers = find_layers(model)
    ranges = {"x": Range(1.0, "min-max", 0.0)}
    int8 = quantize(model, layers, ranges)
    assert sum(node.op_type == "QuantizeLinear" for node in int8.graph.node) == 1
    half = quantize(model, layers, ranges, [layers[0].name])
    assert [n.input[0] for n in half.graph.node if n.op_type == "Gemm"] == ["x", "x.float"]


def two_linears(rows: int = 6) -> ModelProto:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(5, rows)).astype(np.float32) for _ in range(2)]
    value = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Gemm", ["x", f"w{n}"], [f"y{n}"], name=f"g{n}", transB=1)
        for n in range(2)
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", rows])],
        [value(f"y{n}", TensorProto.FLOAT, ["n", 5]) for n in range(2)],
        [numpy_helper.from_array(w, f"w{n}") for n, w in enumerate(weights)],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )


def test_layers_in_float_are_as_they_were(
    model: ModelProto, layers: tuple[Layer, ...], ranges: dict[str, Range], frames: Frames
) -> None:
    names = [layer.name for layer in layers]
    same = quantize(folded(model, layers, ranges), layers, ranges, names)
    np.testing.assert_allclose(encoder(same)(frames), encoder(model)(frames), atol=2e-6)
    assert int8_share(layers, names) == 0 and int8_share(layers, []) == 1
    largest = max(layers, key=lambda layer: layer.size)
    assert int8_share(layers, [largest.name]) == pytest.approx(
        1 - largest.size / sum(layer.size for layer in layers)
    )


# An encoder that was made to be hard


def hardened(model: ModelProto, factor: float = 1000.0) -> ModelProto:
    """The same float function, with outliers in what feeds the blocks: some channels of each
    LayerNormalization are larger by `factor`, and the weights behind it smaller."""
    hard = ModelProto()
    hard.CopyFrom(model)
    layers = find_layers(model)
    smooth = np.ones(48, np.float32)
    smooth[[3, 17]] = 1 / factor
    outliers = {
        name: Range(1.0, "", 0.0, smooth, 0.5, True) for name in foldable_inputs(model, layers)
    }
    return folded(hard, layers, outliers)


def test_outliers_are_evened_out(model: ModelProto, frames: Frames) -> None:
    hard = hardened(model)
    np.testing.assert_allclose(encoder(hard)(frames), encoder(model)(frames), atol=1e-5)
    layers = find_layers(hard)
    seen = observe(hard, layers, batches(frames[:36]))
    plain = {t: Range(own.histogram.largest, "min-max", 0.0) for t, own in seen.items()}
    naive = quantize(hard, layers, plain)
    ranges = choose_ranges(hard, layers, seen)
    ours = quantize(folded(hard, layers, ranges), layers, ranges)
    assert np.quantile(cosines(hard, naive, frames[36:]), 0.01) < 0.99
    assert np.quantile(cosines(hard, ours, frames[36:]), 0.01) > 0.999


# The gate


def judge(model: ModelProto, frames: Frames, **more: Any) -> Judge:
    return Judge(lambda: batches(frames), encoder(model)(frames), **more)


def test_what_a_precision_costs_by_hand() -> None:
    reference = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6]], np.float32)
    rows = np.array([[1, 0], [0, 1], [0.8, 0.6], [np.nan, 0]], np.float32)
    bank, targets = np.eye(2, dtype=np.float32), np.array([0, 1, 1, 0])
    found = Judge(lambda: iter(()), reference, bank, targets).compare(rows)
    assert found.frames == 4 and found.flipped[0] == 2
    assert found.agreement == pytest.approx((4 - len(found.flipped)) / 4)
    assert found.drop == pytest.approx(100 * (1.0 - (found.top1 or 0)))
    assert found.cosine_p1 < -0.9  # what is no number is as wrong as can be
    assert Judge(lambda: iter(()), reference).compare(rows).agreement is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cosine_p1": 0.98}, "cosine with fp32 is 0.9800 at the 1st percentile.*--min-cosine"),
        ({"agreement": 0.9}, "90.00% of 100 frames keep their label.*--min-agreement"),
        ({"drop": 0.6}, "top-1 accuracy falls by 0.60 points.*--max-drop 0.5"),
    ],
)
def test_each_figure_can_fail_the_gate(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "frames": 100, "cosine_p1": 0.999, "cosine_p50": 1.0, "agreement": 1.0, "top1": 0.9,
        "drop": 0.0,
    }  # fmt: skip
    assert faults(Cost(**good), Limits()) == []
    (fault,) = faults(Cost(**{**good, **changes}), Limits())
    assert re.search(message, fault)


@pytest.mark.parametrize("changes", [{"min_cosine": 2}, {"min_agreement": 99}, {"max_drop": 1e9}])
def test_bad_limits(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="--m"):
        check_limits(Limits(**changes))


@pytest.fixture(scope="module")
def search(
    model: ModelProto, layers: tuple[Layer, ...], ranges: dict[str, Range], frames: Frames
) -> Search:
    bad = layers[4].input  # one layer's range is far too small
    wrong = {**ranges, bad: dataclasses.replace(ranges[bad], threshold=0.01, smooth=None)}
    base = folded(model, layers, wrong)
    return Search(base, layers, wrong, judge(model, frames[36:]), Limits(min_cosine=0.999))


def test_the_layer_that_suffers_is_found_and_kept_in_float(
    search: Search, layers: tuple[Layer, ...]
) -> None:
    drift = search.drift()
    assert min(drift, key=lambda name: drift[name].cosine_p1) == layers[4].name
    assert faults(search.cost([]), search.limits)
    kept, cost = search.fewest(drift)
    assert kept == [layers[4].name] and not faults(cost, search.limits)


def test_a_needless_layer_is_tried_in_int8_again(search: Search, layers: tuple[Layer, ...]) -> None:
    """Even where the ranking misleads."""
    misled = {
        layer.name: dataclasses.replace(GOOD, cosine_p1=0.1 * n) for n, layer in enumerate(layers)
    }
    kept, _ = search.fewest(misled)
    assert kept == [layers[4].name]


GOOD = Cost(frames=1, cosine_p1=1.0, cosine_p50=1.0)


def test_a_gate_that_cannot_hold_keeps_everything_in_float(search: Search) -> None:
    never = dataclasses.replace(search, limits=Limits(min_cosine=1.0, max_drop=-100))
    assert isinstance(search.judge, Judge)
    never = dataclasses.replace(
        never, judge=dataclasses.replace(search.judge, reference=-search.judge.reference)
    )
    kept, cost = never.fewest(search.drift())
    assert len(kept) == len(search.layers) and faults(cost, never.limits)
    assert sensitivity._TRIED_AGAIN
