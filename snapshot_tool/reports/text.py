"""A check as lines of text, at most 80 columns but for long reasons."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from snapshot_tool.base.localisation import Localisation, ModuleErrors
from snapshot_tool.base.phases import PHASES, Phase, phase_order
from snapshot_tool.base.protocol import CandidateInfo, Loading
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict, tolerance_used
from snapshot_tool.base.tolerance import OracleComparison, Rule
from snapshot_tool.goldens.manifest import ManifestHead

_SHOWN = 3


def remarks(manifest: ManifestHead) -> list[str]:
    """Return a line for each thing, in the order of their weight."""
    lines = [
        f"case {case.name} has NaN or Inf in: {', '.join(case.not_finite)}"
        for case in manifest.cases
        if case.not_finite
    ]
    lines += manifest.reference_warnings
    unused = manifest.checkpoint.unused_weights
    if unused:
        lines.append(
            f"{len(unused)} weights of the checkpoint take part in no answer: {_few(unused)}"
        )
    return lines


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")


_OWN_LOADING = 'loading       by FMS itself: get_model("hf_pretrained")'
_SHOWN_PROBLEMS = 12
_SHOWN_WEIGHTS = 4
_MODULES_AROUND = 3
_SHOWN_NAMES = 6
_SEVERITY = (Verdict.ERROR, Verdict.FAIL, Verdict.SKIP, Verdict.PASS)


def header_lines(report: CheckReport, *, base: str) -> list[str]:
    """Say what was checked against what, where; paths below the folder `base` are shortened."""
    golden, device = report.golden, report.device
    quick = "generate      verified in one pass, without the cache (--quick)"
    other = "" if golden.device == device else f" - golden recorded on {golden.device}"
    return [
        f"golden        {golden}",
        f"candidate     {candidate_text(report.candidate, base=base)}",
        *(f"note          {note}" for note in report.candidate.notes),
        *([_OWN_LOADING] if report.candidate.loading is Loading.OWN else []),
        *(f"loading       {field}" for field in report.candidate.mapping if field.harmless),
        f"device        {device} ({report.environment.get('device', '')}), {report.dtype}{other}",
        f"transformers  {report.transformers}",
        *([f"shard         {report.shard}"] if report.shard else []),
        *([quick] if report.quick else []),
        *([f"weights       {report.weights}"] if report.weights else []),
        *([f"weights       {unset}"] if (unset := _unset(report)) else []),
        *(f"recorded on   {difference}" for difference in report.surroundings),
        *(f"not covered   {one.text}" for one in report.coverage if not one.reached),
        *(f"warning       {warning}" for warning in report.warnings),
    ]


def candidate_text(info: CandidateInfo, *, base: str) -> str:
    """Say which implementation it is; a path below the folder `base` is shortened."""
    parts = [info.name, info.path, f"version {info.version}" if info.version else ""]
    if info.commit:
        parts.append(f"commit {info.commit[:12]} ({'dirty' if info.dirty else 'clean'})")
    return " ".join(part for part in parts if part).replace(f"{base}/", "")


@dataclass(frozen=True, slots=True)
class Cell:
    """What became of one phase of one case; nothing, where the case has no such phase."""

    phase: Phase
    text: str
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Row:
    """One case of the grid: a cell for each phase, and the worst of their verdicts."""

    case: str
    results: tuple[Result, ...]
    cells: tuple[Cell, ...]
    verdict: Verdict


def grid(report: CheckReport) -> list[Row]:
    """Return a row for each case: first those that did not pass, the worst of them first.

    A cell says the verdict and how much of the tolerance the worst element used. An empty cell is
    a phase that the case does not have, or that was not asked for.
    """
    cases: dict[str, list[Result]] = {}
    for result in report.results:
        cases.setdefault(result.case, []).append(result)
    rows = [
        Row(case, tuple(results), tuple(_cells(results)), worst_verdict(results))
        for case, results in cases.items()
    ]
    return sorted(rows, key=_badness)


def _badness(row: Row) -> tuple[int, float]:
    """Order rows by verdict and excess; what did not fail stays in the order of the run."""
    if row.verdict in (Verdict.PASS, Verdict.SKIP):
        return len(_SEVERITY), 0.0
    used = (tolerance_used(result) for result in row.results)
    return _SEVERITY.index(row.verdict), -max((u for u in used if u is not None), default=0.0)


def worst_verdict(results: Iterable[Result]) -> Verdict:
    """Return the most serious verdict of some results, at least one."""
    return min((result.verdict for result in results), key=_SEVERITY.index)


def _cells(results: list[Result]) -> Iterator[Cell]:
    for phase in PHASES:
        found = [result for result in results if result.phase is phase]
        yield Cell(phase, *outcome(found))


LEGEND = "0.5x: half of what is allowed was used; equal: no difference"


def outcome(results: Sequence[Result]) -> tuple[str, Verdict | None]:
    """Return what became of some results, how much of the tolerance they used, and a verdict."""
    if not results:
        return "", None
    verdict = worst_verdict(results)
    ratios = [used for result in results if (used := tolerance_used(result)) is not None]
    return f"{verdict.value} {_ratio_text(ratios, verdict)}".rstrip(), verdict


def _ratio_text(ratios: Sequence[float], verdict: Verdict) -> str:
    """Say how much of the tolerance was used at most; nothing if that says nothing."""
    if not ratios or verdict not in (Verdict.PASS, Verdict.FAIL):
        return ""
    if any(map(math.isnan, ratios)):
        return "NaN"
    if max(ratios) == 0:
        return "equal" if verdict is Verdict.PASS else ""
    return f"{max(ratios):.2g}x" if math.isfinite(max(ratios)) else "Inf"


def exploration_lines(report: CheckReport, *, replay: str) -> list[tuple[str, Verdict | None]]:
    """Say how many derived questions were asked, by kind, and how a smallest failure is replayed.

    replay: the command to which `--replay QUESTION` is added. Lines have a verdict, for colour.
    """
    found = report.exploration
    if found is None:
        return []
    drawn = "" if found.seed is None else f", drawn from seed {found.seed}"
    lines: list[tuple[str, Verdict | None]] = [(f"derived questions{drawn}", None)]
    for kind in found.kinds:
        text, verdict = outcome(kind.results)
        lines.append((f"  {kind.kind:<18}{kind.asked:>6} asked  {text}", verdict))
        if kind.failure and found.seed is not None:
            question = shlex.quote(kind.failure.tensor)
            lines.append((f"    smallest: {replay} --replay {question}", None))
    return [*lines, ("", None)]


def oracle_lines(report: CheckReport) -> list[str]:
    """Say how the candidate's errors compare with the reference's own."""
    judged = [(result, result.oracle) for result in report.results if result.oracle]
    if not judged:
        return []
    worst, figures = max(judged, key=lambda pair: pair[1].used)
    lines = [
        f"oracle: nearest to its limit is {worst.phase.value} / {worst.case} / {worst.tensor}:",
        _oracle_figures(figures),
    ]
    if report.rule is Rule.TABLE:
        lines.append(f"     --tolerance oracle {_other_verdicts(judged)}")
    return lines


def _other_verdicts(judged: Sequence[tuple[Result, OracleComparison]]) -> str:
    """Say on which tensors the oracle's verdict is not the table's."""
    failed = [figures.within for result, figures in judged if result.verdict is Verdict.FAIL]
    stricter = sum(not o.within for result, o in judged if result.verdict is Verdict.PASS)
    words = [f"would also fail {stricter} tensors"] if stricter else []
    if sum(failed):
        words.append(f"would pass {sum(failed)} of the {len(failed)} that fail")
    return " and ".join(words) or "agrees on all"


def _oracle_figures(figures: OracleComparison) -> str:
    return (
        f"     error {figures.error:.2g}, the reference's own {figures.reference_error:.2g}, "
        f"allowed {figures.limit:.2g}"
    )


def _unset(report: CheckReport) -> str:
    return report.weights.unset_text if report.weights else ""


def weight_lines(report: CheckReport) -> list[str]:
    """Describe the weights that are not the checkpoint's, the first few of them."""
    found = report.weights.differing if report.weights else ()
    more = [f"{len(found) - _SHOWN_WEIGHTS} more"] if found[_SHOWN_WEIGHTS:] else []
    return [*map(str, found[:_SHOWN_WEIGHTS]), *more]


