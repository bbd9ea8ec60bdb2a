"""Each family of dual encoders against transformers' own pipeline, from pictures and captions to features.

    python benchmarks/families.py [MODEL …] [--folder data_dir]

Without models those of the tests: tiny, of random weights, in each family's own files. Without a folder the tests'
pictures. Prints the largest differences.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_clip
from tests.adapters import tiny_families
from train_clip.adapters.families import FAMILIES

MOST = 100  # pictures


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        for name, family in FAMILIES.items() if not options.models else ():
            if hasattr(transformers, family.model):
                tiny_families.save(name, here / name)
                options.models.append(here / name)
        files, captions = tiny_families.photographs(here / "p"), tiny_families.CAPTIONS
        if options.folder:
            files = sorted(file for file in options.folder.rglob("*") if file.suffix in (".png", ".jpg"))[:MOST]
            captions = [file.with_suffix(".txt").read_text().splitlines()[0].lower() for file in files]
        print(f"transformers {transformers.__version__}, {len(files)} pictures, {len(captions)} captions\n")
        print("| family | class | pictures are | loss | pixels | image features | text features | logits |")
        print("|---" * 8 + "|")
        for model in options.models:
            print(row(model, files, captions), flush=True)


def row(folder: Path, files: list[Path], captions: list[str]) -> str:
    """The largest differences of a model's pixels, features of unit norm, and logits."""
    ours, theirs = train_clip.load(folder), transformers.AutoModel.from_pretrained(folder).eval()
    pixels, output = tiny_families.pipeline(theirs, folder, files, captions, ours.model.context_length)
    prepared = torch.stack([ours.preprocess(file) for file in files])
    with torch.no_grad():
        logits, _ = ours.model(prepared, ours.tokenizer(captions))
    norm = torch.nn.functional.normalize
    compared = [
        (prepared, pixels),
        (ours.encode(files, as_tensor=True), norm(output.image_embeds, dim=-1)),
        (ours.encode(captions, as_tensor=True), norm(output.text_embeds, dim=-1)),
        (logits, output.logits_per_image),
    ]
    family, size = ours.model.family, ours.model.image_size
    form = f"{'squashed' if size.squashed else 'resized'} to {size.whole}, {size.resampling}"
    form += "" if size.squashed and size == size.whole else f", cut to {int(size)}"
    figures = " | ".join(f"{(one - other).abs().max().item():.0e}" for one, other in compared)
    return f"| {family.title} | {family.model} | {form} | {family.loss} | {figures} |"


if __name__ == "__main__":
    main()
