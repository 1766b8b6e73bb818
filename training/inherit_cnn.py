"""A narrower CNN of inverted residuals that begins as its teacher, layer by layer.

What a block adds to the stream is linear (Sandler et al. 2018, arXiv:1801.04381), so that the
student's narrower stream can hold the principal components of the teacher's, as SliceGPT does for
transformers (Ashkboos et al. 2024, arXiv:2401.15024). Behind an activation those channels are kept
of which the next layer makes most. Then each dense layer is fitted, by least squares and in the
order of computation, to what the teacher computes there (He et al. 2017, arXiv:1707.06168) from
what the student has in its place.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PICTURES = 128  # to fit the layers on
_PLACES = 32  # of each picture's feature map, drawn at random
_BATCH = 32
_RIDGE = 3e-3  # of the inputs' mean variance: how far a layer is held to what it would inherit
_LEAST = 1e-6
_TRUNK = "EfficientNet"  # of timm: also MobileNet V1 and V2, MNASNet, and others

Told = Callable[[float], None]


class _Layer(NamedTuple):
    """A convolution or linear layer by its name, the norm behind it, and the streams of channels
    that it reads and writes; `block` where what it writes is that block's output, and linear."""

    name: str
    norm: str
    reads: str
    writes: str
    block: str = ""


def is_narrower(small: Any, large: Any) -> bool:
    """Whether both image towers are CNNs of inverted residuals with the same layers, of which none
    is wider in the small one."""
    own = _layers(small)
    return own == _layers(large) != [] and all(
        _fits(small.get_submodule(layer.name), large.get_submodule(layer.name)) for layer in own
    )


def _fits(small: Any, large: Any) -> bool:
    own, old = tuple(small.weight.shape), tuple(large.weight.shape)
    if isinstance(small, nn.Linear):
        return bool(own[0] == old[0] and own[1] <= old[1])
    same = ("kernel_size", "stride", "padding", "dilation")
    return all(getattr(small, name) == getattr(large, name) for name in same) and (
        own[0] <= old[0] and (own[1] == 1) == (old[1] == 1)
    )


def _layers(tower: Any) -> list[_Layer]:
    """The layers of a tower in the order of computation; none where it is of another family."""
    trunk: Any = getattr(tower, "trunk", None)
    projection = getattr(getattr(tower, "head", None), "proj", None)
    pooled = hasattr(getattr(tower, "head", None), "pool")  # by attention
    if type(trunk).__name__ != _TRUNK or not isinstance(projection, nn.Linear) or pooled:
        return []
    found, stream = [_Layer("trunk.conv_stem", "trunk.bn1", "pixels", "stem")], "stem"
    for s, stage in enumerate(trunk.blocks):
        for b, block in enumerate(stage):
            layers = _block(f"trunk.blocks.{s}.{b}", block, stream, f"stage {s}")
            if not layers:
                return []
            found, stream = found + layers, layers[-1].writes
    if not isinstance(trunk.conv_head, nn.Identity):
        found.append(_Layer("trunk.conv_head", "trunk.bn2", stream, "features"))
        stream = "features"
    found.append(_Layer("head.proj", "", stream, "embedding"))
    return found if all(_is_known(tower, layer) for layer in found) else []


def _is_known(tower: Any, layer: _Layer) -> bool:
    """Whether a layer is a Linear, or a dense or depthwise convolution; its norm a batch norm."""
    module = tower.get_submodule(layer.name)
    if layer.norm and not isinstance(tower.get_submodule(layer.norm), nn.BatchNorm2d):
        return False
    if not isinstance(module, nn.Conv2d):
        return isinstance(module, nn.Linear)
    depthwise = module.groups == module.in_channels == module.out_channels > 1
    return module.groups == 1 or (depthwise and module.kernel_size != (1, 1))


