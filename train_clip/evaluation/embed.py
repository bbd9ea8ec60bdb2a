"""Images and captions of any number → their embeddings, with the model in eval mode.

N  images or captions      S  side of the image in pixels      D  embedding width
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from train_clip.data.crops import centre_square
from train_clip.models.clip import DualEncoder, Texts, texts_on, unit_norm

EMBED_AT_ONCE = 64  # images or captions

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Collection:
    """Images and captions that could be read, embedded: what an evaluator scores."""

    paths: list[str]  # N images
    images: torch.Tensor  # (N, D) float32, unit norm
    captions: list[str]  # M
    texts: torch.Tensor  # (M, D) float32, unit norm
    owners: list[int]  # the image of each caption, as a place in ``paths``
    classes: list[str]  # C names; none where nothing is to be classified
    templates: list[str]  # captions with {} where the name goes
    labels: list[int]  # the class of each image
    embed_texts: Callable[[list[str]], torch.Tensor]  # further texts to (n, D) float32, unit norm
    skips: Sequence[tuple[str, str]]  # path and reason of what could not be read


def embed_images(
    model: DualEncoder, images: Picture | Sequence[Picture] | torch.Tensor, batch_size: int = EMBED_AT_ONCE
) -> torch.Tensor:
    """Embed images to (N, D) float32, unit norm, on the model's device.

    ``images`` are paths (``BadSample`` where one cannot be read) or pictures, one or several, which are resized and
    center-cropped; or a tensor (N, 3, S, S), uint8 or already normalized.
    """
    images = [images] if isinstance(images, str | Path | Image.Image) else images
    device = model.logit_scale.device

    def encode(batch: Sequence[Picture] | torch.Tensor) -> torch.Tensor:
        if not isinstance(batch, torch.Tensor):
            batch = torch.stack([centre_square(one, model.image_size) for one in batch])
        return model.encode_image(batch.to(device))

    return _embed(model, images, encode, batch_size)


def embed_texts(
    model: DualEncoder,
    texts: str | Sequence[str],
    tokenize: Callable[[list[str]], Texts],
    batch_size: int = EMBED_AT_ONCE,
) -> torch.Tensor:
    """Embed one caption or several to (N, D) float32, unit norm, on the model's device.

    ``tokenize`` maps strings to tokens, and cuts what is over the context length.
    """
    texts, device = [texts] if isinstance(texts, str) else list(texts), model.logit_scale.device
    return _embed(model, texts, lambda batch: model.encode_text(texts_on(device, tokenize(batch))), batch_size)


def _embed(model: DualEncoder, items: Any, encode: Any, batch_size: int) -> torch.Tensor:
    parts = [torch.empty(0, model.embed_dim, device=model.logit_scale.device)]
    with evaluating(model):
        parts += [unit_norm(encode(items[at : at + batch_size])) for at in range(0, len(items), batch_size)]
    return torch.cat(parts)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Hold a module in eval mode, without gradients, for the length of a block."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:  # one by one: a part may be held in eval mode on purpose
            part.training = True
