"""Encoders of the transformers library: what is loaded is what was saved, and what is rebuilt is what was loaded."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.models.tiny_huggingface import (
    IMAGE_MODELS,
    MEAN,
    SIDE,
    STD,
    TEXT,
    TEXT_ENDS,
    TEXT_MODELS,
    VISION,
    VOCAB,
    saved,
)
from train_clip.encoders.encoder import ImageEncoder, Pixels, TextEncoder, image_features, text_features
from train_clip.encoders.huggingface import (
    build_image,
    build_text,
    live_image_encoder,
    live_text_encoder,
    load_image,
    load_text,
)

PLAIN = Pixels(SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
each_image_model = pytest.mark.parametrize("kind", list(IMAGE_MODELS))
each_text_model = pytest.mark.parametrize("kind", list(TEXT_MODELS))


def kept(description: dict[str, Any] | None) -> dict[str, Any]:
    """A description after it lay in a file that is read without executing code."""
    file = io.BytesIO()
    torch.save(description, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tokens() -> dict[str, Tensor]:
    """Three captions of 5, 2 and 4 tokens, padded; ids above the special ones'."""
    ids = torch.randint(5, VOCAB, (3, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    # 1 is the padding of RoBERTa and MPNet, whose positions are counted by it.
    return {"input_ids": ids.where(mask == 1, 1), "attention_mask": mask}


@each_image_model
@torch.no_grad()
def test_image_encoder(kind, tmp_path):
    """Loaded, against the saved model's own feature by hand: equal to 1e-6; rebuilt with its weights: equal."""
    build, by_hand = IMAGE_MODELS[kind]
    model = saved(build, tmp_path, {"size": SIDE, "image_mean": MEAN, "image_std": STD})
    encoder = load_image(str(tmp_path))
    images = torch.randn(2, 3, SIDE, SIDE)
    features = image_features(encoder.module(images))
    torch.testing.assert_close(features, by_hand(model, images), rtol=0, atol=1e-6)
    assert (encoder.width, encoder.size, encoder.mean, encoder.std) == (features.shape[1], SIDE, (*MEAN,), (*STD,))
    again = build_image(kept(encoder.description))
    again.module.load_state_dict(encoder.module.state_dict(), strict=True)
    assert torch.equal(image_features(again.module(images)), features)
    assert summary(again) == summary(encoder)


@each_text_model
@torch.no_grad()
def test_text_encoder(kind, tmp_path):
    """Loaded, against the saved model's own output, averaged by a loop: equal to 1e-6; rebuilt: equal."""
    build, part, context, has_pooler = TEXT_MODELS[kind]
    model = part(saved(build, tmp_path))
    encoder = load_text(str(tmp_path))
    batch = tokens()
    features = text_features(encoder.module(**batch), batch["attention_mask"], average=True)
    expected = model(**batch)
    for row, length in enumerate((5, 2, 4)):
        by_hand = sum(expected.last_hidden_state[row, place] for place in range(length)) / length
        torch.testing.assert_close(features[row], by_hand, rtol=0, atol=1e-6)
    assert (encoder.width, encoder.context, encoder.vocab) == (16, context, VOCAB)
    again = build_text(kept(encoder.description))
    again.module.load_state_dict(encoder.module.state_dict(), strict=True)
    assert torch.equal(text_features(again.module(**batch), batch["attention_mask"], average=True), features)
    assert summary(again) == summary(encoder)
    if has_pooler:
        pooled = text_features(encoder.module(**batch), None, average=False)
        torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=1e-6)


def summary(encoder: ImageEncoder | TextEncoder) -> dict[str, Any]:
    """All fields but the module."""
    return {name: value for name, value in vars(encoder).items() if name != "module"}


@each_text_model
@torch.no_grad()
def test_context(kind, tmp_path):
    """A caption of the whole context passes; where positions are learned, one token more does not."""
    build, _, context, _ = TEXT_MODELS[kind]
    saved(build, tmp_path)
    module = load_text(str(tmp_path)).module
    ids = torch.full((1, context), 7)
    module(input_ids=ids, attention_mask=torch.ones_like(ids))
    if "t5" not in kind:
        longer = torch.full((1, context + 1), 7)
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            module(input_ids=longer, attention_mask=torch.ones_like(longer))


@each_text_model
@torch.no_grad()
def test_padding_to_another_length(kind, tmp_path):
    """The mean over tokens does not know how far a caption is padded: 1e-6."""
    build, _, _, _ = TEXT_MODELS[kind]
    saved(build, tmp_path)
    module = load_text(str(tmp_path)).module
    batch = tokens()
    longer = {name: nn.functional.pad(rows, (0, 6), value=name == "input_ids") for name, rows in batch.items()}
    short, long = (text_features(module(**texts), texts["attention_mask"], True) for texts in (batch, longer))
    torch.testing.assert_close(long, short, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_in_float32(dtype, tmp_path):
    """Each tensor is the file's, widened."""
    model = saved(lambda: hf.BertModel(hf.BertConfig(**TEXT)).to(dtype), tmp_path)
    module = load_text(str(tmp_path)).module
    for name, tensor in model.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor.float()), name
        assert module.state_dict()[name].dtype == torch.float32


def test_live_text_module():
    """A user's own module is described as it stands: with another class, without a pooler, with a longer vocabulary."""
    own = hf.BertModel(hf.BertConfig(**TEXT), add_pooling_layer=False)
    own.resize_token_embeddings(VOCAB + 3)
    projected = hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT, **TEXT_ENDS, projection_dim=8))
    for module in (own, projected):
        module.train()
        description = kept(live_text_encoder(module, average=True).description)
        assert module.training and description["source"] == "hf" and description["name"]
        again = build_text(description)
        again.module.load_state_dict(module.state_dict(), strict=True)
        assert type(again.module) is type(module)
        assert again.vocab == module.get_input_embeddings().num_embeddings


def test_live_image_module():
    """As the text module."""
    module = hf.ViTModel(hf.ViTConfig(**VISION), add_pooling_layer=False)
    description = live_image_encoder(module, PLAIN).description
    again = build_image(kept(description))
    again.module.load_state_dict(module.state_dict(), strict=True)
    assert (again.width, again.size, again.mean, again.std) == (16, SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_a_module_of_no_class_of_the_library():
    """It cannot be described: neither a plain module nor a class of the user's own, whatever its name."""

    class BertModel(hf.BertModel):
        pass

    class ViTModel(hf.ViTModel):
        pass

    class Rows(nn.Module):
        def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
            return input_ids.float()

    for text in (Rows(), BertModel(hf.BertConfig(**TEXT))):
        assert live_text_encoder(text, average=True).description == {}
    for image in (nn.Flatten(), ViTModel(hf.ViTConfig(**VISION))):
        assert live_image_encoder(image, PLAIN).description == {}
