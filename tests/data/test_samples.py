"""Samples: what is drawn depends on (seed, epoch, index) alone, and a bad file never changes a batch's shape."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from train_clip.data.crops import center_crop, to_tensor
from train_clip.data.pairs import Pair
from train_clip.data.samples import MAX_SUBSTITUTES, Sample, Skip, TrainingPairs, ValidationPairs
from train_clip.errors import UserError

NumberedPairs = Callable[..., list[Pair]]
SIZE = 16


def plain(sample: Sample) -> tuple[bytes, str, tuple[Skip, ...]]:
    """A sample that can be compared."""
    assert sample.pixels.dtype == torch.uint8
    assert sample.pixels.shape == (3, SIZE, SIZE)
    return sample.pixels.numpy().tobytes(), sample.caption, sample.skips


def training(pairs: list[Pair], seed: int = 0, resize_ratio: float | None = None) -> TrainingPairs:
    return TrainingPairs(pairs, SIZE, resize_ratio, seed)


def as_list(samples: list[Sample]) -> list[Sample]:
    """Leave a loader's samples as they are."""
    return samples


@pytest.mark.parametrize("resize_ratio", [None, 0.5])
def test_a_sample_depends_on_seed_epoch_and_index_alone(
    numbered_pairs: NumberedPairs, resize_ratio: float | None
) -> None:
    """One instance in order, another in a shuffled order with other draws in between: equal samples."""
    pairs = numbered_pairs(5, lines=3)
    (Path(pairs[2].image)).write_bytes(b"")
    keys = [(epoch, index) for epoch in range(3) for index in range(5)]
    one, other = training(pairs, 7, resize_ratio), training(pairs, 7, resize_ratio)
    expected = {key: plain(one[key]) for key in keys}
    shuffled = random.Random(0).sample(keys, len(keys))
    for key in shuffled:
        other[(99, 0)]
        np.random.seed(key[1])
        torch.manual_seed(key[0])
        assert plain(other[key]) == expected[key]


def test_seed_and_epoch_matter(numbered_pairs: NumberedPairs) -> None:
    """Another seed, another epoch, another index of the same file: other crops."""
    pair = numbered_pairs(1, lines=1, side=(60, 20))[0]
    pairs = [pair] * 4
    crops = [
        plain(training(pairs, seed)[(epoch, index)])[0] for seed in (0, 1, 2) for epoch in (0, 1) for index in (0, 3)
    ]
    assert len(set(crops)) > len(crops) // 2
    assert len({plain(training(pairs)[(epoch, 0)])[0] for epoch in range(20)}) > 5
    assert len({plain(training(pairs, seed)[(0, 0)])[0] for seed in range(20)}) > 5


def test_workers_change_nothing(numbered_pairs: NumberedPairs) -> None:
    """Two epochs, no workers against two that live on: the same batches, with substitutes for a bad file among them."""
    pairs = numbered_pairs(10, lines=2)
    Path(pairs[4].image).write_bytes(b"no picture")
    dataset = training(pairs, 3, 0.4)
    keys = [(epoch, index) for epoch in range(2) for index in range(10)]
    outcomes = []
    for workers in (0, 2):
        loader = DataLoader(
            dataset,
            batch_size=4,
            sampler=keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=as_list,
        )
        outcomes.append([[plain(sample) for sample in batch] for _ in range(2) for batch in loader])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][:5] == outcomes[0][5:]
    assert sum(bool(skips) for batch in outcomes[0] for _, _, skips in batch) == 4


def test_a_random_caption_line_each_epoch(numbered_pairs: NumberedPairs) -> None:
    """Four lines over 200 epochs: all occur, 50 times each within 5 deviations, two pairs apart from each other."""
    dataset = training(numbered_pairs(2, lines=4))
    drawn = [[dataset[(epoch, index)].caption for epoch in range(200)] for index in range(2)]
    for index, captions in enumerate(drawn):
        counts = Counter(captions)
        assert set(counts) == {f"pair {index} line {line}" for line in range(4)}
        assert all(abs(count - 50) < 5 * np.sqrt(200 * 0.25 * 0.75) for count in counts.values())
    assert [caption[-1] for caption in drawn[0]] != [caption[-1] for caption in drawn[1]]


def test_a_plain_index_is_epoch_0(numbered_pairs: NumberedPairs) -> None:
    """What Lightning's own samplers ask for under overfit_batches, against the key (0, index)."""
    dataset = training(numbered_pairs(3, lines=3))
    assert [plain(dataset[index]) for index in range(3)] == [plain(dataset[(0, index)]) for index in range(3)]


