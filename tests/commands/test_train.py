"""``train-clip train``, on a few noise pictures."""

from __future__ import annotations

import csv
import re
import shlex
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests import forked
from tests.conftest import TINY, said, write_pairs
from train_clip import CLIPWrapper, cli
from train_clip.commands import run_folder
from train_clip.commands.train import advise
from train_clip.commands.trainer import default_precision


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def arguments(folder: Path, model_file: Path, output: Path, *words: str) -> list[str]:
    base = ["train", "--model_name", str(model_file), "--folder", str(folder), "--output", str(output)]
    return [*base, *"--batch_size 4 --accelerator cpu --log_every_n_steps 1 --num_workers 0".split(), *words]


def without_output(folder: Path, model_file: Path) -> list[str]:
    words = arguments(folder, model_file, Path("none"))
    place = words.index("--output")
    return words[:place] + words[place + 2 :]


def run_train(folder: Path, model_file: Path, output: Path, *words: str) -> Path:
    cli.main(arguments(folder, model_file, output, *words))
    return output


def run_on_two_processes(folder: Path, model_file: Path, output: Path, *words: str) -> str:
    """The same on two processes, from outside; what they print."""
    command = ["-m", "train_clip.cli", *arguments(folder, model_file, output, *words), "--devices", "2"]
    return forked.run(command, processes=2, check=True).stdout


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "logs" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_it_promises(pair_folder, model_file, tmp_path, capsys, drawn):
    """Checkpoints, logs, curves, configuration and versions, and the next command on the screen."""
    run = run_train(pair_folder, model_file, tmp_path / "run", "--val_share", "0.25")
    assert {file.name for file in (run / "checkpoints").iterdir()} == {
        "best.ckpt",
        "last.ckpt",
        "step-00000002.ckpt",
        "step-00000004.ckpt",
    }
    assert Image.open(run / "curves.png").size[0] > 500
    assert any(file.name.startswith("events.out.tfevents") for file in (run / "tensorboard").iterdir())
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["learning_rate"] == TINY["optimizer"]["lr"]
    assert config["epochs"] == 2
    assert config["precision"] == "32-true"
    about = yaml.safe_load((run / "run.yaml").read_text())
    # The wheels of PyPI say their CUDA ("+cu130") in the one and not in the other.
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    rows = metrics(run)
    assert {"train/loss", "train/logit_scale", "train/learning_rate", "train/pairs_per_second", "val/loss"} <= set(
        rows[0]
    )
    assert sum(bool(row["train/loss"]) for row in rows) == 2 * (9 // 4)
    assert f"train-clip evaluate {run}/checkpoints/best.ckpt" in capsys.readouterr().out


def test_a_run_is_not_overwritten(pair_folder, model_file, tmp_path):
    """The second run into the same folder stops, asks for another, and leaves the first as it was."""
    run = run_train(pair_folder, model_file, tmp_path / "run", "--max_steps", "1")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit, match=r"already holds a run.*another --output, or --resume .*run"):
        run_train(pair_folder, model_file, tmp_path / "run", "--max_steps", "1")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_run_without_a_checkpoint_is_begun_anew(pair_folder, model_file, tmp_path):
    """What a crash before the first checkpoint leaves: the same command again trains, and its log is its own.

    A run that was to keep no checkpoints is one all the same, and stays.
    """
    run = run_train(pair_folder, model_file, tmp_path / "run", "--max_steps", "2")
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    (run / "config.yaml.tmp-123").write_text("half")
    run_train(pair_folder, model_file, tmp_path / "run", "--max_steps", "1")
    assert [row["step"] for row in metrics(run)] == ["0"]
    assert not list(run.glob("*.tmp-*"))
    bare = run_train(pair_folder, model_file, tmp_path / "bare", "--enable_checkpointing", "false")
    with pytest.raises(SystemExit, match="already holds a run"):
        run_train(pair_folder, model_file, bare)


def test_what_a_kill_has_left_is_no_obstacle(pair_folder, model_file, tmp_path):
    """A run that was killed within its first file: its temporary file, and a lock that nobody holds."""
    (tmp_path / "run").mkdir()
    for name in (".lock", "run.yaml.tmp-123"):
        (tmp_path / "run" / name).write_text("process 123 on here")
    run = run_train(pair_folder, model_file, tmp_path / "run", "--max_steps", "1")
    assert {file.name for file in run.iterdir()} == {
        *("run.yaml", "config.yaml", "model.yaml", "checkpoints", "logs", "tensorboard", "curves.png")
    }


def test_a_run_is_not_written_among_other_files(pair_folder, model_file, tmp_path):
    """The data folder as --output: refused, and left as it was."""
    before = sorted(pair_folder.iterdir())
    with pytest.raises(
        SystemExit, match=r"pairs: holds '\d+\.\w+' already, .* Expected a new or an empty folder; give"
    ):
        run_train(pair_folder, model_file, pair_folder)
    assert sorted(pair_folder.iterdir()) == before


