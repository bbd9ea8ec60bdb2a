"""Tune visual prompts beside a pretrained CLIP."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from train_clip.checkpoints.found import FoundCLIP
from train_clip.checkpoints.sources import openai_name
from train_clip.commands.options import DataOptions, ModelOptions, RunOptions, TrainerOptions
from train_clip.commands.run import Job, begin, train_job
from train_clip.commands.run_folder import Resumption
from train_clip.commands.train import DEFAULT_MODEL, OPENAI, pretrained_weights, require_same_start
from train_clip.errors import UserError
from train_clip.models.config import ModelConfig, ViTConfig, config_from_dict
from train_clip.prompts.config import PromptConfig, prompt_layers
from train_clip.prompts.wrapper import EPOCHS, PromptCLIPWrapper
from train_clip.training.checkpoints import Best
from train_clip.training.data_module import TextImageDataModule
from train_clip.training.load import rebuilt
from train_clip.training.module import ContrastiveModule

# Rate for a batch of so many pairs, out of the grid of VPT (appendix A, table 6): what benchmarks/prompts.py picked.
BASE_RATE, RATE_OF = 25.0, 256
ADAMW_RATE = 1e-3  # PyTorch's default
DROPOUT = {"deep": 0.1, "shallow": 0.0}  # VPT, appendix A
# Options that say what the prompts are; the others say how they are trained.
OF_PROMPTS = ("prompts", "prompt_kind", "prompt_layers", "prompt_dropout", "class_token")
BY_LOSS = Best("val/loss", lowest=True)


@dataclass(frozen=True)
class PromptOptions:
    """What is trained.

    Args:
        prompts: tokens at each block that has some
        prompt_kind: at every block (deep), or at the first alone (shallow)
        prompt_layers: the blocks that have prompts of their own, counted from 0, such as "[0, 1, 2]", if not those of
            the kind
        prompt_dropout: share of the prompts' numbers that is dropped in training; 0.1 for deep and 0 for shallow
            prompts, if not told
        class_token: whether the class embedding is trained too
        optimizer: of the prompts
        momentum: of SGD
        learning_rate: at its peak, if not 25 for each 256 pairs of a batch with SGD, and 1e-3 with AdamW
        weight_decay: of the prompts
        warmup_steps: optimizer steps until the peak, if not a tenth of the run
    """

    prompts: int = 50
    prompt_kind: Literal["deep", "shallow"] = "deep"
    prompt_layers: list[int] | None = None
    prompt_dropout: float | None = None
    class_token: bool = True
    optimizer: Literal["adamw", "sgd"] = "sgd"
    momentum: float = 0.9
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup_steps: int | None = None


def prompt_tune(
    model: ModelOptions, data: DataOptions, prompts: PromptOptions, run: RunOptions, trainer: TrainerOptions
) -> Path:
    """Tune visual prompts: a few thousand numbers in the image tower of a pretrained CLIP, all else staying as it is.

    Args:
        model: the backbone.
        data: the data.
        prompts: what is trained.
        run: length, seed and folder of the run.
        trainer: arguments of Lightning's Trainer.

    Returns:
        The run's folder.
    """
    resumed = begin(run)
    backbone = _backbone(model) if resumed is None else None
    config = _config_of(backbone, resumed)
    pairs = TextImageDataModule(
        image_size=config.image.size, context_length=config.text.context, seed=run.seed, **dataclasses.asdict(data)
    )
    pairs.setup()
    how: dict[str, Any] = {
        "optimizer": prompts.optimizer,
        "momentum": prompts.momentum,
        # Of the batch that there are pairs for.
        "learning_rate": _rate(prompts, pairs.batch_size),
        "weight_decay": prompts.weight_decay,
        "warmup_steps": prompts.warmup_steps,
        "seed": run.seed,
        "ema": run.ema,
    } | run.step
    if resumed is not None:
        prompts = _of_run(model, prompts, resumed)
        module: ContrastiveModule = rebuilt(_beside(model, resumed), resumed.checkpoint, **how)
    else:
        assert backbone is not None
        module = PromptCLIPWrapper(backbone, _prompts(prompts, config), **how)
    model = dataclasses.replace(model, pretrained=module.hparams["backbone"])

    def options(_: Path) -> tuple[object, ...]:
        """What the run's ``config.yaml`` keeps."""
        resolved = dataclasses.replace(prompts, learning_rate=how["learning_rate"])
        return model, data, resolved

    return train_job(Job("prompt-tune", module, pairs, EPOCHS, options, BY_LOSS), run, trainer, resumed)


