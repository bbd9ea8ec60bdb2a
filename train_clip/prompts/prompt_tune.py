"""Tune visual prompts beside a pretrained CLIP."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_info

from train_clip import options
from train_clip.checkpoints.sources import openai_name
from train_clip.commands import run_folder, train
from train_clip.commands.run import Job, begin, remake, train_job
from train_clip.errors import UserError
from train_clip.models.config import ModelConfig, config_from_dict
from train_clip.options import flat, option
from train_clip.prompts.file import PromptConfig, prompt_layers
from train_clip.prompts.wrapper import VPT, PromptCLIPWrapper
from train_clip.training import data_module

# Rate for a batch of so many pairs, out of the grid of VPT (appendix A, table 6): what benchmarks/prompts.py picked.
BASE_RATE, RATE_OF = 25.0, 256
ADAMW_RATE = 1e-3  # PyTorch's default
DROPOUT = {"deep": 0.1, "shallow": 0.0}  # VPT, appendix A
BY_LOSS = "val/loss"


@dataclasses.dataclass(frozen=True)
class PromptOptions(options.Options):
    """The prompts."""

    prompts: int = option(50, "tokens at each block that has some")
    prompt_kind: Literal["deep", "shallow"] = option("deep", "at every block (deep), or at the first alone (shallow)")
    prompt_layers: list[int] | None = option(
        None, 'blocks that have prompts of their own, counted from 0, such as "[0, 1, 2]"; default: those of the kind'
    )
    prompt_dropout: float | None = option(
        None, "probability of dropping each of the prompts' numbers in training; default: 0.1 for deep, 0 for shallow"
    )
    class_token: bool = option(True, "whether the class embedding is trained too")


@dataclasses.dataclass(frozen=True)
class PromptOptimizerOptions(options.OptimizerOptions):
    """The optimizer of the prompts."""

    optimizer: Literal["adamw", "sgd"] = option("sgd", "optimizer of the prompts: adamw or sgd")
    learning_rate: float | None = option(
        None,
        "peak learning rate; default: 25 for each 256 pairs of a batch with SGD, 1e-3 with AdamW",
        options.POSITIVE,
    )
    weight_decay: float = option(0.0, "weight decay of the prompts", options.at_least(0))
    warmup_steps: int | None = option(
        None, "optimizer steps until the peak; default: a tenth of the run", options.at_least(0)
    )
    # No options here: the backbone runs as it is, and its prompts are no matrices for Muon.
    half_weights: ClassVar[str] = "none"  # type: ignore[misc]
    muon_learning_rate: ClassVar[None] = None  # type: ignore[misc]


def prompt_tune(  # noqa: PLR0913, each is a group of options
    model: options.ModelOptions,
    data: options.DataOptions,
    prompts: PromptOptions,
    optimizer: PromptOptimizerOptions,
    step: options.StepOptions,
    run: options.RunOptions,
    trainer: options.TrainerOptions,
) -> Path:
    """Tune visual prompts, a few thousand numbers in the image tower of a frozen CLIP."""
    resumed = begin(run, step.seed)
    if resumed is not None:
        start, source = resumed.arguments, str(resumed.checkpoint)
        if not {"backbone", "prompts", "config"} <= set(start):
            raise UserError(f"{source}: holds no prompts. Expected a checkpoint of `train-clip prompt-tune`.")
        config = config_from_dict(start["config"], source)
        prompts = _of_run(model, prompts, resumed)
        if model.pretrained not in (
            None,
            run_folder.OPENAI,
        ):  # the backbone is known by its content, wherever it lies by now
            start["backbone"] = model.pretrained
    else:
        backbone = _backbone(model)
        config, start = backbone.config, {"backbone": backbone, "prompts": _prompts(prompts, backbone.config)}
    pairs = data_module.TextImageDataModule(
        image_size=config.image.size, context_length=config.text.context, seed=step.seed, **flat(data)
    )
    pairs.setup()
    if optimizer.learning_rate is None:
        # With SGD as VPT scales it, by the batch that there are pairs for.
        rate = ADAMW_RATE if optimizer.optimizer == "adamw" else BASE_RATE * pairs.batch_size / RATE_OF
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    how = flat(optimizer, step)
    if resumed is None:
        module = PromptCLIPWrapper(**start, **how)
    else:
        module = remake(PromptCLIPWrapper, start, source, **how)
    model = dataclasses.replace(model, pretrained=module.hparams["backbone"])
    asked = flat(model, data, prompts, optimizer, step)
    return train_job(Job("prompt-tune", module, pairs, asked, VPT.epochs, BY_LOSS), run, trainer, resumed)


def _of_run(model: options.ModelOptions, prompts: PromptOptions, resumed: Any) -> PromptOptions:
    """Refuse another start than the run had; of a checkpoint that lies in no run, what it says of its prompts."""
    asked = flat(model)
    del asked["pretrained"]  # held against the run's by its content
    of_prompts = flat(prompts)
    if resumed.config is not None:
        resumed.require_same_start(asked | of_prompts)
        return prompts
    kept, usual = resumed.arguments["prompts"], flat(PromptOptions())
    names = {"prompts": "number", "prompt_layers": "layers", "prompt_dropout": "dropout", "class_token": "class_token"}
    own = {name: kept[field] for name, field in names.items()}
    resumed.require_same_start(asked | {name: v for name, v in of_prompts.items() if v != usual[name]}, own)
    return dataclasses.replace(prompts, **own)


def _backbone(model: options.ModelOptions) -> Any:
    """The pretrained CLIP that prompts are put beside: where none is given, OpenAI's of that name."""
    if model.pretrained is None:
        name = model.model_name or train.DEFAULT_MODEL
        plainly = "Prompts beside a random backbone learn nothing: it is the backbone that knows images and captions."
        if openai_name(name) is None:
            raise UserError(f"--model_name {name}: no weights were given. {plainly} Give some by --pretrained.")
        rank_zero_info(f"No --pretrained was given: the backbone is OpenAI's {name}. {plainly}")
        model = dataclasses.replace(model, pretrained=run_folder.OPENAI)
    weights = train.pretrained_weights(model)
    assert weights is not None
    return weights.require_clip(
        "; prompts are put among a vision transformer's. Expected a CLIP such as ViT-B/32. `train-clip finetune "
        "--pretrained` trains the others."
    )


def _prompts(prompts: PromptOptions, backbone: ModelConfig) -> PromptConfig:
    layers = prompts.prompt_layers
    return PromptConfig(
        prompts.prompts,
        prompt_layers(prompts.prompt_kind, backbone.image.layers) if layers is None else layers,
        DROPOUT[prompts.prompt_kind] if prompts.prompt_dropout is None else prompts.prompt_dropout,
        prompts.class_token,
    )
