"""From nothing to a trained CLIP, in minutes on a CPU."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path

import yaml

from train_clip.commands.evaluate import EvaluateOptions, evaluate
from train_clip.commands.options import (
    AugmentationOptions,
    DataOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RunOptions,
    TrainerOptions,
    select,
)
from train_clip.commands.train import train
from train_clip.data.synthetic import scenes, things, write_synthetic, zero_shot_templates
from train_clip.errors import UserError
from train_clip.files import write_text

COPIES = 4  # pictures of each training scene


def demo(output: Path = Path("demo"), seed: int = 0) -> None:
    """Train a small CLIP on generated pictures and try it on combinations of colour and shape that it never saw.

    Args:
        output: a new folder for pictures, run and results
        seed: decides pictures, weights and order
    """
    started = time.perf_counter()
    if output.exists():
        raise UserError(f"{output}: exists already and stays as it is. Give another --output, or remove it.")
    training, unseen = write_synthetic(output / "data", COPIES, seed)
    write_text(output / "data" / "classes.txt", "\n".join(things()) + "\n")
    write_text(output / "data" / "templates.txt", "\n".join(zero_shot_templates()) + "\n")
    print(f"Wrote pictures of {len(list(scenes())):,} scenes to {output / 'data'}/, such as {_example(training)}.")

    recipe = yaml.safe_load((resources.files("train_clip") / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    run = train(
        select(ModelOptions, recipe),
        select(DataOptions, recipe, folder=training),
        select(AugmentationOptions, recipe),
        select(OptimizerOptions, recipe),
        select(ObjectiveOptions, recipe),
        select(RunOptions, recipe, seed=seed, output=output / "run"),
        # One device: more would run this verb once for each.
        TrainerOptions(devices=1),
    )
    print("\nOn combinations of colour and shape that were never seen in training:")
    evaluate(
        str(run / "checkpoints" / "last.ckpt"),
        EvaluateOptions(
            folder=unseen,
            classes=output / "data" / "classes.txt",
            templates=output / "data" / "templates.txt",
            json=output / "scores.json",
            picture=output / "best_captions.png",
        ),
    )
    print(
        f"\nThat took {time.perf_counter() - started:.0f} s. With a folder of your own, images and captions that share "
        "a stem (cat.jpg, cat.txt):\n"
        "  train-clip train --model_name ViT-B/32 --folder data_dir --batch_size 256\n"
        "`train-clip models` lists the models, `train-clip train --help` the options."
    )


def _example(folder: Path) -> str:
    caption = min(folder.glob("*.txt"))
    return f"{caption.with_suffix('.png').name}: “{caption.read_text(encoding='utf-8').splitlines()[0]}”"
