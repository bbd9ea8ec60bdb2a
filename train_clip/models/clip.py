"""The model interface: an image tower, a text tower, and one temperature (CLIP paper, section 2); and CLIP itself.

B  pairs      L  tokens, at most the context      S  side of the image in pixels      D  embedding width
"""

import math
import pkgutil
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from train_clip.models.blocks import LayerNorm, Transformer
from train_clip.models.config import MEAN, START_OF_SIGMOID, STD, ModelConfig

MAX_LOGIT_SCALE = 100.0  # CLIP paper, section 2.5
INITIAL_TEMPERATURE = 0.07  # CLIP paper, section 2.5

Texts = Tensor | Mapping[str, Tensor]
"""Tokens as a text tower takes them: (B, L) int64, or a tokenizer's mapping of such."""


def token_ids(texts: Texts) -> Tensor:
    """The ids alone: (B, L) int64."""
    return texts["input_ids"] if isinstance(texts, Mapping) else texts


def texts_on(device: torch.device, texts: Texts) -> Texts:
    """The tokens on a device."""
    if isinstance(texts, Mapping):
        return {name: tensor.to(device) for name, tensor in texts.items()}
    return texts.to(device)


def up_to_end(tokens: Tensor) -> Tensor:
    """(B, L) bool: a caption of CLIP's tokens ends at its end token, the largest id."""
    return torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(dim=1, keepdim=True)


def caption_ids(ids: Tensor, mask: Tensor) -> Tensor:
    """A number for each caption, (B,) int64, equal for equal captions, which are those of equal tokens: a random hash.

    Of (B, L) int64 ids, cut to the context, and (B, L) bool, which of them make up the caption; padding may stand on
    either side. This alone says which captions are equal: in training, scores, and the check of a data set.
    """
    # Products wrap around: two captions collide once in about 2⁶³ pairs.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (ids.shape[1],), generator=generator).to(ids.device)
    places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return ((ids + 1) * mask * weights[places]).sum(dim=1)


def unit_norm(embeddings: Tensor) -> Tensor:
    """Scale (N, D) rows to length 1, in float32 or wider."""
    return nn.functional.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


class PixelNorm(nn.Module):
    """(x / 255 - mean) / std for bytes; floats are taken as already normalized and pass unchanged."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            # Not persistent: the state dict holds the field's names and nothing else.
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @override
    def forward(self, images: Tensor) -> Tensor:
        pixels = images.to(self.mean.dtype)
        return pixels if images.is_floating_point() else (pixels / 255 - self.mean) / self.std


class DualEncoder(nn.Module):
    """Two towers that map images and captions into one space."""

    visual: Any  # the image tower
    transformer: nn.Module  # of the text tower
    pixel_norm: PixelNorm
    least_log_scale: float | None = None
    logit_bias: nn.Parameter | None  # of the sigmoid loss
    embeds_by: str = ""  # how it embeds, as far as tensors do not show it: told apart by a fingerprint
    names_of_layers: tuple[str, ...] = ()  # parts of tensors' names that mean the same in versions of a library
    text_is_fixed: bool = False  # locked, so that a caption's embedding is the same at every step

    def __init__(
        self,
        name: str,
        embed_dim: int,
        image_size: int,
        context_length: int | None,  # maximum number of tokens in a caption; None if unknown
        vocab_size: int | None,  # likewise
        initial_scale: float,  # initial factor on the similarities, at most 100
    ) -> None:
        super().__init__()
        self.name = name
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.logit_scale = nn.Parameter(torch.tensor(math.log(initial_scale)))
        self.register_parameter("logit_bias", None)
        self._locked: list[nn.Module] = []  # towers

    def add_bias(self) -> None:
        """Give logits the bias of the sigmoid loss; bias and temperature are those that it begins with."""
        for name, value in START_OF_SIGMOID.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images: (B, 3, S, S), uint8 or float that is already normalized → (B, D), not normalized."""
        return self.visual(self.pixel_norm(images))

    def encode_text(self, texts: Texts) -> Tensor:
        """Embed captions: tokens of B captions → (B, D), not normalized."""
        raise NotImplementedError

    def caption_mask(self, texts: Texts) -> Tensor:
        """(B, L) bool: which tokens make up a caption, and which are padding; here, of CLIP's tokens."""
        return up_to_end(token_ids(texts))

    def caption_ids(self, texts: Texts) -> Tensor:
        """(B,) int64, equal for captions that are one to this model: those of equal tokens."""
        return caption_ids(token_ids(texts), self.caption_mask(texts))

    def towers(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the image tower and of the text tower; what joins them is in neither."""
        return list(self.visual.parameters()), list(self.transformer.parameters())

    @override
    def forward(self, images: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """Score every image against every caption: (B, B) logits, scaled cosines plus the bias, and their transpose."""
        embeddings = (self.encode_image(images), self.encode_text(texts))
        rows, columns = (nn.functional.normalize(side, dim=-1) for side in embeddings)
        logits = self.logit_scale.exp() * rows @ columns.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def temperature(self) -> list[Tensor]:
        """What turns similarities into logits and is in neither tower: the scale, and the bias where there is one."""
        return [self.logit_scale] if self.logit_bias is None else [self.logit_scale, self.logit_bias]

    def lock(self, image: bool, text: bool) -> None:
        """Keep towers as they are: no gradient, no graph, and eval mode whatever ``train`` asks for."""
        self._locked, self.text_is_fixed = [self.visual] * image + [self.transformer] * text, text
        of_image, of_text = self.towers()
        for parameter in of_image * image + of_text * text:
            parameter.requires_grad_(False)
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for tower in self._locked:
            tower.eval()
        return self

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the scale at or below 100 (CLIP paper, section 2.5). Called after each optimizer step."""
        self.logit_scale.clamp_(self.least_log_scale, math.log(MAX_LOGIT_SCALE))


class CLIP(DualEncoder):
    """A ViT or ResNet for images, a causal transformer for captions; ``read_config("ViT-B/32")`` gives the sizes.

    The text tower's tensors sit at the top level, as in OpenAI's and open_clip's state dicts.
    """

    transformer: Transformer

    def __init__(self, config: ModelConfig) -> None:
        text = config.text
        super().__init__(
            config.name, config.embed_dim, config.image.size, text.context, text.vocab, 1 / INITIAL_TEMPERATURE
        )
        self.config, self.embeds_by = config, config.activation
        if config.logit_bias:
            self.add_bias()
        self.pixel_norm = PixelNorm(config.mean, config.std)
        build_tower = pkgutil.resolve_name(config.image.tower)
        self.visual = build_tower(config.image, config.embed_dim, config.activation)
        self.transformer = Transformer(text.width, text.layers, text.heads, config.activation, causal=True)
        self.token_embedding = nn.Embedding(text.vocab, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context, text.width))
        self.ln_final = LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        # As openai/CLIP, ``initialize_parameters``; attention biases stay 0, the other biases PyTorch's default.
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        residual = text.width**-0.5 * (2 * text.layers) ** -0.5
        block: Any
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=text.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * text.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)
        nn.init.normal_(self.text_projection, std=text.width**-0.5)

    @override
    def encode_text(self, texts: Texts) -> Tensor:
        # The output at the end token. What follows is never looked at, so rows may be cut after the longest.
        tokens = token_ids(texts)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]])
        ends = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
        return self.ln_final(ends) @ self.text_projection

    @override
    def towers(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        image = list(self.visual.parameters())
        other = {*image, *self.temperature()}
        return image, [parameter for parameter in self.parameters() if parameter not in other]
