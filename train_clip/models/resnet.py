"""CLIP's modified ResNet (CLIP paper, section 2.4; openai/CLIP, model.py).

Three differences from He et al.: a stem of three 3×3 convolutions, an average pool before every strided convolution
(anti-aliasing), and attention pooling instead of the mean.

B  images      S  side of the image in pixels      C  channels      L  positions of the last map      D  embedding width
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

from train_clip.models.blocks import Blocks, attend
from train_clip.models.config import ResNetConfig

EXPANSION = 4  # a bottleneck's output over its inner channels (He et al. 2015, arXiv 1512.03385, table 1)


class ModifiedResNet(nn.Module):
    """Stem, four stages of bottlenecks, attention pooling; its activation is ReLU, whatever the text tower's is."""

    def __init__(self, config: ResNetConfig, embed_dim: int, _activation: str = "relu") -> None:
        super().__init__()
        width = config.width
        self.conv1, self.bn1 = _conv_and_norm(3, width // 2, 3, stride=2)
        self.conv2, self.bn2 = _conv_and_norm(width // 2, width // 2, 3)
        self.conv3, self.bn3 = _conv_and_norm(width // 2, width, 3)
        inputs = width
        for stage, blocks in enumerate(config.blocks):
            channels, stride = width * 2**stage, 2 if stage else 1
            later = [Bottleneck(channels * EXPANSION, channels) for _ in range(1, blocks)]
            self.add_module(f"layer{stage + 1}", Blocks(Bottleneck(inputs, channels, stride), *later))
            inputs = channels * EXPANSION
        # Heads of 64 channels: 32 · width / 64 (openai/CLIP, model.py).
        self.attnpool = AttentionPool(config.size // 32, inputs, heads=width // 2, embed_dim=embed_dim)

    @override
    def forward(self, images: Tensor) -> Tensor:
        # (B, 3, S, S) normalized images → (B, D) embeddings
        x = images
        # Fastest with the channels last. But on a CPU statistics of norms are then added up number by number, a tenth
        # as exactly, which float32 would show (tests/parity/test_openai_resnet.py) and half precision does not.
        if images.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            x = images.contiguous(memory_format=torch.channels_last)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = torch.relu(norm(conv(x)))
        x = nn.functional.avg_pool2d(x, 2)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.attnpool(x)  # of (B, C, S/32, S/32)


def _conv_and_norm(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions around a shortcut; a stride is an average pool after the 3×3."""

    def __init__(self, inputs: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        outputs = channels * EXPANSION
        self.conv1, self.bn1 = _conv_and_norm(inputs, channels)
        self.conv2, self.bn2 = _conv_and_norm(channels, channels, 3)
        self.conv3, self.bn3 = _conv_and_norm(channels, outputs)
        # The residual branch starts at zero (openai/CLIP, initialize_parameters).
        nn.init.zeros_(self.bn3.weight)
        self.stride = stride
        changes = stride > 1 or inputs != outputs
        self.downsample = nn.Sequential(*_conv_and_norm(inputs, outputs) if changes else ())

    @override
    def forward(self, x: Tensor) -> Tensor:
        # (B, inputs, H, W) → (B, 4 · channels, H / stride, W / stride)
        inner = torch.relu(self.bn1(self.conv1(x)))
        inner = torch.relu(self.bn2(self.conv2(inner)))
        if self.stride > 1:
            inner, x = (nn.functional.avg_pool2d(part, self.stride) for part in (inner, x))
        return torch.relu(self.bn3(self.conv3(inner)) + self.downsample(x))


class AttentionPool(nn.Module):
    """One attention step in which the mean of the map, ``side`` positions wide and high, asks the map and itself."""

    def __init__(self, side: int, channels: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, channels) / channels**0.5)
        projections = [nn.Linear(channels, outputs) for outputs in (channels, channels, channels, embed_dim)]
        for projection in projections:
            nn.init.normal_(projection.weight, std=channels**-0.5)
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = projections

    @override
    def forward(self, feature_map: Tensor) -> Tensor:
        # (B, C, H, W) → (B, D)
        x = feature_map.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        pooled = attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads, causal=False)
        return self.c_proj(pooled).squeeze(1)
