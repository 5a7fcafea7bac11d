"""How far a module may be off: so many times what rounding does to it."""

from __future__ import annotations

import pytest
import torch

from snapshot_tool.base.localisation import ERROR_LIMIT, NO_NOISE, noise_limit
from snapshot_tool.base.taps import Tap, sketch
from snapshot_tool.diagnose.localise import localise

EPS = torch.finfo(torch.float32).eps


def test_a_limit_is_a_multiple_of_the_noise_with_a_floor() -> None:
    """Without a sketch the limit is the one for sets without an oracle."""
    assert noise_limit(1e-6, eps=EPS) == pytest.approx(8e-6)
    assert noise_limit(0.0, eps=EPS) == pytest.approx(2 * EPS)
    assert noise_limit(NO_NOISE, eps=EPS) == ERROR_LIMIT


def tap(module: str, scale: float) -> Tap:
    """Return a tap whose output is off by a factor."""
    values = torch.randn(8, 32, generator=torch.Generator().manual_seed(len(module)))
    return Tap(module, sketch(values, seed=1), sketch(values * scale, seed=1))


def test_an_error_below_the_common_limit_is_named_by_the_modules_own() -> None:
    """And an error that rounding explains is not."""
    golden = [tap("first", 1.0), tap("second", 1.0)]
    candidate = {"first": tap("first", 1 + 1e-6), "second": tap("second", 1 + 1e-5)}
    names = {name: name for name in candidate}
    assert localise("case", golden, candidate, names).first_bad is None
    limits = dict.fromkeys(candidate, (4e-6, 4e-6))
    found = localise("case", golden, candidate, names, limits=limits)
    assert found.first_bad == "second"
