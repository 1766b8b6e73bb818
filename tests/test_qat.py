"""Quantisation-aware training: what is trained is what the int8 file computes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import COLORS, square, write_squares
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from calibration import ranges as calibrated
from calibration.activations import session_of
from calibration.gate import Limits
from calibration.layers import find_layers
from calibration.metrics import row_cosines
from calibration.quantize import quantize
from calibration.sensitivity import encoder
from export.bundle import ExportOptions, export_bundle
from export.lint import lint
from export.precisions import CalibrationOptions
from export.to_onnx import write_onnx
from export.tower_facts import presets
from export.towers import ImageEncoder
from export.trained_ranges import Trained, read_trained
from export.verify import verify
from runtime import manifest
from runtime.errors import DataError
from training import qat_ranges
from training.batches import Batch
from training.cost import multiply_adds
from training.evaluate import image_encoder
from training.fake_quant import FakeConv2d, Quantizer, fake_layers, steps
from training.finetune import Guard
from training.model import WEIGHTS, ClipModel, create, save
from training.options import TrainOptions
from training.qat import fake_quantize, forward
from training.qat_ranges import calibrate
from training.quantization import NAME
from training.results import Results
from training.run import Run
from training.state import load_state
from training.trainer import train

# isort: split
from timm.models.fastvit import (
    LayerScale2d,
    MobileOneBlock,
    ReparamLargeKernelConv,
    RepConditionalPosEnc,
    RepMixer,
)
from timm.models.repvit import ConvNorm, NormLinear, RepVggDw
from timm.utils.model import reparameterize_model

Frames = NDArray[np.uint8]


def frames_of(size: int) -> Frames:
    rng = np.random.default_rng(5)
    return np.stack(
        [square(color, rng)[:size, :size] for color in COLORS.values() for _ in range(12)]
    )


def settled_norms(clip: ClipModel) -> ClipModel:
    """Batch normalisation with statistics of its own, as after a training."""
    rng = torch.Generator().manual_seed(0)
    for module in clip.model.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=rng)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2, generator=rng)  # type: ignore[union-attr]
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=rng)
                module.bias.normal_(0, 0.2, generator=rng)
    return clip


@pytest.fixture(params=["vit", "cnn"])
def clip(request: pytest.FixtureRequest, checkpoint: Path) -> ClipModel:
    """A vision transformer that was trained, or a small CNN."""
    return create(str(checkpoint)) if request.param == "vit" else settled_norms(create("nano"))


def wrapped(clip: ClipModel) -> ClipModel:
    fake_quantize(clip)
    calibrate(clip, [torch.from_numpy(frames_of(32)[::2])])
    return clip


# The arithmetic


def test_steps_and_weights_are_those_of_export() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(40, 7, 3, 3)) * np.logspace(-9, 3, 40)[:, None, None, None]).astype(
        np.float32
    )
    weight[3] = 0
    largest = np.abs(weight).max(axis=(1, 2, 3))
    np.testing.assert_array_equal(
        steps(torch.from_numpy(largest), 8).numpy(), calibrated.steps(largest, exact=True)
    )
    levels, scales = calibrated.quantized_weight(weight, 0, exact=True)
    rounded = Quantizer().weight(torch.from_numpy(weight))
    np.testing.assert_array_equal(rounded.detach(), levels * scales[:, None, None, None])


@pytest.mark.parametrize("step", [0.5, 0.013671875, 6.103515625e-05])
def test_inputs_are_rounded_as_onnx_has_it(step: float) -> None:
    """Half to even, and to -128 to 127."""
    values = np.concatenate([np.arange(-300, 300) / 2, np.random.default_rng(0).normal(0, 99, 999)])
    values = (values * step).astype(np.float32)
    quantizer = Quantizer()
    quantizer.set_step(step)
    assert quantizer.step.item() == step
    (right,) = session_of(round_trip(step), optimise=False).run(None, {"x": values})
    np.testing.assert_array_equal(quantizer(torch.from_numpy(values)).detach(), right)
    assert right.min() == -128 * step and right.max() == 127 * step


def round_trip(step: float) -> ModelProto:
    value = onnx.helper.make_tensor_value_info
    constants = [
        onnx.numpy_helper.from_array(np.array(step, np.float32), "step"),
        onnx.numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    float_ = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "g", [value("x", float_, ["n"])], [value("y", float_, ["n"])], constants
    )
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)


def test_the_gradients_of_lsq_by_hand() -> None:
    """Esser et al. 2020, equation 3: -128 and 127 where it is clipped, else the rounding's error,
    scaled by 1 / sqrt(values * 127); to the values it passes where they are not clipped."""
    quantizer = Quantizer()
    quantizer.set_step(0.5)
    values = torch.tensor([[-100.0, 0.3, 0.6, 100.0]], requires_grad=True)
    weighted: Any = quantizer(values) * torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    weighted.sum().backward()
    for_step = -128 + 10 * (1 - 0.6) + 100 * (1 - 1.2) + 1000 * 127
    assert quantizer.log_range.grad is not None
    # d step / d log range = step
    scaled = for_step / (4 * 127) ** 0.5
    assert quantizer.log_range.grad.item() == pytest.approx(scaled * 0.5, rel=1e-3)
    assert values.grad is not None and values.grad.tolist() == [[0, 10, 100, 0]]


def test_a_weight_takes_the_gradient_as_if_it_were_not_rounded() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    made: Any = Quantizer().weight(weight)
    made.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.ones(4, 3))


def test_the_order_in_which_products_are_added_changes_nothing() -> None:
    """Engines add them as they like; next to a half it decides what a value is rounded to."""
    rng = torch.Generator().manual_seed(0)
    conv: Any = nn.Conv2d(96, 8, 3)
    with torch.no_grad():
        conv.weight.normal_(0, 0.1, generator=rng)
        conv.bias.normal_(0, 0.5, generator=rng)
    values = torch.randn(2, 96, 9, 9, generator=rng).relu()
    order = torch.randperm(96, generator=rng)
    other: Any = nn.Conv2d(96, 8, 3)
    other.load_state_dict({"weight": conv.weight[:, order], "bias": conv.bias})
    before, after = conv(values), other(values[:, order])
    assert not torch.equal(before, after)
    quantizer = Quantizer()
    with torch.no_grad():
        quantizer.log_range.fill_(3.7).log_()
    for layer in (conv, other):
        layer.__class__, layer.quantizer = FakeConv2d, quantizer
    assert torch.equal(conv(values), other(values[:, order]))
    torch.testing.assert_close(conv(values), before, atol=0.1, rtol=0)


# The tower


def test_the_float_function_and_its_state_stay(clip: ClipModel) -> None:
    frames = frames_of(32)
    before, names = image_encoder(clip)(frames), list(clip.model.state_dict())
    wrapped(clip)
    for layer in fake_layers(clip.model).values():
        layer.quantizer.enabled = False
    np.testing.assert_allclose(image_encoder(clip)(frames), before, atol=1e-5)
    state = clip.model.state_dict()
    assert [name for name in state if not name.endswith(".log_range")] == names
    assert set(fake_layers(clip.model)) <= set(names)


def test_layers_of_one_tensor_share_its_range() -> None:
    clip = create("resnet18")
    fake_quantize(clip)
    layers = fake_layers(clip.model)
    shared = {
        name.removeprefix("visual.trunk.")
        for name, layer in layers.items()
        if [other.quantizer for other in layers.values()].count(layer.quantizer) > 1
    }
    assert shared == {
        f"layer{stage}.0.{name}.weight" for stage in (2, 3, 4) for name in ("conv1", "downsample.0")
    }


def small(block: nn.Module) -> ClipModel:
    """A tower of one block, for frames of 32 x 32."""
    clip = settled_norms(create("nano"))
    clip.model.visual = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), block, nn.Flatten())
    for module in clip.model.visual.modules():
        if isinstance(module, LayerScale2d):
            nn.init.uniform_(module.gamma, 0.5, 1.5)
    return settled_norms(clip)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mobile-one": lambda: MobileOneBlock(8, 8, 3, group_size=1, use_se=True),
    "mobile-one-stride": lambda: MobileOneBlock(8, 16, 3, stride=2, num_conv_branches=2),
    "large-kernel": lambda: ReparamLargeKernelConv(8, 16, 7, 2, 8, small_kernel=3),
    "rep-mixer": lambda: RepMixer(8),
    "rep-mixer-plain": lambda: RepMixer(8, layer_scale_init_value=None),
    "positions": lambda: RepConditionalPosEnc(8),
    "rep-vgg": lambda: RepVggDw(8, 3),
    "rep-vgg-legacy": lambda: RepVggDw(8, 3, legacy=True),
    "conv-norm": lambda: ConvNorm(8, 16),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_branches_are_quantised_as_the_one_convolution_of_export(block: str) -> None:
    clip = small(BLOCKS[block]())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower: Any = clip.model.visual.eval()
    with torch.no_grad():
        before, merged = tower(pixels), reparameterize_model(tower)
        names = list(tower.state_dict())
        wrapped(clip)
        assert [name for name in tower.state_dict() if not name.endswith("log_range")] == names
        layers = list(fake_layers(tower).values())
        convolutions = [m for m in merged.modules() if isinstance(m, nn.Conv2d)]
        assert len(layers) == len(convolutions)  # batch norms behind them are folded beside this
        assert (tower(pixels) - before).abs().max() > 1e-3  # it is rounded
        for layer in layers:
            layer.quantizer.enabled = False
        torch.testing.assert_close(tower(pixels), before, atol=1e-4, rtol=1e-4)


def test_every_branch_is_trained() -> None:
    clip = wrapped(small(RepVggDw(8, 3)))
    clip.model.visual(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = [n for n, p in clip.model.visual.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_every_preset_can_be_wrapped(preset: str) -> None:
    clip = create(preset)
    fake_quantize(clip)
    merged = ImageEncoder(create(preset)).tower.modules()
    layers = [module for module in merged if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(fake_layers(clip.model)) == len(layers)
    assert multiply_adds(clip) == multiply_adds(create(preset))


def test_a_block_that_is_not_known_is_refused() -> None:
    clip = small(NormLinear(8, 8))
    with pytest.raises(DataError, match="cannot be fake-quantised yet: visual.1, a NormLinear"):
        fake_quantize(clip)


class PastTheLayer(nn.Module):
    """Takes its Linear's weights as timm's Swin v2 and BEiT do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)


