"""Write a dual encoder of transformers in its family's own files, as ``AutoModel`` and ``AutoProcessor`` read them."""

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from train_clip.adapters.find import TOWERS
from train_clip.adapters.model import AdaptedModel, build
from train_clip.adapters.tokenizer import FamilyTokenizer
from train_clip.checkpoints import sources
from train_clip.checkpoints.load import Pretrained


def write(pretrained: Pretrained, folder: Path) -> None:
    """Write weights, configuration, image processor and tokenizer of an ``AdaptedModel`` into a folder."""
    model, tokenizer = pretrained.model, pretrained.tokenizer
    assert isinstance(model, AdaptedModel) and isinstance(tokenizer, FamilyTokenizer)
    whole = build(model.adapter)
    whole.load_state_dict(_theirs(model, whole.state_dict()))
    whole.save_pretrained(folder)
    text = json.dumps(model.adapter["processor"], indent=2) + "\n"
    (folder / sources.HF_PIXELS).write_text(text, encoding="utf-8")
    tokenizer.tokenizer.save_pretrained(folder)


def _theirs(model: AdaptedModel, forms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names → theirs, of which ``forms`` has the shapes."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tower = next((ours for ours in TOWERS if name.startswith(ours)), "")
        tensors[name.removeprefix(tower)] = tensor
    if model.family.temperature == "temperature":
        tensors["temperature"] = (-tensors.pop("logit_scale")).exp()
    if "logit_bias" in forms and "logit_bias" not in tensors:
        tensors["logit_bias"] = torch.zeros(())  # trained with the softmax loss, to which a bias is nothing
    if "logit_bias" in tensors and "logit_bias" not in forms:
        bias = tensors.pop("logit_bias").item()
        warnings.warn(
            f"{model.name}: its family has no logit_bias; {bias:.4f} is dropped. Rankings and softmax outputs do not "
            "change; add it before a sigmoid of the logits.",
            stacklevel=2,
        )
    return {name: tensor.reshape(forms[name].shape) for name, tensor in tensors.items()}