def problem_lines(report: CheckReport) -> list[str]:
    """Describe what did not pass, weights and the earliest phases first, the first few of each."""
    problems = [r for r in report.all_results if r.verdict not in (Verdict.PASS, Verdict.SKIP)]
    problems.sort(key=_urgency)
    lines = [f"FAIL loading / {field}" for field in report.wrong_fields]
    lines += [f"FAIL weights / {line}" for line in weight_lines(report)]
    lines += [problem_text(result) for result in problems[:_SHOWN_PROBLEMS]]
    lines += _skip_lines([r for r in report.all_results if r.verdict is Verdict.SKIP])
    left = len(problems) - _SHOWN_PROBLEMS
    if left > 0:
        lines.append(f"… and {left} more: --json FILE has them all")
    return lines


def _skip_lines(skips: Sequence[Result]) -> list[str]:
    """Describe what was skipped, once for each reason and phase."""
    alike: dict[tuple[Phase, str], list[Result]] = {}
    for skip in sorted(skips, key=lambda skip: phase_order(skip.phase)):
        alike.setdefault((skip.phase, skip.reason), []).append(skip)
    return [
        problem_text(found[0]) if len(found) == 1 else f"SKIP {phase}, {len(found)} times: {reason}"
        for (phase, reason), found in alike.items()
    ]


def _urgency(result: Result) -> tuple[int, int, float]:
    serious = _SEVERITY.index(result.verdict) // 2
    return serious, phase_order(result.phase), -(tolerance_used(result) or 0.0)


