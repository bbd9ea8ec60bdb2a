"""Folders of Hugging Face's CLIPModel, read here and written from here, against transformers itself.

Every tensor is random, biases and gains too, and no two sizes are alike, so that nothing can take another's place.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from train_clip import load
from train_clip.commands.convert import write_model
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict

SIZE, CONTEXT, VOCAB, EMBED = 32, 13, 49408, 20
VISION = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
END = VOCAB - 1
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PHOTOS = Path("/work/shared/data/photos")

CAPTIONS = [
    "a photo of a dog.", "A DOG'S tail, isn't it?", "3 dogs & 12 cats", "  two   blanks ", "", "naïve café",
    "日本の写真", "Привет мир", "🐶 a dog 😀", "tab\tand\nline", "#hashtag @name http://x.y/z?a=1&b=2",
    "100% $5.00 (ok) [x] {y}",
    "they're we've I'm you'll he'd", "...!!??--", "e\u0301", "<|endoftext|>", "a_b-c/d\\e", "½ ² Ⅷ",
    "한국어 हिन्दी عربى",
    "a caption of so many words that it has to be cut before it comes to its end",
]  # fmt: skip
# OpenAI's tokenizer, and so ours, mends these with ftfy and unescapes them; Hugging Face's does neither.
MENDED = [
    "fish &amp; chips", "&lt;b&gt;", "“curly” quotes", "don’t", "schÃ¶n", "ﬁne", "ＦＵＬＬ", "a\x07b",
]  # fmt: skip
# Lower case of a last Σ by Python's rule and not by a rule for each letter; signs that touch a special token.
OTHERWISE_CUT = ["ΣΑΣ", "!!<|endoftext|>", "\u0345"]


def their_config(activation: str = "quick_gelu", end: int = END) -> CLIPConfig:
    def tower(sizes: dict[str, int]) -> dict[str, object]:
        width = sizes["hidden_size"]
        return sizes | {"intermediate_size": 4 * width, "hidden_act": activation, "projection_dim": EMBED}

    text = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": VOCAB - 2, "eos_token_id": end}
    return CLIPConfig(
        text_config=tower(TEXT) | text,
        vision_config=tower(VISION) | {"image_size": SIZE, "patch_size": 8},
        projection_dim=EMBED,
    )


def their_model(activation: str = "quick_gelu", end: int = END) -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(their_config(activation, end))
    randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)


def our_model(activation: str = "quick_gelu", **other: object) -> CLIP:
    torch.manual_seed(1)
    image = {"size": SIZE, "patch": 8, "layers": 3, "width": 36, "heads": 4}
    text = {"context": CONTEXT, "vocab": VOCAB, "layers": 2, "width": 24, "heads": 3}
    values = {"name": "ours", "embed_dim": EMBED, "activation": activation, "mean": MEAN, "std": STD}
    model = CLIP(config_from_dict(values | {"image": image, "text": text} | other))
    randomize(model)
    return model.eval()


def inputs(size: int = SIZE, context: int = CONTEXT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4, 3, size, size, generator=generator)
    tokens = torch.randint(1, VOCAB - 2, (4, context), generator=generator)
    for row, end in zip(tokens, (1, 4, 8, context - 1), strict=True):
        row[0], row[end], row[end + 1 :] = VOCAB - 2, END, 0
    return images, tokens


def embeddings(output: object) -> Tensor:
    """An object in transformers 5, the tensor in transformers 4."""
    return getattr(output, "pooler_output", output)


@torch.no_grad()
def check_equal(ours: CLIP, theirs: CLIPModel, size: int = SIZE, context: int = CONTEXT) -> None:
    images, tokens = inputs(size, context)
    expected_images = embeddings(theirs.get_image_features(pixel_values=images))
    expected_texts = embeddings(theirs.get_text_features(input_ids=tokens))
    torch.testing.assert_close(ours.encode_image(images), expected_images, **CLOSE)
    torch.testing.assert_close(ours.encode_text(tokens), expected_texts, **CLOSE)
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


def write_processor(folder: Path, **other: object) -> None:
    """The settings as CLIPImageProcessor saves them."""
    values = {
        "crop_size": {"height": SIZE, "width": SIZE},
        **dict.fromkeys(("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values | other))


def as_safetensors(model: CLIPModel, folder: Path) -> None:
    model.save_pretrained(folder)


def as_shards(model: CLIPModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def as_bin(model: CLIPModel, folder: Path) -> None:
    """As transformers 4 wrote it, with the counts of positions that it kept as tensors up to 4.31."""
    model.config.save_pretrained(folder)
    torch.save(with_counts(model), folder / "pytorch_model.bin")


def as_bin_shards(model: CLIPModel, folder: Path) -> None:
    """Likewise, in files of seven tensors and an index."""
    model.config.save_pretrained(folder)
    state = list(with_counts(model).items())
    parts = [dict(state[start : start + 7]) for start in range(0, len(state), 7)]
    names = [f"pytorch_model-{number + 1:05}-of-{len(parts):05}.bin" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def with_counts(model: CLIPModel) -> dict[str, Tensor]:
    counts = {"text_model": torch.arange(CONTEXT)[None], "vision_model": torch.arange(17)[None]}
    return model.state_dict() | {f"{name}.embeddings.position_ids": count for name, count in counts.items()}


WRITERS = {"safetensors": as_safetensors, "shards": as_shards, "bin": as_bin, "shards of bin": as_bin_shards}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "theirs").mkdir()
    return tmp_path / "theirs"


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("writer", WRITERS)
def test_theirs_read_here(writer, activation, folder):
    """Features within 1e-5, temperature, sizes and colours equal, whichever files the weights are in."""
    theirs = their_model(activation)
    WRITERS[writer](theirs, folder)
    write_processor(folder)
    model, preprocess, tokenizer = load(folder)
    check_equal(model, theirs)
    assert model.config.activation == activation
    sizes = (model.image_size, model.context_length, model.vocab_size, model.embed_dim)
    assert sizes == (SIZE, CONTEXT, VOCAB, EMBED)
    assert (preprocess.size, tokenizer.context_length) == (SIZE, CONTEXT)
    assert torch.equal(preprocess.mean.flatten(), torch.tensor(MEAN))
    assert torch.equal(preprocess.std.flatten(), torch.tensor(STD))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("writer", WRITERS)
def test_half_precision_read_here(writer, dtype, folder):
    """Weights of 16 bits: their model turned to float32, within 1e-5."""
    theirs = their_model().to(dtype)
    WRITERS[writer](theirs, folder)
    check_equal(load(folder).model, theirs.float())


def test_one_file_of_a_folder(folder):
    """The weights by their own path: config.json lies beside them."""
    theirs = their_model()
    as_safetensors(theirs, folder)
    write_processor(folder)
    model, preprocess, _ = load(folder / "model.safetensors")
    check_equal(model, theirs)
    assert torch.equal(preprocess.mean.flatten(), torch.tensor(MEAN))


def test_the_end_token_of_older_configurations(folder):
    """OpenAI's own folders say eos_token_id 2, by which transformers takes the largest id, as here."""
    theirs = their_model(end=2)
    as_safetensors(theirs, folder)
    check_equal(load(folder).model, theirs)


