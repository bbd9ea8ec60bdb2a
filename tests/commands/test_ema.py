"""``--ema``: figures and files of the running mean, what reads them, and what does not."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml

import train_clip
from tests.conftest import TINY, write_pairs
from tests.encoders import save_bert, save_resnet
from train_clip import CLIPWrapper, CustomCLIPWrapper, TextImageDataModule, cli
from train_clip.checkpoints.own import read_checkpoint
from train_clip.commands.run import say_mean
from train_clip.prompts.prompt_tune import BY_LOSS
from train_clip.training.checkpoints import BY_RECALL, Checkpoints

SHORT = "--folder data --batch_size 4 --accelerator cpu --val_share 0.25 --log_every_n_steps 1 --num_workers 0".split()
MEAN, LAST = Path("run/ema/last.ckpt"), Path("run/checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of four steps with a running mean, and what it printed; the weights move fast."""
    folder = tmp_path_factory.mktemp("ema")
    write_pairs(folder / "data", 24)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        how = "--model_name tiny.yaml --ema 0.6 --epochs 3 --learning_rate 1e-2 --warmup_steps 0 --output run".split()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            cli.main(["train", *SHORT, *how])
    (folder / "said.txt").write_text(said.getvalue())
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def figures(name: str) -> list[float]:
    """A column of the log."""
    with Path("run/logs/metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def weights(path: Path, part: str) -> dict:
    state = read_checkpoint(path)["state_dict"]
    return {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}


def test_figures_are_those_of_the_file(here: Path, tmp_path: Path) -> None:
    """``val_ema`` of the last epoch against ``validate`` on ema/last.ckpt, and ``evaluate``'s recalls of it."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    data = TextImageDataModule("data", 4, val_share=0.25, image_size=16, context_length=16)
    for path, prefix in ((MEAN, "val_ema"), (LAST, "val")):
        found = trainer.validate(CLIPWrapper.load_from_checkpoint(path), data)[0]
        for name in ("loss", "mean_recall", "R@1_image_to_text", "R@5_text_to_image"):
            assert figures(f"{prefix}/{name}")[-1] == pytest.approx(found[f"val/{name}"], abs=1e-6), name
    assert figures("val_ema/loss")[0] != pytest.approx(figures("val/loss")[0], abs=1e-4)
    words = ["--folder", "data", "--split", "held_out", "--val_share", "0.25", "--json", str(tmp_path / "scores.json")]
    cli.main(["evaluate", str(MEAN), *words])
    assert json.loads((tmp_path / "scores.json").read_text())["num_images"] == 6


def test_the_best_is_best_by_its_own_figure(here: Path) -> None:
    """The first epoch of the highest mean of recalls, of weights and mean alike."""
    for folder, prefix in (("checkpoints", "val"), ("ema", "val_ema")):
        recalls = figures(f"{prefix}/mean_recall")
        epoch = read_checkpoint(Path(f"run/{folder}/best.ckpt"))["global_step"] // 4 - 1
        assert epoch == recalls.index(max(recalls))
    state = read_checkpoint(LAST)["callbacks"]["Checkpoints"]
    assert state["best_mean"] == pytest.approx(max(figures("val_ema/mean_recall")), abs=1e-6)


def test_each_file_holds_what_it_should(here: Path) -> None:
    """The mean's: a model and no optimizer. The run's: both; weights are read from it as they were trained."""
    mean, run = read_checkpoint(MEAN), read_checkpoint(LAST)
    assert "optimizer_states" not in mean and "callbacks" not in mean
    assert mean["global_step"] == run["global_step"] == 12
    assert mean["hyper_parameters"] == run["hyper_parameters"] | {"ema": 0.0}
    assert run["hyper_parameters"]["ema"] == 0.6
    assert same(weights(MEAN, "model."), weights(LAST, "ema.model."))
    assert not same(weights(MEAN, "model."), weights(LAST, "model."))
    assert same(train_clip.load(LAST).model.state_dict(), weights(LAST, "model."))
    assert same(train_clip.load(MEAN).model.state_dict(), weights(MEAN, "model."))
    whole = CLIPWrapper.load_from_checkpoint(LAST)
    assert same(whole.model.state_dict(), weights(LAST, "model."))
    assert same(whole.ema.model.state_dict(), weights(MEAN, "model."))
    assert MEAN.stat().st_size < 0.3 * LAST.stat().st_size  # which holds weights, mean and two moments


def test_every_verb_reads_the_mean(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``inspect``, ``convert``, ``merge``, and ``--pretrained`` of ``train`` and ``finetune``, with another mean."""
    cli.main(["inspect", str(MEAN)])
    assert re.search(r"EMA of weights +momentum 0\.6, 12 updates\n", capsys.readouterr().out)
    cli.main(["convert", str(MEAN), str(tmp_path / "mean.safetensors"), "--to", "safetensors"])
    expected = weights(MEAN, "model.")
    assert same(train_clip.load(tmp_path / "mean.safetensors").model.state_dict(), expected)
    for tuned in (MEAN, LAST):
        cli.main(["merge", str(LAST), str(tuned), "--weight", "1", "--output", str(tmp_path / tuned.parent.name)])
        merged = tmp_path / tuned.parent.name / "merged-1.ckpt"
        assert same(CLIPWrapper.load_from_checkpoint(merged).model.state_dict(), weights(tuned, "model."))
    for verb in ("train", "finetune"):
        how = [*SHORT, "--pretrained", str(MEAN), "--max_steps", "1", "--learning_rate", "1e-12", "--ema", "0.9"]
        cli.main([verb, *how, "--output", str(tmp_path / verb)])
        for part in ("model.", "ema.model."):
            found = weights(tmp_path / verb / "checkpoints/last.ckpt", part)
            assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in found.items())


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_no_run_goes_on_from_the_mean(here: Path, name: str) -> None:
    """What it is, what was expected, and what else it may be for."""
    expected = rf"run/ema/{name}: holds the EMA of a run's weights \(--ema\), and no training state to resume from\."
    with pytest.raises(SystemExit, match=expected):
        cli.main(["train", "--resume", f"run/ema/{name}"])


