"""Images of classes → what the image tower gives before its projection, and after it.

N  images      F  width of the features      D  embedding width
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train_clip.checkpoints.load import Pretrained
from train_clip.commands.progress import with_progress
from train_clip.data.pairs import Pair
from train_clip.data.samples import Skip, image_loader
from train_clip.errors import UserError
from train_clip.evaluation.embed import evaluating, require_finite
from train_clip.models.clip import DualEncoder
from train_clip.probes.images import ImageOptions

# The module of an image tower that is next to its projection, and whether that takes its output or its input; the first
# that is there counts.
PROJECTED = {
    "image_projection": False,  # of two encoders
    "visual.attnpool.c_proj": False,  # of a ResNet
    "visual.backbone.ln_post": True,  # of a vision transformer with visual prompts
    "visual.ln_post": True,
    "visual.visual_projection": False,  # of a library's model
    "visual.features": True,  # of one without a projection
}


class Encoded(NamedTuple):
    """Some images as a head takes them."""

    features: Tensor  # (N, F) float32, before the projection
    embeddings: Tensor  # (N, D) float32, not normalized

    def take(self, rows: Any) -> "Encoded":
        """Some of the rows, in float64."""
        return Encoded(self.features[rows].double(), self.embeddings[rows].double())


def encode(
    model: Pretrained, images: Sequence[Pair], options: ImageOptions
) -> Iterator[tuple[list[int], Encoded, list[Skip]]]:
    """Encode pairs' images, batch by batch: places of those that can be read, their rows on the CPU, and the others."""
    clip = model.model
    loader = image_loader(
        [pair.pixels for pair in images], clip.image_size, options.batch_size, options.num_workers or 0
    )
    with tapped(clip) as taken:
        for places, pixels, bad in with_progress(loader, "images"):
            rows = Encoded(torch.empty(0), torch.empty(0))
            if places:
                with evaluating(clip):
                    embeddings = clip.encode_image(pixels.to(clip.logit_scale.device)).float().cpu()
                rows = Encoded(taken.pop().float().cpu(), embeddings)
                require_finite(embeddings, [images[place].image for place in places], "images of a batch")
            yield places, rows, bad


@contextmanager
def tapped(model: DualEncoder) -> Iterator[list[Tensor]]:
    """Collect, at each call of ``encode_image``, what the projection takes: (B, F)."""
    taken, modules = list[Tensor](), dict(model.named_modules())
    if (name := next((name for name in PROJECTED if name in modules), None)) is None:
        raise UserError(f"{model.name}: its image tower has no projection that is known. Expected CLIP's own towers.")

    def take(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A pooled token, (B, 1, F), counts as a row.
        taken.append((output if PROJECTED[name] else inputs[0]).flatten(1))

    hook = modules[name].register_forward_hook(take)
    try:
        yield taken
    finally:
        hook.remove()
