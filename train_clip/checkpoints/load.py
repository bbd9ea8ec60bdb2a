"""Load a model from any supported format, and use it."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track

from train_clip.checkpoints import found as formats
from train_clip.data.crops import Preprocess
from train_clip.evaluation.encode import Item, batches
from train_clip.models.clip import DualEncoder, Texts, unit_norm
from train_clip.options import WeightOptions


class Pretrained(NamedTuple):
    """What ``load`` gives."""

    model: DualEncoder  # in eval mode, by default in float32: ``encode_image``, ``encode_text``, ``logit_scale``
    preprocess: Preprocess  # a picture or its path → (3, S, S) float32, as the model takes it
    tokenizer: Any  # a caption or several → what ``encode_text`` takes

    def encode(  # noqa: PLR0913, by name
        self,
        items: Any,
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        normalize: bool = True,
        unreadable: Literal["raise", "nan"] = "raise",
        as_tensor: bool = False,
    ) -> Any:
        """Embed images, or captions: one, several, or an iterator of them.

        Captions are cut to the context length and computed without padding. On GPUs that have it, in bfloat16.

        Args:
            items: captions are str; images are paths (``pathlib.Path``), PIL pictures, arrays (H, W, 3) or (H, W)
                uint8, or tensors (3, S, S), uint8 or already normalized.
            batch_size: how many are encoded at a time.
            num_workers: threads that decode images; one per core by default.
            device: where to move the model to; where it is by default.
            progress: show a bar.
            normalize: scale each row to length 1.
            unreadable: ``"raise"`` at an image that cannot be read, or give it a row of NaN.
            as_tensor: give a tensor on the CPU in place of an array.

        Returns:
            (N, D) float32, in the order of the items.

        Raises:
            BadSample: the first image that cannot be read, with the reason.
        """
        # A tensor or an array of four dimensions is several images.
        is_one = isinstance(items, Item) and getattr(items, "ndim", 0) < 4
        given: Any = [items] if is_one else items
        if progress:
            given = track(given, "encoding", total=len(given) if hasattr(given, "__len__") else None)
        rows = [torch.empty(0, self.model.embed_dim)]
        for embeddings, bad in batches(self.model.to(device), self.tokens, given, batch_size, num_workers):
            if bad and unreadable == "raise":
                raise bad[0]
            rows.append((unit_norm(embeddings) if normalize else embeddings).cpu())
        found = torch.cat(rows)
        return found if as_tensor else found.numpy()

    def tokens(self, captions: list[str]) -> Texts:
        """What ``model.encode_text`` takes, of captions that are cut to the context length."""
        return self.tokenizer.batch(captions)[0]


def load(  # noqa: PLR0913, by name
    source: str | Path,
    *,
    model_name: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    activation: Literal["gelu", "quick_gelu"] | None = None,
    backbone: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Pretrained:
    """Load a CLIP, or two encoders joined by this package, from any supported format; no code of a file is run.

    Args:
        source: a file by OpenAI, open_clip, Hugging Face, train-CLIP or this package; a folder with ``config.json`` or
            ``open_clip_config.json``; a name of OpenAI's (``ViT-B/32``); or ``hf-hub:NAME``.
        model_name: a preset or a YAML file, for weights that do not say which model they are of.
        image_size: another input size in pixels.
        context_length: another number of tokens per caption at most.
        activation: for weights that do not say it.
        backbone: for a file of visual prompts, its backbone, if it has moved.
        device: where the model is put; the CPU by default.
        dtype: of the model's weights and embeddings; float32 by default.

    Raises:
        UserError: a missing (also a ``FileNotFoundError``), unknown, damaged or hostile file, a source that is no path
            (also a ``TypeError``), or an option that has to be set.
    """
    choices = WeightOptions(model_name, image_size, context_length, activation)
    pretrained = formats.find_weights(source, choices, backbone).build()
    pretrained.model.to(device=device, dtype=dtype)
    return pretrained
