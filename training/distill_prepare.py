"""From options to what a distillation works on: the teacher, its student, and the pictures."""

import contextlib
import dataclasses
import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from calibration.pairs import Pairs, check_bad, count, read_pairs
from calibration.pairs import describe as in_words
from runtime.errors import DataError, FrameError
from runtime.frames import Frame
from runtime.manifest import ImageSpec
from runtime.prompts import PromptBank, build_bank

from .augment import Augmentation
from .cache import FrameCache
from .distill_images import digests, left_out, open_images
from .distill_options import DistillOptions
from .distill_rows import DistillRows
from .distill_texts import Texts, gather_texts
from .embedding_store import Digests
from .evaluate import normalise
from .inherit import inherit
from .model import ClipModel, create
from .pictures import PictureReader
from .prepare import Material
from .qat import require_trained
from .rivals import Rivals, split
from .rows import Maker
from .sources import Source, make_plan
from .student import is_heir, make_student, open_source
from .student_text import unlock_text
from .teacher import Reader, Seen, Teacher, open_teacher
from .text_towers import TextTowers
from .towers import Towers
from .views import PLAIN


@dataclass(frozen=True, eq=False)
class DistillMaterial(Material):
    """The student and the data of a run, with the teacher's prompt bank, and what both are held
    against each other on."""

    teacher: Teacher
    bank: PromptBank | None
    rivals: Rivals | None


def prepare_distillation(
    options: DistillOptions, fabric: Fabric, console: Console, begins: bool = True
) -> DistillMaterial:
    """Opens the pictures, asks the teacher about all of them, and makes the student; where the run
    does not begin, the student's weights are in the state that it goes on from.

    Raises DataError for what does not work, before anything is trained.
    """
    clip = open_teacher(options.teacher)
    student = make_student(options, clip)
    if options.student_text:
        unlock_text(student)
    source = open_source(options, clip)
    heir = is_heir(options, student, source)
    if options.qat and not heir:
        require_trained(student, "--student")
    if options.grad_checkpointing:
        student.model.set_grad_checkpointing(True)
    teacher = _teacher(options, clip, student, fabric.is_global_zero)
    with Progress(console=console, transient=True, disable=console.quiet) as progress:
        pairs, hashes = _pictures(options, console, progress)
        learn, compare = _parts(options, hashes)
        if heir and begins:
            student = _inherit(options, student, source, pairs.keep(learn).files, progress)
        clip.model.to(fabric.device)
        student.model.to(fabric.device)
        bank = _bank(options, teacher)
        _require_loss(options, pairs)
        texts = _texts(options, pairs.keep(learn))
        rivals = _rivals(options, teacher, student, texts, pairs, hashes, compare, progress)
        towers = _towers(student, teacher, texts)
        rows = _rows(options, teacher, student, pairs.keep(learn), hashes[learn], progress)
    clip.model.to("cpu")  # it has said all: a GPU's memory is the student's
    check_bad(rows.pairs.bad, len(pairs) + len(pairs.bad), options.max_bad, "--images")
    plan = make_plan([Source("--images", rows.pairs, 1.0)], options, fabric.world_size)
    about = _about(options, teacher, rows.seen, hashes)
    if bank is not None:
        about["labels"] = hashlib.sha256(repr(options.label_set).encode()).hexdigest()
    if texts:
        about["texts"] = _about_texts(texts)
    return DistillMaterial(
        student, towers, teacher.tokenizer_json, teacher.tokenizer, rows.maker, [rows],
        plan, [about], teacher, bank, rivals,
    )  # fmt: skip


def _require_loss(options: DistillOptions, pairs: Pairs) -> None:
    """Raises DataError where no loss is left that has something to learn from."""
    if options.embedding or options.affinity:
        return
    if options.soft_labels and options.label_set is not None:
        return
    if not (options.contrast and pairs.texts):
        raise DataError(
            "--embedding and --affinity are 0, and there are neither --labels for --soft-labels "
            "nor captions for --contrast: nothing would be learned"
        )


def reopen_rivals(options: DistillOptions) -> Rivals | None:
    """What the student `options.out` and its teacher were compared on, once it is trained; None
    where that was nothing. The teacher is not asked again for what is kept."""
    clip, student = open_teacher(options.teacher), create(str(options.out))
    teacher = _teacher(options, clip, student)
    with Progress(disable=True) as progress:
        pairs, hashes = _pictures(options, Console(quiet=True), progress)
        learn, compare = _parts(options, hashes)
        texts = _texts(options, pairs.keep(learn))
        return _rivals(options, teacher, student, texts, pairs, hashes, compare, progress)


def _teacher(
    options: DistillOptions, clip: ClipModel, student: ClipModel, asked: bool = True
) -> Teacher:
    room = options.cache or options.run
    view = Augmentation(student.image, options.crop, options.flip, options.rotate, options.jitter)
    return Teacher(
        clip, room / "teacher", view, options.seed, options.workers, options.tokenizer,
        options.precision, asked,
    )  # fmt: skip


def _parts(options: DistillOptions, hashes: Digests) -> tuple[list[int], list[int]]:
    """The rows to learn from, and those to compare on where there is no --val."""
    learn, compare = list(range(len(hashes))), list[int]()
    if options.val is None:
        learn, compare = split(hashes, options.held_out, options.seed)
    if not learn:
        raise DataError(f"--images: {len(hashes)} pictures are too few")
    return learn, compare


