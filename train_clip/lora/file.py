"""Checkpoints of LoRA: what was trained, and which backbone it belongs to; read, they are that backbone, merged."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from train_clip.checkpoints import found, own, read
from train_clip.errors import UserError, first_line
from train_clip.options import LoRAOptions, WeightOptions
from train_clip.prompts.file import require_digest, telling_of_backbone

A, B = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names them
BASE = ".base_layer"  # what peft puts between a layer and its own tensors
FUSED = "in_proj_weight"  # of CLIP's attention, whose three projections are one matrix and no layer of their own
MATRICES = (".weight", f".{FUSED}")  # what a layer's matrix is called
OF_LOSS = ("logit_scale", "logit_bias")  # trained beside it
KEPT = {"backbone", "lora", "digest", "choices"}  # arguments of ``LoRAWrapper``


@dataclass(frozen=True, kw_only=True)
class FoundLoRA(found.Found):
    """LoRA beside a backbone in its own file, for which it is exchanged once it is settled."""

    @override
    def settled(self, choices: WeightOptions, backbone: str | Path | None) -> Any:
        if choices != found.NO_CHOICE:
            self.refuse("LoRA, whose backbone has fixed sizes. Leave out the other options")
        arguments = self.arguments
        with telling_of_backbone(f"{self.source}: LoRA"):
            whole = found.find_weights(backbone or str(arguments["backbone"]), WeightOptions(**arguments["choices"]))

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
        lora, digest = LoRAOptions(**arguments["lora"]), arguments["digest"]
        WeightOptions(**arguments["choices"])
        if not (lora.lora and isinstance(digest, str)):
            raise ValueError("a rank and its backbone's SHA-256 are missing")
    except (TypeError, ValueError, UserError) as error:
        reason = first_line(error)
        raise UserError(f"{contents.path}: its LoRA is not as this package writes it ({reason}).") from error
    about = {"backbone": arguments["backbone"], "its SHA-256": digest, "LoRA": describe(lora)}
    return FoundLoRA(format="train-clip LoRA", **told | {"about": about | told["about"]})


def describe(lora: LoRAOptions) -> str:
    """Rank, factor and layers, in words."""
    towers = "both towers" if lora.lora_towers == "both" else f"the {lora.lora_towers} tower"
    layers = "all blocks" if lora.lora_layers is None else f"the blocks {', '.join(map(str, lora.lora_layers))}"
    return f"rank {lora.lora}, alpha {lora.alpha:g}, in {layers} of {towers}"


def merged(kept: found.Tensors, trained: found.Tensors, lora: LoRAOptions, source: str) -> found.Tensors:
    """Add what was trained to a backbone's tensors, under its names; what does not fit is refused.

        W + s · B A        W (out, in),  A (r, in),  B (out, r),  s = α / r

    (LoRA paper, section 4.1.) The temperature is the trained one.
    """
    layers = {name.removesuffix(A): name for name in trained if name.endswith(A)}
    whole = kept | {name: trained[name] for name in OF_LOSS if name in trained and name in kept}
    odd = set(trained) - {layer + part for layer in layers for part in (A, B)} - set(OF_LOSS)
    for layer in layers:
        matrix = next((name for part in MATRICES if (name := layer.replace(BASE, "") + part) in kept), None)
        forms = [tuple(trained[name].shape) if name in trained else None for name in (layer + A, layer + B)]
        rows, columns = kept[matrix].shape if matrix and kept[matrix].ndim == 2 else (0, 0)
        if not matrix or forms != [(lora.lora, columns), (rows, lora.lora)]:
            odd.add(layer)
            continue
        product = trained[layer + B].float() @ trained[layer + A].float()
        whole[matrix] = kept[matrix] + lora.scale * product
    if odd or not layers:
        raise UserError(
            f"{source}: does not fit its backbone in {', '.join(sorted(odd)[: found.NAMED]) or 'any layer'}. Expected "
            f"LoRA of rank {lora.lora}, as `train --lora` writes it, of layers of the backbone. Use another checkpoint."
        )
    return whole
