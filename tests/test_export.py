"""Exported encoders say what open_clip says, and a bundle appears whole or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import tokenizers
import torch
from numpy.typing import NDArray

import runtime
from calibration import parity
from export.bundle import ExportOptions, export_bundle
from export.to_onnx import lower, write_onnx
from export.verify import verify
from runtime.backends import image_border
from runtime.bundle import Bundle
from runtime.errors import DataError, GateFailed
from runtime.ort import OrtEncoder
from runtime.tokenizer import Tokenizer
from training.evaluate import normalise
from training.model import create
from training.options import TrainOptions
from training.text import text_side
from training.trainer import train

VIT = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
RESNET = {
    "image_size": 64,
    "layers": [1, 1, 1, 1],
    "width": 8,
    "head_width": 16,
    "patch_size": None,
}
FASTVIT = {"timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None, "image_size": 64}
SIGLIP = {"timm_model_name": "vit_tiny_patch16_siglip", "timm_pool": "map", "timm_proj": "none"}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "vit-quickgelu": {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "resnet": {"vision_cfg": RESNET, "text_cfg": TEXT},
    "mobileclip": {
        "vision_cfg": FASTVIT, "text_cfg": {**TEXT, "no_causal_mask": True}, "custom_text": True,
    },
    "eos-pooled": {"vision_cfg": VIT, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}},
    "siglip": {
        "vision_cfg": {**VIT, "pool_type": "avg"},
        "text_cfg": {**TEXT, "vocab_size": 64, "no_causal_mask": True, "proj_bias": True,
                     "pool_type": "last", "hf_tokenizer_name": "nobody/nothing",
                     "tokenizer_kwargs": {"clean": "canonicalize"}},
        "custom_text": True,
        "init_logit_bias": -10,
    },
}  # fmt: skip


def write_config(folder: Path, name: str) -> Path:
    path = folder / f"test-{name}.json"
    path.write_text(json.dumps({"embed_dim": 32, **ARCHITECTURES[name]}))
    return path


def write_tokenizer(folder: Path) -> Path:
    """A word tokenizer in the manner of SigLIP's: an end token, and padding with that token."""
    folder.mkdir(exist_ok=True)
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "dog": 4, "a": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "</s>"}')
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_agrees_with_open_clip(name: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, name)
    tokenizer = write_tokenizer(tmp_path / "tokenizer") if name == "siglip" else None
    options = ExportOptions(
        checkpoint=str(config), bundle=tmp_path / "bundle", tokenizer=tokenizer, labels=["a cat"]
    )
    made = export_bundle(options, quiet=True)
    assert verify(tmp_path / "bundle") == []
    clip = create(str(config))
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (5, clip.image.height, clip.image.width, 3), dtype=np.uint8)
    with torch.inference_mode():
        pixels = normalise(torch.from_numpy(frames), clip.image)
        expected = clip.model.encode_image(pixels, normalize=True).numpy()
    found = OrtEncoder(tmp_path / "bundle" / "image.fp32.onnx", image_border(made))(frames)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    report = json.loads((tmp_path / "bundle/report/report.json").read_text())
    assert {(r["encoder"], r["batch"]) for r in report["parity"]} == {
        (e, b) for e in ("image", "text") for b in (1, 3, 8)
    }
    assert min(r["cosine_min"] for r in report["parity"]) >= 0.99999
    scale = float(clip.model.logit_scale.detach().exp())
    assert made.head.logit_scale == pytest.approx(scale)
    assert made.head.activation == ("sigmoid" if name == "siglip" else "softmax")
    assert made.head.logit_bias == (-10 if name == "siglip" else 0)


def test_siglip_tokens_and_scores(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    config = write_config(tmp_path, "siglip")
    options = ExportOptions(
        checkpoint=str(config), bundle=tmp_path / "bundle", tokenizer=tokenizer / "tokenizer.json"
    )
    export_bundle(options, quiet=True)
    opened = Bundle(tmp_path / "bundle")
    ids = Tokenizer(opened.file("tokenizer.json").read_bytes(), opened.manifest.text)
    assert ids(["A cat, a dog!"]).tolist() == [[5, 3, 5, 4] + [1] * 8]
    assert ids(["cat " * 50]).tolist() == [[3] * 11 + [1]]
    clf = runtime.load(tmp_path / "bundle", labels=["cat", "dog"])
    prediction = clf.classify(np.zeros((40, 40, 3), dtype=np.uint8))
    scale = opened.manifest.head.logit_scale
    expected = 1 / (1 + np.exp(-(scale * prediction.cosines - 10)))
    np.testing.assert_allclose(prediction.scores, expected, rtol=1e-4)


def test_siglip_trains_and_keeps_its_tokenizer(squares: Path, tmp_path: Path) -> None:
    options = TrainOptions(
        data=str(squares),
        out=tmp_path / "checkpoint",
        model=str(write_config(tmp_path, "siglip")),
        tokenizer=write_tokenizer(tmp_path / "tokenizer"),
        epochs=2,
        batch_size=24,
    )
    record = train(options, quiet=True)
    assert record["epochs"][1]["loss"] < record["epochs"][0]["loss"]
    exported = ExportOptions(checkpoint=str(tmp_path / "checkpoint"), bundle=tmp_path / "bundle")
    made = export_bundle(exported, quiet=True)
    assert made.model.name == "test-siglip" and made.head.activation == "sigmoid"
    assert (made.text.start_id, made.text.end_id, made.text.pad_id) == (None, 1, 1)


def test_siglip_without_a_tokenizer_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: str) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    options = ExportOptions(
        checkpoint=str(write_config(tmp_path, "siglip")), bundle=tmp_path / "bundle"
    )
    with pytest.raises(DataError, match=r"nobody/nothing.*tokenizer\.json.*--tokenizer"):
        export_bundle(options, quiet=True)
    with pytest.raises(DataError, match=r"--tokenizer .*there is no tokenizer\.json"):
        text_side(create(options.checkpoint), tmp_path)
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no pad_token"):
        text_side(create(options.checkpoint), folder)


