"""Train a CLIP from scratch in minutes on a CPU, on generated pictures of known color, shape, size and place.

Some combinations of color and shape are held out of training, so the model cannot memorize them.
"""

import cmath
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw

from train_clip.checkpoints.found import find_weights
from train_clip.commands import evaluate
from train_clip.commands.train import time_on_cpu, train
from train_clip.files import require_new
from train_clip.options import DataOptions, LoRAOptions, ModelOptions, RunOptions, TrainerOptions, TrainingOptions

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"

COLOURS = {
    "red": "#d62728", "orange": "#ff961e", "yellow": "#f0d728", "green": "#2ca02c",
    "blue": "#1f64d2", "purple": "#8746b4", "pink": "#fa8cbe", "black": "#191919",
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RECTANGLES = {"square": [(0.85, 0.85)], "cross": [(0.35, 1.0), (1.0, 0.35)]}  # half their sides; the radius is 1
TIPS = {"triangle": [1.0] * 3, "star": [1.0, 0.42] * 5}  # how far a polygon's corners are from its center
SIZES = {"small": 0.11, "large": 0.20}  # radius as a share of the side
PLACES = {
    "at the top left": (0.25, 0.25), "at the top": (0.5, 0.25), "at the top right": (0.75, 0.25),
    "on the left": (0.25, 0.5), "in the middle": (0.5, 0.5), "on the right": (0.75, 0.5),
    "at the bottom left": (0.25, 0.75), "at the bottom": (0.5, 0.75), "at the bottom right": (0.75, 0.75),
}  # fmt: skip
TEMPLATES = ("a {size} {thing} {place}", "there is a {size} {thing} {place}", "{place}, one {thing}, {size}")
SIDE = 48  # pixels
OVERSAMPLING = 4  # drawn this much larger, then reduced: smooth edges
JITTER = 0.03  # of the side
COPIES = 4  # pictures of each training scene


def demo(output: Path = Path("demo"), seed: int = 0) -> None:
    """Train a small CLIP on generated pictures and evaluate it on combinations of color and shape that it never saw.

    Args:
        output: a new folder for pictures, run and results
        seed: seed of the pictures, the weights and the order
    """
    started = time.perf_counter()
    require_new(output)
    training, unseen = write_synthetic(output / "data", COPIES, seed)
    data, held_out = output / "data", dict.fromkeys(scene.thing for scene in scenes() if is_unseen(scene))
    every = (TEMPLATES[0].format(size=size, thing="{}", place=place) for size, place in product(SIZES, PLACES))
    for name, lines in {"classes": things(), "unseen_classes": held_out, "templates": every}.items():
        (data / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Wrote pictures of {len(scenes()):,} scenes to {output}/data/, such as “{scenes()[0].captions()[0]}”.")

    options = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    options |= {"folder": training, "seed": seed, "output": output / "run"}
    run = train(
        ModelOptions.pick(options),
        DataOptions.pick(options),
        TrainingOptions.pick(options),
        LoRAOptions(),
        RunOptions.pick(options),
        # One device: more would run this verb once for each.
        TrainerOptions(devices=1),
    )
    print("\nOn combinations of color and shape that were not in the training data:")
    checkpoint, picture = str(run / "checkpoints" / "last.ckpt"), output / "best_captions.png"
    among_all = evaluate.EvaluateOptions(
        unseen, data / "classes.txt", data / "templates.txt", json=output / "scores.json", picture=picture
    )
    among_unseen = replace(among_all, classes=data / "unseen_classes.txt")
    scores = evaluate.evaluate(checkpoint, among_all)
    model = evaluate.load_for_scoring(find_weights(checkpoint), among_unseen.device)
    every, new = scores["zero_shot"], evaluate.score(model, among_unseen)[0]["zero_shot"]
    evaluate.write_json(output / "scores.json", scores | {"zero_shot_among_unseen": new})
    print(
        "\nZero-shot classification names a picture's color and shape, those whose captions are most similar to it.\n"
        f"  Among all {every.num_classes} combinations, {every.top1:.1%} of the answers are right: the model prefers "
        f"the {every.num_classes - new.num_classes} that it was trained on.\n"
        f"  Among the {new.num_classes} that it never saw, {new.top1:.1%} are right (chance {new.chance:.1%})."
    )
    recipe, takes = "small", ""
    if not torch.accelerator.is_available():
        recipe, takes = "cpu", f"  (10,000 pairs take about {time_on_cpu(10_000)} on this CPU)"
    print(
        f"\nThat took {time.perf_counter() - started:.0f} s. With a folder of your own, images and captions that share "
        "a stem (cat.jpg, cat.txt):\n"
        f"  train-clip train --config {recipe} --folder data_dir{takes}\n"
        "`train-clip models` lists the models, `train-clip train --help` the options."
    )


class Scene(NamedTuple):
    """The content of a picture."""

    colour: str
    shape: str
    size: str
    place: str

    @property
    def thing(self) -> str:
        """Color and shape, the class of the picture."""
        return f"{self.colour} {self.shape}"

    def captions(self) -> list[str]:
        """Three ways to describe the scene."""
        return [template.format(thing=self.thing, **self._asdict()) for template in TEMPLATES]


def things() -> list[str]:
    """Every combination of color and shape."""
    return [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]


def is_unseen(scene: Scene) -> bool:
    """Whether the scene's color and shape are held out of training: two colors of each shape, a quarter of all."""
    return (list(COLOURS).index(scene.colour) - SHAPES.index(scene.shape)) % len(COLOURS) in (0, 3)


def scenes() -> list[Scene]:
    """Every scene once."""
    return [Scene(*parts) for parts in product(COLOURS, SHAPES, SIZES, PLACES)]


def write_synthetic(folder: Path, copies: int, seed: int = 0) -> tuple[Path, Path]:
    """Write the scenes' images, captions and classes into folders for training, so many copies of each, and unseen."""
    rng = np.random.default_rng(seed)
    training, unseen = folder / "training", folder / "unseen"
    for scene in scenes():
        target, number = (unseen, 1) if is_unseen(scene) else (training, copies)
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(1, number + 1):
            stem = "-".join([*scene.thing.split(), scene.size, *scene.place.split()[2:], str(copy)])
            draw(scene, rng).save(target / f"{stem}.png")
            (target / f"{stem}.txt").write_text("\n".join(scene.captions()) + "\n", encoding="utf-8")
            (target / f"{stem}.cls").write_text(f"{scene.thing}\n", encoding="utf-8")
    return training, unseen


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene, (SIDE, SIDE) RGB, on a light background of random tint, a little off its place."""
    side, colour = SIDE * OVERSAMPLING, COLOURS[scene.colour]
    picture = Image.new("RGB", (side, side), tuple(rng.integers(200, 256, 3).tolist()))
    x, y = (side * (center + rng.uniform(-JITTER, JITTER)) for center in PLACES[scene.place])
    radius = side * SIZES[scene.size] * rng.uniform(0.9, 1.1)
    pen = ImageDraw.Draw(picture)
    if scene.shape == "circle":
        pen.circle((x, y), radius, colour)
    elif scene.shape == "ring":
        pen.circle((x, y), radius, outline=colour, width=int(radius * 0.4))
    for wide, high in RECTANGLES.get(scene.shape, ()):
        pen.rectangle((x - wide * radius, y - high * radius, x + wide * radius, y + high * radius), colour)
    if lengths := TIPS.get(scene.shape):
        turns = [cmath.rect(radius * long, cmath.tau * (tip / len(lengths) - 0.25)) for tip, long in enumerate(lengths)]
        pen.polygon([(x + turn.real, y + turn.imag) for turn in turns], colour)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)
