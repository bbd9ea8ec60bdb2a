"""How many visual prompts, and where (VPT, arXiv 2203.12119, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train_clip.errors import UserError


@dataclass(frozen=True)
class PromptConfig:
    """What is learned beside a frozen backbone."""

    number: int  # P, tokens of each block that has prompts
    # Blocks that have prompts of their own, counted from 0: at the first of them they are put between class token and
    # patches, at a later one they replace what the block before made of its own.
    layers: tuple[int, ...]
    dropout: float  # share of the prompts' numbers that is dropped in training
    class_token: bool  # whether the backbone's class embedding is trained too

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"{self.number} prompts; expected 1 or above.")
        if not self.layers or sorted(set(self.layers)) != list(self.layers) or self.layers[0] < 0:
            raise UserError(
                f"Prompts at the blocks {list(self.layers)}; expected different numbers from 0 on, in order."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"A dropout of {self.dropout}; expected from 0 to below 1.")

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"{self.number} at each of the blocks {layers}" + ("; class token trained" if self.class_token else "")


def prompt_layers(kind: Literal["deep", "shallow"], blocks: int) -> tuple[int, ...]:
    """The blocks, of so many, that have prompts: every one (VPT-deep), or the first (VPT-shallow)."""
    return tuple(range(blocks)) if kind == "deep" else (0,)
