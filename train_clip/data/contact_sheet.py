"""Pairs as a model will see them, on a page to look at: crops beside captions, tokens, and what is cut of them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from train_clip.data.tokenizer import Tokenizer

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em; color: #222; }
section { border-top: 1px solid #ccc; padding: 1em 0; }
h2 { font: 12px monospace; color: #666; margin: 0 0 .5em; overflow-wrap: anywhere; }
img { margin-right: 4px; image-rendering: pixelated; vertical-align: top; }
p { margin: .5em 0 0; }
.token { background: #e8eef7; border-radius: 3px; padding: 0 3px; margin-right: 2px; white-space: pre; }
.cut { background: #fbe3e3; color: #a00; text-decoration: line-through; }
.bad { color: #a00; }
small { color: #666; }
"""


@dataclass(frozen=True)
class SheetEntry:
    """One pair on the sheet.

    Args:
        name: of the image.
        crops: (3, S, S) uint8 each.
        captions: all lines.
        trouble: why the pair cannot be used; empty where it can.
    """

    name: str
    crops: Sequence[Tensor]
    captions: Sequence[str]
    trouble: str = ""


def contact_sheet(title: str, entries: Sequence[SheetEntry], tokenizer: Tokenizer) -> str:
    """Lay the pairs out as one HTML page that needs no other file.

    Args:
        title: what is shown.
        entries: in order.
        tokenizer: what cuts the captions.
    """
    sections = "\n".join(_section(entry, tokenizer) for entry in entries)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>Each caption line with its tokens, as the model reads them; of {tokenizer.context_length} tokens two are "
        f'start and end. <span class="token cut">So</span> is marked what is cut.</p>\n{sections}\n</html>\n'
    )


def _section(entry: SheetEntry, tokenizer: Tokenizer) -> str:
    pictures = "".join(f'<img src="{_data_uri(crop)}" alt="crop">' for crop in entry.crops)
    trouble = f'<p class="bad">{html.escape(entry.trouble)}</p>' if entry.trouble else ""
    captions = "\n".join(_caption(caption, tokenizer) for caption in entry.captions)
    return f"<section><h2>{html.escape(entry.name)}</h2>\n{pictures}{trouble}\n{captions}</section>"


def _caption(caption: str, tokenizer: Tokenizer) -> str:
    """The line, its tokens one by one, and how many there are."""
    ids = tokenizer.encode([caption])[0]
    room = tokenizer.context_length - 2
    tokens = "".join(
        f'<span class="token{" cut" if place >= room else ""}">{html.escape(tokenizer.decode([token]))}</span>'
        for place, token in enumerate(ids)
    )
    lost = f", {len(ids) - room} cut" if len(ids) > room else ""
    return f"<p>{html.escape(caption)} <small>({len(ids)} tokens{lost})</small><br>{tokens}</p>"


def _data_uri(pixels: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
