"""Held-out pairs and divided data sets: against the rule in words, and restated with plain lists."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_clip.data.folder import scan_folder
from train_clip.data.pairs import IN_TABLE, PairList, held_out_indices, split_pairs
from train_clip.data_tools.report import NEAR_BITS
from train_clip.data_tools.split import Looked, SplitOptions, divide, together
from train_clip.errors import UserError
from train_clip.options import PairOptions


def made_up_names(number: int) -> list[str]:
    """Names of images in seven subfolders."""
    return [f"{index % 7}/{index}.jpg" for index in range(number)]


def made_up_pairs(root: str, names: Sequence[str]) -> PairList:
    """Pairs that lie nowhere: splitting reads names alone."""
    return PairList(root, names, [f"{name}.txt" for name in names])


# Holding out


@pytest.mark.parametrize("number", [0, 1, 2, 9, 10, 11, 100, 1003])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.25, 0.5, 0.9])
def test_the_split_has_the_share_that_was_asked_for(number: int, share: float) -> None:
    """Exactly round(share · n) held out, none in place of a single one; nothing twice, both in the list's order."""
    pairs = made_up_pairs("/data", made_up_names(number))
    training, held_out = split_pairs(pairs, share)
    wanted = round(share * number)
    assert len(held_out) == (0 if wanted == 1 else wanted)
    place = {pair: index for index, pair in enumerate(pairs)}
    assert sorted([*training, *held_out], key=place.__getitem__) == list(pairs)
    apart = set(held_out)
    assert training == [pair for pair in pairs if pair not in apart]
    assert held_out == sorted(held_out, key=place.__getitem__)
    assert held_out_indices(pairs, share) == [place[pair] for pair in held_out]


@given(names=st.sets(st.text("abcdé/._ 0", min_size=1), max_size=30), share=st.floats(0, 0.99))
def test_the_split_restated(names: set[str], share: float) -> None:
    """The names whose SHA-256 is least, as many as the share comes to, against the two lists."""
    training, held_out = split_pairs(made_up_pairs("/data", sorted(names)), share)
    number = round(share * len(names))
    least = sorted(names, key=lambda name: sha256(name.encode()).digest())[: number if number > 1 else 0]
    assert list(held_out.names) == sorted(least)
    assert list(training.names) == sorted(names - set(least))


def test_the_split_depends_on_names_alone() -> None:
    """The same names elsewhere, listed in another order, or among fewer that stay: the same are held out."""
    names = made_up_names(200)
    first = set(split_pairs(made_up_pairs("/data", names), 0.2)[1].names)
    shuffled = random.Random(0).sample(names, len(names))
    second = set(split_pairs(made_up_pairs("/mnt/disk 2/copy/", shuffled), 0.2)[1].names)
    assert first == second
    smaller = set(split_pairs(made_up_pairs("/data", names), 0.1)[1].names)
    assert smaller < first


def test_captions_in_a_table_or_in_files_split_alike() -> None:
    """The same images with their captions beside them and in a table: the same are held out."""
    names = made_up_names(50)
    table = PairList("/data", names, [f"{IN_TABLE}caption {name}\nanother" for name in names])
    in_files, in_table = split_pairs(made_up_pairs("/data", names), 0.3), split_pairs(table, 0.3)
    assert [list(part.names) for part in in_files] == [list(part.names) for part in in_table]
    for part in in_table:
        assert [pair.captions() for pair in part] == [[f"caption {name}", "another"] for name in part.names]


def test_the_split_is_spread_over_the_folder() -> None:
    """A fifth of 1,400 pairs in 7 subfolders: 40 expected of each, and at most 4 deviations (5.7) more or less."""
    held_out = split_pairs(made_up_pairs("/data", made_up_names(1400)), 0.2)[1]
    for subfolder in range(7):
        count = sum(name.startswith(f"{subfolder}/") for name in held_out.names)
        assert abs(count - 40) < 23


def test_a_folder_that_was_moved_splits_alike(tmp_path: Path) -> None:
    """Scan and split on disk, move the folder, and again: the held-out names are the same."""
    (tmp_path / "old").mkdir()
    for index in range(20):
        for suffix in (".png", ".txt"):
            (tmp_path / "old" / f"{index}{suffix}").touch()
    before = split_pairs(scan_folder(tmp_path / "old").pairs, 0.3)[1]
    shutil.move(tmp_path / "old", tmp_path / "new")
    after = split_pairs(scan_folder(tmp_path / "new").pairs, 0.3)[1]
    assert [Path(pair.image).name for pair in before] == [Path(pair.image).name for pair in after]
    assert all(Path(pair.image).parent == tmp_path / "new" for pair in after)
    assert len(before) == 6


