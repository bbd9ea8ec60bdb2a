"""Folder or table → data loaders, for one process or many."""

import atexit
import functools
import hashlib
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Unpack

from lightning.pytorch import LightningDataModule, utilities
from torch.utils.data import DataLoader
from typing_extensions import override

from train_clip import cores, gather
from train_clip.data import samples, scan, table, tokenizer
from train_clip.data.pairs import PairList, plain_name, split_pairs
from train_clip.data.workers import loader
from train_clip.errors import UserError
from train_clip.keywords import DataKeywords, OptionsByName
from train_clip.options import DataOptions, StepOptions, WeightOptions
from train_clip.printing import printable
from train_clip.training import lightning_internals, same_run, signals

MAX_WORKERS = 8  # more than this many loader processes a GPU seldom helps, and each holds the list of files

OPEN_FILES = 64  # of a run without loader processes
OPEN_FILES_OF_WORKER = 8  # pipes, and batches that travel in shared memory


class TextImageDataModule(LightningDataModule):
    """Images and captions that share a stem, anywhere below a folder, or that a table names.

    Each epoch's order depends on (seed, epoch) alone, each crop and caption on (seed, epoch, pair), whatever the number
    of processes and workers. Pairs that do not fill a global batch are left out, different ones each epoch. Without a
    Trainer each iteration of the loader is an epoch.

    Arguments that are not listed here are options of ``train_clip.options.DataOptions``.

    Args:
        image_size: side of the square that the model takes, in pixels.
        custom_tokenizer: a Hugging Face tokenizer instead of CLIP's, or one whose ``batch`` returns tokens.
        seed: seed of the order, crops and captions.
        context_length: maximum number of tokens; None for the tokenizer's own (CLIP's: 77).
    """

    __signature__ = OptionsByName(DataOptions)

    def __init__(  # noqa: PLR0913, people know these arguments
        self,
        folder: str | Path | None = None,
        batch_size: int = DataOptions.batch_size,
        num_workers: int | None = DataOptions.num_workers,
        image_size: int = 224,
        resize_ratio: float | None = DataOptions.resize_ratio,
        shuffle: bool = DataOptions.shuffle,
        custom_tokenizer: Any = None,
        val_share: float = DataOptions.val_share,
        seed: int = StepOptions.seed,
        context_length: int | None = None,
        **options: Unpack[DataKeywords],
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {"folder": folder, **options}
        for name in ("folder", "pairs", "val_pairs"):
            given[name] = None if given.get(name) is None else Path(given[name])
        self.options = DataOptions(
            batch_size=batch_size,
            num_workers=num_workers,
            resize_ratio=resize_ratio,
            shuffle=shuffle,
            val_share=val_share if given["val_pairs"] is None else 0.0,
            **given,
        )
        _, self.source = scan.given_source(self.options.folder, self.options)
        StepOptions(seed=seed)
        WeightOptions(image_size=image_size, context_length=context_length)
        self.batch_size = batch_size  # fewer where there are fewer pairs, see ``setup``
        self.image_size, self.seed = image_size, seed
        self.tokenizer = _tokenizer(custom_tokenizer, context_length)
        self.training_pairs = self.validation_pairs = PairList("", [], [])
        self._names = ""

    @override
    def setup(self, stage: str | None = None) -> None:
        found, options = None, self.options
        if not self.training_pairs:
            found = scan.scan_source(options.folder, options).require_pairs()
            self.training_pairs, self.validation_pairs = split_pairs(found.pairs, options.val_share)
            if options.val_pairs is not None:
                self.validation_pairs = table.scan_table(options.val_pairs, options).require_pairs().pairs
            self._names = pair_names(self.training_pairs)
        processes = self._process()[1]
        self.batch_size = fit_batch_size(options.batch_size, self.training_pairs.per_epoch, processes, self.source)
        if found is not None:
            utilities.rank_zero_info(self._summary(found))

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        how, process = self.options, self._process()
        dataset = samples.TrainingPairs(self.training_pairs, self.image_size, how.resize_ratio, self.seed)
        order = samples.GlobalBatchSampler(
            self.training_pairs, self.batch_size, self._consumed_batches, how.shuffle, self.seed, process
        )
        return self._loader(dataset, sampler=order, drop_last=True, say=utilities.rank_zero_info)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not self.validation_pairs:
            return []
        # That its processes are fewer, the training loader says for both.
        return self._loader(samples.ValidationPairs(self.validation_pairs, self.image_size), say=lambda _: None)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the order of the data depends on, for a checkpoint to keep; the position in it is the module's count."""
        return {
            "batch_size": self.batch_size,
            "pairs": self.training_pairs.per_epoch,
            "seed": self.seed,
            "shuffle": self.options.shuffle,
            "val_share": self.options.val_share,
            "resize_ratio": self.options.resize_ratio,
            "names": self._names,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if lightning_internals.resuming(self.trainer):
            self.require_same_data(state_dict)

    def require_same_data(self, kept: dict[str, Any]) -> None:
        """Refuse another order of the data than the ``state_dict`` that a run began with; warn of other names."""
        own = self.state_dict()
        kept = own | kept
        if kept["pairs"] // kept["batch_size"] == own["pairs"] // own["batch_size"]:
            kept["pairs"] = own["pairs"]
        same_run.require_same(
            own,
            kept,
            f"{self.source}: the data differ from those that the run started with (found {{found}}). The position in "
            "the data and the learning rate are counted in batches of one order. Use the earlier values "
            "(--minibatch_size may change), or start a new run.",
            free=("names",),
        )
        if kept["names"] != own["names"]:
            utilities.rank_zero_warn(
                f"{self.source}: some of the pairs have other names than when the run started. The run continues at "
                "the same position in the order, which may now hold other pairs: some occur twice in this epoch, some "
                "not at all."
            )

    def _loader(self, dataset: Any, **how: Any) -> DataLoader[Any]:
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device.type
        workers, processes = self.options.num_workers, self._process()[1]
        if workers is None:
            # On a CPU the model's own threads take every core, and a loader that holds one up holds up all of them.
            workers = 0 if device == "cpu" else min(MAX_WORKERS, cores.free_cores(processes))
        _require_open_files(workers, OPEN_FILES_OF_WORKER * (1 + bool(self.validation_pairs)))
        atexit.register(signals.end_loaders)  # Python would send each one SIGTERM, and wait for it
        on_this_host = 1 if self.trainer is None else self.trainer.num_devices
        return loader(
            dataset,
            self.batch_size // processes,
            workers,
            # Those of training and of validation are at work at the same time.
            on_this_host * (2 if self.validation_pairs else 1),
            signals.outlive_the_first_signal,
            collate_fn=functools.partial(samples.collate, self.tokenizer),
            pin_memory=device == "cuda",
            **how,
        )

    def _process(self) -> tuple[int, int]:
        return gather.world() if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _consumed_batches(self) -> int | None:
        if self.trainer is None or not self.trainer.training:
            return None
        # Of a module that is not ours the Trainer counts them, and its checkpoints keep that.
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        return getattr(self.trainer.lightning_module, "consumed_batches", batches)

    def _summary(self, found: scan.Scan) -> str:
        size, wanted, share = self.batch_size, self.options.batch_size, self.options.val_share
        number, held_out, pairs = self.training_pairs.per_epoch, len(self.validation_pairs), found.pairs
        left_out = f"; an epoch leaves out {number % size:,} pairs, different ones each time." if number % size else "."
        lines = [
            f"{self.source}: {len(pairs):,} pairs, {number:,} for training and {held_out:,} held out; "
            f"{number // size:,} batches of {size:,} per epoch{left_out}"
        ]
        if size < wanted:
            lines.insert(0, f"There are fewer pairs than --batch_size: using {size} instead of {wanted}.")
        if pairs.num_cached:
            lines.append(f"  {pairs.num_cached:,} of {len(pairs):,} images are read from npz/ instead of files.")
        if share and not held_out:
            lines.append(f"  Too few pairs for a validation fraction of {share}: validation needs at least 2.")
        for names, what in (
            (found.lone_images, "images have no caption"),
            (found.lone_captions, "captions have no image"),
            (found.folder_links, "links to folders are not followed"),
        ):
            if names:
                lines.append(f"  {len(names):,} {what}, for instance {printable(names[0])}.")
        return "\n".join(lines)


def _require_open_files(workers: int, of_worker: int) -> None:
    """Raise this process's limit of open files to what so many loader processes need, as far as that is allowed."""
    if sys.platform == "win32":
        return
    import resource

    needed = OPEN_FILES + of_worker * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < needed:  # -1 is no limit
        raise UserError(
            f"--num_workers {workers}: needs {needed:,} open files; at most {hard:,} are allowed. Use up to "
            f"{max(0, hard - OPEN_FILES) // of_worker:,}, or allow more files (ulimit -Hn)."
        )
    if 0 <= soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _tokenizer(custom: Any, context_length: int | None) -> Any:
    if custom is None:
        return tokenizer.Tokenizer(context_length or tokenizer.Tokenizer.context_length)
    if hasattr(custom, "batch"):
        return custom
    # Of Hugging Face's form.
    return resolve_name("train_clip.encoders.tokenizer:wrap_tokenizer")(custom, context_length)


def pair_names(pairs: PairList) -> str:
    """A digest of the pairs' names and order, the same wherever the folder lies."""
    digest = hashlib.blake2b(digest_size=16)
    for name in pairs.names:
        digest.update(plain_name(name).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def fit_batch_size(wanted: int, num_pairs: int, num_processes: int, source: Path) -> int:
    """The global batch size to train with: the wanted one, or what the pairs allow where they are fewer."""
    if wanted % num_processes:
        raise UserError(
            f"--batch_size {wanted} cannot be divided evenly among {num_processes} processes; it is the total over "
            f"all of them. Use a multiple of {num_processes}."
        )
    fitting = min(wanted, num_pairs // num_processes * num_processes)
    if fitting < 2:
        raise UserError(
            f"{source}: {num_pairs} training pairs, {num_processes} processes; expected at least 2 pairs, and one per "
            "process. Add pairs, or hold out fewer for validation (--val_share)."
        )
    return fitting
