"""The sigmoid loss on several gloo processes, in micro-batches, against one plain backward pass, in float64.

B  pairs on a rank      W  ranks      N  pairs of the global batch (W · B)
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from test_exact_gradient import CONFIG, B, fit, global_batch
from torch import Tensor
from torch.nn import functional as F
from two_processes import run

from train_clip import CLIP, CLIPWrapper
from train_clip.gather import world

SIZES = [0, 3]
EQUAL = 5  # the caption of every fifth pair is one and the same
NUM_BATCHES = 2


class Trained(NamedTuple):
    """What a rank ends with: weights and the last batch's loss, by the rows of a chunk and what equal captions do."""

    weights: dict[str, Tensor]
    loss: float


CASES = [(size, captions) for size in SIZES for captions in ("keep", "mask")]


def batches(num_ranks: int) -> tuple[Tensor, Tensor]:
    """Images and tokens of the batches end to end; equal captions lie on different ranks."""
    images, tokens = global_batch(num_ranks, NUM_BATCHES)
    tokens[::EQUAL] = tokens[0]
    return images, tokens


def untrained(size: int, captions: str) -> CLIPWrapper:
    """Plain SGD: a gradient that is twice as large as it should be takes a step twice as long."""
    torch.manual_seed(0)
    how = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.05, "weight_decay": 0.0, "warmup_steps": 0}
    module = CLIPWrapper("small", CONFIG, size, loss="sigmoid", equal_captions=captions, **how)
    # Where something is to be learned from every pair.
    torch.nn.init.constant_(module.model.logit_bias, -2.0)
    return module


def train_all() -> dict[tuple[int, str], Trained]:
    rank, num_ranks = world()
    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning that the processes are there already
    found = {}
    for case in CASES:
        module = untrained(*case)
        own = tuple(s.unflatten(0, (NUM_BATCHES, num_ranks, B))[:, rank].flatten(0, 1) for s in batches(num_ranks))
        fit(module, own, B, devices=num_ranks, strategy="ddp", use_distributed_sampler=False)
        found[case] = Trained(module.state_dict(), module.trainer.callback_metrics["train/loss"].item())
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[tuple[int, str], Trained]]:
    return run(train_all, tmp_path_factory.mktemp("sigmoid"), 2)


def by_hand(model: CLIP, num_ranks: int, captions: str) -> float:
    """The same steps on one process, in one piece: the loss is written out, the schedule is half a cosine."""
    images, tokens = batches(num_ranks)
    size = num_ranks * B
    for step, (pixels, words) in enumerate(zip(images.split(size), tokens.split(size), strict=True)):
        logits = model(pixels, words)[0]
        sign = 2 * torch.eye(size) - 1
        terms = -F.logsigmoid(sign * logits)
        if captions == "mask":
            equal = (words[:, None] == words).all(dim=2)
            terms = terms[~equal | torch.eye(size, dtype=torch.bool)]
        loss = terms.sum() / size
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rate = 0.05 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / NUM_BATCHES, dtype=torch.float64)))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                assert gradient.abs().max() > 1e-6
                parameter -= rate * gradient
    return loss.item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_step_as_one(results, case):
    """Weights after two steps, temperature and bias among them, to 1e-10; the logged loss is the global batch's."""
    model = untrained(*case).model.double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = by_hand(model, len(results), case[1])
    for found in results:
        assert found[case].loss == pytest.approx(loss, rel=1e-6)
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(
                found[case].weights[f"model.{name}"], expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
    for name in ("logit_scale", "logit_bias"):
        assert (model.state_dict()[name] - before[name]).abs() > 1e-3


def test_the_mask_makes_a_difference(results):
    """So that the comparison says something."""
    kept, masked = (results[0][0, captions].weights["model.logit_bias"] for captions in ("keep", "mask"))
    assert (kept - masked).abs() > 1e-3
