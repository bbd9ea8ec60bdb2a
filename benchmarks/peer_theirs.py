"""open_clip's side of ``peer.py``: its own ``main`` with its own defaults, only the data is ready.

    PEER_ENV/bin/python benchmarks/peer_theirs.py CASE WEIGHTS MODE     (started by peer.py)

MODE is ``default`` or ``compiled`` (its ``--torchcompile``). It begins with the WEIGHTS that train-clip wrote, as its
``--pretrained``. Pictures are normalised float32 and captions rows of 77 tokens, as its workers give them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip
import torch
from peer_cases import Case, from_json
from peer_rounds import CHECKED, Rounds, exact, num_distinct, pairs, pinned

PRECISIONS = {"bf16": "amp_bf16", "float32": "fp32"}
# The names of its own configurations; --force-quick-gelu gives the activation of the paper's models.
NAMES = {"ViT-L/14-336px": "ViT-L-14-336"}
MINI = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 256, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}


def main() -> None:
    """Train until the driver has enough."""
    case, weights, mode = from_json(sys.argv[1]), Path(sys.argv[2]).resolve(), sys.argv[3]
    # It writes folders wherever it stands.
    os.chdir(tempfile.mkdtemp())
    Path("mini-8-64px.json").write_text(json.dumps(MINI), encoding="utf-8")
    open_clip.add_model_config(Path("mini-8-64px.json"))
    name = NAMES.get(case.model, case.model.replace("/", "-"))
    pieces = case.batch // case.micro if case.micro else 1
    words = f"--model {name} --force-quick-gelu --pretrained {weights} --precision {PRECISIONS[case.precision]}"
    words += f" --batch-size {case.batch // pieces} --accum-freq {pieces} --dataset-type synthetic --logs none"

    def get_data(_: Any, preprocess: Any, **how: Any) -> dict[str, Any]:
        """Ready batches in place of its loaders."""
        rounds = ready(case, pieces, preprocess[0], how["tokenizer"])
        return {"train": SimpleNamespace(dataloader=rounds, set_epoch=lambda _: None)}

    def train(model: Any, data: dict[str, Any], loss: Any, *rest: Any, **named: Any) -> None:
        """Its epoch, after a look at the model and with an eye on the first loss."""
        rounds = data["train"].dataloader
        bare = getattr(model, "_orig_mod", model)
        rounds.facts["parameters"] = sum(parameter.numel() for parameter in bare.parameters())
        rounds.facts["checked_loss"] = checked_loss(bare, loss, rounds.batches[0])
        loss.register_forward_hook(lambda *called: rounds.note_loss(sum(called[-1].values())))
        train_one_epoch(model, data, loss, *rest, **named)

    # Its own loaders, which nothing here uses, ask for packages that open_clip_torch alone does not bring.
    loaders = ModuleType("open_clip_train.data")
    loaders.get_data = get_data  # type: ignore[attr-defined]
    sys.modules[loaders.__name__] = loaders
    peer = importlib.import_module("open_clip_train.main")
    train_one_epoch, peer.train_one_epoch = peer.train_one_epoch, train  # type: ignore[attr-defined]
    peer.main(words.split() + ["--torchcompile"] * (mode == "compiled"))


def ready(case: Case, pieces: int, preprocess: Any, tokenizer: Any) -> Rounds:
    """The case's batches as its workers give them, each cut for its accumulation."""
    size = open_clip.get_model_config(NAMES.get(case.model, case.model.replace("/", "-")))["vision_cfg"]["image_size"]
    normalise = preprocess.transforms[-1]
    batches = []
    for number in range(num_distinct(case)):
        pixels, captions = pairs(case, size, number)
        images, texts = normalise(pixels.float() / 255), tokenizer(captions)
        cut = zip(images.chunk(pieces), texts.chunk(pieces), strict=True)
        batches.append([(pinned(some.contiguous()), pinned(words.contiguous())) for some, words in cut])
    rounds = Rounds(case, batches)
    rounds.facts["tokens"] = batches[0][0][1].shape[1]
    return rounds


@exact()
def checked_loss(model: Any, loss: Any, batch: list[Any]) -> float:
    """The loss of the first pairs in float32, in eval mode."""
    images, texts = (torch.cat([piece[place] for piece in batch])[:CHECKED] for place in (0, 1))
    device = next(model.parameters()).device
    model.eval()
    found = sum(loss(**model(images.to(device), texts.to(device)), output_dict=True).values())
    model.train()
    return float(found)


if __name__ == "__main__":
    main()
