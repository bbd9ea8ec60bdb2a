"""open_clip's own models and files, read here, and ours read by open_clip. Skipped where open_clip is not installed.

It is no requirement of this package: run it with an environment that has open_clip_torch, torchvision and pytest,

    PYTHONPATH=. PEER/bin/python -m pytest tests/parity/test_open_clip.py

Every tensor is random, gains, biases and running statistics too.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed; nothing here was compared")

from open_clip.factory import get_model_config  # noqa: E402
from open_clip.model import resize_pos_embed, resize_text_pos_embed  # noqa: E402
from open_clip.push_to_hf_hub import save_for_hf  # noqa: E402

from train_clip import load  # noqa: E402
from train_clip.checkpoints.found import resize_image_positions, resize_text_positions  # noqa: E402
from train_clip.commands.convert import write_model  # noqa: E402
from train_clip.errors import UserError  # noqa: E402
from train_clip.models.clip import CLIP  # noqa: E402
from train_clip.models.config import config_from_dict  # noqa: E402

EMBED, CONTEXT, VOCAB = 20, 13, 49408
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PHOTOS = Path("/work/shared/data/photos")
TEXT = {"context_length": CONTEXT, "vocab_size": VOCAB, "width": 24, "heads": 3, "layers": 2}
VIT = {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8}
WIDE = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}
MODELS = {
    "ViT": {"vision_cfg": VIT},
    "ViT-quickgelu": {"vision_cfg": VIT, "quick_gelu": True},
    "ViT-64": {"vision_cfg": WIDE},
    "ViT-custom": {"vision_cfg": VIT, "custom_text": True},
    "ViT-custom-quickgelu": {"vision_cfg": VIT, "custom_text": True, "quick_gelu": True},
    "ViT-nonscalar": {"vision_cfg": VIT, "nonscalar_logit_scale": True, "init_logit_scale": 2.0},
    "ViT-bias": {"vision_cfg": VIT, "init_logit_bias": -10.0, "init_logit_scale": 2.3},
    "ViT-custom-bias": {"vision_cfg": VIT, "custom_text": True, "init_logit_bias": 0.0},
    "ViT-nonscalar-bias": {"vision_cfg": VIT, "nonscalar_logit_scale": True, "init_logit_bias": -10.0},
    "RN": {"vision_cfg": RESNET},
    "RN-quickgelu": {"vision_cfg": RESNET, "quick_gelu": True},
    "RN-custom": {"vision_cfg": RESNET, "custom_text": True},
}
# The same sizes in the form of this package's YAML files, which weights without a configuration need.
SIZES = {
    "ViT": {"size": 32, "patch": 8, "layers": 3, "width": 48, "heads": 3},
    "WIDE": {"size": 32, "patch": 16, "layers": 2, "width": 128, "heads": 2},
    "RN": {"size": 64, "blocks": [1, 2, 1, 1], "width": 8},
}
OUR_TEXT = {"context": CONTEXT, "vocab": VOCAB, "layers": 2, "width": 24, "heads": 3}


def register(folder: Path, name: str, config: dict[str, object]) -> str:
    """A model configuration of one's own, by the name that open_clip then knows it by."""
    name = f"parity-{name}"
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"embed_dim": EMBED, "text_cfg": TEXT, **config}))
    open_clip.add_model_config(path)
    return name


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand_like(tensor))
        elif name.endswith("weight") and tensor.ndim == 1:
            tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
        elif tensor.is_floating_point() and tensor.ndim < 3:
            tensor += 0.1 * torch.randn_like(tensor)


@pytest.fixture
def theirs(tmp_path):
    """Makes a random model of open_clip's: name → model, known to open_clip by the name "parity-…"."""

    def make(name: str, config: dict[str, object] | None = None, **choices: object) -> nn.Module:
        model = open_clip.create_model(register(tmp_path, name, config or MODELS[name]), **choices)
        randomize(model)
        return model.eval()

    return make


