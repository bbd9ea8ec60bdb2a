"""Several optimizer steps in micro-batches under a real Trainer, against a loop written by hand.

The loop takes from the package the towers alone. Loss, AdamW, schedule, clipping, accumulation, autocast and gradient
scaling are PyTorch's or a formula.

B  pairs of a batch
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from train_clip import CLIP, CLIPWrapper

B, MINIBATCH = 8, 3
CONTEXT, END = 10, 29
CONFIG = {
    "embed_dim": 8,
    "image": {"size": 16, "patch": 8, "layers": 2, "width": 16, "heads": 2},
    "text": {"context": CONTEXT, "vocab": END + 1, "layers": 2, "width": 12, "heads": 2},
}
RATE, WARMUP_STEPS, DECAY, BETAS = 0.02, 2, 0.1, (0.9, 0.98)
# AdamW divides the gradient by its own size. Beside so large an epsilon it does not, and a gradient that is twice as
# large as it should be (clipping, accumulation, scaling) takes a step twice as long.
EPSILON = 0.5
CLIP_AT = 0.5
CHUNKS = [3, 3, 2]  # a batch of 8, 3 at a time


def steps_and_clips(test: Callable[..., None]) -> Callable[..., None]:
    """Neither clipping nor accumulation, each of them, and both."""
    test = pytest.mark.parametrize("accumulate", [1, 3])(test)
    return pytest.mark.parametrize("clip", [None, CLIP_AT])(test)


def windows(accumulate: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Batches of an epoch, and the number of epochs, that make four steps; windows of 3 of 5 leave one of 2."""
    return (batches(4), 1) if accumulate == 1 else (batches(5), 2)


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    """Different batches of (B, 3, 16, 16) uint8 and (B, 10) tokens, captions of different lengths."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(number):
        tokens = torch.randint(1, END, (B, CONTEXT), generator=generator)
        for row, last in zip(tokens, torch.randint(2, CONTEXT, (B,), generator=generator).tolist(), strict=True):
            row[last], row[last + 1 :] = END, 0
        found.append((torch.randint(256, (B, 3, 16, 16), generator=generator, dtype=torch.uint8), tokens))
    return found


def untrained() -> CLIPWrapper:
    torch.manual_seed(0)
    return CLIPWrapper(
        "small",
        CONFIG,
        MINIBATCH,
        learning_rate=RATE,
        weight_decay=DECAY,
        betas=BETAS,
        eps=EPSILON,
        warmup_steps=WARMUP_STEPS,
    )


def fit(data: list[tuple[Tensor, Tensor]], module: CLIPWrapper, **how: Any) -> list[float]:
    """Train under a Trainer; the loss of every batch."""
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            losses.append(trainer.callback_metrics["train/loss"].item())

    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Losses()], **how,
    )  # fmt: skip
    images, tokens = (torch.cat(side) for side in zip(*data, strict=True))
    trainer.fit(module, DataLoader(TensorDataset(images, tokens), batch_size=B))
    return losses


class ByHand:
    """The loop, and what it met on its way: losses, norms of the gradient before clipping, scales of the gradient.

    Args:
        model: trained in place.
        num_steps: optimizer steps of the run, for the schedule.
        clip: largest norm of the gradient, or None.
        chunks: rows of the parts in which a batch is encoded, nothing being recomputed; None for one piece.
        autocast: what the towers run in.
        scaler: of the gradient, or None.
        fused: whether AdamW is one kernel, as the module's is where there is no scaler.
    """

    def __init__(
        self,
        model: CLIP,
        num_steps: int,
        clip: float | None = None,
        chunks: list[int] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scaler: torch.amp.GradScaler | None = None,
        fused: bool = False,
    ) -> None:
        self.model, self.num_steps, self.clip, self.chunks, self.autocast = model, num_steps, clip, chunks, autocast
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self.parameters = matrices + others
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON, fused=fused)
        self.steps = 0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.scales: list[float] = []

    def epoch(self, data: list[tuple[Tensor, Tensor]], accumulate: int = 1) -> None:
        """Every batch once; a step after each ``accumulate`` batches, and after the last."""
        for number, (images, tokens) in enumerate(data, start=1):
            loss = self.loss(images, tokens)
            self.losses.append(loss.item())
            self.scaler.scale(loss / accumulate).backward()
            if number % accumulate == 0 or number == len(data):
                self.step()

    def loss(self, images: Tensor, tokens: Tensor) -> Tensor:
        with self.autocast():
            image_chunks = images.split(self.chunks or len(images))
            # Captions by their lengths, each chunk without the padding after its longest.
            order = sorted(range(len(tokens)), key=lambda row: int(tokens[row].argmax()))
            text_chunks = [
                chunk[:, : int(chunk.argmax(dim=1).max()) + 1]
                for chunk in tokens[order].split(self.chunks or len(tokens))
            ]
            in_order = torch.cat([self.model.encode_text(chunk) for chunk in text_chunks])
            texts = torch.stack([in_order[order.index(row)] for row in range(len(tokens))])
            sides = [torch.cat([self.model.encode_image(chunk) for chunk in image_chunks]), texts]
        # Everything after the towers in float32, or in float64 where they are.
        wide = torch.promote_types(sides[0].dtype, torch.float32)
        image_embeddings, text_embeddings = (F.normalize(side.to(wide), dim=-1) for side in sides)
        scale, target = self.model.logit_scale.exp(), torch.arange(len(images))
        image_to_text = F.cross_entropy(scale * image_embeddings @ text_embeddings.T, target)
        text_to_image = F.cross_entropy(scale * text_embeddings @ image_embeddings.T, target)
        return (image_to_text + text_to_image) / 2

    def step(self) -> None:
        if self.steps < WARMUP_STEPS:
            share = (self.steps + 1) / WARMUP_STEPS
        else:
            share = 0.5 * (1 + math.cos(math.pi * (self.steps - WARMUP_STEPS) / (self.num_steps - WARMUP_STEPS)))
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * share
        self.scales.append(self.scaler.get_scale())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
        self.norms.append(norm.item())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
        self.steps += 1


def distance(model: nn.Module, other: nn.Module) -> float:
    """Euclidean, between all parameters of the one and all of the other."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return math.sqrt(sum(((a - b).double() ** 2).sum().item() for a, b in pairs))


