"""The modified ResNet against a plain restatement of openai/CLIP's, as calls on its state dict.

Every tensor is random: as initialised, the gain of each residual branch is 0 and hides it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict

BLOCKS, WIDTH, SIZE, EMBED = (2, 1, 3, 2), 8, 64, 12
HEADS = WIDTH * 32 // 64


class Plain:
    """Stem, bottlenecks and attention pool; ``training`` says whose statistics BatchNorm takes."""

    def __init__(self, state: dict[str, Tensor], training: bool) -> None:
        self.state = state
        self.training = training

    def __call__(self, images: Tensor) -> Tensor:
        x = self.conv_norm_relu(images, "conv1", "bn1", stride=2, padding=1)
        x = self.conv_norm_relu(x, "conv2", "bn2", padding=1)
        x = self.conv_norm_relu(x, "conv3", "bn3", padding=1)
        x = F.avg_pool2d(x, kernel_size=2, stride=2)
        for stage, blocks in enumerate(BLOCKS):
            for block in range(blocks):
                x = self.bottleneck(x, f"layer{stage + 1}.{block}.", stride=2 if stage and not block else 1)
        return self.attention_pool(x)

    def conv_norm_relu(self, x: Tensor, conv: str, norm: str, **how: int) -> Tensor:
        return F.relu(self.norm(F.conv2d(x, self.state[f"{conv}.weight"], **how), norm))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """BatchNorm written out: by the batch's own biased variance, or by the running statistics."""
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean, variance = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        gain, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        wide = (None, slice(None), None, None)
        return (x - mean[wide]) / (variance[wide] + 1e-5).sqrt() * gain[wide] + bias[wide]

    def bottleneck(self, x: Tensor, name: str, stride: int) -> Tensor:
        """A stride is an average pool: before the last convolution, and before the shortcut's."""
        inner = self.conv_norm_relu(x, f"{name}conv1", f"{name}bn1")
        inner = self.conv_norm_relu(inner, f"{name}conv2", f"{name}bn2", padding=1)
        shortcut = x
        if stride > 1:
            inner, shortcut = F.avg_pool2d(inner, stride), F.avg_pool2d(shortcut, stride)
        if name.endswith(".0."):
            shortcut = F.conv2d(shortcut, self.state[f"{name}downsample.0.weight"])
            shortcut = self.norm(shortcut, f"{name}downsample.1")
        inner = self.norm(F.conv2d(inner, self.state[f"{name}conv3.weight"]), f"{name}bn3")
        return F.relu(inner + shortcut)

    def attention_pool(self, x: Tensor) -> Tensor:
        """Through PyTorch's own multi-head attention, whose output projection goes to the embedding's width."""
        part = {name.removeprefix("attnpool."): t for name, t in self.state.items() if name.startswith("attnpool.")}
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x]) + part["positional_embedding"][:, None]
        pooled, _ = F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=HEADS,
            in_proj_weight=None,
            in_proj_bias=torch.cat([part["q_proj.bias"], part["k_proj.bias"], part["v_proj.bias"]]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=part["c_proj.weight"],
            out_proj_bias=part["c_proj.bias"],
            training=self.training,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=part["q_proj.weight"],
            k_proj_weight=part["k_proj.weight"],
            v_proj_weight=part["v_proj.weight"],
        )
        return pooled[0]


@pytest.fixture
def visual():
    torch.manual_seed(0)
    image = {"size": SIZE, "blocks": list(BLOCKS), "width": WIDTH}
    text = {"context": 4, "vocab": 10, "layers": 1, "width": 4, "heads": 1}
    visual = CLIP(config_from_dict({"embed_dim": EMBED, "image": image, "text": text})).visual
    with torch.no_grad():
        for name, tensor in visual.state_dict().items():
            if "running_var" in name:
                tensor.copy_(0.5 + torch.rand_like(tensor))
            elif ("bn" in name or "downsample.1" in name) and name.endswith("weight"):
                tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
            elif tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor)
    return visual


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_embeddings(visual, training, dtype, tolerance):
    """Embeddings by the running statistics and by the batch's own, relative to the largest."""
    visual.to(dtype).train(training)
    state = {name: tensor.clone() for name, tensor in visual.state_dict().items()}
    images = torch.randn(3, 3, SIZE, SIZE, dtype=dtype)
    with torch.no_grad():
        embeddings, expected = visual(images), Plain(state, training)(images)
    assert embeddings.shape == (3, EMBED)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_gradient(visual):
    """Each parameter's gradient in train mode, in float64: 1e-10 of the largest of its tensor."""
    visual.double().train()
    images, weights = torch.randn(3, 3, SIZE, SIZE).double(), torch.randn(3, EMBED).double()
    state = {name: tensor.detach().clone() for name, tensor in visual.state_dict().items()}
    names = [name for name, _ in visual.named_parameters()]
    for name in names:
        state[name].requires_grad_()
    (visual(images) * weights).sum().backward()
    (Plain(state, training=True)(images) * weights).sum().backward()
    for name, parameter in visual.named_parameters():
        expected = state[name].grad
        tolerance = 1e-10 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=tolerance, msg=name)


def test_map(visual):
    """The map before pooling has 32 · width channels and a 32nd of the side, and one position more is learned."""
    shapes: list[torch.Size] = []
    visual.attnpool.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    visual(torch.randn(2, 3, SIZE, SIZE))
    assert shapes == [(2, 32 * WIDTH, SIZE // 32, SIZE // 32)]
    assert visual.attnpool.positional_embedding.shape == ((SIZE // 32) ** 2 + 1, 32 * WIDTH)
