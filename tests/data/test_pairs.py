"""Pairs and their compact list: against plain lists of the same."""

from __future__ import annotations

import os
import pickle
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_clip.data.pairs import IN_TABLE, FlatStrings, Pair, PairList, plain_name
from train_clip.errors import BadSample

# Any names that a file system can give: bytes, as Python shows them.
NAMES = st.binary(max_size=12).map(lambda name: name.decode("utf-8", "surrogateescape")) | st.text(max_size=8)
FILES = st.tuples(NAMES, NAMES.filter(lambda name: not name.startswith(IN_TABLE)))  # an image and its captions


def made_up(number: int, root: str = "/data/", in_table: bool = False) -> PairList:
    """Pairs that lie nowhere."""
    names = [f"u/{index:09}.jpg" for index in range(number)]
    captions = [f"{IN_TABLE}line {index}\nanother" if in_table else f"u/{index:09}.txt" for index in range(number)]
    return PairList(root, names, captions)


# Strings


@given(strings=st.lists(NAMES))
def test_any_strings(strings: list[str]) -> None:
    """Text, empty strings and names that are not UTF-8: as the list that they came from, by index and in turn."""
    flat = FlatStrings(iter(strings))
    assert len(flat) == len(strings)
    assert list(flat) == strings
    assert [flat[index] for index in range(len(strings))] == strings
    assert list(pickle.loads(pickle.dumps(flat))) == strings


@pytest.mark.parametrize("strings", [[], [""], ["a", "b"]])
def test_a_place_outside_raises(strings: list[str]) -> None:
    """Before the first and behind the last: IndexError, so that nothing is read from the wrong end."""
    for index in (-1, -len(strings) - 1, len(strings), len(strings) + 1, 2**40):
        with pytest.raises(IndexError):
            FlatStrings(strings)[index]
        with pytest.raises(IndexError):
            PairList("", strings, strings)[index]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8_still_opens_its_file(tmp_path: Path) -> None:
    """A Latin-1 name through the list: the file of that name, read by it."""
    name = os.fsdecode(b"b\xe4r.txt")
    (tmp_path / name).write_text("a bear", encoding="utf-8")
    pair = PairList(str(tmp_path), ["a.jpg"], [name])[0]
    assert pair.captions() == ["a bear"]


# Pairs


@given(
    names=st.lists(FILES, max_size=20),
    root=st.sampled_from(["", "/", "data", "data/", "/a b/"]),
)
def test_any_pairs(names: list[tuple[str, str]], root: str) -> None:
    """Against ``os.path.join`` of root and name, by index, in turn, by ``in`` and as a sequence."""
    pairs = PairList(root, (image for image, _ in names), (caption for _, caption in names))
    expected = [Pair(os.path.join(root, image), os.path.join(root, caption)) for image, caption in names]  # noqa: PTH118
    assert len(pairs) == len(expected)
    assert list(pairs) == [pairs[index] for index in range(len(pairs))] == expected
    assert pairs == expected
    assert expected == pairs
    assert bool(pairs) is bool(expected)
    assert list(reversed(pairs)) == expected[::-1]
    assert all(pair in pairs for pair in expected)
    assert Pair("nowhere", "at all") not in pairs
    assert list(pairs.names) == [image for image, _ in names]
    assert isinstance(pairs, Sequence)


@given(data=st.data(), number=st.integers(0, 10), in_table=st.booleans())
def test_some_of_the_pairs(data: st.DataObject, number: int, in_table: bool) -> None:
    """Any places in any order, some twice: as picked from a plain list, and again from what was picked."""
    pairs = made_up(number, in_table=in_table)
    indices = data.draw(st.lists(st.integers(0, number - 1), max_size=15)) if number else []
    taken = pairs.take(indices)
    assert taken == [list(pairs)[index] for index in indices]
    assert list(taken.names) == [list(pairs.names)[index] for index in indices]
    assert taken.root == pairs.root
    assert taken.take(range(len(taken))[::-1]) == list(taken)[::-1]


def test_a_place_that_is_not_there_cannot_be_taken() -> None:
    """Behind the last pair and before the first: IndexError."""
    for index in (3, -1):
        with pytest.raises(IndexError):
            made_up(3).take([0, index])