def test_another_end_token(folder):
    """A model whose captions end with another id than the largest: read at that one, as theirs, or refused."""
    theirs = their_model(end=7)
    as_safetensors(theirs, folder)
    try:
        model = load(folder).model
    except UserError:
        return
    _, tokens = inputs()
    tokens[tokens == END] = 7
    with torch.no_grad():
        expected = embeddings(theirs.get_text_features(input_ids=tokens))
        torch.testing.assert_close(model.encode_text(tokens), expected, **CLOSE)


def test_the_copy_of_a_configuration_in_older_folders(folder):
    """``vision_config_dict`` wins with all it has, its defaults too: transformers then builds quick_gelu, as here."""
    theirs = their_model("gelu")
    as_safetensors(theirs, folder)
    values = json.loads((folder / "config.json").read_text())
    for name in ("vision_config", "text_config"):
        values[f"{name}_dict"] = {key: value for key, value in values[name].items() if key != "hidden_act"}
    (folder / "config.json").write_text(json.dumps(values))
    expected = CLIPModel.from_pretrained(folder).eval()
    assert expected.config.vision_config.hidden_act == "quick_gelu"
    check_equal(load(folder).model, expected)


@pytest.mark.skipif(bool(importlib.util.find_spec("torchvision")), reason="writes what it writes without torchvision")
def test_settings_in_the_file_of_a_whole_processor(folder, tmp_path):
    """A CLIPProcessor saved by transformers 5 is processor_config.json alone: colours are those it was saved with."""
    write_model(our_model(), tmp_path / "ours", "huggingface")
    theirs = their_model()
    as_safetensors(theirs, folder)
    CLIPProcessor.from_pretrained(tmp_path / "ours").save_pretrained(folder)
    assert (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists()
    preprocess = load(folder).preprocess
    assert torch.equal(preprocess.mean.flatten(), torch.tensor(MEAN))
    assert torch.equal(preprocess.std.flatten(), torch.tensor(STD))


@pytest.mark.parametrize(
    "other",
    [
        {"resample": 2},
        {"do_center_crop": False},
        {"do_resize": False},
        {"do_normalize": False},
        {"size": {"height": SIZE, "width": SIZE}},
        {"size": {"shortest_edge": SIZE + 8}},
        {"crop_size": {"height": SIZE + 8, "width": SIZE + 8}},
        {"rescale_factor": 1 / 127.5},
    ],
    ids=str,
)
def test_other_preprocessing_than_clips_is_refused(other, folder):
    """Images would be prepared otherwise than the model saw them: the message names the setting."""
    as_safetensors(their_model(), folder)
    write_processor(folder, **other)
    with pytest.raises(UserError, match=next(iter(other))):
        load(folder)


def test_settings_of_oldest_folders(folder):
    """Whole numbers in place of sizes, under the name of a feature extractor: read all the same."""
    theirs = their_model()
    as_safetensors(theirs, folder)
    write_processor(folder, size=SIZE, crop_size=SIZE, feature_extractor_type="CLIPFeatureExtractor")
    check_equal(load(folder).model, theirs)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("", {"model_type": "chinese_clip"}),
        ("vision_config", {"intermediate_size": 100}),
        ("vision_config", {"layer_norm_eps": 1e-6}),
        ("vision_config", {"hidden_act": "gelu"}),
        ("vision_config", {"num_channels": 4}),
        ("text_config", {"layer_norm_eps": 1e-6}),
    ],
)
def test_other_towers_than_clips_are_refused(part, other, folder):
    """A configuration by which transformers builds another function of the same tensors: the setting is named."""
    as_safetensors(their_model(), folder)
    values = json.loads((folder / "config.json").read_text())
    (values[part] if part else values).update(other)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=next(iter(other))):
        load(folder)