def assert_weights(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    weights = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(
            parameter, weights[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@steps_and_clips
def test_weights_after_four_steps(clip, accumulate):
    """Clipping, accumulation, both and neither, in float64: every weight and every batch's loss to 1e-10.

    Each gradient's norm is above the clip. Of five batches, windows of three leave one of two at the end of an epoch:
    Lightning steps there too and divides its losses by three all the same, and so does the loop.
    """
    data, num_epochs = windows(accumulate)
    module = untrained()
    loop = ByHand(copy.deepcopy(module.model).double(), num_steps=4, clip=clip)
    losses = fit(
        data, module, max_epochs=num_epochs, precision="64-true", gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    for _ in range(num_epochs):
        loop.epoch(data, accumulate)
    assert loop.steps == 4
    assert min(loop.norms) > CLIP_AT
    assert losses == pytest.approx(loop.losses, abs=1e-10)
    assert_weights(module.model, loop.model, tolerance=1e-10)


class Seeded:
    """Wraps an encoder: keeps the random state that it meets in each call, or sets those that are given, in turn."""

    def __init__(self, encode: Callable[[Tensor], Tensor], given: list[Tensor] | None = None) -> None:
        self.encode = encode
        self.given = iter(given) if given else None
        self.met: list[Tensor] = []

    def __call__(self, rows: Tensor) -> Tensor:
        if self.given:
            torch.set_rng_state(next(self.given))
        self.met.append(torch.get_rng_state())
        return self.encode(rows)

    @property
    def in_forward_passes(self) -> list[Tensor]:
        """The states of three chunks of each batch; those of the three that are recomputed follow them."""
        return [state for number, state in enumerate(self.met) if number % 6 < 3]


def test_weights_with_dropout():
    """Dropout in both towers, in float64, against the loop at the random states of the forward passes: 1e-10.

    No chunk of either tower and of any batch has another's state, whatever the global generator is at.
    """
    data = batches(4)
    module = untrained()
    for tower in (module.model.visual.transformer, module.model.transformer):
        for block in tower.resblocks:
            block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.3))
    loop = ByHand(copy.deepcopy(module.model).double(), num_steps=4, chunks=CHUNKS)
    images, texts = Seeded(module.model.encode_image), Seeded(module.model.encode_text)
    module.model.encode_image, module.model.encode_text = images, texts
    fit(data, module, max_epochs=1, precision="64-true")
    assert len({state.numpy().tobytes() for state in images.met + texts.met}) == 2 * 3 * len(data)
    loop.model.encode_image = Seeded(loop.model.encode_image, images.in_forward_passes)
    loop.model.encode_text = Seeded(loop.model.encode_text, texts.in_forward_passes)
    loop.epoch(data)
    assert_weights(module.model, loop.model, tolerance=1e-10)


@steps_and_clips
def test_bf16(clip, accumulate):
    """Under autocast: as the loop over the same chunks, and near the loop in one piece, to bf16's rounding.

    In one piece the gradient of a weight is rounded once, in chunks each chunk's. Each rounding is off by 2^-8 at most
    (bf16 has 8 significant bits), and there are four steps: after them the two lie within 2^-6 of the way travelled.
    From the loop over chunks, which rounds at the same places, the module is off by less than a hundredth of that
    difference. Both take the fused AdamW: the last bits of other kernels turn a weight's rounding to bf16.
    """
    data, num_epochs = windows(accumulate)
    module = untrained()
    start = copy.deepcopy(module.model)
    in_bf16 = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    chunks, one_piece = (ByHand(copy.deepcopy(start), 4, clip, parts, in_bf16, fused=True) for parts in (CHUNKS, None))
    losses = fit(
        data, module, max_epochs=num_epochs, precision="bf16-mixed", gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    for _ in range(num_epochs):
        chunks.epoch(data, accumulate)
        one_piece.epoch(data, accumulate)
    assert losses == pytest.approx(chunks.losses, rel=1e-5)
    assert min(chunks.norms) > CLIP_AT
    rounding = distance(chunks.model, one_piece.model)
    assert 0 < rounding < 2**-6 * distance(start, one_piece.model)
    assert distance(module.model, chunks.model) < 0.01 * rounding


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("first_scale", [2.0**10, 2.0**20])
@steps_and_clips
def test_fp16(clip, accumulate, first_scale):
    """With a gradient scaler: the bits of the loop over the same chunks, and near the loop in one piece.

    As in ``test_bf16``; fp16 has 11 significant bits, so that the two lie within 2^-9 of the way after four steps.

    At a first scale of 2^20 the first gradient overflows: its step is left out, the scale goes down to 2^10, and the
    schedule goes on, as Lightning has it. After two steps without overflow the scale doubles.
    """
    data, num_epochs = windows(accumulate)
    module = untrained()
    start = copy.deepcopy(module.model)
    scalers = [
        torch.amp.GradScaler("cpu", init_scale=first_scale, backoff_factor=2**-10, growth_interval=2) for _ in range(3)
    ]
    chunks, one_piece = (
        ByHand(
            copy.deepcopy(start), 4, clip, parts,
            lambda: torch.autocast("cpu", torch.float16, cache_enabled=False), scaler,
        )
        for parts, scaler in zip((CHUNKS, None), scalers[1:], strict=True)
    )  # fmt: skip
    losses = fit(
        data, module, max_epochs=num_epochs, plugins=[MixedPrecision("16-mixed", "cpu", scalers[0])],
        gradient_clip_val=clip, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    for _ in range(num_epochs):
        chunks.epoch(data, accumulate)
        one_piece.epoch(data, accumulate)
    overflows = first_scale == 2**20
    assert chunks.scales == ([2**20, 2**10, 2**10, 2**11] if overflows else [2**10, 2**10, 2**11, 2**11])
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert math.isfinite(chunks.norms[0]) != overflows
    assert min(chunks.norms[1:]) > CLIP_AT
    assert losses == chunks.losses
    assert_weights(module.model, chunks.model, tolerance=0)
    # Not 0: the module did encode in chunks.
    assert 0 < distance(module.model, one_piece.model) < 2**-9 * distance(start, one_piece.model)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_learns(precision):
    """Twenty steps on one batch, clipped: from above a guess among eight, log 8, to well below; weights are float32."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if precision == "16-mixed" else None
    module = untrained()
    plugin = MixedPrecision(precision, "cpu", scaler)
    losses = fit(batches(1), module, max_epochs=20, plugins=[plugin], gradient_clip_val=20.0)
    assert losses[0] > math.log(B)
    assert losses[-1] < 0.8 * math.log(B)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