def test_a_layer_that_is_passed_by_is_refused() -> None:
    with pytest.raises(DataError, match=r"takes visual\.1\.qkv\.weight past the layer"):
        fake_quantize(small(PastTheLayer()))


def outliers(clip: ClipModel, factor: float = 3000.0) -> None:
    """The same float function, with a few channels of each LayerNorm larger."""
    smooth = torch.ones(48)
    smooth[[3, 17]] = factor
    with torch.no_grad():
        for block in clip.model.visual.transformer.resblocks:
            for norm, weight in (
                (block.ln_1, block.attn.in_proj_weight),
                (block.ln_2, block.mlp.c_fc.weight),
            ):
                norm.weight.mul_(smooth)
                norm.bias.mul_(smooth)
                weight.div_(smooth)


def test_outliers_are_evened_out_in_the_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = frames_of(32)
    before = image_encoder(create(str(checkpoint)))(frames)
    cosines = []
    for alphas in ((), qat_ranges._ALPHAS):
        monkeypatch.setattr(qat_ranges, "_ALPHAS", alphas)
        clip = create(str(checkpoint))
        outliers(clip)
        if not alphas:
            monkeypatch.setattr(qat_ranges, "_only_linears", without_norm)
        wrapped(clip)
        monkeypatch.undo()
        cosines.append(row_cosines(image_encoder(clip)(frames), before).min())
    assert cosines[0] < 0.99 and cosines[1] > 0.999