def our_model(kind: str = "ViT", **other: object) -> CLIP:
    torch.manual_seed(1)
    values = {"name": "ours", "embed_dim": EMBED, "image": SIZES[kind], "text": OUR_TEXT} | other
    model = CLIP(config_from_dict(values))
    randomize(model)
    return model.eval()


def inputs(size: int, context: int = CONTEXT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4, 3, size, size, generator=generator)
    tokens = torch.randint(1, VOCAB - 2, (4, context), generator=generator)
    for row, end in zip(tokens, (1, 4, 8, context - 1), strict=True):
        row[0], row[end], row[end + 1 :] = VOCAB - 2, VOCAB - 1, 0
    return images, tokens


@torch.no_grad()
def check_equal(ours: CLIP, theirs: nn.Module, size: int, context: int = CONTEXT) -> None:
    """Features and logits within 1e-5, the temperature to the bit, and the bias where there is one."""
    images, tokens = inputs(size, context)
    torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), **CLOSE)
    torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), **CLOSE)
    assert torch.equal(ours.logit_scale, theirs.logit_scale.reshape(()))
    assert (ours.logit_bias is None) == (theirs.logit_bias is None)
    if ours.logit_bias is not None:
        assert torch.equal(ours.logit_bias, theirs.logit_bias.reshape(()))
    for one, other in zip(ours(images, tokens), theirs.get_logits(images, tokens), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert (ours.image_size, ours.context_length, ours.embed_dim) == (size, context, EMBED)


def size_of(name: str) -> int:
    return MODELS[name]["vision_cfg"]["image_size"]


def activation_of(name: str) -> str:
    return "quick_gelu" if MODELS[name].get("quick_gelu") else "gelu"


def sizes_file(folder: Path, name: str) -> str:
    kind = "WIDE" if name == "ViT-64" else name.partition("-")[0]
    path = folder / "sizes.yaml"
    path.write_text(json.dumps({"embed_dim": EMBED, "image": SIZES[kind], "text": OUR_TEXT}))
    return str(path)


def settings(name: str) -> dict[str, object]:
    return get_model_config(f"parity-{name}")


class NoTokenizer:
    """Stands for the tokenizer that save_for_hf saves with a model."""

    def save_pretrained(self, folder: Path) -> None:
        """Nothing: the tokenizer is CLIP's."""


def save_state_dict(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def save_training(model: nn.Module, path: Path) -> None:
    """As its training saves it (open_clip_train/main.py): from several processes, with the optimizer and a scaler."""
    optimizer = torch.optim.AdamW(copy.deepcopy(model).parameters())
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    scaler = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }
    torch.save(
        {"epoch": 4, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict(), "scaler": scaler}, path
    )


SAVED = {"state dict": save_state_dict, "training": save_training}


@pytest.mark.parametrize("how", SAVED)
@pytest.mark.parametrize("name", MODELS)
def test_their_weights_alone(name, how, theirs, tmp_path):
    """Weights that do not say what they are: what they leave open is asked for, and with it the features are theirs."""
    model = theirs(name)
    path = tmp_path / "epoch_4.pt"
    SAVED[how](model, path)
    sizes = sizes_file(tmp_path, name)
    with pytest.raises(UserError, match="--model_name"):
        load(path)
    with pytest.raises(UserError, match="--activation"):
        load(path, model_name=sizes)
    found = load(path, model_name=sizes, activation=activation_of(name))
    check_equal(found.model, model, size_of(name))


@pytest.mark.parametrize("safe", [True, False, "both"])
@pytest.mark.parametrize("name", MODELS)
def test_their_folder(name, safe, theirs, tmp_path):
    """save_for_hf's folder says all there is to say: no choice is needed, the features are theirs."""
    model = theirs(name)
    folder = tmp_path / "folder"
    save_for_hf(model, NoTokenizer(), settings(name), str(folder), safe_serialization=safe)
    found = load(folder)
    check_equal(found.model, model, size_of(name))
    assert found.model.config.activation == activation_of(name)


def test_their_colours(theirs, tmp_path):
    """Mean and deviation of one's own, in the folder: the tensors of a picture are theirs to the bit."""
    theirs("ViT")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    choices = {"image_mean": mean, "image_std": std}
    model, _, their_preprocess = open_clip.create_model_and_transforms("parity-ViT", **choices)
    save_for_hf(model, NoTokenizer(), settings("ViT"), str(tmp_path / "folder"))
    picture = noise(57, 41)
    assert torch.equal(load(tmp_path / "folder").preprocess(picture), their_preprocess(picture))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_fp16"])
def test_their_half_precision(precision, theirs, tmp_path):
    """A model of theirs in 16 bits, in a folder: its float32."""
    model = theirs("ViT", precision=precision)
    save_for_hf(model, NoTokenizer(), settings("ViT"), str(tmp_path / "folder"))
    check_equal(load(tmp_path / "folder").model, model.float(), 32)


# Settings of the two towers by which open_clip builds another function, several of them of the same tensors.
OTHER_TOWERS = [
    {"vision_cfg": VIT | {"no_ln_pre": True}},
    {"vision_cfg": VIT | {"pool_type": "avg"}},
    {"vision_cfg": VIT | {"final_ln_after_pool": True}},
    {"vision_cfg": VIT | {"mlp_ratio": 2.0}},
    {"vision_cfg": VIT | {"ls_init_value": 0.1}},
    {"vision_cfg": VIT | {"pos_embed_type": "sin_cos_2d"}},
    {"vision_cfg": VIT | {"norm_kwargs": {"eps": 1e-2}}},
    {"vision_cfg": VIT | {"act_kwargs": {"approximate": "tanh"}}},
    {"vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 4}},
    {"vision_cfg": VIT | {"scale_attn": True}},
    {"vision_cfg": VIT | {"qk_norm": True}},
    {"vision_cfg": VIT | {"scaled_cosine_attn": True}},
    {"vision_cfg": RESNET | {"head_width": 32}},
    {"vision_cfg": RESNET | {"head_width": 128}},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"no_causal_mask": True}},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"pool_type": "last"}},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"pool_type": "first"}},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"embed_cls": True}},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"mlp_ratio": 2.0}},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"norm_kwargs": {"eps": 1e-2}}},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"act_kwargs": {"approximate": "tanh"}}},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"proj_bias": True}, "custom_text": True},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"pool_type": "argmax", "pad_id": 1, "eos_id": 9}},
    {"vision_cfg": VIT, "text_cfg": TEXT | {"tokenizer_kwargs": {"clean": "canonicalize"}}},
    {"vision_cfg": VIT | {"patch_dropout": 0.5}},
]


