"""Written by ``python docs/api.py``: the options of ``options.py`` as keyword arguments."""

import inspect
from pathlib import Path
from typing import Any, Literal, TypedDict

class TrainingKeywords(TypedDict, total=False):
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
    loss: str | None
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
    pairs: str | Path | None
    image_column: str
    caption_column: str
    shards: str | None
    dataset: str | None
    pair_by: Literal["stem", "number"]
    max_bad: float
    val_pairs: str | Path | None

class OptionsByName:
    def __init__(self, *groups: Any) -> None: ...
    def __get__(self, instance: Any, owner: type) -> inspect.Signature: ...
