"""The data module: what it says, what it loads, and that a run's data goes on where it stopped."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from tests.conftest import write_pairs
from train_clip.cores import free_cores
from train_clip.data.folder import scan_folder
from train_clip.data.pairs import split_pairs
from train_clip.data.samples import Batch
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UserError
from train_clip.models.config import ModelConfig, config_from_dict
from train_clip.training.checkpoints import AtomicCheckpointIO
from train_clip.training.clip_wrapper import CLIPWrapper
from train_clip.training.data_module import MAX_WORKERS, TextImageDataModule, fit_batch_size

SIZE, CONTEXT = 16, 12
LOGGER = "lightning.pytorch.utilities.rank_zero"
WHY = "empty file"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The models are tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What ``rank_zero_info`` has said so far."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    return lambda: [record.getMessage() for record in caplog.records if record.name == LOGGER]


def tiny() -> ModelConfig:
    """A CLIP of half a million weights, nearly all of them token embeddings."""
    return config_from_dict(
        {
            "name": "tiny",
            "embed_dim": 8,
            "image": {"size": SIZE, "patch": 8, "layers": 1, "width": 16, "heads": 2},
            "text": {"context": CONTEXT, "vocab": 49_408, "layers": 1, "width": 8, "heads": 2},
        }
    )


def make_pairs(folder: Path, number: int) -> Path:
    """Pairs whose caption and red value both say their number."""
    folder.mkdir(exist_ok=True)
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        pixels[..., 0] = 5 * index
        Image.fromarray(pixels).save(folder / f"p{index:02}.png")
        (folder / f"p{index:02}.txt").write_text(f"pair {index}", encoding="utf-8")
    return folder


def data(folder: Path, batch_size: int, **how: Any) -> TextImageDataModule:
    return TextImageDataModule(
        folder, batch_size, **({"image_size": SIZE, "context_length": CONTEXT, "val_share": 0.0} | how)
    )


def trainer(folder: Path, **how: Any) -> L.Trainer:
    """A bare Trainer, as a user's own program makes it, with nothing on the screen."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        **(quiet | {"accelerator": "cpu", "devices": 1, "enable_model_summary": False} | how), default_root_dir=folder
    )


def among(module: TextImageDataModule, rank: int, size: int) -> TextImageDataModule:
    """Put a data module on one of several processes that do not exist, outside a fit."""
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=size,
        num_devices=size,
        training=False,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return module


def numbers(batch: Batch) -> list[int]:
    """Which pairs a batch holds: by the red value, which has to agree with the caption. Empty places hold none."""
    present = [row for row in range(len(batch.images)) if row not in batch.missing]
    found = [int(image[0, 0, 0]) // 5 for image in batch.images[present]]
    assert torch.equal(batch.texts[present], Tokenizer(CONTEXT).batch([f"pair {number}" for number in found])[0])
    return found


# Numbers that cannot work


@pytest.mark.parametrize("share", [-0.1, 1.0, 2, float("nan")])
def test_a_bad_val_share(tmp_path: Path, share: float) -> None:
    """Word for word, before anything is read."""
    with pytest.raises(UserError) as caught:
        data(tmp_path, 4, val_share=share)
    assert str(caught.value) == f"val_share is {share}; expected from 0 to below 1."


@pytest.mark.parametrize("ratio", [0, -1, 1.5, float("nan")])
def test_a_bad_resize_ratio(tmp_path: Path, ratio: float) -> None:
    """Word for word, before anything is read."""
    with pytest.raises(UserError) as caught:
        data(tmp_path, 4, resize_ratio=ratio)
    assert str(caught.value) == f"resize_ratio is {ratio}; expected above 0, up to 1."


@pytest.mark.parametrize("size", [1, 0, -4])
def test_a_batch_without_negatives(tmp_path: Path, size: int) -> None:
    """Word for word, before anything is read."""
    with pytest.raises(UserError) as caught:
        data(tmp_path, size)
    assert str(caught.value) == f"batch_size is {size}; expected 2 or above."


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("seed", -1, "0 or above"),
        ("image_size", 0, "1 or above"),
        ("image_size", -16, "1 or above"),
        ("context_length", 1, "2 or above"),
        ("context_length", -3, "2 or above"),
        ("num_workers", -1, "0 or above"),
    ],
)
def test_other_numbers_that_cannot_work(tmp_path: Path, name: str, number: int, expected: str) -> None:
    """House rule 9: word for word, before anything is read, and not a ValueError out of the first batch."""
    with pytest.raises(UserError) as caught:
        data(tmp_path, 4, **{name: number})
    assert str(caught.value) == f"{name} is {number}; expected {expected}."


