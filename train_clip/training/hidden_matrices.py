"""Which parameters Muon updates: the matrices within the towers. Embeddings and what leads out of a tower are none.

"Muon should only be applied to hidden layers"; embeddings, the last layer, gains and biases take AdamW (Jordan et al.
2024, kellerjordan.github.io/posts/muon). Convolutions take it here too.
"""

from __future__ import annotations

from torch import Tensor, nn

from train_clip.models.blocks import SelfAttention
from train_clip.models.dual_encoder import DualEncoder
from train_clip.models.resnet import AttentionPool


def hidden_matrices(model: DualEncoder) -> set[nn.Parameter]:
    """Weights of linear layers, and fused in-projections, inside both towers.

    Args:
        model: CLIP's own towers, or encoders of a library.
    """
    found: set[nn.Parameter] = set()
    for module in (module for tower in (model.visual, model.transformer) for module in tower.modules()):
        if isinstance(module, nn.Linear):
            found |= {module.weight}  # type: ignore[arg-type]
        elif isinstance(module, SelfAttention | nn.MultiheadAttention):
            weight = module.in_proj_weight
            found |= set() if weight is None else {weight}
    for module in model.modules():
        if isinstance(module, AttentionPool):
            found.discard(module.c_proj.weight)
    return found


def row_blocks(matrix: Tensor) -> int:
    """How many matrices lie one upon the other in a parameter: three where it is three times as high as it is wide.

    Such are the fused projections to query, key and value, of this package and of libraries alike. Orthogonalised as
    one, the three would share one norm.

    Args:
        matrix: (rows, columns).
    """
    rows, columns = matrix.shape
    return 3 if rows == 3 * columns else 1
