"""What a training step tells of a batch, beside its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from train_clip.losses.contrastive import Pairs, accuracy
from train_clip.models.dual_encoder import DualEncoder
from train_clip.training.teacher import Distillation


def step_figures(
    pairs: Pairs, parts: Mapping[str, Tensor], floor: Callable[[Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """The loss above its floor, the accuracies, and the loss's parts where it has several.

    Args:
        pairs: of the batch, which captions are equal among it.
        parts: () float32 each: ``contrastive_loss``, and what is added to it.
        floor: maps the captions to the least that the loss can be; None where it is 0, equal captions being left out.

    Returns:
        () float32 each, by the names that they have in a log.
    """
    assert pairs.captions is not None
    least = 0.0 if floor is None else floor(pairs.captions)
    figures = {
        "train/loss_above_floor": parts["contrastive_loss"].detach() - least,
        "train/accuracy_image_to_text": accuracy(pairs.images, pairs.all_texts, pairs.offset, pairs.captions),
        "train/accuracy_text_to_image": accuracy(pairs.texts, pairs.all_images, pairs.offset, pairs.captions),
    }
    if len(parts) > 1:
        figures |= {f"train/{name}": part.detach() for name, part in parts.items()}
    return figures


def learned_figures(model: DualEncoder, distillation: Distillation | None) -> dict[str, Tensor]:
    """The temperature, and the bias and the temperature towards the teacher where there are such.

    Args:
        model: that is trained.
        distillation: of it, if any.

    Returns:
        () each, by the names that they have in a log.
    """
    figures = {"train/logit_scale": model.logit_scale.detach().exp()}
    if model.logit_bias is not None:
        figures["train/logit_bias"] = model.logit_bias.detach()
    if distillation is not None:
        figures["train/distillation_scale"] = distillation.log_scale.detach().exp()
    return figures
