"""Train a CLIP, from scratch or from weights."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from train_clip.checkpoints import found, sources
from train_clip.commands.run import Job, begin, count, data_for, remake, train_job
from train_clip.commands.run_folder import OPENAI
from train_clip.data.tokenizer import Tokenizer
from train_clip.errors import UsageError, UserError
from train_clip.estimates import duration
from train_clip.models.config import ModelConfig, read_config
from train_clip.options import (
    DataOptions,
    LoRAOptions,
    ModelOptions,
    RunOptions,
    TrainerOptions,
    TrainingOptions,
    WeightOptions,
    flat,
)
from train_clip.training.clip_wrapper import CLIPWrapper

DEFAULT_MODEL = "ViT-B/32"
TWO_ENCODERS = ", which `train-clip finetune --pretrained` trains on."
LARGE_ON_CPU = 50_000_000  # parameters; the paper's models have 100 million and more
CPU_EPOCHS, CPU_SPEED = 40, 30  # of `--config cpu`: epochs, and pairs per second and thread in float32
RECIPES = {"small": 300_000, "medium": 5_000_000}  # pairs that a recipe is for at most (docs/recipes.md)


# Modules that train other models than a CLIP, by an argument that they alone have.
MODULES = {
    "lora": "train_clip.lora.wrapper:LoRAWrapper",
    "adapter": "train_clip.adapters.wrapper:AdapterWrapper",
    "text_encoder": "train_clip.encoders.wrapper:CustomCLIPWrapper",
}


def train(
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    lora: LoRAOptions,
    run: RunOptions,
    trainer: TrainerOptions,
) -> Path:
    """Train a CLIP on a folder of images and captions, from scratch or from weights; return the run's folder."""
    resumed = begin(run, training.step.seed)
    weights = pretrained_weights(model) if resumed is None else None
    known: Any = resumed.arguments if resumed else weights.arguments if weights else {}
    if resumed is not None:
        # The model itself is held against the run's by its sizes.
        asked: dict[str, Any] = {"pretrained": model.pretrained, "activation": model.activation}
        if "lora" in known or lora != LoRAOptions():
            asked |= flat(lora)
        if known.keys() & {"adapter", "lora"}:  # whose sizes are fixed
            asked |= {"image_size": model.image_size, "context_length": model.context_length}
        if "lora" in known and model.pretrained is not None:
            # The backbone is known by its content, wherever it lies by now.
            known["backbone"] = asked.pop("pretrained")
        resumed.require_same_start(asked, known.get("lora"))
    elif lora.lora is not None:
        known = arguments_of_lora(weights, model, lora)
    module: Any
    config = None if known.keys() & {"adapter", "lora"} else choose_config(model, weights)
    if config is not None:
        module = CLIPWrapper(config.name, config, **training.flat())
    else:  # another library's model
        module = remake(
            kind_of(known), known, str(resumed.checkpoint if resumed else model.pretrained), **training.flat()
        )
    if weights is not None:
        if lora.lora is None:
            module.begin_with(weights.read(), weights.source)
        model = replace(model, pretrained=weights.source)
    if "lora" in known:  # which needs its backbone again, whatever folder a later command is run in
        model = replace(model, pretrained=module.hparams["backbone"])
    # Weights, or a file of the user's own: no preset's name builds the model again.
    is_own = model.pretrained is not None or (model.model_name or "").endswith((".yaml", ".yml"))
    model = replace(model, model_name=model.model_name or (DEFAULT_MODEL if config else None))
    job = Job(
        "train",
        module,
        data_for(module, data),
        flat(model, data, lora) | training.flat(),
        module.preset.epochs,
        advice=partial(advise, count(module.model), training.optimizer.optimizer) if weights is None else None,
        own_model=config.to_dict() if config and is_own else None,
    )
    return train_job(job, run, trainer, resumed)


def arguments_of_lora(weights: found.Found | None, model: ModelOptions, lora: LoRAOptions) -> dict[str, Any]:
    """The arguments of a module that trains LoRA beside these weights."""
    if weights is None:
        raise UsageError(f"--lora {lora.lora}: trains beside pretrained weights. Give some: --pretrained.")
    choices = flat(WeightOptions.pick(flat(model)))
    return {"backbone": weights, "lora": flat(lora), "digest": None, "choices": choices}


def kind_of(arguments: Mapping[str, Any]) -> Any:
    """The module of a checkpoint, or of found weights, that have these arguments."""
    return next((resolve_name(place) for name, place in MODULES.items() if name in arguments), CLIPWrapper)


def advise(num_parameters: int, optimizer: str | None, num_pairs: int, device: str) -> str | None:
    """Suggest a recipe that fits the machine or so few pairs, if training starts from scratch."""
    if device == "cpu" and num_parameters > LARGE_ON_CPU:
        return (
            f"This model ({num_parameters / 1e6:,.0f} million parameters) is slow on a CPU. `--config cpu` trains a "
            f"small one on {num_pairs:,} pairs in about {time_on_cpu(num_pairs)}."
        )
    recipe = next((name for name, most in RECIPES.items() if num_pairs <= most), None)
    if optimizer is not None or recipe is None:
        return None
    return f"For {num_pairs:,} pairs `--config {recipe}` usually gives better results than the paper's hyperparameters."


def time_on_cpu(num_pairs: int) -> str:
    """How long `--config cpu` takes here for so many pairs, in words."""
    return duration(CPU_EPOCHS * num_pairs / (CPU_SPEED * torch.get_num_threads()))


def pretrained_weights(model: ModelOptions) -> found.Found | None:
    """The weights that the options name; None where they name none."""
    if model.pretrained is None:
        return None
    if model.pretrained != OPENAI:
        return found.find_weights(model.pretrained, model)
    name = model.model_name or DEFAULT_MODEL
    if sources.openai_name(name) is None:
        raise UsageError(f"--pretrained {OPENAI} --model_name {name}: OpenAI has not published this model.")
    return found.find_weights(name, replace(model, model_name=None, pretrained=None))


def choose_config(model: ModelOptions, weights: found.Found | None) -> ModelConfig:
    """The model that the options name; an error if it cannot be built, or has fewer tokens than CLIP's tokenizer."""
    if weights is not None:
        config = weights.require_clip(TWO_ENCODERS).config
    else:
        config = read_config(model.model_name or DEFAULT_MODEL).with_sizes(model.image_size, model.context_length)
        if model.activation is not None and model.pretrained is None:
            raise UserError(
                f"--activation {model.activation}: is only for weights (--pretrained) that do not state theirs. To "
                "set it for a new model, write a YAML file: `train-clip models --show ViT-B/32` prints one to start "
                "from."
            )
    if config.text.vocab < Tokenizer.vocab_size:
        raise UserError(
            f"{config.name}: a vocabulary of {config.text.vocab:,}; CLIP's tokenizer has {Tokenizer.vocab_size:,} "
            "tokens. Set text.vocab to that."
        )
    return config
