"""Encoding in chunks against one plain pass, or against the same chunks without checkpointing, in float64.

B  rows of the batch      n_k  rows of chunk k
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from train_clip.losses import Pairs
from train_clip.losses.softmax import clip_loss
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.training.encode import Chunks, encode_in_chunks

SEED = (3, 1, 0)
B = 8
IMAGES = {
    "vit": {"size": 16, "patch": 8, "layers": 2, "width": 16, "heads": 2},
    "resnet": {"size": 64, "blocks": [1, 1, 1, 1], "width": 2},
}
# Sizes that divide 8, that do not, the batch itself and more, and 0 for all at once.
every_size = pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 0])


def build(kind: str = "vit") -> CLIP:
    """A small CLIP in float64; the residual branches of a ResNet are switched on."""
    torch.manual_seed(0)
    text = {"context": 10, "vocab": 30, "layers": 2, "width": 12, "heads": 2}
    model = CLIP(config_from_dict({"embed_dim": 8, "image": IMAGES[kind], "text": text})).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return model


def batch(size: int) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) uint8 and (B, 10) tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 28, (B, 10), generator=generator)
    for row, used in zip(tokens, (3, 10, 5, 7, 4, 10, 6, 8), strict=True):
        row[used - 1], row[used:] = 29, 0
    return torch.randint(256, (B, 3, size, size), generator=generator, dtype=torch.uint8), tokens


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@every_size
def test_gradient_is_the_full_batch(size):
    """Loss and every parameter's gradient, the temperature's too, against one plain backward pass: 1e-12."""
    images, tokens = batch(16)
    chunked, plain = build(), build()
    sides = (
        encode_in_chunks(chunked.encode_image, images, Chunks(size, seed=(*SEED, 0)), chunked.visual),
        encode_in_chunks(chunked.encode_text, tokens, Chunks(size, seed=(*SEED, 1)), chunked.transformer),
    )
    image_embeddings, text_embeddings = (F.normalize(side, dim=-1) for side in sides)
    pairs = Pairs(image_embeddings, text_embeddings, image_embeddings, text_embeddings)
    loss = clip_loss(pairs, chunked.logit_scale.exp())
    loss.backward()

    similarity = plain(images, tokens)[0]
    target = torch.arange(B)
    expected = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert plain.logit_scale.grad.abs() > 1e-3
    assert_equal(gradients(chunked), gradients(plain))
    assert len(gradients(plain)) == len(list(plain.parameters()))


class Recorder:
    """Wraps an encoder and keeps, call by call, the rows and the random state that it was given."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode = encode
        self.rows: list[Tensor] = []
        self.states: list[Tensor] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.rows.append(rows)
        self.states.append(torch.get_rng_state())
        return self.encode(rows)

    @property
    def lengths(self) -> list[int]:
        return [len(rows) for rows in self.rows]


def mlp(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Linear(5, 12), nn.Dropout(dropout), nn.Tanh()]
    return nn.Sequential(*first, nn.Linear(12, 12), nn.Dropout(dropout), nn.Linear(12, 4)).double()


