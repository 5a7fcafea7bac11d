"""Pairing modules without names: shapes and order allow, values confirm."""

from __future__ import annotations

import pytest
import torch

from snapshot_tool.diagnose.align import Pair, pair_modules
from snapshot_tool.diagnose.localise import fused_widths, infer
from snapshot_tool.taps.sketches import Sketch, Tap, sketch


def values(seed: int, *shape: int) -> torch.Tensor:
    """Return random numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(tensor: torch.Tensor | None) -> Sketch | None:
    """Return the sketch of a tensor."""
    return None if tensor is None else sketch(tensor, seed=5)


def chain(names: list[str], *, seed: int = 0, start: int = 0) -> list[Tap]:
    """Return modules that each take what the one before returned, all of one shape."""
    flow = [of(values(seed + place, 2, 6, 8)) for place in range(start, start + len(names) + 1)]
    return [Tap(name, flow[i], flow[i + 1]) for i, name in enumerate(names)]


def names_of(pairs: list[Pair]) -> dict[str, str]:
    """Return the partners' names."""
    return {pair.golden.module: pair.other.module for pair in pairs}


def test_equal_runs_pair_in_order_and_are_confirmed() -> None:
    """Whatever the names; and runs without modules have no pairs."""
    pairs = pair_modules(chain(["a", "b", "c"]), chain(["x", "y", "z"]))
    assert names_of(pairs) == {"a": "x", "b": "y", "c": "z"}
    assert all(pair.same and pair.confirmed for pair in pairs)
    for golden, other in (([], chain(["x"])), (chain(["a"]), []), ([], [])):
        assert pair_modules(golden, other) == []


def test_a_module_that_only_one_side_has_is_left_alone() -> None:
    """On either side, though it has the shape of its neighbours."""
    golden, other = chain(["a", "b", "c"]), chain(["x", "y", "z"])
    extra = Tap("extra", of(values(90, 2, 6, 8)), of(values(91, 2, 6, 8)))
    expected = {"a": "x", "b": "y", "c": "z"}
    assert names_of(pair_modules(golden, [*other[:1], extra, *other[1:]])) == expected
    assert names_of(pair_modules([*golden[:1], extra, *golden[1:]], other)) == expected


def test_other_shapes_never_pair() -> None:
    """Neither does a module that is given ids with one that is given embeddings."""
    ids = Tap("ids", of(values(1, 2, 6)), of(values(2, 2, 6, 8)))
    embeddings = Tap("embeddings", of(values(1, 2, 6, 8)), of(values(2, 2, 6, 8)))
    narrow = Tap("narrow", of(values(1, 2, 6, 8)), of(values(2, 2, 6, 4)))
    assert pair_modules([ids], [embeddings]) == []
    assert pair_modules([embeddings], [narrow]) == []


@pytest.mark.parametrize("after", [["y", "z", "w"], ["y", "extra", "z", "w"]])
def test_a_faulty_module_is_paired_by_its_position_and_input(after: list[str]) -> None:
    """Nothing after it agrees, and another module of its shape may stand closer to the next."""
    golden = chain(["a", "b", "c", "d"])
    x, y, *others = [*chain(["x"]), *chain(after, seed=50)]
    pairs = pair_modules(golden, [x, Tap("y", golden[1].input, y.output), *others])
    assert names_of(pairs) == {"a": "x", "b": "y", "c": "z", "d": "w"}
    assert [pair.confirmed for pair in pairs] == [True, False, False, False]


def test_two_modules_of_one_shape_between_pairs_that_agree_are_no_pair() -> None:
    """An error would reach the next module."""
    golden, other = chain(["a", "b"]), chain(["x", "y"])
    one, two = (Tap(n, of(values(s, 2, 6, 8)), of(values(s + 1, 2, 6, 8)))
                for n, s in (("one", 70), ("two", 80)))  # fmt: skip
    pairs = pair_modules([golden[0], one, golden[1]], [other[0], two, other[1]])
    assert names_of(pairs) == {"a": "x", "b": "y"}


def test_an_error_that_does_not_reach_the_parent_is_none() -> None:
    """Two modules that are given the same and return something else, in parents that agree."""
    given, result = of(values(1, 2, 6, 8)), of(values(2, 2, 6, 8))
    golden = [Tap("p.a", given, of(values(3, 2, 6, 8))), Tap("p", given, result)]
    other = [Tap("r.x", given, of(values(4, 2, 6, 8))), Tap("r", given, result)]
    assert names_of(pair_modules(golden, other)) == {"p": "r"}
    wrong = Tap("r", given, of(values(5, 2, 6, 8)))
    assert names_of(pair_modules(golden, [other[0], wrong])) == {"p.a": "r.x", "p": "r"}


def test_what_runs_in_another_order_is_paired_by_its_values() -> None:
    """As gate, up and activation do, where a fused projection comes before the activation."""
    given = of(values(1, 2, 6, 8))
    outputs = [of(values(seed, 2, 6, 8)) for seed in (2, 3, 4)]
    golden = [Tap(name, given, out) for name, out in zip("abc", outputs, strict=True)]
    other = [golden[0], golden[2], golden[1]]
    assert names_of(pair_modules(golden, other)) == {"a": "a", "b": "b", "c": "c"}


def test_the_same_values_in_another_order_are_confirmed_and_not_compared() -> None:
    """They are no error of the module; values that differ are."""
    tensor = values(3, 2, 6, 8)
    given = of(values(1, 2, 6, 8))
    golden = [Tap("a", given, of(tensor))]
    turned = infer(golden, [Tap("x", given, of(tensor.flip(-1)))])
    assert (turned.mapping.confirmed, turned.taps["a"].output) == (1, None)
    wrong = infer(golden, [Tap("x", given, of(tensor.flip(-1) * 1.01))])
    assert wrong.mapping.confirmed == 0
    assert wrong.taps["a"].output is not None


def test_modules_that_are_given_the_same_may_be_fused() -> None:
    """Only those side by side; by the sum of their widths."""
    given = of(values(1, 2, 6, 8))
    golden = [
        Tap("layer.q", given, of(values(2, 2, 6, 8))),
        Tap("layer.k", given, of(values(3, 2, 6, 4))),
        Tap("layer.v", given, of(values(4, 2, 6, 4))),
        Tap("other.q", given, of(values(5, 2, 6, 3))),
        Tap("layer.o", of(values(6, 2, 6, 8)), of(values(7, 2, 6, 8))),
    ]
    assert fused_widths(golden) == {16: [(8, 4, 4)]}
