"""Results as a page of pictures: what files say is text there, never markup, and no file outside a folder is shown."""

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from train_clip.data.crops import read_picture
from train_clip.errors import BadSample, UserError
from train_clip.printing import printable

SIDE = 256  # pixels of a thumbnail at most
LONGEST = 200  # characters of a caption that are shown
PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
_DIGESTS = {
    name: base64.b64encode(hashlib.sha256(re.findall(f"<{name}>(.*?)</{name}>", PAGE, re.DOTALL)[0].encode()).digest())
    for name in ("style", "script")
}
# Nothing but the page's own style, script and pictures: what slipped through as markup would neither run nor load.
POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    + "; ".join(f"{name}-src 'sha256-{digest.decode()}'" for name, digest in _DIGESTS.items())
)


class Hit(NamedTuple):
    """A row of the embeddings that was found."""

    row: int
    similarity: float | None  # None where nothing was looked for
    match: float | None  # the probability that they match, where a calibration tells
    key: str
    path: str
    caption: str


class Answer(NamedTuple):
    """What was found for a query."""

    query: str
    note: str  # that nothing fits; else empty
    results: list[Hit]  # the most similar first


def thumbnail(root: str | Path, name: str) -> bytes | None:
    """Draw a small JPEG of the picture that a name below a folder is of; None where it is none, or lies elsewhere."""
    try:
        # Links, .. and absolute names are followed first: what counts is where the file is.
        path = os.path.realpath(os.path.join(root, name))  # noqa: PTH118, which may be absolute
        if not Path(path).is_relative_to(os.path.realpath(root)):
            return None
        picture = read_picture(path).picture
    except (BadSample, UserError, ValueError):  # the last of NUL
        return None
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def card(hit: Hit, source: str, link: str = "") -> str:
    """A result as an item of a list: its picture, similarity, caption and path."""
    path, caption = (escape(printable(text[:LONGEST])) for text in (hit.path, hit.caption))
    image = f'<img src="{escape(source)}" alt="{caption or path}" loading="lazy">'
    image = f'<a href="{escape(link)}" title="More like this">{image}</a>' if link else image
    similarity = "" if hit.similarity is None else f"<b>{hit.similarity:.3f}</b> "
    match = "" if hit.match is None else f"({hit.match:.0%}) "
    return f"<li>{image}<p>{similarity}{match}{caption}</p><p><small>{path}</small></p></li>"


def section(answer: Answer, card: Callable[[Hit], str]) -> str:
    """A query and its results, each by its ``card``."""
    heading = f"<h2>{escape(printable(answer.query[:LONGEST]))}</h2>\n"
    note = f"<p>{escape(answer.note)}</p>\n" if answer.note else ""
    return f"{heading}{note}<ol>\n{chr(10).join(map(card, answer.results))}\n</ol>"


def page(title: str, status: str, sections: Iterable[str], form: str = "") -> str:
    """A whole page, of sections and of a ``form`` that are markup already."""
    plain = {name: escape(printable(text)) for name, text in (("title", title), ("status", status))}
    return Template(PAGE).substitute(plain, policy=POLICY, form=form, sections="\n".join(sections))
