"""Match the modules of two runs without names: by shapes and order, confirmed by values.

Both runs are sequences of modules in the order in which they finished. An alignment of the two
(Needleman and Wunsch's dynamic programme) pairs only modules of equal output shape, in order, and
prefers those with the same values. A faulty module is therefore paired by its position between
neighbours that agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from snapshot_tool.base.localisation import ERROR_LIMIT
from snapshot_tool.taps.sketches import Sketch, Tap

# The score of a pair: any pair is better than none, then values count, then the kind.
_SHAPE, _KIND, _INPUT, _REORDERED, _OUTPUT = 1.0, 0.5, 2.0, 2.0, 4.0
_IDS = 2  # dimensions of ids, (batch, length)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two modules that are matched.

    Args:
        same: whether the outputs have the same sketch.
        reordered: whether they have only the same moments: the same values in another order.
        same_input: whether the inputs have the same sketch.
    """

    golden: Tap
    other: Tap
    same: bool
    reordered: bool
    same_input: bool

    @property
    def confirmed(self) -> bool:
        """Whether values confirm the pair, in addition to its position."""
        return self.same or self.reordered


def pair_modules(golden: Sequence[Tap], other: Sequence[Tap]) -> list[Pair]:
    """Return the pairs of two runs' modules, in the order of `golden`; a module has at most one."""
    evidence = _Evidence(golden, other)
    partners = dict(_align(evidence.scores()))
    _pair_leftovers(partners, evidence)
    return _plausible([evidence.pair(i, partners[i]) for i in sorted(partners)])


def enclosing(module: str, modules: Collection[str]) -> str:
    """Return the nearest of some modules that contains a module, or ""."""
    while "." in module:
        module = module.rpartition(".")[0]
        if module in modules:
            return module
    return ""


class _Evidence:
    """Boolean matrices (golden modules, other modules) about each possible pair."""

    def __init__(self, golden: Sequence[Tap], other: Sequence[Tap]) -> None:
        self.golden, self.other = golden, other
        self.fits, self.same, self.reordered = _compare(
            [tap.output for tap in golden], [tap.output for tap in other]
        )
        _, self.same_input, _ = _compare(
            [tap.input for tap in golden], [tap.input for tap in other]
        )
        # A module whose input is ids does not match one whose input is embeddings. An input without
        # a sketch, of rank 0 here, may be ids.
        mine, theirs = _input_ranks(golden)[:, None], _input_ranks(other)[None]
        ids = (mine <= _IDS) & (theirs <= _IDS) & ((mine == 0) | (theirs == 0))
        self.fits &= (mine == theirs) | ids
        self.same_kind = _leaves(golden)[:, None] == _leaves(other)[None]

    def scores(self) -> torch.Tensor:
        """Return the score of each pair; minus infinity if the shapes differ."""
        found = torch.full(self.fits.shape, _SHAPE, dtype=torch.float64)
        found += _KIND * self.same_kind + _INPUT * self.same_input
        found += torch.where(self.same, _OUTPUT, _REORDERED * self.reordered)
        return found.masked_fill(~self.fits, -torch.inf)

    def pair(self, i: int, j: int) -> Pair:
        """Return the pair of the golden module `i` and the other module `j`."""
        same = bool(self.same[i, j])
        reordered = bool(self.reordered[i, j]) and not same
        return Pair(self.golden[i], self.other[j], same, reordered, bool(self.same_input[i, j]))