def _config_of(backbone: FoundCLIP | None, resumed: Resumption | None) -> ModelConfig:
    """The backbone's configuration: of the file, or of the run that goes on."""
    if backbone is not None:
        return backbone.config
    assert resumed is not None
    arguments = resumed.state.get("hyper_parameters", {})
    if not {"backbone", "prompts", "config"} <= set(arguments):
        raise UserError(f"{resumed.checkpoint}: holds no prompts. Expected a checkpoint of `train-clip prompt-tune`.")
    return config_from_dict(arguments["config"], str(resumed.checkpoint))


def _of_run(model: ModelOptions, prompts: PromptOptions, resumed: Resumption) -> PromptOptions:
    """Refuse another start than the run had; of a checkpoint that lies in no run, what it says of its prompts."""
    asked = {name: getattr(model, name) for name in ("model_name", "image_size", "context_length", "activation")}
    of_prompts = {name: getattr(prompts, name) for name in OF_PROMPTS}
    if resumed.run is not None:
        require_same_start(resumed, asked | of_prompts)
        return prompts
    kept = resumed.state["hyper_parameters"]["prompts"]
    usual = dataclasses.asdict(PromptOptions())
    given = {name: value for name, value in of_prompts.items() if value != usual[name]}
    names = {"prompts": "number", "prompt_layers": "layers", "prompt_dropout": "dropout", "class_token": "class_token"}
    own = {name: kept[field] for name, field in names.items()}
    require_same_start(resumed, asked | given, own)
    return dataclasses.replace(prompts, **own)


def _beside(model: ModelOptions, resumed: Resumption) -> dict[str, Any]:
    """The state of a run, its backbone where the options have it: it is known by its content, wherever it lies."""
    arguments = resumed.state.get("hyper_parameters", {})
    own = model.pretrained is None or model.pretrained == OPENAI
    place = {} if own else {"backbone": model.pretrained}
    return {**resumed.state, "hyper_parameters": arguments | place}


def _backbone(model: ModelOptions) -> FoundCLIP:
    """The pretrained CLIP that prompts are put beside: where none is given, OpenAI's of that name.

    Raises:
        UserError: there is none, or it is a ResNet.
    """
    if model.pretrained is None:
        name = model.model_name or DEFAULT_MODEL
        plainly = "Prompts beside a random backbone learn nothing: it is the backbone that knows images and captions."
        if openai_name(name) is None:
            raise UserError(f"--model_name {name}: no weights were given. {plainly} Give some by --pretrained.")
        rank_zero_info(f"No --pretrained was given: the backbone is OpenAI's {name}. {plainly}")
        model = dataclasses.replace(model, pretrained=OPENAI)
    weights = pretrained_weights(model)
    assert weights is not None
    expected = (
        "; prompts are put among a vision transformer's. Expected a CLIP such as ViT-B/32. `train-clip finetune "
        "--pretrained` trains the others."
    )
    clip = weights.require_clip(expected)
    if not isinstance(clip.config.image, ViTConfig):
        raise UserError(f"--pretrained {clip.source}: {clip.config.name}, a ResNet without tokens{expected}")
    return clip


def _prompts(prompts: PromptOptions, backbone: ModelConfig) -> PromptConfig:
    assert isinstance(backbone.image, ViTConfig)
    layers = prompts.prompt_layers
    return PromptConfig(
        prompts.prompts,
        prompt_layers(prompts.prompt_kind, backbone.image.layers) if layers is None else tuple(layers),
        DROPOUT[prompts.prompt_kind] if prompts.prompt_dropout is None else prompts.prompt_dropout,
        prompts.class_token,
    )


def _rate(prompts: PromptOptions, batch_size: int) -> float:
    """The rate at its peak: with SGD as VPT scales it by the batch."""
    if prompts.learning_rate is not None:
        return prompts.learning_rate
    return ADAMW_RATE if prompts.optimizer == "adamw" else BASE_RATE * batch_size / RATE_OF