def test_equality() -> None:
    """Any sequence of the same pairs in order is equal; another order, number, root or kind of thing is not."""
    pairs = made_up(3)
    for same in (list(pairs), tuple(pairs), made_up(3, "/data"), pairs.take([0, 1, 2])):
        assert pairs == same
        assert (pairs != same) is False
    for other in (
        list(pairs)[::-1],
        list(pairs)[:2],
        made_up(4),
        made_up(3, "/else"),
        made_up(3, in_table=True),
        3,
        None,
    ):
        assert pairs != other
        assert (pairs == other) is False
    assert made_up(0) == []
    with pytest.raises(TypeError):
        hash(pairs)


@pytest.mark.parametrize("in_table", [False, True])
def test_it_travels_to_a_worker(in_table: bool) -> None:
    """Pickled and back, as a spawned worker gets it: the same pairs, names and root."""
    pairs = made_up(20, in_table=in_table)
    back = pickle.loads(pickle.dumps(pairs))
    assert back == pairs
    assert (back.root, list(back.names)) == (pairs.root, list(pairs.names))


def test_one_list_behind_another() -> None:
    """Pairs of a folder, then of a table elsewhere: all of them in order, whole paths for names, and picked alike."""
    folder, table = made_up(3, "/one/"), made_up(2, "/two/", in_table=True)
    both = folder.followed_by(table)
    assert both == [*folder, *table]
    assert list(both.names) == [pair.image for pair in [*folder, *table]]
    assert both.take([4, 0]) == [table[1], folder[0]]


@pytest.mark.parametrize("in_table", [False, True])
def test_a_hundred_thousand_pairs_are_small(in_table: bool) -> None:
    """Everything that the list refers to, by ``sys.getsizeof``, and its pickle: less than 150 bytes a pair."""
    number = 100_000
    pairs = made_up(number, in_table=in_table)
    assert size_of(pairs) < 150 * number
    assert len(pickle.dumps(pairs)) < 150 * number
    assert size_of(list(pairs)) > 150 * number


def size_of(root: object) -> int:
    """Bytes of an object and of all that it holds, each once."""
    seen: set[int] = set()
    waiting, total = [root], 0
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        total += sys.getsizeof(one)
        if isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, Pair):
            waiting += [one.image, one.caption, one.texts]
        elif hasattr(one, "__dict__"):
            waiting += vars(one).values()
    return total


# Captions


@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), min_size=1), min_size=1)
)
def test_texts_of_a_table(texts: list[str]) -> None:
    """Captions joined by line breaks: those captions, whatever other separators they hold, without any file."""
    (pair,) = PairList("/nowhere/", ["a.jpg"], [IN_TABLE + "\n".join(texts)])
    assert pair == Pair("/nowhere/a.jpg", texts=tuple(texts))
    assert pair.captions() == texts


def test_captions_of_a_file(tmp_path: Path) -> None:
    """Without texts they are the file's lines; with texts the file is not asked."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert Pair("a.jpg", str(tmp_path / "a.txt")).captions() == ["one", "two"]
    assert Pair("a.jpg", str(tmp_path / "gone.txt"), ("three",)).captions() == ["three"]
    with pytest.raises(BadSample, match="caption cannot be read"):
        Pair("a.jpg", str(tmp_path / "gone.txt")).captions()


def test_nul_in_a_text_is_a_bad_sample() -> None:
    """As in a file of captions: the same reason; the path is the image's, there being no other."""
    with pytest.raises(BadSample) as caught:
        Pair("u/a.jpg", texts=("fine", "a \0 cat")).captions()
    assert (caught.value.path, caught.value.reason) == ("u/a.jpg", "caption contains NUL")


def test_the_captions_are_the_callers_own() -> None:
    """What a caller does to its list changes no pair."""
    pair = Pair("a.jpg", texts=("one", "two"))
    pair.captions().clear()
    assert pair.captions() == ["one", "two"]


# Names


@given(name=NAMES)
def test_plain_names(name: str) -> None:
    """Against unicodedata, apart and together; twice is once; a name that is not UTF-8 is left with its bytes."""
    assert plain_name(name) == unicodedata.normalize("NFC", name) == plain_name(plain_name(name))
    assert plain_name(unicodedata.normalize("NFD", name)) == plain_name(name)


def test_caches_come_along_when_lists_are_joined():
    """Each image keeps its array, by its whole path."""
    first = PairList("/one", ["a.png", "b.png"], ["a.txt", "b.txt"], ["npz/a.npz", ""])
    second = PairList("/two", ["c.png"], ["c.txt"], ["npz/c.npz"])
    joined = first.followed_by(second)
    assert [pair.cache for pair in joined] == [pair.cache for pairs in (first, second) for pair in pairs]
    assert joined.num_cached == 2
    assert joined[2].pixels == "/two/npz/c.npz"