@pytest.mark.parametrize("number", range(len(OTHER_TOWERS)), ids=lambda number: str(number))
def test_other_towers_are_refused_or_equal(number, theirs, tmp_path):
    """A folder of a model with an unusual setting is refused by a message that names it, or gives their features."""
    config = OTHER_TOWERS[number]
    model = theirs(f"other-{number}", config)
    folder = tmp_path / "folder"
    save_for_hf(model, NoTokenizer(), settings(f"other-{number}"), str(folder))
    try:
        found = load(folder).model
    except UserError as error:
        assert any(word in str(error) for part in config.values() if isinstance(part, dict) for word in part) or any(
            word in str(error) for word in config
        )
        return
    check_equal(found, model, config["vision_cfg"]["image_size"])


@pytest.mark.parametrize(
    "other", [{"interpolation": "bilinear"}, {"resize_mode": "squash"}, {"resize_mode": "longest"}]
)
def test_other_preprocessing_is_refused(other, theirs, tmp_path):
    """Images prepared in another way than CLIP's: the message names the setting."""
    theirs("ViT")
    model, _, _ = open_clip.create_model_and_transforms("parity-ViT", **{f"image_{key}": other[key] for key in other})
    save_for_hf(model, NoTokenizer(), settings("ViT"), str(tmp_path / "folder"))
    with pytest.raises(UserError, match=next(iter(other))):
        load(tmp_path / "folder")