def rows() -> Tensor:
    return torch.randn(B, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def head(embeddings: Tensor) -> Tensor:
    """A scalar in which every row meets every other, as in the contrastive loss."""
    return (embeddings @ embeddings.T).logsumexp(dim=1).sum() + embeddings.sin().sum()


@pytest.mark.parametrize(("size", "chunks"), [(3, [3, 3, 2]), (4, [4, 4]), (5, [4, 4]), (1, [1] * 8)])
def test_each_chunk_is_encoded_twice(size, chunks):
    """Once forward in order, once more in the backward pass: nothing but embeddings is kept between the two."""
    encoder = mlp()
    recorder = Recorder(encoder)
    loss = head(encode_in_chunks(recorder, rows(), Chunks(size, seed=SEED), encoder))
    assert recorder.lengths == chunks
    loss.backward()
    assert sorted(recorder.lengths) == sorted(2 * chunks)


@pytest.mark.parametrize("size", [0, 8, 100])
def test_whole_batch_is_encoded_once(size):
    """A chunk as large as the batch is not recomputed."""
    encoder = mlp()
    recorder = Recorder(encoder)
    head(encode_in_chunks(recorder, rows(), Chunks(size, seed=SEED), encoder)).backward()
    assert recorder.lengths == [B]


def test_no_activation_outlives_its_chunk():
    """Storages of layers' outputs that are alive after the forward pass: some in one piece, none in chunks."""

    def num_alive(size: int) -> int:
        encoder, outputs = mlp(), []
        for layer in encoder:
            layer.register_forward_hook(lambda _, __, output: outputs.append(StorageWeakRef(output.untyped_storage())))
        embeddings = encode_in_chunks(encoder, rows(), Chunks(size, seed=SEED), encoder)
        assert embeddings.requires_grad and outputs
        return sum(not storage.expired() for storage in outputs)

    assert num_alive(0) > 1
    assert num_alive(2) == 0


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_dropout(size):
    """Against a loop over the same chunks at the same random states without checkpointing: 1e-12.

    The states are those that the encoder met in the forward pass; the recomputation has to meet them again.
    """
    chunked = mlp(dropout=0.4)
    recorder = Recorder(chunked)
    embeddings = encode_in_chunks(recorder, rows(), Chunks(size, seed=SEED), chunked)
    states = list(recorder.states)
    # What happens between the passes must not matter.
    torch.manual_seed(99)
    torch.rand(7)
    head(embeddings).backward()

    plain = mlp(dropout=0.4)
    parts = []
    for chunk, state in zip(rows().tensor_split(math.ceil(B / size)), states, strict=True):
        torch.set_rng_state(state)
        parts.append(plain(chunk))
    expected = torch.cat(parts)
    head(expected).backward()
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-12)
    assert_equal(gradients(chunked), gradients(plain))
    assert (embeddings - mlp()(rows())).abs().max() > 0.01


def test_random_state_follows_the_seed_and_the_chunk():
    """Equal seeds give equal dropout wherever the global generator stands; other seeds and other chunks do not."""

    def encode(seed: tuple[int, ...]) -> Tensor:
        encoder = mlp(dropout=0.5)
        return encode_in_chunks(encoder, torch.ones(4, 5, dtype=torch.float64), Chunks(2, seed=seed), encoder)

    first = encode((1, 2))
    torch.rand(3)
    assert torch.equal(encode((1, 2)), first)
    assert not torch.equal(encode((1, 3)), first)
    assert not torch.equal(encode((2, 1)), first)
    assert not torch.equal(first[:2], first[2:])


class Convolutional(nn.Module):
    """Two BatchNorms over maps and one over rows, with dropout between; the last one's inputs depend on the first's."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(2, 3, 3)
        self.bn1 = nn.BatchNorm2d(3, momentum=momentum)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.bn2 = nn.BatchNorm2d(4, momentum=momentum)
        self.linear = nn.Linear(4, 5)
        self.bn3 = nn.BatchNorm1d(5, momentum=momentum)
        self.out = nn.Linear(5, 3)
        self.double()
        with torch.no_grad():
            for norm in self.norms():
                norm.weight.uniform_(0.5, 1.5)
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)

    def norms(self) -> list[nn.Module]:
        return [self.bn1, self.bn2, self.bn3]

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).tanh().mean((2, 3))
        return self.out(self.bn3(self.linear(x)).tanh())


def pictures(seed: int = 3) -> Tensor:
    return torch.randn(B, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def loop(encoder: nn.Module, batch: Tensor, size: int) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The chunks one after another without checkpointing, and by hand the mean and variance of each norm's inputs.

    Mean and unbiased variance are those of all chunks' inputs laid end to end.
    """
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in encoder.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            inputs[name] = []
            keep = inputs[name].append
            handles.append(module.register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0].detach())))
    embeddings = torch.cat([encoder(chunk) for chunk in batch.tensor_split(math.ceil(len(batch) / size))])
    for handle in handles:
        handle.remove()
    moments = {}
    for name, parts in inputs.items():
        values = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
        moments[name] = (values.mean(dim=1), values.var(dim=1, unbiased=True))
    return embeddings, moments