@pytest.mark.parametrize("share", [-0.1, 1.0, 2, float("nan"), float("inf")])
def test_what_is_no_share(share: float) -> None:
    """Refused word for word, under the name that it was given."""
    for kind, name in ((PairOptions, "val_share"), (SplitOptions, "val_share"), (SplitOptions, "test_share")):
        with pytest.raises(UserError) as caught:
            kind(**{name: share})
        assert str(caught.value) == f"{name} is {share}; expected from 0 to below 1."


@pytest.mark.parametrize("share", [0, 0.0, 0.5, 0.999])
def test_what_is_a_share(share: float) -> None:
    """The ends of [0, 1) and its middle pass."""
    assert PairOptions(val_share=share).val_share == SplitOptions(val_share=share).val_share == share


# Dividing

EMPTY: list[str] = []


def digests(*names: int | str) -> list[bytes]:
    """A digest of each made-up content."""
    return [sha256(str(name).encode()).digest() for name in names]


def shares_of(validation: float, test: float, seed: int, most: int | None = None) -> SplitOptions:
    """The options in a row."""
    return SplitOptions(val_share=validation, test_share=test, seed=seed, max_per_class=most)


def restated(contents: list[bytes], classes: list[str], shares: SplitOptions) -> dict[str, list[int]]:
    """The rule over again: group by group in the hash's order, to the first of test, val and train that has room."""
    order = sorted(set(contents), key=lambda content: sha256(b"%d:" % shares.seed + content).digest())
    kept, seen = [], Counter[str]()
    for content in order:
        for index in (index for index in range(len(contents)) if contents[index] == content):
            if shares.max_per_class is not None:
                seen[classes[index]] += 1
                if seen[classes[index]] > shares.max_per_class:
                    continue
            kept.append(index)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for content in order:
        group = [index for index in kept if contents[index] == content]
        if group and len(parts["test"]) + len(group) <= round(shares.test_share * len(kept)):
            parts["test"] += group
        elif group and len(parts["val"]) + len(group) <= round(shares.val_share * len(kept)):
            parts["val"] += group
        else:
            parts["train"] += group
    return {part: sorted(indices) for part, indices in parts.items()}


SHARES = st.tuples(st.floats(0, 0.49), st.floats(0, 0.49), st.integers(0, 3), st.none() | st.integers(1, 4))
PAIRS = st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), max_size=30)


@settings(max_examples=100)
@given(pairs=PAIRS, how=SHARES)
def test_any_division(pairs: list[tuple[int, str]], how: tuple[float, float, int, int | None]) -> None:
    """Against the restatement; each kept pair once, in order; equal images in one part; no part over its number."""
    contents, classes, shares = (
        digests(*(content for content, _ in pairs)),
        [kind for _, kind in pairs],
        shares_of(*how),
    )
    parts = divide(contents, classes, shares)
    assert parts == restated(contents, classes, shares)
    assert list(parts) == ["train", "val", "test"]
    kept = [index for indices in parts.values() for index in indices]
    assert len(set(kept)) == len(kept)
    assert all(indices == sorted(indices) for indices in parts.values())
    part_of = {}
    for part, indices in parts.items():
        for index in indices:
            assert part_of.setdefault(contents[index], part) == part
    counts = Counter(classes[index] for index in kept)
    if shares.max_per_class is None:
        assert sorted(kept) == list(range(len(pairs)))
    else:
        assert counts == {
            kind: min(number, shares.max_per_class)
            for kind, number in Counter(classes).items()
            if min(number, shares.max_per_class)
        }
    for part, share in (("val", shares.val_share), ("test", shares.test_share)):
        short = round(share * len(kept)) - len(parts[part])
        assert short >= 0
        # What is left to train on did not fit.
        groups = Counter(contents[index] for index in parts["train"])
        assert all(number > short for number in groups.values())


@settings(max_examples=50)
@given(pairs=PAIRS, how=SHARES, order=st.randoms(use_true_random=False))
def test_the_order_does_not_matter(
    pairs: list[tuple[int, str]], how: tuple[float, float, int, int | None], order: random.Random
) -> None:
    """Shuffled: the same contents and classes in each part, whatever the places that they came at."""
    shuffled = order.sample(pairs, len(pairs))
    outcomes = []
    for listed in (pairs, shuffled):
        parts = divide(digests(*(content for content, _ in listed)), [kind for _, kind in listed], shares_of(*how))
        outcomes.append({part: Counter(listed[index] for index in indices) for part, indices in parts.items()})
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("number", [0, 1, 10, 101, 1000])
def test_parts_of_different_images_have_their_shares(number: int) -> None:
    """Without equal images test and validation hold round(share · n) exactly."""
    parts = divide(digests(*range(number)), EMPTY, shares_of(0.2, 0.1, 0))
    assert (len(parts["val"]), len(parts["test"])) == (round(0.2 * number), round(0.1 * number))
    assert sum(map(len, parts.values())) == number