BAD_FILES = {
    "image": (lambda pair: pair.image, b"<html>", "not an image but an HTML page"),
    "caption": (lambda pair: pair.caption, b"\xe4", "caption is not UTF-8"),
    "blank caption": (lambda pair: pair.caption, b" \n", "caption is empty"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_replaced_and_named(numbered_pairs: NumberedPairs, what: str) -> None:
    """The substitute is another whole pair, the same on every read; the skip names file and reason."""
    pairs = numbered_pairs(8, lines=2)
    path_of, content, why = BAD_FILES[what]
    path = path_of(pairs[3])
    Path(path).write_bytes(content)
    dataset = training(pairs)
    seen = set()
    for epoch in range(12):
        sample = dataset[(epoch, 3)]
        assert plain(dataset[(epoch, 3)]) == plain(sample)
        assert set(sample.skips) == {Skip(path, why)}
        substitute = int(sample.caption.split()[1])
        assert substitute != 3
        # The picture's red value is ten times its number; bicubic weights that sum to 1 keep it.
        assert (sample.pixels[0] == 10 * substitute).all()
        seen.add(substitute)
    assert len(seen) > 3
    good = dataset[(0, 5)]
    assert (good.skips, good.missing, good.caption.split()[1]) == ((), False, "5")


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_that_is_held_out_leaves_its_place_empty(numbered_pairs: NumberedPairs, what: str) -> None:
    """No other pair takes its place, or that would be scored twice: black pixels, marked as missing, and why."""
    pairs = numbered_pairs(8, lines=2)
    path_of, content, why = BAD_FILES[what]
    path = path_of(pairs[3])
    Path(path).write_bytes(content)
    dataset = ValidationPairs(pairs, SIZE)
    sample = dataset[3]
    assert (sample.skips, sample.missing, sample.caption) == ((Skip(path, why),), True, "")
    assert sample.pixels.shape == dataset[5].pixels.shape
    assert not sample.pixels.any()
    assert (dataset[5].skips, dataset[5].missing, dataset[5].caption.split()[1]) == ((), False, "5")


def test_a_substitute_depends_on_seed_and_index_too(numbered_pairs: NumberedPairs) -> None:
    """Bad at every other place: not all of them get the same substitute, and another seed draws others."""
    pairs = numbered_pairs(12)
    for pair in pairs[::2]:
        Path(pair.image).write_bytes(b"")
    drawn = [[training(pairs, seed)[(0, index)].caption for index in range(0, 12, 2)] for seed in range(3)]
    assert all(len(set(captions)) > 1 for captions in drawn)
    assert len({tuple(captions) for captions in drawn}) == 3


def test_each_bad_draw_is_recorded(numbered_pairs: NumberedPairs) -> None:
    """One good pair among four: every sample is that one, and its skips name bad files alone, the asked one first."""
    pairs = numbered_pairs(4)
    for pair in pairs[:3]:
        Path(pair.image).write_bytes(b"")
    for index in range(3):
        sample = training(pairs)[(0, index)]
        assert sample.caption == "pair 3 line 0"
        assert sample.skips[0].path == pairs[index].image
        assert {skip.path for skip in sample.skips} <= {pair.image for pair in pairs[:3]}


def test_a_file_that_vanishes_or_breaks_during_the_run(numbered_pairs: NumberedPairs) -> None:
    """Read well once, then gone, then back: a sample, a substitute, the sample again."""
    pairs = numbered_pairs(4)
    dataset = training(pairs)
    before = plain(dataset[(0, 1)])
    content = Path(pairs[1].image).read_bytes()
    Path(pairs[1].image).unlink()
    assert dataset[(0, 1)].skips[0] == Skip(pairs[1].image, "file does not exist")
    Path(pairs[1].image).write_bytes(content)
    assert plain(dataset[(0, 1)]) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_files_stops(numbered_pairs: NumberedPairs, workers: int) -> None:
    """Every image empty: a UserError that names the first file and why, in this process and out of a worker."""
    pairs = numbered_pairs(3)
    for pair in pairs:
        Path(pair.image).write_bytes(b"")
    loader = DataLoader(training(pairs), sampler=[(0, 1)], num_workers=workers, collate_fn=as_list)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert f"{pairs[1].image}: empty file; " in str(caught.value)
    assert f"and {MAX_SUBSTITUTES - 1} randomly chosen" in str(caught.value)


def test_the_error_out_of_a_worker_ends_in_the_message_without(numbered_pairs: NumberedPairs) -> None:
    """PyTorch puts a worker's traceback before it: what follows the last "UserError: " is the message of no workers."""
    pairs = numbered_pairs(2)
    for pair in pairs:
        Path(pair.image).write_bytes(b"")
    messages = []
    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            list(DataLoader(training(pairs), sampler=[(0, 1)], num_workers=workers, collate_fn=as_list))
        messages.append(str(caught.value))
    assert "UserError: " not in messages[0]
    assert messages[1].rpartition("UserError: ")[2].rstrip() == messages[0]


def test_validation_reads_the_centre_and_the_first_line(numbered_pairs: NumberedPairs) -> None:
    """Against center_crop and the file's first line, read here; the same on every read."""
    pairs = numbered_pairs(4, lines=3, side=(23, 31))
    dataset = ValidationPairs(pairs, SIZE)
    assert len(dataset) == 4
    for index, pair in enumerate(pairs):
        with Image.open(pair.image) as picture:
            expected = to_tensor(center_crop(picture, SIZE))
        for _ in range(2):
            assert plain(dataset[index]) == (expected.numpy().tobytes(), f"pair {index} line 0", ())


def test_sizes_of_the_sample(numbered_pairs: NumberedPairs) -> None:
    """Any size that is asked for, in all three ways to crop."""
    pairs = numbered_pairs(1)
    for size in (1, 7, 32, 65):
        for dataset in (TrainingPairs(pairs, size, ratio, 0) for ratio in (None, 0.5)):
            assert dataset[(0, 0)].pixels.shape == (3, size, size)
        assert ValidationPairs(pairs, size)[0].pixels.shape == (3, size, size)