def test_an_activation_of_neither_kind_is_refused(folder):
    """gelu_new is a GELU by another formula: refused by its name."""
    as_safetensors(their_model("gelu_new"), folder)
    with pytest.raises(UserError, match="gelu_new"):
        load(folder)


def strictly(folder: Path) -> CLIPModel:
    """Their model from a folder, with no tensor missing, unexpected or of another shape."""
    model, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert not report.get("error_msgs")
    return model.eval()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_ours_read_there(activation, tmp_path):
    """from_pretrained takes every tensor and no other; features within 1e-5."""
    ours = our_model(activation)
    write_model(ours, tmp_path / "out", "huggingface")
    theirs = strictly(tmp_path / "out")
    check_equal(ours, theirs)
    assert theirs.config.text_config.hidden_act == theirs.config.vision_config.hidden_act == activation
    assert theirs.config.text_config.eos_token_id == END
    assert theirs.num_parameters() == sum(parameter.numel() for parameter in ours.parameters())


def test_other_sizes_read_there(tmp_path):
    """A model loaded for larger images and longer captions, and written: they read it at those sizes."""
    write_model(our_model(), tmp_path / "small.safetensors", "safetensors")
    large = load(tmp_path / "small.safetensors", image_size=48, context_length=20).model
    write_model(large, tmp_path / "large", "huggingface")
    check_equal(large, strictly(tmp_path / "large"), size=48, context=20)


def test_there_and_back(tmp_path):
    """Ours written, and read here: each tensor to the bit, and the whole configuration but for its name."""
    ours = our_model("gelu")
    write_model(ours, tmp_path / "out", "huggingface")
    back, preprocess, _ = load(tmp_path / "out")
    assert back.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    assert back.config.to_dict() | {"name": "ours"} == ours.config.to_dict()
    assert torch.equal(preprocess.std.flatten(), torch.tensor(STD))


