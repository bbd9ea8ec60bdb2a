"""CLIP's byte-pair encoding: the ids of OpenAI's ``simple_tokenizer.py`` (github.com/openai/CLIP) for any text.

A text is cleaned, put in lower case, cut into pieces, and each piece's UTF-8 bytes are merged pair by pair, in the
order in which the pairs were learned.

Which characters are letters depends on the age of the Unicode tables, here and in the reference: the two agree on every
character of Unicode 16.0, which tokenizers 0.23 brings. A letter that is younger counts as a sign.

B  captions      L  tokens of a row, start and end included
"""

import contextlib
import functools
import gzip
import html
import importlib.resources
import re
import unicodedata
from dataclasses import dataclass

import ftfy
import numpy as np
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """Captions to CLIP's tokens, and back. It costs nothing to make or to send: a process reads the merges once."""

    context_length: int = 77  # tokens of a row, start and end included, at least 2; 77 in every CLIP by OpenAI
    vocab_size = 49_408  # 256 bytes, the same ending a word, 48,894 merges, start and end
    start_token = 49_406
    end_token = 49_407

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise ValueError(f"context_length: found {self.context_length}, expected at least 2, for start and end.")

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        """Tokenize one caption or B into (B, context_length) int64: start, ids (cut where too many), end, zeros."""
        return self.batch([texts] if isinstance(texts, str) else texts, self.context_length)[0]

    def batch(self, texts: list[str], length: int | None = None) -> tuple[torch.Tensor, int]:
        """Tokenize into (B, L) int64, L of the longest row or as given; and how many captions were cut.

        No row needs to be of the full length: the text tower is causal, so zeros after the end change nothing.
        """
        room = self.context_length - 2
        captions = self.encode(texts)
        rows = [[self.start_token, *caption[:room], self.end_token] for caption in captions]
        length = max(map(len, rows), default=0) if length is None else length
        padded = [row + [0] * (length - len(row)) for row in rows]
        # NumPy reads nested lists four times as fast as torch.tensor. The shape is for no rows at all.
        tokens = torch.from_numpy(np.array(padded, dtype=np.int64).reshape(len(rows), length))
        return tokens, sum(len(caption) > room for caption in captions)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Give each caption's ids, in [0, vocab_size), uncut, without start and end; none for an empty caption."""
        if not isinstance(texts, list):
            raise TypeError(f"texts: found {type(texts).__name__}, expected a list of str.")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{place}]: found {type(text).__name__}, expected str.")
        # No piece reaches across a blank. split() cuts where the reference's \s does, and at U+001C to U+001F, which
        # ftfy takes out and unescape leaves out.
        return [
            [
                token
                for word in _cleaned(text).lower().split()
                for token in (_remembered(word) if len(word) <= LONGEST_REMEMBERED else _word_tokens(word))
            ]
            for text in texts
        ]

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        """Give the text of one row, (L,), as far as its first end token, with a blank after each piece.

        As the reference gives it: "a dog 's tail . "; bytes that are not UTF-8, as a cut can leave them, become U+FFFD.

        Raises:
            ValueError: more than one row, or an id before the end token that is not in the vocabulary.
        """
        row = torch.as_tensor(ids)
        if row.ndim != 1:
            raise ValueError(f"ids: found a tensor of shape {tuple(row.shape)}, expected one row, (L,).")
        letters = ""
        for token in row.tolist():
            if token == self.end_token:
                break
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids: found {token}, expected 0 to {self.vocab_size - 1}.")
            letters += "" if token == self.start_token else vocabulary()[token]
        return decoders.ByteLevel().decode([letters]).replace("</w>", " ")


SPECIAL = {"<|startoftext|>": Tokenizer.start_token, "<|endoftext|>": Tokenizer.end_token}

# The reference's pattern, which it matches ignoring case. The text is in lower case by then, so that leaves two traces,
# both found by test_every_character: the long s "ſ", its own lower case, is an "s" to it, and U+0345, a mark with a
# letter for its upper case, is neither sign nor letter to it and gets lost.
PATTERN = r"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"

# A word that is met again comes out of memory, ten times as fast as out of the library. The words take under 10 MB in
# English and 50 MB in Chinese; a longer one (an address, a sentence of Chinese) hardly returns and could take any room.
NUM_REMEMBERED = 2**15
LONGEST_REMEMBERED = 16


# Letters that no cleaning takes away, unless they are in an entity or an escape sequence: ASCII, kana, Han, Hangul.
LASTING = re.compile("[0-9A-Za-z\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]")
# Besides spaces, control and format characters: what Unicode calls default ignorable, the Braille blank, and U+0345,
# which makes no token.
INVISIBLE = re.compile(
    "[\u0345\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)


def is_empty(caption: str) -> bool:
    """Whether nothing is to be seen of a caption, as it is or as the model reads it: no word, no sign, no picture."""
    if LASTING.search(caption) and "&" not in caption and "\x1b" not in caption:
        return False
    return any(
        all(unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp", "Zs") for letter in INVISIBLE.sub("", text))
        for text in (caption, _cleaned(caption))
    )


def _cleaned(text: str) -> str:
    # ftfy and unescape change nothing in printable ASCII without "&": what they look for is an entity, a control
    # character (escape sequences and line breaks among them) or a character beyond ASCII, and NFC keeps ASCII.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        # An entity of over 4,300 digits, at which int() and so the reference stop, leaves the text as it is.
        with contextlib.suppress(ValueError):
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text


def _word_tokens(word: str) -> tuple[int, ...]:
    split, bpe = _split_and_bpe()
    tokens: list[int] = []
    for piece, _ in split.pre_tokenize_str(word):
        # Not as added tokens of the library: it would find them in "!!<|endoftext|>", where the reference sees signs.
        tokens += [SPECIAL[piece]] if piece in SPECIAL else [token.id for token in bpe.tokenize(piece)]
    return tuple(tokens)


_remembered = functools.lru_cache(NUM_REMEMBERED)(_word_tokens)


@functools.cache
def _split_and_bpe() -> tuple[pre_tokenizers.PreTokenizer, models.BPE]:
    bpe = models.BPE(
        vocab={token: place for place, token in enumerate(vocabulary())},
        merges=merges(),
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
    )
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return split, bpe


@functools.cache
def vocabulary() -> list[str]:
    """Every token as a vocabulary file has it, by id: the bytes, those that end a piece, the merges, start and end."""
    # GPT-2's order: bytes that print stand for themselves, and the others for characters from U+0100 on.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges()), *SPECIAL]


@functools.cache
def merges() -> list[tuple[str, str]]:
    """The pairs of tokens that are merged, in the order in which they were learned."""
    packed = importlib.resources.files("train_clip.data").joinpath("clip_bpe_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return [(first, second) for first, second in map(str.split, lines)]