def _block(where: str, block: Any, reads: str, stage: str) -> list[_Layer]:
    """A block's layers; none where it is of an unknown kind."""
    hidden = f"{where} hidden"
    first = _Layer(f"{where}.conv_pw", f"{where}.bn1", reads, hidden)
    deep, last, norm = f"{where}.bn2", f"{where}.conv_pwl", "bn3"
    match type(block).__name__:
        case "InvertedResidual":
            layers = [first]
        case "DepthwiseSeparableConv" if not reads.startswith("stage"):
            layers, hidden = [], reads
            deep, last, norm = f"{where}.bn1", f"{where}.conv_pw", "bn2"
        case _:
            return []
    layers.append(_Layer(f"{where}.conv_dw", deep, hidden, hidden))
    if not isinstance(block.se, nn.Identity) and not hasattr(block.se, "conv_reduce"):
        return []
    if hasattr(block.se, "conv_reduce"):
        layers.append(_Layer(f"{where}.se.conv_reduce", "", hidden, f"{where} gate"))
        layers.append(_Layer(f"{where}.se.conv_expand", "", f"{where} gate", hidden))
    if isinstance(getattr(block, norm).act, nn.Identity):
        return [*layers, _Layer(last, f"{where}.{norm}", hidden, stage, where)]
    if block.has_skip:
        return []
    return [*layers, _Layer(last, f"{where}.{norm}", hidden, f"{where} output")]


@torch.no_grad()
def inherit_cnn(small: Any, large: Any, pictures: Tensor, told: Told = lambda _: None) -> str:
    """Fills a student's image tower, `is_narrower` than its teacher's, by what they compute in eval
    mode of `pictures`, float32 [N, 3, H, W]; says in words what was taken over. `told` hears the
    share that is done. Both towers and the pictures are on the CPU."""
    small.eval()
    large.eval()
    layers = _layers(small)
    readers = {layer.reads: layer.name for layer in layers}  # the last of each
    given = [layer.block or layer.name for layer in layers]
    seen = _look(large, pictures, list(readers.values()), given)
    maps = _maps(layers, readers, small, large, seen)
    for number, layer in enumerate(layers):
        own, old = small.get_submodule(layer.name), large.get_submodule(layer.name)
        to = maps[layer.writes]
        gain, offset = _norm(layer, large)
        weight = _mapped(old.weight, maps[layer.reads], gain[:, None] * to)
        if weight[0, 0].numel() > 1:  # spatial: of what it reads it has all that it needs
            own.weight.copy_(weight)
            made = _look(small, pictures, (), [layer.name]).outputs[layer.name].double()
            mean = made.mean(0) + offset @ to
        else:
            target = seen.outputs[given[number]].double()
            target = (target if layer.block else target * gain + offset) @ to
            made, mean = _fit(layer, small, pictures, weight.flatten(1), target)
        _set_norm(own, small.get_submodule(layer.norm or layer.name), made, mean)
        told((number + 1) / len(layers))
    kept, whole = (sum(m.shape[side] for m in maps.values()) for side in (1, 0))
    looked = f"{len(pictures)} picture{'s' * (len(pictures) != 1)}"
    return f"{kept:,} of {whole:,} channels, fitted on {looked}"


class _Seen(NamedTuple):
    """Rows [n, C], float32, of what modules get and give, by their names."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def _look(tower: Any, pictures: Tensor, reads: Sequence[str], writes: Sequence[str] = ()) -> _Seen:
    """What a tower's modules get and give when it looks at the pictures."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in reads}
    outputs: dict[str, list[Tensor]] = {name: [] for name in writes}

    def before(module: nn.Module, given: Any, name: str) -> None:
        inputs[name].append(_rows(given[0]))

    def after(module: nn.Module, given: Any, made: Tensor, name: str) -> None:
        outputs[name].append(_rows(made))

    hooks = [
        tower.get_submodule(name).register_forward_pre_hook(partial(before, name=name))
        for name in inputs
    ] + [
        tower.get_submodule(name).register_forward_hook(partial(after, name=name))
        for name in outputs
    ]
    for batch in torch.split(pictures, _BATCH):
        tower(batch)
    for hook in hooks:
        hook.remove()
    return _Seen(
        {name: torch.cat(rows) for name, rows in inputs.items()},
        {name: torch.cat(rows) for name, rows in outputs.items()},
    )