@pytest.mark.parametrize("writer", WRITERS)
def test_here_and_back(writer, folder, tmp_path):
    """Theirs read here, and written: each tensor to the bit, under the names that theirs has, and no other."""
    theirs = their_model()
    WRITERS[writer](theirs, folder)
    write_processor(folder)
    write_model(load(folder).model, tmp_path / "back", "huggingface")
    expected = theirs.state_dict()
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name in expected if not name.endswith("position_ids")}
        assert all(torch.equal(file.get_tensor(name), expected[name]) for name in file.keys())  # noqa: SIM118
    found = strictly(tmp_path / "back").config
    for tower in ("text_config", "vision_config"):
        before, after = (getattr(config, tower).to_dict() for config in (theirs.config, found))
        passing = {"pad_token_id", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures"}
        assert {key: value for key, value in after.items() if key not in passing} == {
            key: value for key, value in before.items() if key not in passing
        }
    pixels = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert (pixels["image_mean"], pixels["image_std"]) == (MEAN, STD)


def test_a_resnet_is_refused_and_nothing_is_left(tmp_path):
    """Their CLIP has no ResNet: an error that names two formats which do, and no folder."""
    resnet = our_model(image={"size": 32, "blocks": [1, 1, 1, 1], "width": 8})
    with pytest.raises(UserError, match="open_clip"):
        write_model(resnet, tmp_path / "out", "huggingface")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder written from here, of a model of OpenAI's context and image size."""
    target = tmp_path_factory.mktemp("written") / "model"
    write_model(
        our_model(text={"context": 77, "vocab": VOCAB, "layers": 1, "width": 24, "heads": 3}), target, "huggingface"
    )
    return target


@pytest.mark.parametrize("kind", [AutoTokenizer, CLIPTokenizer])
def test_tokens(kind, written):
    """Their tokenizer, made of our files, gives our ids on plain captions of many kinds, start and end included."""
    theirs, ours = kind.from_pretrained(written), load(written).tokenizer
    assert theirs.model_max_length == 77
    for caption in CAPTIONS:
        expected = theirs(caption)["input_ids"]
        row = ours(caption)[0].tolist()
        assert row[: len(expected)] == expected, caption
        assert not any(row[len(expected) :]), caption


def test_tokens_of_a_caption_that_is_cut(tmp_path):
    """Truncated by them to their model_max_length, cut by us: the same row, its end token last."""
    write_model(our_model(), tmp_path / "out", "huggingface")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "out")
    row = load(tmp_path / "out").tokenizer(CAPTIONS[-1])[0].tolist()
    assert row == theirs(CAPTIONS[-1], truncation=True)["input_ids"]
    assert len(row) == CONTEXT
    assert row[-1] == END


@pytest.mark.parametrize("caption", [*MENDED, *OTHERWISE_CUT])
def test_texts_whose_tokens_differ(caption, written):
    """What OpenAI's tokenizer mends or cuts otherwise, and theirs does not: the ids differ, which users must know."""
    theirs = CLIPTokenizer.from_pretrained(written)(caption)["input_ids"]
    assert load(written).tokenizer(caption)[0, : len(theirs)].tolist() != theirs