def test_the_least_numbers_that_work(tmp_path: Path) -> None:
    """A seed of 0, one pixel, a context of start and end, a ratio of 1, two pairs a batch: a batch of those sizes."""
    folder = make_pairs(tmp_path, 2)
    module = data(folder, 2, seed=0, image_size=1, context_length=2, resize_ratio=1, val_share=0)
    module.setup()
    (batch,) = module.train_dataloader()
    assert batch.images.shape == (2, 3, 1, 1)
    assert batch.texts.tolist() == [[Tokenizer.start_token, Tokenizer.end_token]] * 2


@pytest.mark.parametrize(("wanted", "processes"), [(3, 2), (2, 4), (9, 4), (1001, 8)])
def test_a_batch_that_does_not_divide(wanted: int, processes: int) -> None:
    """Found, expected, to do, word for word."""
    with pytest.raises(UserError) as caught:
        fit_batch_size(wanted, 10**6, processes, Path("data"))
    assert str(caught.value) == (
        f"--batch_size {wanted} cannot be divided evenly among {processes} processes; it is the total over all of "
        f"them. Use a multiple of {processes}."
    )


@pytest.mark.parametrize(("pairs", "processes"), [(0, 1), (1, 1), (1, 2), (3, 4)])
def test_too_few_pairs(pairs: int, processes: int) -> None:
    """Fewer than two pairs, or than one a process: no batch at all, and the option that may have taken them."""
    with pytest.raises(UserError) as caught:
        fit_batch_size(4 * processes, pairs, processes, Path("data"))
    assert str(caught.value) == (
        f"data: {pairs} training pairs, {processes} processes; expected at least 2 pairs, and one per process. "
        "Add pairs, or hold out fewer for validation (--val_share)."
    )


@pytest.mark.parametrize(
    ("wanted", "pairs", "processes", "fitting"),
    [(8, 8, 1, 8), (8, 100, 2, 8), (8, 7, 1, 7), (8, 7, 2, 6), (8, 7, 4, 4), (256, 2, 1, 2), (4, 2, 2, 2)],
)
def test_the_batch_that_fits(wanted: int, pairs: int, processes: int, fitting: int) -> None:
    """The wanted one where there are pairs for it; otherwise the largest multiple of the processes."""
    assert fit_batch_size(wanted, pairs, processes, Path("data")) == fitting


def test_a_folder_without_pairs(tmp_path: Path) -> None:
    """Found at setup, not when the first batch is asked for."""
    with pytest.raises(UserError, match="0 pairs among 0 files"):
        data(tmp_path, 4).setup()
    with pytest.raises(UserError, match="there is no such folder"):
        data(tmp_path / "missing", 4).setup()


# What it says


def test_the_summary(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    """Word for word: pairs, split, batches, what is left out, and lone files by example; said once for two setups."""
    make_pairs(tmp_path, 20)
    (tmp_path / "lone.jpg").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "more.txt").touch()
    module = data(tmp_path, 4, val_share=0.25)
    module.setup("fit")
    module.setup("validate")
    assert said() == [
        f"{tmp_path}: 20 pairs, 15 for training and 5 held out; 3 batches of 4 per epoch; "
        "an epoch leaves out 3 pairs, different ones each time.\n"
        "  1 images have no caption, for instance lone.jpg.\n"
        "  2 captions have no image, for instance more.txt."
    ]


