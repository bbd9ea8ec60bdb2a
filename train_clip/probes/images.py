"""All images of a folder or table, and the options of the commands that embed them."""

from dataclasses import dataclass
from pathlib import Path

from train_clip.data.pairs import IN_TABLE, PairList, plain_name
from train_clip.data.scan import scan_source
from train_clip.options import SourceOptions, at_least, option


@dataclass(frozen=True)
class ImageOptions(SourceOptions):
    """The images, and how they are embedded."""

    folder: Path | None = option(
        None, "images, in subfolders too; with captions (STEM.txt) or classes (STEM.cls, or the name of their folder)"
    )
    batch_size: int = option(64, "images or captions per batch", at_least(1))
    num_workers: int | None = option(0, "loader processes", at_least(0))
    device: str = option("auto", "cpu, cuda, or auto: cuda if available")
    backbone: str | None = option(
        None, "for visual prompts: path or name of their backbone; default: the one they were trained with"
    )


@dataclass(frozen=True)
class ClassOptions(ImageOptions):
    """The images, and their classes."""

    classes: Path | None = option(None, "text file of class names, one per line")
    templates: Path | None = option(
        None,
        "text file of prompt templates with {} for the class name, one per line, or one of CLIP's sets; default: "
        '"a photo of a {}."',
    )


def find_images(options: ImageOptions) -> tuple[PairList, str]:
    """The images in the order of their names, those without a caption too, and the folder that names are below."""
    found = scan_source(options.folder, options)
    if found.faults or not found.lone_images:
        found.require_pairs()
        return found.pairs, found.pairs.root
    lone = PairList(found.pairs.root, found.lone_images, [IN_TABLE] * len(found.lone_images))
    both = found.pairs.followed_by(lone)
    return both.take(sorted(range(len(both)), key=lambda place: plain_name(both.names[place]))), found.pairs.root
