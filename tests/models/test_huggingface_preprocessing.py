"""What an image encoder was trained on, from each form of its preprocessor's file."""

from __future__ import annotations

import json

import pytest

from tests.models.tiny_huggingface import (
    IMAGE_MODELS,
    MEAN,
    SIDE,
    STD,
    clip,
    saved,
)
from train_clip.encoders.huggingface import load_image
from train_clip.errors import UserError

SIZES = {
    "number": ({"size": 24}, 24),
    "height and width": ({"size": {"height": 24, "width": 24}}, 24),
    "pair": ({"size": [24, 24]}, 24),
    "shortest edge, as ConvNext's crop_pct ends": ({"size": {"shortest_edge": 24}, "crop_pct": 0.875}, 24),
    "crop": ({"size": {"shortest_edge": 28}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}}, 24),
    "crop as a number": ({"size": 28, "do_center_crop": True, "crop_size": 24}, 24),
    "a crop that is not done": ({"size": 24, "do_center_crop": False, "crop_size": 28}, 24),
}


@pytest.mark.parametrize("case", list(SIZES))
def test_size(case, tmp_path):
    """The side that the preprocessor ends at, in each of the forms that it was written in over the years."""
    values, side = SIZES[case]
    saved(IMAGE_MODELS["resnet"][0], tmp_path, {**values, "image_mean": MEAN, "image_std": STD})
    assert load_image(str(tmp_path)).size == side


@pytest.mark.parametrize("size", [{"height": 24, "width": 16}, [24, 16], {"longest_edge": 24}, "24", 0, [], None])
def test_size_of_no_square(size, tmp_path):
    """The message gives what was found and what to do."""
    saved(IMAGE_MODELS["resnet"][0], tmp_path, {"size": size, "image_mean": MEAN, "image_std": STD})
    with pytest.raises(UserError, match=r"its size is .*; expected the side of a square"):
        load_image(str(tmp_path))


def test_nested_processor_file(tmp_path):
    """A processor of two inputs keeps the image's part in a file of its own; it comes first."""
    saved(clip, tmp_path, {"size": 999})
    values = {"size": SIDE, "image_mean": MEAN, "image_std": STD}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values, "processor_class": "X"}))
    encoder = load_image(str(tmp_path))
    assert (encoder.size, encoder.mean) == (SIDE, (*MEAN,))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**values, "image_mean": STD}))
    assert load_image(str(tmp_path)).mean == (*STD,)


@pytest.mark.parametrize(
    "values",
    [
        {"image_mean": MEAN, "image_std": STD},
        {"image_mean": MEAN, "image_std": STD, "rescale_factor": 0.00392156862745098},
        {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 127.5},
        {"image_mean": MEAN, "image_std": STD, "do_rescale": False},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
    ],
)
def test_normalisation(values, tmp_path):
    """(x / 255 - mean) / std, against rescaling and normalisation as the preprocessor does them, of every byte."""
    saved(IMAGE_MODELS["resnet"][0], tmp_path, {"size": SIDE, **values})
    encoder = load_image(str(tmp_path))
    for byte in range(256):
        for channel in range(3):
            expected = byte * (values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1)
            if values.get("do_normalize", True):
                expected = (expected - MEAN[channel]) / STD[channel]
            found = (byte / 255 - encoder.mean[channel]) / encoder.std[channel]
            assert found == pytest.approx(expected, abs=1e-6 * max(1, abs(expected)))


def test_without_a_preprocessor(tmp_path):
    """Size from the configuration, ImageNet's mean and deviation, and a warning that says so."""
    saved(IMAGE_MODELS["vit"][0], tmp_path)
    with pytest.warns(UserWarning, match="do not say how pixels are normalized. Using ImageNet's"):
        encoder = load_image(str(tmp_path))
    assert (encoder.size, encoder.mean, encoder.std) == (SIDE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_without_any_size(tmp_path):
    """Neither file nor configuration: the message says what to write."""
    saved(IMAGE_MODELS["resnet"][0], tmp_path)
    with pytest.raises(UserError, match=r"its size is None \(preprocessor_config.json, or image_size .* such as \{"):
        load_image(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_flip_channel_order": True}, "asks for do_flip_channel_order, which is not supported"),
        ({"rescale_offset": True}, "asks for rescale_offset, which is not supported"),
        ({"image_mean": [0.5]}, r"image_mean and image_std .* are \[0.5\] and \[.*\]; expected three"),
        ({"image_std": 0.5}, r"image_mean and image_std .* are \[.*\] and 0.5; expected three"),
    ],
)
def test_preprocessing_that_is_not_supported(values, message, tmp_path):
    saved(IMAGE_MODELS["vit"][0], tmp_path, {"size": SIDE, "image_mean": MEAN, "image_std": STD, **values})
    with pytest.raises(UserError, match=message):
        load_image(str(tmp_path))


def test_a_broken_preprocessor_file(tmp_path):
    saved(IMAGE_MODELS["vit"][0], tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size":')
    with pytest.raises(UserError, match=r"preprocessor_config.json: not JSON .*Get the file again"):
        load_image(str(tmp_path))