def without_norm(seen: qat_ranges.Seen) -> qat_ranges.Seen:
    seen.norm = None
    return seen


class PostNorm(nn.Module):
    """A LayerNorm whose output a Linear takes, and the sum behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(3 * 8 * 8), nn.Linear(3 * 8 * 8, 3 * 8 * 8)
        with torch.no_grad():
            self.norm.weight[5] = 1000.0

    def forward(self, pixels: Tensor) -> Tensor:
        normed = self.norm(F.avg_pool2d(pixels, 4).flatten(1))
        return torch.as_tensor(normed + self.linear(normed))


def test_nothing_is_evened_out_that_something_else_takes(checkpoint: Path) -> None:
    clip = create(str(checkpoint))
    clip.model.visual = PostNorm()
    before = clip.model.visual.norm.weight.clone()
    wrapped(clip)
    torch.testing.assert_close(clip.model.visual.norm.weight, before)


# The file


def exported(clip: ClipModel, folder: Path) -> tuple[ModelProto, Trained]:
    """The int8 encoder of a wrapped model's checkpoint, and that model read back."""
    folder.mkdir()
    save(clip, folder, {})
    plain = create(str(folder))
    trained = read_trained(plain)
    assert trained is not None
    file = folder.parent / "image.onnx"
    write_onnx(ImageEncoder(plain), torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "frames", file)
    model, ranges = trained.applied(onnx.load(file))
    return quantize(model, find_layers(model), ranges), trained


