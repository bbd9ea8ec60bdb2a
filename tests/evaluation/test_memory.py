"""What evaluation takes of memory besides the embeddings, at sizes at which a whole matrix would not fit."""

from __future__ import annotations

import sys

import pytest

from tests import forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kibibytes on Linux alone")

LIMIT = 1000  # MB: most runs take under 300, and some allocators keep more; as a whole, the matrices take 2 to 8 GB
# What is given, and what is called; all embeddings are at one point, of which no figure comes.
CASES = {
    "100,000 images with five captions each, resampled": (
        "from train_clip.scores import bootstrap; bootstrap.RESAMPLES = 40\n"
        "numbers = torch.arange(500_000); ranks = numbers % 7 + 1\n"
        "both = (numbers[:100_000], ranks[:100_000]), (numbers // 5, ranks)\n"
        "ways = [retrieval.Queries(*one) for one in both]\n"
        "found = retrieval.Retrieval({1: 0.1}, {1: 0.1}, {}, {}, queries=ways, num_images=100_000)",
        "bootstrap.with_intervals(found)",
    ),
    "10,000 classes in 80 templates": (
        "names, templates = [str(n) for n in range(10_000)], ['a {} ' + str(n) for n in range(80)]",
        "zero_shot.class_embeddings(names, templates, lambda texts: points(len(texts), 512))",
    ),
    "50,000 images, 10,000 classes": (
        "images, labels, classes = points(50_000, 16), torch.arange(50_000) % 10_000, points(10_000, 16)",
        "zero_shot.zero_shot(images, labels, classes)",
    ),
    "100,000 captions of 2,000 images": (
        "images, texts, numbers = points(2_000, 4), points(100_000, 4), torch.arange(100_000)",
        "retrieval.retrieval(images, texts, numbers // 50, numbers)",
    ),
    "the confusion of 50,000 images, 10,000 classes": (
        "from train_clip.scores.confusion import confusion\n"
        "images, labels, classes = points(50_000, 16), torch.arange(50_000) % 1_000, points(10_000, 16)\n"
        "found = zero_shot.ZeroShot(0, 0, 0, 0, 50_000, 10_000, places=labels, labels=labels, classes=classes)",
        "confusion(images, found, [str(n) for n in range(10_000)])",
    ),
    # Rows of one row's memory: a mask of theirs, or differences, would take 2 or 8 GB.
    "4 million embeddings looked through for what is not finite": (
        "some = points(1, 512).expand(4_000_000, 512)",
        "embed.require_finite(some, range(4_000_000), 'images')",
    ),
    "4 million embeddings looked through for a collapse": (
        "some, numbers = points(1, 512).expand(4_000_000, 512), torch.arange(2)\n"
        "held = embed.Collection([], some, [], points(2, 512), [], numbers, [], [], [], None, [])",
        "embed.find_collapse(held)",
    ),
}
PROGRAM = """
import resource
import torch
from train_clip.evaluation import embed, retrieval, zero_shot

def points(rows, width):
    return torch.full((rows, width), width**-0.5)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

{given}
before = peak()
{called}
print(peak() - before)
"""


PAIRS = """
images, texts, numbers = points(100_000, 512), points(100_000, 512), torch.arange(100_000)
found = retrieval.retrieval(images, texts, numbers, numbers)
found = bootstrap.with_intervals(found)
"""


@pytest.mark.slow
def test_retrieval_of_100_000_pairs_takes_less_than_2_gb():
    """The whole process: embeddings of width 512 (410 MB), their scores and the intervals."""
    program = PROGRAM.format(given="from train_clip.scores import bootstrap\nbefore = 0", called=PAIRS)
    ended = forked.run(["-c", program.replace("peak() - before", "peak()")], timeout=3600)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 2000
    print(ended.stdout)


@pytest.mark.parametrize("case", CASES)
def test_memory_is_bounded(case):
    """Of a process of its own, at its peak."""
    given, called = CASES[case]
    ended = forked.run(["-c", PROGRAM.format(given=given, called=called)])
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < LIMIT