@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
def test_batch_norm(size, momentum):
    """Embeddings and gradients against the plain loop, running statistics against the inputs' by hand: 1e-12.

    One update a batch of mean, unbiased variance and count, in the forward pass; none in the recomputation.
    """
    encoder, plain = Convolutional(momentum), Convolutional(momentum)
    expected, moments = loop(plain, pictures(), size)
    head(expected).backward()
    before = buffers(encoder)
    embeddings = encode_in_chunks(encoder, pictures(), Chunks(size, seed=SEED), encoder)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-12)
    share = 1.0 if momentum is None else momentum
    after = {}
    for name, (mean, variance) in moments.items():
        after[f"{name}.running_mean"] = (1 - share) * before[f"{name}.running_mean"] + share * mean
        after[f"{name}.running_var"] = (1 - share) * before[f"{name}.running_var"] + share * variance
        after[f"{name}.num_batches_tracked"] = torch.tensor(1)
    assert_equal(buffers(encoder), after)
    head(embeddings).backward()
    assert_equal(gradients(encoder), gradients(plain))
    assert_equal(buffers(encoder), after)
    assert [norm.momentum for norm in encoder.norms()] == 3 * [momentum]
    assert not any(norm._forward_pre_hooks for norm in encoder.norms())


@pytest.mark.parametrize("momentum", [0.2, None])
def test_batch_norm_over_several_steps(momentum):
    """Three steps of different batches: running statistics by hand, the plain mean of the three where momentum is None.

    Backward passes lie in between, so that what a recomputation leaves behind would show in the next step: 1e-12.
    """
    encoder, plain = Convolutional(momentum), Convolutional(momentum)
    expected = {name: buffer for name, buffer in buffers(encoder).items() if "num" not in name}
    for step in range(1, 4):
        _, moments = loop(plain, pictures(step), 3)
        share = 1 / step if momentum is None else momentum
        for name, (mean, variance) in moments.items():
            for kind, value in (("running_mean", mean), ("running_var", variance)):
                expected[f"{name}.{kind}"] = (1 - share) * expected[f"{name}.{kind}"] + share * value
        head(encode_in_chunks(encoder, pictures(step), Chunks(3, seed=SEED), encoder)).backward()
    found = buffers(encoder)
    assert {int(found[name]) for name in found if "num" in name} == {3}
    assert_equal({name: found[name] for name in expected}, expected)


def test_batch_norm_of_a_resnet():
    """CLIP's own ResNet in chunks of 3: gradients against the loop, one count of batches: 1e-10."""
    images, _ = batch(64)
    model, plain = build("resnet"), build("resnet")
    expected = torch.cat([plain.encode_image(chunk) for chunk in images.split(3)])
    head(F.normalize(expected, dim=-1)).backward()
    embeddings = encode_in_chunks(model.encode_image, images, Chunks(3, seed=SEED), model.visual)
    head(F.normalize(embeddings, dim=-1)).backward()
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-12)
    assert_equal(gradients(model), gradients(plain), tolerance=1e-10)
    assert {int(buffer) for name, buffer in model.named_buffers() if "num_batches" in name} == {1}


def test_batch_norm_in_one_piece():
    """A batch that is one chunk goes through BatchNorm as without us: buffers and gradients bit for bit."""
    encoder, plain = Convolutional(), Convolutional()
    head(encode_in_chunks(encoder, pictures(), Chunks(B, seed=SEED), encoder)).backward()
    head(plain(pictures())).backward()
    assert_equal(buffers(encoder), buffers(plain), tolerance=0)
    assert_equal(gradients(encoder), gradients(plain), tolerance=0)


