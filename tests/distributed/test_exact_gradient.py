"""The gradient of several gloo processes, each in micro-batches, against one plain backward pass, in float64.

B  pairs on a rank      W  ranks      N  pairs of the global batch (W · B)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from two_processes import run

from train_clip import CLIPWrapper
from train_clip.gather import world
from train_clip.losses.softmax import clip_loss
from train_clip.models.clip import CLIP, unit_norm
from train_clip.models.config import config_from_dict
from train_clip.training.encode import Chunks, encode_in_chunks, share

B = 8
CONTEXT, END = 10, 29
CONFIG = {
    "embed_dim": 8,
    "image": {"size": 16, "patch": 8, "layers": 2, "width": 16, "heads": 2},
    "text": {"context": CONTEXT, "vocab": END + 1, "layers": 2, "width": 12, "heads": 2},
}
# What the names of the frozen parameters start with.
FROZEN: dict[str, tuple[str, ...]] = {
    "image tower": ("visual.",),
    "text tower": ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection"),
    "first block of each": ("visual.transformer.resblocks.0.", "transformer.resblocks.0."),
    "temperature": ("logit_scale",),
}
FROZEN["both towers"] = FROZEN["image tower"] + FROZEN["text tower"]


class Case(NamedTuple):
    """One way to train: rows of a chunk at most, a key of ``FROZEN`` or nothing, the rate of dropout."""

    size: int
    frozen: str = ""
    dropout: float = 0.0

    def __str__(self) -> str:
        return f"{self.size} {self.frozen}{' dropout' if self.dropout else ''}".strip()


# 0 for all at once; sizes that divide 8, that do not (3, 3 and 2; 4 and 4 for 7), and the batch itself.
SIZES = [0, 1, 3, 4, 7, 8]
PLAIN = [Case(size) for size in SIZES]
PARTLY_FROZEN = [Case(size, frozen) for frozen in FROZEN for size in (0, 3)]
WITH_DROPOUT = [Case(size, dropout=0.3) for size in (0, 3, 4)]


class Found(NamedTuple):
    """What a rank brings back: its loss, DDP's gradients, and the random states that each encoder met, in order."""

    loss: float
    gradients: dict[str, Tensor | None]
    image_states: list[Tensor]
    text_states: list[Tensor]


class Trained(NamedTuple):
    """A rank's weights after a few steps, and the random states that its encoders met in them."""

    weights: dict[str, Tensor]
    states: list[Tensor]


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def everything(request, tmp_path_factory) -> list[tuple[dict[Case, Found], Trained]]:
    """What all tests look at, run once on each process: starting them is what takes time."""
    return run(run_everything, tmp_path_factory.mktemp("exact"), request.param)


def run_everything() -> tuple[dict[Case, Found], Trained]:
    return {case: step(case) for case in (*PLAIN, *PARTLY_FROZEN, *WITH_DROPOUT)}, train()


@pytest.fixture
def results(everything) -> list[dict[Case, Found]]:
    return [cases for cases, _ in everything]


def build(case: Case) -> CLIP:
    """The same small CLIP on every rank, with dropout after each MLP of both towers where the case has any."""
    torch.manual_seed(0)
    model = CLIP(config_from_dict(CONFIG)).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN.get(case.frozen, ())))
    if case.dropout:
        for tower in (model.visual.transformer, model.transformer):
            for block in tower.resblocks:
                block.mlp = nn.Sequential(block.mlp, nn.Dropout(case.dropout))
    return model


def global_batch(num_ranks: int, num_batches: int = 1) -> tuple[Tensor, Tensor]:
    """(N, 3, 16, 16) uint8 and (N, 10) tokens, captions of different lengths; several batches lie end to end."""
    generator = torch.Generator().manual_seed(1)
    length = num_batches * num_ranks * B
    tokens = torch.randint(1, END, (length, CONTEXT), generator=generator)
    for row, last in zip(tokens, torch.randint(2, CONTEXT, (length,), generator=generator).tolist(), strict=True):
        row[last], row[last + 1 :] = END, 0
    return torch.randint(256, (length, 3, 16, 16), generator=generator, dtype=torch.uint8), tokens


class Recorder:
    """Wraps an encoder and keeps the random state that it met in each call."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode = encode
        self.states: list[Tensor] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.states.append(torch.get_rng_state())
        return self.encode(rows)


class Step(nn.Module):
    """What a training step does between the batch and the loss."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model = build(case)
        self.size = case.size
        self.encode_image, self.encode_text = Recorder(self.model.encode_image), Recorder(self.model.encode_text)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        model, rank = self.model, world()[0]
        image_embeddings = encode_in_chunks(self.encode_image, images, Chunks(self.size, seed=(rank, 0)), model.visual)
        text_embeddings = encode_in_chunks(
            self.encode_text, tokens, Chunks(self.size, seed=(rank, 1)), model.transformer
        )
        own_captions = torch.arange(len(image_embeddings))
        pairs = share(unit_norm(image_embeddings), unit_norm(text_embeddings), own_captions)
        return clip_loss(pairs, model.logit_scale.exp())


