"""Write a contact sheet: pairs as the model will see them: crops, captions, tokens, and truncated tokens."""

import base64
import html
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from train_clip import errors, files
from train_clip.commands.progress import in_workers
from train_clip.data import augment, crops, samples
from train_clip.data.pairs import PairList
from train_clip.data.scan import scan_source
from train_clip.data.tokenizer import Tokenizer
from train_clip.options import UP_TO_ONE, AugmentationOptions, SourceOptions, at_least, option
from train_clip.printing import printable

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
class ShowOptions(AugmentationOptions, SourceOptions):
    """What to show, and for which model."""

    output: Path = option(Path("contact_sheet.html"), "HTML page to write")
    number: int = option(24, "number of pairs, chosen at random", at_least(1))
    crops: int = option(4, "number of crops of each image, as in training", at_least(1))
    image_size: int = option(224, "side of the model's square input in pixels", at_least(1))
    resize_ratio: float | None = option(
        None, "like `train --resize_ratio`; --color_jitter and the other augmentation options likewise", UP_TO_ONE
    )
    context_length: int = option(77, "maximum number of tokens in a caption, including start and end", at_least(2))
    seed: int = option(0, "like `train --seed`; it also chooses the pairs", at_least(0))


def data_show(folder: Path | None = None, /, *, options: ShowOptions) -> Path:
    """Write a contact sheet: crops as in training next to captions and their tokens, truncated ones marked.

    Args:
        folder: images and captions that share a stem; or give a table with --pairs
        options: what to show
    """
    files.require_new(options.output)
    found = scan_source(folder, options).require_pairs()
    number = min(options.number, len(found.pairs))
    chosen = sorted(np.random.default_rng(options.seed).permutation(len(found.pairs))[:number].tolist())
    tokenizer = Tokenizer(options.context_length)
    title = f"{number} of {len(found.pairs):,} pairs of {printable(str(found.source))}"
    sections = "\n".join(in_workers(partial(_section, found.pairs, options, tokenizer), chosen, 0, "pairs"))
    files.write_text(
        options.output,
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>Each caption with its tokens, as the model reads them; two of the {tokenizer.context_length} tokens are "
        f'start and end. <span class="token cut">Marked like this</span>: truncated tokens.</p>\n{sections}\n</html>\n',
    )
    print(f"{title}: {options.output}. Open it in a browser.")
    return options.output


def _section(pairs: PairList, options: ShowOptions, tokenizer: Tokenizer, place: int) -> str:
    pictures, lines = "", []
    try:
        lines = pairs[place].captions()
        rng = np.random.default_rng((options.seed, place))
        size, ratio = options.image_size, options.resize_ratio
        drawn = torch.stack([samples.draw(pairs, place, size, ratio, rng)[0] for _ in range(options.crops)])
        draws = augment.draw_batch(options, (options.seed, place), slice(None), options.crops)
        augmented = augment.augment(drawn, options, draws)
        pictures = "".join(f'<img src="{_data_uri(crop)}" alt="crop">' for crop in augmented)
    except errors.BadSample as bad:
        pictures = f'<p class="bad">{html.escape(f"{printable(bad.path)}: {bad.reason}")}</p>'
    captions = "\n".join(_caption(line, tokenizer) for line in lines)
    return f"<section><h2>{html.escape(printable(pairs.names[place]))}</h2>\n{pictures}\n{captions}</section>"


def _data_uri(pixels: torch.Tensor) -> str:
    file = io.BytesIO()
    crops.as_picture(pixels.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _caption(caption: str, tokenizer: Tokenizer) -> str:
    ids = tokenizer.encode([caption])[0]
    room = tokenizer.context_length - 2
    tokens = "".join(
        f'<span class="token{" cut" if place >= room else ""}">{html.escape(tokenizer.decode([token]))}</span>'
        for place, token in enumerate(ids)
    )
    lost = f", {len(ids) - room} cut" if len(ids) > room else ""
    return f"<p>{html.escape(caption)} <small>({len(ids)} tokens{lost})</small><br>{tokens}</p>"