def test_a_run_is_not_written_below_the_data(pair_folder, model_file, tmp_path, monkeypatch):
    """A new folder below the data folder, given or by default, whose curves the next scan would count."""
    before = sorted(pair_folder.iterdir())
    monkeypatch.chdir(pair_folder)
    for output in (["--output", str(pair_folder / "run")], ["--output", "a/b"], []):
        with pytest.raises(SystemExit, match=r"lies in .*pairs/, .* Give an --output outside the data folder"):
            cli.main([*without_output(pair_folder, model_file), *output])
    assert sorted(pair_folder.iterdir()) == before


def test_a_mistake_leaves_no_folder(pair_folder, model_file, tmp_path, monkeypatch):
    """Refused once the folder is chosen: it is gone again, with those above it that were made, but no other."""
    monkeypatch.chdir(tmp_path)
    words = without_output(pair_folder, model_file)
    (tmp_path / "mine").mkdir()
    before = sorted(tmp_path.iterdir())
    for output in (["--output", "a/b/run"], ["--output", "mine/run"], ["--output", "mine"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, *output, "--save_every", "often"])
        assert "--save_every often" in said(stop)
    assert sorted(tmp_path.iterdir()) == before
    assert not list((tmp_path / "mine").iterdir())


def test_runs_that_start_in_one_second_have_a_folder_each(pair_folder, model_file, tmp_path, monkeypatch):
    """Three runs without --output, by a clock that stands still: each has its own log and checkpoints."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    monkeypatch.chdir(tmp_path)
    words = without_output(pair_folder, model_file)
    for steps in ("1", "2", "3"):
        cli.main([*words, "--max_steps", steps])
    names = ["tiny-20300102-030405", "tiny-20300102-030405-2", "tiny-20300102-030405-3"]
    assert sorted(run.name for run in Path("runs").iterdir()) == names
    assert [len(metrics(Path("runs", name))) for name in names] == [1, 2, 3]


def test_the_saved_config_runs_again_to_the_same_weights(pair_folder, model_file, tmp_path):
    """``--config RUN/config.yaml`` alone repeats a run bit for bit."""
    first = run_train(pair_folder, model_file, tmp_path / "first", "--resize_ratio", "0.5")
    cli.main(["train", "--config", str(first / "config.yaml"), "--output", str(tmp_path / "second")])
    a, b = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("first", "second"))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])


def test_the_checkpoint_loads_in_one_line(pair_folder, model_file, tmp_path):
    """``load_from_checkpoint(path)`` rebuilds the model from plain data, weights and tokenizer included."""
    run = run_train(pair_folder, model_file, tmp_path / "run")
    loaded = CLIPWrapper.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True)
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    image = loaded.embed_images([pair_folder / "000.png"])
    texts = loaded.embed_texts(["picture 0", "picture 1"])
    assert (image @ texts.T).shape == (1, 2)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))


def test_fewer_pairs_than_a_batch_train_all_the_same(tmp_path, model_file, capsys):
    """Three pairs and a batch of four: a smaller batch and a message, not an empty run."""
    run = run_train(write_pairs(tmp_path / "few", 3), model_file, tmp_path / "run", "--val_share", "0", "--epochs", "2")
    assert sum(bool(row["train/loss"]) for row in metrics(run)) == 2
    assert {file.name for file in (run / "checkpoints").iterdir()} == {
        "last.ckpt",
        "step-00000001.ckpt",
        "step-00000002.ckpt",
    }


def test_a_broken_image_is_counted_and_named(pair_folder, model_file, tmp_path, capsys):
    """One truncated file: the run goes on, the file is named on the screen and in the log."""
    broken = pair_folder / "005.png"
    broken.write_bytes(broken.read_bytes()[:60])
    run = run_train(pair_folder, model_file, tmp_path / "run", "--val_share", "0", "--max_bad", "0.1")
    printed = capsys.readouterr().out
    assert f"Skipped {broken}: damaged image" in printed
    log = run / "logs" / "skipped.tsv"
    path, _, reason = log.read_text().rstrip("\n").partition("\t")
    assert path == str(broken)
    assert reason.startswith("damaged image (")
    assert f"Bad files so far: 1 (1 × {reason}); their names are in {log}." in printed


def test_broken_images_are_counted_over_all_processes(tmp_path, model_file, capsys):
    """Seven bad files of 16, more than are named on the screen, ``--devices 2`` against one: counts, names and log."""
    folder = write_pairs(tmp_path / "pairs", 16)
    broken = [folder / f"{index:03}.png" for index in range(1, 15, 2)]
    for image in broken:
        image.write_bytes(b"")
    words = ["--val_share", "0.25", "--epochs", "2", "--num_workers", "0", "--max_bad", "0.5"]
    one = run_train(folder, model_file, tmp_path / "one", *words)
    alone = capsys.readouterr().out
    shared = run_on_two_processes(folder, model_file, tmp_path / "two", *words)
    logs = [run / "logs" / "skipped.tsv" for run in (one, tmp_path / "two")]
    # Every pair of the 12 to train on and the 4 held out is read once an epoch, and each bad one is replaced.
    why = "empty file"
    for printed, log in zip((alone, shared), logs, strict=True):
        assert [line for line in printed.splitlines() if line.startswith("Epoch")] == [
            f"Epoch 1: 7 samples replaced by others or skipped. Bad files so far: 7 (7 × {why}); "
            f"their names are in {log}."
        ]
        assert printed.count("Skipped ") == 5
        assert sorted(log.read_text().splitlines()) == [f"{image}\t{why}" for image in broken]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_error_of_the_loader_is_told_in_a_line(pair_folder, model_file, tmp_path, workers):
    """No image can be read: without workers and out of one's traceback the same message, which begins with a file."""
    for image in pair_folder.glob("*.png"):
        image.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        run_train(pair_folder, model_file, tmp_path / "run", "--val_share", "0", "--num_workers", workers)
    message = said(stop)
    assert message.startswith(f"train-clip: {pair_folder}/0")
    assert message.endswith(
        "Expected nearly all files to be readable; `train-clip data check` lists those that are not."
    )
    assert len(message.splitlines()) == 1
    assert message.count("empty file") == 2