def _compare(
    golden: Sequence[Sketch | None], other: Sequence[Sketch | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return for each two sketches whether shapes, values and moments are the same."""
    fits, same, moments = torch.zeros((3, len(golden), len(other)), dtype=torch.bool)
    columns = _by_shape(other)
    for shape, mine in _by_shape(golden).items():
        theirs = columns.get(shape)
        if not theirs:
            continue
        cells = torch.tensor(list(mine))[:, None], torch.tensor(list(theirs))[None]
        one, two = list(mine.values()), list(theirs.values())
        limit = ERROR_LIMIT * _stack(one, "moments")[:, 1:2]  # relative to the golden's rms
        fits[cells] = True
        same[cells] = (_distances(one, two, "sample") <= limit) & (
            _distances(one, two, "projection") <= limit
        )
        gaps = _stack(one, "moments")[:, None] - _stack(two, "moments")[None]
        moments[cells] = gaps.abs().amax(-1) <= limit
    return fits, same, moments


def _by_shape(sketches: Sequence[Sketch | None]) -> dict[tuple[int, ...], dict[int, Sketch]]:
    """Return the sketches of each shape, by their index."""
    found: dict[tuple[int, ...], dict[int, Sketch]] = {}
    for index, sketch in enumerate(sketches):
        if sketch is not None:
            found.setdefault(sketch.shape, {})[index] = sketch
    return found


def _stack(sketches: Sequence[Sketch], part: str) -> torch.Tensor:
    return torch.stack([getattr(sketch, part) for sketch in sketches]).to(torch.float64)


def _distances(one: Sequence[Sketch], other: Sequence[Sketch], part: str) -> torch.Tensor:
    """Return the root mean square difference of a part of each two sketches."""
    left, right = _stack(one, part), _stack(other, part)
    # Matrix products would round away the small differences that matter here.
    distance = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    scaled: torch.Tensor = distance / left.shape[1] ** 0.5
    return scaled


def _input_ranks(taps: Sequence[Tap]) -> torch.Tensor:
    """Return the number of dimensions of each input, 0 without a sketch."""
    return torch.tensor([len(tap.input.shape) if tap.input else 0 for tap in taps])


def _leaves(taps: Sequence[Tap]) -> torch.Tensor:
    """Return which modules contain no other module of the run."""
    names = {tap.module for tap in taps}
    parents = {enclosing(name, names) for name in names}
    return torch.tensor([tap.module not in parents for tap in taps], dtype=torch.bool)


def _align(scores: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Yield the pairs of indices, in order on both sides, whose sum of scores is greatest."""
    rows, columns = scores.shape
    best = torch.zeros((rows + 1, columns + 1), dtype=torch.float64)
    for i in range(rows):
        taken = torch.maximum(best[i, 1:], best[i, :-1] + scores[i])
        best[i + 1, 1:] = taken.cummax(0).values if columns else taken
    table, score = best.tolist(), scores.tolist()
    i, j = rows, columns
    while i and j:
        if table[i][j] == table[i - 1][j - 1] + score[i - 1][j - 1]:
            i, j = i - 1, j - 1
            yield i, j
        elif table[i][j] == table[i - 1][j]:
            i -= 1
        else:
            j -= 1


def _pair_leftovers(partners: dict[int, int], evidence: _Evidence) -> None:
    """Pair modules that run in another order: by values, or as the only one left in the parent."""
    free = sorted(set(range(len(evidence.other))) - set(partners.values()))
    for i in sorted(set(range(len(evidence.golden))) - set(partners)):
        fitting = [j for j in free if evidence.fits[i, j]]
        chosen = [j for j in fitting if evidence.same[i, j] and evidence.same_input[i, j]]
        if not chosen:
            inside = [j for j in fitting if _have_paired_parents(i, j, partners, evidence)]
            chosen = inside if len(inside) == 1 else []
        if chosen:
            partners[i] = chosen[0]
            free.remove(chosen[0])


def _have_paired_parents(i: int, j: int, partners: Mapping[int, int], evidence: _Evidence) -> bool:
    """Return whether the nearest paired modules around the two are paired with each other."""
    names = {evidence.golden[a].module: evidence.other[b].module for a, b in partners.items()}
    mine = enclosing(evidence.golden[i].module, names)
    theirs = enclosing(evidence.other[j].module, set(names.values()))
    return bool(evidence.same_kind[i, j]) and mine != "" and names[mine] == theirs


def _plausible(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs without those that have only the same shape.

    The outputs of those differ, but no error follows: an error of a module would reach the module
    around it, and an error in its input would reach the next module.
    """
    confirmed = {pair.golden.module: pair.confirmed for pair in pairs}
    agree = [True, *confirmed.values(), False]
    kept = []
    for k, pair in enumerate(pairs):
        around = enclosing(pair.golden.module, confirmed)
        inside_agreement = around != "" and confirmed[around]
        both_inputs = pair.golden.input is not None and pair.other.input is not None
        other_input = both_inputs and not pair.same_input
        between_agreement = agree[k] and agree[k + 2]
        if pair.confirmed or not (inside_agreement or (other_input and between_agreement)):
            kept.append(pair)
    return kept
