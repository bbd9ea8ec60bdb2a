"""The optimizer, its groups of parameters, and a warm-up and cosine over the whole run (CLIP paper, section 2.5)."""

import math
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

from torch import nn, zeros_like
from torch.optim import SGD, AdamW, Optimizer

from train_clip.errors import UserError
from train_clip.models import clip, config, vit
from train_clip.models.blocks import Transformer
from train_clip.options import OPTIMIZERS, OptimizerOptions, TowerOptions, TrainingOptions
from train_clip.training.half_precision import Groups, HalfAdamW

WARMUP_SHARE = 0.1  # of a run that is too short for the preset's warm-up
LAST = ("proj", "ln_post", "text_projection", "ln_final")  # follow the blocks in our own towers, wherever declared


def build_optimizer(
    module: nn.Module, model: clip.DualEncoder, options: TrainingOptions, fused: bool = False
) -> Optimizer:
    """Make the optimizer that the options name for what is trained of a module: the model's, and what is beside it.

    With ``fused``, one kernel makes the whole update, which a flag on the device (``found_inf``) can hold back.
    """
    numbers = options.optimizer
    groups = parameter_groups(module, numbers, peak_rates(model, options.towers, numbers.learning_rate))
    build = resolve_name(OPTIMIZERS[str(numbers.optimizer)])
    return build(groups, model, numbers, fused, options.step.seed)


def build_adamw(groups: Groups, _: clip.DualEncoder, options: OptimizerOptions, fused: bool, seed: int) -> Optimizer:
    """PyTorch's AdamW; ``HalfAdamW`` where weights or state are kept in bfloat16."""
    if options.keeps_halves:
        return HalfAdamW(groups, options, seed, held_back=fused)
    numbers: Any = {"lr": options.learning_rate, "betas": options.betas, "eps": options.eps}
    return AdamW(groups, **numbers, fused=fused)


def build_sgd(groups: Groups, _: clip.DualEncoder, options: OptimizerOptions, fused: bool, __: int) -> Optimizer:
    """SGD with momentum, whose weight decay is a part of the gradient."""
    numbers: Any = {"lr": options.learning_rate, "momentum": options.momentum}
    sgd = SGD(groups, **numbers, fused=fused)
    for parameter in (p for group in sgd.param_groups for p in group["params"] if fused and options.momentum):
        # As the first step would make it. The fused one fails where a layer has its first gradient in a later step.
        sgd.state[parameter]["momentum_buffer"] = zeros_like(parameter)
    return sgd


def parameter_groups(module: nn.Module, options: OptimizerOptions, rates: Mapping[nn.Parameter, float]) -> Groups:
    """Sort trainable parameters by whether they decay and by their learning rate; those that decay come first.

    Weight decay falls on "all weights that are not gains or biases" (CLIP paper, section 2.5): in practice on those of
    two dimensions and more, which leaves out the temperature and the class embedding too.
    """
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            key = parameter.ndim >= 2, rates.get(parameter, options.learning_rate)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[decays, rate], "lr": rate, "weight_decay": options.weight_decay if decays else 0.0}
        for decays, rate in sorted(groups, reverse=True)
    ]


def peak_rates(model: clip.DualEncoder, options: TowerOptions, usual: float | None) -> dict[nn.Parameter, float]:
    """Peak learning rates of the towers' parameters, where they differ from the usual one.

        rate · D^(L + 1 - l)        l = 0 before the L blocks of a tower, 1 … L in them, L + 1 after the last one

    (ELECTRA, arXiv 2003.10555; BEiT, arXiv 2106.08254.) What joins the towers, and the temperature, keep the usual.
    """
    assert usual is not None
    found: dict[nn.Parameter, float] = {}
    last = {
        parameter
        for module in model.modules()
        if isinstance(module, clip.CLIP | vit.VisionTransformer)
        for name, parameter in module.named_parameters()
        if name.startswith(LAST)
    }
    for tower, parameters, name in zip(
        (model.visual, model.transformer), model.towers(), ("image", "text"), strict=True
    ):
        own = getattr(options, f"{name}_learning_rate")
        found |= dict.fromkeys(parameters, own) if own else {}
        if options.layer_decay == 1 or not any(parameter.requires_grad for parameter in parameters):
            continue
        blocks = blocks_of(tower)
        if not blocks:
            raise UserError(
                f"layer_decay is {options.layer_decay}; the {name} tower is {type(tower).__name__}, in which no blocks "
                "were found to count by: modules of one class beside each other, such as the children of an "
                f"nn.ModuleList. Leave layer_decay out, or freeze that tower: lock_{name}. {name}_learning_rate sets "
                "one rate for all of it."
            )
        layers = {parameter: layer for layer, block in enumerate(blocks, 1) for parameter in block.parameters()}
        declared_in_order, layer, after = last.isdisjoint(parameters), 0, len(blocks) + 1
        for parameter in parameters:
            if declared_in_order:
                other = layer if layer < len(blocks) else after
            else:
                other = after if parameter in last else 0
            layer = layers.get(parameter, other)
            if parameter.requires_grad:
                found[parameter] = found.get(parameter, usual) * options.layer_decay ** (after - layer)
    return found


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a tower, or its stages, first to last; none where it has no such thing.

    Of a library's tower, what holds the most parameters among modules of one class beside each other that have parts of
    their own, and of those that hold as many the outermost.
    """
    alike: list[list[nn.Module]] = []
    for module in tower.modules():
        if isinstance(module, Transformer):
            return list(module.resblocks)
        # Of what only holds others, such as a ResNet's stages and its stem, these have to be of one class too.
        kinds: dict[Any, list[nn.Module]] = {}
        for child in module.children():
            if parts := list(child.children()):
                holds = isinstance(child, nn.Sequential | nn.ModuleList)
                kinds.setdefault((type(child), holds and type(parts[0])), []).append(child)
        alike += [children for children in kinds.values() if len(children) > 1]
    return max(alike, key=lambda blocks: sum(p.numel() for b in blocks for p in b.parameters()), default=[])


def usual_rate(optimizer: Optimizer, peak: float | None) -> float:
    """The learning rate, at this step, of what has none of its own, the temperature among it."""
    groups = optimizer.param_groups
    return next((group["lr"] for group in groups if group["initial_lr"] == peak), groups[0]["lr"])


def warmup_for(num_steps: int, preset: config.OptimizerConfig) -> int:
    """The warm-up of a run for which none is given: the preset's, or a tenth of the run where that is less."""
    return min(preset.warmup_steps, int(WARMUP_SHARE * num_steps))


def cosine_with_warmup(warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """Share of the peak rate at each optimizer step: a line up to 1, then half a cosine down to 0.

    step < w:  (step + 1) / w            otherwise:  ½ (1 + cos(π (step - w) / (num_steps - w)))
    """

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return share