@pytest.mark.parametrize("bias", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("image", SIZES)
def test_ours_read_there(image, activation, bias, tmp_path):
    """create_model of our folder loads strictly; features within 1e-5, and read again here each tensor to the bit."""
    ours = our_model(image, activation=activation, logit_bias=bias)
    write_model(ours, tmp_path / "out", "open_clip")
    check_equal(ours, open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval(), SIZES[image]["size"])
    back = load(tmp_path / "out").model
    assert back.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    assert back.config.to_dict() | {"name": "ours"} == ours.config.to_dict()


def test_ours_read_there_as_pretrained(tmp_path):
    """create_model_from_pretrained, which insists on weights, and our colours in its transform to the bit."""
    ours = our_model(mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3])
    write_model(ours, tmp_path / "out", "open_clip")
    theirs, their_preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    check_equal(ours, theirs.eval(), 32)
    preprocess = load(tmp_path / "out").preprocess
    for picture in (noise(57, 41), noise(32, 32), noise(20, 75)):
        assert torch.equal(preprocess(picture), their_preprocess(picture))


@pytest.mark.parametrize("name", MODELS)
def test_theirs_through_here_and_back(name, theirs, tmp_path):
    """Theirs read here, written, and read by open_clip again: their features, each tensor under OpenAI's name."""
    model = theirs(name)
    save_for_hf(model, NoTokenizer(), settings(name), str(tmp_path / "folder"))
    write_model(load(tmp_path / "folder").model, tmp_path / "back", "open_clip")
    back = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    before = {key.removeprefix("text."): tensor for key, tensor in model.state_dict().items()}
    after = back.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key].reshape(after[key].shape)) for key in before)


def test_one_file_of_ours_read_there(tmp_path, theirs):
    """A file of --to safetensors under open_clip's own configuration of those sizes: loaded strictly."""
    theirs("ViT-quickgelu")
    ours = our_model()
    write_model(ours, tmp_path / "ours.safetensors", "safetensors")
    model = open_clip.create_model("parity-ViT-quickgelu", pretrained=str(tmp_path / "ours.safetensors"))
    check_equal(ours, model.eval(), 32)


CAPTIONS = [
    "a photo of a dog.", "A DOG'S tail, isn't it?", "3 dogs & 12 cats", "  two   blanks ", "", "naïve café",
    "日本の写真", "Привет мир", "🐶 a dog 😀", "tab\tand\nline", "http://x.y/z?a=1&b=2", "100% $5.00 (ok) [x] {y}",
    "they're I'm you'll",
    "...!!??--", "e\u0301", "½ ² Ⅷ", "한국어 हिन्दी عربى", "fish &amp; chips",
    "&amp;lt;", "“curly” ‘quotes’", "schÃ¶n", "ﬁne", "ＦＵＬＬ", "a\x07b", "ΣΑΣ", "ſtar", "a b " * 200,
]  # fmt: skip


def test_tokens(tmp_path):
    """get_tokenizer of our folder: its rows of the model's length, on captions of every kind, mended and cut too."""
    write_model(our_model(), tmp_path / "out", "open_clip")
    theirs, ours = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}"), load(tmp_path / "out").tokenizer
    expected = theirs(CAPTIONS)
    assert expected.shape == (len(CAPTIONS), CONTEXT)
    for caption, row, other in zip(CAPTIONS, ours(CAPTIONS), expected, strict=True):
        assert row.tolist() == other.tolist(), caption


