"""The tokenizer against OpenAI's, restated below in plain Python from simple_tokenizer.py (github.com/openai/CLIP)."""

from __future__ import annotations

import gzip
import hashlib
import html
import itertools
import multiprocessing
import pickle
import unicodedata
from pathlib import Path

import ftfy
import pytest
import regex
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_clip.data
from train_clip.data.tokenizer import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(train_clip.data.__file__).with_name("clip_bpe_merges.txt.gz")


class Reference:
    """OpenAI's ``SimpleTokenizer``: the same steps, one word at a time, without its cache."""

    pattern = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )

    def __init__(self) -> None:
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        self.letter = {byte: chr(byte) for byte in printable}
        for byte in range(256):
            if byte not in printable:
                self.letter[byte] = chr(256 + len(self.letter) - len(printable))
        merges = [tuple(line.split()) for line in gzip.decompress(MERGES.read_bytes()).decode().splitlines()]
        letters = list(self.letter.values())
        vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
        self.ids = {token: place for place, token in enumerate([*vocabulary, START, END])}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    def clean(self, text: str) -> str:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        return regex.sub(r"\s+", " ", text).strip().lower()

    def encode(self, text: str) -> list[int]:
        pieces = regex.findall(self.pattern, self.clean(text))
        return [self.ids[token] for piece in pieces for token in self.merge(piece)]

    def merge(self, piece: str) -> list[str]:
        if piece in (START, END):
            return [piece]
        word = [self.letter[byte] for byte in piece.encode("utf-8")]
        word[-1] += "</w>"
        while pairs := [pair for pair in itertools.pairwise(word) if pair in self.ranks]:
            first, second = min(pairs, key=self.ranks.__getitem__)
            merged: list[str] = []
            place = 0
            while place < len(word):
                width = 2 if word[place : place + 2] == [first, second] else 1
                merged.append("".join(word[place : place + width]))
                place += width
            word = merged
        return word

    def row(self, text: str, context_length: int) -> list[int]:
        """``clip.tokenize(text, truncate=True)``."""
        tokens = [self.ids[START], *self.encode(text), self.ids[END]]
        if len(tokens) > context_length:
            tokens = tokens[:context_length]
            tokens[-1] = self.ids[END]
        return tokens + [0] * (context_length - len(tokens))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


