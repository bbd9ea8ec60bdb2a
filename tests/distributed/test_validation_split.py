"""The validation split: scored on two gloo processes as on one, and on one as a loop scores it.

N  pairs of the split      G  pairs of a global batch      W  processes
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data.distributed import DistributedSampler
from two_processes import run

from train_clip.gather import world
from train_clip.models.clip import caption_ids, up_to_end
from train_clip.training.validation import ValidationSplit, interleave

W = 2
START, END = 90, 91
SCALE = torch.tensor(9.0)  # exact in any precision
# N and G: a remainder and padding, padding alone, neither, a batch that is larger than the split.
SPLITS = [(23, 8), (11, 4), (16, 4), (7, 16)]


def pairs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images and texts of unit norm in float64, and tokens of few different captions, so that some repeat."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    texts = images + 0.8 * torch.randn(count, 4, dtype=torch.float64, generator=generator)
    tokens = torch.zeros(count, 12, dtype=torch.long)
    for row, kind in zip(tokens, torch.randint(count // 2, (count,), generator=generator).tolist(), strict=True):
        used = 3 + kind % 8
        row[0], row[1:used], row[used] = START, 1 + kind, END
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1), tokens


def ids_of(tokens: Tensor) -> Tensor:
    """Of CLIP's tokens."""
    return caption_ids(tokens, up_to_end(tokens))


def score(count: int, batch: int, places: list[int], dataset: Any) -> dict[str, float]:
    """Hand the pairs at these places to a split, batch by batch, the captions cut after each batch's longest."""
    split = ValidationSplit(4)
    images, texts, tokens = pairs(count)
    for start in range(0, len(places), batch):
        chosen = places[start : start + batch]
        longest = int(tokens[chosen].argmax(dim=1).max()) + 1
        split.add(images[chosen], texts[chosen], ids_of(tokens[chosen, :longest]))
    return split.score(SCALE, dataset)


def everything() -> dict[Any, Any]:
    """Each split as Lightning shares it out, and one without a length of which rank 0 has more."""
    rank, size = world()
    figures: dict[Any, Any] = {}
    for count, batch in SPLITS:
        dataset = range(count)
        sampler = DistributedSampler(dataset, num_replicas=size, rank=rank, shuffle=False)
        figures[count, batch] = score(count, batch // size, list(sampler), dataset)
    places = list(range(13)) if rank == 0 else list(range(13, 23))
    figures["stream"] = score(23, 4, places, None)
    figures["empty"] = ValidationSplit(4).score(SCALE)
    return figures


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[Any, Any]]:
    return run(everything, tmp_path_factory.mktemp("validation"), W)


@pytest.mark.parametrize(("count", "batch"), SPLITS)
def test_two_processes_score_what_one_does(results, count, batch):
    """Loss and recalls of two processes, with a sampler's padding, against one process's: 1e-12, on both ranks."""
    expected = score(count, batch, list(range(count)), range(count))
    for result in results:
        assert result[count, batch] == pytest.approx(expected, abs=1e-12)


def test_stream_of_unequal_parts(results):
    """Without a length, and with unequal parts, no pair is lost: recalls against one process's."""
    expected = score(23, 8, list(range(23)), None)
    for result in results:
        recalls = {name: value for name, value in result["stream"].items() if name.startswith("val/R@")}
        assert len(recalls) == 6
        assert recalls == pytest.approx({name: expected[name] for name in recalls}, abs=1e-12)


def test_nothing_added(results):
    """A split to which nothing was added has no figures."""
    assert [result["empty"] for result in results] == [{}, {}]


