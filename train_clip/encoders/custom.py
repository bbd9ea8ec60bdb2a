"""Any two encoders as one model (data-efficient fine-tuning, arXiv 2104.08945 and 2112.09445).

B  pairs      L  tokens      S  side of the image in pixels      D  width of the text encoder, where both meet
"""

import inspect
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from train_clip.encoders import encoder, libraries
from train_clip.errors import UserError
from train_clip.evaluation.embed import evaluating
from train_clip.models.clip import DualEncoder, PixelNorm, Texts, token_ids

INITIAL_LOG_SCALE = 3.9  # OTTER's code; clamped to [0, ln 100] there too


class CustomCLIP(DualEncoder):
    """An image encoder and a text encoder, joined by a linear projection of the images where their widths differ.

    The encoders are called ``visual`` and ``transformer``, as in train-CLIP's files. A caption is the ``average`` over
    its tokens, or what the text encoder itself makes of them. Without ``project`` different widths are refused.
    """

    least_log_scale = 0.0

    def __init__(
        self, image: encoder.ImageEncoder, text: encoder.TextEncoder, average: bool, project: bool, loss: str | None
    ) -> None:
        same = image.width == text.width
        if not same and not project:
            raise UserError(
                f"The image encoder gives {image.width:,} dimensions, the text encoder {text.width:,}; expected "
                f"equally many. Replace the image encoder's last layer (encoder.fc = torch.nn.Linear({image.width}, "
                f"{text.width})), "
                "or pass project=True, which adds such a layer."
            )
        names = []
        for one in (image, text):
            told = {"name": type(one.module).__name__} | one.description
            names.append(told.get("label") or Path(told["name"]).name)
        super().__init__("+".join(names), text.width, image.size, text.context, text.vocab, math.exp(INITIAL_LOG_SCALE))
        if loss == "sigmoid":
            self.add_bias()
        self.average, self.embeds_by = average, f"average={average}"
        self.pixel_norm = PixelNorm(image.mean, image.std)
        self.visual = image.module
        self.transformer = text.module
        parameters = inspect.signature(text.module.forward).parameters
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        self._takes = None if takes_any else frozenset(parameters)
        self.image_projection: nn.Module = nn.Identity() if same else nn.Linear(image.width, text.width, bias=False)

    @override
    def encode_image(self, images: Tensor) -> Tensor:
        return self.image_projection(encoder.image_features(self.visual(self.pixel_norm(images))))

    @override
    def encode_text(self, texts: Texts) -> Tensor:
        # What the tokenizer gives, input_ids and attention_mask among it; or the ids alone, which are then all read.
        if isinstance(texts, Tensor):
            return encoder.text_features(self.transformer(texts), None, self.average)
        # Some tokenizers give more than their encoder takes, such as token_type_ids.
        taken = {name: tensor for name, tensor in texts.items() if self._takes is None or name in self._takes}
        return encoder.text_features(self.transformer(**taken), texts.get("attention_mask"), self.average)

    @override
    def caption_mask(self, texts: Texts) -> Tensor:
        if isinstance(texts, Tensor) and isinstance(self.transformer, libraries.TextTower):
            return super().caption_mask(texts)
        all_tokens = torch.ones_like(token_ids(texts))
        return (all_tokens if isinstance(texts, Tensor) else texts.get("attention_mask", all_tokens)).bool()


def freeze_unreached(model: DualEncoder, texts: Texts) -> list[str]:
    """Freeze what no gradient comes to, such as a text model's pooler or a mask token, and give the names.

    DDP waits for the gradient of every parameter that asks for one, and fails on its second step where one never comes.
    The texts are tokens of some captions, as training will bring them, on the model's device.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    images = torch.randn(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    # Layers that are dropped at random in training are all there in eval mode.
    with evaluating(model), torch.enable_grad():
        embeddings = model.encode_image(images.to(model.logit_scale.device)), model.encode_text(texts)
        loss = sum(one.float().sum() for one in embeddings) + torch.stack(model.temperature()).sum()
        gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    unreached = [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]
    for name in unreached:
        trainable[name].requires_grad_(False)
    return unreached
