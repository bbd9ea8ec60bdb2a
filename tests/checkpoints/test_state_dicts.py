"""Weights below any key, under the names of wrappers, or within a larger model: the original's embeddings come out."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel

import train_clip
from tests.checkpoints.by_hand import refusal
from tests.checkpoints.originals import ORIGINALS, Original, check, of_huggingface, of_openai, of_ours


@pytest.fixture(params=ORIGINALS)
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Original:
    return ORIGINALS[request.param](tmp_path)


# Weights below other keys


PLACES: dict[str, Callable[[Any], Any]] = {
    **{
        key: lambda state, key=key: {"epoch": 3, key: state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
        for key in (
            "state_dict", "model_state_dict", "model", "module", "net", "ema", "ema_state_dict", "params", "student",
            "teacher", "weights", "state_dict_ema", "averaging_state", "model_averaged",
        )
    },
    "two deep": lambda state: {"state": {"epoch": 3, "model": state}},
    "five deep": lambda state: {"a": {"b": [0, {"c": (1, {"d": state})}]}},
    "a tuple": lambda state: (state, {"lr": 0.1}, 7),
    "beside another model": lambda state: {"critic": nn.Linear(3, 2).state_dict(), "net": state},
    "beside itself": lambda state: {"model": state, "best": state},
    "beside a date": lambda state: {"when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "model": state},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_state_dict_is_found_wherever_it_is(original: Original, place: str, tmp_path: Path) -> None:
    """One key deeper, or deeper, under any name: what is beside a Lightning module's stays beside it."""
    state = original.module.state_dict()
    torch.save(PLACES[place](state) if not original.beside else original.beside | {place: state}, tmp_path / "a.pt")
    check(tmp_path / "a.pt", original)
    if original.beside:  # the whole checkpoint in another
        torch.save(PLACES[place](original.beside | {"state_dict": state}), tmp_path / "b.pt")
        check(tmp_path / "b.pt", original)