def test_the_words_for_start_and_end(tmp_path):
    """Within a caption: OpenAI's words are a token here, as in OpenAI's, signs there; open_clip's the reverse."""
    write_model(our_model(), tmp_path / "out", "open_clip")
    theirs, ours = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}"), load(tmp_path / "out").tokenizer
    openais, open_clips = "a <|endoftext|>", "a <end_of_text>"
    assert (ours(openais)[0] == VOCAB - 1).sum() == (theirs(open_clips)[0] == VOCAB - 1).sum() == 2
    assert (theirs(openais)[0] == VOCAB - 1).sum() == (ours(open_clips)[0] == VOCAB - 1).sum() == 1


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is not here")
def test_pixels_of_photographs(tmp_path):
    """The 200 photographs through their transform of our folder: to the bit but for the one that EXIF turns."""
    image = {"size": 224, "patch": 32, "layers": 1, "width": 48, "heads": 3}
    write_model(our_model(image=image), tmp_path / "out", "open_clip")
    _, theirs = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    preprocess = load(tmp_path / "out").preprocess
    different, largest = [], 0.0
    for path in sorted(PHOTOS.glob("*.JPEG")):
        with Image.open(path) as picture:
            found, expected = preprocess(path), theirs(picture)
            if torch.equal(found, expected):
                continue
            different.append(path.name)
            largest = max(largest, (found - theirs(ImageOps.exif_transpose(picture))).abs().max().item())
    assert different == ["n02951585_can_opener.JPEG"]
    assert largest == 0.0


@pytest.mark.parametrize(("before", "after"), [(224, 336), (336, 224), (224, 448), (224, 210)])
def test_image_positions(before, after):
    """224 to 336 and other sizes, patches of 14: the tensor is that of open_clip's resize_pos_embed, to the bit."""
    positions = torch.randn(1 + (before // 14) ** 2, 16)
    state = {"visual.positional_embedding": positions.clone()}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(after // 14, after // 14))))
    found = resize_image_positions({"visual.positional_embedding": positions}, after // 14)
    expected = state["visual.positional_embedding"]
    assert found["visual.positional_embedding"].shape == expected.shape
    assert torch.equal(found["visual.positional_embedding"], expected)
    assert torch.equal(expected[0], positions[0])


def test_positions_of_a_resnets_pooling():
    """open_clip does not resize them at all: here as it would, were they a ViT's."""
    positions = torch.randn(1 + 7**2, 16)
    state = {"visual.positional_embedding": positions.clone()}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(9, 9))))
    found = resize_image_positions({"visual.attnpool.positional_embedding": positions}, 9)
    assert torch.equal(found["visual.attnpool.positional_embedding"], state["visual.positional_embedding"])


@pytest.mark.parametrize("after", [78, 100, 154, 248])
def test_longer_texts(after):
    """More positions than the 77 there are: the tensor is that of open_clip's resize_text_pos_embed, to the bit."""
    positions = torch.randn(77, 16)
    state = {"positional_embedding": positions.clone()}
    resize_text_pos_embed(state, SimpleNamespace(positional_embedding=torch.empty(after, 16)))
    found = resize_text_positions({"positional_embedding": positions}, after)
    assert torch.equal(found["positional_embedding"], state["positional_embedding"])


def test_shorter_texts():
    """By decision the first positions, as they are: a short caption keeps its embedding, by theirs it does not."""
    positions = torch.randn(77, 16)
    state = {"positional_embedding": positions.clone()}
    resize_text_pos_embed(state, SimpleNamespace(positional_embedding=torch.empty(32, 16)))
    found = resize_text_positions({"positional_embedding": positions}, 32)["positional_embedding"]
    assert torch.equal(found, positions[:32])
    assert not torch.allclose(found, state["positional_embedding"])


@pytest.mark.parametrize("name", ["ViT", "ViT-quickgelu", "ViT-custom"])
@pytest.mark.parametrize(("size", "context"), [(48, 20), (16, CONTEXT), (32, 26)])
def test_other_sizes_whole(name, size, context, theirs, tmp_path):
    """A folder loaded here for other sizes, and by open_clip with force_image_size and force_context_length."""
    save_for_hf(theirs(name), NoTokenizer(), settings(name), str(tmp_path / "folder"))
    choices = {"force_image_size": size, "force_context_length": context}
    expected = open_clip.create_model(f"local-dir:{tmp_path / 'folder'}", **choices).eval()
    found = load(tmp_path / "folder", image_size=size, context_length=context)
    check_equal(found.model, expected, size, context)
    assert found.preprocess.size == size
    assert found.tokenizer.context_length == context