def test_the_seed_matters() -> None:
    """Two seeds take different tests, about a tenth of which (10 of 100, less than 30) they share by chance."""
    one, other = (set(divide(digests(*range(1000)), EMPTY, shares_of(0, 0.1, seed))["test"]) for seed in (0, 1))
    assert one != other
    assert len(one & other) < 30
    assert one == set(divide(digests(*range(1000)), EMPTY, shares_of(0, 0.1, 0))["test"])


def test_what_is_added_moves_few() -> None:
    """A test of 100 of 500 pairs, then of 100 of 1,000: those of the first 500 in the second were in the first."""
    few, many = (
        divide(digests(*range(number)), EMPTY, shares_of(0, 100 / number, 0))["test"] for number in (500, 1000)
    )
    assert set(many) & set(range(500)) <= set(few)


def test_equal_images_that_fit_nowhere_are_trained_on() -> None:
    """One image nine times among ten: a test of a fifth holds the other one alone, and no copy is in two parts."""
    parts = divide(digests(*[0] * 9, 1), EMPTY, shares_of(0, 0.2, 0))
    assert parts == {"train": list(range(9)), "val": [], "test": [9]}


def test_groups_of_two_in_odd_room() -> None:
    """Fifty images twice each, a test of 15 by its share: 14, the wanted number less half a group."""
    parts = divide(digests(*range(50), *range(50)), EMPTY, shares_of(0, 0.15, 3))
    assert (len(parts["test"]), len(parts["train"])) == (14, 86)
    assert {index % 50 for index in parts["test"]}.isdisjoint(index % 50 for index in parts["train"])


def test_the_cap_keeps_what_the_order_has_first() -> None:
    """Four of each of three classes of 10, 4 and 1 pairs; a larger cap keeps those and more."""
    classes = ["a"] * 10 + ["b"] * 4 + ["c"]
    kept = []
    for most in (1, 2, 4, 100):
        parts = divide(digests(*range(15)), classes, shares_of(0.2, 0.2, 5, most))
        kept.append({index for indices in parts.values() for index in indices})
        assert Counter(classes[index] for index in kept[-1]) == Counter(
            {kind: min(most, number) for kind, number in (("a", 10), ("b", 4), ("c", 1)) if most}
        )
    assert kept[0] < kept[1] < kept[2] < kept[3] == set(range(15))


def test_shares_are_of_what_the_cap_keeps() -> None:
    """Ten classes of a hundred, ten of each kept: a test of a tenth holds 10, not 100."""
    parts = divide(digests(*range(1000)), [str(index % 10) for index in range(1000)], shares_of(0.2, 0.1, 0, 10))
    assert {part: len(indices) for part, indices in parts.items()} == {"train": 70, "val": 20, "test": 10}


# What belongs together

LOOKED = st.builds(
    Looked,
    st.sampled_from([bytes([number]) for number in range(12)]),
    st.lists(st.integers(0, 15), max_size=2),
    st.integers(0, 40).map(lambda number: number * 0x9E3779B97F4A7C15 % 2**63),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(LOOKED, st.lists(st.sampled_from("abcdefgh"), max_size=2)), min_size=1, max_size=25),
    st.sampled_from(["named", "together"]),
    st.sampled_from(["ignored", "together"]),
)
def test_what_belongs_together_against_all_pairs_compared(rows, equal_captions, similar_images) -> None:
    """Of every two pairs it is asked what they share, until nothing changes; no two such are on two sides."""
    looked, groups = [one for one, _ in rows], [own for _, own in rows]
    options = SplitOptions(equal_captions=equal_captions, similar_images=similar_images, val_share=0.3, test_share=0.2)
    same = [{place} for place in range(len(rows))]

    def belong(one: int, other: int) -> bool:
        captions = equal_captions == "together" and set(looked[one].captions) & set(looked[other].captions)
        near = (looked[one].look ^ looked[other].look).bit_count() <= NEAR_BITS
        equal = looked[one].content == looked[other].content or set(groups[one]) & set(groups[other])
        return bool(equal or captions or (similar_images == "together" and near))

    for one in range(len(rows)):
        for other in range(one):
            if belong(one, other) and same[one] is not same[other]:
                joined = same[one] | same[other]
                for place in joined:
                    same[place] = joined
    keys = together(looked, groups, options)
    for one in range(len(rows)):
        assert {place for place in range(len(rows)) if keys[place] == keys[one]} == same[one]
    parts = divide(keys, [], options)
    assert sorted(place for places in parts.values() for place in places) == list(range(len(rows)))
    for places in parts.values():
        assert all(same[place] <= set(places) for place in places)


def test_where_a_group_goes_does_not_depend_on_what_else_is_in_it() -> None:
    """A group's key is that of its name: pairs that are added later, or come in another order, do not move it."""
    few = together([Looked(b"x", [], 0), Looked(b"y", [], 0)], [["a"], ["b"]], SplitOptions())
    more = together([Looked(bytes([n]), [], 0) for n in range(4)], [["b"], ["a"], ["b"], ["a"]], SplitOptions())
    assert more == [few[1], few[0], few[1], few[0]]
