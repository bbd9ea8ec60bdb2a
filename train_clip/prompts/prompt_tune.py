"""Tune visual prompts for a pretrained CLIP."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_info

from train_clip import options
from train_clip.commands import run_folder, train
from train_clip.commands.run import Job, begin, remake, train_job
from train_clip.errors import UserError
from train_clip.models.config import config_from_dict
from train_clip.options import flat, option
from train_clip.prompts import file, wrapper
from train_clip.training import data_module

# Rate for a batch of so many pairs, out of the grid of VPT (appendix A, table 6): what benchmarks/prompts.py picked.
BASE_RATE, RATE_OF = 25.0, 256
ADAMW_RATE = 1e-3  # PyTorch's default
BY_LOSS = "val/loss"


@dataclasses.dataclass(frozen=True)
class PromptOptions(options.Options):
    """The prompts."""

    prompts: int = option(50, "number of prompt tokens per block")
    prompt_kind: Literal["deep", "shallow"] = option(
        "deep", "deep: prompts at every block; shallow: at the first block only"
    )
    prompt_layers: list[int] | None = option(
        None, 'the blocks that have prompts, counted from 0, such as "[0, 1, 2]"; default: those of --prompt_kind'
    )
    prompt_dropout: float | None = option(
        None, "dropout probability of the prompts; default: 0.1 for deep, 0 for shallow"
    )
    class_token: bool = option(True, "whether to train the class embedding too")

    def config(self, blocks: int) -> file.PromptConfig:
        """The prompts beside a backbone of so many blocks: at every one (VPT-deep), or at the first (VPT-shallow)."""
        layers, dropout = self.prompt_layers, self.prompt_dropout
        # VPT, appendix A.
        usual_layers, usual_dropout = (range(blocks), 0.1) if self.prompt_kind == "deep" else (range(1), 0.0)
        return file.PromptConfig(
            self.prompts,
            list(usual_layers) if layers is None else layers,
            usual_dropout if dropout is None else dropout,
            self.class_token,
        )


@dataclasses.dataclass(frozen=True)
class PromptOptimizerOptions(options.OptimizerOptions):
    """The optimizer of the prompts."""

    optimizer: Literal["adamw", "sgd"] = option("sgd", "optimizer of the prompts: adamw or sgd")
    learning_rate: float | None = option(
        None,
        "peak learning rate; default: 25 * batch / 256 with SGD, 1e-3 with AdamW",
        options.POSITIVE,
    )
    weight_decay: float = option(0.0, "weight decay of the prompts", options.at_least(0))
    warmup_steps: int | None = option(
        None, "optimizer steps until the peak learning rate; default: a tenth of the run", options.at_least(0)
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
    """Tune visual prompts: a few thousand parameters in the image tower of a frozen CLIP."""
    resumed = begin(run, step.seed)
    if resumed is not None:
        start, source = resumed.arguments, str(resumed.checkpoint)
        if not {"backbone", "prompts", "config"} <= set(start):
            raise UserError(f"{source}: holds no prompts. Expected a checkpoint of `train-clip prompt-tune`.")
        config = config_from_dict(start["config"], source)
        prompts = _of_run(model, prompts, resumed)
        # The backbone is known by its content, wherever it lies by now.
        if model.pretrained not in (None, run_folder.OPENAI):
            start["backbone"] = model.pretrained
    else:
        backbone = _backbone(model)
        config, start = backbone.config, {"backbone": backbone, "prompts": prompts.config(backbone.config.image.layers)}
    pairs = data_module.TextImageDataModule(
        image_size=config.image.size, context_length=config.text.context, seed=step.seed, **flat(data)
    )
    pairs.setup()
    if optimizer.learning_rate is None:
        # With SGD as VPT scales it, by the batch that there are pairs for.
        rate = ADAMW_RATE if optimizer.optimizer == "adamw" else BASE_RATE * pairs.batch_size / RATE_OF
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    how = flat(optimizer, step)
    module = (
        remake(wrapper.PromptCLIPWrapper, start, source, **how)
        if resumed
        else wrapper.PromptCLIPWrapper(**start, **how)
    )
    model = dataclasses.replace(model, pretrained=module.hparams["backbone"])
    asked = flat(model, data, prompts, optimizer, step)
    return train_job(Job("prompt-tune", module, pairs, asked, wrapper.VPT.epochs, BY_LOSS), run, trainer, resumed)


def _of_run(model: options.ModelOptions, prompts: PromptOptions, resumed: Any) -> PromptOptions:
    """Refuse another start than the run had; of a checkpoint that lies in no run, what it says of its prompts."""
    asked, of_prompts, kept = flat(model), flat(prompts), resumed.arguments["prompts"]
    del asked["pretrained"]  # held against the run's by its content
    names = {"prompts": "number", "prompt_layers": "layers", "prompt_dropout": "dropout", "class_token": "class_token"}
    own = {name: kept[field] for name, field in names.items()}
    if resumed.config is None:
        usual = flat(PromptOptions())
        of_prompts = {name: value for name, value in of_prompts.items() if value != usual[name]}
        prompts = dataclasses.replace(prompts, **own)
    resumed.require_same_start(asked | of_prompts, own)
    return prompts


def _backbone(model: options.ModelOptions) -> Any:
    """The pretrained CLIP that prompts are put beside: where none is given, OpenAI's of that name."""
    if model.pretrained is None:
        rank_zero_info(
            f"No --pretrained was given: the backbone is OpenAI's {model.model_name or train.DEFAULT_MODEL}. Prompts "
            "need a pretrained backbone: with a random one they cannot learn."
        )
        model = dataclasses.replace(model, pretrained=run_folder.OPENAI)
    weights = train.pretrained_weights(model)
    assert weights is not None
    return weights.require_clip(
        "; prompts need a vision transformer. Expected a CLIP such as ViT-B/32. `train-clip finetune "
        "--pretrained` trains the others."
    )
