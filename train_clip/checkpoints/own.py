"""What this package writes, and what train-CLIP wrote before it: Lightning's checkpoints, ``.safetensors`` files."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

from train_clip.checkpoints import found, openai, read
from train_clip.errors import UserError, root_cause
from train_clip.models.config import ModelConfig, config_from_dict

METADATA = "train_clip"  # under it a .safetensors file holds the model's configuration
LIGHTNING = "pytorch-lightning_version"
MODEL = "model."  # before the names of a module's model
OF_MODULE = "state_dict.model"  # its place in a checkpoint
RUNNING_MEAN = "running_mean"  # in a file that holds the EMA of a run's weights: what it followed
NO_STATE = (
    "holds the EMA of a run's weights (--ema), and no training state to resume from. Expected one of "
    "RUN/checkpoints/. To start a run from these weights: --pretrained FILE."
)
# Arguments whose tensors are a part of a run and not of the model, as they are in a file that holds a model alone.
OF_RUN = {"ema": 0.0, "distillation": "none"}
OF_CUSTOM_WRAPPER = "sink_temp"  # a parameter of train-CLIP's CustomCLIPWrapper
MARKED_AS_FOLDER = 0x10  # the MS-DOS attribute, in a zip archive's directory


def find_checkpoint(contents: read.Contents) -> found.FoundCLIP | None:
    """Find a checkpoint of ``train``."""
    told = of_lightning(contents)
    config = told["arguments"].get("config")
    # Ours has two towers; train-CLIP's is flat, or a path, or whatever its user made of it.
    if not isinstance(config, dict) or not {"image", "text"} <= set(config):
        return None
    return found.FoundCLIP(format="train-clip checkpoint", config=config_from_dict(config, told["source"]), **told)


def find_safetensors(contents: read.Contents) -> found.FoundCLIP | None:
    """Find a file of ``train-clip convert --to safetensors``."""
    if METADATA not in contents.data:
        return None
    source = str(contents.path)
    config = config_from_dict(read.parse_json(contents.data[METADATA], f"{source}: its metadata"), source)
    return found.FoundCLIP(format="train-clip safetensors", source=source, records=contents.tensors, config=config)


def find_train_clip(contents: read.Contents) -> found.FoundCLIP | None:
    """Find a checkpoint of train-CLIP's CLIPWrapper: OpenAI's model, QuickGELU included (its models/model.py)."""
    told = of_lightning(contents)
    if LIGHTNING not in contents.data or not contents.place.endswith(OF_MODULE):
        return None
    if OF_CUSTOM_WRAPPER in contents.left_out:
        raise UserError(
            f"{contents.path}: two encoders of train-CLIP's CustomCLIPWrapper, and the file does not say which. Build "
            "them, load its tensors below model.visual. and model.transformer. into them, and pass them to "
            "train_clip.CustomCLIPWrapper."
        )
    if "visual.conv1.weight" not in contents.tensors:  # somebody's module, with another CLIP in it
        return None
    kind = "train-CLIP checkpoint (CLIPWrapper)"
    return openai.found_by_shapes(kind, contents, told["records"], is_openai=True, about=told["about"])


def of_lightning(contents: read.Contents) -> dict[str, Any]:
    """What a checkpoint of Lightning's says of any model: tensors, the module's arguments, how far the run had come."""
    data, about = contents.data, dict[str, Any]()
    if isinstance(mean := data.get(RUNNING_MEAN), dict):
        about["EMA of weights"] = f"momentum {mean.get('momentum')}, {mean.get('updates')} updates"
    names = {"global_step": "step", "epoch": "epoch", LIGHTNING: "Lightning"}
    about |= {shown: data[name] for name, shown in names.items() if name in data}
    if isinstance(about.get("epoch"), int):
        about["epoch"] += 1  # counted from 1, as everywhere but in Lightning
    arguments = data.get("hyper_parameters")
    model = {key.removeprefix(MODEL): one for key, one in contents.tensors.items() if key.startswith(MODEL)}
    return {
        "source": str(contents.path),
        "records": model or contents.tensors,
        "arguments": arguments if isinstance(arguments, dict) else {},
        "about": about,
    }


def write_safetensors(config: ModelConfig, tensors: found.Tensors, file: Path) -> None:
    """Write one file of tensors under OpenAI's names, the configuration in its metadata."""
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt", METADATA: json.dumps(config.to_dict())})


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint: plain data only, each record verified by its checksum."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch takes an entry that is marked as a folder for an empty one, and its checksum is not looked at.
            if any(entry.external_attr & MARKED_AS_FOLDER for entry in archive.infolist()) or archive.testzip():
                raise zipfile.BadZipFile("a record differs from what was written")
        loaded = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than plain data; no code of it was run. Expected a checkpoint of `train-clip train`."
        ) from error
    except Exception as error:
        # A foreign, empty or truncated file raises anything from BadZipFile to KeyError.
        raise UserError(
            f"{path}: not a checkpoint, or an incomplete one ({root_cause(error)}). Use another, such as "
            "RUN/checkpoints/last.ckpt."
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}; expected a checkpoint of `train-clip train`.")
    return loaded
