"""A batch out of samples: against the samples and OpenAI's framing of captions."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from train_clip.data.pairs import read_caption_lines
from train_clip.data.samples import Batch, Sample, Skip, collate
from train_clip.data.tokenizer import Tokenizer
from train_clip.encoders.tokenizer import PretrainedTokenizer


def samples(*captions: str) -> list[Sample]:
    """Random pixels; sample i was replaced after i bad draws."""
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=generator),
            caption,
            tuple(Skip(f"{place}-{number}.jpg", "bad") for number in range(place)),
        )
        for place, caption in enumerate(captions)
    ]


def test_the_fields_of_a_batch() -> None:
    """Pixels stacked in order as bytes, texts one row each as long as the longest, skips by replaced sample."""
    given = samples("a cat", "a dog that sits on a mat", "b")
    batch = collate(Tokenizer(77), given)
    assert isinstance(batch, Batch)
    assert (batch.images.shape, batch.images.dtype) == ((3, 3, 4, 4), torch.uint8)
    assert all(torch.equal(image, sample.pixels) for image, sample in zip(batch.images, given, strict=True))
    assert batch.texts.dtype == torch.int64
    for row, sample in zip(batch.texts, given, strict=True):
        assert torch.equal(row, Tokenizer(77)(sample.caption)[0, : len(row)])
    assert batch.texts.shape == (3, 9)  # start, seven words, end
    assert batch.skips == ((Skip("1-0.jpg", "bad"),), (Skip("2-0.jpg", "bad"), Skip("2-1.jpg", "bad")))
    assert batch.num_cut == 0


def test_captions_that_are_too_long_are_counted() -> None:
    """A context of 6 holds four words: two of four captions are cut, and end in the end token all the same."""
    batch = collate(Tokenizer(6), samples("a b c d", "a b c d e", "a", "a b c d e f g"))
    assert batch.num_cut == 2
    assert batch.texts.shape == (4, 6)
    assert all(Tokenizer.end_token in row for row in batch.texts)


class OwnTokenizer:
    """Stands in for Hugging Face's: remembers what it was asked and gives a mapping."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, texts: list[str], **how: Any) -> dict[str, torch.Tensor]:
        self.asked.append((texts, how))
        lengths = torch.tensor([[len(text)] for text in texts])
        return {"input_ids": lengths, "attention_mask": torch.ones_like(lengths)}


def test_a_tokenizer_of_ones_own() -> None:
    """It gets the captions as a list, is asked for padded and cut tensors, and its mapping is passed on whole."""
    own = OwnTokenizer()
    batch = collate(PretrainedTokenizer(own, 512), samples("a", "bcd"))
    assert own.asked == [(["a", "bcd"], {"padding": True, "truncation": True, "return_tensors": "pt"})]
    assert set(batch.texts) == {"input_ids", "attention_mask"}
    assert batch.texts["input_ids"].tolist() == [[1], [3]]
    assert batch.num_cut == 0
    assert batch.skips == ((Skip("1-0.jpg", "bad"),),)


def test_it_travels_to_a_worker() -> None:
    """Pickled and back, as a spawned worker gets it: the same batch."""
    stack = partial(collate, Tokenizer(10))
    given = samples("a cat", "a dog")
    for one, other in zip(stack(given), pickle.loads(pickle.dumps(stack))(given), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    "caption",
    [
        "&#" + "1" * 5000 + ";",
        "&amp;#" + "1" * 5000 + ";",
        "\uff06\uff03" + "\uff11" * 5000 + "\uff1b",
        "&#" + ("1" * 100 + "\x7f") * 60 + ";",
    ],
    ids=["plain", "escaped twice", "full width", "control characters"],
)
def test_what_is_read_as_a_caption_can_be_collated(tmp_path: Path, caption: str) -> None:
    """A number without end as an HTML entity, in four disguises: a caption, cut to the context and counted as cut."""
    (tmp_path / "a.txt").write_text(caption, encoding="utf-8")
    assert read_caption_lines(str(tmp_path / "a.txt"))[0] == [caption]
    batch = collate(Tokenizer(10), samples("a cat", caption))
    assert batch.texts.shape == (2, 10)
    assert batch.texts[1, [0, 9]].tolist() == [Tokenizer.start_token, Tokenizer.end_token]
    assert batch.num_cut == 1
