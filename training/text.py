"""The tokenizer of a model: its `tokenizer.json`, and how texts are cleaned and framed for it."""

import gzip
import json
from pathlib import Path
from typing import Any

from .model import ClipModel

# isort: split
import tokenizers
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from tokenizers import Regex, models, pre_tokenizers

from runtime.errors import DataError
from runtime.label_sets import DEFAULT_TEMPLATES
from runtime.manifest import TextSpec

_WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def text_side(
    clip: ClipModel, tokenizer: Path | None = None, templates: tuple[str, ...] = DEFAULT_TEMPLATES
) -> tuple[bytes, TextSpec]:
    """The content of a model's `tokenizer.json`, and its TextSpec.

    A model with CLIP's own vocabulary needs nothing. One with a Hugging Face tokenizer takes it
    from `tokenizer` (a file, or a folder with one), the checkpoint folder, or the Hugging Face
    hub, in this order. Raises DataError, naming what is missing.
    """
    if not hasattr(clip.model, "vocab_size"):
        raise DataError(
            f"{clip.name} is no CLIP of two towers: a CoCa can teach (edgeclip distill --teacher), "
            "but not be trained, measured or exported"
        )
    config = clip.config["text_cfg"]
    kwargs = dict(config.get("tokenizer_kwargs") or {})
    if config.get("hf_tokenizer_name"):
        file = _tokenizer_file(tokenizer, clip.folder, config["hf_tokenizer_name"])
        content, (start, end, pad) = _with_special_ids(file)
        cleaning = kwargs.pop("clean", "whitespace")
        if kwargs.pop("strip_sep_token", False) or config.get("tokenizer_mode"):
            raise DataError(f"{clip.name}: this kind of tokenizer cannot be exported yet")
    else:
        if tokenizer:
            raise DataError(
                f"{clip.name} has CLIP's own vocabulary: --tokenizer does not go with it"
            )
        content, (start, end, pad) = clip_tokenizer(), (49406, 49407, 0)
        cleaning = kwargs.pop("clean", "lower")
        if kwargs.pop("reduction_mask", ""):
            raise DataError(f"{clip.name}: a tokenizer with a reduction mask cannot be exported")
    largest = max(tokenizers.Tokenizer.from_buffer(content).get_vocab().values())
    if largest >= clip.model.vocab_size:
        raise DataError(
            f"{clip.name} has {clip.model.vocab_size} tokens (vocab_size), "
            f"its tokenizer has {largest + 1}"
        )
    spec = TextSpec(
        context_length=clip.context_length,
        start_id=start,
        end_id=end,
        pad_id=pad,
        cleaning=cleaning,
        templates=templates,
    )
    return content, spec


def clip_tokenizer() -> bytes:
    """CLIP's byte-pair vocabulary (49,408 tokens, as packed with open_clip) as a tokenizer.json.

    Lower-casing and cleaning are left to the caller; digits stand alone and a word's last piece
    ends in `</w>`, as in Radford et al.'s `SimpleTokenizer`.
    """
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as stream:
        lines = stream.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(line.split()[0], line.split()[1]) for line in lines]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge) for merge in merges] + ["<start_of_text>", "<end_of_text>"]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return tokenizer.to_str().encode()


def _tokenizer_file(given: Path | None, checkpoint: Path | None, hub_name: str) -> Path:
    if given:
        file = given / "tokenizer.json" if given.is_dir() else given
        if not file.is_file():
            raise DataError(f"--tokenizer {given}: there is no tokenizer.json")
        return file
    if checkpoint and (checkpoint / "tokenizer.json").is_file():
        return checkpoint / "tokenizer.json"
    from huggingface_hub import hf_hub_download

    try:
        for name in ("tokenizer_config.json", "tokenizer.json"):
            path = hf_hub_download(hub_name, name)
    except Exception as error:  # offline, no such repository, no such file
        where = f" in {checkpoint}, nor" if checkpoint else ""
        raise DataError(
            f"this model's text encoder needs the Hugging Face tokenizer {hub_name!r}, and there "
            f"is no tokenizer.json{where} to be had from the hub ({type(error).__name__}); "
            "give the file, or a folder with it and its tokenizer_config.json, by --tokenizer"
        ) from error
    return Path(path)


def _with_special_ids(file: Path) -> tuple[bytes, tuple[int | None, int | None, int]]:
    """Ids of start, end and padding: what the tokenizer puts around a text, and pads with.

    The returned content also states the padding, so that it needs no other file from then on.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"{file} is not a tokenizer: {error}") from error
    pad = tokenizer.padding["pad_id"] if tokenizer.padding else _pad_id(tokenizer, file.parent)
    tokenizer.no_padding()
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a").ids
    at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), -1)
    before, after = framed[:at], framed[at + len(bare) :]
    if at < 0 or len(before) > 1 or len(after) > 1:
        raise DataError(f"{file} puts {framed} around {bare}: not supported yet")
    tokenizer.enable_padding(pad_id=pad, pad_token=tokenizer.id_to_token(pad))
    ids = (before[0] if before else None), (after[0] if after else None), pad
    return tokenizer.to_str().encode(), ids


def _pad_id(tokenizer: tokenizers.Tokenizer, folder: Path) -> int:
    path = folder / "tokenizer_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        token = config.get("pad_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a JSON object: {error}") from error
    token = token["content"] if isinstance(token, dict) else token
    pad = tokenizer.token_to_id(token) if token else None
    if pad is None:
        raise DataError(
            f"{folder}: tokenizer.json has no padding and tokenizer_config.json no pad_token; "
            "put the checkpoint's own tokenizer_config.json beside tokenizer.json"
        )
    return pad
