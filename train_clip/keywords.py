"""The options as keyword arguments: their types for editors, and for ``help`` a signature that lists them.

``tests/test_options.py`` holds them against ``options.py``. What a table there can be extended by is a plain string.
"""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypedDict

from train_clip.options import PairBy


class TrainingKeywords(TypedDict, total=False):
    """The options of ``TrainingOptions``, but for those that every wrapper has among its own arguments."""

    optimizer: str | None
    momentum: float | None
    muon_learning_rate: float | None
    weight_decay: float | None
    betas: tuple[float, float] | None
    eps: float | None
    warmup_steps: int | None
    adam_statistics: Literal["float32", "bfloat16"]
    half_weights: Literal["none", "text", "image", "both"]
    ema: float
    loss: str
    equal_captions: Literal["keep", "mask"]
    mask_ratio: float
    unmasked_share: float
    stochastic_depth: float
    image_learning_rate: float | None
    text_learning_rate: float | None
    lock_image: bool
    lock_text: bool
    distillation: str | None
    layer_decay: float
    color_jitter: float
    grayscale: float
    horizontal_flip: float
    vertical_flip: float
    kept_minibatches: int
    gradient_checkpointing: int
    compile: bool
    seed: int


class DataKeywords(TypedDict, total=False):
    """The options of ``DataOptions``, but for those that the data module has among its own arguments."""

    pairs: str | Path | None
    image_column: str
    caption_column: str
    pair_by: PairBy
    max_bad: float
    val_pairs: str | Path | None


class OptionsByName:
    """As ``__signature__`` of a class whose constructor takes ``**options``: its signature with each of them."""

    def __init__(self, *groups: Any) -> None:
        self.groups = groups

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        """Give the class's; an instance has its ``forward``'s."""
        if instance is not None:
            raise AttributeError("__signature__")
        _, *parameters = inspect.signature(owner.__init__).parameters.values()  # type: ignore[misc]
        if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            named = {one.name for one in parameters}
            every = (one for group in self.groups for one in fields(group))
            parameters[-1:] = [
                inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
                for one in every
                if one.name not in named
            ]
        return inspect.Signature(parameters)
