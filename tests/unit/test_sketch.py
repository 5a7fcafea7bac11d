"""Sketches: small, the same for the same seed, and sensitive to order and sign."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from snapshot_tool.base import sketch as module
from snapshot_tool.base.localisation import ERROR_LIMIT
from snapshot_tool.base.sketch import project, relative_error, sample_indices, sketch
from snapshot_tool.base.tap import Tap
from snapshot_tool.diagnose.localise import localise
from snapshot_tool.reports.text import localisation_lines

TENSOR = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(1))


def changed_at_one_place(tensor: torch.Tensor) -> torch.Tensor:
    """Add one to one element."""
    other = tensor.clone()
    other[2, 49, 39] += 1
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda t: -t,
        lambda t: t.flip(0),
        lambda t: t.flip(1),
        lambda t: t[..., torch.randperm(40, generator=torch.Generator().manual_seed(2))],
        lambda t: t.transpose(1, 2).reshape(t.shape),
        changed_at_one_place,
        lambda t: t * 1.001,
    ],
    ids=["negated", "rows", "positions", "permuted", "transposed", "one element", "scaled"],
)
def test_a_changed_tensor_has_another_sketch(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Norm and range alone would see only some of these."""
    golden = sketch(TENSOR, seed=5)
    assert relative_error(golden, sketch(TENSOR.clone(), seed=5)) == 0
    assert relative_error(golden, sketch(change(TENSOR), seed=5)) > ERROR_LIMIT


def test_rounding_is_no_change() -> None:
    """Noise of the size of float32 rounding stays far below the limit, and is measured right."""
    noise = torch.randn(TENSOR.shape, generator=torch.Generator().manual_seed(3)) * 1e-6
    error = relative_error(sketch(TENSOR, seed=5), sketch(TENSOR + noise, seed=5))
    assert 3e-7 < error < 3e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_infinitely_far(value: float) -> None:
    """They never count as small."""
    other = TENSOR.clone()
    other[0, 0, 0] = value
    assert relative_error(sketch(TENSOR, seed=5), sketch(other, seed=5)) == float("inf")


def test_another_shape_is_infinitely_far() -> None:
    """Even with the same elements."""
    flat = sketch(TENSOR.reshape(150, 40), seed=5)
    assert relative_error(sketch(TENSOR, seed=5), flat) == float("inf")


def test_the_sample_is_the_tensors_elements() -> None:
    """At seeded places; a small tensor is kept whole."""
    places = sample_indices(TENSOR.numel(), seed=5)
    assert torch.equal(sketch(TENSOR, seed=5).sample, TENSOR.reshape(-1)[places])
    assert torch.equal(sketch(TENSOR[0, 0], seed=5).sample, TENSOR[0, 0])


def test_blocks_do_not_change_a_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor is projected block by block, to the same sums."""
    wide = torch.randn(40, 30_000, generator=torch.Generator().manual_seed(4))
    signs = [module._signs(n, seed=5, dimension=d) for d, n in enumerate(wide.shape)]
    whole = torch.einsum("ij,ip,jp->p", wide.double(), *signs) / wide.numel() ** 0.5
    assert torch.allclose(project(wide, seed=5), whole, rtol=1e-9, atol=1e-9)


def test_blocks_do_not_change_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor's moments are taken block by block, the last and shorter one included."""
    whole = sketch(TENSOR, seed=5).moments
    monkeypatch.setattr(module, "_BLOCK", 1999)
    assert torch.allclose(sketch(TENSOR, seed=5).moments, whole, rtol=1e-12, atol=1e-12)


def tap(name: str, given: float, returned: float) -> Tap:
    """Return a module whose input and output are off by so much."""
    return Tap(name, sketch(TENSOR + given, seed=5), sketch(TENSOR + returned, seed=5))


def test_the_innermost_module_whose_own_input_is_right_is_named() -> None:
    """Down through its parents; the parent itself where every child does right by its input."""
    names = ["a.one", "a.two", "a", "b"]
    golden = [tap(name, 0, 0) for name in names]
    wrong_child = {t.module: t for t in [tap("a.one", 0, 0), tap("a.two", 0, 1), tap("a", 0, 1)]}
    found = localise("case", golden, {**wrong_child, "b": tap("b", 1, 1)}, {})
    assert (found.first_bad, found.own_code, found.recovers) == ("a.two", False, False)
    assert "curve: a step, which stays: a fault" in localisation_lines(found)
    own = {t.module: t for t in [tap("a.one", 0, 0), tap("a.two", 1, 1), tap("a", 0, 1)]}
    found = localise("case", golden, {**own, "b": tap("b", 0, 0)}, {})
    assert (found.first_bad, found.own_code, found.recovers) == ("a", True, True)
    assert "curve: a spike, which heals later: an alignment problem?" in localisation_lines(found)


def test_an_error_outside_of_all_modules_is_told_from_none_at_all() -> None:
    """A module that is given something wrong is not the one at fault."""
    golden = [tap("a", 0, 0), tap("b", 0, 0)]
    given = {"a": tap("a", 0, 0), "b": tap("b", 1, 1)}
    found = localise("case", golden, given, {})
    assert (found.first_bad, found.between) == (None, True)
    same = localise("case", golden, {t.module: t for t in golden}, {})
    assert (same.first_bad, same.between) == (None, False)