def problem_text(result: Result) -> str:
    """Describe a result that is no pass, on one line or two."""
    place = " / ".join(part for part in (result.phase.value, result.case, result.tensor) if part)
    what, _, where = result.reason.partition("; worst at ")
    line = f"{result.verdict.value.upper()} {place}: {what}"
    return f"{line}\n     worst at {where}" if where else line


def localisation_lines(found: Localisation | None, place: str = "") -> list[str]:
    """Name the module that the fault is in, with the modules around it in order of execution.

    place: where the fault is if no module has it.
    """
    if found is None:
        return []
    lines = ["", f"modules, case {found.case}: {conclusion(found, place)}"]
    shown = _around(found)
    lines += [f"  {'error of input':>14}  {'of output':>9}  module" for _ in shown[:1]]
    for module in shown:
        mark = ">" if module.module == found.first_bad else " "
        figures = f"{error_text(module.input_error):>14}  {error_text(module.output_error):>9}"
        lines.append(f"{mark} {figures}  {module.module}")
    label = curve(found)
    return [*lines, *([f"curve: {label}"] if label else []), *_mapping_lines(found), ""]


def curve(found: Localisation) -> str:
    """Label what becomes of the error after the module in which it arises, or return ""."""
    if found.first_bad is None or found.skipped or found.raised:
        return ""
    if found.recovers:
        return "a spike, which heals later: an alignment problem?"
    return "a step, which stays: a fault"


def _mapping_lines(found: Localisation) -> list[str]:
    """Say how modules were matched, and name those of the reference that were not compared."""
    lines = [str(found.mapping)] if found.mapping else []
    if found.not_compared:
        more = len(found.not_compared) - _SHOWN_NAMES
        names = ", ".join(found.not_compared[:_SHOWN_NAMES]) + (f", … {more} more" * (more > 0))
        lines.append(f"{len(found.not_compared)} not compared: {names}")
    return lines


def conclusion(found: Localisation, place: str = "") -> str:
    """Say in which module the error arises; `place` is where it is if no module has it."""
    bad = found.first_bad_module
    if bad is None and not found.between:
        agree = "every module of the forward pass agrees with the reference"
        return f"{agree}: the error is in {place}" if place else agree
    how = "first wrong in"
    if found.raised:
        how = "raised in"
    elif found.skipped:
        how = "not run:"
    if found.own_code or bad is None:
        how += " the own code of"
    name = f" ({bad.candidate})" if bad and bad.candidate else ""
    return f"{how} {found.module or 'the model'}{name}{_between(found)}"


def _between(found: Localisation) -> str:
    """Say where in the parent's own code, by the modules before and after."""
    after, before = found.neighbours
    words = [f"after {after}" if after else "", f"before {before}" if before else ""]
    return "".join(f", {part}" for part in words if part)


def _around(found: Localisation) -> tuple[ModuleErrors, ...]:
    """Return the modules before and after the first wrong one, in order of execution."""
    compared = tuple(m for m in found.modules if m.output_error is not None)
    wrong = [i for i, m in enumerate(compared) if m.module == found.first_bad or m.output_beyond]
    if not wrong:
        return ()
    bad = found.first_bad_module
    place = compared.index(bad) if bad else wrong[0]
    return compared[max(0, place - _MODULES_AROUND) : place + _MODULES_AROUND + 1]


def error_text(value: float | None) -> str:
    """Show a relative error, or that there is none."""
    return "-" if value is None else f"{value:.1e}"


def summary_line(report: CheckReport) -> str:
    """Say the verdict on the whole in one line."""
    counts = {v: sum(r.verdict is v for r in report.all_results) for v in Verdict}
    cases = len({r.case for r in report.results})
    parts = [
        f"{counts[verdict]} {word}"
        for verdict, word in (
            (Verdict.PASS, "passed"),
            (Verdict.FAIL, "failed"),
            (Verdict.ERROR, "errors"),
            (Verdict.SKIP, "skipped"),
        )
        if counts[verdict] or verdict is Verdict.PASS
    ]
    of_what = [f"tensors of {cases} cases"] if report.results else []
    of_what += ["derived questions"] if report.exploration else []
    line = f"{report.verdict.value.upper()}: {', '.join(parts)} ({' and '.join(of_what)})"
    if report.divergence:
        first = report.divergence
        where = f"case {first.case}" if first in report.results else first.tensor
        line += f"; first divergence: {first.phase.value}, {where}"
    if report.wrong_fields:
        line += f"; wrong fields of FMS's own mapping: {len(report.wrong_fields)}"
    if report.weights and report.weights.differing:
        line += f"; weights that are not the checkpoint's: {len(report.weights.differing)}"
    if report.near_ties:
        line += f"; near-ties allowed: {len(report.near_ties)}"
    if report.unmet:
        line += f"; required but not there: {', '.join(report.unmet)}"
    return line