def test_a_run_goes_on_with_its_mean(here: Path, tmp_path: Path) -> None:
    """More epochs, in another folder: the mean goes on; with another momentum the run is refused."""
    cli.main(["train", "--resume", "run", "--epochs", "4", "--output", str(tmp_path / "more")])
    assert read_checkpoint(tmp_path / "more/ema/last.ckpt")["running_mean"] == {"momentum": 0.6, "updates": 16}
    assert yaml.safe_load((tmp_path / "more/config.yaml").read_text())["ema"] == 0.6
    for ema in ("0", "0.9"):
        with pytest.raises(SystemExit, match=rf"ema {float(ema)}, was 0\.6"):
            cli.main(["train", "--resume", "run", "--epochs", "4", "--ema", ema, "--output", str(tmp_path / "other")])


def test_what_is_said(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures of both after each validation; the mean's best file where it is the better one, and only there."""
    said = Path("said.txt").read_text()
    assert re.search(r"epoch 1, step 4, held out:  loss .*\nepoch 1, step 4, EMA:  loss \d", said)
    best, best_mean = (max(figures(f"{prefix}/mean_recall")) for prefix in ("val", "val_ema"))
    assert ("The EMA of the weights scored better" in said) == (best_mean > best)
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema/best.ckpt").touch()
    for best_mean, by, shown in ((0.5, BY_RECALL, True), (0.4, BY_RECALL, False), (0.5, BY_LOSS, False)):
        saving = Checkpoints(tmp_path, best_by=by)
        saving.load_state_dict({"best": 0.4, "best_mean": best_mean})
        say_mean(SimpleNamespace(checkpoint_callbacks=[saving]), tmp_path)
        expected = (
            f"better: val/mean_recall 0.5000, the trained weights 0.4000. To evaluate it, use {tmp_path}/ema/best.ckpt"
        )
        assert (expected in capsys.readouterr().out) == shown


def test_the_mean_of_two_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With distillation: loads with encoders and tokenizer, and has no teacher."""
    monkeypatch.chdir(tmp_path)
    save_resnet(tmp_path / "resnet"), save_bert(tmp_path / "bert"), write_pairs(tmp_path / "data", 16)
    encoders = "--image_encoder hf:resnet --text_encoder hf:bert --epochs 1 --ema 0.6 --output run".split()
    cli.main(["finetune", *SHORT, *encoders])
    loaded = CustomCLIPWrapper.load_from_checkpoint(MEAN)
    assert loaded.distillation is None
    assert same(loaded.model.state_dict(), weights(LAST, "ema.model."))
    assert loaded.embed_texts(["picture 1"]).shape == (1, 16)
    assert same(train_clip.load(MEAN).model.state_dict(), loaded.model.state_dict())


def test_the_mean_of_prompts(here: Path, tmp_path: Path) -> None:
    """A small file beside its backbone; ``best`` goes by the lowest loss, as that of the prompts does."""
    words = [*SHORT, "--pretrained", str(LAST), "--prompts", "2", "--ema", "0.6", "--epochs", "1"]
    cli.main(["prompt-tune", *words, "--output", str(tmp_path / "run")])
    loaded = train_clip.load(tmp_path / "run/ema/best.ckpt").model
    state = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    expected = state["state_dict"]["ema.model.visual.prompts.0"]
    assert torch.equal(loaded.state_dict()["visual.prompts.0"], expected)
    with (tmp_path / "run/logs/metrics.csv").open() as file:
        losses = [float(row["val_ema/loss"]) for row in csv.DictReader(file) if row["val_ema/loss"]]
    assert state["callbacks"]["Checkpoints"]["best_mean"] == pytest.approx(min(losses), abs=1e-6)
