"""`to_triton`: a model repository that Triton can read, and a client that finds its labels."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import COLORS, square
from numpy.typing import NDArray
from PIL import Image

import runtime
from export.to_triton import MARKER, base_name, quote, to_triton
from runtime.bundle import Bundle
from runtime.errors import ChecksumMismatch, DataError

TOKEN = re.compile(r'\s+|#.*|"(?:[^"\\\n]|\\.)*"|[A-Za-z0-9_.-]+|[\[\]{}:,]')
ESCAPE = re.compile(r"\\([0-7]{3}|.)")
Message = dict[str, list[Any]]


def parse(text: str) -> Message:
    """Reads protobuf's text format; every field becomes the list of its values."""
    tokens, place = [], 0
    while place < len(text):
        found = TOKEN.match(text, place)
        assert found, f"no token at {text[place : place + 40]!r}"
        place = found.end()
        if not found[0].isspace() and not found[0].startswith("#"):
            tokens.append(found[0])
    return message(iter([*tokens, "}"]))


def message(tokens: Iterator[str]) -> Message:
    fields: Message = {}
    for name in tokens:
        if name == "}":
            return fields
        token = next(tokens)
        if token == ":":
            token = next(tokens)
        fields.setdefault(name, []).extend(values(token, tokens))
    raise AssertionError("a message is not closed")


def values(token: str, tokens: Iterator[str]) -> Iterator[Any]:
    if token == "{":
        yield message(tokens)
    elif token == "[":
        for inner in tokens:
            if inner == "]":
                return
            if inner != ",":
                yield from values(inner, tokens)
    else:
        yield unquote(token) if token.startswith('"') else token


def unquote(token: str) -> str:
    return ESCAPE.sub(lambda m: chr(int(m[1], 8)) if len(m[1]) == 3 else m[1], token[1:-1])


def parameters(config: Message) -> dict[str, str]:
    return {p["key"][0]: p["value"][0]["string_value"][0] for p in config["parameters"]}


def edit(bundle: Path, change: dict[str, Any]) -> None:
    """Alters sections of a bundle's manifest."""
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    for section, fields in change.items():
        raw[section].update(fields)
    path.write_text(json.dumps(raw))


def reject(bundle: Path, *names: str) -> None:
    entries = json.loads((bundle / "manifest.json").read_text())["precisions"]
    edit(bundle, {"precisions": {n: entries[n] | {"status": "rejected"} for n in names}})


