"""Files that are refused with a program that mends them, and small differences that need none."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import format_utils

import train_clip
from tests.checkpoints.by_hand import refusal, tiny_clip
from tests.checkpoints.originals import ORIGINALS, SIZES, Original, check, of_openai
from train_clip.models.clip import CLIP


@pytest.fixture(params=ORIGINALS)
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Original:
    return ORIGINALS[request.param](tmp_path)


# Remedies


def remedy(message: str, before: str) -> str:
    """The program in a message, from a word on, to the end of its sentence or of a colon's part."""
    return before + message.split(before, 1)[1].split(", NEW)")[0] + ", NEW)"


class Settings:
    """A class of somebody's, beside weights."""


class Mine(CLIP):
    """A class of somebody's: a whole model."""


def saved_whole(original: Original, path: Path) -> None:
    torch.save(original.module, path)


def saved_with_settings(original: Original, path: Path) -> None:
    torch.save({"state_dict": original.module.state_dict(), "settings": Settings()}, path)


def saved_with_pairs_for_keys(original: Original, path: Path) -> None:
    torch.save({"state_dict": original.module.state_dict(), "buckets": {(1, 2): 3}}, path)


def saved_by_protocol(number: int) -> Callable[[Original, Path], None]:
    return lambda original, path: torch.save(
        {"state_dict": original.module.state_dict(), "bytes": b"a"}, path, pickle_protocol=number
    )


def saved_by_pickle(original: Original, path: Path) -> None:
    path.write_bytes(pickle.dumps(original.module.state_dict()))


REFUSED: dict[str, tuple[Callable[[Original, Path], None], str]] = {
    "a model": (saved_whole, "model = torch.load"),
    "an object": (saved_with_settings, "model = torch.load"),
    "pairs as keys": (saved_with_pairs_for_keys, "model = torch.load"),
    **{f"protocol {number}": (saved_by_protocol(number), "torch.save(torch.load") for number in (3, 4, 5)},
    "pickle": (saved_by_pickle, "torch.save(pickle.load"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_a_remedy_that_works(name: str, tmp_path: Path) -> None:
    """The program of the message, word for word, makes a file that loads."""
    original = of_openai(tmp_path)
    save, before = REFUSED[name]
    save(original, tmp_path / "old.pt")
    message = refusal(tmp_path / "old.pt", train_clip.load)
    assert message.count("\n") == 0
    program = remedy(message, before)
    if name in ("an object", "pairs as keys"):
        program = program.split("; ")[0] + "; " + remedy(message.split("Of a checkpoint: ")[1], "torch.save(model")
    names = {"torch": torch, "pickle": pickle, "FILE": tmp_path / "old.pt", "NEW": tmp_path / "new.pt"}
    exec(program, names)
    check(tmp_path / "new.pt", original)


def test_a_sharded_checkpoint_is_joined_by_the_remedy(tmp_path: Path) -> None:
    """A folder of torch.distributed's: the message's module, called here, makes a file that loads."""
    original = of_openai(tmp_path)
    checkpoint.save({"model": original.module.state_dict()}, checkpoint_id=tmp_path / "shards", no_dist=True)
    message = refusal(tmp_path / "shards", train_clip.load)
    assert "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER NEW.pt" in message
    format_utils.dcp_to_torch_save(tmp_path / "shards", tmp_path / "new.pt")
    check(tmp_path / "new.pt", original)


def test_a_model_of_ours_that_was_pickled(tmp_path: Path) -> None:
    """A whole module of this package, and of a class that was derived from one: named, with the same remedy."""
    for model in (tiny_clip(**SIZES), Mine(tiny_clip(**SIZES).config)):
        torch.save(model, tmp_path / "a.pt")
        message = refusal(tmp_path / "a.pt", train_clip.load)
        assert type(model).__name__ in message
        assert "model = torch.load(FILE, weights_only=False); torch.save(model.state_dict(), NEW)" in message


def test_parameters_and_tensors_with_attributes(tmp_path: Path) -> None:
    """PyTorch writes them by other functions; their numbers are the same."""
    original = of_openai(tmp_path)
    parameters = dict(original.module.named_parameters()) | dict(original.module.named_buffers())
    for number, value in enumerate(parameters.values()):
        value.no_decay = number % 2 == 0
    torch.save(parameters, tmp_path / "a.pt")
    check(tmp_path / "a.pt", original)


# Small differences of shape


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_temperature_with_dimensions(original: Original, shape: tuple[int, ...], tmp_path: Path) -> None:
    """One number, whatever its dimensions."""
    state = original.module.state_dict()
    for name in [name for name in state if name.endswith("logit_scale")]:
        state[name] = state[name].reshape(shape)
    torch.save(original.beside | {"state_dict": state} if original.beside else state, tmp_path / "a.pt")
    check(tmp_path / "a.pt", original)


@pytest.mark.parametrize("kind", ["open_clip", "Hugging Face"])
def test_sizes_as_pairs_of_equal_numbers(kind: str, tmp_path: Path) -> None:
    """Height and width of images and patches; unequal ones are refused."""
    original = ORIGINALS[kind](tmp_path)
    torch.save(original.module.state_dict(), tmp_path / "a.pt")
    for pair, patch in (([16, 16], [8, 8]), ([16, 24], 8)):
        for file in original.configs.glob("*config.json"):
            text = re.sub(r'"image_size": [^,}]*?(\d+|\[[^]]*\])', f'"image_size": {pair}', file.read_text())
            text = re.sub(r'"patch_size": (\d+|\[[^]]*\])', f'"patch_size": {patch}', text)
            json.loads(text)
            file.write_text(text)
        if pair == [16, 16]:
            check(tmp_path / "a.pt", original)
        else:
            for config in original.configs.glob("*.json"):
                (tmp_path / config.name).write_bytes(config.read_bytes())
            assert "[16, 24]" in refusal(tmp_path / "a.pt", train_clip.load)
