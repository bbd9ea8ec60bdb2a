"""What both towers make of their inputs: bytes or floats, padding or none, and the scores of figure 3."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from train_clip.models.blocks import LayerNorm, attend
from train_clip.models.clip import CLIP, PixelNorm
from train_clip.models.config import config_from_dict

# openai/CLIP, clip.py, the transform that its models were trained with.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
STD = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
CONTEXT, VOCAB = 16, 60
START, END = VOCAB - 2, VOCAB - 1
IMAGES = {"vit": {"size": 32, "patch": 8, "layers": 2, "width": 24, "heads": 3}}
IMAGES["resnet"] = {"size": 32, "blocks": [1, 1, 1, 1], "width": 4}
each_tower = pytest.mark.parametrize("kind", list(IMAGES))


def build(kind: str = "vit") -> CLIP:
    """A small CLIP in float64 whose tensors are all random, biases and gains too."""
    torch.manual_seed(0)
    text = {"context": CONTEXT, "vocab": VOCAB, "layers": 3, "width": 20, "heads": 4}
    model = CLIP(config_from_dict({"embed_dim": 16, "image": IMAGES[kind], "text": text})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def captions(*lengths: int, length: int = CONTEXT, padding: int = 0) -> Tensor:
    """Rows of random tokens between start and end, of the given lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.full((len(lengths), length), padding)
    for row, used in zip(rows, lengths, strict=True):
        row[:used] = torch.randint(1, START, (used,), generator=generator)
        row[0], row[used - 1] = START, END
    return rows


@each_tower
def test_bytes_and_normalised_floats(kind):
    """uint8 pixels, 0 and 255 among them, give what NumPy's (x / 255 - mean) / std gives, in float64: 1e-6."""
    model = build(kind)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    pixels[0, :, 0], pixels[0, :, 1] = 0, 255
    normalised = torch.from_numpy((pixels / 255 - MEAN) / STD)
    with torch.no_grad():
        # The module's constants were float32 before they became float64.
        torch.testing.assert_close(
            model.encode_image(torch.from_numpy(pixels)), model.encode_image(normalised), rtol=0, atol=1e-6
        )


def test_pixel_norm():
    """Each of the 256 values on each channel in float32 against NumPy's float64, 1e-6; floats pass untouched."""
    pixels = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 3, 1, 1))
    out = PixelNorm()(torch.from_numpy(pixels))
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), (pixels / 255 - MEAN) / STD, rtol=0, atol=1e-6)
    floats = torch.randn(2, 3, 4, 4)
    assert PixelNorm()(floats) is floats


@pytest.mark.parametrize("longest", [5, 9, 13])
def test_cut_padding(longest):
    """Captions cut after the longest, against the whole context, in float64: 1e-12."""
    model = build()
    tokens = captions(3, longest, 4)
    assert tokens[:, longest:].eq(0).all() and tokens[:, longest - 1].eq(END).any()
    with torch.no_grad():
        whole, cut = model.encode_text(tokens), model.encode_text(tokens[:, :longest])
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)


def test_nothing_after_the_end_token_counts():
    """Padding of 0, other padding, and each caption alone without any, in float64: 1e-12."""
    model = build()
    lengths = (2, 7, 16, 11)
    with torch.no_grad():
        padded = model.encode_text(captions(*lengths))
        otherwise = model.encode_text(captions(*lengths, padding=9))
        alone = [model.encode_text(row[None, :used]) for row, used in zip(captions(*lengths), lengths, strict=True)]
    torch.testing.assert_close(otherwise, padded, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(alone), padded, rtol=0, atol=1e-12)


def test_every_token_counts():
    """A change of any token up to the end changes the embedding: the two tests above do not compare constants."""
    model = build()
    tokens = captions(8)
    with torch.no_grad():
        before = model.encode_text(tokens)
        for place in range(7):
            other = tokens.clone()
            other[0, place] = 5 if tokens[0, place] != 5 else 6
            assert (model.encode_text(other) - before).abs().max() > 1e-4


def test_gradient_of_cut_padding():
    """Each parameter's gradient with and without the padding, in float64: 1e-12."""
    gradients = []
    for length in (CONTEXT, 9):
        model = build()
        model.encode_text(captions(3, 9, 4)[:, :length]).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12, msg=name)


@each_tower
def test_scores(kind):
    """``forward`` against exp(t) · cosine in plain Python loops (CLIP paper, figure 3), in float64: 1e-12."""
    model = build(kind)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    tokens = captions(5, 9, 4)
    with torch.no_grad():
        by_image, by_text = model(images, tokens)
        rows, columns = model.encode_image(images).tolist(), model.encode_text(tokens).tolist()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            product = math.fsum(a * b for a, b in zip(row, column, strict=True))
            cosine = product / (math.hypot(*row) * math.hypot(*column))
            assert by_image[i, j].item() == pytest.approx(math.exp(model.logit_scale.item()) * cosine, abs=1e-12)
    assert torch.equal(by_image, by_text.T)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 150])
def test_attention(causal, length):
    """softmax(q kᵀ / √E) v, few positions and many, against loops over positions, in float64: 1e-12."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 4, dtype=torch.float64) for _ in range(3))
    out = by_head(attend(*(side_by_side(part) for part in (q, k, v)), heads=2, causal=causal), 2)
    for head in range(2):
        queries, keys, values = (tensor[0, head].tolist() for tensor in (q, k, v))
        for i, query in enumerate(queries):
            seen = i + 1 if causal else length
            weights = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / 2) for key in keys[:seen]]
            columns = zip(*values[:seen], strict=True)
            expected = [
                math.fsum(w * x for w, x in zip(weights, column, strict=True)) / math.fsum(weights)
                for column in columns
            ]
            assert out[0, head, i].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("length", [5, 150])
def test_one_query_over_many_positions(length):
    """The attention pool's single query against softmax(q kᵀ / √E) v in one line, in float64: 1e-12."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, rows, 4, dtype=torch.float64) for rows in (1, length, length))
    expected = torch.einsum("bhl,bhle->bhe", torch.einsum("bhe,bhle->bhl", q[:, :, 0] / 2, k).softmax(-1), v)
    out = by_head(attend(*(side_by_side(part) for part in (q, k, v)), heads=3, causal=False), 3)
    torch.testing.assert_close(out[:, :, 0], expected, rtol=0, atol=1e-12)


def side_by_side(heads: Tensor) -> Tensor:
    """(B, H, L, E) → (B, L, H · E)."""
    return torch.cat(heads.unbind(1), dim=-1)


def by_head(whole: Tensor, heads: int) -> Tensor:
    """And back."""
    return torch.stack(whole.chunk(heads, dim=-1), dim=1)


def test_layer_norm_in_float32():
    """Half-precision input: statistics in float32, against float64's rounded to bfloat16, within one step."""
    torch.manual_seed(0)
    x = (100 + torch.randn(4, 64)).bfloat16()
    norm = LayerNorm(64).bfloat16()
    expected = torch.nn.functional.layer_norm(x.double(), (64,))
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), expected, rtol=2**-8, atol=1e-5)
