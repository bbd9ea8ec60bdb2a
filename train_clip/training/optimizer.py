"""The optimizer, its groups, and a cosine over the whole run (CLIP paper, section 2.5 and table 18).

Learning rates that fall layer by layer towards the input (ELECTRA, arXiv 2003.10555; BEiT, arXiv 2106.08254).

What was pretrained is the more general the nearer it is to the input, and is to be changed the less.

L  blocks of a tower
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from train_clip.errors import UserError
from train_clip.models.blocks import Transformer
from train_clip.models.clip import CLIP, DualEncoder
from train_clip.models.config import OptimizerConfig
from train_clip.models.vit import VisionTransformer
from train_clip.training.half_precision import HalfAdamW
from train_clip.training.muon import Muon, hidden_matrices
from train_clip.training.tuning import Tuning


def layer_rates(
    model: DualEncoder, decay: float, rates: Mapping[nn.Parameter, float], usual: float
) -> dict[nn.Parameter, float]:
    """The rates of a model's parameters, those of its towers multiplied by how deep they lie.

        rate · D^(L + 1 - l)        l = 0 before the blocks, 1 … L in them, L + 1 after the last one

    What joins the towers, and the temperature, keep their rate.

    Args:
        model: whose towers; those of which nothing is trained have none.
        decay: D, above 0 and at most 1; with 1 every rate stays.
        rates: of the parameters that have one of their own.
        usual: of the others.

    Raises:
        UserError: a tower whose blocks are not found.
    """
    found = dict(rates)
    if decay == 1:
        return found
    for name, tower, parameters in zip(
        ("image", "text"), (model.visual, model.transformer), model.towers(), strict=True
    ):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        blocks = blocks_of(tower) if trained else []
        if trained and not blocks:
            raise UserError(
                f"layer_decay is {decay}; the {name} tower is {type(tower).__name__}, in which no blocks were found to "
                "count by: modules of one class beside each other, such as the children of an nn.ModuleList. Leave "
                f"layer_decay out, or keep that tower: lock_{name}. {name}_learning_rate sets one rate for all of it."
            )
        layers = _layers(parameters, blocks, _last(model))
        for parameter in trained:
            found[parameter] = found.get(parameter, usual) * decay ** (len(blocks) + 1 - layers[parameter])
    return found


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a tower, or its stages where it is made of such, first to last; none where it has no such thing.

    They are those of this package's transformers; else what holds the most parameters among modules of one class beside
    each other, layers without parts of their own left out, and of those that hold as many the outermost.
    """
    for module in tower.modules():
        if isinstance(module, Transformer):
            return list(module.resblocks)
    return max(_alike(tower), key=_count, default=[])


def _alike(tower: nn.Module) -> Iterator[list[nn.Module]]:
    """Every two and more children of one class that a module of a tower has, from the outside inwards.

    Of what only holds others, such as a ResNet's stages and its stem, these have to be of one class too.
    """
    for module in tower.modules():
        kinds: dict[tuple[type[nn.Module], ...], list[nn.Module]] = {}
        for child in module.children():
            first = next(child.children(), None)
            if first is not None:
                holds = isinstance(child, nn.Sequential | nn.ModuleList)
                kinds.setdefault((type(child), type(first)) if holds else (type(child),), []).append(child)
        yield from (children for children in kinds.values() if len(children) > 1)


