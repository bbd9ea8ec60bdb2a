"""A picture → what an image tower takes, as its makers prepare it.

S  side of the square in pixels
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from train_clip.data.images import open_rgb, upright_rgb
from train_clip.data.transforms import center_crop, to_tensor


class Preprocess:
    """Shorter side to S by bicubic interpolation, the S×S in the middle, (x / 255 - mean) / std.

    Bit for bit as OpenAI's (openai/CLIP, clip.py, _transform), but that pictures are turned upright by their EXIF, and
    are made RGB, transparency laid on white, before they are resized.

    Args:
        size: S.
        mean: (3, 1, 1) float32, of each channel, in [0, 1].
        std: (3, 1, 1) float32, likewise.
    """

    def __init__(self, size: int, mean: Tensor, std: Tensor) -> None:
        self.size, self.mean, self.std = size, mean.cpu(), std.cpu()

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """Prepare one picture.

        Args:
            image: a picture, or the path of one.

        Returns:
            (3, S, S) float32.

        Raises:
            BadSample: it cannot be read as an image.
        """
        picture = upright_rgb(image, "picture") if isinstance(image, Image.Image) else open_rgb(str(image))
        pixels = to_tensor(center_crop(picture, self.size))
        return (pixels.float() / 255 - self.mean) / self.std
