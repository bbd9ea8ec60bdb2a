"""Tokenizers of the transformers library: cut, counted, padded, and the same again from a description."""

from __future__ import annotations

import functools
import io
import json
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import constants
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train_clip.encoders.tokenizer import PretrainedTokenizer, load_tokenizer, tokenizer_from
from train_clip.errors import UserError

CORPUS = ["the quick brown fox jumps over the lazy dog", "a dog's tail, 12 of 34; naïve café", "日本語 の 文 🐕 !?"] * 3
CONTEXT = 12


def write_bert(folder: Path) -> None:
    """Word pieces, from vocab.txt alone; [CLS] and [SEP] around."""
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words.train_from_iterator(CORPUS, tokenizers.trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    (folder / "vocab.txt").write_text("\n".join(sorted(words.get_vocab(), key=words.get_vocab().get)), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "bert"}')


def write_bytes(folder: Path, model_type: str, special: list[str]) -> None:
    """Byte pairs, from vocab.json and merges.txt."""
    pairs = tokenizers.ByteLevelBPETokenizer()
    pairs.train_from_iterator(CORPUS, vocab_size=320, special_tokens=special)
    pairs.save_model(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def write_unigram(folder: Path) -> None:
    """T5's kind, from tokenizer.json: pieces with a probability, the end token alone."""
    pieces = tokenizers.Tokenizer(tokenizers.models.Unigram())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    pieces.train_from_iterator(CORPUS, trainer)
    pieces.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=50
    ).save_pretrained(folder)


WRITERS = {
    "bert": write_bert,
    "roberta": lambda folder: write_bytes(folder, "roberta", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
    "gpt2": lambda folder: write_bytes(folder, "gpt2", ["<|endoftext|>"]),
    "t5": write_unigram,
}
each_kind = pytest.mark.parametrize("kind", list(WRITERS))


@functools.cache
def loaded(kind: str, context: int = CONTEXT) -> PretrainedTokenizer:
    """A small tokenizer of each kind, out of a folder that is gone by the time of the test."""
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[kind](Path(folder))
        return load_tokenizer(folder, context)


def kept(description: dict[str, Any] | None) -> dict[str, Any]:
    """A description after it lay in a file that is read without executing code."""
    file = io.BytesIO()
    torch.save(description, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@functools.cache
def rebuilt(kind: str) -> PretrainedTokenizer:
    return tokenizer_from(kept(loaded(kind).describe()))


def words_of(kind: str, number: int) -> str:
    """A caption of exactly that many tokens, special ones included."""
    units = ("~", "2;", "fox ", "dog")
    texts = [first * times + last for times in range(CONTEXT) for first in units for last in units]
    rows = loaded(kind).tokenizer(texts, verbose=False)["input_ids"]
    return next(text for text, row in zip(texts, rows, strict=True) if len(row) == number)


@each_kind
def test_batch(kind):
    """Row by row against the tokenizer itself, one caption at a time; padding is masked; all are int64."""
    captions = ["the dog", "a dog's tail, of 12", "fox", "naïve 日本 🐕"]
    tokenizer = PretrainedTokenizer(loaded(kind).tokenizer, 60)
    tensors, num_cut = tokenizer.batch(captions)
    rows = [tokenizer.tokenizer(caption) for caption in captions]
    longest = max(len(row["input_ids"]) for row in rows)
    assert num_cut == 0 and type(tensors) is dict and set(tensors) == {*rows[0], "attention_mask"}
    for name, values in tensors.items():
        assert values.shape == (4, longest) and values.dtype == torch.int64
        for row, value in zip(rows, values.tolist(), strict=True):
            assert value[: len(row["input_ids"])] == row[name]
            if name == "attention_mask":
                assert value == [1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"]))
    assert kind != "bert" or "token_type_ids" in tensors


@each_kind
def test_cut(kind):
    """A caption of the whole context stays as it is; one token more is cut and counted, its special tokens kept."""
    tokenizer = loaded(kind)
    fits, over = words_of(kind, CONTEXT), words_of(kind, CONTEXT + 1)
    tensors, num_cut = tokenizer.batch([fits, "dog", over, over + " fox" * 500])
    assert num_cut == 2 and tensors["input_ids"].shape == (4, CONTEXT)
    first, _, third, fourth = tensors["input_ids"].tolist()
    assert first == tokenizer.tokenizer(fits)["input_ids"]
    for row, caption in ((third, over), (fourth, over + " fox" * 500)):
        assert row == tokenizer.tokenizer(caption, truncation=True, max_length=CONTEXT)["input_ids"]
        start, end = {"bert": (1, 1), "roberta": (1, 1), "gpt2": (0, 0), "t5": (0, 1)}[kind]
        whole = tokenizer.tokenizer(caption)["input_ids"]
        assert row == whole[: CONTEXT - end] + whole[len(whole) - end :]
        assert start == 0 or row[0] == tokenizer.tokenizer.cls_token_id
    assert tokenizer.batch([fits])[1] == 0


def test_one_pass_where_nothing_is_cut(monkeypatch):
    """The library is called once for a batch that fits; once more, for the long ones alone, where one does not."""
    tokenizer = loaded("bert")
    calls: list[list[str]] = []
    plain = type(tokenizer.tokenizer).__call__

    def spy(self: Any, texts: list[str], **how: Any) -> Any:
        calls.append(texts)
        return plain(self, texts, **how)

    monkeypatch.setattr(type(tokenizer.tokenizer), "__call__", spy)
    tokenizer.batch(["dog", "fox"])
    assert calls == [["dog", "fox"]]
    over = words_of("bert", CONTEXT + 1)
    calls.clear()
    tokenizer.batch(["dog", over])
    assert calls == [["dog", over], [over]]


def test_no_warning_of_length(caplog, capfd):
    """A caption beyond the library's own limit: no word about it."""
    tokenizer = loaded("t5")
    assert tokenizer.tokenizer.model_max_length == 50
    tokenizer.batch(["fox " * 200])
    assert not caplog.records and "".join(capfd.readouterr()) == ""


def test_an_empty_caption():
    """Without special tokens (GPT-2) it is one token that is not masked; with them it is these."""
    for kind, ids in (("gpt2", [0]), ("bert", [2, 3])):
        alone, _ = loaded(kind).batch([""])
        assert alone["input_ids"].tolist() == [ids] and alone["attention_mask"].eq(1).all()
        tensors, _ = loaded(kind).batch(["dog 12", ""])
        assert tensors["attention_mask"][1].sum() == len(ids)


def test_a_tokenizer_without_padding():
    """GPT-2 has none: the end token fills the rows, masked, and the tokenizer itself is left as it is."""
    tokenizer = loaded("gpt2")
    assert tokenizer.tokenizer.pad_token is None
    tensors, _ = tokenizer.batch(["dog", "the dog 12"])
    padding = tensors["attention_mask"] == 0
    assert padding.any() and tensors["input_ids"][padding].eq(tokenizer.tokenizer.eos_token_id).all()
    assert tokenizer.tokenizer.pad_token is None


captions_of_any_kind = st.lists(
    st.text(max_size=60) | st.sampled_from([*CORPUS, "[SEP] [MASK]", "<s></s>", "<|endoftext|> x", " fox" * 40]),
    min_size=1,
    max_size=4,
)


@each_kind
@settings(max_examples=100, deadline=None)
@given(texts=captions_of_any_kind)
@example(texts=["<mask> <mask>", " [SEP]x", "x<pad> </s>y"])
def test_rebuilt(kind, texts):
    """From its description, read back from a file: equal tensors for any text."""
    expected, num_cut = loaded(kind).batch(texts)
    found, again = rebuilt(kind).batch(texts)
    assert again == num_cut and found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


@each_kind
def test_description(kind):
    """Its name and its context are told; a rebuilt one is described alike; no trace of the batch before."""
    tokenizer = loaded(kind)
    before = tokenizer.describe()
    padding = "max_length" if tokenizer.tokenizer.pad_token else False
    tokenizer.tokenizer(["dog", "fox fox"], padding=padding, truncation=True, max_length=5)
    assert tokenizer.describe() == before
    assert (before["source"], before["context"]) == ("hf", CONTEXT) and before["name"]
    assert rebuilt(kind).describe() == before
    assert rebuilt(kind).context_length == CONTEXT


@each_kind
def test_for_loader_workers(kind):
    """A copy out of a pickle gives the same."""
    copy = pickle.loads(pickle.dumps(loaded(kind)))
    expected, found = loaded(kind).batch(CORPUS), copy.batch(CORPUS)
    assert found[1] == expected[1] and all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])


def test_a_token_that_was_added():
    """A user's own word is one token, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        write_bert(Path(folder))
        tokenizer = load_tokenizer(folder, CONTEXT)
    tokenizer.tokenizer.add_tokens(["zyzzyva"])
    again = tokenizer_from(kept(tokenizer.describe()))
    ids = tokenizer.batch(["zyzzyva"])[0]["input_ids"]
    assert ids.shape == (1, 3) and torch.equal(again.batch(["zyzzyva"])[0]["input_ids"], ids)


def test_a_slow_tokenizer(tmp_path):
    """One that is written in Python is described by its name, and read from there again."""
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), CONTEXT)
    assert not tokenizer.tokenizer.is_fast
    description = kept(tokenizer.describe())
    assert description == {"source": "hf", "name": str(tmp_path), "context": CONTEXT}
    texts = ["fox", "the quick brown fox"]
    expected, found = tokenizer.batch(texts), tokenizer_from(description).batch(texts)
    assert expected[1] == found[1] == 1
    assert torch.equal(expected[0]["input_ids"], found[0]["input_ids"])
    assert expected[0]["input_ids"][1, -1] == tokenizer.tokenizer.eos_token_id


def test_any_callable_of_that_form():
    """It is asked as Hugging Face's are, and cannot be described."""

    def letters(texts: list[str], *, padding: bool, truncation: bool, return_tensors: str) -> dict[str, torch.Tensor]:
        assert padding and truncation and return_tensors == "pt"
        return {"input_ids": torch.tensor([[ord(letter) for letter in text] for text in texts])}

    tokenizer = PretrainedTokenizer(letters, 4)
    tensors, num_cut = tokenizer.batch(["ab", "cd"])
    assert tensors["input_ids"].tolist() == [[97, 98], [99, 100]] and num_cut == 0
    assert tokenizer.describe() is None


def test_context():
    """The smaller of the encoder's and the tokenizer's own; without room for a token it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        write_unigram(Path(folder))
        assert load_tokenizer(folder, 512).context_length == 50
        assert load_tokenizer(folder, 20).context_length == 20
    with pytest.raises(ValueError, match="found 2, expected at least 3"):
        PretrainedTokenizer(loaded("bert").tokenizer, 2)


def test_a_folder_without_tokenizer(tmp_path):
    """For a folder with a model alone the library makes a tokenizer that knows no word; that is refused."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"the tokenizer cannot be loaded \(found no tokenizer.json.*Copy or download"):
        load_tokenizer(str(tmp_path), CONTEXT)


def test_a_broken_tokenizer(tmp_path):
    write_unigram(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version":')
    with pytest.raises(UserError, match=f"^hf:{tmp_path}: the tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path), CONTEXT)


def test_a_name_without_network(monkeypatch, tmp_path):
    """The message gives the two commands that help."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as failure:
        load_tokenizer("nobody/nothing", CONTEXT)
    message = str(failure.value)
    assert message.startswith(
        "hf:nobody/nothing: the tokenizer is not a folder, not in this machine's cache, and cannot be downloaded ("
    )
    assert "`hf download nobody/nothing --local-dir FOLDER`" in message
    assert message.endswith("give hf:FOLDER.")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        load_tokenizer("anything", CONTEXT)
