"""What commit 2403c2e wrote loads, scores, goes on, trains and converts as it did (``fixtures/2403c2e/README.md``)."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import train_clip
from train_clip import CLIPWrapper, CustomCLIPWrapper, PromptCLIPWrapper, cli
from train_clip.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures" / "2403c2e"
MAKE = runpy.run_path(str(FIXTURES / "make.py"))
MADE, digest, figures = MAKE["MADE"], MAKE["digest"], MAKE["figures"]
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
# Other kernels add in another order: the last bits are asked for where PyTorch and processor are those of the fixtures.
SAME_MACHINE = MAKE["machine"]() == EXPECTED["machine"]
# Of a loss; PyTorch's plain kernels (ATEN_CPU_CAPABILITY=default) differ from AVX-512's by 3e-7. Where the optimizer's
# state is in bfloat16, a number that falls to the other side of its rounding is off by 2⁻⁸ itself.
ELSEWHERE = dict.fromkeys(MADE, 1e-4) | {"rich": 2**-8}
BACKBONE = "plain/checkpoints/last.ckpt"
WRAPPERS = {"two": CustomCLIPWrapper, "prompts": PromptCLIPWrapper}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("2403c2e")
    with tarfile.open(FIXTURES / "made.tar.xz") as archive:
        # Python before 3.11.4 has no filters; the archive is this repository's own.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


@pytest.fixture
def here(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs, which no test changes, as the working directory."""
    monkeypatch.chdir(unpacked)
    return unpacked


def backbone(name: str) -> dict[str, str]:
    """Prompts name their backbone's place, which is another on this machine."""
    return {"backbone": BACKBONE} if name == "prompts" else {}


def run(*words: str) -> None:
    cli.main(list(words))


def branch(name: str, *words: str, start: str | None = None) -> str:
    """Go on with a run elsewhere, and give the folder."""
    target = f"branch_{name}_{len(list(Path().glob('branch_*')))}"
    moved = ["--pretrained", BACKBONE] if name == "prompts" else []
    run(MADE[name].split()[0], "--resume", start or name, "--output", target, *moved, *words)
    return target


def assert_as_before(name: str, run: str, steps: slice, weights: str) -> None:
    """A run's losses are those of the steps, and its last weights have the digest of that name."""
    found, expected = figures(run), EXPECTED[name]["losses"][steps]
    if SAME_MACHINE:
        assert (found, digest(f"{run}/checkpoints/last.ckpt")) == (expected, EXPECTED[name][weights])
    assert found == pytest.approx(expected, rel=ELSEWHERE[name])


@pytest.mark.parametrize("name", MADE)
def test_load(here, name):
    """Embeddings of a ramp of pixels and of two captions."""
    model, _, tokenizer = train_clip.load(f"{name}/checkpoints/last.ckpt", **backbone(name))
    assert not model.training
    pixels = torch.linspace(-1, 1, 2 * 3 * model.image_size**2).view(2, 3, model.image_size, model.image_size)
    with torch.no_grad():
        found = model.encode_image(pixels), model.encode_text(tokenizer(["picture 3", "the one numbered 7"]))
    for side, expected in zip(found, EXPECTED[name]["embeddings"], strict=True):
        torch.testing.assert_close(side, torch.tensor(expected), rtol=0, atol=0 if SAME_MACHINE else 1e-5)


@pytest.mark.parametrize("name", MADE)
def test_load_from_checkpoint(here, name):
    """The wrapper that wrote it gives the embeddings that ``load`` does, to rounding."""
    path = f"{name}/checkpoints/last.ckpt"
    wrapper = WRAPPERS.get(name, CLIPWrapper).load_from_checkpoint(path, **backbone(name))
    model, _, tokenizer = train_clip.load(path, **backbone(name))
    captions = ["picture 3", "the one numbered 7"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode_text(tokenizer(captions)), dim=-1)
    torch.testing.assert_close(wrapper.embed_texts(captions), expected, rtol=0, atol=1e-6)
    assert wrapper.embed_images(sorted(Path("data").glob("*.png"))).shape == (16, expected.shape[1])


