"""What padding costs: a training pass of the text tower over captions in one piece and in pieces by their lengths.

    OMP_NUM_THREADS=1 python benchmarks/padding.py data_dir

For each model and batch, bf16 under autocast: milliseconds forward and backward (processor time on a CPU, the median of
rounds taken in turn) with rows of 77 tokens, with rows cut at the longest caption of the batch, and in 2 to 8 pieces
sorted by length. Captions are the folder's, cut to eight words.
"""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path

import torch
from clock import now
from torch import Tensor

from train_clip.data.folder import scan_folder
from train_clip.data.tokenizer import Tokenizer
from train_clip.models.clip import CLIP
from train_clip.models.config import read_config
from train_clip.training import encode as chunks
from train_clip.training.encode import Chunks, WeightSubstitutes, encode_in_chunks

CASES = (("mini-8-64px", 256), ("ViT-B/32", 32), ("ViT-B/32", 256))
PIECES = (1, 2, 3, 4, 6, 8)
ROUNDS, WORDS = 5, 8


def main() -> None:
    """Print a row for each model and batch."""
    folder = Path(sys.argv[1])
    captions = [caption for pair in scan_folder(folder).require_pairs().pairs for caption in pair.captions()[:1]]
    random.Random(0).shuffle(captions)
    print(f"| model, batch | mean, longest | 77 tokens | {' | '.join(f'{n} pieces' for n in PIECES)} |")
    print("|---|---|---|" + "---|" * len(PIECES))
    for name, batch in CASES:
        some = [" ".join(caption.split()[:WORDS]) for caption in captions[:batch]]
        some += some[: batch - len(some)]
        padded = Tokenizer()(some)
        lengths = padded.argmax(dim=1) + 1
        model = CLIP(read_config(name)).to("cuda" if torch.cuda.is_available() else "cpu")
        padded = padded.to(model.logit_scale.device)
        times: dict[int, list[float]] = {}
        for round_ in range(ROUNDS + 1):
            for pieces in (0, *PIECES):
                taken = one_pass(model, padded, lengths, pieces)
                times.setdefault(pieces, []).extend([taken] if round_ else [])
        row = " | ".join(f"{1000 * statistics.median(times[pieces]):,.0f}" for pieces in (0, *PIECES))
        print(f"| {name}, {batch} | {lengths.float().mean():.1f}, {lengths.max()} | {row} |", flush=True)


def one_pass(model: CLIP, tokens: Tensor, lengths: Tensor, pieces: int) -> float:
    """Seconds of a forward and a backward pass in pieces; in none the rows keep their padding."""
    chunks.MOST_PIECES, chunks.LEAST_ROWS = max(1, pieces), 1
    encode = WeightSubstitutes(model, halves=False, tables=True).around(model.encode_text)
    started = now()
    with torch.autocast(tokens.device.type, torch.bfloat16):
        found = encode_in_chunks(encode, tokens, Chunks(), model.transformer, lengths if pieces else None)
    found.float().square().sum().backward()
    taken = now() - started
    model.zero_grad()
    return taken


if __name__ == "__main__":
    main()