@pytest.mark.parametrize(("count", "batch"), SPLITS)
def test_figures_of_one_process(count, batch):
    """Loss over batches and recall over the whole split, against loops over numbers: 1e-12."""
    images, texts, tokens = (side.tolist() for side in pairs(count))
    found = score(count, batch, list(range(count)), range(count))
    similarity = [[math.fsum(a * b for a, b in zip(i, t, strict=True)) for t in texts] for i in images]
    losses = []
    for place in range(count):
        start = place - place % batch
        others = range(start, min(start + batch, count))
        rows = math.log(math.fsum(math.exp(9 * similarity[place][other]) for other in others))
        columns = math.log(math.fsum(math.exp(9 * similarity[other][place]) for other in others))
        losses.append((rows + columns) / 2 - 9 * similarity[place][place])
    assert found["val/loss"] == pytest.approx(math.fsum(losses) / count, abs=1e-12)
    for name, table in (("image_to_text", similarity), ("text_to_image", list(zip(*similarity, strict=True)))):
        ranks = []
        for place, row in enumerate(table):
            right = {other for other in range(count) if tokens[other] == tokens[place]}
            best = max(row[other] for other in right)
            ranks.append(sum(value >= best for other, value in enumerate(row) if other not in right))
        equal = [tokens.count(one) for one in tokens]
        for k in (1, 5, 10):
            assert found[f"val/R@{k}_{name}"] == pytest.approx(sum(rank < k for rank in ranks) / count, abs=1e-12)
            missed = [math.comb(count - right, k) / math.comb(count, min(k, count)) for right in equal]
            assert found[f"val/chance_R@{k}_{name}"] == pytest.approx(1 - math.fsum(missed) / count, abs=1e-12)
    recalls = [value for name, value in found.items() if name.startswith("val/R@")]
    assert found["val/mean_recall"] == pytest.approx(sum(recalls) / 6, abs=1e-12)


def test_split_starts_afresh():
    """A score forgets what it scored: the second of two equal rounds gives the same figures."""
    split = ValidationSplit(4)
    figures = []
    images, texts, tokens = pairs(11)
    for _ in range(2):
        split.add(images, texts, ids_of(tokens))
        figures.append(split.score(SCALE, range(11)))
    assert figures[0] == figures[1]
    assert split.score(SCALE) == {}


def test_remainder_is_weighted_by_its_size():
    """Five pairs in batches of four: the last is alone, its loss is 0, and it counts one fifth."""
    whole, first = score(5, 4, list(range(5)), range(5)), score(5, 4, list(range(4)), None)
    assert whole["val/loss"] == pytest.approx(first["val/loss"] * 4 / 5, abs=1e-12)


@pytest.mark.parametrize("total", [7, 8, None])
def test_interleave(total):
    """What ``DistributedSampler`` dealt out to three processes, put back in order, its padding dropped."""
    count = total or 9
    shares = [
        torch.tensor(list(DistributedSampler(range(count), num_replicas=3, rank=rank, shuffle=False)))
        for rank in range(3)
    ]
    assert interleave(shares, total).tolist() == list(range(count))


def test_caption_ids():
    """Equal for equal captions whatever the padding and the length of the batch, different for different ones."""
    captions = [[5], [5, 5], [6], [5, 6], [6, 5], [5, 6, 5], list(range(1, 70)), list(range(1, 71)), []]
    by_length = []
    for length, padding in ((73, 0), (77, 0), (77, 3), (200, 0)):
        rows = torch.full((len(captions), length), padding)
        for row, words in zip(rows, captions, strict=True):
            row[: len(words) + 2] = torch.tensor([START, *words, END])
        by_length.append(ids_of(rows).tolist())
    assert all(ids == by_length[0] for ids in by_length)
    assert len(set(by_length[0])) == len(captions)
    short = [ids_of(torch.tensor([[START, *words, END]])).item() for words in captions]
    assert short == by_length[0]


def test_caption_ids_of_many():
    """Ten thousand captions that differ in one token have ten thousand ids."""
    tokens = torch.zeros(10_000, 20, dtype=torch.long)
    tokens[:, 7] = 1 + torch.arange(10_000)
    tokens[:, 9] = 49_407
    assert len(set(ids_of(tokens).tolist())) == 10_000
