"""Any image encoder with any Hugging Face text encoder, and the module that trains them together.

Data-efficient fine-tuning by self-distillation: arXiv 2104.08945, and OTTER, arXiv 2112.09445, whose numbers it has.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from train_clip.data.tokenizer import Tokenizer
from train_clip.encoders import custom, huggingface, libraries, sources
from train_clip.encoders.encoder import ImageEncoder, Pixels, TextEncoder
from train_clip.encoders.tokenizer import PretrainedTokenizer, wrap_tokenizer
from train_clip.errors import UserError, WrongType
from train_clip.keywords import TrainingKeywords
from train_clip.models.config import OptimizerConfig
from train_clip.options import StepOptions, TowerOptions, TrainingOptions
from train_clip.training import data_module, module

# OTTER, section 4.1; betas and eps are PyTorch's, for other optimizers than its SGD.
OTTER = OptimizerConfig(lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=0, epochs=10)
ALIKE = 0.02  # embeddings of one caption, in any precision
TRIAL_CAPTIONS = (
    *("a small brown dog runs across a green field", "chart", "snow-covered mountains at dawn; no clouds!"),
    "Two people in yellow coats, seen from behind, wait for the 17:45 train.",
)


class CustomCLIPWrapper(module.ContrastiveModule):
    """Two pretrained encoders that train with any ``Trainer``, and embed images and captions afterwards.

    ``CustomCLIPWrapper.load_from_checkpoint(path)`` needs no further arguments where both encoders and the tokenizer
    are of a library that makes them again (``train-clip finetune``, or Hugging Face's models); pass a module of your
    own there again.

    Args:
        image_encoder: maps images to (B, D); or what ``load_image_encoder`` gives.
        text_encoder: a Hugging Face text model; or what ``load_text_encoder`` gives.
        avg_word_embs: whether a caption's embedding is the mean over its tokens, or the text encoder's own pooling.
        project: where the encoders' widths differ, add a linear projection of the images.
        tokenizer: the text encoder's, for captions that are strings; the data module's where None.
        image_size: side of the images of an image encoder of the user's own, in pixels.
        pixel_mean: of the pixels that it was trained with, in [0, 1]; ImageNet's by default.
        pixel_std: likewise.
        options: of ``train_clip.options.TrainingOptions``; SGD and optimal transport by default.
    """

    model: custom.CustomCLIP
    names_of_model = (
        *("image_encoder", "text_encoder", "avg_word_embs", "project", "tokenizer"),
        *("image_size", "pixel_mean", "pixel_std"),
    )
    free_to_change = (*module.ContrastiveModule.free_to_change, "tokenizer")

    def __init__(  # noqa: PLR0913, people know these arguments
        self,
        image_encoder: torch.nn.Module | ImageEncoder | Mapping[str, Any] | None,
        text_encoder: torch.nn.Module | TextEncoder | Mapping[str, Any] | None,
        minibatch_size: int = StepOptions.minibatch_size,
        learning_rate: float = OTTER.lr,
        kl_coeff: float = TowerOptions.kl_coeff,
        avg_word_embs: bool = False,
        project: bool = False,
        tokenizer: Any = None,
        image_size: int = 224,
        pixel_mean: Sequence[float] = huggingface.IMAGENET_MEAN,
        pixel_std: Sequence[float] = huggingface.IMAGENET_STD,
        **options: Unpack[TrainingKeywords],
    ) -> None:
        pixels = Pixels.of(image_size, pixel_mean, pixel_std, "pixel_mean and pixel_std")
        image: ImageEncoder = _encoder(image_encoder, "image", huggingface.live_image_encoder, pixels)
        text: TextEncoder = _encoder(text_encoder, "text", huggingface.live_text_encoder, avg_word_embs)
        own = {"minibatch_size": minibatch_size, "learning_rate": learning_rate, "kl_coeff": kl_coeff}
        given = TrainingOptions.of({**options, **own}, optimizer="sgd", distillation="transport", warmup_steps=0)
        super().__init__(custom.CustomCLIP(image, text, avg_word_embs, project, given.objective.loss), OTTER, given)
        if isinstance(tokenizer, Mapping):
            tokenizer = sources.described_tokenizer(tokenizer)
        elif not (tokenizer is None or hasattr(tokenizer, "batch")):
            tokenizer = wrap_tokenizer(tokenizer, text.context)
        self.tokenizer = tokenizer
        self.save_hyperparameters(
            {
                "image_encoder": image.description or None,
                "text_encoder": text.description or None,
                "avg_word_embs": avg_word_embs,
                "project": project,
                "image_size": image.size,
                "pixel_mean": list(image.mean),
                "pixel_std": list(image.std),
            }
            | self.options.flat()
        )

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, data_module.TextImageDataModule):
            of_clip = isinstance(self.model.transformer, libraries.TextTower)
            if isinstance(data.tokenizer, Tokenizer) != of_clip:
                found, expected = ("another", "CLIP's") if of_clip else ("CLIP's", "the text encoder's own")
                raise UserError(
                    f"The data module has {found} tokenizer; expected {expected}: "
                    "TextImageDataModule(…, custom_tokenizer=…)."
                )
            self.tokenizer = self.tokenizer or data.tokenizer
        super().setup(stage)
        if stage != "fit":
            return
        if isinstance(projection := self.model.image_projection, torch.nn.Linear):
            rank_zero_info(
                f"The image encoder gives {projection.in_features:,} dimensions, the text encoder "
                f"{projection.out_features:,}: adding a linear projection of the images, which is trained from scratch."
            )
        self._reader.padding_counts = self._padding_counts()
        frozen = custom.freeze_unreached(self.model, self._some_tokens())
        if frozen:
            numbers = sum(self.model.get_parameter(name).numel() for name in frozen)
            rank_zero_info(
                f"{len(frozen)} tensors with {numbers:,} parameters do not affect the loss and are not trained: "
                f"{', '.join(frozen)}."
            )
        kept = dict(self.hparams) | {"tokenizer": self.tokenizer is None or self._described_tokenizer()}
        for name in ("image_encoder", "text_encoder", "tokenizer"):
            if kept[name] is None:
                rank_zero_info(
                    f"A checkpoint does not say how to build the {name} that you passed. Pass it again to load one: "
                    f"{type(self).__name__}.load_from_checkpoint(path, {name}=…)."
                )

    def _padding_counts(self) -> bool:
        """Whether padding changes what the text encoder makes of a caption, as of one that reads the last position."""
        if self.tokenizer is None:
            return False
        alone, padded = (self.embed_texts(TRIAL_CAPTIONS, number) for number in (1, len(TRIAL_CAPTIONS)))
        return not torch.allclose(alone, padded, atol=ALIKE)

    def _some_tokens(self) -> Any:
        if self.tokenizer is not None:
            return self._reader.tokens(TRIAL_CAPTIONS, self.device, self.tokenizer)
        made_up = torch.Generator().manual_seed(0)
        ids = torch.randint(self.model.vocab_size or 2, (len(TRIAL_CAPTIONS), 8), generator=made_up).to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # Not among the hparams: a vocabulary is nothing for the loggers that show them.
        checkpoint["hyper_parameters"] = checkpoint["hyper_parameters"] | {"tokenizer": self._described_tokenizer()}

    def _described_tokenizer(self) -> dict[str, Any] | None:
        if isinstance(self.tokenizer, Tokenizer):
            return {"source": "clip", "context_length": self.tokenizer.context_length}
        return self.tokenizer.describe() if isinstance(self.tokenizer, PretrainedTokenizer) else None


def _encoder(given: Any, kind: str, live: Any, how: Any) -> Any:
    if isinstance(given, torch.nn.Module):
        return live(given, how)
    if isinstance(given, ImageEncoder | TextEncoder):
        return given
    if isinstance(given, Mapping | None):
        return sources.build_encoder(given, kind)
    raise WrongType(
        f"The {kind}_encoder is a {type(given).__name__}; expected a torch.nn.Module, or what "
        f"train_clip.encoders.sources.load_{kind}_encoder('hf:NAME') gives."
    )