def test_overfitting_one_batch_learns_it_by_heart(pair_folder, model_file, tmp_path):
    """Lightning's ``--overfit_batches 1``: the same four pairs until the loss is near zero."""
    words = "--overfit_batches 1 --epochs 150 --val_share 0 --learning_rate 1e-2 --enable_checkpointing false".split()
    run = run_train(pair_folder, model_file, tmp_path / "run", *words)
    losses = [float(row["train/loss"]) for row in metrics(run) if row["train/loss"]]
    assert losses[0] > 1.0
    assert losses[-1] < 0.05


def test_two_processes_train_as_one(pair_folder, model_file, tmp_path):
    """Through the command, ``--devices 2`` against one process: the same loss at each step, to float32's rounding."""
    words = ["--val_share", "0.25", "--epochs", "3", "--num_workers", "0"]
    one = run_train(pair_folder, model_file, tmp_path / "one", *words)
    run_on_two_processes(pair_folder, model_file, tmp_path / "two", *words)
    for name in ("train/loss", "val/loss", "val/R@1_image_to_text"):
        alone = [float(row[name]) for row in metrics(one) if row[name]]
        shared = [float(row[name]) for row in metrics(tmp_path / "two") if row[name]]
        assert len(alone) >= 3
        assert shared == pytest.approx(alone, rel=1e-4)


def test_precision_follows_the_device(monkeypatch):
    """bf16 where the GPU computes in it, else 16-mixed, float32 without a GPU or where the CPU is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_precision("auto") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert default_precision("auto") == "bf16-mixed"
    assert default_precision("cpu") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert default_precision("gpu") == "16-mixed"


@pytest.mark.gpu
def test_a_gpu_trains_in_its_default_precision(pair_folder, model_file, tmp_path):
    """A few steps on a CUDA device, without naming a precision."""
    cli.main(
        [
            "train",
            "--model_name",
            str(model_file),
            "--folder",
            str(pair_folder),
            "--batch_size",
            "4",
            "--output",
            str(tmp_path / "run"),
        ]
    )
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] in ("bf16-mixed", "16-mixed")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "the run has done 0 steps, and its length is 0 steps"),
        (["--accelerator", "cuda"], "Lightning's Trainer does not accept these options"),
        (["--logger", "WandbLogger"], "WandbLogger': Requirement .*pip install"),
        (["--val_share", "1.5"], r"val_share is 1\.5; expected from 0 to below 1"),
        (["--batch_size", "1"], "batch_size is 1; expected 2 or above"),
        (["--resize_ratio", "1.5"], r"resize_ratio is 1\.5; expected above 0, up to 1\."),
        (["--image_size", "17"], r"image size 17 is not a multiple of the patch 8"),
        (["--minibatch_size", "-1"], "minibatch_size is -1; expected 0 or above"),
        (["--warmup_steps", "-1"], "warmup_steps is -1; expected 0 or above"),
        (["--image_size", "0"], r"image_size is 0; expected 1 or above"),
        (["--image_size", "-16"], r"image_size is -16; expected 1 or above"),
        (["--seed", "-1"], "seed is -1; expected 0 or above"),
        (["--num_workers", "-1"], "num_workers is -1; expected 0 or above"),
        (["--learning_rate", "-1"], r"learning_rate is -1\.0; expected above 0"),
        (["--betas", "[2, 3]"], r"betas is \(2\.0, 3\.0\); expected two numbers from 0 to below 1"),
        (["--eps", "-1"], r"eps is -1\.0; expected above 0"),
    ],
)
def test_what_cannot_work_is_told_in_a_line(pair_folder, model_file, tmp_path, words, message):
    """Options that cannot work end with a message for the user, not with a traceback."""
    with pytest.raises(SystemExit) as stop:
        run_train(pair_folder, model_file, tmp_path / "run", *words)
    assert re.search(message, said(stop))


def test_the_next_command_works_where_nothing_is_held_out(pair_folder, model_file, tmp_path, capsys):
    """Twelve pairs, of which the default share of 0.05 holds out none: what is printed as next runs as it stands."""
    run_train(pair_folder, model_file, tmp_path / "run", "--epochs", "1")
    printed = capsys.readouterr().out
    cli.main(shlex.split(printed.rpartition("Next: train-clip ")[2]))
    assert "--val_check_interval" not in printed


def test_fast_dev_run_passes_through(pair_folder, model_file, tmp_path):
    """Lightning's one-batch trial leaves no checkpoint and no error."""
    run = run_train(pair_folder, model_file, tmp_path / "run", "--fast_dev_run", "true")
    assert not (run / "checkpoints").exists()


