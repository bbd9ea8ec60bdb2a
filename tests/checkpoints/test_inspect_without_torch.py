"""``train-clip inspect`` answers without PyTorch, and says what the file holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoints.by_hand import tiny_clip
from train_clip.cli import main
from train_clip.commands.convert import write_model
from train_clip.commands.inspect import inspect
from train_clip.errors import UserError
from train_clip.models.clip import CLIP

HEAVY = ("torch", "lightning", "transformers", "safetensors", "numpy", "huggingface_hub")
CHILD = """
import json, sys
from train_clip.cli import main

main(["inspect", sys.argv[1]])
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))
"""


def checkpoint(model: CLIP, path: Path) -> None:
    """As ``train`` writes them, its optimizer's moments too."""
    optimizer = torch.optim.AdamW(model.parameters())
    model.encode_image(torch.randn(1, 3, 16, 16)).sum().backward()
    optimizer.step()
    held = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"config": model.config.to_dict(), "batch_size": 96, "learning_rate": 2.5e-4}
        | {"optimizer": "muon", "momentum": 0.95, "distillation": "none", "eps": None, "seed": 0, "shuffle": True},
        "global_step": 1234,
        "epoch": 5,
        "pytorch-lightning_version": "2.6.6",
    }
    torch.save(held, path)


class AsOpenAI(torch.nn.Module):
    """A CLIP that can be traced as OpenAI's were: its two towers, and their three numbers as buffers."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        for name, module in model.named_children():
            if name != "pixel_norm":
                self.add_module(name, module)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(model, name))
        for name, value in (("input_resolution", 16), ("context_length", 16), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images) * self.logit_scale


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def script(model: CLIP, path: Path) -> None:
    torch.jit.trace(AsOpenAI(model), torch.randn(1, 3, 16, 16)).half().save(str(path))


MAKERS: dict[str, Callable[[CLIP, Path], None]] = {
    "checkpoint": checkpoint,
    "OpenAI's": script,
    "safetensors": lambda model, path: write_model(model, path, "safetensors"),
    "open_clip": lambda model, path: write_model(model, path, "open_clip"),
    "Hugging Face": lambda model, path: write_model(model, path, "huggingface"),
    "state dict": lambda model, path: torch.save(model.state_dict(), path),
}


def run(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The verb in a process of its own, which says which heavy packages it has imported."""
    return subprocess.run(
        [sys.executable, "-c", CHILD, source, *HEAVY],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | environment,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", MAKERS)
def test_pytorch_is_not_imported(tmp_path: Path, kind: str) -> None:
    """Neither it nor another heavy package, whatever the file; and what is printed is the model that was written."""
    model = tiny_clip()
    MAKERS[kind](model, tmp_path / "a.pt")
    ended = run(str(tmp_path / "a.pt"))
    assert ended.returncode == 0, ended.stderr
    *lines, imported = ended.stdout.splitlines()
    assert json.loads(imported) == []
    printed = "\n".join(lines)
    count = sum(parameter.numel() for parameter in model.parameters())
    # Hugging Face keeps queries, keys and values of each of the four blocks by themselves, matrices and biases.
    tensors = len(model.state_dict()) + (4 * 2 * 2 if kind == "Hugging Face" else 0)
    assert f"{count:,} parameters in {tensors} tensors, " in printed
    assert ("float16" if kind == "OpenAI's" else "float32") in printed
    assert str(tmp_path / "a.pt") in printed
    assert "ViT of 2 layers of 16" in printed
    assert "16×16 pixels" in printed
    assert "16 tokens of 49,408" in printed
    assert ("not stated in the file" in printed) == (kind == "state dict")


def test_the_step_and_the_numbers_of_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step, epoch (from 1), version and every argument but the model's and the defaults, as they were put in."""
    checkpoint(tiny_clip(), tmp_path / "a.ckpt")
    report = inspect(str(tmp_path / "a.ckpt"))
    assert (report["step"], report["epoch"], report["Lightning"]) == ("1234", "6", "2.6.6")
    assert report["trained with"] == "batch_size 96, learning_rate 0.00025, optimizer muon, shuffle True"
    assert report["model"] == "tiny"
    printed = capsys.readouterr().out
    assert all(name in printed and value in printed for name, value in report.items())


def test_the_size_is_that_of_the_files(tmp_path: Path) -> None:
    """In MiB, by the file system."""
    write_model(tiny_clip(), tmp_path / "a", "huggingface")
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert f"{size / 2**20:.1f} MiB" in inspect(str(tmp_path / "a"))["format"]


def test_batch_norms_counts_are_no_parameters(tmp_path: Path) -> None:
    """A ResNet: parameters as torch counts them."""
    model = tiny_clip(image={"size": 64, "blocks": [1, 1, 1, 1], "width": 4})
    write_model(model, tmp_path / "a.safetensors", "safetensors")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert inspect(str(tmp_path / "a.safetensors"))["weights"].startswith(f"{count:,} parameters")


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\3\4", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"]
)
def test_a_refusal_is_one_line_and_no_traceback(tmp_path: Path, content: bytes) -> None:
    """Exit status 1, the file named, and PyTorch is not imported for it either."""
    (tmp_path / "a.pt").write_bytes(content)
    ended = run(str(tmp_path / "a.pt"))
    assert ended.returncode == 1
    assert str(tmp_path / "a.pt") in ended.stderr
    assert ended.stderr.startswith("train-clip: ")
    assert "Traceback" not in ended.stderr


def test_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line prints what the function gives."""
    write_model(tiny_clip(), tmp_path / "a.safetensors", "safetensors")
    main(["inspect", str(tmp_path / "a.safetensors")])
    printed = capsys.readouterr().out
    inspect(str(tmp_path / "a.safetensors"))
    assert capsys.readouterr().out == printed


def test_what_a_file_says_is_printed_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Signs that steer a terminal, in a name or a value, do not reach it."""
    model = tiny_clip()
    held = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"config": model.config.to_dict() | {"name": "\x1b[2Jx"}, "note": "\x1b]0;title\x07"},
        "epoch": "\x1b[31m1",
    }
    torch.save(held, tmp_path / "a.ckpt")
    inspect(str(tmp_path / "a.ckpt"))
    assert "\x1b" not in capsys.readouterr().out


def test_half_an_encoder(tmp_path: Path) -> None:
    """Two encoders, of which one is described in part: told, or refused; no other error."""
    torch.save(
        {"state_dict": {"model.w": torch.ones(1)}, "hyper_parameters": {"text_encoder": {"a": 1}}}, tmp_path / "a"
    )
    try:
        inspect(str(tmp_path / "a"))
    except UserError as error:
        assert str(tmp_path / "a") in str(error)