def _count(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _last(model: DualEncoder) -> set[nn.Parameter]:
    """What comes after the blocks in this package's own transformers, in which it is not declared after them."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            found |= {module.proj, *module.ln_post.parameters()}
        elif isinstance(module, CLIP):
            found |= {module.text_projection, *module.ln_final.parameters()}
    return found


def _layers(
    parameters: list[nn.Parameter], blocks: list[nn.Module], last: set[nn.Parameter]
) -> dict[nn.Parameter, int]:
    """The layer of each parameter of a tower, from 0 to L + 1.

    Args:
        parameters: the tower's, in the order in which they are declared, by which those in no block are placed.
        blocks: L of them.
        last: parameters that lie after the blocks wherever they are declared; a tower that has some declares the others
            in no order either, and they lie before the blocks.
    """
    number = len(blocks)
    layers = {parameter: place for place, block in enumerate(blocks, 1) for parameter in block.parameters()}
    ordered = last.isdisjoint(parameters)
    reached = 0
    for parameter in parameters:
        if parameter in layers:
            reached = layers[parameter]
        elif ordered:
            layers[parameter] = number + 1 if reached == number else reached
        else:
            layers[parameter] = number + 1 if parameter in last else 0
    return layers


HIDDEN = "hidden"  # the key that tells Muon's groups from the others
# Muon's rate next to AdamW's (docs/recipes.md). At 5e-4, the paper's for ViT-B, its matrices of 768 then move by a
# spectral norm of 0.2 · 8 · 5e-4 · √768 = 0.022 a step; Jordan et al. 2024 move theirs by 0.02.
MUON_RATE = 8.0
WARMUP_SHARE = 0.1  # of a run that is too short for the model's own warm-up


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, tuning: Tuning, fused: bool = False, seed: int = 0
) -> Optimizer:
    """Make the optimizer of groups of parameters.

    Args:
        groups: of ``parameter_groups``, on their device.
        config: the numbers; betas and eps are AdamW's. SGD's decay is a part of the gradient, that of others is not.
        tuning: which optimizer, the momentum, and what is kept in bfloat16.
        fused: one kernel for the whole update, which can be held back by a flag on the device (``found_inf``).
        seed: of what is rounded by chance.
    """
    assert tuning.momentum is not None
    half = tuning.adam_statistics == "bfloat16"
    if tuning.optimizer == "sgd":
        sgd = SGD(groups, lr=config.lr, momentum=tuning.momentum, fused=fused)
        for parameter in (p for group in sgd.param_groups for p in group["params"] if tuning.momentum):
            # As the first step would make it. The fused one fails where a layer has its first gradient in a later step.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if hidden := [group for group in groups if group.get(HIDDEN)]:
        rest = build_optimizer(
            [group for group in groups if not group[HIDDEN]],
            config,
            dataclasses.replace(tuning, optimizer="adamw", muon_learning_rate=None),
            fused,
            seed,
        )
        return Muon(hidden, rest, tuning.momentum, half_momentum=half, seed=seed, held_back=fused)
    if tuning.keeps_halves:
        return HalfAdamW(groups, config.lr, config.betas, config.eps, half_moments=half, seed=seed, held_back=fused)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def parameter_groups(
    module: nn.Module,
    config: OptimizerConfig,
    rates: Mapping[nn.Parameter, float] | None = None,
    hidden: Mapping[nn.Parameter, float] | None = None,
) -> list[dict[str, Any]]:
    """Sort trainable parameters by whether they decay and by their learning rate; those that decay come first.

    Weight decay falls on "all weights that are not gains or biases" (CLIP paper, section 2.5): in practice on those of
    two dimensions and more, which leaves out the temperature and the class embedding too.

    Args:
        module: whose parameters.
        config: the decay, and the rate of parameters that have none of their own.
        rates: peaks of some of the parameters.
        hidden: matrices that Muon updates, which come before all others, and what their rates are multiplied by; None
            where there is no Muon.
    """
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            rate = (rates or {}).get(parameter, config.lr) * (hidden or {}).get(parameter, 1.0)
            key = (parameter in (hidden or {}), parameter.ndim >= 2, rate)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[of_muon, decays, rate], "lr": rate, "weight_decay": config.weight_decay if decays else 0.0}
        | ({} if hidden is None else {HIDDEN: of_muon})
        for of_muon, decays, rate in sorted(groups, reverse=True)
    ]


def muon_matrices(model: DualEncoder, config: OptimizerConfig, tuning: Tuning) -> dict[nn.Parameter, float] | None:
    """What Muon updates, and what its rate is of the others'; None where another optimizer was asked for.

    Raises:
        UserError: nothing that is trained is for Muon.
    """
    if tuning.optimizer != "muon":
        return None
    found = [matrix for matrix in hidden_matrices(model) if matrix.requires_grad]
    if not found:
        raise UserError(
            "optimizer is 'muon', which updates the matrices within the towers, and none of them is trained. Expected "
            "a tower that is; for prompts, or a projection alone: adamw or sgd."
        )
    factor = MUON_RATE if tuning.muon_learning_rate is None else tuning.muon_learning_rate / config.lr
    return dict.fromkeys(found, factor)


def tower_rates(model: DualEncoder, tuning: Tuning) -> dict[nn.Parameter, float]:
    """The rates of towers that have one of their own."""
    of_towers = zip(model.towers(), (tuning.image_learning_rate, tuning.text_learning_rate), strict=True)
    return {parameter: rate for tower, rate in of_towers if rate is not None for parameter in tower}


def rates_and_matrices(
    model: DualEncoder, config: OptimizerConfig, tuning: Tuning
) -> tuple[dict[nn.Parameter, float], dict[nn.Parameter, float] | None]:
    """What ``parameter_groups`` takes of a model: rates of its own, and what Muon updates.

    Raises:
        UserError: the rates are to fall by layer in a tower that has none, or nothing that is trained is for Muon.
    """
    rates = layer_rates(model, tuning.layer_decay, tower_rates(model, tuning), config.lr)
    return rates, muon_matrices(model, config, tuning)


def usual_rate(optimizer: Optimizer, config: OptimizerConfig) -> float:
    """The rate, at this step, of what has none of its own, the temperature among it."""
    groups = optimizer.param_groups
    rate: float = next((group["lr"] for group in groups if group["initial_lr"] == config.lr), groups[0]["lr"])
    return rate


def build_schedule(optimizer: Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
    """Make the learning-rate schedule, advanced once an optimizer step."""
    return LambdaLR(optimizer, cosine_with_warmup(warmup_steps, num_steps))


def warmup_for(num_steps: int, config: OptimizerConfig) -> int:
    """The warm-up of a run for which none is given: the model's own, or a tenth of the run where that is less."""
    return min(config.warmup_steps, int(WARMUP_SHARE * num_steps))


def cosine_with_warmup(warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """Share of the peak rate at each optimizer step: a line up to 1, then half a cosine down to 0.

        step < w:  (step + 1) / w            otherwise:  ½ (1 + cos(π (step - w) / (num_steps - w)))

    Args:
        warmup_steps: w.
        num_steps: optimizer steps of the run; the rate would be 0 on the step after the last.
    """

    def share(step: int) -> float:
        """What the rate is of its peak."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return share
