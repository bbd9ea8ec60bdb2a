"""Captions a second through the tokenizer, beside open_clip's, on one thread.

    python benchmarks/tokenizer.py [--captions 20000] [--rounds 3]

The peer is open_clip's ``SimpleTokenizer`` as released: plain Python, with a memory of its own, without bounds, for
words it has met. Its file is loaded alone, because the package around it asks for timm and torchvision; it needs ftfy
and regex only:

    pip install --no-deps --target /tmp/peer open_clip_torch
    PYTHONPATH=/tmp/peer python benchmarks/tokenizer.py

No caption is met twice. Three kinds, each after a round to warm up:

    by rank      the vocabulary's 33,000 words of letters, the n-th drawn 1/n as often as the first: as people write
    evenly       the same words, each as often: more of them, with and without a full stop, than our memory holds
    never met    words of random letters, for which no memory helps

Both tokenizers fill rows of 77, in batches of 256, and must agree on the warm-up's rows before the clock starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import statistics
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from train_clip.data.tokenizer import Tokenizer

Tokenize = Callable[[list[str]], Tensor]
BATCH_SIZE = 256


def main() -> None:
    """Print one line per kind of caption."""
    parser = argparse.ArgumentParser(description="Captions a second through the tokenizer, beside open_clip's.")
    parser.add_argument("--captions", type=int, default=20_000, help="captions in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each of other captions; the median counts")
    options = parser.parse_args()
    torch.set_num_threads(1)

    ours, peer = Tokenizer(), open_clip_tokenizer()
    if peer is None:
        print("open_clip: not importable, left out; see the head of this file for how to install it beside")
    num_captions = options.captions * (options.rounds + 1)
    rng = random.Random(0)
    vocabulary = whole_words(ours)
    kinds = {
        "by rank": words_by_rank(vocabulary, rng),
        "evenly": words_evenly(vocabulary, rng),
        "never met": words_never_met(rng),
    }
    for kind, words in kinds.items():
        texts = captions(words, num_captions, rng)
        rounds = [texts[start : start + options.captions] for start in range(0, num_captions, options.captions)]
        print(f"{kind:12}{compare(ours, peer, warm_up=rounds[0], rounds=rounds[1:])}")


def compare(ours: Tokenize, peer: Tokenize | None, warm_up: list[str], rounds: list[list[str]]) -> str:
    """Time both in turn on each round and give the medians in words."""
    rows = ours(warm_up)
    if peer is not None and not torch.equal(rows, peer(warm_up)):
        raise AssertionError("the tokenizers disagree: the comparison means nothing")
    speeds = [captions_per_second(ours, texts) for texts in rounds]
    line = f"train-clip {statistics.median(speeds):,.0f} captions/s"
    if peer is None:
        return line
    peer_speeds = [captions_per_second(peer, texts) for texts in rounds]
    ratio = statistics.median(speed / other for speed, other in zip(speeds, peer_speeds, strict=True))
    return f"{line}, open_clip {statistics.median(peer_speeds):,.0f} captions/s, ratio {ratio:.1f}"


def captions_per_second(tokenize: Tokenize, texts: list[str]) -> float:
    """Time one pass in batches."""
    start = time.perf_counter()
    for place in range(0, len(texts), BATCH_SIZE):
        tokenize(texts[place : place + BATCH_SIZE])
    return len(texts) / (time.perf_counter() - start)


def captions(words: Iterator[str], number: int, rng: random.Random) -> list[str]:
    """Make distinct captions of 8 to 16 words, with a capital and a full stop."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[" ".join(next(words) for _ in range(rng.randint(8, 16))).capitalize() + "."] = None
    return list(found)


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """List the tokens that are words of ASCII letters, in the order of learning; the first 512 are bytes."""
    symbols = [tokenizer.decode([token]) for token in range(512, tokenizer.start_token)]
    words = [symbol.removesuffix(" ") for symbol in symbols if symbol.endswith(" ")]
    return [word for word in words if word.isascii() and word.isalpha()]


def words_by_rank(vocabulary: list[str], rng: random.Random) -> Iterator[str]:
    """Draw words by Zipf's law."""
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(vocabulary))))
    while True:
        yield from rng.choices(vocabulary, cum_weights=weights, k=1000)


def words_evenly(vocabulary: list[str], rng: random.Random) -> Iterator[str]:
    """Draw each word as often."""
    while True:
        yield rng.choice(vocabulary)


def words_never_met(rng: random.Random) -> Iterator[str]:
    """Draw words of 4 to 10 random letters."""
    while True:
        yield "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 10)))


def open_clip_tokenizer() -> Tokenize | None:
    """Load open_clip's tokenizer without the package around it, or give None where there is no open_clip."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer: Tokenize = module.SimpleTokenizer()
    return tokenizer


if __name__ == "__main__":
    main()
