"""Checkpoints of LoRA: what was trained, and which backbone it belongs to; read, they are that backbone, merged."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from train_clip.checkpoints import found, own, read
from train_clip.errors import UserError, first_line
from train_clip.options import LoRAOptions, WeightOptions
from train_clip.prompts.file import ELSEWHERE, require_digest

A, B = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names them
BASE = ".base_layer"  # what peft puts between a layer and its own tensors
# What a layer's matrix is called: of a linear layer, and of CLIP's attention, whose three projections are one matrix.
MATRICES = (".weight", ".in_proj_weight")
KEPT = {"backbone", "lora", "digest", "choices"}  # arguments of ``LoRAWrapper``


@dataclass(frozen=True, kw_only=True)
class FoundLoRA(found.Found):
    """LoRA beside a backbone in its own file, for which it is exchanged once it is settled."""

    @override
    def settled(self, choices: WeightOptions, backbone: str | Path | None) -> Any:
        if choices != found.NO_CHOICE:
            self.refuse("LoRA, whose backbone has fixed sizes. Leave out the other options")
        arguments = self.arguments
        try:
            whole = found.find_weights(backbone or str(arguments["backbone"]), WeightOptions(**arguments["choices"]))
        except UserError as error:
            raise UserError(
                f"{self.source}: LoRA, whose backbone cannot be loaded ({error}) If it has moved: {ELSEWHERE}"
            ) from error

        def merge(tensors: found.Tensors) -> found.Tensors:
            kept = whole.as_kept(tensors)
            require_digest(kept, arguments["digest"], whole.source)
            return merged(kept, self.read_as_kept(), LoRAOptions(**arguments["lora"]), self.source)

        return replace(whole, format=self.format, source=self.source, rename=merge, about=self.about)


def find_lora(contents: read.Contents) -> FoundLoRA | None:
    """Find a checkpoint of ``train --lora``."""
    told = own.of_lightning(contents)
    arguments = told["arguments"]
    if not set(arguments) >= KEPT:
        return None
    try:
        lora = LoRAOptions(**arguments["lora"])
        WeightOptions(**arguments["choices"])
    except (TypeError, ValueError, UserError) as error:
        reason = first_line(error)
        raise UserError(f"{contents.path}: its LoRA is not as this package writes it ({reason}).") from error
    about = {"backbone": arguments["backbone"], "its SHA-256": arguments["digest"], "LoRA": describe(lora)}
    return FoundLoRA(format="train-clip LoRA", **told | {"about": about | told["about"]})


def describe(lora: LoRAOptions) -> str:
    """Rank, factor and layers, in words."""
    towers = "both towers" if lora.lora_towers == "both" else f"the {lora.lora_towers} tower"
    layers = "all blocks" if lora.lora_layers is None else f"the blocks {', '.join(map(str, lora.lora_layers))}"
    return f"rank {lora.lora}, alpha {lora.lora_alpha or lora.lora:g}, in {layers} of {towers}"


def merged(kept: found.Tensors, trained: found.Tensors, lora: LoRAOptions, source: str) -> found.Tensors:
    """Add what was trained to a backbone's tensors, under its names.

        W + s · B A        W (out, in),  A (r, in),  B (out, r),  s = α / r

    (LoRA paper, section 4.1.) The temperature is the trained one.
    """
    whole = kept | {name: one for name, one in trained.items() if name in kept}
    for name in (name.removesuffix(A) for name in trained if name.endswith(A)):
        layer = name.replace(BASE, "")
        matrix = next((layer + matrix for matrix in MATRICES if layer + matrix in kept), None)
        if matrix is None or name + B not in trained:
            raise UserError(
                f"{source}: its LoRA is of {layer}, which the backbone does not have. Give its own backbone."
            )
        product = trained[name + B].float() @ trained[name + A].float()
        whole[matrix] = kept[matrix] + lora.scale * product
    return whole