@torch.no_grad()
def test_captions_end_to_end(written):
    """Captions through their tokenizer and model, padded with their end token and masked, and through ours."""
    model, _, tokenizer = load(written)
    theirs = strictly(written)
    batch = CLIPTokenizer.from_pretrained(written)(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    expected = embeddings(theirs.get_text_features(**batch))
    torch.testing.assert_close(model.encode_text(tokenizer(CAPTIONS)), expected, **CLOSE)


# Theirs cuts the middle out at half of what is over, rounded down; OpenAI's, and so ours, rounds halves to even.
def is_shifted(picture: Image.Image, size: int) -> bool:
    """Whether that is another pixel: 3, 7, 11 … pixels are over."""
    width, height = picture.size
    longer = int(size * max(width, height) / min(width, height))
    return (longer - size) % 4 == 3


def generated() -> dict[str, Image.Image]:
    """Noise of odd sizes, larger and smaller than the square, in the modes that become RGB with nothing lost."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (33, 47), (47, 33), (31, 31), (5, 9), (9, 5), (200, 33), (33, 200), (101, 99), (640, 480)]
    sizes += [(64, 64 + over) for over in range(9)] + [(32, 32 + over) for over in range(9)]
    pictures = {}
    for width, height in sizes:
        colour = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for mode in ("RGB", "L", "P", "1", "CMYK"):
            pictures[f"{mode} {width}x{height}"] = colour.convert(mode)
    return pictures


needs_pillow_backend = pytest.mark.skipif(
    bool(importlib.util.find_spec("torchvision")), reason="with torchvision their processor resizes tensors"
)


def their_pixels(processor: CLIPProcessor, picture: Image.Image) -> Tensor:
    return torch.as_tensor(np.asarray(processor.image_processor(picture, return_tensors="np")["pixel_values"][0]))


@needs_pillow_backend
def test_pixels_of_generated_pictures(written):
    """Their processor of our folder, without torchvision, against our preprocessing: equal to the bit.

    But where an odd number of pixels is over, of which theirs leaves one more on the other side: there the tensor is
    ours of the picture cut a pixel earlier.
    """
    preprocess, processor = load(written).preprocess, CLIPProcessor.from_pretrained(written)
    shifted = 0
    for name, picture in generated().items():
        expected = their_pixels(processor, picture)
        if is_shifted(picture, SIZE):
            shifted += 1
            assert torch.equal(a_pixel_earlier(picture, preprocess), expected), name
        else:
            assert torch.equal(preprocess(picture), expected), name
    assert 0 < shifted < len(generated()) / 3


def a_pixel_earlier(picture: Image.Image, preprocess) -> Tensor:
    """Pillow's resize and NumPy's arithmetic, with the middle cut out at the half rounded down."""
    picture = picture.convert("RGB")
    width, height = picture.size
    shorter = min(width, height)
    picture = picture.resize((int(SIZE * width / shorter), int(SIZE * height / shorter)), Image.Resampling.BICUBIC)
    left, top = (picture.width - SIZE) // 2, (picture.height - SIZE) // 2
    cut = np.asarray(picture.crop((left, top, left + SIZE, top + SIZE)), dtype=np.float32) / np.float32(255)
    return (torch.from_numpy(cut).permute(2, 0, 1) - preprocess.mean) / preprocess.std


@needs_pillow_backend
@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is not here")
def test_pixels_of_photographs(tmp_path):
    """The 200 photographs at 224 pixels: equal to the bit, but for those that are cut a pixel off or turned upright."""
    image = {"size": 224, "patch": 32, "layers": 1, "width": 36, "heads": 4}
    write_model(our_model(image=image), tmp_path / "out", "huggingface")
    preprocess, processor = load(tmp_path / "out").preprocess, CLIPProcessor.from_pretrained(tmp_path / "out")
    different = set()
    for path in sorted(PHOTOS.glob("*.JPEG")):
        picture = Image.open(path)
        if not torch.equal(preprocess(path), their_pixels(processor, picture)):
            different.add(path.name)
            assert is_shifted(picture, 224) or picture.getexif().get(0x0112, 1) > 1, path.name
    assert "n02951585_can_opener.JPEG" in different
    assert len(different) == 27


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="torchvision is not installed")
@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is not here")
def test_pixels_with_torchvision(tmp_path):
    """Where torchvision is installed their processor resizes tensors: photographs cut alike are within 2 of 255."""
    image = {"size": 224, "patch": 32, "layers": 1, "width": 36, "heads": 4}
    write_model(our_model(image=image), tmp_path / "out", "huggingface")
    preprocess, processor = load(tmp_path / "out").preprocess, CLIPProcessor.from_pretrained(tmp_path / "out")
    largest, compared = 0.0, 0
    for path in sorted(PHOTOS.glob("*.JPEG")):
        picture = Image.open(path)
        if is_shifted(picture, 224) or picture.getexif().get(0x0112, 1) > 1:
            continue
        difference = (preprocess(path) - their_pixels(processor, picture)) * preprocess.std * 255
        largest, compared = max(largest, difference.abs().max().item()), compared + 1
    print(f"\n{compared} photographs, largest difference {largest:.2f} of 255")
    assert compared == 173
    assert 0 < largest < 2.01