def test_the_int8_file_is_the_model_as_it_was_trained(clip: ClipModel, tmp_path: Path) -> None:
    frames = frames_of(32)
    before = image_encoder(clip)(frames)
    as_trained = image_encoder(wrapped(clip))(frames)
    int8, trained = exported(clip, tmp_path / "checkpoint")
    assert row_cosines(before, as_trained).min() < 0.99999  # or there is nothing to show
    np.testing.assert_array_equal(trained.encode(frames), as_trained)
    assert row_cosines(encoder(int8)(frames), as_trained).min() >= 0.9999
    assert list(lint(int8, "int8")) == []


def test_the_file_has_the_very_weights_and_biases(tmp_path: Path) -> None:
    int8, trained = exported(wrapped(settled_norms(create("nano"))), tmp_path / "checkpoint")
    written = written_convolutions(int8)
    layers = [x for x in fake_layers(trained.clip.model).values() if isinstance(x, FakeConv2d)]
    assert len(written) == len(layers) > 3
    for layer in layers:
        weight, bias = (part.detach().numpy() for part in layer.rounded() if part is not None)
        same = [b for w, b in written if w.shape == weight.shape and (w == weight).all()]
        assert len(same) == 1 and (same[0] == bias).all()


def written_convolutions(int8: ModelProto) -> list[tuple[Frames, Frames]]:
    """Weight and bias of each, as the int8 stand for them."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in int8.graph.initializer}
    makers = {node.output[0]: node for node in int8.graph.node}
    found = []
    for node in int8.graph.node:
        if node.op_type == "Conv":
            levels, steps, _ = (constants[name] for name in makers[node.input[1]].input)
            found.append((levels * steps[:, None, None, None], constants[node.input[2]]))
    return found


def test_a_range_of_another_layer_shows(clip: ClipModel, tmp_path: Path) -> None:
    """The comparison above can fail."""
    frames = frames_of(32)
    as_trained = image_encoder(wrapped(clip))(frames)
    layer = list(fake_layers(clip.model).values())[3]
    with torch.no_grad():
        layer.quantizer.log_range.sub_(1.0)
    int8, _ = exported(clip, tmp_path / "checkpoint")
    assert row_cosines(encoder(int8)(frames), as_trained).min() < 0.9999


def edited(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**found, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "is of 4 bits, for research alone"),
        ({"format": 9}, "is of format 9; this release reads 2: train with --qat again"),
        ({"weights_sha256": "0" * 64}, "belongs to other weights.*train with --qat again"),
        ({"input_steps": {"visual.proj": 0.1}}, "is not of this model: visual"),
        ({"input_steps": {"visual.proj": -1}}, "cannot be read"),
    ],
)
def test_ranges_that_do_not_belong_are_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    clip = wrapped(create(str(checkpoint)))
    save(clip, tmp_path, {})
    edited(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        read_trained(create(str(tmp_path)))


# The run


def options(data: Path, out: Path, checkpoint: Path, **changes: Any) -> TrainOptions:
    chosen: dict[str, Any] = {
        "model": str(checkpoint), "qat": True, "epochs": 2, "batch_size": 18, "workers": 0,
        "lr": 1e-4, "checkpoint_every": 3,
    }  # fmt: skip
    return TrainOptions(**{"data": str(data), "out": out, **chosen, **changes})


@pytest.fixture(scope="module")
def fitted(
    checkpoint: Path, squares: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("qat") / "out"
    val = write_squares(out.parent / "val", each=6, seed=4)
    return out, train(options(squares, out, checkpoint, val=val), quiet=True)


def test_a_training_goes_on_from_its_checkpoint_as_int8(
    fitted: tuple[Path, dict[str, Any]], checkpoint: Path
) -> None:
    out, record = fitted
    assert record["epochs"][-1]["top1"] >= 0.9
    plain, start = create(str(out)), create(str(checkpoint))
    assert list(plain.model.state_dict()) == list(start.model.state_dict())
    trained = read_trained(plain)
    assert trained is not None
    before = ranges_of(wrapped(create(str(checkpoint))))
    after = ranges_of(trained.clip)
    assert all(before[name] != after[name] for name in before)  # they are learned


def ranges_of(clip: ClipModel) -> dict[str, float]:
    layers = fake_layers(clip.model)
    return {name: layer.quantizer.log_range.item() for name, layer in layers.items()}


def test_export_takes_the_trained_ranges(
    fitted: tuple[Path, dict[str, Any]], squares: Path, tmp_path: Path
) -> None:
    chosen = ExportOptions(
        checkpoint=str(fitted[0]),
        bundle=tmp_path / "bundle",
        labels=tuple(COLORS),
        precisions=CalibrationOptions(
            calibrate=(squares,),
            judge=(write_squares(tmp_path / "judged", each=6, seed=9),),
            precisions=("int8", "int8_fp16"),
            limits=Limits(min_cosine=1.0),  # of fp32, that was not trained: the labels decide
        ),
    )
    export_bundle(chosen, quiet=True)
    found, _ = manifest.read(chosen.bundle)
    int8 = found.precisions["int8"]
    assert int8.status == "accepted" and int8.float_layers == ()
    assert int8.figures["trained_cosine_min"] >= 0.9999 and int8.figures["int8_share"] == 1
    written = steps_of(onnx.load(chosen.bundle / int8.image))
    half = steps_of(onnx.load(chosen.bundle / found.precisions["int8_fp16"].image))
    recorded = set(json.loads((fitted[0] / NAME).read_text())["input_steps"].values())
    assert written == half == recorded
    assert verify(chosen.bundle) == []
    assert "those of the training" in (chosen.bundle / "report" / "report.md").read_text()


def steps_of(model: ModelProto) -> set[float]:
    """The steps of the activations."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    names = [node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return {float(constants[name]) for name in names}


