"""The order of a run: fixed by the seed, for any number of processes, from any step."""

import dataclasses
import os
import pickle
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import solid, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress

from calibration.pairs import Bad, Pairs
from runtime.errors import DataError
from runtime.manifest import ImageSpec, TextSpec
from runtime.tokenizer import Tokenizer
from training import rows
from training.augment import Augmentation, drop_tokens
from training.batches import NO_ID, TENSORS, Batch, PairBatches, loader
from training.options import TrainOptions
from training.pictures import PictureReader
from training.rows import Maker, Row, TableRows, caption_id
from training.shards import Shards, open_shards
from training.sources import Plan, Source, make_plan, open_sources
from training.start import settled

SPEC = ImageSpec(height=8, width=8, mean=(0, 0, 0), std=(1, 1, 1))
Sources = Sequence[TableRows | Shards]


def table(folder: Path, count: int = 23, broken: Sequence[int] = (), labels: bool = False) -> Pairs:
    """Pictures whose red tells their number, with two captions each, one of them everybody's."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        content = b"this is no picture" if n in broken else solid(10 * n)
        (folder / f"{n}.png").write_bytes(content)
    return Pairs(
        tuple(folder / f"{n}.png" for n in range(count)),
        tuple((0, n + 1) for n in range(count)),
        ("a picture", *(f"picture number {n} of them all" for n in range(count))),
        ("even", "odd") if labels else (),
        tuple(n % 2 for n in range(count)) if labels else None,
    )


def shards(folder: Path, each: Sequence[int] = (5, 6, 7, 8), broken: Sequence[int] = ()) -> Shards:
    """Tar files with so many samples each; the numbers of the pictures go on from 100."""
    number = 100
    for place, count in enumerate(each):
        members: dict[str, bytes | str] = {}
        for n in range(number, number + count):
            members[f"{n}.png"] = b"this is no picture" if n in broken else solid(n)
            members[f"{n}.json"] = f'{{"caption": ["picture number {n}", "a picture"]}}'
        write_tar(folder / f"{place}.tar", members)
        number += count
    return open_shards(str(folder), ("{}",))


@pytest.fixture
def maker(tokenizer: Tokenizer) -> Maker:
    augmentation = Augmentation(SPEC, crop=0.7, flip=True)
    return Maker(PictureReader(augmentation), tokenizer, token_drop=0.3)


@pytest.fixture
def plain(tokenizer: Tokenizer) -> Maker:
    """Changes nothing."""
    return Maker(PictureReader(Augmentation(SPEC)), tokenizer, token_drop=0.0)


def batches(sources: Sources, maker: Maker, size: int = 6, **more: Any) -> PairBatches:
    """Three epochs of 20 pairs and more."""
    sizes = tuple(len(s.pairs) if isinstance(s, TableRows) else None for s in sources)
    plan = Plan(sizes, (1.0,) * len(sources), 20 * len(sources), size, seed=5)
    return PairBatches(sources, plan, maker, **{"epochs": 3, **more})


def assert_same(a: Sequence[Batch], b: Sequence[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.names == other.names
        for name in TENSORS:
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def numbers(batch: Batch) -> list[str]:
    return [name.rpartition("/")[2].partition(".")[0] for name in batch.names]


# The plan


def plan(sizes: Sequence[int | None], pairs: int, size: int = 4, **more: Any) -> Plan:
    return Plan(tuple(sizes), more.pop("weights", (1.0,) * len(sizes)), pairs, size, seed=3, **more)


def test_each_row_comes_once_an_epoch() -> None:
    own = plan([20], 20)
    assert own.batches == 5
    for epoch in range(3):
        slots = own.slots(epoch)
        assert (slots[:, 0] == 0).all() and sorted(slots[:, 1]) == list(range(20))
    assert not np.array_equal(own.slots(0), own.slots(1))
    np.testing.assert_array_equal(own.slots(1), plan([20], 20).slots(1))


def test_what_fills_no_batch_is_another_epochs() -> None:
    own = plan([23], 23)
    left_out = [set(range(23)) - set(own.slots(epoch)[:, 1].tolist()) for epoch in range(40)]
    assert all(len(rows) == 3 for rows in left_out)
    assert set.union(*left_out) == set(range(23))


def test_a_longer_epoch_goes_through_the_rows_again() -> None:
    drawn = plan([7], 28).slots(0)[:, 1]
    for begin in range(0, 28, 7):
        assert sorted(drawn[begin : begin + 7]) == list(range(7))


def test_a_mix_is_by_weight_and_no_row_comes_before_all_have() -> None:
    slots = plan([100, 30, None], 8000, weights=(1.0, 0.5, 2.5)).slots(0)
    share = np.bincount(slots[:, 0]) / 8000
    np.testing.assert_allclose(share, [0.25, 0.125, 0.625], atol=0.02)
    for source, size in ((0, 100), (1, 30)):
        counts = np.bincount(slots[slots[:, 0] == source, 1], minlength=size)
        assert counts.max() - counts.min() <= 1
    assert (slots[slots[:, 0] == 2, 1] == -1).all()


def test_the_plan_of_a_stream_takes_no_room() -> None:
    slots = plan([None], 1 << 40).slots(0)
    assert slots.shape == (1 << 40, 2) and slots.base is not None
    assert slots[1 << 39].tolist() == [0, -1]


# Opening what the options name


def options(data: Path | str, **changes: Any) -> TrainOptions:
    return TrainOptions(data=str(data), out=Path("out"), **changes)


def opened(chosen: TrainOptions) -> list[Source]:
    with Progress(disable=True) as progress:
        return open_sources(settled(chosen), progress)


def test_sources_are_tables_folders_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path / "folder" / "class", 3)
    shards(tmp_path / "shards")
    (tmp_path / "t=1.csv").write_text("file,caption\nfolder/class/0.png,one\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    mix = (f"{tmp_path}/shards=2", f"{tmp_path}/shards/{{0..1}}.tar=0.5", "~/t=1.csv=1e-3")
    found = opened(options("~/folder", mix=mix))
    assert [source.size for source in found] == [3, 26, 11, 1]
    assert [source.weight for source in found] == [1.0, 2.0, 0.5, 0.001]
    assert make_plan(found, options("x"), 1).pairs == 41
    assert make_plan(found, options("x", epoch_size=1000), 1).pairs == 1000
    assert make_plan(found, options("x"), 1).sizes == (3, None, None, 1)


@pytest.mark.parametrize("mix", ["more.csv", "more.csv=", "=1", "more.csv=0", "a=-1", "a=nan"])
def test_a_mix_without_a_weight(tmp_path: Path, mix: str) -> None:
    table(tmp_path / "class", 2)
    with pytest.raises(DataError, match="--mix is SOURCE=WEIGHT, such as more.csv=0.5, not"):
        opened(options(tmp_path, mix=(mix,)))


def test_from_the_net_only_shards_are_read() -> None:
    with pytest.raises(DataError, match="https://example.org/x.csv: from the net only shards"):
        opened(options("https://example.org/x.csv"))


@pytest.mark.parametrize(
    ("count", "world", "batch", "size"),
    [(23, 1, 8, 8), (5, 1, 8, 5), (5, 2, 8, 4), (2, 2, 8, 2), (2, 1, 2, 2)],
)
def test_a_batch_is_no_larger_than_the_data(count: int, world: int, batch: int, size: int) -> None:
    pairs = Pairs((Path("x"),) * count, ((0,),) * count, ("one",))
    found = make_plan([Source("x", pairs, 1.0)], options("x", batch_size=batch), world)
    assert found.batch_size == size and found.batches == count // size


@pytest.mark.parametrize(("count", "world"), [(1, 1), (1, 2), (3, 4)])
def test_too_few_pictures(count: int, world: int) -> None:
    pairs = Pairs((Path("x"),) * count, ((0,),) * count, ("one",))
    with pytest.raises(DataError, match=f"x: {count} pictures are too few: at least 2, and one"):
        make_plan([Source("x", pairs, 1.0)], options("x", batch_size=8), world)


# The same batches, whoever makes them


def test_workers_change_nothing(tmp_path: Path, maker: Maker) -> None:
    data = batches([TableRows(table(tmp_path), maker)], maker)
    whole = list(loader(data, 0))
    assert len(whole) == len(data) == 9
    for workers in (1, 2):
        assert_same(whole, list(loader(data, workers)))
    assert_same(whole, list(pickle.loads(pickle.dumps(data))))
    assert not torch.equal(whole[0].images, whole[3].images)


def test_ranks_side_by_side_are_the_batch_of_one(tmp_path: Path, maker: Maker) -> None:
    one = [TableRows(table(tmp_path / "a"), maker), TableRows(table(tmp_path / "b", 9), maker)]
    whole = list(batches(one, maker))
    ranks = [list(batches(one, maker, rank=rank, world=3)) for rank in range(3)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert [name for part in parts for name in part.names] == list(batch.names)
        for name in TENSORS:
            found = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(found, getattr(batch, name)), name


def test_ranks_of_shards_see_different_samples(tmp_path: Path, plain: Maker) -> None:
    source = shards(tmp_path, each=(6, 6))
    plan = Plan((None,), (1.0,), 12, 4, seed=0)
    names: list[str] = []
    for rank in range(2):
        data = PairBatches([source], plan, plain, epochs=1, rank=rank, world=2)
        names += [name for batch in data for name in batch.names]
    assert len(names) == len(set(names)) == 12


KINDS = ("table", "shards", "mix")


def make(kind: str, folder: Path, maker: Maker, broken: Sequence[int] = ()) -> Sources:
    made: list[TableRows | Shards] = []
    if kind != "shards":
        made.append(TableRows(table(folder / "table", broken=broken), maker))
    if kind != "table":
        made.append(shards(folder / "shards", broken=broken))
    return made


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_can_be_taken_up_at_any_step(
    tmp_path: Path, maker: Maker, kind: str, workers: int
) -> None:
    data = batches(make(kind, tmp_path, maker), maker)
    whole = list(loader(data, workers))
    assert_same(whole, list(loader(data, workers)))
    for start in (3, 4) if workers else range(1, len(whole) + 1):
        rest = dataclasses.replace(data, start=start)
        assert len(rest) == len(whole) - start
        assert_same(whole[start:], list(loader(rest, workers)))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_pictures_do_not_change_what_comes_after_a_new_start(
    tmp_path: Path, maker: Maker, kind: str
) -> None:
    broken = (0, 1, 7, 22, 100, 104, 111, 112, 120)
    data = batches(make(kind, tmp_path, maker, broken), maker, epochs=2)
    whole = list(data)
    for start in range(1, len(whole), 2 if kind == "mix" else 1):
        known = frozenset(bad.item for batch in whole[:start] for bad in batch.bad)
        anew = make(kind, tmp_path, maker, broken)  # a process that has met none of them yet
        rest = dataclasses.replace(data, sources=anew, start=start, known_bad=known)
        assert_same(whole[start:], list(rest))


def test_bad_pictures_are_the_same_to_every_number_of_workers(tmp_path: Path, maker: Maker) -> None:
    found = []
    for workers in (0, 2):
        data = batches(make("table", tmp_path, maker, broken=(0, 1, 7)), maker)
        found.append(list(loader(data, workers)))
    assert_same(*found)


# What cannot be used


def test_unreadable_pictures_are_replaced_by_the_next_and_said_once(
    tmp_path: Path, plain: Maker
) -> None:
    pairs = table(tmp_path, 6, broken=(2, 3, 5))
    data = batches([TableRows(pairs, plain)], plain)
    found = list(data)
    for number, batch in enumerate(found):
        epoch, first = divmod(number * 6, 18)
        wanted = data.plan.slots(epoch)[first : first + 6, 1].tolist()
        expected = {0: "0", 1: "1", 2: "4", 3: "4", 4: "4", 5: "0"}
        assert numbers(batch) == [expected[row] for row in wanted]
        assert [int(red) for red in batch.images[:, 0, 0, 0]] == [
            10 * int(n) for n in numbers(batch)
        ]
    bad = [bad for batch in found for bad in batch.bad]
    assert sorted(bad) == [Bad(str(tmp_path / f"{n}.png"), "unreadable picture") for n in (2, 3, 5)]


def test_a_picture_that_goes_away_is_bad(tmp_path: Path, plain: Maker) -> None:
    pairs = table(tmp_path, 3)
    pairs.files[1].unlink()
    found = list(batches([TableRows(pairs, plain)], plain))
    assert [bad.item for batch in found for bad in batch.bad] == [str(pairs.files[1])]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_picture_at_all(tmp_path: Path, plain: Maker, workers: int) -> None:
    data = batches([TableRows(table(tmp_path, 3, broken=range(3)), plain)], plain)
    with pytest.raises(DataError) as info:
        list(loader(data, workers))
    assert str(info.value).startswith("none of the 3 pictures could be read: ")
    assert "Traceback" not in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_picture_in_any_shard(
    tmp_path: Path, plain: Maker, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "IN_A_ROW", 50)
    data = batches([shards(tmp_path, each=(9,), broken=range(200))], plain)
    with pytest.raises(DataError) as info:
        list(loader(data, workers))
    message = str(info.value)
    assert message.startswith("50 samples in a row cannot be used; the last is ")
    assert message.endswith(": unreadable picture")


def test_bad_samples_are_said_with_the_batch_they_are_missing_from(
    tmp_path: Path, plain: Maker
) -> None:
    data = batches([shards(tmp_path, each=(18,), broken=(103, 110))], plain, epochs=1)
    found = list(data)
    bad = [bad for batch in found for bad in batch.bad]
    assert {b.item.rpartition(":")[2] for b in bad} == {"103", "110"}
    assert all(len(batch.names) == 6 for batch in found)


class Dies(TableRows):
    """Its process is killed, as the system does where memory runs out."""

    def take(self, index: int, seed: Sequence[int]) -> Row:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_is_killed_is_said(tmp_path: Path, plain: Maker) -> None:
    data = batches([Dies(table(tmp_path, 3), plain)], plain)
    with pytest.raises(DataError, match="a process that makes batches was killed .*--workers"):
        list(loader(data, 1))


class Signalled(TableRows):
    """A signal to the whole group of processes reaches the one that makes batches, too."""

    reached = False

    def take(self, index: int, seed: Sequence[int]) -> Row:
        if not self.reached:
            self.reached = True
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
        return super().take(index, seed)


def test_a_worker_leaves_signals_to_its_parent(tmp_path: Path, plain: Maker) -> None:
    data = batches([Signalled(table(tmp_path, 6), plain)], plain, epochs=1)
    assert len(list(loader(data, 1))) == len(data)


# What a batch holds


def test_a_batch_knows_every_true_caption(tmp_path: Path, plain: Maker) -> None:
    pairs = table(tmp_path / "t", 6)
    source = shards(tmp_path / "s", each=(9,))
    found = list(batches([TableRows(pairs, plain), source], plain, epochs=8))
    everybodys = caption_id("a picture")
    drawn = set()
    for batch in found:
        ids_of = zip(batch.names, batch.own.tolist(), batch.drawn.tolist(), strict=True)
        for name, own, one in ids_of:
            ids = [i for i in own if i != NO_ID]
            assert own == ids + [NO_ID] * (len(own) - len(ids)) and len(ids) == 2
            assert everybodys in ids and one in ids
            drawn.add((name, one == everybodys))
    assert len(drawn) == 2 * (6 + 9)  # in time each picture comes with each of its captions


@pytest.mark.parametrize("kind", KINDS)
def test_several_captions_of_a_picture(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    maker = Maker(PictureReader(Augmentation(SPEC)), tokenizer, captions=3)
    for batch in batches(make(kind, tmp_path, maker), maker):
        assert len(batch.images) == len(batch.names) == 6
        assert len(batch.texts) == len(batch.drawn) == len(batch.own) == len(batch.targets) == 18
        for own, drawn in zip(batch.own.view(6, 3, -1), batch.drawn.view(6, 3), strict=True):
            assert own.unique(dim=0).shape[0] == 1
            assert set(drawn.tolist()) == set(own[0].tolist()) - {NO_ID}  # both, one of them twice


def test_the_texts_are_the_drawn_captions(tmp_path: Path, plain: Maker) -> None:
    data = batches(make("mix", tmp_path, plain), plain)
    texts = ["a picture", *(f"picture number {n} of them all" for n in range(23))]
    texts += [f"picture number {n}" for n in range(100, 126)]
    tokens = {caption_id(t): plain.tokenizer([t])[0].tolist() for t in texts}
    for batch in data:
        assert batch.texts.dtype == torch.int64
        assert batch.texts.tolist() == [tokens[i] for i in batch.drawn.tolist()]


def test_caption_ids_are_of_the_text_alone() -> None:
    ids = [caption_id(t) for t in ("a dog", "a cat", "a dog", "", "ä")]
    assert ids[0] == ids[2] and len(set(ids)) == 4
    assert ids[0] == 9151722581430185315  # the same in every process and on every machine
    assert all(0 <= i < 2**63 for i in ids)


def test_targets_are_the_classes(tmp_path: Path, plain: Maker) -> None:
    sources = [
        TableRows(table(tmp_path / "a", 6, labels=True), plain),
        TableRows(table(tmp_path / "b", 6), plain),
    ]
    seen = set()
    for batch in batches(sources, plain):
        for name, target in zip(batch.names, batch.targets.tolist(), strict=True):
            path = Path(name)
            assert target == (int(path.stem) % 2 if path.parent.name == "a" else -1)
            seen.add(target)
    assert seen == {-1, 0, 1}


def test_features_and_embeddings_stand_for_pictures_and_texts(tmp_path: Path, plain: Maker) -> None:
    pairs = table(tmp_path, 6, broken=range(6))  # never opened
    features = np.arange(6 * 3 * 2, dtype=np.float16).reshape(6, 3, 2)
    embeddings = np.arange(7 * 4, dtype=np.float32).reshape(7, 4)
    table_rows = TableRows(pairs, plain, features, embeddings)
    views = set()
    for batch in batches([table_rows], plain, epochs=10):
        assert batch.images.dtype == torch.float16 and batch.texts.dtype == torch.float32
        for image, text, name in zip(batch.images, batch.texts, numbers(batch), strict=True):
            row, view = divmod(int(image[0]) // 2, 3)
            assert row == int(name)
            assert int(text[0]) // 4 in (0, row + 1)
            views.add((row, view))
    assert len(views) == 18


# Leaving out tokens

START, END = 7, 8


@settings(deadline=None)
@given(
    words=st.lists(st.integers(10, 99), max_size=8),
    share=st.floats(0, 0.999),
    seed=st.integers(0, 2**31),
    pad=st.sampled_from([0, END, 5]),
    framed=st.booleans(),
)
def test_dropped_tokens(words: list[int], share: float, seed: int, pad: int, framed: bool) -> None:
    start, end = (START, END) if framed else (None, None)
    spec = TextSpec(
        context_length=12,
        start_id=start,
        end_id=end,
        pad_id=pad,
        cleaning="lower",
        templates=("{}",),
    )
    frame = ([START], [END]) if framed else ([], [])
    tokens = np.array(frame[0] + words + frame[1], np.int32)
    padded = np.pad(tokens, (0, 12 - len(tokens)), constant_values=pad)
    found = drop_tokens(padded, share, spec, np.random.default_rng(seed))
    assert found.dtype == np.int32 and len(found) == 12
    left = [t for t in found.tolist() if t >= 10]
    assert left == words or (left and len(left) < len(words))
    remaining = iter(words)
    assert all(word in remaining for word in left)  # in their order
    kept = frame[0] + left + frame[1]
    assert found.tolist() == kept + [pad] * (12 - len(kept))


def test_the_share_of_tokens_that_are_dropped(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["one two three four five six seven eight"])[0]
    rng = np.random.default_rng(0)
    kept = [np.count_nonzero(drop_tokens(tokens, 0.3, tokenizer.spec, rng)) for _ in range(2000)]
    assert 8 - (np.mean(kept) - 2) == pytest.approx(8 * 0.3, abs=0.1)


def test_tokens_are_dropped_only_where_asked(tmp_path: Path, plain: Maker, maker: Maker) -> None:
    pairs = table(tmp_path, 6)
    lengths: list[set[int]] = []
    for own in (plain, maker):
        found = batches([TableRows(pairs, own)], own)
        lengths.append({int(n) for batch in found for n in (batch.texts != 0).sum(dim=1)})
    assert lengths[0] == {
        2 + len("a picture".split()),
        2 + len("picture number 0 of them all".split()),
    }
    assert min(lengths[1]) == 3 and len(lengths[1]) > 2
