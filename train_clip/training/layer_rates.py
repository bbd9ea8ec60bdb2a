"""Learning rates that fall layer by layer towards the input (ELECTRA, arXiv 2003.10555; BEiT, arXiv 2106.08254).

What was pretrained is the more general the nearer it is to the input, and is to be changed the less.

L  blocks of a tower
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from train_clip.errors import UserError
from train_clip.models.blocks import Transformer
from train_clip.models.clip import CLIP
from train_clip.models.dual_encoder import DualEncoder
from train_clip.models.vit import VisionTransformer


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
            return list(module.blocks())
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