def step(case: Case) -> Found:
    """This rank's loss on its share, and the gradients that DDP averaged."""
    rank, num_ranks = world()
    images, tokens = (side[rank * B : (rank + 1) * B] for side in global_batch(num_ranks))
    replica = DistributedDataParallel(Step(case))
    loss = replica(images, tokens)
    states = [list(encode.states) for encode in (replica.module.encode_image, replica.module.encode_text)]
    torch.manual_seed(99)  # what happens between the passes must not matter
    loss.backward()
    return Found(loss.item(), gradients(replica.module.model), *states)


def train() -> Trained:
    """Three steps under Lightning's own DDP, as one of its processes."""
    rank, num_ranks = world()
    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning that the processes are there already
    module, images, texts = untrained(minibatch_size=3)
    own = tuple(side.unflatten(0, (3, num_ranks, B))[:, rank].flatten(0, 1) for side in global_batch(num_ranks, 3))
    fit(module, own, B, devices=num_ranks, strategy="ddp", use_distributed_sampler=False)
    return Trained(module.state_dict(), images.states + texts.states)


def untrained(minibatch_size: int) -> tuple[CLIPWrapper, Recorder, Recorder]:
    """A module, and the recorders of its encoders. Beside its epsilon AdamW does not divide out a gradient's size."""
    torch.manual_seed(0)
    module = CLIPWrapper("small", CONFIG, minibatch_size, learning_rate=0.02, eps=0.5)
    model = module.model
    images, texts = Recorder(model.encode_image), Recorder(model.encode_text)
    model.encode_image, model.encode_text = images, texts
    return module, images, texts


def fit(module: CLIPWrapper, pairs: tuple[Tensor, ...], batch_size: int, **how: Any) -> None:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", precision="64-true", max_epochs=1, logger=False, **quiet, **how)
    trainer.fit(module, DataLoader(TensorDataset(*pairs), batch_size))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_found(results: list[dict[Case, Found]], case: Case, loss: Tensor, model: CLIP) -> None:
    """Compare with a reference's loss and gradients (1e-12), every parameter on every rank, frozen ones having none."""
    found = [result[case] for result in results]
    assert sum(each.loss for each in found) / len(found) == pytest.approx(loss.item(), abs=1e-12)
    assert len({each.loss for each in found}) == len(found)
    for name, expected in gradients(model).items():
        if name.startswith(FROZEN.get(case.frozen, ())):
            assert expected is None
        else:
            # Larger by far than the tolerance: the comparison says something.
            assert expected.abs().max() > 1e-5, name
        for each in found:
            torch.testing.assert_close(
                each.gradients[name], expected, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("case", PLAIN + PARTLY_FROZEN, ids=str)
def test_gradient_is_the_full_batch(results, case):
    """DDP's gradient of micro-batches against one process's ``model(images, tokens)`` on the global batch: 1e-12.

    Every parameter, temperature included; chunk sizes that divide a rank's batch and that do not, and none; then with
    a tower, both, the first block of each or the temperature frozen, where what is frozen gets no gradient.
    """
    model = build(case)
    images, tokens = global_batch(len(results))
    similarity = model(images, tokens)[0]
    target = torch.arange(len(images))
    loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    loss.backward()
    assert_found(results, case, loss, model)


@pytest.mark.parametrize("case", WITH_DROPOUT, ids=str)
def test_gradient_with_dropout(results, case):
    """Against one process that encodes all ranks' chunks in turn, without checkpointing, at the same states: 1e-12.

    The states are those that the encoders met in the forward pass, and no two of them are equal; the recomputation has
    to meet them again.
    """
    model, without = build(case), build(case).eval()
    images, tokens = global_batch(len(results))
    num_chunks = math.ceil(B / case.size) if case.size else 1
    sides, states = [], []
    for batch, encode, kind in (
        (images, model.encode_image, "image_states"),
        (tokens, model.encode_text, "text_states"),
    ):
        embeddings = []
        for rank, rows in enumerate(batch.split(B)):
            met = getattr(results[rank][case], kind)
            for chunk, state in zip(rows.tensor_split(num_chunks), met, strict=True):
                torch.set_rng_state(state)
                embeddings.append(encode(chunk))
            states += met
        sides.append(F.normalize(torch.cat(embeddings), dim=-1))
    similarity = model.logit_scale.exp() * sides[0] @ sides[1].T
    target = torch.arange(len(images))
    loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    loss.backward()
    assert len({state.numpy().tobytes() for state in states}) == 2 * len(results) * num_chunks
    assert (similarity - without(images, tokens)[0]).abs().max() > 0.01
    assert_found(results, case, loss, model)


def test_weights_under_lightnings_ddp(everything):
    """Three steps of micro-batches on every process against the same Trainer on one, in one piece: weights to 1e-10.

    No two chunks have the same random state, whatever their process, batch and tower, and in the recomputation each
    meets its own again.
    """
    num_ranks = len(everything)
    module, _, _ = untrained(minibatch_size=0)
    fit(module, global_batch(num_ranks, 3), num_ranks * B, devices=1)
    for _, trained in everything:
        assert trained.weights.keys() == module.state_dict().keys()
        for name, expected in module.state_dict().items():
            torch.testing.assert_close(
                trained.weights[name], expected, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )
    states = [state.numpy().tobytes() for _, trained in everything for state in trained.states]
    num_chunks = num_ranks * 3 * 2 * 3
    assert len(states) == 2 * num_chunks
    assert len(set(states)) == num_chunks
