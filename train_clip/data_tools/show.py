"""Write a contact sheet: pairs as the model will see them.

Pairs as a model will see them, on a page to look at: crops beside captions, tokens, and what is cut of them.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train_clip.commands.options import AugmentationOptions, TableOptions, require_least
from train_clip.data.augment import augment, draw_batch
from train_clip.data.crops import bytes_to_show
from train_clip.data.pairs import PairList, shown
from train_clip.data.samples import draw
from train_clip.data.scan import scan_source
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import BadSample, UserError
from train_clip.files import write_text
from train_clip.options import AugmentationOptions as Augmentation

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


@dataclass(frozen=True)
class ShowOptions(AugmentationOptions, TableOptions):
    """What is shown, and as which model sees it.

    Args:
        output: the page to write, HTML
        number: pairs, chosen at random
        crops: of each image, drawn as training draws them
        image_size: side of the model's square in pixels
        resize_ratio: as `train --resize_ratio`; likewise --color_jitter and the others of images
        context_length: tokens of a caption at most, start and end included
        seed: as `train --seed`; it also chooses the pairs
    """

    output: Path = Path("contact_sheet.html")
    number: int = 24
    crops: int = 4
    image_size: int = 224
    resize_ratio: float | None = None
    context_length: int = 77
    seed: int = 0


def data_show(folder: Path | None = None, /, *, options: ShowOptions) -> Path:
    """Write a contact sheet: crops as training draws them beside caption lines and tokens, what is cut marked.

    Args:
        folder: images and captions that share a stem; --pairs gives a table in its place
        options: what is shown.

    Returns:
        The page.

    Raises:
        UserError: nothing to show, or numbers that cannot be.
    """
    require_least(
        number=(options.number, 1),
        crops=(options.crops, 1),
        image_size=(options.image_size, 1),
        context_length=(options.context_length, 2),
        seed=(options.seed, 0),
    )
    if options.resize_ratio is not None and not 0 < options.resize_ratio <= 1:
        raise UserError(f"--resize_ratio {options.resize_ratio}: expected above 0, up to 1.")
    scan = scan_source(folder, options.source).require_pairs()
    number = min(options.number, len(scan.pairs))
    chosen = sorted(np.random.default_rng(options.seed).permutation(len(scan.pairs))[:number].tolist())
    entries = [entry(scan.pairs, place, options) for place in chosen]
    title = f"{number} of {len(scan.pairs):,} pairs of {shown(str(scan.source))}"
    write_text(options.output, contact_sheet(title, entries, Tokenizer(options.context_length)))
    print(f"{title}: {options.output}. Open it in a browser.")
    return options.output


def entry(pairs: PairList, place: int, options: ShowOptions) -> SheetEntry:
    """One pair, with crops drawn as training draws them."""
    changes = Augmentation.pick(vars(options))
    name = shown(pairs.names[place])
    captions: list[str] = []
    try:
        captions = pairs[place].captions()
        rng = np.random.default_rng((options.seed, place))
        drawn = torch.stack(
            [draw(pairs, place, options.image_size, options.resize_ratio, rng)[0] for _ in range(options.crops)]
        )
        draws = draw_batch(changes, (options.seed, place), slice(None), options.crops)
        crops = [bytes_to_show(crop) for crop in augment(drawn, changes, draws)]
    except BadSample as bad:
        return SheetEntry(name, [], captions, f"{shown(bad.path)}: {bad.reason}")
    return SheetEntry(name, crops, captions)
