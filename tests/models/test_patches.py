"""Patches that are left out by chance, against the tower that looks at all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from train_clip.models.config import ViTConfig
from train_clip.models.vit import VisionTransformer, choose_patches

B, P, K, W = 5, 16, 6, 8


def tower(kept: int) -> VisionTransformer:
    torch.manual_seed(0)
    made = VisionTransformer(ViTConfig(size=16, patch=4, layers=1, width=W, heads=2), 4, "gelu").double()
    made.kept_patches = kept
    return made


def images() -> Tensor:
    return torch.randn(B, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_what_is_kept_is_embedded_with_its_place():
    """Each of the K tokens is one of the P whole images have, to 1e-12, no two alike; the class token is first."""
    found, whole = tower(K).embed(images()), tower(0).embed(images())
    assert found.shape == (B, 1 + K, W)
    torch.testing.assert_close(found[:, 0], whole[:, 0], rtol=0, atol=1e-12)
    distances = torch.cdist(found, whole)
    assert (distances.amin(dim=2) < 1e-12).all()
    nearest = distances.argmin(dim=2)
    assert all(len(row.unique()) == 1 + K for row in nearest)
    assert any(not torch.equal(row.sort().values, nearest[0].sort().values) for row in nearest[1:])


def test_gradient_against_a_loop():
    """Positions, patches and class token: gradients of each image's own tokens, picked one by one: 1e-12."""
    model, plain = tower(K), tower(0)
    torch.manual_seed(3)
    places = choose_patches(torch.zeros(B, P, 1), K)[1]
    torch.manual_seed(3)
    model.embed(images()).sin().sum().backward()
    total = torch.zeros((), dtype=torch.float64)
    for image, kept in zip(images(), places.tolist(), strict=True):
        tokens = plain.embed(image[None])[0]
        total = total + tokens[0].sin().sum() + sum(tokens[1 + place].sin().sum() for place in kept)
    total.backward()
    compared = 0
    for (name, own), its in zip(model.named_parameters(), plain.parameters(), strict=True):
        if its.grad is not None:
            torch.testing.assert_close(own.grad, its.grad, rtol=0, atol=1e-12, msg=name)
            compared += 1
    assert compared == 5


def test_every_patch_is_as_likely():
    """Over 4,000 images each of 16 patches is kept in 6 of 16, to five standard deviations."""
    torch.manual_seed(0)
    squares = torch.arange(P).view(1, P, 1).expand(4_000, P, 3)
    kept, places = choose_patches(squares, K)
    assert torch.equal(kept, places.unsqueeze(-1).expand(-1, -1, 3))
    shares = places.flatten().bincount(minlength=P) / 4_000
    assert (shares - K / P).abs().max() < 5 * (K / P * (1 - K / P) / 4_000) ** 0.5


def test_whole_images_in_eval_mode():
    """Whatever is kept in training, to the bit; and training on all patches draws no random number."""
    assert torch.equal(tower(K).eval()(images()), tower(0)(images()))
    model = tower(0)
    before = torch.get_rng_state()
    model(images())
    assert torch.equal(torch.get_rng_state(), before)
