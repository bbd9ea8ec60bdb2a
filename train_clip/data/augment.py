"""Color changes and flips of whole batches, chosen on the host and computed on the device; captions they contradict.

SimCLR's color changes (arXiv 2002.05709, appendix A), with Y the luma of a pixel x, and b, c, s, θ drawn for its
image:

    brightness  x ← b x                     contrast  x ← c x + (1 − c) mean(Y)     mean over the image
    saturation  x ← s x + (1 − s) Y         hue       x ← x turned by θ about gray
    gray        saturation with s = 0

In whatever order they are done, they are one affine map of the colors,

    x' = M x + o        M = b c (L + s (cos θ (1 − L) + sin θ K))        o = b (1 − c) mean(Y)

where L maps a color to its luma in all three channels and K turns what is left of it by a quarter. What leaves the
range is cut once, at the end; torchvision cuts after every step. The hue turns in the plane of B − Y and R − Y at
constant luma; by HSV, as others have it, the largest and the least channel are kept.

N  pairs of the global batch      B  pairs on this process      S  side of the image in pixels
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from train_clip.data.pairs import PairList
from train_clip.errors import BadSample, UserError
from train_clip.options import AugmentationOptions
from train_clip.printing import printable
from train_clip.tensors import sent

LUMA = np.array([0.299, 0.587, 0.114])  # red, green, blue: ITU-R BT.601
# B − Y and R − Y, scaled as a PAL or NTSC signal carries them (ITU-R BT.470).
DIFFERENCES = np.stack([0.493 * ([0, 0, 1] - LUMA), 0.877 * ([1, 0, 0] - LUMA)])
# SimCLR, appendix A: factors within 1 ± 0.8 s, hue within ± 0.2 s of a whole turn, of 0.8 of the images.
FACTORS, TURN, JITTERED = 0.8, 0.2, 0.8
# Numbers that are computed in float32 at a time: what caches hold, or what keeps a GPU busy.
PIECE_ON_CPU, PIECE = 2**20, 2**24
STREAM = 0x6175676D  # tells these random numbers from those of crops, which have a pair's number in its place


class Draws(NamedTuple):
    """The random choices for each image."""

    mixes: torch.Tensor  # (B, 3, 3) float32, M
    lifts: torch.Tensor  # (B, 3) float32, b (1 − c) of each channel's weight in Y
    mirrored: torch.Tensor  # (B,) bool, whether left and right change places
    upended: torch.Tensor  # (B,) bool, whether top and bottom do

    def on(self, device: torch.device) -> "Draws":
        """The same on a device, without waiting for it."""
        return Draws(*(sent(tensor, device) for tensor in self))


def draw_batch(how: AugmentationOptions, place: tuple[int, int], rows: slice, number: int) -> Draws:
    """Draw for this process's rows of N images: for each the same, whoever else draws for the others.

    ``place`` is the seed and how many global batches were before this one.
    """
    uniform = np.random.default_rng((*place, STREAM)).random((number, 8))[rows].T
    jittered, brightness, contrast, saturation, hue, gray, mirrored, upended = uniform
    strength = np.where(jittered < JITTERED, how.color_jitter, 0.0)
    least, most = np.maximum(0, 1 - FACTORS * strength), 1 + FACTORS * strength
    b, c, s = (least + (most - least) * chance for chance in (brightness, contrast, saturation))
    angles = 2 * np.pi * TURN * strength * (2 * hue - 1)
    maps = colour_maps(b, c, np.where(gray < how.grayscale, 0.0, s), angles)
    return Draws(
        torch.from_numpy(maps).float(),
        torch.from_numpy((b * (1 - c))[:, None] * LUMA).float(),
        torch.from_numpy(mirrored < how.horizontal_flip),
        torch.from_numpy(upended < how.vertical_flip),
    )


def colour_maps(brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """M of each image, (B, 3, 3), out of b, c, s and θ, (B,) each; red turns toward yellow where θ > 0."""
    b, c, s, angle = (values[:, None, None] for values in (brightness, contrast, saturation, angles))
    luma = np.ones((3, 1)) * LUMA
    signals = np.stack([LUMA, *DIFFERENCES])
    quarter = np.linalg.inv(signals) @ [[0, 0, 0], [0, 0, -1], [0, 1, 0]] @ signals
    return b * c * (luma + s * (np.cos(angle) * (np.eye(3) - luma) + np.sin(angle) * quarter))


def augment(images: torch.Tensor, how: AugmentationOptions, draws: Draws) -> torch.Tensor:
    """Change copies of (B, 3, S, S) images, uint8 or already normalized, as was drawn.

    Raises:
        UserError: the colors of floats would change.
    """
    if how.changes_colours and images.dtype != torch.uint8:
        raise UserError(
            f"color_jitter is {how.color_jitter} and grayscale {how.grayscale}, but the images are {images.dtype}: "
            "already normalized, with an unknown mean and standard deviation. Expected bytes (uint8), such as "
            "pictures or the arrays of `train-clip data npz`. Leave out both options; flips work."
        )
    changed = torch.empty_like(images, memory_format=torch.contiguous_format)
    most = PIECE_ON_CPU if images.device.type == "cpu" else PIECE
    size = max(1, most // images[0].numel())
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        piece = images[rows]
        for share, turned, side in ((how.horizontal_flip, draws.mirrored, 3), (how.vertical_flip, draws.upended, 2)):
            if share:
                piece = torch.where(turned[rows, None, None, None], piece.flip(side), piece)
        if how.changes_colours:
            piece = recolour(piece, draws.mixes[rows], draws.lifts[rows])
        changed[rows] = piece
    return changed


def recolour(images: torch.Tensor, mixes: torch.Tensor, lifts: torch.Tensor) -> torch.Tensor:
    """X' = M x + b (1 − c) mean(Y) of (B, 3, S, S) uint8 images, in float32, whole numbers from 0 to 255."""
    colours = images.flatten(2).float()
    mixed = (lifts * colours.mean(2)).sum(1)[:, None, None].expand(colours.shape)
    # Not a product of matrices, which autocast and TF32 would take in half the digits.
    for channel in range(3):
        mixed = torch.addcmul(mixed, colours[:, channel, None], mixes[:, :, channel, None])
    return mixed.round_().clamp_(0, 255).view(images.shape)


