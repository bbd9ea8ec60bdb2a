"""What is there more than once, and what of it would be in training and in validation.

U  different perceptual hashes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from train_clip.data.audit.facts import perceptual_hash
from train_clip.data.audit.near import near_pairs
from train_clip.data.audit.store import AuditStore
from train_clip.data.pairs import shown

EXAMPLES = 5


@dataclass(frozen=True)
class Repeats:
    """Images that are there more than once.

    Args:
        equal: images whose file is byte for byte that of another pair.
        equal_groups: names of the pairs of each of the largest groups of equal images.
        near: images that look like a different one, by their perceptual hash; None where the library is missing.
        near_examples: two such names each.
    """

    equal: int
    equal_groups: list[list[str]]
    near: int | None
    near_examples: list[list[str]]


@dataclass(frozen=True)
class Leaks:
    """What of the held-out pairs is in the training pairs too.

    Args:
        held_out: pairs that training would hold out.
        images: those whose image is byte for byte that of a training pair.
        images_nearly: those whose image looks like that of a training pair; None where the library is missing.
        captions: those of which a caption is, to the model, one of a training pair.
        examples: names of those counted in ``images``.
    """

    held_out: int
    images: int
    images_nearly: int | None
    captions: int
    examples: list[str]


def find_repeats(store: AuditStore, held_out: Sequence[int]) -> tuple[Repeats, Leaks]:
    """Find equal and similar images, and what the held-out pairs share with the others.

    Args:
        store: the facts of all pairs.
        held_out: places of the pairs that training would hold out.
    """
    with store.database as database:
        database.execute("CREATE TEMP TABLE held_out (held INTEGER PRIMARY KEY)")
        database.executemany("INSERT INTO held_out VALUES (?)", ((place,) for place in held_out))
    near, near_leaks, near_examples = (None, None, []) if perceptual_hash() is None else _near(store)
    of_content = "SELECT COUNT(*) AS n, content FROM pairs WHERE content != x'' GROUP BY content HAVING n > 1"
    largest = store.rows(f"{of_content} ORDER BY n DESC, content LIMIT ?", EXAMPLES)
    equal = Repeats(
        equal=store.one(f"SELECT COALESCE(SUM(n), 0) FROM ({of_content})")[0],
        equal_groups=[
            list(_names(store, "SELECT name FROM pairs WHERE content = ? ORDER BY name LIMIT ?", content, EXAMPLES))
            for _, content in list(largest)
        ],
        near=near,
        near_examples=near_examples,
    )
    return equal, _leaks(store, len(held_out), near_leaks)


def _leaks(store: AuditStore, held_out: int, nearly: int | None) -> Leaks:
    images = list(
        _names(
            store,
            f"SELECT name FROM pairs JOIN held_out ON place = held WHERE content != x'' AND content IN "
            f"(SELECT content FROM {TRAINING}) ORDER BY name",
        )
    )
    trained = f"SELECT tokens FROM {TRAINING} JOIN captions ON pair = id"
    captions = store.one(
        "SELECT COUNT(DISTINCT id) FROM pairs JOIN held_out ON place = held JOIN captions ON pair = id "
        f"WHERE tokens IN ({trained})"
    )[0]
    return Leaks(held_out, len(images), nearly, captions, images[:EXAMPLES])


def _near(store: AuditStore) -> tuple[int, int, list[list[str]]]:
    """How many images look like a different one, how many held-out ones like one of training, and some of them."""
    columns = "look, COUNT(DISTINCT content), COUNT(*), COUNT(held), MIN(place)"
    rows = store.rows(
        f"SELECT {columns} FROM pairs LEFT JOIN held_out ON place = held WHERE look IS NOT NULL GROUP BY look"
    )
    table = np.fromiter((value for row in rows for value in row), dtype=np.int64).reshape(-1, 5)
    looks, contents, images, held, place = table[:, 0].astype(np.uint64), *table[:, 1:].T
    # Images of one look and different contents are similar by themselves.
    similar = contents > 1
    leaking = similar & (images > held)
    within = "SELECT name, MIN(place) FROM pairs WHERE look = ? GROUP BY content ORDER BY MIN(place) LIMIT 2"
    examples = [[shown(name) for name, _ in store.rows(within, int(look))] for look in table[similar, 0][:EXAMPLES]]
    for one, other in near_pairs(looks):
        similar[one] = similar[other] = True
        # Several places of one hash may be among them, so that |= on an index would keep the last alone.
        leaking[one[images[other] > held[other]]] = True
        leaking[other[images[one] > held[one]]] = True
        for two in zip(place[one], place[other], strict=True):
            if len(examples) == EXAMPLES:
                break
            named = [next(_names(store, "SELECT name FROM pairs WHERE place = ?", int(at))) for at in two]
            # The same two come once for each piece that they share.
            if named not in examples:
                examples.append(named)
    return int(images[similar].sum()), int(held[leaking].sum()), examples


# Pairs that are not held out.
TRAINING = "(SELECT * FROM pairs LEFT JOIN held_out ON place = held WHERE held IS NULL)"


def _names(store: AuditStore, query: str, *values: object) -> Iterator[str]:
    return (shown(name) for (name,) in store.rows(query, *values))