def test_weights_trained_with_quickgelu_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's weights need QuickGELU also under the plain model name; open_clip only warns."""
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(safetensors.torch.save(create("RN50").model.state_dict()))
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: str(weights))
    clip = create("RN50", "openai")
    kinds = {type(module).__name__ for module in clip.model.modules()}
    assert clip.config["quick_gelu"] is True
    assert "QuickGELU" in kinds and "GELU" not in kinds
    assert not create("RN50").config.get("quick_gelu")


def test_a_tokenizer_that_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--tokenizer does not go with it"):
        text_side(create(str(checkpoint)), tmp_path)
    config = write_config(tmp_path, "vit")
    content = json.loads(config.read_text())
    content["text_cfg"]["vocab_size"] = 1000
    config.write_text(json.dumps(content))
    with pytest.raises(DataError, match="1000 tokens.*49408"):
        text_side(create(str(config)))


def test_unsupported_text_encoder(tmp_path: Path) -> None:
    config = write_config(tmp_path, "mobileclip")
    content = json.loads(config.read_text())
    content["text_cfg"]["embed_cls"] = True
    config.write_text(json.dumps(content))
    with pytest.raises(DataError, match="TextTransformer.*cannot be exported"):
        export_bundle(ExportOptions(checkpoint=str(config), bundle=tmp_path / "b"), quiet=True)


def test_a_failed_check_leaves_no_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that is wrong in one weight is not published."""

    def wrong(encoder: torch.nn.Module, *rest: Any) -> None:
        with torch.no_grad():
            next(p for p in encoder.parameters() if p.ndim == 2).mul_(1.1)
        write_onnx(encoder, *rest)

    monkeypatch.setattr("export.bundle.write_onnx", wrong)
    options = ExportOptions(checkpoint=str(checkpoint), bundle=tmp_path / "bundle")
    with pytest.raises(GateFailed, match=r"image encoder differs.*smallest cosine 0\.\d+"):
        export_bundle(options, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_parity_catches_rows_that_are_mixed_up() -> None:
    rows = np.eye(6, dtype=np.float32)

    def swaps(batch: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(batch[::-1], dtype=np.float32)

    found = parity.measure("image", lambda x: x, swaps, rows, (1, 3))
    assert [r.cosine_min for r in found] == [1.0, 0.0]
    with pytest.raises(GateFailed, match="at batch 3"):
        parity.require(found, 0.99)
    broken = np.full_like(rows, np.nan)
    nan = parity.measure("image", lambda x: x, lambda x: broken[: len(x)], rows, (1,))
    with pytest.raises(GateFailed, match="nan"):
        parity.require(nan, 0.99)


def test_interrupted_export_leaves_no_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.bundle.compare", interrupt)
    options = ExportOptions(checkpoint=str(checkpoint), bundle=tmp_path / "bundle")
    with pytest.raises(KeyboardInterrupt):
        export_bundle(options, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_replaced_only_by_force(checkpoint: Path, bundle_copy: Path) -> None:
    options = ExportOptions(checkpoint=str(checkpoint), bundle=bundle_copy)
    with pytest.raises(DataError, match="exists already"):
        export_bundle(options, quiet=True)
    made = export_bundle(
        ExportOptions(checkpoint=str(checkpoint), bundle=bundle_copy, force=True), quiet=True
    )
    assert made.prompts == {} and verify(bundle_copy) == []
    assert [p.name for p in bundle_copy.parent.iterdir()] == ["bundle"]


def test_the_files_hold_no_trace_of_the_machine(bundle: Path) -> None:
    for path in bundle.glob("*.onnx"):
        content = path.read_bytes()
        assert b"/site-packages/" not in content and b"pkg.torch" not in content


def test_no_infinity_in_a_file(bundle: Path) -> None:
    for path in bundle.glob("*.onnx"):
        for tensor in onnx.load(path).graph.initializer:
            assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all(), tensor.name


def test_lowering_refuses_what_opset_17_lacks() -> None:
    nodes = [onnx.helper.make_node("Mish", ["x"], ["embeddings"])]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, [1])], [value("embeddings", 1, [1])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    with pytest.raises(ValueError, match="Mish is not in opset 17"):
        lower(model)
