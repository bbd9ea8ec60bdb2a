"""Which parameters the loss reaches, found by one backward pass.

B  images of the trial
"""

from __future__ import annotations

import torch

from train_clip.models.custom import CustomCLIP
from train_clip.models.dual_encoder import Texts

B = 2


def freeze_unreached(model: CustomCLIP, texts: Texts) -> list[str]:
    """Freeze what no gradient comes to, such as a text model's pooler or a mask token.

    DDP waits for the gradient of every parameter that asks for one, and fails on its second step where one never comes.

    Args:
        model: in any mode, on any device; it is left as it was found, but for what is frozen.
        texts: tokens of some captions, as training will bring them, on the model's device.

    Returns:
        The names of what was frozen.
    """
    device = model.logit_scale.device
    training = [module for module in model.modules() if module.training]
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(B, 3, model.image_size, model.image_size, generator=generator).to(device)
    if not trainable:
        return []
    # Layers that are dropped at random in training are all there in eval mode.
    model.eval()
    try:
        with torch.enable_grad():
            embeddings = model.encode_image(images).float().sum() + model.encode_text(texts).float().sum()
            loss = embeddings + torch.stack(model.temperature()).sum()
            gradients = torch.autograd.grad(loss, [parameter for _, parameter in trainable], allow_unused=True)
    finally:
        for module in training:
            module.training = True
    unreached = [
        (name, parameter) for (name, parameter), gradient in zip(trainable, gradients, strict=True) if gradient is None
    ]
    for _, parameter in unreached:
        parameter.requires_grad_(False)
    return [name for name, _ in unreached]
