"""Images and captions of any number → their embeddings, with the model in eval mode.

N  images or captions      S  side of the image in pixels      D  embedding width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from train_clip.data.crops import center_crop, to_tensor
from train_clip.data.images import open_rgb, upright_rgb
from train_clip.models.clip import DualEncoder, Texts, unit_norm

EMBED_AT_ONCE = 64  # images or captions

Picture = str | Path | Image.Image


@torch.no_grad()
def embed_images(
    model: DualEncoder, images: Picture | Sequence[Picture] | Tensor, batch_size: int = EMBED_AT_ONCE
) -> Tensor:
    """Embed images.

    Args:
        model: on its device.
        images: paths or pictures, one or several, which are resized and centre-cropped; or a tensor (N, 3, S, S),
            uint8 or already normalised.
        batch_size: images at a time.

    Returns:
        (N, D) float32, unit norm, on the model's device.

    Raises:
        BadSample: a file that cannot be read as an image.
    """
    if isinstance(images, str | Path | Image.Image):
        images = [images]
    device = model.logit_scale.device
    parts = [torch.empty(0, model.embed_dim, device=device)]
    with _eval_mode(model):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            if not isinstance(batch, Tensor):
                batch = torch.stack([_pixels(image, model.image_size) for image in batch])
            parts.append(unit_norm(model.encode_image(batch.to(device))))
    return torch.cat(parts)


@torch.no_grad()
def embed_texts(
    model: DualEncoder,
    texts: str | Sequence[str],
    tokenize: Callable[[list[str]], Texts],
    batch_size: int = EMBED_AT_ONCE,
) -> Tensor:
    """Embed captions.

    Args:
        model: on its device.
        texts: one caption or several.
        tokenize: strings to tokens on the model's device; what is over the context length is cut.
        batch_size: captions at a time.

    Returns:
        (N, D) float32, unit norm, on the model's device.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    parts = [torch.empty(0, model.embed_dim, device=model.logit_scale.device)]
    with _eval_mode(model):
        for start in range(0, len(texts), batch_size):
            parts.append(unit_norm(model.encode_text(tokenize(texts[start : start + batch_size]))))
    return torch.cat(parts)


def _pixels(image: Picture, size: int) -> Tensor:
    picture = upright_rgb(image, "picture") if isinstance(image, Image.Image) else open_rgb(str(image))
    return to_tensor(center_crop(picture, size))


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode within the block, each submodule's own mode after it."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
