"""The gradient of a table of tokens: gathered by rows over chunks, made once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.conftest import TINY
from tests.training.tiny_encoders import bare_trainer
from train_clip import CLIPWrapper
from train_clip.training.encode import WeightSubstitutes, _RowsToTable


class Words(nn.Module):
    """Two uses of one table that is large enough for its rows to be gathered."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10_000, 3, padding_idx=padding)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens).sin().sum(dim=(1, 2)) + self.table(tokens[:, 0]).cos().sum(dim=1)


@pytest.mark.parametrize("padding", [None, 7])
@pytest.mark.parametrize("half", [False, True])
def test_a_tables_gradient_by_its_rows(padding, half):
    """Chunks that look up the same rows twice: the dense gradient of the whole, its weight and setting as before."""
    found, plain = Words(padding), Words(padding)
    if half:
        found.table.weight.data = found.table.weight.data.bfloat16()
        plain.table.weight.data = found.table.weight.data.float()
    weight, tokens = found.table.weight, torch.tensor([[1, 7, 1], [9_999, 1, 7], [5, 5, 5], [7, 2, 1]])
    look_up = WeightSubstitutes(found, halves=half, tables=True).around(found)
    torch.cat([look_up(chunk) for chunk in tokens.split(1)]).sum().backward()
    plain(tokens).sum().backward()
    assert weight.grad.layout == torch.strided and weight.grad.dtype == weight.dtype
    tolerance = 2**-8 * plain.table.weight.grad.abs().max().item() if half else 1e-6
    torch.testing.assert_close(weight.grad.float(), plain.table.weight.grad, rtol=0, atol=tolerance)
    assert found.table.weight is weight and not found.table.sparse


@pytest.mark.parametrize("how", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_a_table_that_does_more_is_left_alone(how):
    """What a table makes of its rows' numbers or norms needs its own gradient."""
    model = nn.Sequential(nn.Embedding(10_000, 3, **how))
    assert not WeightSubstitutes(model, halves=False, tables=True).places


def test_a_run_gathers_its_tables_rows(monkeypatch):
    """Under a Trainer each step makes one gradient of the token table; compiled towers of a library look up as ever."""
    made: list[int] = []
    backward = _RowsToTable.backward
    monkeypatch.setattr(_RowsToTable, "backward", staticmethod(lambda *args: made.append(1) or backward(*args)))
    data = DataLoader([(torch.zeros(3, 16, 16), f"picture {number}") for number in range(8)], batch_size=4)
    bare_trainer().fit(CLIPWrapper("tiny", TINY, minibatch_size=3), data)
    assert len(made) == 2


def test_tables_are_looked_up_as_ever_without_gradient():
    """In validation, and where the table is frozen, nothing stands in."""
    model = Words(None)
    with torch.no_grad():
        assert not WeightSubstitutes(model, halves=False, tables=True).places
    model.requires_grad_(False)
    assert not WeightSubstitutes(model, halves=False, tables=True).places


def test_a_half_tables_gradient_adds_up_in_float32():
    """Of 1 and 512 times 2⁻⁹, each from a chunk of its own: 2, where a sum in bfloat16 stays at 1."""
    table = nn.Embedding(10_000, 1, dtype=torch.bfloat16)
    look_up = WeightSubstitutes(table, halves=True, tables=True).around(table)
    chunks = [share * look_up(torch.tensor([7])).float() for share in [1.0, *[2.0**-9] * 512]]
    torch.cat(chunks).sum().backward()
    assert table.weight.grad[7].item() == 2
