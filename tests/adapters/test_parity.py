"""Features, logits and pixels of each family against transformers' own pipeline, on raw pictures and captions."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import train_clip
from tests.adapters.tiny_families import CAPTIONS, CONTEXT, HERE, photographs, pipeline, save
from train_clip import cli


@pytest.mark.parametrize("name", HERE)
def test_equals_the_librarys_pipeline(name, tmp_path):
    """Pixels to 1e-5, features to 1e-5, logits with the family's temperature and bias; several captions are cut."""
    model, files = save(name, tmp_path / "m"), photographs(tmp_path / "p")
    pixels, expected = pipeline(model, tmp_path / "m", files, CAPTIONS)
    ours = train_clip.load(tmp_path / "m")
    prepared = torch.stack([ours.preprocess(file) for file in files])
    torch.testing.assert_close(prepared, pixels, atol=1e-5, rtol=0)
    images, texts = (ours.encode(items, as_tensor=True, batch_size=2) for items in (files, CAPTIONS))
    for found, theirs in (images, expected.image_embeds), (texts, expected.text_embeds):
        torch.testing.assert_close(found, torch.nn.functional.normalize(theirs, dim=-1), atol=1e-5, rtol=0)
    with torch.no_grad():
        logits, _ = ours.model(prepared, ours.tokenizer(CAPTIONS))
    torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", HERE)
def test_convert_gives_the_familys_own_files(name, tmp_path, monkeypatch):
    """Files that transformers loads strictly, to the same features, from the hub's files by way of this package's."""
    monkeypatch.chdir(tmp_path)
    model, files = save(name, tmp_path / "m"), photographs(tmp_path / "p")
    cli.main(["convert", "m", "back", "--to", "huggingface"])
    back, report = hf.AutoModel.from_pretrained("back", output_loading_info=True)
    assert type(back) is type(model) and not any(report.values())
    # Which the library itself loads with zeros in some rows of padding.
    begun = hf.AutoModel.from_pretrained("m").state_dict()
    torch.testing.assert_close(back.state_dict(), begun, atol=1e-6, rtol=1e-6)
    (_, first), (_, second) = (
        pipeline(one.eval(), tmp_path / at, files, CAPTIONS) for one, at in ((model, "m"), (back, "back"))
    )
    torch.testing.assert_close(first.logits_per_image, second.logits_per_image, atol=1e-4, rtol=1e-5)
    assert train_clip.load("back").encode(files).shape[0] == len(files)


def test_captions_of_siglip_2_are_put_in_lower_case(tmp_path):
    """Its tokenizer in transformers keeps capitals, without which it was trained (arXiv 2502.14786, section 2.1)."""
    save("siglip", tmp_path)
    ours = train_clip.load(tmp_path)
    upper, lower = (
        ours.tokenizer([text])["input_ids"] for text in ("A Photo of the RED house", "a photo of the red house")
    )
    assert torch.equal(upper, lower) and upper.shape == (1, CONTEXT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False])
def test_padding_of_siglip_follows_its_tokenizer(side, masked, tmp_path):
    """To the full length on the tokenizer's side, with a mask if its files ask for one: the library's ids and mask."""
    from tests.adapters.tiny_families import SENTENCEPIECE, tokenizer

    save("siglip", tmp_path)
    names = ["input_ids", "attention_mask"] if masked else ["input_ids"]
    theirs = tokenizer(SENTENCEPIECE, padding_side=side, model_input_names=names)
    theirs.save_pretrained(tmp_path)
    found = train_clip.load(tmp_path).tokenizer(CAPTIONS)
    expected = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key])


@pytest.mark.parametrize("name", HERE)
def test_a_caption_alone_is_what_it_is_among_others(name, tmp_path):
    """Padding makes no difference, or is always the same."""
    save(name, tmp_path)
    ours = train_clip.load(tmp_path)
    together = ours.encode(CAPTIONS, as_tensor=True)
    alone = torch.cat([ours.encode(text, as_tensor=True) for text in CAPTIONS])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
