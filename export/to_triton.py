"""From a bundle to a model repository of NVIDIA's Triton Inference Server.

    from export.to_triton import to_triton

    to_triton(Path("bundle"), Path("models"))  # then: tritonserver --model-repository=models

Both encoders are served by Triton's ONNX Runtime backend, with dynamic batching. A configuration
is a `ModelConfig` of Triton's `model_config.proto` in protobuf's text format.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Template

import msgspec

from runtime.backends import Border, image_border, text_border
from runtime.bundle import Bundle
from runtime.errors import DataError
from runtime.folders import check_target, new_folder
from runtime.manifest import Manifest

MARKER = "edgeclip-triton.json"  # Triton reads folders only, so files may lie beside them
MAX_BATCH = 1024
QUEUE_DELAY = 2000  # microseconds; what a lone request loses by waiting for others
_TYPES = {"frames": "TYPE_UINT8", "tokens": "TYPE_INT32"}


def to_triton(
    bundle: Path,
    target: Path,
    precision: str = "auto",
    max_batch: int = 32,
    force: bool = False,
) -> list[Path]:
    """Writes a Triton model repository with the bundle's encoders; returns its files.

    `precision` is that of the image encoder; "auto" takes fp32 where it was accepted, else the
    first accepted one. A rejected one is refused also when it is named: a server's clients do not
    see the figures that rejected it. `force` replaces a repository that this function wrote, and
    nothing else. The folder appears whole or not at all. Raises DataError for options that are
    not usable, and BundleError where the bundle is damaged.
    """
    if not 1 <= max_batch <= MAX_BATCH:
        raise DataError(f"max_batch must be from 1 to {MAX_BATCH}, it is {max_batch}")
    source = Bundle(bundle)
    target = check_target(target, MARKER, force)
    _check_apart(source.folder.resolve(), target)
    chosen = _choose(source, precision)
    with new_folder(target, MARKER, force) as folder:
        _write_models(source, chosen, max_batch, folder)
        (folder / "README.md").write_text(_readme(source, chosen, max_batch), encoding="utf-8")
        (folder / MARKER).write_text(_marker(source.manifest, chosen), encoding="utf-8")
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [target / name for name in names]


def _check_apart(bundle: Path, target: Path) -> None:
    """A repository inside the bundle would be a stranger there; around it, it would replace it."""
    if target.is_relative_to(bundle) or bundle.is_relative_to(target):
        raise DataError(f"{target} and the bundle {bundle} lie in each other; name another folder")


def _choose(bundle: Bundle, precision: str) -> str:
    """The precision to serve: an accepted one. Raises DataError."""
    have = bundle.manifest.precisions
    accepted = [name for name, entry in have.items() if entry.status == "accepted"]
    if precision == "auto" and accepted:
        return "fp32" if "fp32" in accepted else accepted[0]
    if precision in accepted:
        return precision
    names = ", ".join(accepted) or "none: export the bundle again with looser limits"
    if precision == "auto":
        raise DataError(f"{bundle.folder} has no precision to serve; accepted are {names}")
    why = "was rejected by its gate" if precision in have else "is not there"
    raise DataError(f"{bundle.folder}: the precision {precision!r} {why}; accepted are {names}")


def _write_models(bundle: Bundle, precision: str, max_batch: int, folder: Path) -> None:
    made = bundle.manifest
    image = made.precisions[precision].image
    for kind, file, border in (
        ("image", image, image_border(made)),
        ("text", made.text_encoder, text_border(made)),
    ):
        model = folder / f"{base_name(made)}_{kind}"
        (model / "1").mkdir(parents=True)
        shutil.copyfile(bundle.file(file), model / "1" / "model.onnx")
        parameters = dict(_parameters(made, kind, precision, file))
        text = config(model.name, border, max_batch, parameters)
        (model / "config.pbtxt").write_text(text, encoding="utf-8")


def base_name(made: Manifest) -> str:
    """The model's name with the characters that Triton, file systems and URLs all take."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", made.model.name).strip("._-")[:100] or "model"


def _parameters(made: Manifest, kind: str, precision: str, file: str) -> Iterator[tuple[str, str]]:
    """What a client needs to know of the manifest, under the manifest's own names."""
    if kind == "image":
        yield "precision", precision
    yield "sha256", made.files[file].sha256
    spec = made.image if kind == "image" else made.text
    for section, record in (("model", made.model), ("head", made.head), (kind, spec)):
        for name, value in msgspec.structs.asdict(record).items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{section}.{name}", text


