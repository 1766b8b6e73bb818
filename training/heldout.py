"""Data that a run is measured on, epoch after epoch."""

from pathlib import Path

from rich.progress import Progress

from calibration.embed import Pictures, embed_pictures
from calibration.evaluation import Evaluation, evaluate
from calibration.pairs import Bad, check_bad, read_pairs
from runtime.manifest import ImageSpec
from runtime.tokenizer import Tokenizer

from .evaluate import head, image_encoder, text_encoder
from .model import ClipModel
from .options import TrainOptions

KEEP = 1 << 30  # bytes of pictures that stay in memory, as the model sees them


class HeldOut:
    """A table or folder, and what of it cannot be used (`bad`). Raises DataError where that is more
    than the options allow."""

    def __init__(self, source: Path, options: TrainOptions, spec: ImageSpec) -> None:
        self.source, self._options = source, options
        self.pairs = read_pairs(source, options.templates)
        self._pictures = Pictures(self.pairs.files, spec, KEEP)
        self.bad: tuple[Bad, ...] = ()
        self._check(self.pairs.bad)

    def evaluate(self, clip: ClipModel, tokenizer: Tokenizer, progress: Progress) -> Evaluation:
        """What a model reaches on it."""
        task = progress.add_task(f"evaluating on {self.source.name}", total=len(self.pairs))
        kept, images = embed_pictures(
            self.pairs, self._pictures, image_encoder(clip), lambda n: progress.advance(task, n)
        )
        self._check(kept.bad)
        texts = text_encoder(clip, tokenizer)
        found = evaluate(kept, images, texts, head(clip), self._options.templates)
        progress.remove_task(task)
        return found

    def _check(self, bad: tuple[Bad, ...]) -> None:
        total = len(self.pairs) + len(self.pairs.bad)
        check_bad(bad, total, self._options.max_bad, self.source)
        self.bad = bad
