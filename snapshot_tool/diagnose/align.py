"""Matching the modules of two runs without names: by shapes and order, confirmed by values.

Both runs are sequences of modules in the order in which they finished. An alignment of the two
(Needleman and Wunsch's dynamic programme) pairs modules of equal output shape alone, in order, and
prefers those that computed the same, so a faulty module is paired by its place between neighbours
that agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshot_tool.base.localisation import ERROR_LIMIT
from snapshot_tool.base.sketch import Sketch
from snapshot_tool.base.tap import Tap

if TYPE_CHECKING:
    import torch

# What speaks for a pair. Any pair beats none; values decide between places, the kind breaks ties.
_SHAPE, _KIND, _INPUT, _REORDERED, _OUTPUT = 1.0, 0.5, 2.0, 2.0, 4.0


_IDS = 2  # dimensions of ids, (batch, length)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two modules that are taken for one another.

    Args:
        golden: the reference's module.
        other: the candidate's.
        same: the output has the same sketch.
        reordered: it has not, but the same moments: the same values in another order.
        same_input: the input has the same sketch.
    """

    golden: Tap
    other: Tap
    same: bool
    reordered: bool
    same_input: bool

    @property
    def confirmed(self) -> bool:
        """Whether values speak for it, not only its place."""
        return self.same or self.reordered


def pair_modules(golden: Sequence[Tap], other: Sequence[Tap]) -> list[Pair]:
    """Return the pairs of two runs' modules, in the order of `golden`; each is in one at most."""
    evidence = _Evidence(golden, other)
    places = dict(_align(evidence.scores()))
    _pair_leftovers(places, evidence)
    pairs = [evidence.pair(i, places[i]) for i in sorted(places)]
    return _plausible(pairs)


class _Evidence:
    """What speaks for each possible pair, as matrices (golden modules, other modules)."""

    def __init__(self, golden: Sequence[Tap], other: Sequence[Tap]) -> None:
        self.golden, self.other = golden, other
        outputs = [tap.output for tap in golden], [tap.output for tap in other]
        inputs = [tap.input for tap in golden], [tap.input for tap in other]
        self.fits, self.same, self.reordered = _compare(*outputs)
        _, self.same_input, _ = _compare(*inputs)
        # Ids here and embeddings there: one of the two does more than the other. What was not
        # sketched may be ids.
        wanted, given = _ranks(inputs[0])[:, None], _ranks(inputs[1])[None]
        ids = (wanted <= _IDS) & (given <= _IDS)
        self.fits &= (wanted == given) | ids & ((wanted == 0) | (given == 0))
        self.same_kind = _leaves(golden)[:, None] == _leaves(other)[None]

    def scores(self) -> torch.Tensor:
        """Return what each pair is worth; minus infinity where shapes differ."""
        import torch

        found = torch.full(self.fits.shape, _SHAPE, dtype=torch.float64)
        found += _KIND * self.same_kind + _INPUT * self.same_input
        found += torch.where(self.same, _OUTPUT, _REORDERED * self.reordered)
        return found.masked_fill(~self.fits, -torch.inf)

    def pair(self, i: int, j: int) -> Pair:
        """Return the pair of two places."""
        same = bool(self.same[i, j])
        reordered = bool(self.reordered[i, j]) and not same
        return Pair(self.golden[i], self.other[j], same, reordered, bool(self.same_input[i, j]))