@pytest.fixture(scope="module")
def models(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("triton") / "models"
    to_triton(bundle, target)
    return target


def configs(models: Path) -> dict[str, Message]:
    """The repository's configurations, by "image" and "text"."""
    return {
        path.parent.name.rpartition("_")[2]: parse(path.read_text(encoding="utf-8"))
        for path in models.glob("*/config.pbtxt")
    }


def test_the_files(bundle: Path, tmp_path: Path) -> None:
    paths = to_triton(bundle, tmp_path / "models")
    name = base_name(Bundle(bundle).manifest)
    models = [
        f"{name}_{kind}/{f}" for kind in ("image", "text") for f in ("1/model.onnx", "config.pbtxt")
    ]
    found = {path.relative_to(tmp_path / "models").as_posix() for path in paths}
    assert found == {MARKER, "README.md", *models}
    assert all(path.is_file() for path in paths)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_the_encoders_are_the_bundles(bundle: Path, models: Path) -> None:
    made = Bundle(bundle).manifest
    for kind, file in (("image", "image.fp32.onnx"), ("text", made.text_encoder)):
        copied = models / f"{base_name(made)}_{kind}" / "1" / "model.onnx"
        assert copied.read_bytes() == (bundle / file).read_bytes()


def test_the_image_config(bundle: Path, models: Path) -> None:
    made, config = Bundle(bundle).manifest, configs(models)["image"]
    size = [str(made.image.height), str(made.image.width), "3"]
    given = parameters(config)
    config.pop("parameters")
    assert config == {
        "name": [f"{base_name(made)}_image"],
        "platform": ["onnxruntime_onnx"],
        "max_batch_size": ["32"],
        "input": [{"name": ["frames"], "data_type": ["TYPE_UINT8"], "dims": size}],
        "output": [
            {
                "name": ["embeddings"],
                "data_type": ["TYPE_FP32"],
                "dims": [str(made.model.embedding_dim)],
            }
        ],
        "dynamic_batching": [
            {"preferred_batch_size": ["8", "16", "32"], "max_queue_delay_microseconds": ["2000"]}
        ],
    }
    assert given["precision"] == "fp32"
    assert given["sha256"] == made.files["image.fp32.onnx"].sha256
    assert given["model.name"] == made.model.name
    assert given["model.weights_sha256"] == made.model.weights_sha256
    assert float(given["head.logit_scale"]) == made.head.logit_scale
    assert float(given["head.logit_bias"]) == made.head.logit_bias
    assert given["head.activation"] == made.head.activation
    assert tuple(json.loads(given["image.mean"])) == made.image.mean
    assert tuple(json.loads(given["image.std"])) == made.image.std
    assert (given["image.fit"], given["image.interpolation"]) == ("crop", made.image.interpolation)


def test_the_text_config(bundle: Path, models: Path) -> None:
    made, config = Bundle(bundle).manifest, configs(models)["text"]
    dims = [str(made.text.context_length)]
    assert config["input"] == [{"name": ["tokens"], "data_type": ["TYPE_INT32"], "dims": dims}]
    given = parameters(config)
    assert given["text.pad_id"] == str(made.text.pad_id)
    assert tuple(json.loads(given["text.templates"])) == made.text.templates
    assert "precision" not in given


def test_the_encoders_run_as_configured(models: Path) -> None:
    types = {"TYPE_UINT8": np.uint8, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32}
    for path in models.glob("*/config.pbtxt"):
        config = parse(path.read_text(encoding="utf-8"))
        given, made = config["input"][0], config["output"][0]
        session = onnxruntime.InferenceSession(path.parent / "1" / "model.onnx")
        for batch in (1, int(config["max_batch_size"][0])):
            shape = (batch, *map(int, given["dims"]))
            feed = {given["name"][0]: np.zeros(shape, types[given["data_type"][0]])}
            (rows,) = session.run(made["name"], feed)
            assert rows.shape == (batch, int(made["dims"][0]))
            assert rows.dtype == types[made["data_type"][0]]


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [(1, ["1"]), (2, ["1", "2"]), (6, ["1", "3", "6"]), (64, ["16", "32", "64"])],
)
def test_batch_sizes(bundle: Path, tmp_path: Path, max_batch: int, sizes: list[str]) -> None:
    to_triton(bundle, tmp_path / "models", max_batch=max_batch)
    for config in configs(tmp_path / "models").values():
        assert config["max_batch_size"] == [str(max_batch)]
        assert config["dynamic_batching"][0]["preferred_batch_size"] == sizes


@pytest.mark.parametrize("max_batch", [-1, 0, 1025])
def test_batch_sizes_that_are_none(bundle: Path, tmp_path: Path, max_batch: int) -> None:
    with pytest.raises(DataError, match="max_batch must be from 1 to 1024"):
        to_triton(bundle, tmp_path / "models", max_batch=max_batch)


def test_a_wild_name(bundle_copy: Path, tmp_path: Path) -> None:
    wild = '../ViT "B"\\32\n}\t\x7f name: "x" 猫 # $name'
    edit(bundle_copy, {"model": {"name": wild}})
    to_triton(bundle_copy, tmp_path / "models")
    image = configs(tmp_path / "models")["image"]
    assert image["name"] == ["ViT_B_32_name_x_name_image"]
    assert (tmp_path / "models" / image["name"][0] / "config.pbtxt").is_file()
    assert parameters(image)["model.name"] == wild


def test_a_name_of_other_letters(bundle_copy: Path) -> None:
    edit(bundle_copy, {"model": {"name": "猫"}})
    assert base_name(Bundle(bundle_copy).manifest) == "model"


@pytest.mark.parametrize("text", ["", "a", 'a "b"', "\\", '\\"\n', "\x00\x1f7", "naïve 猫"])
def test_quote(text: str) -> None:
    assert "\n" not in quote(text)
    assert parse(f"name: {quote(text)} next: 1") == {"name": [text], "next": ["1"]}


def test_precisions(bundle_copy: Path, tmp_path: Path) -> None:
    to_triton(bundle_copy, tmp_path / "named", precision="fp16")
    reject(bundle_copy, "fp32")
    to_triton(bundle_copy, tmp_path / "auto")
    for name in ("named", "auto"):
        assert parameters(configs(tmp_path / name)["image"])["precision"] == "fp16"
        (model,) = (tmp_path / name).glob("*_image/1/model.onnx")
        assert model.read_bytes() == (bundle_copy / "image.fp16.onnx").read_bytes()