FRAGMENTS = [
    # words and contractions
    *("a", "dog", "Photo", "ÉCOLE", "o'clock", "it's", "IT'S", "we'Ve", "they'll", "'d", "'re"),
    *("''s", "’s", "‘tis", "ʼs"),
    # the long s, Turkish İ and ı, the Kelvin sign, final sigma, the iota mark that is no letter, ligatures
    *("ſ", "'ſ", "’ſ", "İstanbul", "ıI", "K", "ΟΔΟΣ", "ΑΣ.", "\u0345", "α\u0345", "!\u0345!", "ﬁ", "ﬅ", "ẞ", "Ǆ"),
    # special strings, whole, inside and nearly
    *(START, END, "<|StartOfText|>", "<|ſtartoftext|>", "<|endofteẋt|>", "<|", "|>", "endoftext", "!!<|endoftext|>"),
    *("&lt;|endoftext|&gt;", "&amp;lt;|startoftext|&amp;gt;"),
    # blanks and characters that are nearly blanks
    *(" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0"),
    *("\u1680", "\u180e", "\u2007", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff"),
    # control characters, escape sequences, lone and paired surrogates, what is no character
    *("\x00", "\x01", "\x08", "\x1a", "\x1b[31m", "\x7f", "\x80", "\x81", "\x9f", "\ud83d", "\ude00", "\ud83d\ude00"),
    *("\ufffd", "\ufffe", "\ufffc", "\U0010ffff", "\ue000"),
    # HTML entities: once, twice and thrice escaped, without a semicolon, into blanks and control characters
    *("&amp;", "&amp;amp;", "&amp;amp;amp;", "&", "&#", "&#;", "&lt;b&gt;", "<b>", "<", ">", "&quot;"),
    *("&apos;s", "&#39;s", "&nbsp;", "&#10;", "&#13;", "&#28;", "&amp;#28;", "&#x1f;", "&#0;", "&#x85;"),
    *("&#x81;", "&#xd83d;", "&#x110000;", "&NewLine;", "&notit;", "&copy", "&EACUTE;", "&eacute;"),
    *("&amp;eacute;", "&bigoplus;", "&#x1F600;", "&#65279;"),
    # mojibake, full width, curly quotes
    *("âœ”", "Ã©", "Ã ", "â€™s", "â€œ", "schÃ¶n", "Ｆｕｌｌ", "ｶﾞ", "“q”", "‚", "…", "\xc2", "\xe2\x80\x99"),
    # combining characters and joiners, emoji with skin, family and flags
    *("e\u0301", "\u0301", "q\u0323\u0307", "क्षि", "น้ำ", "👍🏽", "👩‍👩‍👧‍👦", "🇳🇱🇧🇷", "\u200d", "\ufe0f"),
    *("🏴\U000e0067\U000e007f", "❤️"),
    # other scripts, digits and signs
    *("東京タワー", "北京", "한국어", "العربية", "שלום", "Привет", "ελληνικά", "٣٤", "४", "Ⅷ"),
    *("½", "x²", "①", "1234", "3.14"),
    *("_", "__init__", "snake_case", "-", "--", "#tag", "@", "a/b", "http://x.io/?a=1&b=2", "!!!", "$5"),
    *("°C", "™", "</w>"),
]

HARD_TEXTS = [
    "",
    " \t\n ",
    "A photo of a dog, isn't it?",
    "The\u00a0dog’s   “ball”\r\n&amp;amp; it&#39;s  the cat&rsquo;s",
    "we'LL they'Ve I'M you'Re he'D don'T 'S's's",
    "&amp;lt;|endoftext|&amp;gt; is <|endoftext|>, and !!<|endoftext|>!!<|startoftext|>a",
    "it'ſ ſo <|ſtartoftext|> ΟΔΟΣ ΣΑΣ. İI K Å \u1fb3 a\u0345b !\u0345! \u0345",
    "l’Ã©cole âœ” No problems â€” schÃ¶n, voilÃ le travail",
    "👩‍👩‍👧‍👦 🇳🇱🇧🇷 👍🏽❤️ family&#x200d;flag 東京tower2024年",
    "IMG_2041.JPG 1/250s f/2.8 ISO100 #no_filter @user 50%_off",
    "\x00a\x0bb\x1cc\x1fd\x7fe\x80f\x85g\xadh\u180ei\u200bj\u2028k\ufeffl\ud83dm",
    "</w> a</w>b Ġ Ã Â¡ ŀ",
    "antidisestablishmentarianism " * 3 + "a" * 300 + "ab" * 200 + "🙂" * 50 + "!" * 100,
    *FRAGMENTS,
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_text(tokenizer, reference, text):
    """The ids of a text that went wrong somewhere once, against the reference."""
    assert tokenizer.encode([text]) == [reference.encode(text)]


def test_every_character(tokenizer, reference):
    """Each character that is assigned, by its neighbours' class and after an apostrophe, against the reference.

    Ideographs, syllables and private characters by the first of each block: the rest of a block is alike.
    """
    alike = (range(0x3401, 0x4DBF), range(0x4E01, 0x9FFF), range(0xAC01, 0xD7A3), range(0xE001, 0xF8FF))
    alike += (range(0x17001, 0x18CD5), range(0x20001, 0x323AF), range(0xF0001, 0xFFFFD), range(0x100001, 0x10FFFD))
    characters = [chr(point) for point in range(0x110000) if not any(point in block for block in alike)]
    texts = [f"a{c}b !{c}! 1{c} '{c}" for c in characters if unicodedata.category(c) != "Cn"]
    assert len(texts) > 30_000
    different = [
        text for text, ids in zip(texts, tokenizer.encode(texts), strict=True) if ids != reference.encode(text)
    ]
    assert different == []


assigned_text = st.text(st.characters(exclude_categories=("Cn",)), max_size=60)
nasty_text = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def is_settled(text: str) -> bool:
    """Whether this Python's Unicode tables hold every character, or none ever will.

    Two engines differ on a letter that is younger than one of them. The clean-up can make one out of mojibake.
    """
    return all(unicodedata.category(c) != "Cn" or ord(c) % 0x10000 >= 0xFFFE for c in text)


@given(assigned_text)
@settings(max_examples=1000, deadline=None)
def test_any_text(tokenizer, reference, text):
    """The ids of arbitrary text, against the reference."""
    assume(is_settled(reference.clean(text)))
    assert tokenizer.encode([text]) == [reference.encode(text)]


@given(nasty_text)
@settings(max_examples=1000, deadline=None)
def test_any_mixture(tokenizer, reference, text):
    """The ids of fragments that clean-up and split each treat specially, in any order, against the reference."""
    assume(is_settled(reference.clean(text)))
    assert tokenizer.encode([text]) == [reference.encode(text)]


@given(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_word(tokenizer, reference, word):
    """The order of merges in words that nobody has seen, remembered or not, against the reference's loop."""
    assert tokenizer.encode([word, word]) == [reference.encode(word)] * 2


printable_ascii = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="&"), max_size=60)
nearly_special = st.lists(
    st.sampled_from(["#39;", "lt;", "amp;", "<", "[31m", "\\x1b[0m", "\\u00e9", "?", "A ", "=C3=A9", "''", '"']),
    max_size=12,
)


@given(printable_ascii | nearly_special.map("".join))
@settings(max_examples=1000, deadline=None)
def test_skipping_the_clean_up(tokenizer, reference, text):
    """Printable ASCII without "&" is what ftfy and two unescapes leave as it is, and it gets the reference's ids."""
    assert html.unescape(html.unescape(ftfy.fix_text(text))) == text
    assert reference.clean(text) == " ".join(text.split()).lower()
    assert tokenizer.encode([text]) == [reference.encode(text)]


def test_merges_are_openais():
    """The package's merges, against the digest of OpenAI's file.

    ``zcat bpe_simple_vocab_16e6.txt.gz | sed -n 2,48895p | sha256sum``, in CLIP and in open_clip_torch 3.3.0.
    """
    digest = hashlib.sha256(gzip.decompress(MERGES.read_bytes())).hexdigest()
    assert digest == "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"


def test_sizes(tokenizer, reference):
    """The vocabulary's size and the two special ids, against the reference's vocabulary."""
    assert tokenizer.vocab_size == len(reference.ids)
    assert (tokenizer.start_token, tokenizer.end_token) == (reference.ids[START], reference.ids[END])


@pytest.mark.parametrize("context_length", [2, 3, 16, 77])
def test_rows_and_cutting(reference, context_length):
    """Captions around the context's length, against the reference's truncation; those that were cut are counted."""
    tokenizer = Tokenizer(context_length)
    room = context_length - 2
    lengths = [length for length in (0, room - 1, room, room + 1, 2 * room + 5) if length >= 0]
    texts = ["dog " * length for length in lengths]
    rows = tokenizer(texts)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [reference.row(text, context_length) for text in texts]
    assert tokenizer.batch(texts)[1] == sum(length > room for length in lengths)


@given(st.lists(nasty_text, max_size=5), st.integers(2, 20))
@settings(max_examples=200, deadline=None)
def test_batch_is_the_rows_without_common_padding(texts, context_length):
    """``batch`` filled up with zeros is ``__call__``, and the end token of its longest row is in the last column."""
    tokenizer = Tokenizer(context_length)
    rows, (tokens, num_cut) = tokenizer(texts), tokenizer.batch(texts)
    assert tokens.dtype == torch.int64
    assert torch.equal(torch.nn.functional.pad(tokens, (0, context_length - tokens.shape[1])), rows)
    assert num_cut == sum(len(ids) > context_length - 2 for ids in tokenizer.encode(texts))
    if texts:
        assert tokenizer.end_token in tokens[:, -1]


def test_one_caption_none_and_blank(tokenizer):
    """A string is one row, no captions are no rows, and a blank caption is start and end, by hand."""
    assert tokenizer("").tolist() == [[49406, 49407, *[0] * 75]]
    assert torch.equal(tokenizer("a dog"), tokenizer(["a dog"]))
    assert tokenizer([]).shape == (0, 77)
    assert tokenizer.batch([])[0].shape == (0, 0)
    assert tokenizer.batch([" \n", "&nbsp;"])[0].tolist() == [[49406, 49407]] * 2


words = st.text("abcdefghijklmnopqrstuvwxyzABC", min_size=1, max_size=12)


@given(st.lists(words, max_size=10).map(" ".join))
@settings(max_examples=200, deadline=None)
def test_decoding_plain_words(tokenizer, reference, text):
    """Ids, a row with its frame and padding, and a tensor decode to the cleaned text with a blank after each word."""
    cleaned = "".join(word + " " for word in reference.clean(text).split())
    assert tokenizer.decode(tokenizer.encode([text])[0]) == cleaned
    wide = Tokenizer(context_length=200)
    assert wide.decode(wide(text)[0]) == wide.decode(wide(text)[0].tolist()) == cleaned


def test_decoding_half_a_character(tokenizer):
    """Half of an emoji's bytes decode to U+FFFD, and what follows the end token is dropped, by hand."""
    half = tokenizer.encode(["\u2c62"])[0][:1]
    assert tokenizer.decode(half) == b"\xe2".decode("utf-8", errors="replace")
    assert tokenizer.decode([49406, *tokenizer.encode(["dog!"])[0], 49407, 0, 0, 320]) == "dog ! "


@pytest.mark.parametrize(
    ("texts", "found"),
    [(None, "NoneType"), (b"a dog", "bytes"), (("a",), "tuple"), (["a", 3], "int")],
)
def test_texts_of_another_type(tokenizer, texts, found):
    """What is no text is named, and where it stands, instead of being read as something else."""
    with pytest.raises(TypeError, match=rf"texts(\[1\])?: found {found}, expected"):
        tokenizer(texts)


def test_batch_of_a_string(tokenizer):
    """A lone string is refused by ``batch`` and ``encode``, which would otherwise read it letter by letter."""
    for method in (tokenizer.batch, tokenizer.encode):
        with pytest.raises(TypeError, match="found str, expected a list of str"):
            method("a dog")


@pytest.mark.parametrize("ids", [[-1], [49408], torch.zeros(2, 77, dtype=torch.int64)])
def test_ids_outside_the_vocabulary(tokenizer, ids):
    """An id that is no token, or two rows at once, is refused: a negative one would count from the end."""
    with pytest.raises(ValueError, match="ids: found"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("digits", ["1" * 4301, "0" * 5000, "\uff11" * 5000, ("1" * 100 + "\x7f") * 60])
def test_entity_of_too_many_digits(tokenizer, reference, digits, monkeypatch):
    """The one text that stops the reference, in ``int()``: the ids of the reference without its clean-up of it."""
    text = f"A caf\u00e9 &amp; &#{digits}; it\u2019s"
    with pytest.raises(ValueError, match="4300 digits"):
        reference.encode(text)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "clean", lambda text: regex.sub(r"\s+", " ", text).strip().lower())
        expected = reference.encode(text)
    assert tokenizer.encode([text, "a dog", text]) == [expected, reference.encode("a dog"), expected]


def test_entity_of_as_many_digits_as_are_read(tokenizer, reference):
    """4,300 digits, and 5,000 of hexadecimal, which have no limit: an ordinary text, against the reference."""
    for entity in (f"&#{'1' * 4300};", f"&#x{'1' * 5000};"):
        assert tokenizer.encode([f"a {entity} b"]) == [reference.encode(f"a {entity} b")]


def test_context_without_room():
    """A context that cannot hold start and end is refused when it is set."""
    with pytest.raises(ValueError, match="context_length: found 1"):
        Tokenizer(1)


def test_pickling(tokenizer):
    """A copy that went through pickle gives the same rows, and carries no vocabulary: under 200 bytes."""
    packed = pickle.dumps(tokenizer)
    assert len(packed) < 200
    assert torch.equal(pickle.loads(packed)(HARD_TEXTS), tokenizer(HARD_TEXTS))


@pytest.mark.parametrize("start", sorted({"fork", "spawn"} & {*multiprocessing.get_all_start_methods()}))
def test_worker_processes(tokenizer, start, capfd):
    """A worker gives its parent's ids, and nothing is printed: the library warns when its threads meet a fork."""
    expected = tokenizer.encode(HARD_TEXTS)
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(tokenizer.encode, (HARD_TEXTS,)) == expected
    assert capfd.readouterr() == ("", "")
