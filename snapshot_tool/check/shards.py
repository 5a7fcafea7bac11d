"""Making one report of the checks of all shares, as if one process had checked every case."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from snapshot_tool.base.environment import rank_here, require_device
from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.report import (
    CheckReport,
    Exploration,
    ExploredKind,
    Shard,
    WeightReport,
    unmet_requirements,
)
from snapshot_tool.base.results import Result
from snapshot_tool.candidates import build_candidate
from snapshot_tool.candidates.distributed import join_ranks


@dataclass(frozen=True, slots=True)
class ShardReport:
    """The report of one share, and the file that it was read from."""

    source: str
    report: CheckReport
    shard: Shard


def _identity(report: CheckReport) -> str:
    """Return which implementation ran; where it lies counts where nothing else tells."""
    info = report.candidate
    known = info.commit or info.version or info.path
    return f"{info.name} {known}" + (" (dirty)" if info.dirty else "")


# What must be the same in all shares, as people call it.
_SAME: Mapping[str, Callable[[CheckReport], object]] = {
    "golden set": lambda report: replace(report.golden, folder=""),
    "candidate": _identity,
    "device": lambda report: report.device,
    "dtype": lambda report: report.dtype,
    "tolerance": lambda report: report.rule.value,
    "--quick": lambda report: report.quick,
    "--allow-near-ties": lambda report: report.near_ties_allowed,
}


def merge_reports(reports: Sequence[tuple[str, CheckReport]]) -> CheckReport:
    """Return the report of the whole check, given those of its shares, each with its file's name.

    Raises SnapError where a share is missing or there twice, or where two are not of one check.
    """
    shards = sorted(_shards(reports), key=lambda one: one.shard.index)
    for other in shards[1:]:
        _require_one_check(shards[0], other)
    _require_each_once(shards)
    results = tuple(_in_golden_order(shards))
    exploration = _exploration(shards)
    merged = replace(
        shards[0].report,
        results=results,
        exploration=exploration,
        environment=_environment([one.report.environment for one in shards]),
        warnings=_union(one.report.warnings for one in shards),
        environment_differences=_union(one.report.environment_differences for one in shards),
        weights=_weights(shards),
        unmet=(),
        shard=None,
    )
    # A shard has looked into its own first failure: the first of all is the one that counts.
    first = next((s.report for s in shards if s.report.divergence == merged.divergence), None)
    leading = first if first and merged.divergence else shards[0].report
    unmet = dict.fromkeys(name for one in shards for name in one.report.unmet)
    return replace(
        merged,
        unmet=unmet_requirements(merged.all_results, merged.coverage, unmet),
        localisation=leading.localisation,
        graft=leading.graft,
    )


def _weights(shards: Sequence[ShardReport]) -> WeightReport | None:
    """Return the first comparison of weights that found one to differ, or the first of all."""
    found = [one.report.weights for one in shards if one.report.weights]
    return next((weights for weights in found if weights.differing), found[0] if found else None)


def _shards(reports: Sequence[tuple[str, CheckReport]]) -> Iterator[ShardReport]:
    for source, report in reports:
        if report.shard is None:
            raise SnapError(
                f"{source} is the report of no shard, but of a whole check",
                "merge reports of: snap check --shard K/N --json FILE",
            )
        yield ShardReport(source, report, report.shard)


def _require_one_check(first: ShardReport, other: ShardReport) -> None:
    def require_same(what: str, one: object, another: object) -> None:
        if one != another:
            raise SnapError(
                f"{first.source} and {other.source} are not of one check: the {what} is "
                f"{one or 'not given'} in the first, {another or 'not given'} in the second",
                "check all shares with the same options, golden set and candidate",
            )

    for what, value_of in _SAME.items():
        require_same(what, value_of(first.report), value_of(other.report))
    require_same("number of shards", first.shard.count, other.shard.count)
    require_same("number of all cases", first.shard.all_cases, other.shard.all_cases)
    for option in _union((first.shard.asked, other.shard.asked)):
        require_same(option, first.shard.asked.get(option), other.shard.asked.get(option))


def _require_each_once(shards: Sequence[ShardReport]) -> None:
    for one, other in itertools.pairwise(shards):
        if one.shard.index == other.shard.index:
            raise SnapError(
                f"shard {one.shard.index}/{one.shard.count} is there twice: "
                f"{one.source} and {other.source}",
                "leave one of them out",
            )
    count = shards[0].shard.count
    missing = sorted(set(range(1, count + 1)) - {one.shard.index for one in shards})
    if missing:
        names = ", ".join(f"{index}/{count}" for index in missing)
        raise SnapError(
            f"missing of {count} shards: {names}",
            f"make each with: snap check --shard {missing[0]}/{count} --json FILE",
        )


def _in_golden_order(shards: Sequence[ShardReport]) -> Iterator[Result]:
    """Yield the results case by case, as they were dealt out.

    What a shard says of a phase that none of its cases has counts where no other one has it.
    """
    places = {
        name: (turn, one.shard.index) for one in shards for turn, name in enumerate(one.shard.cases)
    }
    results = [result for one in shards for result in one.report.results]
    of_cases = [result for result in results if result.case in places]
    yield from sorted(of_cases, key=lambda result: places[result.case])
    told = {result.phase for result in of_cases}
    for result in results:
        if result.case not in places and result.phase not in told:
            told.add(result.phase)
            yield result


def _exploration(shards: Sequence[ShardReport]) -> Exploration | None:
    """Return all questions that the shards asked, by kind."""
    explored = [one.report.exploration for one in shards if one.report.exploration]
    if not explored:
        return None
    kinds: dict[str, list[ExploredKind]] = {}
    for kind in (kind for found in explored for kind in found.kinds):
        kinds.setdefault(kind.kind, []).append(kind)
    merged = tuple(_kind(name, same) for name, same in kinds.items())
    return Exploration(merged, explored[0].seed)


def _kind(name: str, same: Sequence[ExploredKind]) -> ExploredKind:
    asked = [kind for kind in same if kind.asked] or same[:1]
    results = tuple(result for kind in asked for result in kind.results)
    return ExploredKind(name, sum(kind.asked for kind in same), results)


def _environment(all_of_them: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return what the shards ran on; where they differ, every value that there was."""
    names = _union(all_of_them)
    return {name: "; ".join(_union([e[name]] for e in all_of_them if name in e)) for name in names}


def _union(groups: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for group in groups for item in group))


def is_follower() -> bool:
    """Tell whether another process leads this check."""
    return (rank_here() or 0) > 0


def follow_leader(device: str) -> None:
    """Make the candidate's calls that the leader makes, until it has no more."""
    from snapshot_tool.candidates.distributed import follow

    require_device(device)
    with join_ranks(device) as ranks:
        follow(ranks, build_candidate)


@contextmanager
def leading(device: str) -> Iterator[None]:
    """Lead the other ranks inside the block; do nothing where there are none.

    Where the block raises, followers are not dismissed: they may be stuck in the model, and
    torchrun ends them with this process.
    """
    if rank_here() is None:
        yield
        return
    from snapshot_tool.candidates.distributed import dismiss

    require_device(device)
    with join_ranks(device) as ranks:
        yield
        dismiss(ranks)