def _compare(
    golden: Sequence[Sketch | None], other: Sequence[Sketch | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, for each two sketches, whether shapes, values, and moments are the same."""
    import torch

    fits, same, moments = torch.zeros((3, len(golden), len(other)), dtype=torch.bool)
    rows, columns = _by_shape(golden), _by_shape(other)
    for shape, left in rows.items():
        right = columns.get(shape, [])
        if not right:
            continue
        place = torch.tensor(left)[:, None], torch.tensor(right)[None]
        one, two = ([s for s in (side[k] for k in at) if s] for side, at in
                    ((golden, left), (other, right)))  # fmt: skip
        limit = ERROR_LIMIT * _stack(one, "moments")[:, 1:2]
        fits[place] = True
        same[place] = (_apart(one, two, "sample") <= limit) & (
            _apart(one, two, "projection") <= limit
        )
        gaps = _stack(one, "moments")[:, None] - _stack(two, "moments")[None]
        moments[place] = gaps.abs().amax(-1) <= limit
    return fits, same, moments


def _by_shape(sketches: Sequence[Sketch | None]) -> dict[tuple[int, ...], list[int]]:
    places: dict[tuple[int, ...], list[int]] = {}
    for place, sketch in enumerate(sketches):
        if sketch is not None:
            places.setdefault(sketch.shape, []).append(place)
    return places


def _stack(sketches: Sequence[Sketch], part: str) -> torch.Tensor:
    import torch

    return torch.stack([getattr(sketch, part) for sketch in sketches]).to(torch.float64)


def _apart(one: Sequence[Sketch], other: Sequence[Sketch], part: str) -> torch.Tensor:
    """Return the root mean square difference of a part of each two sketches."""
    import torch

    left, right = _stack(one, part), _stack(other, part)
    # Without matrix products: they lose the small differences that count here.
    distance = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    scaled: torch.Tensor = distance / left.shape[1] ** 0.5
    return scaled


def _ranks(sketches: Sequence[Sketch | None]) -> torch.Tensor:
    """Return the number of dimensions of each, 0 where there is nothing."""
    import torch

    return torch.tensor([len(sketch.shape) if sketch else 0 for sketch in sketches])


def _leaves(taps: Sequence[Tap]) -> torch.Tensor:
    """Return which modules have no other one of the run inside."""
    import torch

    parents = {name for tap in taps for name in _ancestors(tap.module)}
    return torch.tensor([tap.module not in parents for tap in taps], dtype=torch.bool)


def _ancestors(module: str) -> list[str]:
    """Return the names of the modules that a module lies in, the nearest first."""
    names = []
    while "." in module:
        module = module.rpartition(".")[0]
        names.append(module)
    return names


def _align(scores: torch.Tensor) -> list[tuple[int, int]]:
    """Return the pairs of places, in order on both sides, whose sum of scores is greatest."""
    import torch

    rows, columns = scores.shape
    best = torch.zeros((rows + 1, columns + 1), dtype=torch.float64)
    for i in range(rows):
        taken = torch.maximum(best[i, 1:], best[i, :-1] + scores[i])
        best[i + 1, 1:] = taken.cummax(0).values if columns else taken
    table, worth = best.tolist(), scores.tolist()
    pairs, i, j = [], rows, columns
    while i and j:
        if table[i][j] == table[i - 1][j - 1] + worth[i - 1][j - 1]:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif table[i][j] == table[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return pairs


def _pair_leftovers(places: dict[int, int], evidence: _Evidence) -> None:
    """Pair what runs in another order: by its values, or as the only one left in its parent."""
    free = sorted(set(range(len(evidence.other))) - set(places.values()))
    for i in sorted(set(range(len(evidence.golden))) - set(places)):
        fitting = [j for j in free if evidence.fits[i, j]]
        agreeing = [j for j in fitting if evidence.same[i, j] and evidence.same_input[i, j]]
        inside = [j for j in fitting if _same_parent(i, j, places, evidence)]
        alone = inside if len(inside) == 1 else []
        if chosen := (agreeing or alone)[:1]:
            places[i] = chosen[0]
            free.remove(chosen[0])


def _same_parent(i: int, j: int, places: Mapping[int, int], evidence: _Evidence) -> bool:
    """Tell whether the nearest paired modules that the two lie in are partners."""
    partners = {evidence.golden[a].module: evidence.other[b].module for a, b in places.items()}
    taken = set(partners.values())
    mine = next((n for n in _ancestors(evidence.golden[i].module) if n in partners), None)
    other = next((n for n in _ancestors(evidence.other[j].module) if n in taken), None)
    kind = bool(evidence.same_kind[i, j])
    return kind and mine is not None and other is not None and partners[mine] == other


def _plausible(pairs: Sequence[Pair]) -> list[Pair]:
    """Drop pairs that merely have one shape: their outputs differ, and no error is to be seen.

    An error of a module reaches the one that it lies in. One that was not there before, in what the
    module is given, reaches what comes next.
    """
    agree = [True, *(pair.confirmed for pair in pairs), False]
    confirmed = {pair.golden.module: pair.confirmed for pair in pairs}
    return [
        pair
        for k, pair in enumerate(pairs)
        if pair.confirmed
        or not (_is_inside_agreement(pair, confirmed) or _is_alien(pair, agree[k : k + 3 : 2]))
    ]


def _is_inside_agreement(pair: Pair, confirmed: Mapping[str, bool]) -> bool:
    """Tell whether the nearest paired module that it lies in agrees."""
    around = next((n for n in _ancestors(pair.golden.module) if n in confirmed), None)
    return around is not None and confirmed[around]


def _is_alien(pair: Pair, neighbours: Sequence[bool]) -> bool:
    """Tell whether it is given something else, too, between neighbours that agree."""
    known = pair.golden.input is not None and pair.other.input is not None
    return known and not pair.same_input and all(neighbours)
