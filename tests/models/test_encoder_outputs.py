"""Which of an encoder's outputs is the feature, and the mean over a caption's tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train_clip.encoders.encoder import image_features, text_features
from train_clip.errors import UserError
from train_clip.evaluation.embed import evaluating


def test_image_tensor():
    """(B, D) is the same tensor, (B, D, 1, 1) loses two axes."""
    rows = torch.randn(3, 5)
    assert image_features(rows) is rows
    assert torch.equal(image_features(rows[:, :, None, None]), rows)


@pytest.mark.parametrize("shape", [(3,), (3, 5, 2), (3, 5, 2, 2), (3, 5, 1, 2)])
def test_image_tensor_of_another_shape(shape):
    """The message gives the shape, (B, D), and what to do."""
    with pytest.raises(UserError, match=r"expected \(B, D\).*Remove or replace the head") as failure:
        image_features(torch.zeros(shape))
    assert str(shape) in str(failure.value)


def test_image_output_by_rank():
    """``image_embeds`` before ``pooler_output`` before ``last_hidden_state``; None is as good as absent."""
    embeds, pooled, hidden = torch.randn(2, 3), torch.randn(2, 4, 1, 1), torch.randn(2, 7, 5)
    output = SimpleNamespace(image_embeds=embeds, pooler_output=pooled, last_hidden_state=hidden)
    assert image_features(output) is embeds
    output.image_embeds = None
    assert torch.equal(image_features(output), pooled[:, :, 0, 0])
    output.pooler_output = None
    assert torch.equal(image_features(output), hidden[:, 0])


def test_mean_over_space():
    """(B, C, H, W) against loops over places, in float64: 1e-12."""
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    features = image_features(SimpleNamespace(pooler_output=None, last_hidden_state=maps))
    for b in range(2):
        for c in range(3):
            places = [maps[b, c, h, w].item() for h in range(4) for w in range(5)]
            assert features[b, c].item() == pytest.approx(math.fsum(places) / 20, abs=1e-12)


@pytest.mark.parametrize("output", [(torch.zeros(1, 2),), {"logits": 1}, SimpleNamespace(last_hidden_state=None), None])
def test_image_output_of_no_known_kind(output):
    """The message names the type."""
    with pytest.raises(UserError, match=rf"gives {type(output).__name__}; expected a tensor"):
        image_features(output)


def test_masked_mean():
    """Against a loop over the tokens of each caption, in float64: 1e-12; the mask as numbers and as bool."""
    hidden = torch.randn(4, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]])
    features = text_features(SimpleNamespace(last_hidden_state=hidden), mask, average=True)
    for row, tokens in enumerate(mask.tolist()):
        for column in range(3):
            kept = [hidden[row, place, column].item() for place, token in enumerate(tokens) if token]
            assert features[row, column].item() == pytest.approx(math.fsum(kept) / len(kept), abs=1e-12)
    assert torch.equal(text_features(SimpleNamespace(last_hidden_state=hidden), mask.bool(), average=True), features)


def test_mean_without_mask():
    """No mask: all are tokens."""
    hidden = torch.randn(2, 3, 4)
    output = SimpleNamespace(last_hidden_state=hidden)
    expected = text_features(output, torch.ones(2, 3), average=True)
    torch.testing.assert_close(text_features(output, None, average=True), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("padding", [0.0, 7.0, math.nan, math.inf])
def test_padding_changes_nothing(padding):
    """Whatever stands in the padding, NaN too, value and gradient are those of the caption alone."""
    short = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    text_features(SimpleNamespace(last_hidden_state=short), torch.ones(1, 3), average=True).square().sum().backward()
    long = torch.cat([short.detach(), torch.full((1, 5, 4), padding, dtype=torch.float64)], dim=1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    features = text_features(SimpleNamespace(last_hidden_state=long), mask, average=True)
    features.square().sum().backward()
    torch.testing.assert_close(features, short.mean(dim=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(long.grad[:, :3], short.grad, rtol=0, atol=1e-12)
    assert long.grad[:, 3:].eq(0).all()


def test_a_caption_without_a_token():
    """A row that is masked whole gives zeros, and no gradient that is not a number."""
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    features = text_features(SimpleNamespace(last_hidden_state=hidden), mask, average=True)
    features.sum().backward()
    assert features[0].eq(0).all() and features[1].ne(0).all()
    assert hidden.grad.isfinite().all()


def test_half_precision_is_averaged_in_float32():
    """300 times 256 in float16 overflows as a sum; the mean is 256, in float32."""
    output = SimpleNamespace(last_hidden_state=torch.full((1, 300, 1), 256.0, dtype=torch.float16))
    features = text_features(output, torch.ones(1, 300), average=True)
    assert features.dtype == torch.float32 and features.item() == 256


def test_text_output_by_rank():
    """A tensor is taken as it is; without ``average``, ``text_embeds`` before ``pooler_output``."""
    rows, embeds, pooled = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 5)
    assert text_features(rows, None, average=True) is rows
    output = SimpleNamespace(text_embeds=embeds, pooler_output=pooled)
    assert text_features(output, None, average=False) is embeds
    output.text_embeds = None
    assert text_features(output, None, average=False) is pooled


def test_text_output_of_no_known_kind():
    """Each message names the argument that would do."""
    hidden_only = SimpleNamespace(last_hidden_state=torch.zeros(1, 2, 3))
    with pytest.raises(UserError, match=r"without text_embeds or pooler_output.*avg_word_embs=True"):
        text_features(hidden_only, None, average=False)
    with pytest.raises(UserError, match=r"without last_hidden_state.*avg_word_embs=False"):
        text_features(SimpleNamespace(pooler_output=torch.zeros(1, 2)), None, average=True)
    with pytest.raises(UserError, match=r"shape \(1, 2, 3\); expected \(B, D\)"):
        text_features(torch.zeros(1, 2, 3), None, average=False)


def test_evaluating_gives_each_part_its_mode_back():
    """A part that is held in eval mode stays there, also when the block fails."""
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    module.train()
    module[1].eval()
    with pytest.raises(RuntimeError), evaluating(module):
        assert not module[0].training and not torch.is_grad_enabled()
        raise RuntimeError
    assert module.training and module[0].training and not module[1].training and torch.is_grad_enabled()