def test_batch_norm_in_eval_mode():
    """Eval mode: one pass's embeddings and gradients (1e-12), buffers untouched."""
    encoder, plain = Convolutional().eval(), Convolutional().eval()
    before = buffers(encoder)
    embeddings = encode_in_chunks(encoder, pictures(), Chunks(3, seed=SEED), encoder)
    expected = plain(pictures())
    head(embeddings).backward()
    head(expected).backward()
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-12)
    assert_equal(gradients(encoder), gradients(plain))
    assert_equal(buffers(encoder), before, tolerance=0)


def test_frozen_norm_among_training_ones():
    """One norm in eval mode keeps its buffers, its neighbours get their one update: 1e-12."""
    encoder, plain = Convolutional(), Convolutional()
    encoder.bn1.eval()
    plain.bn1.eval()
    before = buffers(encoder)
    _, moments = loop(plain, pictures(), 3)
    head(encode_in_chunks(encoder, pictures(), Chunks(3, seed=SEED), encoder)).backward()
    after = buffers(encoder)
    for kind in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(after[f"bn1.{kind}"], before[f"bn1.{kind}"])
    torch.testing.assert_close(
        after["bn2.running_mean"], 0.9 * before["bn2.running_mean"] + 0.1 * moments["bn2"][0], rtol=0, atol=1e-12
    )


def test_norm_that_the_encoder_does_not_run():
    """A norm that belongs to the module and sees no input keeps its buffers, as without chunks."""
    encoder = Convolutional()
    encoder.unused = nn.BatchNorm2d(6).double()
    before = buffers(encoder.unused)
    head(encode_in_chunks(encoder, pictures(), Chunks(3, seed=SEED), encoder)).backward()
    assert_equal(buffers(encoder.unused), before, tolerance=0)


def test_norm_without_running_statistics():
    """``track_running_stats=False``: the loop's embeddings and gradients: 1e-12."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).double()

    # Eight rows in chunks of 3 end with two; BatchNorm refuses a chunk of one.
    encoder, plain = make(), make()
    embeddings = encode_in_chunks(encoder, rows(), Chunks(3, seed=SEED), encoder)
    expected, _ = loop(plain, rows(), 3)
    head(embeddings).backward()
    head(expected).backward()
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-12)
    assert_equal(gradients(encoder), gradients(plain))


def test_running_variance_beside_a_large_mean():
    """Inputs of mean 300 and deviation 0.5 in float32: the pooled variance within 1% of float64's."""
    generator = torch.Generator().manual_seed(0)
    inputs = 300 + 0.5 * torch.randn(64, 6, generator=generator)
    encoder = nn.Sequential(nn.BatchNorm1d(6, momentum=1.0))
    encode_in_chunks(encoder, inputs.requires_grad_(), Chunks(16, seed=SEED), encoder)
    expected = inputs.double().var(dim=0)
    torch.testing.assert_close(encoder[0].running_var.double(), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [3, 0])
def test_without_gradient(training, size):
    """Under ``no_grad``, in either mode, the embeddings and buffers of the same call with gradient: equal bits."""
    encoder, reference = Convolutional().train(training), Convolutional().train(training)
    recorder = Recorder(encoder)
    with torch.no_grad():
        embeddings = encode_in_chunks(recorder, pictures(), Chunks(size, seed=SEED), encoder)
    assert not embeddings.requires_grad
    assert max(recorder.lengths) == (size or B)
    assert torch.equal(embeddings, encode_in_chunks(reference, pictures(), Chunks(size, seed=SEED), reference))
    assert_equal(buffers(encoder), buffers(reference), tolerance=0)


def test_encoder_that_fails_leaves_no_trace():
    """An error inside a chunk passes through, and momenta and hooks are as before."""
    encoder = Convolutional(0.3)

    def fail(chunk: Tensor) -> Tensor:
        encoder(chunk)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        encode_in_chunks(fail, pictures(), Chunks(3, seed=SEED), encoder)
    assert [norm.momentum for norm in encoder.norms()] == 3 * [0.3]
    assert not any(norm._forward_pre_hooks for norm in encoder.norms())
