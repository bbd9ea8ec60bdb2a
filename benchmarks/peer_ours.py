"""train-clip's side of ``peer.py``: its module under a Lightning Trainer, as a user's run has it.

    python benchmarks/peer_ours.py CASE WEIGHTS MODE     (started by peer.py)

MODE is ``default`` or ``compiled``. The weights that it begins with are written to WEIGHTS, for the peer to begin with.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peer_cases import Case, from_json
from peer_rounds import CHECKED, Rounds, exact, num_distinct, pairs, pinned

from train_clip import CLIPWrapper
from train_clip.losses.softmax import clip_loss
from train_clip.training.display import MetricsLog, Throughput
from train_clip.training.encode import share

PRECISIONS = {"bf16": "bf16-mixed", "float32": "32-true"}


class NoteLoss(L.Callback):
    """Notes the first step's loss.

    Args:
        rounds: where.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def on_train_batch_end(self, _: L.Trainer, __: L.LightningModule, outputs: Any, *___: Any) -> None:
        """Hand it over."""
        self.rounds.note_loss(outputs["loss"])


def main() -> None:
    """Train until the driver has enough."""
    case, weights, mode = from_json(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.manual_seed(0)
    module = CLIPWrapper(case.model, minibatch_size=case.micro, **compile_words(mode))
    if not weights.exists():
        torch.save(module.model.state_dict(), weights)
    batches, lengths = [], set()
    for number in range(num_distinct(case)):
        pixels, captions = pairs(case, module.model.image_size, number)
        tokens, _ = module.tokenizer.batch(captions)
        lengths.add(tokens.shape[1])
        batches.append([(pinned(pixels), pinned(tokens))])
    rounds = Rounds(case, batches)
    rounds.facts = {
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "checked_loss": checked_loss(module, *batches[0][0]) if case.peer else None,
        "tokens": max(lengths),
    }
    trainer(case, rounds).fit(module, rounds)


def compile_words(mode: str) -> dict[str, Any]:
    """The module's argument for the compiled mode.

    Raises:
        SystemExit: this train-clip has none.
    """
    if mode == "default":
        return {}
    if "compile" not in inspect.signature(CLIPWrapper.__init__).parameters:
        sys.exit("CLIPWrapper has no argument `compile`; expected one for the compiled rows. Leave them out.")
    return {"compile": True}


def trainer(case: Case, rounds: Rounds) -> L.Trainer:
    """The Trainer of a run, with the figures that `train-clip train` logs every ten steps."""
    return L.Trainer(
        max_steps=len(rounds),
        precision=PRECISIONS[case.precision],  # type: ignore[arg-type]
        devices=1,
        logger=MetricsLog(Path(tempfile.mkdtemp()), 0),
        log_every_n_steps=10,
        callbacks=[NoteLoss(rounds), Throughput()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@exact()
def checked_loss(module: CLIPWrapper, images: torch.Tensor, texts: torch.Tensor) -> float:
    """The loss of the first pairs in float32, in eval mode."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = module.model.to(device).eval()
    image_embeddings = model.encode_image(images[:CHECKED].to(device))
    text_embeddings = model.encode_text(texts[:CHECKED].to(device))
    normalised = [torch.nn.functional.normalize(rows, dim=-1) for rows in (image_embeddings, text_embeddings)]
    loss = clip_loss(share(*normalised, torch.arange(len(normalised[0]))), model.logit_scale.exp())
    model.train()
    return float(loss)


if __name__ == "__main__":
    main()
