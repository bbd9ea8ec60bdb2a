"""The ViT CLIP against Hugging Face's ``CLIPModel`` on the same random weights.

Every tensor is random, biases and gains too: at the initial zeros and ones a misplaced one would not show.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict

SIZE, CONTEXT, VOCAB, EMBED = 32, 12, 70, 20
IMAGE = {"size": SIZE, "patch": 8, "layers": 3, "width": 32, "heads": 4}
TEXT = {"context": CONTEXT, "vocab": VOCAB, "layers": 2, "width": 24, "heads": 3}
START, END = VOCAB - 2, VOCAB - 1

WHOLE_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}
BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def build(activation: str) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(config_from_dict({"embed_dim": EMBED, "image": IMAGE, "text": TEXT, "activation": activation}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under Hugging Face's names: projections transposed, fused ones split into q, k and v."""
    renamed = {}
    for name, tensor in state.items():
        if name in ("visual.proj", "text_projection"):
            side = "visual" if name == "visual.proj" else "text"
            renamed[f"{side}_projection.weight"] = tensor.T
        elif "resblocks" in name:
            before, after = name.split("transformer.resblocks.")
            number, _, rest = after.partition(".")
            layer = f"{'vision' if before else 'text'}_model.encoder.layers.{number}."
            if "in_proj" in rest:
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}self_attn.{letter}_proj.{rest.removeprefix('attn.in_proj_')}"] = part
            else:
                module, _, kind = rest.rpartition(".")
                renamed[f"{layer}{BLOCK_NAMES[module]}.{kind}"] = tensor
        elif name in WHOLE_NAMES:
            renamed[WHOLE_NAMES[name]] = tensor
        else:
            module, _, kind = name.rpartition(".")
            renamed[f"{WHOLE_NAMES[module]}.{kind}"] = tensor
    return renamed


def reference(model: CLIP, activation: str) -> CLIPModel:
    """Hugging Face's model with these weights, loaded strictly."""

    def sizes(part: dict[str, int]) -> dict[str, object]:
        return {
            "hidden_size": part["width"],
            "intermediate_size": 4 * part["width"],
            "num_hidden_layers": part["layers"],
            "num_attention_heads": part["heads"],
            "hidden_act": activation,
            "projection_dim": EMBED,
        }

    text = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": START, "eos_token_id": END}
    config = CLIPConfig(
        text_config=sizes(TEXT) | text | {"pad_token_id": 0},
        vision_config=sizes(IMAGE) | {"image_size": SIZE, "patch_size": IMAGE["patch"]},
        projection_dim=EMBED,
    )
    theirs = CLIPModel(config)
    theirs.load_state_dict(as_transformers(model.state_dict()), strict=True)
    return theirs.eval()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, SIZE, SIZE, generator=generator)
    tokens = torch.randint(1, START, (5, CONTEXT), generator=generator)
    for row, used in zip(tokens, (2, 5, 8, 12, 7), strict=True):
        row[0], row[used - 1], row[used:] = START, END, 0
    return images, tokens


def embeddings(output: object) -> Tensor:
    """An object in transformers 5, the tensor in transformers 4."""
    return getattr(output, "pooler_output", output)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_embeddings_and_scores(activation, dtype, tolerance):
    """Image and text embeddings, and the scaled similarities: 1e-5 in float32, 1e-12 in float64."""
    ours = build(activation).to(dtype)
    theirs = reference(ours, activation).to(dtype)
    images, tokens = inputs()
    images = images.to(dtype)
    image_embeddings, text_embeddings = ours.encode_image(images), ours.encode_text(tokens)
    expected_image = embeddings(theirs.get_image_features(pixel_values=images))
    expected_text = embeddings(theirs.get_text_features(input_ids=tokens))
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(image_embeddings, expected_image, **close)
    torch.testing.assert_close(text_embeddings, expected_text, **close)
    expected = theirs(input_ids=tokens, pixel_values=images)
    scale = ours.logit_scale.exp().item()
    torch.testing.assert_close(ours(images, tokens)[0] / scale, expected.logits_per_image / scale, **close)


@torch.no_grad()
def test_the_two_activations_differ():
    """quick_gelu's weights under gelu give other embeddings: the test above tells the two apart."""
    ours = build("quick_gelu")
    images, _ = inputs()
    other = embeddings(reference(ours, "gelu").get_image_features(pixel_values=images))
    assert (ours.encode_image(images) - other).abs().max() > 1e-3


def test_loss_and_gradient():
    """The symmetric loss and its gradient on both encoders and the temperature, against Hugging Face's in float64."""
    ours = build("quick_gelu").double()
    theirs = reference(ours, "quick_gelu").double()
    images, tokens = inputs()
    images = images.double()
    by_image, by_text = ours(images, tokens)
    target = torch.arange(len(images))
    loss = (
        torch.nn.functional.cross_entropy(by_image, target) + torch.nn.functional.cross_entropy(by_text, target)
    ) / 2
    expected = theirs(input_ids=tokens, pixel_values=images, return_loss=True).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    gradients = as_transformers({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        # A key's bias has no effect on a softmax: its gradient is 0 but for rounding, which only atol forgives.
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)