def _rows(value: Tensor) -> Tensor:
    """Some places of feature maps [N, C, H, W], the same ones in any network, as rows [n, C],
    float32; vectors [N, C] as they are."""
    flat = value.flatten(2) if value.dim() > 2 else value[:, :, None]
    count, width, places = flat.shape
    drawn = torch.Generator().manual_seed(places)
    chosen = torch.randint(places, (count, 1, min(places, _PLACES)), generator=drawn)
    rows = flat.gather(2, chosen.to(flat.device).expand(-1, width, -1))
    return rows.transpose(1, 2).flatten(0, 1).float().cpu()


def _maps(
    layers: Sequence[_Layer], readers: Mapping[str, str], small: Any, large: Any, seen: _Seen
) -> dict[str, Tensor]:
    """For each stream the map [C, c] from the teacher's channels to the student's, float64."""
    maps = {"pixels": torch.eye(3, dtype=torch.float64)}
    for layer in layers:
        if layer.writes in maps:
            continue
        width = len(small.get_submodule(layer.name).weight)
        if layer.block:
            blocks = [other.block for other in layers if other.writes == layer.writes]
            rows = torch.cat([seen.outputs[block] for block in blocks]).double()
            spread = torch.cov(rows.T, correction=0)
            maps[layer.writes] = torch.linalg.eigh(spread).eigenvectors[:, -width:]
        elif reader := readers.get(layer.writes):
            weights = large.get_submodule(reader).weight.double().transpose(0, 1).flatten(1)
            gets = seen.inputs[reader].double().square().mean(0)
            matters = gets * weights.square().sum(1)
            kept = matters.topk(width).indices.sort().values
            maps[layer.writes] = torch.eye(len(matters), dtype=torch.float64)[:, kept]
        else:  # the embedding
            maps[layer.writes] = torch.eye(width, dtype=torch.float64)
    return maps


def _mapped(weight: Tensor, reads: Tensor, writes: Tensor) -> Tensor:
    """A layer's weight [C_out, C_in, ...] between the student's channels, float64."""
    made = torch.einsum("oi...,op->pi...", weight.double(), writes)
    # One channel in is each one's own: a depthwise convolution.
    return made if weight.shape[1] == 1 else torch.einsum("pi...,iq->pq...", made, reads)


def _norm(layer: _Layer, large: Any) -> tuple[Tensor, Tensor]:
    """By what the teacher's norm behind a layer multiplies, and what it adds, float64 [C]."""
    if not layer.norm:
        width = len(large.get_submodule(layer.name).weight)
        return torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    norm = large.get_submodule(layer.norm)
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.double() - gain * norm.running_mean.double()


def _fit(
    layer: _Layer, small: Any, pictures: Tensor, weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Sets a layer's weight to bring what it makes of the student's rows nearest to `target`
    [n, p], by ridge regression about `weight` [p, q]; returns what it makes [n, p], and the mean
    that this should have."""
    reads = [layer.name]
    if layer.block and small.get_submodule(layer.block).has_skip:
        reads.append(layer.block)
    inputs = _look(small, pictures, reads).inputs
    if len(reads) > 1:
        target = target - inputs[layer.block]
    rows = inputs[layer.name].double()
    centred, wanted = rows - rows.mean(0), target - target.mean(0)
    squares = centred.T @ centred
    # What does not vary, as pictures of one scene do not, leaves a layer as it would inherit it.
    ridge = _RIDGE * squares.diagonal().mean() + _LEAST
    even = ridge * torch.eye(len(squares), dtype=torch.float64)
    fitted = torch.linalg.solve(squares + even, centred.T @ wanted + ridge * weight.T)
    own = small.get_submodule(layer.name)
    own.weight.copy_(fitted.T.reshape(own.weight.shape))
    return rows @ fitted, target.mean(0)


def _set_norm(layer: Any, norm: Any, made: Tensor, mean: Tensor) -> None:
    """Sets a norm, or a layer's bias where it has none behind it, to change nothing of what the
    layer makes [n, p] but its mean. In training a norm measures a batch: so it gets the statistics
    of what comes in."""
    if norm is layer:
        if layer.bias is not None:
            layer.bias.copy_(mean - made.mean(0))
        return
    norm.running_mean.copy_(made.mean(0))
    norm.running_var.copy_(made.var(0, correction=0))
    norm.weight.copy_((made.var(0, correction=0) + norm.eps).sqrt())
    norm.bias.copy_(mean)
