"""Train CLIP on your own images and captions.

The public names are loaded when they are first used: importing the package takes no time.
"""

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train_clip.checkpoints.load import load
    from train_clip.data.tokenizer import Tokenizer
    from train_clip.encoders.wrapper import CustomCLIPWrapper
    from train_clip.lora.wrapper import LoRAWrapper
    from train_clip.models.clip import CLIP
    from train_clip.models.config import ModelConfig, read_config
    from train_clip.prompts.wrapper import PromptCLIPWrapper
    from train_clip.training.clip_wrapper import CLIPWrapper
    from train_clip.training.data_module import TextImageDataModule

__version__ = "0.1.0"  # the one place: pyproject.toml reads it from here

__all__ = [
    "CLIP",
    "CLIPWrapper",
    "CustomCLIPWrapper",
    "LoRAWrapper",
    "ModelConfig",
    "PromptCLIPWrapper",
    "TextImageDataModule",
    "Tokenizer",
    "load",
    "read_config",
]

_HOMES = {
    "CLIP": "train_clip.models.clip",
    "CLIPWrapper": "train_clip.training.clip_wrapper",
    "CustomCLIPWrapper": "train_clip.encoders.wrapper",
    "LoRAWrapper": "train_clip.lora.wrapper",
    "ModelConfig": "train_clip.models.config",
    "PromptCLIPWrapper": "train_clip.prompts.wrapper",
    "TextImageDataModule": "train_clip.training.data_module",
    "Tokenizer": "train_clip.data.tokenizer",
    "load": "train_clip.checkpoints.load",
    "read_config": "train_clip.models.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'train_clip' has no attribute {name!r}; it has {', '.join(__all__)}")
    return pkgutil.resolve_name(f"{_HOMES[name]}:{name}")


def __dir__() -> list[str]:
    return __all__