def test_the_summary_leaves_out_what_is_nothing(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    """No remainder and no lone files: one line that says neither."""
    data(make_pairs(tmp_path, 8), 4).setup()
    assert said() == [f"{tmp_path}: 8 pairs, 8 for training and 0 held out; 2 batches of 4 per epoch."]


@pytest.mark.parametrize(("pairs", "share"), [(8, 0.05), (20, 0.05), (29, 0.05), (2, 0.5)])
def test_a_share_that_holds_out_nothing_is_said(
    tmp_path: Path, said: Callable[[], list[str]], pairs: int, share: float
) -> None:
    """Where the share comes to no pair or a single one all are trained on, and a line says so, word for word."""
    module = data(make_pairs(tmp_path, pairs), 2, val_share=share)
    module.setup()
    assert (len(module.training_pairs), module.validation_pairs, module.val_dataloader()) == (pairs, [], [])
    assert said()[0].splitlines()[1:] == [
        f"  Too few pairs for a validation fraction of {share}: validation needs at least 2."
    ]


def test_a_batch_that_shrinks_is_said_once(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    """``setup`` by the command, then by the Trainer for the same processes: one message, as for the summary."""
    module = data(make_pairs(tmp_path, 7), 8)
    module.setup()
    module.setup("fit")
    assert sum("There are fewer pairs than --batch_size: using 7 instead of 8." in message for message in said()) == 1


# What it loads


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [SIZE, 32])
def test_training_batches(tmp_path: Path, shuffle: bool, size: int) -> None:
    """Fixed shapes, each pair at most once, pixels and captions of the same pair; in order only without shuffling."""
    module = data(make_pairs(tmp_path, 11), 4, shuffle=shuffle, image_size=size, seed=3)
    module.setup()
    loader = module.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    assert all(batch.images.shape == (4, 3, size, size) for batch in batches)
    found = [number for batch in batches for number in numbers(batch)]
    assert len(set(found)) == 8
    assert (found == list(range(8))) is not shuffle


def test_the_training_crop_is_the_one_asked_for(tmp_path: Path) -> None:
    """Without a ratio the crop keeps the shorter side; with 0.25 smaller squares occur, which show less of a ramp."""
    pixels = np.zeros((100, 100, 3), dtype=np.uint8)
    pixels[..., 1] = np.arange(100)
    for index in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a ramp", encoding="utf-8")
    spans = {}
    for ratio in (None, 0.25):
        module = data(tmp_path, 2, resize_ratio=ratio)
        module.setup()
        images = torch.cat([next(iter(module.train_dataloader())).images for module.seed in range(10)])
        spans[ratio] = (images[:, 1, 8, 14].float() - images[:, 1, 8, 1].float()) / 13 * SIZE
    assert (spans[None] - 100).abs().max() < 3
    assert spans[0.25].min() < 80


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_global_batch(tmp_path: Path, size: int) -> None:
    """The batches of all processes side by side, against one process's: same pairs, same pixels."""
    make_pairs(tmp_path, 11)
    one = data(tmp_path, 8, seed=2)
    one.setup()
    (whole,) = list(one.train_dataloader())
    parts = []
    for rank in range(size):
        module = among(data(tmp_path, 8, seed=2), rank, size)
        module.setup()
        (part,) = list(module.train_dataloader())
        assert len(part.images) == 8 // size
        parts.append(part)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert [number for part in parts for number in numbers(part)] == numbers(whole)


def test_a_data_module_that_is_used_again_with_more_processes(tmp_path: Path) -> None:
    """Set up by hand to look at it, a batch of 5; then given to two processes: refused, and not a batch of 4."""
    module = data(make_pairs(tmp_path, 10), 5)
    module.setup()
    assert module.batch_size == 5
    with pytest.raises(UserError, match="--batch_size 5 cannot be divided evenly among 2 processes"):
        among(module, 0, 2).setup()


def test_a_data_module_that_is_used_again_fits_the_wanted_batch_each_time(tmp_path: Path) -> None:
    """Seven pairs and a batch of 8 on 1, 2, 4, 1 processes: batches of 7, 6, 4, 7 by hand, from the same split."""
    module = data(make_pairs(tmp_path, 9), 8, val_share=0.25)
    splits = []
    for size, fitting in ((1, 7), (2, 6), (4, 4), (1, 7)):
        shares = []
        for rank in range(size):
            among(module, rank, size).setup()
            shares += [len(batch.images) for batch in module.train_dataloader()]
        assert (module.options.batch_size, module.batch_size, shares) == (8, fitting, [fitting // size] * size)
        splits.append((module.training_pairs, module.validation_pairs))
    assert all(split == splits[0] for split in splits)


def test_validation_batches(tmp_path: Path) -> None:
    """The held-out pairs once each, in order, the last batch smaller; none in training; nothing without a share."""
    make_pairs(tmp_path, 20)
    module = data(tmp_path, 4, val_share=0.3)
    module.setup()
    held_out = [number for batch in module.val_dataloader() for number in numbers(batch)]
    expected = split_pairs(scan_folder(tmp_path).pairs, 0.3)[1]
    assert held_out == [int(Path(pair.image).stem[1:]) for pair in expected]
    assert [len(batch.images) for batch in module.val_dataloader()] == [4, 2]
    trained = {number for batch in module.train_dataloader() for number in numbers(batch)}
    assert not trained & set(held_out)
    without = data(tmp_path, 4)
    without.setup()
    assert not without.val_dataloader()


def test_the_split_is_the_same_for_every_seed(tmp_path: Path) -> None:
    """Runs that differ in their seed are scored on the same pairs."""
    make_pairs(tmp_path, 20)
    splits = []
    for seed in range(3):
        module = data(tmp_path, 4, val_share=0.3, seed=seed)
        module.setup()
        splits.append(module.validation_pairs)
    assert splits[0] == splits[1] == splits[2]


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    """Its mapping is the batch's texts, in training and validation."""
    asked = []

    def own(texts: list[str], **how: Any) -> dict[str, torch.Tensor]:
        asked.append(how)
        return {"input_ids": torch.tensor([[len(text)] for text in texts])}

    module = data(make_pairs(tmp_path, 12), 4, custom_tokenizer=own, val_share=0.25)
    module.setup()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        for batch in loader:
            assert batch.texts["input_ids"].shape == (len(batch.images), 1)
    assert all(how == {"padding": True, "truncation": True, "return_tensors": "pt"} for how in asked)


@pytest.mark.parametrize(
    ("device", "processes", "expected"),
    [("cpu", 1, 0), ("cuda", 1, min(MAX_WORKERS, free_cores())), ("cuda", 10**6, 1)],
)
def test_the_number_of_workers_where_none_is_given(tmp_path: Path, device: str, processes: int, expected: int) -> None:
    """None on a CPU, where the model has the cores; with a GPU one a core, at most 8, at least one a process."""
    module = among(data(make_pairs(tmp_path, 4), 2, num_workers=None), 0, 1)
    module.setup()
    module.batch_size = 2 * processes
    module.trainer.world_size = processes  # type: ignore[union-attr, misc]
    module.trainer.strategy.root_device = torch.device(device)  # type: ignore[union-attr, misc]
    loader = module.train_dataloader()
    assert loader.num_workers == expected
    assert loader.persistent_workers == (expected > 0)
    assert loader.pin_memory == (device == "cuda")


# Under a Trainer


class Seen(L.Callback):
    """Notes the pairs of each batch that is trained on, of each that is validated, and the rate of each step."""

    def __init__(self) -> None:
        self.trained: list[list[int]] = []
        self.validated: list[int] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        self.rates.append(arguments[2].param_groups[0]["lr"])

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.trained.append(numbers(arguments[2]))

    def on_validation_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        if not trainer.sanity_checking:
            self.validated += numbers(arguments[1])


def fit(folder: Path, module: TextImageDataModule, ckpt_path: Path | None = None, **how: Any) -> Seen:
    """Train the tiny model and return what it has seen."""
    seen = Seen()
    torch.manual_seed(0)
    callbacks = [seen, *how.pop("callbacks", [])]
    runner = trainer(folder, callbacks=callbacks, **how)
    runner.fit(CLIPWrapper(config=tiny(), learning_rate=1e-3), module, ckpt_path=ckpt_path, weights_only=True)
    return seen


def test_two_steps_under_a_bare_trainer(tmp_path: Path) -> None:
    """max_steps=2 with a validation split: two batches of the whole global size, each held-out pair scored once."""
    folder = make_pairs(tmp_path / "data", 20)
    seen = fit(tmp_path, data(folder, 5, val_share=0.25, num_workers=0), max_steps=2, val_check_interval=2)
    assert [len(batch) for batch in seen.trained] == [5, 5]
    assert len(set(chain.from_iterable(seen.trained))) == 10
    assert len(seen.validated) == len(set(seen.validated)) == 5
    assert not set(seen.validated) & set(chain.from_iterable(seen.trained))


def test_fewer_pairs_than_the_batch_still_train(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    """Seven pairs and a batch of 256: one batch of seven an epoch, and a message."""
    folder = make_pairs(tmp_path / "data", 7)
    seen = fit(tmp_path, data(folder, 256), max_epochs=2)
    assert [sorted(batch) for batch in seen.trained] == [list(range(7))] * 2
    assert any(
        message.startswith("There are fewer pairs than --batch_size: using 7 instead of 256.\n") for message in said()
    )


def test_a_script_that_leaves_a_loader_half_way_ends(tmp_path: Path) -> None:
    """Loader processes that outlive a first signal are no reason to wait for ever at the end; nothing is said."""
    folder = write_pairs(tmp_path / "pairs", 24)
    script = f"""
from train_clip import TextImageDataModule
data = TextImageDataModule({str(folder)!r}, batch_size=4, num_workers=2, image_size=16)
data.setup()
batches = iter(data.train_dataloader())
next(batches)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr


def test_persistent_workers_over_epochs_change_nothing(tmp_path: Path) -> None:
    """Three epochs with two workers that live on, against none: the same batches; the epochs differ."""
    folder = make_pairs(tmp_path / "data", 10)
    plain, with_workers = (
        fit(tmp_path, data(folder, 4, num_workers=workers, seed=1), max_epochs=3).trained for workers in (0, 2)
    )
    assert with_workers == plain
    assert len({str(plain[epoch : epoch + 2]) for epoch in (0, 2, 4)}) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_where_it_was_saved(tmp_path: Path, workers: int) -> None:
    """Saved after every step of two epochs of three batches, resumed from each: the rest of data and rates."""
    folder = make_pairs(tmp_path / "data", 10)

    def module() -> TextImageDataModule:
        return data(folder, 3, num_workers=workers, seed=4)

    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
    how = {"max_epochs": 2, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    whole = fit(tmp_path, module(), callbacks=[keep], **how)
    assert len(whole.trained) == len(set(whole.rates)) == 6
    for step in range(1, 6) if not workers else (2, 3):
        how["enable_checkpointing"] = False
        resumed = fit(tmp_path, module(), tmp_path / "kept" / f"step={step}.ckpt", **how)
        assert (resumed.trained, resumed.rates) == (whole.trained[step:], whole.rates[step:]), step


def test_a_run_with_accumulation_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    """Accumulation of 3 over 5 batches: 2 steps an epoch, the second of 2 batches; resumed at every step."""
    folder = make_pairs(tmp_path / "data", 10)
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
    how = {"max_epochs": 2, "accumulate_grad_batches": 3}
    whole = fit(tmp_path, data(folder, 2), callbacks=[keep], enable_checkpointing=True, **how)
    assert (len(whole.trained), len(whole.rates)) == (10, 4)
    for step, consumed in {1: 3, 2: 5, 3: 8}.items():
        resumed = fit(tmp_path, data(folder, 2), tmp_path / "kept" / f"step={step}.ckpt", **how)
        assert (resumed.trained, resumed.rates) == (whole.trained[consumed:], whole.rates[step:]), step


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("limit", "epochs"), [(4, 5), (7, 4), (0.7, 4)])
def test_a_part_of_each_epoch(tmp_path: Path, limit: float, epochs: int, workers: int) -> None:
    """limit_train_batches of 4 or 7 of 10: the batches of as many steps of whole epochs; the last rate is the least."""
    folder = make_pairs(tmp_path / "data", 20)
    steps = epochs * (limit if isinstance(limit, int) else round(10 * limit))
    seen = fit(tmp_path, data(folder, 2, num_workers=workers), max_epochs=epochs, limit_train_batches=limit)
    assert len(seen.trained) == len(seen.rates) == steps
    assert seen.trained == fit(tmp_path, data(folder, 2), max_steps=steps).trained
    assert seen.rates[-1] == min(seen.rates)


def test_a_run_of_parts_of_epochs_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    """limit_train_batches of 7 of 10, resumed at each step of three such epochs: the rest of data and rates."""
    folder = make_pairs(tmp_path / "data", 20)
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
    how = {"max_epochs": 3, "limit_train_batches": 7}
    whole = fit(tmp_path, data(folder, 2), callbacks=[keep], enable_checkpointing=True, **how)
    assert len(whole.trained) == 21
    for step in range(1, 21):
        resumed = fit(tmp_path, data(folder, 2), tmp_path / "kept" / f"step={step}.ckpt", **how)
        assert (resumed.trained, resumed.rates) == (whole.trained[step:], whole.rates[step:]), step


def test_weights_that_are_loaded_begin_a_run_of_their_own(tmp_path: Path) -> None:
    """load_from_checkpoint, then fit: position 0 and a fresh model's batches; resumed instead, the rest of them."""
    folder = make_pairs(tmp_path / "data", 20)
    first = trainer(tmp_path, max_steps=3)
    first.fit(CLIPWrapper(config=tiny(), learning_rate=1e-3), data(folder, 2))
    first.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CLIPWrapper.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.consumed_batches == 0
    seen = Seen()
    trainer(tmp_path, max_epochs=1, callbacks=[seen]).fit(loaded, data(folder, 2))
    whole = fit(tmp_path, data(folder, 2), max_epochs=1).trained
    assert len(whole) == 10
    assert seen.trained == whole
    assert fit(tmp_path, data(folder, 2), tmp_path / "a.ckpt", max_steps=6).trained == whole[3:6]


class Foreign(L.LightningModule):
    """Somebody's module, which knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        return self.weight * batch.images.float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-9)


class Content(L.Callback):
    """Notes the pairs and the pixels of each batch that is trained on."""

    def __init__(self) -> None:
        self.trained: list[tuple[list[int], int]] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.trained.append((numbers(arguments[2]), hash(arguments[2].images.numpy().tobytes())))


def content(folder: Path, module: L.LightningModule, ckpt_path: Path | None = None, **how: Any) -> list[Any]:
    """Train a module and return what it has seen."""
    seen = Content()
    runner = trainer(folder, callbacks=[seen, *how.pop("callbacks", [])], **how)
    pairs = data(folder / "data", 4, seed=3, resize_ratio=0.5, num_workers=0)
    runner.fit(module, pairs, ckpt_path=ckpt_path, weights_only=True)
    return seen.trained


@pytest.mark.parametrize("how", [{}, {"reload_dataloaders_every_n_epochs": 1}, {"limit_train_batches": 2}])
def test_a_module_that_is_not_ours_sees_what_ours_sees(tmp_path: Path, how: dict[str, Any]) -> None:
    """Four epochs of 14 pairs in batches of 4: the pairs and the crops of our own module, others in each epoch."""
    make_pairs(tmp_path / "data", 14)
    ours = content(tmp_path, CLIPWrapper(config=tiny()), max_epochs=4, **how)
    found = content(tmp_path, Foreign(), max_epochs=4, **how)
    assert found == ours
    size = how.get("limit_train_batches", 3)
    epochs = [found[at : at + size] for at in range(0, len(found), size)]
    assert len({str([pairs for pairs, _ in epoch]) for epoch in epochs}) == len({str(epoch) for epoch in epochs}) == 4
    left_out = {frozenset(range(14)) - set(chain.from_iterable(pairs for pairs, _ in epoch)) for epoch in epochs}
    assert len(left_out) > 1


def test_a_module_that_is_not_ours_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    """Saved after every step of three epochs of three batches, resumed from each: the rest of the run."""
    make_pairs(tmp_path / "data", 14)
    every = ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = content(tmp_path, Foreign(), max_epochs=3, callbacks=[every], enable_checkpointing=True)
    for step in range(1, 9):
        assert content(tmp_path, Foreign(), tmp_path / f"kept/step={step}.ckpt", max_epochs=3) == whole[step:], step


def test_a_trainer_that_fits_twice_goes_on(tmp_path: Path) -> None:
    """Two epochs, then two more with the same Trainer: what four in one see."""
    make_pairs(tmp_path / "data", 14)
    whole = content(tmp_path, Foreign(), max_epochs=4)
    seen, module = Content(), Foreign()
    runner = trainer(tmp_path, callbacks=[seen], max_epochs=2)
    for runner.fit_loop.max_epochs in (2, 4):
        runner.fit(module, data(tmp_path / "data", 4, seed=3, resize_ratio=0.5, num_workers=0))
    assert seen.trained == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loop_sees_what_a_trainer_sees(tmp_path: Path, workers: int) -> None:
    """Without a Trainer, and after one has ended: epochs as it has them; ``set_epoch`` chooses one."""
    make_pairs(tmp_path / "data", 14)
    whole = content(tmp_path, Foreign(), max_epochs=3)
    fitted = data(tmp_path / "data", 4, seed=3, resize_ratio=0.5, num_workers=workers)
    trainer(tmp_path, max_epochs=1).fit(Foreign(), fitted)
    alone = data(tmp_path / "data", 4, seed=3, resize_ratio=0.5, num_workers=workers)
    alone.setup()
    for module in (alone, fitted):
        loader, seen = module.train_dataloader(), Content()
        for _ in range(3):
            for batch in loader:
                seen.on_train_batch_start(None, None, batch)
        assert seen.trained == whole
        loader.sampler.set_epoch(1)
        assert [numbers(batch) for batch in loader] == [pairs for pairs, _ in whole[3:6]]


def test_each_fit_of_a_module_begins_at_the_first_batch(tmp_path: Path) -> None:
    """Stopped after 3 batches, validated, then fitted anew under another Trainer: the same 3 batches once more."""
    module, folder = CLIPWrapper(config=tiny()), make_pairs(tmp_path / "data", 20)
    runs = []
    for _ in range(2):
        seen = Seen()
        runner = trainer(tmp_path, max_steps=3, callbacks=[seen])
        runner.fit(module, data(folder, 2, val_share=0.2))
        runner.validate(module, data(folder, 2, val_share=0.2), verbose=False)
        assert module.consumed_batches == 3
        runs.append(seen.trained)
    assert runs[0] == runs[1]
    assert len(runs[0]) == 3


def test_the_position_is_the_callbacks(tmp_path: Path) -> None:
    """A checkpoint keeps the count with the state of ``EndOfStep``; the module only reads it out, and cannot be set."""
    module = CLIPWrapper(config=tiny())
    runner = trainer(tmp_path, max_steps=2, accumulate_grad_batches=3)
    runner.fit(module, data(make_pairs(tmp_path / "data", 20), 2))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert kept["callbacks"]["EndOfStep"] == {"consumed_batches": 6, "num_steps": 2}
    assert module.consumed_batches == 6
    with pytest.raises(AttributeError):
        module.consumed_batches = 0  # type: ignore[misc]


def test_a_bad_file_is_named_once_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One empty image among ten over two epochs: full batches, one line in skipped.tsv and on the screen, one count."""
    folder = make_pairs(tmp_path / "data", 10)
    (folder / "p03.png").write_bytes(b"")
    seen = fit(tmp_path, data(folder, 5, max_bad=1.0), max_epochs=2)
    assert [len(batch) for batch in seen.trained] == [5] * 4
    assert 3 not in chain.from_iterable(seen.trained)
    bad, log = folder / "p03.png", tmp_path / "skipped.tsv"
    assert log.read_text(encoding="utf-8") == f"{bad}\t{WHY}\n"
    assert capsys.readouterr().out.splitlines() == [
        f"Skipped {bad}: {WHY}.",
        f"Epoch 1: 1 samples replaced by others or skipped. Bad files so far: 1 (1 × {WHY}); their names are in {log}.",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_bad_file_with_a_name_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Latin-1 file name in the report of a bad file: training goes on, and the byte is escaped as surrogateescape."""
    folder = make_pairs(tmp_path / "data", 4)
    for suffix, content in ((b".jpg", b""), (b".txt", b"a bear")):
        Path(os.fsdecode(os.fsencode(folder) + b"/b\xe4r" + suffix)).write_bytes(content)
    assert len(fit(tmp_path, data(folder, 5, max_bad=1.0), max_epochs=1).trained) == 1
    assert (tmp_path / "skipped.tsv").read_bytes() == os.fsencode(folder) + rf"/b\xe4r.jpg	{WHY}".encode() + b"\n"
    assert rf"Skipped {folder}/b\xe4r.jpg: {WHY}." in capsys.readouterr().out


def test_replaced_samples_are_counted_once_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six of eight images bad: six samples are replaced, however many draws it took, and six files are bad."""
    folder = make_pairs(tmp_path / "data", 8)
    for index in range(6):
        (folder / f"p{index:02}.png").write_bytes(b"")
    fit(tmp_path, data(folder, 8, max_bad=1.0), max_epochs=1)
    printed = capsys.readouterr().out
    assert f"Epoch 1: 6 samples replaced by others or skipped. Bad files so far: 6 (6 × {WHY}); " in printed


def test_bad_files_of_both_splits_are_counted_but_not_in_the_trial_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A held-out image and a caption to train on: two replaced an epoch, though Lightning first tries validation."""
    folder = make_pairs(tmp_path / "data", 10)
    training, held_out = split_pairs(scan_folder(folder).pairs, 0.2)
    Path(held_out[0].image).write_bytes(b"")
    Path(training[0].caption).write_bytes(b"")
    fit(tmp_path, data(folder, 4, val_share=0.2, max_bad=1.0), max_epochs=2, num_sanity_val_steps=2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"Epoch 1: 2 samples replaced by others or skipped. Bad files so far: 2 (1 × caption is empty, 1 × {WHY}); "
        f"their names are in {tmp_path / 'skipped.tsv'}."
    )


def test_a_table_to_validate_on(tmp_path: Path) -> None:
    """Twelve pairs in a folder, three in a table with columns of its own: none of the twelve is held out."""
    folder = write_pairs(tmp_path / "pairs", 12)
    write_pairs(tmp_path / "others", 3)
    rows = "".join(f"others/{index:03}.png\tother {index}\n" for index in range(3))
    (tmp_path / "val.tsv").write_text("file\ttitle\n" + rows)
    columns = {"image_column": "file", "caption_column": "title"}
    module = data(folder, 4, val_share=0.25, val_pairs=tmp_path / "val.tsv", **columns)
    module.setup()
    assert (len(module.training_pairs), len(module.validation_pairs)) == (12, 3)
    assert [pair.captions() for pair in module.validation_pairs] == [[f"other {index}"] for index in range(3)]
    assert module.state_dict()["val_share"] == 0.0
