"""The bytes of tensors."""

from __future__ import annotations

import pytest
import torch

from snapshot_tool.numerics.compare import equal_bytes, fingerprint


@pytest.mark.parametrize("size", [0, 1, 8, 4099])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64])
def test_bytes_are_equal_where_the_last_bit_is(size: int, dtype: torch.dtype) -> None:
    """However many there are, and wherever in memory they begin."""
    whole = torch.randint(0, 2, (size + 3,), generator=torch.Generator().manual_seed(1)).to(dtype)
    for start in range(4):
        one = whole[start : start + size]
        other = one.clone()
        assert equal_bytes(one, other)
        if len(one):
            other[-1] = 1 - other[-1].to(torch.int64)
            assert not equal_bytes(one, other)


def test_bytes_are_those_of_any_layout() -> None:
    """A view has the bytes of its elements in their order; zeros of two signs differ in theirs."""
    table = torch.rand(3, 4)
    assert equal_bytes(table.T, table.T.contiguous())
    assert not equal_bytes(table.T.reshape(3, 4), table)
    assert not equal_bytes(torch.tensor(0.0), torch.tensor(-0.0))
    nan = torch.tensor([float("nan")] * 2)
    assert equal_bytes(nan, nan.clone())


def test_one_element_has_bytes_whatever_its_stride() -> None:
    """It is contiguous with any; a row of two may have its first element taken so."""
    strided = torch.arange(2)[::2]
    assert strided.stride() == (2,)
    assert equal_bytes(strided, torch.tensor([0]))
    assert fingerprint(strided) == fingerprint(torch.tensor([0]))