MOST_SHOWN = 80  # letters of a caption
LOOKED_AT = 2000  # pairs: a share of 1% is found to within a fifth of it or so

TURNS_AND_TEXT = """
    clockwise anticlockwise counterclockwise
    letter letters lettering alphabet word words text sign signs says saying written writing handwriting inscription
    label labels labelled labeled logo logos digit digits numeral numerals
"""
SIDES = """
    left right leftmost rightmost leftward leftwards rightward rightwards lefthand righthand
    east west eastern western eastward eastwards westward westwards
"""
HEIGHTS = """
    above below over under beneath underneath top bottom upper lower upside up down upright
    upward upwards downward downwards north south northern southern northward northwards southward southwards
"""
WORDS = {"horizontal_flip": SIDES + TURNS_AND_TEXT, "vertical_flip": HEIGHTS + TURNS_AND_TEXT}


def warnings_of_flips(how: AugmentationOptions, pairs: Any) -> Iterator[str]:
    """What is to be said of flips that some captions of this package's pairs contradict."""
    flips = [flip for flip in WORDS if getattr(how, flip)]
    captions = some_captions(pairs) if flips and isinstance(pairs, PairList) else []
    for flip in flips:
        if against := captions_against(flip, captions):
            word, line = against[0]
            shown = line if len(line) <= MOST_SHOWN else line[:MOST_SHOWN] + "…"
            yield (
                f"{flip} is {getattr(how, flip)}, and {len(against):,} of {len(captions):,} checked captions "
                f"({len(against) / len(captions):.1%}) name a side, a direction of rotation or text, such as {word!r} "
                f"in “{printable(shown)}”. They do not describe a flipped image. Leave out the flip, unless these "
                "words mean something else here."
            )


def some_captions(pairs: PairList, most: int = LOOKED_AT) -> list[str]:
    """All lines of so many pairs at most, evenly spaced; what cannot be read is passed over."""
    captions: list[str] = []
    for place in np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int).tolist():
        try:
            captions += pairs[place].captions()
        except BadSample:
            continue
    return captions


def captions_against(flip: str, captions: list[str]) -> list[tuple[str, str]]:
    """The captions, single lines, that a flip, a key of ``WORDS``, makes wrong, each behind the first such word."""
    word = re.compile(rf"(?<![^\W\d_])({'|'.join(WORDS[flip].split())})(?![^\W\d_])")
    return [(found[0], line) for line in captions if (found := word.search(line.lower()))]
