"""Runs over data of which not all can be used: what they draw, count and log, and where they stop."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest

from tests.commands.test_train import metrics, model_file, run_on_two_processes, run_train  # noqa: F401
from tests.conftest import TINY, write_pairs
from tests.data.everything import Everything, write_everything
from train_clip import CLIPWrapper, TextImageDataModule, cli
from train_clip.checkpoints.own import read_checkpoint
from train_clip.data.tokenizer import Tokenizer
from train_clip.models.config import config_from_dict

PAIRS = 43


@pytest.fixture
def everything(tmp_path: Path) -> Everything:
    """One of everything, without what stops a run."""
    return write_everything(tmp_path / "everything")


class Drawn(L.Callback):
    """What is trained on, batch by batch: captions as the model reads them, and the files that were passed over."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], list[str]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        captions = [Tokenizer().decode(row) for row in batch.texts]
        self.batches.append((captions, [skips[0].path for skips in batch.skips]))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_clean_pair_stands_at_its_place_and_nothing_else_is_drawn(everything: Everything, workers: int) -> None:
    """Two epochs over one of everything, against the order of (seed, epoch): clean pairs where they stand in it, in the
    place of each bad one a clean one, and the bad one's file beside it.
    """  # noqa: D205
    folder = everything.folder
    # A context that holds every caption whole but the long one.
    config = config_from_dict(TINY | {"text": TINY["text"] | {"context": 77}})
    data = TextImageDataModule(folder, 8, workers, image_size=16, seed=3, max_bad=1.0, val_share=0.0)
    drawn = Drawn()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[drawn], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder.parent,
    )  # fmt: skip
    trainer.fit(CLIPWrapper(config=config), data)
    assert len(data.training_pairs) == PAIRS == len(everything.clean) + len(everything.bad)
    lines = [as_read(everything.clean.get(name, [])) for name in data.training_pairs.names]
    clean = {caption for captions in lines for caption in captions}
    per_epoch = PAIRS // 8
    for number, (captions, skipped) in enumerate(drawn.batches):
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng((3, epoch)).permutation(PAIRS)[place * 8 : place * 8 + 8]
        passed_over = iter(skipped)
        for index, caption in zip(order, captions, strict=True):
            if lines[index]:
                assert caption in lines[index]
            else:
                assert caption in clean
                name = Path(next(passed_over)).relative_to(folder).as_posix()
                assert name in everything.bad
                assert Path(name).stem == Path(data.training_pairs.names[index]).stem
        assert list(passed_over) == []
    assert len(drawn.batches) == 2 * per_epoch


def as_read(captions: list[str]) -> list[str]:
    """Captions as they come back out of their tokens."""
    return [Tokenizer().decode(row) for row in Tokenizer()(captions)] if captions else []