def test_a_run_that_is_killed_goes_on_with_its_ranges(
    fitted: tuple[Path, dict[str, Any]],
    checkpoint: Path,
    squares: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: dict[str, Any] = {"out": tmp_path / "out", "val": fitted[0].parent / "val"}
    advance = Run.advance

    def dying(self: Run, batch: Batch) -> dict[str, float]:
        if self.number == 5:
            raise KeyboardInterrupt
        return advance(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "advance", dying)
        train(options(squares, checkpoint=checkpoint, **chosen), quiet=True)
    assert any(name.endswith("log_range") for name in load_state(tmp_path / "out.run")["model"])
    train(options(squares, checkpoint=checkpoint, resume=True, **chosen), quiet=True)
    for name in (WEIGHTS, NAME):
        assert (tmp_path / "out" / name).read_bytes() == (fitted[0] / name).read_bytes()


def test_an_average_is_of_the_ranges_too(checkpoint: Path, squares: Path, tmp_path: Path) -> None:
    train(options(squares, tmp_path / "out", checkpoint, epochs=1, ema=0.9), quiet=True)
    assert read_trained(create(str(tmp_path / "out"))) is not None


def test_the_guard_goes_back_to_the_ranges_of_the_epoch_before(
    checkpoint: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = iter([True, False])
    monkeypatch.setattr(Guard, "holds", lambda *_: next(held))
    chosen = options(squares, tmp_path / "out", checkpoint, epochs=3, guard=squares, lr=1e-2)
    record = train(chosen, quiet=True)
    assert record["stopped_by_guard"]
    one = options(squares, tmp_path / "one", checkpoint, epochs=3, guard=squares, lr=1e-2)
    monkeypatch.setattr(Guard, "holds", lambda *_: True)
    kept: list[bytes] = []
    epoch = Results.epoch

    def watching(self: Results, *given: Any) -> bool:
        found = epoch(self, *given)
        kept.append((one.out / NAME).read_bytes())
        return found

    monkeypatch.setattr(Results, "epoch", watching)
    train(one, quiet=True)
    assert (chosen.out / NAME).read_bytes() == kept[0] != kept[1]


def test_statistics_stay_as_they_are(squares: Path, tmp_path: Path) -> None:
    """A start that was trained with --freeze-bn would be lost by those of the batches."""
    start, out = tmp_path / "start", tmp_path / "out"
    start.mkdir()
    save(settled_norms(create("nano")), start, {})
    train(options(squares, out, start, epochs=1), quiet=True)
    before, after = (create(str(folder)).model.state_dict() for folder in (start, out))
    changed = {name for name, tensor in after.items() if (tensor != before[name]).any()}
    assert "visual.trunk.conv1.0.weight" in changed
    assert not [name for name in changed if "running_" in name or "num_batches" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qat_bits": 9}, "--qat-bits is 2 to 8, not 9"),
        ({"lock_image": True}, "it goes with none of --lock-image"),
        ({"wise_ft": 0.5}, "it goes with none of .*--wise-ft"),
        ({"strategy": "fsdp"}, "it goes with none of .*fsdp"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        options(Path("data"), Path("out"), Path("model"), **changes)


def test_random_weights_are_no_start(squares: Path, tmp_path: Path, tiny_config: Path) -> None:
    with pytest.raises(DataError, match="--qat goes on from a trained model"):
        train(options(squares, tmp_path / "out", tiny_config), quiet=True)


def test_frames_that_are_none(checkpoint: Path) -> None:
    clip = create(str(checkpoint))
    fake_quantize(clip)
    with pytest.raises(DataError, match="no frames to calibrate on"):
        calibrate(clip, nothing())


def nothing() -> Iterator[Tensor]:
    yield from ()


def test_a_large_batch_is_calibrated_on_in_parts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = create(str(checkpoint))
    fake_quantize(clip)
    most, through = [0], forward

    def counted(tower: nn.Module, pixels: Tensor) -> Tensor:
        most[0] = max(most[0], len(pixels))
        return through(tower, pixels)

    monkeypatch.setattr(qat_ranges, "forward", counted)
    spec = clip.image
    calibrate(clip, [torch.zeros(150, spec.height, spec.width, 3, dtype=torch.uint8)])
    assert most[0] == 64
