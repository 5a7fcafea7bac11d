"""A check as lines of text, at most 80 columns but for long reasons."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence

from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.phases import Phase, phase_order
from snapshot_tool.base.protocol import CandidateInfo, Loading
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict, tolerance_used
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.goldens.manifest import Manifest

LEGEND = "0.5x: half of what is allowed was used; equal: no difference"
_SHOWN_NAMES = 6
_SHOWN_PROBLEMS = 12
_SHOWN_WEIGHTS = 4
_MODULES_AROUND = 3
_SEVERITY = (Verdict.ERROR, Verdict.FAIL, Verdict.SKIP, Verdict.PASS)


def list_names(names: Sequence[str]) -> str:
    """Return the first few names on one line, and how many more there are."""
    more = f", … {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def remarks(manifest: Manifest) -> list[str]:
    """Return a line for each remarkable thing of a golden set, the most serious first."""
    lines = [
        f"case {case.name} has NaN or Inf in: {', '.join(case.not_finite)}"
        for case in manifest.cases
        if case.not_finite
    ]
    lines += manifest.reference_warnings
    if unused := manifest.checkpoint.unused_weights:
        what = f"{len(unused)} weights of the checkpoint take part in no answer"
        lines.append(f"{what}: {list_names(unused)}")
    return lines


def header_facts(report: CheckReport, *, base: str) -> list[tuple[str, str]]:
    """Return names and values: what was checked against what, and where.

    base: a folder; paths below it are shortened.
    """
    golden, candidate, weights = report.golden, report.candidate, report.weights
    device = f"{report.device} ({report.environment.get('device', '')}), {report.dtype}"
    if golden.device != report.device:
        device += f" - golden recorded on {golden.device}"
    facts: list[tuple[str, object]] = [
        ("golden", golden),
        ("candidate", candidate_text(candidate, base=base)),
        *(("note", note) for note in candidate.notes),
    ]
    if candidate.loading is Loading.OWN:
        facts.append(("loading", 'by FMS itself: get_model("hf_pretrained")'))
    facts += [("loading", field) for field in candidate.mapping if field.harmless]
    facts += [("device", device), ("transformers", report.transformers)]
    if options := report.environment.get("options"):
        facts.append(("options", options))
    if report.shard:
        facts.append(("shard", report.shard))
    if report.quick:
        facts.append(("generate", "verified in one pass, without the cache (--quick)"))
    if weights:
        facts.append(("weights", weights))
        if weights.unset_text:
            facts.append(("weights", weights.unset_text))
    facts += [("recorded on", difference) for difference in report.environment_differences]
    facts += [("not covered", one.text) for one in report.coverage if not one.reached]
    facts += [("warning", warning) for warning in report.warnings]
    return [(name, str(fact)) for name, fact in facts]


def candidate_text(info: CandidateInfo, *, base: str) -> str:
    """Return which implementation it is; a path below the folder `base` is shortened."""
    parts = [info.name, info.path, f"version {info.version}" if info.version else ""]
    if info.commit:
        parts.append(f"commit {info.commit[:12]} ({'dirty' if info.dirty else 'clean'})")
    return " ".join(part for part in parts if part).replace(f"{base}/", "")


def grid(report: CheckReport) -> list[tuple[str, list[Result]]]:
    """Return each case and its results: first those that did not pass, the worst of them first."""
    cases: dict[str, list[Result]] = {}
    for result in report.results:
        cases.setdefault(result.case, []).append(result)

    def badness(row: tuple[str, list[Result]]) -> tuple[int, float]:
        verdict = worst_verdict(row[1])
        if verdict in (Verdict.PASS, Verdict.SKIP):
            return len(_SEVERITY), 0.0  # in the order of the run
        used = (tolerance_used(result, report.rule) for result in row[1])
        return _SEVERITY.index(verdict), -max((u for u in used if u is not None), default=0.0)

    return sorted(cases.items(), key=badness)


def worst_verdict(results: Iterable[Result]) -> Verdict:
    """Return the most serious verdict of some results, at least one."""
    return min((result.verdict for result in results), key=_SEVERITY.index)


def outcome(results: Sequence[Result], rule: Rule) -> str:
    """Return the verdict on some results and how much of the tolerance was used at most.

    "" without results: the case has no such phase, or it was not selected.
    """
    if not results:
        return ""
    verdict = worst_verdict(results)
    used = [u for result in results if (u := tolerance_used(result, rule)) is not None]
    if not used or verdict not in (Verdict.PASS, Verdict.FAIL):
        return verdict.value
    if any(map(math.isnan, used)):
        return f"{verdict.value} NaN"
    if max(used) == 0:
        return "pass equal" if verdict is Verdict.PASS else verdict.value
    return f"{verdict.value} {max(used):.2g}x" if max(used) < math.inf else f"{verdict.value} Inf"


def exploration_lines(report: CheckReport, *, replay: str) -> list[tuple[str, Verdict | None]]:
    """Return how many derived questions were asked, by kind, and how to replay a failure.

    replay: the command to which `--replay QUESTION` is added. Lines have a verdict, for colour.
    """
    found = report.exploration
    if found is None:
        return []
    drawn = "" if found.seed is None else f", drawn from seed {found.seed}"
    lines: list[tuple[str, Verdict | None]] = [(f"derived questions{drawn}", None)]
    for kind in found.kinds:
        text = f"  {kind.kind:<18}{kind.asked:>6} asked  {outcome(kind.results, report.rule)}"
        lines.append((text, worst_verdict(kind.results) if kind.results else None))
        if kind.failure and found.seed is not None:
            question = shlex.quote(kind.failure.tensor)
            lines.append((f"    smallest: {replay} --replay {question}", None))
    return [*lines, ("", None)]


def oracle_lines(report: CheckReport) -> list[str]:
    """Return how the candidate's errors compare with the reference's own."""
    judged = [(result, result.oracle) for result in report.results if result.oracle]
    if not judged:
        return []
    worst, figures = max(judged, key=lambda pair: pair[1].used)
    errors = f"error {figures.error:.2g}, the reference's own {figures.reference_error:.2g}"
    lines = [
        f"oracle: nearest to its limit is {worst.phase.value} / {worst.case} / {worst.tensor}:",
        f"     {errors}, allowed {figures.limit:.2g}",
    ]
    if report.rule is Rule.ORACLE:
        return lines
    failed = [oracle.within for result, oracle in judged if result.verdict is Verdict.FAIL]
    passed = [oracle.within for result, oracle in judged if result.verdict is Verdict.PASS]
    others = [f"would also fail {passed.count(False)} tensors"] if False in passed else []
    if True in failed:
        others.append(f"would pass {failed.count(True)} of the {len(failed)} that fail")
    return [*lines, f"     --tolerance oracle {' and '.join(others) or 'agrees on all'}"]


def weight_lines(report: CheckReport) -> list[str]:
    """Return the weights that are not the checkpoint's, the first few of them."""
    found = report.weights.differing if report.weights else ()
    more = [f"{len(found) - _SHOWN_WEIGHTS} more"] if len(found) > _SHOWN_WEIGHTS else []
    return [*map(str, found[:_SHOWN_WEIGHTS]), *more]


