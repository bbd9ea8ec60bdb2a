"""Images and captions of any number → their embeddings, with the model in eval mode.

N  images or captions      S  side of the image in pixels      D  embedding width
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from train_clip.data.crops import centre_square
from train_clip.errors import UserError
from train_clip.models.clip import DualEncoder, Texts, texts_on, unit_norm
from train_clip.printing import printable

EMBED_AT_ONCE = 64  # images or captions
COMPARED_AT_ONCE = 4096  # embeddings with the first one

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Collection:
    """Images and captions that could be read, embedded: what an evaluator scores."""

    paths: list[str]  # N images
    images: torch.Tensor  # (N, D) float32, unit norm
    captions: list[str]  # M
    texts: torch.Tensor  # (M, D) float32, unit norm
    owners: list[int]  # the image of each caption, as a place in ``paths``
    caption_ids: torch.Tensor  # (M,) int64, equal for captions whose tokens are
    classes: list[str]  # C names; none where nothing is to be classified
    templates: list[str]  # captions with {} where the name goes
    labels: list[int]  # the class of each image; none where some have several
    embed_texts: Callable[[list[str]], torch.Tensor]  # further texts to (n, D) float32, unit norm
    skips: Sequence[tuple[str, str]]  # path and reason of what could not be read
    label_sets: list[list[int]] = field(default_factory=list)  # the classes of each image, where some have several


def find_collapse(collection: Collection) -> str | None:
    """Say what the model maps to one point though it differs: within D · eps all is a tie (``softmax.ranks``)."""
    sides: dict[str, Iterable[torch.Tensor]] = {"images": collection.images.split(COMPARED_AT_ONCE)}
    if (collection.caption_ids != collection.caption_ids[:1]).any():
        sides["captions"] = collection.texts.split(COMPARED_AT_ONCE)
    if collection.classes:
        names = [collection.templates[0].replace("{}", name) for name in collection.classes]
        some = (names[start : start + EMBED_AT_ONCE] for start in range(0, len(names), EMBED_AT_ONCE))
        sides["class names"] = map(collection.embed_texts, some)
    found = [what for what, blocks in sides.items() if _is_one_point(blocks)]
    same = "have the same embedding, up to rounding. The model cannot tell them apart."
    return f"Collapsed: all {' and all '.join(found)} {same}" if found else None


def _is_one_point(blocks: Iterable[torch.Tensor]) -> bool:
    """Whether all rows of (n, D) blocks are at one point, and more than one; no block is asked for in vain."""
    first, number = torch.empty(0), 0
    for rows in blocks:
        first, number = first if number else rows[0], number + len(rows)
        if not (rows - first).norm(dim=1).max() <= len(first) * torch.finfo(torch.float32).eps:
            return False
    return number > 1


def require_finite(embeddings: torch.Tensor, names: Sequence[str], what: str) -> None:
    """Refuse embeddings with NaN or infinity in them, of which no score means anything; (n, D) unit norm, n names."""
    # No sum of a row of unit norm overflows, and in none NaN or infinity is lost; a mask would take the memory again.
    bad = (~embeddings.sum(dim=1).isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{printable(names[bad[0]])}: its embedding is not finite (NaN or infinity), one of {len(bad):,} such "
            f"among {len(names):,} {what}. Expected finite numbers; nothing is scored. Use an earlier checkpoint of "
            "the run, or other weights."
        )


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