def test_a_run_over_everything_counts_and_names_what_it_skipped(
    everything: Everything,
    model_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the command, some held out: it ends, and its log names each bad file with the reason once, no other."""
    words = ["--max_bad", "1", "--epochs", "3", "--val_share", "0.2", "--batch_size", "6", "--num_workers", "0"]
    run = run_train(everything.folder, model_file, tmp_path / "run", *words)
    log = (run / "logs" / "skipped.tsv").read_text(encoding="utf-8").splitlines()
    named = dict(line.split("\t") for line in log)
    # 34 pairs to train on, 5 batches of 6: the pairs that an epoch leaves out differ from epoch to epoch.
    assert sorted(named) == sorted(str(everything.folder / name) for name in everything.bad)
    assert len(log) == len(named)
    assert all(named[str(everything.folder / name)] == why for name, why in everything.bad.items())
    printed = capsys.readouterr().out
    counts = Counter(everything.bad.values())
    *_, last = re.findall(r"^Epoch \d: \d+ samples .*Bad files so far: (\d+) \((.*)\); their", printed, re.MULTILINE)
    assert int(last[0]) == len(everything.bad)
    parts = re.split(r", (?=\d+ × )", last[1])
    assert sorted(parts) == sorted(f"{count} × {why}" for why, count in counts.items())
    assert "Done after 15 steps" in printed


def broken(folder: Path, number: int, bad: int) -> Path:
    """Pairs of which the first few have no image."""
    write_pairs(folder, number)
    for index in range(bad):
        (folder / f"{index:03}.png").write_bytes(b"")
    return folder


def test_more_bad_pairs_than_may_be_stop_the_run(
    model_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Five of twenty against a cap of four: stopped within the first epoch, saved, and gone on with under another cap.

    The log names all five, and the run that goes on ends where one does that was never stopped, in its losses.
    """
    folder = broken(tmp_path / "pairs", 20, 5)
    words = ["--val_share", "0", "--epochs", "2", "--num_workers", "0"]
    with pytest.raises(SystemExit) as stopped:
        run_train(folder, model_file, tmp_path / "run", *words, "--max_bad", "0.2")
    message = str(stopped.value.code)
    assert message.startswith(
        f"train-clip: {folder}: 5 of 20 pairs (25.0%) were unusable so far, more than --max_bad 0.2 (5 × empty file)."
    )
    log = tmp_path / "run" / "logs" / "skipped.tsv"
    assert sorted(log.read_text().split()[0::3]) == [str(folder / f"{index:03}.png") for index in range(5)]
    assert "is saved in" in message
    cli.main(["train", "--resume", str(tmp_path / "run"), "--max_bad", "0.25"])
    run_train(folder, model_file, tmp_path / "whole", *words, "--max_bad", "0.25")
    losses = [[row["train/loss"] for row in metrics(tmp_path / run) if row["train/loss"]] for run in ("run", "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10
    assert "Done after 10 steps" in capsys.readouterr().out


@pytest.mark.parametrize(("accumulate", "batches"), [(1, 10), (3, 30)])
def test_a_run_stops_within_an_epoch_where_no_gradient_is_pending(
    model_file: Path,  # noqa: F811
    tmp_path: Path,
    accumulate: int,
    batches: int,
) -> None:
    """Half of 160 pairs bad, epochs of 40 batches: at the first count, or the first that no gradient waits at."""
    folder = broken(tmp_path / "pairs", 160, 80)
    words = ["--val_share", "0", "--num_workers", "0", "--accumulate_grad_batches", str(accumulate)]
    with pytest.raises(SystemExit, match=r"of 160 pairs .* were unusable so far"):
        run_train(folder, model_file, tmp_path / "run", *words)
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert state["callbacks"]["EndOfStep"]["consumed_batches"] == batches
    assert state["global_step"] == batches // accumulate


@pytest.mark.parametrize(("max_bad", "stops"), [("0.25", False), ("0.24", True)])
def test_held_out_pairs_count_too(
    model_file: Path,  # noqa: F811
    tmp_path: Path,
    max_bad: str,
    stops: bool,
) -> None:
    """Five bad pairs of twenty, five of which are held out: a quarter of all of them, wherever the bad ones are."""
    folder = broken(tmp_path / "pairs", 20, 5)
    words = ["--val_share", "0.25", "--epochs", "2", "--num_workers", "0", "--batch_size", "5", "--max_bad", max_bad]
    if stops:
        with pytest.raises(SystemExit, match=r"5 of 20 pairs \(25\.0%\)"):
            run_train(folder, model_file, tmp_path / "run", *words)
    else:
        assert run_train(folder, model_file, tmp_path / "run", *words)


@pytest.mark.parametrize(("bad", "stops"), [(4, False), (5, True)])
def test_the_cap_counts_the_bad_files_of_all_processes_once(
    model_file: Path,  # noqa: F811
    tmp_path: Path,
    bad: int,
    stops: bool,
) -> None:
    """Two processes, 24 pairs, a sixth allowed: four bad ones, met by both as substitutes too, pass; five do not."""
    folder = broken(tmp_path / "pairs", 24, bad)
    words = ["--val_share", "0", "--epochs", "4", "--num_workers", "0", "--max_bad", str(4 / 24)]
    if not stops:
        assert "Done after 24 steps" in run_on_two_processes(folder, model_file, tmp_path / "run", *words)
        return
    with pytest.raises(subprocess.CalledProcessError):
        run_on_two_processes(folder, model_file, tmp_path / "run", *words)
    log = (tmp_path / "run" / "logs" / "skipped.tsv").read_text().splitlines()
    assert sorted(log) == [f"{folder}/{index:03}.png\tempty file" for index in range(5)]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