def test_precisions_that_are_refused(bundle_copy: Path, tmp_path: Path) -> None:
    target = tmp_path / "models"
    reject(bundle_copy, "fp16")
    with pytest.raises(DataError, match="'fp16' was rejected by its gate; accepted are fp32"):
        to_triton(bundle_copy, target, precision="fp16")
    with pytest.raises(DataError, match="'int4' is not there; accepted are fp32"):
        to_triton(bundle_copy, target, precision="int4")
    reject(bundle_copy, "fp32")
    with pytest.raises(DataError, match="no precision to serve; .* looser limits"):
        to_triton(bundle_copy, target)
    assert not target.exists()


@pytest.mark.parametrize("name", ["image.fp32.onnx", "text.fp32.onnx"])
def test_an_altered_file(bundle_copy: Path, tmp_path: Path, name: str) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[-1] ^= 1
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(ChecksumMismatch, match=name):
        to_triton(bundle_copy, tmp_path / "models")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_replaced(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "models"
    to_triton(bundle, target)
    with pytest.raises(DataError, match="--force"):
        to_triton(bundle, target)
    to_triton(bundle, target, max_batch=8, force=True)
    assert configs(target)["image"]["max_batch_size"] == ["8"]
    (target / MARKER).unlink()
    with pytest.raises(DataError, match=f"it has no {MARKER}"):
        to_triton(bundle, target, force=True)
    assert configs(target)["image"]["max_batch_size"] == ["8"]


def test_not_in_the_bundle(bundle_copy: Path) -> None:
    with pytest.raises(DataError, match="name another folder"):
        to_triton(bundle_copy, bundle_copy / "models")
    (bundle_copy.parent / MARKER).touch()
    with pytest.raises(DataError, match="name another folder"):
        to_triton(bundle_copy, bundle_copy.parent, force=True)
    assert (bundle_copy / "manifest.json").is_file()


class Server:
    """What the README's client uses of `tritonclient.http`; the models run in ONNX Runtime."""

    models: Path

    class InferInput:
        def __init__(self, name: str, shape: list[int], datatype: str) -> None:
            self.name, self.shape, self.datatype = name, shape, datatype

        def set_data_from_numpy(self, data: NDArray[Any]) -> None:
            self.data = data

    def __init__(self, url: str) -> None:
        assert url == "localhost:8000"

    def infer(self, model: str, inputs: list[Any]) -> "Server":
        folder = self.models / model
        config = parse((folder / "config.pbtxt").read_text(encoding="utf-8"))
        (sent,) = inputs
        assert f"TYPE_{sent.datatype}" == config["input"][0]["data_type"][0]
        assert sent.shape == [len(sent.data), *map(int, config["input"][0]["dims"])]
        session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
        (self.rows,) = session.run(["embeddings"], {sent.name: sent.data})
        return self

    def as_numpy(self, name: str) -> Any:
        assert name == "embeddings"
        return self.rows


@pytest.mark.parametrize("prompts", ["default", None])
def test_the_client_in_the_readme(
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prompts: str | None,
) -> None:
    if prompts is None:
        raw = json.loads((bundle_copy / "manifest.json").read_text()) | {"prompts": {}}
        (bundle_copy / "manifest.json").write_text(json.dumps(raw))
    to_triton(bundle_copy, tmp_path / "models")
    Image.fromarray(square(COLORS["green"], np.random.default_rng(3))).save(tmp_path / "photo.jpg")
    labels = COLORS if prompts else ("a cat", "a dog")
    expected = runtime.load(bundle_copy, labels=list(labels)).classify(tmp_path / "photo.jpg")

    module = ModuleType("tritonclient.http")
    monkeypatch.setattr(module, "InferenceServerClient", Server, raising=False)
    monkeypatch.setattr(module, "InferInput", Server.InferInput, raising=False)
    monkeypatch.setattr(Server, "models", tmp_path / "models", raising=False)
    monkeypatch.setitem(sys.modules, "tritonclient", ModuleType("tritonclient"))
    monkeypatch.setitem(sys.modules, "tritonclient.http", module)
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "models" / "README.md").read_text(encoding="utf-8")
    exec(code.split("```python\n")[1].split("```")[0], {})
    label, _, score = capsys.readouterr().out.strip().rpartition(" ")
    assert label == expected.label
    assert float(score) == pytest.approx(expected.score, abs=1e-4)
