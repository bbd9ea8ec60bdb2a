"""What an evaluation is going to take of time and memory, where that is much: measured on a few of its items."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from train_clip.checkpoints.load import Pretrained
from train_clip.data.crops import read_square
from train_clip.data.pairs import Pair
from train_clip.errors import BadSample
from train_clip.estimates import remaining, size
from train_clip.evaluation import collect, embed
from train_clip.losses.softmax import ranks

FEW = 100  # images, below which nothing is measured
LOOKED_AT = 64  # images, evenly spread
LONG, LARGE = 60.0, 1e9  # seconds and bytes from which on they are spoken of
TRIAL = 0.5  # seconds that a trial takes at least, unless all that is looked at is done before
SIDE = 2048  # of a square of similarities that is tried


def say(model: Pretrained, found: Sequence[Pair], options: collect.ScoreOptions) -> None:
    """Print about how long embedding and scoring take, and the embeddings' memory, from a minute or 1 GB on."""
    if len(found) < FEW:
        return
    clip, (classes, templates) = model.model, collect.read_classes(options)
    squares, captions, paths = list[torch.Tensor](), list[list[str]](), list[str]()
    for pair in found[:: len(found) // min(len(found), LOOKED_AT)]:
        with suppress(BadSample):
            squares.append(read_square(pair.pixels, clip.image_size))
            paths.append(pair.pixels)
            captions.append(pair.captions() if pair.caption or pair.texts else [])
    texts = [text for several in captions for text in several] or classes
    if not squares or not texts:
        return
    num_captions = len(found) * sum(map(len, captions)) // max(1, len(captions))
    decode = seconds_each(lambda some: [read_square(path, clip.image_size) for path in some], paths)
    encode = seconds_each(lambda some: embed.embed_images(clip, torch.stack(some)).cpu(), squares)
    read = seconds_each(lambda some: embed.embed_texts(clip, some, model.tokens).cpu(), texts[:LOOKED_AT])
    rows = torch.nn.functional.normalize(torch.rand(SIDE, clip.embed_dim, device=clip.logit_scale.device), dim=1)
    right = torch.eye(SIDE, dtype=torch.bool, device=rows.device)
    compare = seconds_each(lambda _: ranks(rows, rows, right).cpu(), [0]) / SIDE**2
    # Loader processes decode while others are encoded.
    image = max(decode / options.num_workers, encode) if options.num_workers else decode + encode
    seconds = (
        len(found) * image
        + (num_captions + len(classes) * len(templates)) * read
        + len(found) * (2 * num_captions + len(classes)) * compare
    )
    memory = 4 * clip.embed_dim * (len(found) + num_captions + len(classes))
    if seconds >= LONG or memory >= LARGE:
        items = f"{len(found):,} images, about {num_captions:,} captions, {len(classes):,} classes"
        print(f"{items}: {remaining(seconds)}. Their embeddings take {size(memory)} of memory.", flush=True)


def seconds_each(function: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Seconds that a function takes for an item, by more and more of them at once until that can be told."""
    number, spent = 1, 0.0
    function(items[:number])  # the first call is slower
    while spent < TRIAL and number <= len(items):
        started = time.perf_counter()
        function(items[:number])
        spent, number = time.perf_counter() - started, 2 * number
    return 2 * spent / number
