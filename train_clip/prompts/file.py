"""Files of visual prompts: ours, which refer to a separate backbone, and those of train-CLIP's fork."""

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Self

from typing_extensions import override

from train_clip.checkpoints import found, openai, own, read
from train_clip.errors import UserError, first_line
from train_clip.models.config import config_from_dict
from train_clip.options import WeightOptions


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """What is learned for a frozen backbone."""

    number: int  # P, tokens of each block that has prompts
    # Blocks that have prompts of their own, counted from 0: at the first of them they are put between class token and
    # patches, at a later one they replace what the block before made of its own.
    layers: Sequence[int]
    dropout: float  # dropout probability of the prompts
    class_token: bool  # whether the backbone's class embedding is trained too

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"{self.number} prompts; expected 1 or above.")
        if not self.layers or sorted(set(self.layers)) != list(self.layers) or self.layers[0] < 0:
            raise UserError(
                f"Prompts at the blocks {list(self.layers)}; expected different numbers from 0 on, in increasing order."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"A dropout of {self.dropout}; expected from 0 to below 1.")

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"{self.number} at each of the blocks {layers}" + ("; class token trained" if self.class_token else "")


TOWER, BACKBONE, PROMPTS = "visual.", "visual.backbone.", "visual.prompts."
LEFT_OUT = "left out"
OF_FORK = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.prompt_embeddings")
FORK_DROPOUT = 0.2  # of the fork's model
ELSEWHERE = "--backbone of `train-clip evaluate`, --pretrained of the command that trains, in Python backbone=…."


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundPrompts(found.FoundCLIP):
    """A CLIP with visual prompts: whole, or prompts with a backbone in its own file."""

    prompts: PromptConfig
    backbone: found.FoundCLIP | None = None  # once it is settled

    @override
    def require_clip(self, instead: str = "") -> NoReturn:
        self.refuse(
            f"{self.format}; expected a CLIP without prompts. Give the backbone that they were trained with. To "
            "continue training the prompts: train-clip prompt-tune --resume"
        )

    @override
    def settled(self, choices: WeightOptions, backbone: str | Path | None) -> Self:
        if choices != found.NO_CHOICE:
            self.refuse("visual prompts, whose backbone has fixed sizes. Leave out the other options")
        if "digest" not in self.arguments:  # whole
            return super().settled(choices, backbone)
        with telling_of_backbone(f"{self.source}: visual prompts"):
            settled = found.find_model(backbone or str(self.arguments["backbone"]), self.config)
        return dataclasses.replace(self, backbone=settled)

    @override
    def read(self) -> found.Tensors:
        if self.backbone is None:
            return super().read()
        tensors, _ = read_backbone(self.backbone, self.arguments["digest"])
        return _below_backbone(tensors) | self.read_as_kept()

    @override
    def empty(self) -> tuple[Any, Any]:
        import torch

        from train_clip.prompts.model import add_prompts

        model, tokenizer = super().empty()
        with torch.device("meta"):
            add_prompts(model, self.prompts)
        if unused := self.about.get(LEFT_OUT):
            warnings.warn(f"{self.source}: dropped {unused}, which were never used.", stacklevel=5)
        return model, tokenizer

    @override
    def describe(self) -> dict[str, str]:
        return found.Found.describe(self) if "digest" in self.arguments else super().describe()


@contextmanager
def telling_of_backbone(what: str) -> Iterator[None]:
    """Have errors say that the backbone of this is meant, and where to give another place of it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}, whose backbone cannot be loaded ({error}) If it has moved: {ELSEWHERE}") from error


def read_backbone(backbone: found.FoundCLIP, expected: str | None) -> tuple[dict[str, Any], str]:
    """Read a backbone's tensors, and their digest; others than those that prompts were trained beside are refused."""
    kept = backbone.read_as_kept()
    return backbone.resized(kept), require_digest(kept, expected, backbone.source)


def require_digest(kept: found.Tensors, expected: str | None, source: str) -> str:
    """The digest of a backbone's tensors as they are kept, if it is the expected one."""
    digest = found.digest_of(kept)
    if expected not in (None, digest):
        raise UserError(
            f"{source}: its weights are not those of the backbone that this was trained with: their SHA-256 is "
            f"{digest}, expected {expected}. Give that one: {ELSEWHERE}"
        )
    return digest


def find_prompts(contents: read.Contents) -> FoundPrompts | None:
    """Find a checkpoint of ``prompt-tune``: what was trained, and which backbone it belongs to."""
    arguments = contents.data.get("hyper_parameters")
    if not isinstance(arguments, Mapping) or not {"backbone", "prompts", "digest", "config"} <= set(arguments):
        return None
    try:
        prompts = PromptConfig(**arguments["prompts"])
        config = config_from_dict(arguments["config"], str(contents.path))
    except (AttributeError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{contents.path}: its prompts are not as this package writes them ({reason}).") from error
    told = own.of_lightning(contents)
    about = {"backbone": arguments["backbone"], "its SHA-256": arguments["digest"], "prompts": str(prompts)}
    told |= {"about": about | told["about"]}
    return FoundPrompts(format="train-clip visual prompts", config=config, prompts=prompts, **told)


def find_fork(contents: read.Contents) -> FoundPrompts | None:
    """Find a checkpoint of the fork's CLIPWrapper2: a whole model, with prompts in each block.

    Its first block inserts them, the middle ones replace, and the last one lets those of the block before pass: its own
    were never used, and are left out.
    """
    told = own.of_lightning(contents)
    records = told["records"]
    prompts = {int(block[1]): record for name, record in records.items() if (block := OF_FORK.fullmatch(name))}
    if own.LIGHTNING not in contents.data or not prompts:
        return None
    backbone = {name: record for name, record in records.items() if not OF_FORK.fullmatch(name)}
    config = openai.config_from_shapes(backbone, contents)
    last = config.image.layers - 1
    used = {number: record for number, record in sorted(prompts.items()) if number != last}
    numbers = {record.shape[0] for record in used.values() if record.shape}
    if len(numbers) != 1:
        raise UserError(f"{contents.path}: its blocks have {sorted(numbers)} prompts; expected equally many in each.")
    tuned = PromptConfig(numbers.pop(), tuple(used), FORK_DROPOUT, class_token=True)
    unused = f"visual.transformer.resblocks.{last}.prompt_embeddings" if last in prompts else None
    told |= {
        "records": _below_backbone(backbone) | {f"{PROMPTS}{number}": record for number, record in used.items()},
        "about": {"prompts": str(tuned), LEFT_OUT: unused} | told["about"],
        "arguments": {},
    }
    kind = "train-CLIP fork's checkpoint (CLIPWrapper2)"
    return FoundPrompts(format=kind, config=config, prompts=tuned, **told)


def _below_backbone(held: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's tensors under the names that they have once prompts are in its tower."""
    return {BACKBONE + name.removeprefix(TOWER) if name.startswith(TOWER) else name: v for name, v in held.items()}