def config(name: str, border: Border, max_batch: int, parameters: dict[str, str]) -> str:
    """The content of `config.pbtxt`; the batch is not among the dims."""
    sizes = sorted({max(1, max_batch // 4), max(1, max_batch // 2), max_batch})
    return _CONFIG.substitute(
        name=quote(name),
        batch=max_batch,
        input=quote(border.name),
        type=_TYPES[border.name],
        dims=_numbers(border.shape),
        dim=border.dim,
        sizes=_numbers(sizes),
        delay=QUEUE_DELAY,
        parameters="\n".join(
            f"parameters {{ key: {quote(key)} value: {{ string_value: {quote(value)} }} }}"
            for key, value in parameters.items()
        ),
    )


def quote(text: str) -> str:
    """A string in protobuf's text format: on one line, whatever `text` holds."""
    text = re.sub(r'["\\]', r"\\\g<0>", text)
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\{ord(found[0]):03o}", text) + '"'


def _numbers(values: Iterable[int]) -> str:
    return f"[ {', '.join(map(str, values))} ]"


def _marker(made: Manifest, precision: str) -> str:
    record = {
        "model": made.model.name,
        "weights_sha256": made.model.weights_sha256,
        "precision": precision,
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _readme(bundle: Bundle, precision: str, max_batch: int) -> str:
    made = bundle.manifest
    bank = next(iter(made.prompts), None)
    labels = Template(_BANK).substitute(bank=repr(bank)) if bank else _LABELS
    return _README.substitute(
        name=base_name(made),
        precision=precision,
        key=repr(precision),
        batch=max_batch,
        labels=labels,
        others=_OTHERS if bank else "",
        folder=repr(bundle.folder.resolve().name),
    )


_CONFIG = Template("""\
# Written by edgeclip; the dims are without the batch.
name: $name
platform: "onnxruntime_onnx"
max_batch_size: $batch
input [ { name: $input data_type: $type dims: $dims } ]
output [ { name: "embeddings" data_type: TYPE_FP32 dims: [ $dim ] } ]
# How long a request waits for others to share its batch: 0 is best where there is one client.
dynamic_batching {
  preferred_batch_size: $sizes
  max_queue_delay_microseconds: $delay
}
# There is no instance_group: Triton runs one instance on each GPU, or one on the CPU.
# For clients; Triton does not read it. Mean and std are applied inside the encoder.
$parameters
""")

_BANK = """\
encoder = made.files[made.text_encoder].sha256
bank = load_bank(bundle.file(made.prompts[$bank]), encoder, made.model.embedding_dim)"""

_LABELS = """\
tokens = Tokenizer(bundle.file(made.tokenizer).read_bytes(), made.text)
bank = build_bank(
    ["a cat", "a dog"], made.text.templates,
    lambda texts: np.concatenate([embed("text", "tokens", tokens([text])) for text in texts]), "",
)"""

_OTHERS = f"""
Other labels need no export; the server's text encoder embeds them. In place of `bank = ...`:

```python
{_LABELS}
```
"""

_README = Template("""\
# $name on Triton Inference Server

Start the server in this folder (for YY.MM put a release that your driver can run):

    docker run --rm --gpus all -p 8000:8000 -v "$$PWD":/models \\
        nvcr.io/nvidia/tritonserver:YY.MM-py3 tritonserver --model-repository=/models

| model | input | output |
|---|---|---|
| `${name}_image` ($precision) | `frames`, uint8 RGB [N, H, W, 3] | `embeddings`, float32 [N, D] |
| `${name}_text` | `tokens`, int32 [N, L] | `embeddings`, float32 [N, D] |

N is at most $batch; the embeddings are unit rows. Frames are made by `runtime.preprocess`, tokens
by `runtime.tokenizer`. Mean and standard deviation are applied inside the encoder. What the bundle
says of the model, the preprocessing and the scores is in the `parameters` of each `config.pbtxt`,
which a client can ask the server for (`client.get_model_config`).

A client needs no inference backend, but the bundle (of which it reads all but the encoders) and
`pip install edgeclip "tritonclient[http]"`:

```python
import numpy as np
import tritonclient.http as triton
from runtime.bank_file import load_bank
from runtime.bundle import Bundle
from runtime.head import predictions
from runtime.preprocess import preprocess
from runtime.prompts import build_bank
from runtime.tokenizer import Tokenizer

client = triton.InferenceServerClient("localhost:8000")

def embed(kind, name, batch):
    sent = triton.InferInput(name, list(batch.shape), batch.dtype.name.upper())
    sent.set_data_from_numpy(batch)
    return client.infer(f"${name}_{kind}", [sent]).as_numpy("embeddings")

bundle = Bundle($folder)
made = bundle.manifest
$labels
frames = np.stack([preprocess("photo.jpg", made.image)])
cosines = embed("image", "frames", frames) @ bank.rows.T
for found in predictions(cosines, bank, made.head, precision=$key):
    print(found.label, found.score)
```
$others""")
