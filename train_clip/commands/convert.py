"""Write a model in another format."""

import pkgutil
from pathlib import Path
from typing import Literal

from train_clip import files, options
from train_clip.checkpoints.found import find_weights
from train_clip.errors import UserError
from train_clip.estimates import require_room
from train_clip.models.clip import CLIP, DualEncoder

ENCODERS = (
    "joined by this package, which no other format can hold: they describe a CLIP by its sizes alone. Keep the .ckpt, "
    "which `evaluate`, `finetune --pretrained` and train_clip.load read; or save its encoders separately, in Python: "
    "model.visual, model.transformer."
)

# By format: what writes it, of a configuration, tensors and a place that gets its name once all is on disk; how it is
# opened.
WRITERS = {
    "open_clip": (
        "train_clip.checkpoints.open_clip:write_open_clip",
        'open_clip.create_model_and_transforms("local-dir:{target}")',
    ),
    "huggingface": (
        "train_clip.checkpoints.huggingface:write_huggingface",
        'transformers.CLIPModel.from_pretrained("{target}"), and CLIPProcessor likewise',
    ),
    "safetensors": ("train_clip.checkpoints.own:write_safetensors", 'safetensors.torch.load_file("{target}")'),
}


def convert(
    source: str,
    target: Path,
    /,
    weights: options.WeightOptions,
    *,
    to: Literal["open_clip", "huggingface", "safetensors"] = "safetensors",
) -> Path:
    """Write a CLIP for open_clip, Hugging Face or any reader of .safetensors.

    Args:
        source: a checkpoint of `train` or `finetune`, or weights of OpenAI (ViT-B/32), open_clip or Hugging Face: a
            file, a folder, or hf-hub:NAME
        target: a new folder; for safetensors a new file
        weights: values that the source does not state, or that are to be changed.
        to: open_clip for a folder that open_clip.create_model("local-dir:FOLDER") takes, huggingface for one that
            AutoModel.from_pretrained takes, safetensors for one file under OpenAI's names

    Returns:
        The target.
    """
    files.require_new(target)
    # Before gigabytes are read.
    found, opened = find_weights(source, weights), WRITERS[to][1]
    if not found.writer:
        found.require_clip(f" {ENCODERS}")
        write_model(found.build().model, target, to)
    elif to != "huggingface":
        found.refuse(f"{found.format}, which only its family's own format can hold. Write it --to huggingface")
    else:
        opened, loaded = 'transformers.AutoModel.from_pretrained("{target}")', found.build()
        require_room(target, sum(tensor.nbytes for tensor in loaded.model.state_dict().values()), "the model takes")
        with files.replacing(target) as beside:
            beside.mkdir()
            pkgutil.resolve_name(found.writer)(loaded, beside)
    print(f'Wrote {target}: {opened.format(target=target)}, or train_clip.load("{target}").')
    return target


def write_model(model: DualEncoder, target: Path, kind: str) -> None:
    """Write a model from ``load`` completely or not at all, to a new folder, or for ``safetensors`` to a new file."""
    if not isinstance(model, CLIP):
        raise UserError(f"{model.name}: two encoders {ENCODERS}")
    if not isinstance(model.visual, pkgutil.resolve_name(model.config.image.tower)):
        raise UserError(
            f"{model.name}: a CLIP with visual prompts, which no other format can hold. Keep the .ckpt, which "
            "`evaluate` and train_clip.load read."
        )
    files.require_new(target)
    write, tensors = pkgutil.resolve_name(WRITERS[kind][0]), model.state_dict()
    require_room(target, sum(tensor.nbytes for tensor in tensors.values()), "the model takes")
    with files.replacing(target) as beside:
        if kind != "safetensors":
            beside.mkdir()
        write(model.config, {name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
