"""Folder or table → loaders, for one process or many."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from train_clip.data.pairs import PairList, plain_name
from train_clip.data.samples import (
    BatchTokenizer,
    Collate,
    GlobalBatchSampler,
    TrainingPairs,
    ValidationPairs,
    available_cores,
)
from train_clip.data.scan import Scan, scan_source
from train_clip.data.split import require_share, split_pairs
from train_clip.data.table import scan_table
from train_clip.data.tokenizer import Tokenizer
from train_clip.encoders.tokenizer import PretrainedTokenizer, wrap_tokenizer
from train_clip.errors import UserError
from train_clip.options import PairBy, SourceOptions
from train_clip.training.lightning_internals import resuming
from train_clip.training.signals import end_loaders_at_exit, outlive_the_first_signal

MAX_WORKERS = 8  # more than this many loader processes a GPU seldom helps, and each holds the list of files


class TextImageDataModule(L.LightningDataModule):
    """Images and captions that share a stem, anywhere below a folder, or that a table names.

    Each epoch's order depends on (seed, epoch) alone, each crop and caption on (seed, epoch, pair), whatever the number
    of processes and workers. Pairs that do not fill a global batch are left out, others each epoch.

    Args:
        folder: images, and captions in ``.txt`` files, one a line; None where there is a table.
        batch_size: pairs of a global batch, over all processes.
        num_workers: loader processes for each training process; None for one a core, 8 at
            most, and none where the model itself runs on the cores.
        image_size: side of the square that the model takes, in pixels.
        resize_ratio: least share of the largest square that the training crop keeps (train-CLIP's crop, for instance
            0.75); None for the paper's, a random square of the whole shorter side.
        shuffle: permute the pairs each epoch.
        custom_tokenizer: a Hugging Face tokenizer in place of CLIP's, or a ``PretrainedTokenizer``.
        val_share: share of the pairs held out for validation, chosen by file name.
        seed: decides order, crops and captions.
        context_length: tokens of a caption at most; the tokenizer's own where None (CLIP's: 77).
        pairs: a table of pairs in place of the folder, as ``scan_table`` reads it.
        val_pairs: a table of pairs to validate on, in place of ``val_share``.
        image_column: the tables' column of image paths.
        caption_column: the tables' column of captions.
        max_bad: share of the pairs that may turn out to be unreadable before a run stops; 1 for any.
        pair_by: what the names of a folder's pair share: ``stem``, or ``number`` for image1.jpg and text1.txt.

    Raises:
        UserError: from ``setup``: no pairs, or numbers that cannot work.
    """

    def __init__(  # noqa: PLR0913, people know these arguments
        self,
        folder: str | Path | None = None,
        batch_size: int = 256,
        num_workers: int | None = 0,
        image_size: int = 224,
        resize_ratio: float | None = None,
        shuffle: bool = True,
        custom_tokenizer: Callable[..., Any] | None = None,
        val_share: float = 0.0,
        seed: int = 0,
        context_length: int | None = None,
        *,
        pairs: str | Path | None = None,
        val_pairs: str | Path | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        max_bad: float = 0.01,
        pair_by: PairBy = "stem",
    ) -> None:
        super().__init__()
        require_share("val_share", val_share)
        for right, message in (
            (0 <= max_bad <= 1, f"max_bad is {max_bad}; expected a share from 0 (none) to 1 (any number)."),
            (
                folder is not None or pairs is not None,
                "No data was given. Expected --folder FOLDER, or a table of pairs (--pairs).",
            ),
            (
                resize_ratio is None or 0 < resize_ratio <= 1,
                f"resize_ratio is {resize_ratio}; expected above 0, up to 1.",
            ),
            (batch_size >= 2, f"batch_size is {batch_size}; a contrastive loss needs at least 2 pairs."),
            ((num_workers or 0) >= 0, f"num_workers is {num_workers}; expected 0 or above."),
            (image_size > 0, f"image_size is {image_size}; expected a number of pixels above 0."),
            (seed >= 0, f"seed is {seed}; expected 0 or above."),
            (
                context_length is None or context_length >= 2,
                f"context_length is {context_length}; expected 2 or above, for start and end.",
            ),
        ):
            if not right:
                raise UserError(message)
        self.folder = None if folder is None else Path(folder)
        self.val_table = None if val_pairs is None else Path(val_pairs)
        self.options = SourceOptions(
            pairs=None if pairs is None else Path(pairs),
            image_column=image_column,
            caption_column=caption_column,
            pair_by=pair_by,
        )
        self.max_bad = max_bad
        self.wanted_batch_size = self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size, self.resize_ratio, self.seed = image_size, resize_ratio, seed
        self.shuffle = shuffle
        self.val_share = 0.0 if val_pairs is not None else val_share
        self.collate = Collate(_tokenizer(custom_tokenizer, context_length))
        self.training_pairs = self.validation_pairs = PairList("", [], [])
        self._names = ""

    def setup(self, stage: str | None = None) -> None:
        """Find the pairs, the first time, and settle the batch size for the number of processes, each time."""
        scan = None
        if not self.training_pairs:
            scan = scan_source(self.folder, self.options).require_pairs()
            self.training_pairs, self.validation_pairs = split_pairs(scan.pairs, self.val_share)
            if self.val_table is not None:
                self.validation_pairs = scan_table(self.val_table, self.options).require_pairs().pairs
            self._names = pair_names(self.training_pairs)
        processes = self._process()[1]
        self.batch_size = fit_batch_size(self.wanted_batch_size, len(self.training_pairs), processes, self.source)
        if scan is not None:
            rank_zero_info(self._summary(scan))

    @property
    def source(self) -> Path:
        """The folder or the table."""
        return self.folder or self.options.pairs or Path()

    def train_dataloader(self) -> DataLoader[Any]:
        """Global batches of fixed size, this process's share."""
        dataset = TrainingPairs(self.training_pairs, self.image_size, self.resize_ratio, self.seed)
        process = self._process()
        sampler = GlobalBatchSampler(dataset, self.batch_size, self._consumed_batches, self.shuffle, self.seed, process)
        return self._loader(dataset, sampler=sampler, batch_size=self.batch_size // process[1], drop_last=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The held-out pairs in order; Lightning shares them among the processes. Nothing where none are held out."""
        if not self.validation_pairs:
            return []
        dataset = ValidationPairs(self.validation_pairs, self.image_size)
        return self._loader(dataset, batch_size=self.batch_size // self._process()[1])

    def state_dict(self) -> dict[str, Any]:
        """What the order of the data depends on, for a checkpoint to keep; the position in it is the module's count."""
        return {
            "batch_size": self.batch_size,
            "pairs": len(self.training_pairs),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "val_share": self.val_share,
            "resize_ratio": self.resize_ratio,
            "names": self._names,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold the data of a run that is resumed against what it began with, as ``require_same_data``."""
        if resuming(self.trainer):
            self.require_same_data(state_dict)

    def require_same_data(self, kept: Mapping[str, Any]) -> None:
        """Hold the data against what a run began with; names that have changed are only warned of.

        Args:
            kept: another data module's ``state_dict``.

        Raises:
            UserError: the order of the data is another, so that there is no going on in it.
        """
        own = self.state_dict()
        changed = [name for name in own if name not in ("names", "pairs") and kept.get(name, own[name]) != own[name]]
        if kept and kept["pairs"] // kept["batch_size"] != own["pairs"] // own["batch_size"]:
            changed.append("pairs")
        if changed:
            found = ", ".join(f"{name} {own[name]}, was {kept[name]}" for name in changed)
            raise UserError(
                f"{self.source}: the data is not what the run began with ({found}). Its place in the data and its "
                "learning rate are counted in batches of one order. Give the earlier values (--minibatch_size is free "
                "to change), or begin a new run."
            )
        if kept and kept["names"] != own["names"]:
            rank_zero_warn(
                f"{self.source}: some of the pairs have other names than when the run began. The run goes on at the "
                "same place in the order, where other pairs may stand: some come twice in this epoch, some not at all."
            )

    def _loader(self, dataset: Dataset[Any], **how: Any) -> DataLoader[Any]:
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device.type
        workers = self.num_workers
        if workers is None:
            # On a CPU the model's own threads take every core, and a loader that holds one up holds up all of them.
            workers = 0 if device == "cpu" else min(MAX_WORKERS, max(1, available_cores() // self._process()[1]))
        if workers:
            end_loaders_at_exit()
        return DataLoader(
            dataset,
            collate_fn=self.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device == "cuda",
            worker_init_fn=outlive_the_first_signal,
            **how,
        )

    def _process(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _consumed_batches(self) -> int:
        module = None if self.trainer is None else self.trainer.lightning_module
        return getattr(module, "consumed_batches", 0)

    def _summary(self, scan: Scan) -> str:
        left_out = len(self.training_pairs) % self.batch_size
        lines = []
        if self.batch_size < self.wanted_batch_size:
            lines.append(f"Fewer pairs than a batch: it shrinks from {self.wanted_batch_size} to {self.batch_size}.")
        lines += [
            f"{self.source}: {len(scan.pairs):,} pairs, {len(self.training_pairs):,} to train on and "
            f"{len(self.validation_pairs):,} held out; {len(self.training_pairs) // self.batch_size:,} batches of "
            f"{self.batch_size:,} an epoch"
            + (f", {left_out:,} pairs left out of an epoch, others each time." if left_out else ".")
        ]
        if cached := scan.pairs.num_cached:
            lines.append(f"  {cached:,} of {len(scan.pairs):,} images are read from npz/, in place of the image files.")
        if self.val_share and not self.validation_pairs:
            lines.append(
                f"  Too few to hold out a share of {self.val_share}: it takes 2 pairs to tell one from another."
            )
        if scan.lone_images:
            lines.append(f"  {len(scan.lone_images):,} images have no caption, for instance {scan.lone_images[0]}.")
        if scan.lone_captions:
            lines.append(f"  {len(scan.lone_captions):,} captions have no image, for instance {scan.lone_captions[0]}.")
        if scan.folder_links:
            lines.append(
                f"  {len(scan.folder_links):,} links to folders are not followed, for instance {scan.folder_links[0]}."
            )
        return "\n".join(lines)


def _tokenizer(custom: Any, context_length: int | None) -> BatchTokenizer:
    """CLIP's where there is no other; one of Hugging Face's form is wrapped."""
    if custom is None:
        return Tokenizer() if context_length is None else Tokenizer(context_length)
    return custom if isinstance(custom, Tokenizer | PretrainedTokenizer) else wrap_tokenizer(custom, context_length)


def pair_names(pairs: PairList) -> str:
    """A digest of the pairs' names and order, the same wherever the folder lies."""
    digest = hashlib.blake2b(digest_size=16)
    for name in pairs.names:
        digest.update(plain_name(name).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def fit_batch_size(wanted: int, num_pairs: int, num_processes: int, source: Path) -> int:
    """The global batch size to train with: the wanted one, or what the pairs allow where they are fewer.

    Args:
        wanted: pairs of a global batch.
        num_pairs: pairs to train on.
        num_processes: what the batch is shared among.
        source: named in messages.

    Raises:
        UserError: the batch does not divide among the processes, or there are too few pairs for any.
    """
    if wanted % num_processes:
        below = max(wanted - wanted % num_processes, num_processes)
        raise UserError(
            f"--batch_size {wanted} cannot be shared evenly among {num_processes} processes; it counts the pairs of "
            f"all of them together. Use {below} or {below + num_processes}."
        )
    if num_pairs >= wanted:
        return wanted
    fitting = num_pairs // num_processes * num_processes
    if fitting < 2:
        raise UserError(
            f"{source}: {num_pairs} pairs to train on, {num_processes} processes; expected at least 2 pairs, and one a "
            "process. Add pairs, or hold out fewer for validation (--val_share)."
        )
    return fitting
