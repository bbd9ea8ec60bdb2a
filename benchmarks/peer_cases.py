"""What ``peer.py`` measures: a table of cases, which both sides read. Standard library only.

A case is a model, a batch, a precision, the length of the captions and how the batch is cut. Batches on a GPU are such
that the four sides' weights and moments and the activations of the one at work fit 80 GB together.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

PAPER_BATCH = 32_768  # CLIP paper, table 18


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: for ``--cases``.
        model: a preset of train-clip.
        batch: pairs of a step.
        words: fewest and most words of a generated caption; start and end token come on top.
        precision: ``bf16`` (mixed) or ``float32``.
        micro: pairs encoded at a time, 0 for all; the peer gets ``--accum-freq batch / micro``.
        steps: in a round.
        warmup: steps before the first round.
        compiled: whether both compiled modes take part.
        peer: whether the peer does; else the row is about memory and pace.
        folder: real pairs in place of generated ones.
    """

    name: str
    model: str
    batch: int
    words: tuple[int, int]
    precision: str = "bf16"
    micro: int = 0
    steps: int = 2
    warmup: int = 1
    compiled: bool = False
    peer: bool = True
    folder: str | None = None

    @property
    def captions(self) -> str:
        """Where they come from, in words."""
        return "the folder's" if self.folder else "{} to {} words".format(*self.words)


SHORT, USUAL, FULL = (1, 8), (6, 10), (75, 75)

ON_CPU = (
    Case("emoji", "mini-8-64px", 256, SHORT),
    Case("ViT-B/32", "ViT-B/32", 32, USUAL),
    Case("ViT-B/32-micro", "ViT-B/32", 32, USUAL, micro=8),
    Case("RN50", "RN50", 16, USUAL),
    Case("RN50-float32", "RN50", 16, USUAL, "float32"),
)

GPU_BATCHES = {
    "RN50": 256,
    "RN101": 192,
    "RN50x4": 96,
    "RN50x16": 32,
    "RN50x64": 12,
    "ViT-B/32": 512,
    "ViT-B/16": 256,
    "ViT-L/16": 96,
    "ViT-L/14": 64,
    "ViT-L/14-336px": 32,
}
ON_GPU = tuple(
    Case(f"gpu-{model}", model, batch, USUAL, steps=20, warmup=5, compiled=True) for model, batch in GPU_BATCHES.items()
)

CHUNKS = {
    "ViT-B/32": (512, 1024, 2048, 4096),
    "ViT-B/16": (128, 256, 512, 1024),
    "ViT-L/16": (64, 128, 256, 512),
    "ViT-L/14": (64, 128, 256),
    "ViT-L/14-336px": (32, 64, 128),
}
LARGE = tuple(
    Case(f"large-{model}-{micro}", model, PAPER_BATCH, USUAL, micro=micro, steps=1, peer=False)
    for model, chunks in CHUNKS.items()
    for micro in chunks
)

GROUPS = {"cpu": ON_CPU, "gpu": ON_GPU, "large": LARGE}


def to_json(case: Case) -> str:
    """A case as one word of a command line."""
    return json.dumps(asdict(case))


def from_json(word: str) -> Case:
    """The case that ``to_json`` wrote."""
    fields = json.loads(word)
    return Case(**fields | {"words": tuple(fields["words"])})
