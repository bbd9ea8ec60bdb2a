"""Targets from a teacher's similarities, and a student's divergence from them (OTTER, arXiv 2112.09445, section 3).

A target needs all pairs of the global batch, since optimal transport weighs columns over all rows. Numbers are those of
OTTER's code (github.com/facebookresearch/OTTER) unless another source stands beside them.

B  pairs on this process      N  pairs of the global batch      D  embedding width
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STRENGTH = 0.15  # λ, of the entropy
ITERATIONS = 5  # of Sinkhorn's algorithm
TEMPERATURE = 100.0  # T of plain self-distillation (arXiv 2104.08945)
REMOVED = 100.0  # taken from the similarity of a pair with itself, once for each side


class Targets(NamedTuple):
    """Logarithms of distributions over the global batch, a row each."""

    image_to_text: Tensor  # (N, N) float32: where the mass of an image goes among the captions
    text_to_image: Tensor  # (N, N) float32: where that of a caption goes among the images


def transport_targets(images: Tensor, texts: Tensor) -> Targets:
    """Spread each row's mass over the other pairs by optimal transport: high similarity, high mass.

        Q = Sinkhorn(exp(S / λ))            S_v = S_vv + S_tt + S_vt,  S_t = S_vv + S_tt + S_tv,  own pairs removed

    Images and texts are the teacher's embeddings of everyone, (N, D) float, unit norm.
    """
    return _targets(images, texts, _sinkhorn)


def softmax_targets(images: Tensor, texts: Tensor) -> Targets:
    """Plain self-distillation: Q = softmax(T · S), with S as in ``transport_targets``."""
    return _targets(images, texts, lambda similarity: similarity.mul_(TEMPERATURE).log_softmax(dim=1))


def divergence(rows: Tensor, columns: Tensor, scale: Tensor, log_target: Tensor) -> Tensor:
    """Kullback-Leibler divergence from a target to what a student makes of its similarities.

        L = mean over i of Σ_j Q_ij (ln Q_ij - ln P_ij)            P = softmax(scale · rows columnsᵀ)

    Of (B, D) rows and (N, D) columns, float, unit norm, the student's; () scale; and ln Q, (B, N) float32.
    """
    similarity = scale * rows @ columns.T
    log_student = similarity.to(torch.promote_types(similarity.dtype, torch.float32)).log_softmax(dim=1)
    return torch.nn.functional.kl_div(log_student, log_target, reduction="batchmean", log_target=True)


@torch.no_grad()
def _targets(images: Tensor, texts: Tensor, spread: Callable[[Tensor], Tensor]) -> Targets:
    # One after the other: (N, N) matrices are what limits the batch. ``spread`` may overwrite its own.
    wide = torch.promote_types(images.dtype, torch.float32)
    images, texts = images.to(wide), texts.to(wide)
    same_side = (images @ images.T).addmm_(texts, texts.T)
    same_side.diagonal().sub_(2 * REMOVED)  # from S_vv and from S_tt
    image_to_text = spread(torch.addmm(same_side, images, texts.T))
    return Targets(image_to_text, spread(same_side.addmm_(texts, images.T)))


def _sinkhorn(similarity: Tensor) -> Tensor:
    # Rows and columns to equal sums in turn, rows last. In the log domain, so that it is finite at any similarity.
    log_mass = similarity.div_(STRENGTH)
    for _ in range(ITERATIONS):
        log_mass -= log_mass.logsumexp(dim=1, keepdim=True)
        log_mass -= log_mass.logsumexp(dim=0, keepdim=True)
    return log_mass.log_softmax(dim=1)