def problem_lines(report: CheckReport) -> list[str]:
    """Return what did not pass, weights and the earliest phases first, the first few of each."""
    problems = [r for r in report.all_results if r.verdict in (Verdict.FAIL, Verdict.ERROR)]
    problems.sort(
        key=lambda r: (phase_order(r.phase), -(tolerance_used(r, report.rule) or 0.0)),
    )
    lines = [f"FAIL loading / {field}" for field in report.wrong_fields]
    lines += [f"FAIL weights / {line}" for line in weight_lines(report)]
    lines += [problem_text(result) for result in problems[:_SHOWN_PROBLEMS]]
    skips: dict[tuple[Phase, str], list[Result]] = {}
    for result in sorted(report.all_results, key=lambda result: phase_order(result.phase)):
        if result.verdict is Verdict.SKIP:
            skips.setdefault((result.phase, result.reason), []).append(result)
    for (phase, reason), found in skips.items():
        several = f"SKIP {phase}, {len(found)} times: {reason}"
        lines.append(several if len(found) > 1 else problem_text(found[0]))
    if len(problems) > _SHOWN_PROBLEMS:
        left = len(problems) - _SHOWN_PROBLEMS
        lines.append(f"… and {left} more: --json FILE has them all")
    return lines


def problem_text(result: Result) -> str:
    """Return a result that did not pass, on one line or two."""
    where = " / ".join(part for part in (result.phase.value, result.case, result.tensor) if part)
    return f"{result.verdict.value.upper()} {where}: {wrap_worst(result.reason)}"


