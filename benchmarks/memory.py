"""Peak memory of training the paper's models on a folder: the batch in one piece, in micro-batches, blocks recomputed.

    python benchmarks/memory.py data_dir

Each row is a process of its own that trains two steps. On a CUDA device it prints the allocator's peak, on a CPU the
process's largest resident size, beside what it has before the first batch (weights, moments, libraries).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

BATCH, STEPS = 32, 2
MODELS = ("RN50", "ViT-B/32")
WAYS = (
    {},
    {"gradient_checkpointing": 1},
    {"gradient_checkpointing": 4},
    {"minibatch_size": 8},
    {"minibatch_size": 8, "kept_minibatches": 2},
    {"minibatch_size": 8, "gradient_checkpointing": 1},
)
GIB = 2**30


def main() -> None:
    """Print a row a model and way."""
    print(
        "| model | options | peak, GiB | before the first batch | seconds of the second step | loss |\n"
        + "|---" * 6
        + "|"
    )
    for model in MODELS:
        for way in WAYS:
            command = [sys.executable, __file__, sys.argv[1], model, json.dumps(way)]
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            before, peak, seconds, loss = map(float, ended.stdout.split()[-4:])
            options = " ".join(f"`--{name} {value}`" for name, value in way.items()) or "none"
            print(f"| {model} | {options} | {peak:.2f} | {before:.2f} | {seconds:.1f} | {loss:.4f} |", flush=True)


def train(folder: str, model: str, way: dict[str, Any]) -> None:
    """Train here, and print what was held before the first batch, the peak, the second step's seconds and its loss."""
    import lightning as L
    import torch
    from clock import now

    from train_clip import CLIPWrapper
    from train_clip.training.data_module import TextImageDataModule

    class Before(L.Callback):
        gib = seconds = started = 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            self.gib, self.started = self.gib or peak(), now()

        def on_train_batch_end(self, *_: Any) -> None:
            self.seconds = now() - self.started

    def peak() -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    torch.manual_seed(0)
    before = Before()
    trainer = L.Trainer(
        max_steps=STEPS,
        devices=1,
        callbacks=[before],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = CLIPWrapper(model, **way)
    trainer.fit(module, TextImageDataModule(folder, BATCH, image_size=module.model.config.image.size))
    print(before.gib, peak(), before.seconds, trainer.callback_metrics["train/loss"].item())


if __name__ == "__main__":
    if len(sys.argv) == 4:
        train(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