@pytest.mark.parametrize("name", MADE)
def test_evaluate(here, name, capsys, tmp_path):
    """On the command line, with the figures of 16 pairs."""
    words = ["--backbone", BACKBONE] if name == "prompts" else []
    run(
        "evaluate", f"{name}/checkpoints/last.ckpt", "--folder", "data", "--json", str(tmp_path / "scores.json"), *words
    )
    assert re.search(r"R@1 +\d", capsys.readouterr().out) and (tmp_path / "scores.json").is_file()


@pytest.mark.parametrize("name", MADE)
def test_an_epoch_more(here, name):
    """Each run goes on for a third epoch: its losses and weights are those that 2403c2e came to."""
    target = branch(name, "--epochs", "3")
    assert_as_before(name, target, slice(6, None), "an_epoch_later")


@pytest.mark.parametrize("name", MADE)
def test_from_within_an_epoch(here, name):
    """Each run goes on from its fourth step, within the second epoch, and comes to the end that it had come to."""
    target = branch(name, start=f"{name}/checkpoints/step-00000004.ckpt")
    assert_as_before(name, target, slice(4, 6), "at_the_end")


@pytest.mark.parametrize("name", MADE)
def test_the_same_run_again(here, name, tmp_path, monkeypatch):
    """The same command and seed come to the same weights."""
    for made in ("data", "data_npz", "resnet", "bert", "tiny.yaml", "init.pt", "plain"):
        (tmp_path / made).symlink_to(here / made)
    monkeypatch.chdir(tmp_path)
    run(*MADE[name].split(), "--output", "again")
    assert_as_before(name, "again", slice(6), "at_the_end")


@pytest.mark.parametrize("kind", ["open_clip", "huggingface", "safetensors"])
@pytest.mark.parametrize("name", ["plain", "rich", "arrays"])
def test_convert(here, name, kind, tmp_path):
    """What is written in another format gives the same embeddings, to the last bit."""
    target = tmp_path / ("converted.safetensors" if kind == "safetensors" else "converted")
    run("convert", f"{name}/checkpoints/last.ckpt", str(target), "--to", kind)
    before, after = (train_clip.load(str(path)) for path in (f"{name}/checkpoints/last.ckpt", target))
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(before.model.encode_image(pixels), after.model.encode_image(pixels))
        tokens = before.tokenizer(["picture 3"])
        assert torch.equal(before.model.encode_text(tokens), after.model.encode_text(tokens))


@pytest.mark.parametrize("name", ["two", "prompts"])
def test_no_format_of_others_holds_it(here, name, tmp_path, capsys):
    """Two encoders and prompts are refused, and nothing is written."""
    with pytest.raises(SystemExit):
        run("convert", f"{name}/checkpoints/last.ckpt", str(tmp_path / "converted"), "--to", "open_clip")
    assert not (tmp_path / "converted").exists()


def test_the_mean_of_the_weights(here):
    """The EMA's file loads, and is not the weights themselves."""
    mean, last = (train_clip.load(f"rich/{place}/last.ckpt").model for place in ("ema", "checkpoints"))
    assert not torch.equal(mean.visual.proj, last.visual.proj)
    torch.testing.assert_close(mean.visual.proj, last.visual.proj, rtol=0, atol=0.1)


def test_prompts_know_their_backbone(here):
    """Prompts name the file that they lay beside; another backbone is refused, the same weights elsewhere are taken."""
    path = "prompts/checkpoints/last.ckpt"
    with pytest.raises(UserError, match=r"train-clip-2403c2e/plain/checkpoints/last\.ckpt"):
        train_clip.load(path)
    with pytest.raises(UserError):
        train_clip.load(path, backbone="rich/checkpoints/last.ckpt")
    shutil.copy(BACKBONE, "elsewhere.ckpt")
    train_clip.load(path, backbone="elsewhere.ckpt")


@pytest.mark.parametrize("name", MADE)
def test_inspect(here, name, capsys):
    """What it is, is told."""
    run("inspect", f"{name}/checkpoints/last.ckpt")
    assert "train-clip" in capsys.readouterr().out.lower()