def _pictures(
    options: DistillOptions, console: Console, progress: Progress
) -> tuple[Pairs, Digests]:
    """All pictures whose file can be read, and the hashes of their content."""
    room = (options.cache or options.run) / "frames"
    pairs = open_images(options.images, options.fps, room, options.max_bad, progress)
    hashes, good = digests(pairs.files, progress)
    pairs = left_out(pairs, good, "unreadable file")
    captions = f", {len(pairs.texts)} captions" if pairs.texts else ""
    console.print(f"{options.data}: {len(pairs)} pictures{captions}")
    if pairs.bad:
        console.print(f"[yellow]left out: {in_words(pairs.bad)}[/]")
    return pairs, hashes[good]


def _inherit(
    options: DistillOptions,
    student: ClipModel,
    source: ClipModel,
    files: Sequence[Path],
    progress: Progress,
) -> ClipModel:
    """The student with what it takes over of `source`, by the look of some of the pictures."""
    task = progress.add_task(f"the student becomes like {source.name}", total=1.0)

    def some(count: int) -> Tensor:
        drawn = np.random.default_rng(options.seed).permutation(len(files))
        frames = list(islice(_readable([files[n] for n in drawn], student.image), count))
        if not frames:
            raise DataError(f"--images: none of {len(files)} pictures can be read")
        return normalise(torch.from_numpy(np.stack(frames)), student.image)

    taken = inherit(student, source, some, lambda done: progress.update(task, completed=done))
    progress.update(task, visible=False)
    progress.console.print(f"the student begins with weights that are there: {taken}")
    return dataclasses.replace(student, source=taken, fresh=frozenset())


def _readable(files: Sequence[Path], spec: ImageSpec) -> Iterator[Frame]:
    """Those pictures that can be read, as a model with the input `spec` sees them."""
    reader = PictureReader(Augmentation(spec))
    for file in files:
        with contextlib.suppress(FrameError, OSError):
            yield reader.file(file)


def _bank(options: DistillOptions, teacher: Teacher) -> PromptBank | None:
    labels = options.label_set
    return None if labels is None else build_bank(labels, options.templates, teacher.read, "")


def _texts(options: DistillOptions, pairs: Pairs) -> Texts | None:
    """What a text tower of the student's own learns from; None where it has none."""
    if not options.student_text:
        return None
    used = sorted({caption for own in pairs.captions for caption in own})
    captions = [pairs.texts[caption] for caption in used]
    return gather_texts(
        options.texts, options.label_set, captions, options.templates, options.held_out,
        options.seed,
    )  # fmt: skip


def _towers(student: ClipModel, teacher: Teacher, texts: Texts | None) -> Towers:
    if texts is None:
        return Towers(student)
    tokens = torch.from_numpy(teacher.tokenizer(texts.learn))
    return TextTowers(student, tokens, torch.from_numpy(teacher.read(texts.learn)))


def _about_texts(texts: Texts) -> dict[str, Any]:
    """What training.json says of the texts that are learned."""
    return {
        "learned": len(texts.learn),
        "compared": len(texts.compare),
        "held_out": not set(texts.compare) & set(texts.learn),
        "fingerprint": hashlib.sha256(repr(texts).encode()).hexdigest(),
    }


def _rivals(
    options: DistillOptions,
    teacher: Teacher,
    student: ClipModel,
    texts: Texts | None,
    pairs: Pairs,
    hashes: Digests,
    compare: Sequence[int],
    progress: Progress,
) -> Rivals | None:
    """What both are compared on: --val, else the pictures that were set apart."""
    if options.val is not None:
        pairs = read_pairs(options.val, options.templates)
        check_bad(pairs.bad, len(pairs) + len(pairs.bad), options.max_bad, options.val)
        hashes, good = digests(pairs.files, progress)
        pairs, hashes = left_out(pairs, good, "unreadable file"), hashes[good]
    elif compare:
        pairs, hashes = dataclasses.replace(pairs.keep(compare), bad=()), hashes[compare]
    else:
        return None
    seen = teacher.see(pairs, hashes, [PLAIN], progress)
    bad = seen.pairs.bad
    check_bad(bad, len(seen.pairs) + len(bad), options.max_bad, options.val or "--images")
    compared = texts.compare if texts else ()
    return Rivals(
        teacher, seen.pairs, seen.said[:, 0], options.label_set, options.templates, student.image,
        compared,
    )  # fmt: skip


def _rows(
    options: DistillOptions,
    teacher: Teacher,
    student: ClipModel,
    pairs: Pairs,
    hashes: Digests,
    progress: Progress,
) -> DistillRows:
    exact = teacher.reader.view.exact
    numbers = [PLAIN] if exact else list(range(1, options.views + 1))
    seen = teacher.see(pairs, hashes, numbers, progress)
    name = f"pictures-{platform.node()}" if options.nodes > 1 else "pictures"
    cache = FrameCache(options.cache / name) if options.cache else None
    view = teacher.reader.view
    pictures = PictureReader(view, cache)
    maker = Maker(pictures, teacher.tokenizer, options.captions)
    reader = Reader(view, student.image, pictures, PictureReader(Augmentation(student.image)))
    texts = teacher.read(seen.pairs.texts)
    return DistillRows(seen, maker, reader, texts)


def _about(
    options: DistillOptions, teacher: Teacher, seen: Seen, hashes: Digests
) -> dict[str, Any]:
    """What training.json says of the pictures."""
    pairs = seen.pairs
    return {
        "source": options.data,
        "images": len(pairs),
        "captions": len(pairs.texts),
        "views": seen.places.shape[1],
        "bad": count(pairs.bad),
        "fingerprint": hashlib.sha256(hashes.tobytes() + repr(pairs.texts).encode()).hexdigest(),
        "teacher": {"name": teacher.clip.name, "embeddings": seen.store.folder.name},
    }
