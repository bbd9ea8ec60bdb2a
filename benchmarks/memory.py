"""Peak memory of training the paper's models on a folder, with the batch in one piece and in micro-batches.

    python benchmarks/memory.py data_dir

Each row is a process of its own that trains two steps. On a CUDA device it prints the allocator's peak, on a CPU the
process's largest resident size, beside what it has before the first batch (weights, moments, libraries).
"""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

BATCH, STEPS = 32, 2
MODELS, MINIBATCHES = ("RN50", "ViT-B/32"), (0, 8)
GIB = 2**30


def main() -> None:
    """Print a row a model and size of micro-batch."""
    print(f"{'model':8}  {'--minibatch_size':>16}  {'peak GiB':>8}  {'before the first batch':>22}  {'loss':>7}")
    for model in MODELS:
        for minibatch in MINIBATCHES:
            command = [sys.executable, __file__, sys.argv[1], model, str(minibatch)]
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            before, peak, loss = map(float, ended.stdout.split()[-3:])
            print(f"{model:8}  {minibatch or 'none':>16}  {peak:8.2f}  {before:22.2f}  {loss:7.4f}", flush=True)


def train(folder: str, model: str, minibatch: int) -> None:
    """Train in this process, and print what it held before the first batch, its peak, and the last loss."""
    import lightning as L
    import torch

    from train_clip import CLIPWrapper
    from train_clip.training.data_module import TextImageDataModule

    class Before(L.Callback):
        gib = 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            self.gib = self.gib or peak()

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
    module = CLIPWrapper(model, minibatch_size=minibatch)
    trainer.fit(module, TextImageDataModule(folder, BATCH, image_size=module.model.config.image.size))
    print(before.gib, peak(), trainer.callback_metrics["train/loss"].item())


if __name__ == "__main__":
    if len(sys.argv) == 4:
        train(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