SEVERAL = {
    "an EMA": ("model_ema", "model"),
    "a teacher": ("teacher", "student"),
    "three": ("best", "state_dict", "swa_state"),
    "one deeper": ("ema.shadow", "net"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_the_one_that_is_taken_is_named(name: str, tmp_path: Path) -> None:
    """The trained one before its EMA or teacher; each of the others is named."""
    original = of_openai(tmp_path)
    held: dict[str, Any] = {}
    taken = SEVERAL[name][1]
    for place in SEVERAL[name]:
        part = held
        for key in place.split(".")[:-1]:
            part = part.setdefault(key, {})
        state = original.module.state_dict()
        part[place.split(".")[-1]] = state if place == taken else {key: value + 1 for key, value in state.items()}
    torch.save(held, tmp_path / "a.pt")
    others = ", ".join(place for place in SEVERAL[name] if place != taken)
    report = check(tmp_path / "a.pt", original, f"its CLIP is taken from {taken}; left out: {others}. To use another")
    assert report["taken from"] == f"{taken}; left out: {others}"
    # In one state dict, by their prefixes.
    flat = {
        f"{place}.{key}": value + (place != taken) for place in SEVERAL[name] for key, value in original_state(original)
    }
    torch.save(flat, tmp_path / "b.pt")
    save_file(flat, tmp_path / "c.safetensors")
    if "state_dict" not in SEVERAL[name]:  # which is a word of a file, and not of a model
        check(tmp_path / "b.pt", original, f"taken from {taken}; left out: ")
        check(tmp_path / "c.safetensors", original, f"taken from {taken}; left out: ")


def original_state(original: Original) -> Any:
    return original.module.state_dict().items()


@pytest.mark.parametrize(
    ("held", "found"),
    [
        ({0: torch.ones(2)}, "[0]"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a TensorRecord"),
        ({"epoch": 3, "args": {}}, "['epoch', 'args']"),
        ({}, "[]"),
    ],
)
def test_tensors_without_names(held: Any, found: str, tmp_path: Path) -> None:
    """What is refused is said to have no tensors under names, which is true of it."""
    torch.save(held, tmp_path / "a.pt")
    assert f"holds no tensors under names, but {found}. Expected" in refusal(tmp_path / "a.pt")


def test_weights_of_another_model_are_named_wherever_they_are(tmp_path: Path) -> None:
    """No file with weights is said to have none: the largest state dict is the one that is no CLIP."""
    torch.save({"opt": {"step": torch.ones(1)}, "m": {"deep": nn.Linear(3, 2).state_dict()}}, tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt", train_clip.load)
    assert "2 tensors (weight, bias, …) that are not those of a CLIP" in message


# Names of wrappers


def blocks_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every child of a list of blocks, in any of the models: its parent and its name."""
    lists = [part for part in module.modules() if isinstance(part, nn.Sequential | nn.ModuleList) and len(part) > 1]
    return [(part, name) for part in lists for name, _ in part.named_children()]


def with_blocks(wrap: Callable[[nn.Module], nn.Module], every: int = 1) -> Callable[[nn.Module], nn.Module]:
    def wrapped(module: nn.Module) -> nn.Module:
        for parent, name in blocks_of(module)[::every]:
            setattr(parent, name, wrap(getattr(parent, name)))
        return module

    return wrapped


class Around(nn.Module):
    """A model as a part of another, and a layer beside it."""

    def __init__(self, name: str, module: nn.Module, head: bool = False) -> None:
        super().__init__()
        inner = self
        *before, last = name.split(".")
        for one in before:
            inner.add_module(one, nn.Module())
            inner = getattr(inner, one)
        inner.add_module(last, module)
        if head:
            self.head = nn.Linear(2, 3)


PREFIXES = ("clip", "model", "clip_model", "base_model.model", "net.backbone.clip", "module.clip", "clip.module")
WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "compiled, then parallel": lambda module: nn.DataParallel(torch.compile(module)),
    "parallel, then compiled": lambda module: torch.compile(nn.DataParallel(module)),
    "averaged": AveragedModel,
    "averaged, compiled and parallel": lambda module: nn.DataParallel(AveragedModel(torch.compile(module))),
    "recomputed": with_blocks(checkpoint_wrapper),
    "every other block compiled": with_blocks(torch.compile, 2),
    "blocks compiled, recomputed and parallel": with_blocks(
        lambda block: nn.DataParallel(checkpoint_wrapper(torch.compile(block)))
    ),
    "sharded": lambda module: Around("_fsdp_wrapped_module", with_blocks(lambda block: Around(
        "_fsdp_wrapped_module", checkpoint_wrapper(block)))(module)),
    "DeepSpeed's": lambda module: Around("_forward_module.module", module),
    **{name: lambda module, name=name: Around(name, module) for name in PREFIXES},
    "compiled and parallel": lambda module: Around("_orig_mod.module", torch.compile(nn.DataParallel(module))),
}  # fmt: skip


def test_the_names_of_wrappers_are_pytorchs() -> None:
    """Those of FSDP, which needs processes, are written above by hand."""
    assert FullyShardedDataParallel.__module__.startswith("torch.distributed.fsdp")
    from torch.distributed.fsdp import _common_utils

    assert _common_utils.FSDP_WRAPPED_MODULE == "_fsdp_wrapped_module"


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_models(original: Original, how: str, tmp_path: Path) -> None:
    """Around the whole, around the model in our modules, around blocks: in .pt, below a key, and in .safetensors."""
    if original.beside:
        inner = Original(copy.deepcopy(original.module), original.model, original.beside)
        if how not in PREFIXES:
            inner.module.model = WRAPPED[how](inner.module.model)
        state = inner.module.state_dict()
        torch.save(original.beside | {"state_dict": state}, tmp_path / "model.ckpt")
        check(tmp_path / "model.ckpt", original)
        if how in PREFIXES:
            return
        state = WRAPPED[how](original.module).state_dict()
        torch.save(original.beside | {"state_dict": state}, tmp_path / "whole.ckpt")
        check(tmp_path / "whole.ckpt", original)
        return
    state = WRAPPED[how](original.module).state_dict()
    torch.save(state, tmp_path / "a.pt")
    check(tmp_path / "a.pt", original)
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "b.pt")
    check(tmp_path / "b.pt", original)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "c.safetensors")
    check(tmp_path / "c.safetensors", original)


@pytest.mark.parametrize("prefix", ["", "model.", "clip."])
def test_our_weights_under_other_prefixes(prefix: str, tmp_path: Path) -> None:
    """A checkpoint of ours, its names cut or changed, its hyperparameters there."""
    original = of_ours(tmp_path)
    state = {f"{prefix}{name}": value for name, value in original.model.state_dict().items()}
    torch.save(original.beside | {"state_dict": state}, tmp_path / "a.ckpt")
    assert check(tmp_path / "a.ckpt", original)["format"].startswith("train-clip checkpoint")


def test_the_wrapper_itself_loads_what_was_compiled_when_saved(tmp_path: Path) -> None:
    """``load_from_checkpoint``, whose loading is Lightning's and strict, and a wrapper that is compiled by then."""
    original = of_ours(tmp_path)
    original.module.model = torch.compile(original.module.model)
    torch.save(original.beside | {"state_dict": original.module.state_dict()}, tmp_path / "a.ckpt")
    module = train_clip.CLIPWrapper.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
    for name, value in original.model.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], value)


def test_a_lightning_module_around_a_clip_of_hugging_faces(tmp_path: Path) -> None:
    """Its names are like those of train-CLIP's module; its model is not."""
    original = of_huggingface(tmp_path)
    held = {"state_dict": Around("model", original.module).state_dict(), "pytorch-lightning_version": "2.6.6"}
    torch.save(held, tmp_path / "a.ckpt")
    assert check(tmp_path / "a.ckpt", original)["format"].startswith("Hugging Face CLIPModel")


def test_a_head_beside_the_clip_is_named(tmp_path: Path) -> None:
    """A CLIP that is a part of a classifier: it is taken, and the rest is named."""
    original = of_openai(tmp_path)
    torch.save(Around("clip", original.module, head=True).state_dict(), tmp_path / "a.pt")
    check(tmp_path / "a.pt", original, "its CLIP is taken from clip; left out: head.weight, head.bias.")


def test_a_teacher_within_the_model(tmp_path: Path) -> None:
    """The names of the whole have no prefix, and a second CLIP lies among them."""
    original = of_openai(tmp_path)
    state = original.module.state_dict()
    torch.save(state | {f"teacher.{name}": value + 1 for name, value in state.items()}, tmp_path / "a.pt")
    check(tmp_path / "a.pt", original, "its CLIP is taken from its top level; left out: teacher.")


def test_two_names_that_would_become_one(tmp_path: Path) -> None:
    """Nothing is dropped silently: the message names the tensors that are too many."""
    state = of_openai(tmp_path).module.state_dict()
    torch.save(state | {"module.ln_final.weight": torch.ones(64)}, tmp_path / "a.pt")
    assert "module.ln_final.weight is (64,) numbers, expected not there" in refusal(tmp_path / "a.pt", train_clip.load)


class Residual(nn.Module):
    """A layer whose own part is called as a wrapper would be, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def test_a_model_with_a_part_that_is_called_module() -> None:
    """Weights without wrappers' names are filled into it, and those that only it has."""
    from train_clip.checkpoints.found import fill

    model, saved = (nn.Sequential(Residual(), nn.Linear(2, 2)) for _ in range(2))
    state = saved.state_dict()
    for some in (state, {name.replace("module.", ""): value for name, value in state.items()}):
        fill(model, some, "a")
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_script_of_a_model_around_a_clip(tmp_path: Path) -> None:
    """The activation that the script names is that of the CLIP in it."""
    original = of_openai(tmp_path)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = original.module

        def forward(self, images: Tensor) -> Tensor:
            return self.clip(images)

    torch.jit.trace(Wrapper(), torch.randn(1, 3, 16, 16)).save(str(tmp_path / "a.pt"))
    check(tmp_path / "a.pt", original)
