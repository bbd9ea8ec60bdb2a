"""Images or captions, however they are given and however many → their embeddings, batch by batch.

N  images or captions      S  side of the image in pixels      D  embedding width
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from train_clip.cores import free_cores
from train_clip.data.crops import centre_square, read_square
from train_clip.errors import BadSample, WrongType
from train_clip.evaluation.embed import evaluating
from train_clip.models.clip import DualEncoder, Texts, texts_on

AHEAD = 2  # batches of images that are decoded while one is encoded
WINDOW = 16  # batches of captions that are sorted by length together

Item = str | Path | Image.Image | np.ndarray | torch.Tensor
"""A caption is a str, an image a path, a picture, an array (H, W, 3) or (H, W) uint8, or a tensor (3, S, S)."""


def batches(
    model: DualEncoder,
    tokenize: Callable[[list[str]], Texts],
    items: Iterable[Item],
    batch_size: int = 64,
    num_workers: int | None = None,
    *,
    in_half: bool = True,
) -> Iterator[tuple[torch.Tensor, list[BadSample]]]:
    """Embed images, or captions, batch by batch: (n, D) float32 each, on the model's device, and what is unreadable.

    Those are rows of NaN. Only some batches are in memory at a time. On GPUs that have bfloat16, towers compute in it,
    if ``in_half``.
    """
    several = iter(items)
    if (first := next(several, None)) is None:
        return
    several, device = chain([first], several), model.logit_scale.device
    in_half = in_half and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    with evaluating(model), torch.autocast("cuda", torch.bfloat16) if in_half else nullcontext():
        if isinstance(first, str):
            while texts := list(islice(several, WINDOW * batch_size)):
                yield from ((part, []) for part in _embed_texts(model, tokenize, texts, batch_size))
        else:
            yield from _embed_images(model, several, batch_size, free_cores() if num_workers is None else num_workers)


def _embed_images(
    model: DualEncoder, items: Iterator[Any], batch_size: int, num_workers: int
) -> Iterator[tuple[torch.Tensor, list[BadSample]]]:
    squares = _ahead(lambda item: _square(item, model.image_size), items, num_workers, AHEAD * batch_size)
    while found := list(islice(squares, batch_size)):
        embeddings = torch.full((len(found), model.embed_dim), torch.nan, device=model.logit_scale.device)
        # One after another: bytes stacked with what is normalized would pass for it.
        for kind in {one.dtype for one in found if isinstance(one, torch.Tensor)}:
            rows = [row for row, one in enumerate(found) if isinstance(one, torch.Tensor) and one.dtype == kind]
            pixels = torch.stack([found[row] for row in rows]).to(embeddings.device)
            embeddings[rows] = model.encode_image(pixels).float()
        yield embeddings, [one for one in found if isinstance(one, BadSample)]


def _square(item: Any, size: int) -> torch.Tensor | BadSample:
    if isinstance(item, torch.Tensor):
        return item
    if isinstance(item, str):
        raise WrongType(f"Found the caption {item!r} among images. Expected one kind; for a file give pathlib.Path.")
    try:
        if isinstance(item, Path):
            return read_square(str(item), size)
        return centre_square(Image.fromarray(item) if isinstance(item, np.ndarray) else item, size)
    except BadSample as bad:
        return bad


def _ahead(function: Callable[[Any], Any], items: Iterator[Any], num_threads: int, number: int) -> Iterator[Any]:
    """Call a function on each item, some ahead of their turn: Pillow decodes without Python's lock."""
    if num_threads == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        waiting = deque(pool.submit(function, item) for item in islice(items, number))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
        finally:
            for one in waiting:
                one.cancel()


def _embed_texts(
    model: DualEncoder, tokenize: Callable[[list[str]], Texts], texts: list[Any], batch_size: int
) -> list[torch.Tensor]:
    """Embed captions in the order of their lengths, without padding; return them in their own."""
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise WrongType(f"Found a {type(odd[0]).__name__} among captions. Expected one kind, images or captions.")
    device, tokens = model.logit_scale.device, tokenize(texts)
    mask = model.caption_mask(tokens)
    # The place behind the last token that counts: padding may stand on either side.
    lengths = (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1)
    embeddings, order = torch.empty(len(texts), model.embed_dim, device=device), lengths.argsort(stable=True)
    for rows in order.split(batch_size):
        end = int(lengths[rows].max())
        named = tokens.items() if isinstance(tokens, Mapping) else [("", tokens)]
        cut: Any = {name: one[rows, :end] for name, one in named}
        embeddings[rows] = model.encode_text(texts_on(device, cut if isinstance(tokens, Mapping) else cut[""])).float()
    return list(embeddings.split(batch_size))
