"""A ResNet CLIP with SyncBatchNorm on two CUDA processes against ordinary BatchNorm on one, in float64.

SyncBatchNorm refuses CPU tensors, so the processes need CUDA: a device each, or one for both.

B  pairs on a rank      W  ranks      N  pairs of the global batch (W · B)      C  channels
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from two_processes import run

from train_clip.gather import world
from train_clip.losses.softmax import clip_loss
from train_clip.models.clip import CLIP, unit_norm
from train_clip.models.config import config_from_dict
from train_clip.training.encode import Chunks, encode_in_chunks, share

pytestmark = pytest.mark.gpu

W, B = 2, 5
SIZE, NUM_CHUNKS = 3, 2  # rows of a chunk at most: 3 and 2 of 5
CONTEXT, END = 10, 29
MOMENTUM = 0.1  # nn.BatchNorm2d's default


class Found(NamedTuple):
    """What a rank brings back: its loss, DDP's gradients, and the BatchNorms' buffers, all on the CPU."""

    loss: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Found]]:
    """Everything below, run once on both processes: starting them is what takes time."""
    return run(everything, tmp_path_factory.mktemp("sync"), W, device="cuda")


def everything() -> dict[str, Found]:
    return {"one piece": step(0), "chunks": step(SIZE)}


def build() -> CLIP:
    """A small ResNet CLIP in float64; its residual branches, which start at zero, are switched on."""
    torch.manual_seed(0)
    image = {"size": 64, "blocks": [1, 1, 1, 1], "width": 4}
    text = {"context": CONTEXT, "vocab": END + 1, "layers": 2, "width": 12, "heads": 2}
    model = CLIP(config_from_dict({"embed_dim": 8, "image": image, "text": text})).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return model


def global_batch() -> tuple[Tensor, Tensor]:
    """(N, 3, 64, 64) uint8 and (N, 10) tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, END, (W * B, CONTEXT), generator=generator)
    tokens[:, 7] = END
    return torch.randint(256, (W * B, 3, 64, 64), generator=generator, dtype=torch.uint8), tokens


class Step(nn.Module):
    """What a training step does between the batch and the loss."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(build()).cuda()
        self.size = size

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        model, size = self.model, self.size
        image_embeddings = encode_in_chunks(model.encode_image, images, Chunks(size, seed=(0,)), model.visual)
        text_embeddings = encode_in_chunks(model.encode_text, tokens, Chunks(size, seed=(1,)), model.transformer)
        own_captions = torch.arange(len(image_embeddings))
        pairs = share(unit_norm(image_embeddings), unit_norm(text_embeddings), own_captions)
        return clip_loss(pairs, model.logit_scale.exp())


def step(size: int) -> Found:
    """This rank's loss on its share, the gradients that DDP averaged, and the statistics after both passes."""
    rank, _ = world()
    images, tokens = (side[rank * B : (rank + 1) * B].cuda() for side in global_batch())
    replica = DistributedDataParallel(Step(size))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in replica.modules())
    loss = replica(images, tokens)
    loss.backward()
    model = replica.module.model
    return Found(
        loss.item(), {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}, buffers(model)
    )


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().cpu().clone() for name, buffer in model.visual.named_buffers()}


def both_ways(similarity: Tensor) -> Tensor:
    target = torch.arange(len(similarity))
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def assert_found(found: list[Found], loss: Tensor, model: CLIP, expected: dict[str, Tensor]) -> None:
    """Compare both ranks with a reference's loss, every gradient, and the buffers that are expected: 1e-8."""
    assert sum(each.loss for each in found) / W == pytest.approx(loss.item(), abs=1e-8)
    for each in found:
        assert each.buffers.keys() == expected.keys()
        for name, parameter in model.named_parameters():
            assert_close(name, each.gradients[name], parameter.grad)
        for name, buffer in expected.items():
            assert_close(name, each.buffers[name], buffer)


def assert_close(name: str, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8, msg=lambda m: f"{name}: {m}")


def test_one_piece(results):
    """Two processes against ``model(images, tokens)`` on the global batch, on the CPU: 1e-8.

    Gradients of every parameter; running mean, running variance and count, as ordinary BatchNorm updates its own.
    """
    model = build()
    before = buffers(model)
    loss = both_ways(model(*global_batch())[0])
    loss.backward()
    after = buffers(model)
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in after)
    assert_found([result["one piece"] for result in results], loss, model, after)


def test_chunks(results):
    """Two processes in chunks against one that takes chunk k of both ranks as one batch, no recomputation: 1e-8.

    Running statistics: one update from the mean and unbiased variance of each norm's inputs, laid end to end by hand.
    """
    model = build()
    before, inputs = buffers(model), keep_inputs(model.visual)
    images, tokens = global_batch()
    parts = [
        model.encode_image(chunk.flatten(0, 1)).unflatten(0, (W, -1))
        for chunk in images.unflatten(0, (W, B)).tensor_split(NUM_CHUNKS, dim=1)
    ]
    image_embeddings = F.normalize(torch.cat(parts, dim=1).flatten(0, 1), dim=-1)
    text_embeddings = F.normalize(model.encode_text(tokens), dim=-1)
    loss = both_ways(model.logit_scale.exp() * image_embeddings @ text_embeddings.T)
    loss.backward()
    after: dict[str, Tensor] = {}
    for name, kept in inputs.items():
        assert len(kept) == NUM_CHUNKS
        values = torch.cat([part.transpose(0, 1).flatten(1) for part in kept], dim=1)
        for kind, value in (("mean", values.mean(dim=1)), ("var", values.var(dim=1, unbiased=True))):
            buffer = f"{name}.running_{kind}"
            after[buffer] = (1 - MOMENTUM) * before[buffer] + MOMENTUM * value
        after[f"{name}.num_batches_tracked"] = torch.tensor(1)
    assert_found([result["chunks"] for result in results], loss, model, after)


def keep_inputs(module: nn.Module) -> dict[str, list[Any]]:
    """Of each BatchNorm by its name, the inputs (n, C, height, width) of each call that follows."""
    inputs: dict[str, list[Any]] = {}
    for name, norm in module.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            inputs[name] = []
            keep = inputs[name].append
            norm.register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0].detach()))
    return inputs
