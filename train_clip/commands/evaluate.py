"""Score a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from train_clip.commands.options import WeightOptions
from train_clip.commands.scoring import Collection, ScoreOptions, Scores, load_for_scoring, score
from train_clip.data.pixels import read_picture
from train_clip.evaluation.pictures import draw_best_captions
from train_clip.files import write_text

UNCHANGED = WeightOptions()
IMAGES_IN_PICTURE = 18
NAMED = 5  # files named on the screen; --json names all


@dataclass(frozen=True)
class EvaluateOptions(ScoreOptions):
    """What to score, and where figures and pictures go.

    Args:
        picture: a PNG to draw, images beside the captions that the model finds most similar
        backbone: of a checkpoint of visual prompts, where its backbone lies, if not where it lay
    """

    picture: Path | None = None
    backbone: str | None = None


def evaluate(checkpoint: str, /, options: EvaluateOptions, weights: WeightOptions = UNCHANGED) -> Scores:
    """Score a model: retrieval over captions, and zero-shot classification over class names.

    Args:
        checkpoint: what `train` or `finetune` wrote, or weights by OpenAI (ViT-B/32), open_clip or Hugging Face: a
            file, a folder, or hf-hub:NAME
        options: what to score.
        weights: what they leave open.

    Returns:
        The figures, which are printed too.

    Raises:
        UserError: a file that is missing or does not hold what it should.
    """
    options.require_sense()
    choices = dataclasses.replace(weights.choices, backbone=options.backbone)
    scores, collection = score(load_for_scoring(checkpoint, options.device, choices), options)
    report(scores)
    if options.json is not None:
        write_text(options.json, json.dumps(dataclasses.asdict(scores), indent=2) + "\n")
    if options.picture is not None and collection.captions:
        _draw(collection, options.picture)
    return scores


def report(scores: Scores) -> None:
    """Print the figures beside chance."""
    console = Console()
    console.print(f"{scores.num_images:,} images, {scores.num_captions:,} captions", highlight=False)
    if scores.retrieval is not None:
        table = Table("retrieval", box=None, header_style="bold", pad_edge=False)
        for heading in ("image → text", "chance", "text → image", "chance"):
            table.add_column(heading, justify="right")
        found = scores.retrieval
        for k in found.image_to_text:
            columns = (found.image_to_text, found.chance_image_to_text, found.text_to_image, found.chance_text_to_image)
            table.add_row(f"R@{k}", *(f"{column[k]:.1%}" for column in columns))
        console.print(table)
    if scores.zero_shot is not None:
        result = scores.zero_shot
        console.print(
            f"zero-shot over {result.num_classes} classes: top-1 {result.top1:.1%} (chance {result.chance:.1%}), top-5 "
            f"{result.top5:.1%}, mean per class {result.mean_per_class:.1%}",
            highlight=False,
            soft_wrap=True,
        )
    for skip in scores.skips[:NAMED]:
        console.print(f"Not scored: {skip.path}: {skip.reason}", highlight=False, soft_wrap=True)
    if len(scores.skips) > NAMED:
        console.print(f"… and {len(scores.skips) - NAMED:,} more files that were not scored.", highlight=False)


def _draw(collection: Collection, target: Path) -> None:
    """Draw a fixed random choice of images beside their best captions."""
    number = min(IMAGES_IN_PICTURE, len(collection.paths))
    chosen = sorted(random.Random(0).sample(range(len(collection.paths)), number))
    different = list(dict.fromkeys(collection.captions))
    places = torch.tensor([collection.captions.index(caption) for caption in different])
    similarity = (collection.images[chosen] @ collection.texts.T).cpu()[:, places]
    own: dict[int, set[str]] = {index: set() for index in chosen}
    for caption, owner in zip(collection.captions, collection.owners, strict=True):
        if owner in own:
            own[owner].add(caption)
    pictures = [read_picture(collection.paths[index]).picture for index in chosen]
    draw_best_captions(pictures, different, similarity, [own[index] for index in chosen], target)
    print(f"Images beside their best captions: {target}")
