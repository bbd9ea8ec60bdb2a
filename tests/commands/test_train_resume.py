"""``train-clip train --resume``: what it goes on from, what it says, and what it refuses."""

from __future__ import annotations

import csv
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import TINY, said, write_pairs
from train_clip import CLIPWrapper, cli
from train_clip.checkpoints.own import read_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run of two epochs of three steps; every state is kept. Tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    data = write_pairs(folder / "data", 16)
    (data / "003.png").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = "--model_name tiny.yaml --folder data --batch_size 4 --accelerator cpu --val_share 0.2 --max_bad 0.1"
        cli.main(
            [
                "train",
                *words.split(),
                *"--save_every 1 --keep 9 --log_every_n_steps 1 --num_workers 0 --output run".split(),
            ]
        )
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory. Hard links stay links, times stay as they were."""
    folder = tmp_path / "here"
    shutil.copytree(finished, folder)
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "last.ckpt").unlink()
    os.link(checkpoints / "step-00000006.ckpt", checkpoints / "last.ckpt")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def there(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder itself as the working directory, for commands that change nothing."""
    monkeypatch.chdir(finished)


def train(*words: str) -> None:
    cli.main(["train", *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message that a command ends with; it has left everything in the run as it was."""
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as stop:
        train(*words)
    assert {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()} == before
    return said(stop)


def rows(run: str) -> list[int]:
    with Path(run, "logs", "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


def state(path: str) -> dict:
    return read_checkpoint(Path(path))


def test_more_epochs_with_a_word_on_the_learning_rate(here, capsys, caplog):
    """Two more epochs than it was to have: it goes on in its folder with its own options, and says what changes."""
    caplog.set_level("INFO")
    train("--resume", "run", "--epochs", "4")
    printed = capsys.readouterr()
    assert "Resuming from run/checkpoints/last.ckpt, after 6 steps and 6 batches." in printed.out
    assert "The length of the run changed from 6 to 12 optimizer steps. From step 6 on, the learning rate follows" in (
        printed.err + caplog.text
    )
    last = state("run/checkpoints/last.ckpt")
    assert (last["global_step"], last["callbacks"]["EndOfStep"]["consumed_batches"]) == (12, 12)
    assert rows("run") == list(range(12))
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["epochs"], config["batch_size"], config["resume"]) == (4, 4, None)
    starts = list(yaml.safe_load_all(Path("run/run.yaml").read_text()))
    assert [start.get("after_steps") for start in starts] == [None, 6]


def test_a_file_of_options_resumes_as_the_command_line_does(here, capsys):
    """``resume`` in a file brings the run's options, over which the file's others win, in the spellings people know."""
    Path("again.yaml").write_text("resume: run\nmax-epochs: 3\nbatchsize: 4\n")
    train("--config", "again.yaml")
    assert "Resuming from run/checkpoints/last.ckpt, after 6 steps" in capsys.readouterr().out
    assert state("run/checkpoints/last.ckpt")["global_step"] == 9
    Path("again.yaml").write_text("resume: run\nlr: 1e-2\n")
    assert "learning_rate" in refused(capsys, "--config", "again.yaml", "--epochs", "5")


def test_epochs_are_counted_from_one(there, capsys):
    """In the log of metrics, in messages and by inspect."""
    with Path("run", "logs", "metrics.csv").open() as file:
        logged = [(row["step"], row["epoch"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert logged == [(str(step), str(1 + step // 3)) for step in range(6)]
    for step in (1, 3, 4, 6):
        cli.main(["inspect", f"run/checkpoints/step-{step:08}.ckpt"])
        assert re.search(rf"^epoch +{(step + 2) // 3}$", capsys.readouterr().out, re.MULTILINE), step


def test_a_best_that_is_of_before_is_said_to_be(here, capsys):
    """One more step, which no validation follows: what is said of best.ckpt fits the command that is shown next."""
    train("--resume", "run", "--epochs", "4", "--max_steps", "7")
    said = capsys.readouterr().out
    assert "The run ended before its first validation, so best.ckpt, if it exists, was not updated" in said
    assert "train-clip evaluate run/checkpoints/best.ckpt" in said


def test_an_earlier_state_in_the_same_folder(here, capsys):
    """From step 4 of 6: the last two steps are trained and logged again, to the same weights."""
    before = state("run/checkpoints/last.ckpt")["state_dict"]
    train("--resume", "run/checkpoints/step-00000004.ckpt")
    assert "Resuming from run/checkpoints/step-00000004.ckpt, after 4 steps" in capsys.readouterr().out
    after = state("run/checkpoints/last.ckpt")["state_dict"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert rows("run") == list(range(6))


def test_a_branch_leaves_the_first_run_alone(here):
    """With another --output the run goes on there."""
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    train("--resume", "run", "--output", "branch", "--epochs", "3")
    assert {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()} == before
    assert state("branch/checkpoints/last.ckpt")["global_step"] == 9
    assert rows("branch") == [6, 7, 8]


def test_auto_takes_the_run_in_output_or_the_newest(here, capsys):
    """--output names it; otherwise the one below runs/ whose newest checkpoint is the newest."""
    train("--resume", "auto", "--output", "run", "--epochs", "3")
    assert "Resuming from run/checkpoints/last.ckpt, after 6 steps" in capsys.readouterr().out
    for age, name in enumerate(("new", "old", "middle")):
        shutil.copytree("run", f"runs/{name}")
        for file in Path(f"runs/{name}/checkpoints").iterdir():
            os.utime(file, (10**9 - age, 10**9 - age))
    Path("runs/empty").mkdir()
    train("--resume=auto", "--epochs=4")
    assert "Resuming from runs/new/checkpoints/last.ckpt, after 9 steps" in capsys.readouterr().out


def test_damaged_checkpoints_are_passed_over_and_named(here, capsys):
    """A flipped byte in the newest, an empty one, a foreign one before it: each is given its reason, the next taken."""
    checkpoints = Path("run/checkpoints")
    newest = bytearray((checkpoints / "last.ckpt").read_bytes())
    newest[len(newest) // 2] ^= 1
    (checkpoints / "last.ckpt").write_bytes(newest)
    (checkpoints / "step-00000005.ckpt").write_bytes(b"")
    torch.save({"weights": torch.ones(2)}, checkpoints / "best.ckpt")
    for age, name in enumerate(("last", "step-00000005", "best", "step-00000004", "step-00000003")):
        os.utime(checkpoints / f"{name}.ckpt", (4 * 10**9 - age, 4 * 10**9 - age))
    train("--resume", "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("Skipped", "Resuming"))]
    assert lines[0].startswith(
        "Skipped run/checkpoints/last.ckpt: not a checkpoint, or an incomplete one (BadZipFile: a record "
    )
    assert lines[1].startswith("Skipped run/checkpoints/step-00000005.ckpt: not a checkpoint, or an incomplete one")
    assert lines[2].startswith("Skipped run/checkpoints/best.ckpt: holds no training state")
    assert lines[3] == "Resuming from run/checkpoints/step-00000004.ckpt, after 4 steps and 4 batches."
    assert state("run/checkpoints/last.ckpt")["global_step"] == 6


def test_a_run_that_was_copied_goes_on_from_its_last_state(here, capsys):
    """Copies have new times in any order, and are links no more: last.ckpt is taken all the same."""
    for age, name in enumerate(("last", "step-00000006", "step-00000003", "best")):
        file = Path(f"run/checkpoints/{name}.ckpt")
        file.write_bytes(file.read_bytes())
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
        os.utime(file, (4 * 10**9 + age, 4 * 10**9 + age))
    train("--resume", "run/checkpoints", "--epochs", "3")
    assert "Resuming from run/checkpoints/last.ckpt, after 6 steps" in capsys.readouterr().out


def test_files_that_are_named_already_are_not_named_again(here, capsys):
    """skipped.tsv has its one line, and the screen no new one."""
    log = Path("run/logs/skipped.tsv")
    before = log.read_text()
    assert before.startswith("data/003.png\t")
    train("--resume", "run", "--epochs", "3")
    assert log.read_text() == before
    assert "Skipped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rate 0.5", r"learning_rate 0.5, was 0.001.*start a new run"),
        ("--betas [0.5,0.5]", r"betas \[0.5, 0.5\], was \[0.9, 0.98\]"),
        ("--warmup_steps 1", r"warmup_steps 1, was None"),
        ("--seed 3", r"seed 3, was 0"),
        ("--color_jitter 0.5", r"color_jitter 0.5, was 0.0"),
        ("--image_size 32", r"config\.image\.size 32, was 16"),
        ("--pretrained tiny.yaml", r"pretrained tiny.yaml, was None"),
        ("--activation gelu", r"activation gelu, was None"),
        ("--model_name demo-8-48px", r"config\.name demo-8-48px, was tiny"),
        ("--batch_size 2", r"batch_size 2, was 4.*--minibatch_size may change"),
        ("--val_share 0", r"val_share 0.0, was 0.2"),
        ("--shuffle false", r"shuffle False, was True"),
        ("--resize_ratio 0.5", r"resize_ratio 0.5, was None"),
        ("--epochs 2", r"the run has done 6 steps, and its length is 6 steps\. To train longer, increase --epochs"),
        ("--epochs 1", r"the run has done 6 steps, and its length is 3 steps"),
        ("--max_steps 5", r"the run has done 6 steps, and its length is 5 steps"),
        ("--epochs 3 --accumulate_grad_batches 3", r"the run has done 6 steps, and its length is 3 steps"),
        ("--epochs 3 --limit_train_batches 0.7", r"the run has done 6 steps, and its length is 6 steps"),
        ("--save_every often", r"--save_every often: expected optimizer steps"),
        ("--keep 0", r"keep is 0; expected 1 or above"),
    ],
)
def test_what_a_resumed_run_cannot_change(there, capsys, words, message):
    """Options that its state or its order of the data would not follow: refused before anything is written."""
    longer = [] if "epochs" in words else ["--epochs", "4"]
    assert re.search(message, refused(capsys, "--resume", "run", *longer, *words.split()))


@pytest.mark.parametrize("words", ["--minibatch_size 3", "--num_workers 1", "--precision bf16-mixed", "--keep 1"])
def test_what_a_resumed_run_can_change(here, words):
    """Options that leave the order of the data and the state alone."""
    train("--resume", "run", "--epochs", "3", *words.split())
    assert state("run/checkpoints/last.ckpt")["global_step"] == 9


def test_everything_moved_elsewhere(here, monkeypatch):
    """Run and data under other names, from another working directory: the run's own copy of its model is found."""
    shutil.move("run", "kept")
    shutil.move("data", "pictures")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    train("--resume", "../kept", "--folder", "../pictures", "--epochs", "3")
    assert state("../kept/checkpoints/last.ckpt")["global_step"] == 9


def test_another_number_of_pairs_is_refused_and_other_names_are_said(here, capsys, recwarn):
    """Four pairs fewer make another number of batches; one renamed pair makes a warning."""
    for suffix in ("png", "txt"):
        Path(f"data/004.{suffix}").rename(f"data/x04.{suffix}")
    train("--resume", "run", "--epochs", "3")
    assert any("some of the pairs have other names than when the run started" in str(w.message) for w in recwarn)
    for index in range(5, 9):
        Path(f"data/{index:03}.png").unlink()
    message = refused(capsys, "--resume", "run", "--epochs", "4")
    assert "pairs" in message
    assert "differ from those that the run started with" in message


def test_resume_that_finds_nothing_fails(here, capsys):
    """No such file, no run below runs/, a run without checkpoints, one whose checkpoints are all damaged."""
    assert "there is no checkpoint in nothing/checkpoints/, and no such file" in refused(capsys, "--resume", "nothing")
    assert "--resume auto: no run below runs/ has a checkpoint" in refused(capsys, "--resume", "auto")
    assert "there is no checkpoint in data/checkpoints/" in refused(capsys, "--resume", "data")
    for file in Path("run/checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    capsys.readouterr()
    message = refused(capsys, "--resume", "run")
    assert message.startswith(
        "train-clip: --resume run: no checkpoint loads in run/checkpoints/, for the reasons above."
    )
    assert capsys.readouterr().out.count("Skipped run/checkpoints/") == len(
        {file.stat().st_ino for file in Path("run/checkpoints").iterdir()}
    )


def test_a_checkpoint_that_runs_code_is_refused(here, capsys, tmp_path):
    """A pickle that would make a file when loaded: refused, and it did not."""

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save({"state_dict": Hostile()}, "bad.ckpt")
    message = refused(capsys, "--resume", "bad.ckpt", "--folder", "data")
    assert "bad.ckpt: holds more than plain data; no code of it was run" in message
    assert not (tmp_path / "hacked").exists()


def test_loading_for_other_ends_asks_no_questions(there):
    """``load_from_checkpoint`` with a rate of one's own is no resumption."""
    path = "run/checkpoints/last.ckpt"
    assert CLIPWrapper.load_from_checkpoint(path, weights_only=True, learning_rate=0.5).hparams.learning_rate == 0.5
