"""Write a model in a format of others."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from train_clip.checkpoints.load import open_weights
from train_clip.checkpoints.weights import find_weights, require_no_prompts
from train_clip.checkpoints.write import require_writable, write_model
from train_clip.commands.options import WeightOptions

HOW_TO_OPEN = {
    "open_clip": 'open_clip.create_model_and_transforms("local-dir:{target}")',
    "huggingface": 'transformers.CLIPModel.from_pretrained("{target}"), and CLIPProcessor likewise',
    "safetensors": 'safetensors.torch.load_file("{target}")',
}


def convert(
    source: str,
    target: Path,
    /,
    weights: WeightOptions,
    *,
    to: Literal["open_clip", "huggingface", "safetensors"] = "safetensors",
) -> Path:
    """Write a CLIP so that open_clip, Hugging Face or any reader of .safetensors takes it.

    Args:
        source: what `train` or `finetune` wrote, or weights by OpenAI (ViT-B/32), open_clip or Hugging Face: a file, a
            folder, or hf-hub:NAME
        target: a new folder; for safetensors a new file
        weights: what the source leaves open, or is to be changed.
        to: open_clip for a folder that open_clip.create_model("local-dir:FOLDER") takes, huggingface for one that
            CLIPModel.from_pretrained takes, safetensors for one file under OpenAI's names

    Returns:
        The target.

    Raises:
        UserError: as ``load``, or a format that cannot hold the model.
    """
    require_writable(target)
    # Before gigabytes are read.
    found = find_weights(source, weights.choices)
    require_no_prompts(found.found, source)
    write_model(open_weights(found).model, target, to)
    print(f'Wrote {target}: {HOW_TO_OPEN[to].format(target=target)}, or train_clip.load("{target}").')
    return target