def wrap_worst(reason: str) -> str:
    """Return a reason with its worst element on a second line."""
    return reason.replace("; worst at ", "\n     worst at ", 1)


def localisation_lines(found: Localisation | None, location: str = "") -> list[str]:
    """Return the module that the fault is in, with the modules around it in order of execution.

    location: where the fault is if no module has it.
    """
    if found is None:
        return []
    lines = ["", f"modules, case {found.case}: {conclusion(found, location)}"]
    compared = [m for m in found.modules if m.output_error is not None]
    bad = [i for i, m in enumerate(compared) if m.module == found.first_bad] or [
        i for i, m in enumerate(compared) if m.output_beyond
    ]
    if bad:
        lines.append(f"  {'error of input':>14}  {'of output':>9}  module")
        for module in compared[max(0, bad[0] - _MODULES_AROUND) : bad[0] + _MODULES_AROUND + 1]:
            mark = ">" if module.module == found.first_bad else " "
            errors = error_text(module.input_error), error_text(module.output_error)
            lines.append(f"{mark} {errors[0]:>14}  {errors[1]:>9}  {module.module}")
    if label := curve(found):
        lines.append(f"curve: {label}")
    if found.mapping:
        lines.append(str(found.mapping))
    if found.not_compared:
        names = list_names(found.not_compared)
        lines.append(f"{len(found.not_compared)} not compared: {names}")
    return [*lines, ""]


def curve(found: Localisation) -> str:
    """Return what becomes of the error after the first bad module, or ""."""
    if found.first_bad is None or found.skipped or found.raised or found.guess:
        return ""
    if found.recovers:
        return "a spike, which heals later: an alignment problem?"
    return "a step, which stays: a fault"


def conclusion(found: Localisation, location: str = "") -> str:
    """Return in which module the error arises; `location` is where it is if no module has it."""
    bad = found.first_bad_module
    if found.first_bad is None and not found.between:
        agree = "every module of the forward pass agrees with the reference"
        return f"{agree}: the error is in {location}" if location else agree
    text = "raised in" if found.raised else "not run:" if found.skipped else "first wrong in"
    if found.guess:
        text = "no module is beyond its limit; a guess, since the error rises most there:"
    if found.own_code or found.first_bad is None:
        text += " the own code of"
    text += f" {found.module or 'the model'}"
    if bad and bad.candidate:
        text += f" ({bad.candidate})"
    after, before = found.neighbours
    return text + (f", after {after}" if after else "") + (f", before {before}" if before else "")


def error_text(value: float | None) -> str:
    """Return a relative error, or that there is none."""
    return "-" if value is None else f"{value:.1e}"


def summary_line(report: CheckReport) -> str:
    """Return the verdict on the whole in one line."""
    verdicts = [result.verdict for result in report.all_results]
    counts = [f"{verdicts.count(Verdict.PASS)} passed"]
    others = (Verdict.FAIL, "failed"), (Verdict.ERROR, "errors"), (Verdict.SKIP, "skipped")
    counts += [f"{verdicts.count(v)} {word}" for v, word in others if v in verdicts]
    cases = len({r.case for r in report.results})
    of_what = [f"tensors of {cases} cases"] if report.results else []
    of_what += ["derived questions"] if report.exploration else []
    line = f"{report.verdict.value.upper()}: {', '.join(counts)} ({' and '.join(of_what)})"
    if first := report.divergence:
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
