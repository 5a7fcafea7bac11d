"""Merge the reports of all shards of a check, and run one check in several processes."""

from __future__ import annotations

import itertools
import re
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
from snapshot_tool.candidates.distributed import join_ranks, run_follower


@dataclass(frozen=True, slots=True)
class ShardReport:
    """The report of one shard and its file."""

    source: str
    report: CheckReport
    shard: Shard


def _implementation(report: CheckReport) -> str:
    """Return the implementation by commit or version, or by path if it has neither."""
    info = report.candidate
    known = info.commit or info.version or info.path
    return f"{info.name} {known}" + (" (dirty)" if info.dirty else "")


# Values that must be equal in all shards, named as on the command line.
_EQUAL: Mapping[str, Callable[[ShardReport], object]] = {
    "golden set": lambda one: replace(one.report.golden, folder=""),
    "candidate": lambda one: _implementation(one.report),
    "device": lambda one: one.report.device,
    "dtype": lambda one: one.report.dtype,
    "tolerance": lambda one: one.report.rule.value,
    "--quick": lambda one: one.report.quick,
    "--allow-near-ties": lambda one: one.report.near_ties_allowed,
    "number of shards": lambda one: one.shard.count,
    "number of all cases": lambda one: one.shard.all_cases,
}


def merge_reports(reports: Sequence[tuple[str, CheckReport]]) -> CheckReport:
    """Return the report of the whole check from its shards' reports, each with its file's name.

    Raises SnapError if a shard is missing or duplicate, or if two belong to different checks.
    """
    shards = []
    for source, report in reports:
        if report.shard is None:
            raise SnapError(
                f"{source} is the report of a whole check, not of a shard",
                "merge reports of: snap check --shard K/N --json FILE",
            )
        shards.append(ShardReport(source, report, report.shard))
    shards.sort(key=lambda one: one.shard.index)
    for other in shards[1:]:
        _require_one_check(shards[0], other)
    _require_each_once(shards)
    merged = replace(
        shards[0].report,
        results=tuple(_in_golden_order(shards)),
        exploration=_exploration(shards),
        environment=_environment([one.report.environment for one in shards]),
        warnings=_union(one.report.warnings for one in shards),
        environment_differences=_union(one.report.environment_differences for one in shards),
        weights=_weights([one.report.weights for one in shards if one.report.weights]),
        shard=None,
        date=min(one.report.date for one in shards),
        seconds=round(sum(one.report.seconds for one in shards), 3),
        command=re.sub(r" --shard \S+", "", shards[0].report.command),
    )
    # Every shard has localised its own first failure; only the first failure of all counts.
    same = (one.report for one in shards if one.report.divergence == merged.divergence)
    leading = next(same, shards[0].report) if merged.divergence else shards[0].report
    unmet = _union(one.report.unmet for one in shards)
    return replace(
        merged,
        unmet=unmet_requirements(merged.all_results, merged.coverage, unmet),
        localisation=leading.localisation,
        probes=leading.probes,
        isolated=leading.isolated,
        graft=leading.graft,
        next_commands=leading.next_commands,
    )


def _require_one_check(first: ShardReport, other: ShardReport) -> None:
    options = _union((first.shard.asked, other.shard.asked))
    pairs = [
        *((what, value_of(first), value_of(other)) for what, value_of in _EQUAL.items()),
        *((name, first.shard.asked.get(name), other.shard.asked.get(name)) for name in options),
    ]
    for what, one, another in pairs:
        if one != another:
            raise SnapError(
                f"{first.source} and {other.source} belong to different checks: the {what} is "
                f"{one or 'not set'} in the first, {another or 'not set'} in the second",
                "check all shards with the same options, golden set and candidate",
            )


def _require_each_once(shards: Sequence[ShardReport]) -> None:
    for one, other in itertools.pairwise(shards):
        if one.shard.index == other.shard.index:
            raise SnapError(
                f"shard {one.shard.index}/{one.shard.count} is duplicate: "
                f"{one.source} and {other.source}",
                "leave one of them out",
            )
    count = shards[0].shard.count
    missing = sorted(set(range(1, count + 1)) - {one.shard.index for one in shards})
    if missing:
        names = ", ".join(f"{index}/{count}" for index in missing)
        raise SnapError(
            f"missing shards: {names}",
            f"run each with: snap check --shard {missing[0]}/{count} --json FILE",
        )


def _in_golden_order(shards: Sequence[ShardReport]) -> Iterator[Result]:
    """Yield the results case by case, in the order of the golden set.

    A shard without a case for a phase reports a skip. It counts only if no shard has such a case.
    """
    places = {
        name: (turn, one.shard.index) for one in shards for turn, name in enumerate(one.shard.cases)
    }
    results = [result for one in shards for result in one.report.results]
    of_cases = [result for result in results if result.case in places]
    yield from sorted(of_cases, key=lambda result: places[result.case])
    seen = {result.phase for result in of_cases}
    for result in results:
        if result.case not in places and result.phase not in seen:
            seen.add(result.phase)
            yield result


def _exploration(shards: Sequence[ShardReport]) -> Exploration | None:
    """Return all questions that the shards ran, by kind."""
    explored = [one.report.exploration for one in shards if one.report.exploration]
    if not explored:
        return None
    kinds: dict[str, list[ExploredKind]] = {}
    for kind in (kind for found in explored for kind in found.kinds):
        kinds.setdefault(kind.kind, []).append(kind)
    merged = []
    for name, same in kinds.items():
        # A kind that was not run has one skip, which counts only if no shard ran it.
        run = [kind for kind in same if kind.asked] or same[:1]
        results = tuple(result for kind in run for result in kind.results)
        merged.append(ExploredKind(name, sum(kind.asked for kind in same), results))
    return Exploration(tuple(merged), explored[0].seed)


def _weights(found: Sequence[WeightReport]) -> WeightReport | None:
    """Return the report with weights that differ, or the first, with what NaN came from in any.

    An unset weight matters only for some cases.
    """
    if not found:
        return None
    harmful = _union(one.harmful or () for one in found)
    is_unknown = not harmful and any(one.harmful is None for one in found)
    chosen = next((one for one in found if one.differing), found[0])
    return replace(chosen, harmful=None if is_unknown else harmful)


def _environment(all_of_them: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the environment of the shards, with all values of entries that differ."""
    names = _union(all_of_them)
    return {name: "; ".join(_union([e[name]] for e in all_of_them if name in e)) for name in names}


def _union(groups: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for group in groups for item in group))


def is_follower() -> bool:
    """Return whether another process is the leader of this check."""
    return (rank_here() or 0) > 0


def follow_leader(device: str) -> None:
    """Run the candidate's calls that the leader sends, until it ends."""
    require_device(device)
    with join_ranks(device) as ranks:
        run_follower(ranks, build_candidate)


@contextmanager
def leading(device: str) -> Iterator[None]:
    """Lead the other ranks inside the block, if there are any.

    If the block raises, followers are not stopped here: they may be blocked in the model, and
    torchrun ends them with this process.
    """
    if rank_here() is None:
        yield
        return
    require_device(device)
    with join_ranks(device) as ranks:
        yield
        ranks.send(None)