def test_max_steps_alone_sets_the_length(pair_folder, model_file, tmp_path):
    """Seven steps of a model whose own two epochs would give six: all seven are trained, at a rate that falls to 0."""
    words = ["--model_name", str(model_file), "--folder", str(pair_folder), "--batch_size", "4", "--accelerator", "cpu"]
    cli.main(["train", *words, "--max_steps", "7", "--output", str(tmp_path / "run")])
    # No --log_every_n_steps: a short run is logged at each step all the same.
    rows = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert len(rows) == 7
    assert 0 < float(rows[-1]["train/learning_rate"]) < 0.1 * TINY["optimizer"]["lr"]


def test_a_run_keeps_the_model_it_was_trained_with(pair_folder, model_file, tmp_path):
    """The user's model file is copied: ``config.yaml`` names the copy, whatever becomes of the file."""
    run = run_train(pair_folder, model_file, tmp_path / "run", "--max_steps", "1")
    model_file.unlink()
    cli.main(["train", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")])
    assert (tmp_path / "again" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("words", "said"), [((), True), (("--config", "small", "--epochs", "1"), False), (("--optimizer", "adamw"), False)]
)
def test_few_pairs_are_told_of_their_recipe(pair_folder, model_file, tmp_path, caplog, words, said):
    """In one line, where no optimizer was chosen; a recipe brings one."""
    with caplog.at_level("INFO"):
        run_train(pair_folder, model_file, tmp_path / "run", *words)
    assert [line for line in caplog.messages if "--config small" in line] == [
        "For 12 pairs `--config small` usually gives better results than the paper's hyperparameters."
    ] * said


def test_weights_that_are_given_are_told_of_no_recipe(pair_folder, model_file, tmp_path, caplog):
    """A recipe is for training from scratch."""
    run_train(pair_folder, model_file, tmp_path / "first", "--optimizer", "adamw")
    with caplog.at_level("INFO"):
        words = ["--folder", str(pair_folder), "--batch_size", "4", "--max_steps", "1", "--accelerator", "cpu"]
        pretrained = str(tmp_path / "first/checkpoints/last.ckpt")
        cli.main(["train", "--pretrained", pretrained, *words, "--output", str(tmp_path / "run")])
    assert not [line for line in caplog.messages if "--config small" in line]


def test_which_recipe_is_for_how_many():
    """Up to 300,000 pairs, up to 5 million, none; a small model on a CPU likewise; none beside a chosen optimizer."""
    for parameters, device in ((150_000_000, "cuda"), (21_000_000, "cpu")):
        found = [advise(parameters, None, number, device) for number in (12, 300_000, 300_001, 5_000_000, 5_000_001)]
        assert [line and line.split("--config ")[1].split("`")[0] for line in found] == [
            "small", "small", "medium", "medium", None
        ]  # fmt: skip
        assert advise(parameters, "adamw", 12, device) is None


@pytest.mark.parametrize("optimizer", [None, "muon"])
def test_a_large_model_on_a_cpu_is_told_of_a_small_one(optimizer, monkeypatch):
    """RN50, of 102 million parameters, on eight threads: 40 epochs of 8,000 pairs at 30 pairs a second and thread."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert advise(102_007_137, optimizer, 8_000, "cpu") == (
        "This model (102 million parameters) is slow on a CPU. `--config cpu` trains a small one on 8,000 pairs in "
        "about 22 min."
    )
