"""Puts LoRA, by the peft library, beside the linear layers of a model's blocks: attention and MLP."""

from typing import Any

from torch import nn

from train_clip.errors import UserError
from train_clip.lora.file import FUSED
from train_clip.models.blocks import SelfAttention
from train_clip.models.clip import DualEncoder
from train_clip.optional import optional
from train_clip.options import LoRAOptions
from train_clip.training.optimizer import blocks_of


def add_lora(model: DualEncoder, lora: LoRAOptions) -> None:
    """Freeze a model but for its temperature, and put LoRA into its towers; for now its features are what they were.

    Dropout, DoRA and biases are not offered: peft has none of them for matrices that are no layers of their own.
    """
    peft = optional("peft", "LoRA")
    temperature = {*model.temperature()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in temperature)
    towers = {"image": model.visual, "text": model.transformer}
    # Without a configuration, by which peft would take what is inside for a model of transformers.
    holder = nn.ModuleDict({name: tower for name, tower in towers.items() if lora.lora_towers in ("both", name)})
    layers, matrices = list[str](), list[str]()
    for name, tower in holder.items():
        linear, fused = places(tower, name, lora.lora_layers)
        layers += [f"{name}.{path}" for path in linear]
        matrices += [f"{name}.{path}" for path in fused]
    how = {"target_modules": layers, "target_parameters": matrices or None}
    peft.inject_adapter_in_model(peft.LoraConfig(r=lora.lora, lora_alpha=lora.alpha, **how), holder)
    for attention in (module for module in holder.modules() if isinstance(module, SelfAttention)):
        # A forward pass leaves it behind the other parameters: there from the start, it is so in every copy.
        attention.register_parameter(FUSED, attention._parameters.pop(FUSED))


def places(tower: nn.Module, name: str, layers: list[int] | None) -> tuple[list[str], list[str]]:
    """The names of a tower's linear layers, and of its fused matrices, in the blocks that are asked for, or in all."""
    blocks, kind = blocks_of(tower), type(tower).__name__
    numbers = range(len(blocks)) if layers is None else layers
    if unknown := sorted(set(numbers) - set(range(len(blocks)))):
        raise UserError(
            f"lora_layers {unknown[0]}: the {name} tower has {len(blocks)} blocks; expected numbers from 0 to "
            f"{len(blocks) - 1}. For one tower alone: lora_towers."
        )
    chosen: set[Any] = {module for number in numbers for module in blocks[number].modules()}
    named = [(path, module) for path, module in tower.named_modules() if module in chosen]
    linear = [path for path, module in named if type(module) is nn.Linear]
    if not linear:
        raise UserError(
            f"lora is of linear layers, and the blocks of the {name} tower, {kind}, have none. Expected a transformer. "
            "Give LoRA to the other tower alone: lora_towers."
        )
    return linear, [f"{path}.{FUSED}" for path, module in named if isinstance(module, SelfAttention)]
