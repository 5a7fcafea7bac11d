"""A check as lines of text, at most 80 columns wide except for long reasons."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.protocol import EAGER, CandidateInfo, Loading, Phase, phase_order
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.goldens.manifest import Manifest

LEGEND = "0.5x: half of the tolerance was used; equal: no difference"
_SHOWN_NAMES = 6
_SHOWN_CASES = 40
_SHOWN_WEIGHTS = 2
_NARROW = 72  # columns
_MODULES_AROUND = 3
_SEVERITY = (Verdict.ERROR, Verdict.FAIL, Verdict.PASS, Verdict.SKIP)


def list_names(names: Sequence[str]) -> str:
    """Return the first few names on one line, and the number of others."""
    more = f", … {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def remarks(manifest: Manifest) -> list[str]:
    """Return the remarks about a golden set, the most serious first."""
    lines = [
        f"case {case.name} has NaN or Inf in: {', '.join(case.not_finite)}"
        for case in manifest.cases
        if case.not_finite
    ]
    lines += manifest.reference_warnings
    if unused := manifest.checkpoint.unused_weights:
        what = f"{len(unused)} weights of the checkpoint affect no output"
        lines.append(f"{what}: {list_names(unused)}")
    return lines


def header_facts(  # noqa: C901 - one fact after the other
    report: CheckReport, *, base: str
) -> list[tuple[str, str]]:
    """Return names and values that describe the check.

    base: a folder; paths below it are shortened.
    """
    golden, candidate, weights = report.golden, report.candidate, report.weights
    device = f"{report.device} ({report.environment.get('device', '')}), {report.dtype}"
    if golden.device != report.device:
        device += f"; golden set recorded on {golden.device}"
    facts: list[tuple[str, object]] = [
        ("golden", golden),
        ("candidate", candidate_text(candidate, base=base)),
    ]
    if report.path != str(EAGER):
        facts.append(("path", report.path))
    if difference := report.path_difference:
        facts.append(("path", f"difference from {difference.path}: {difference}"))
    facts += [("note", note) for note in candidate.notes]
    if candidate.loading is Loading.OWN:
        facts.append(("loading", 'by FMS: get_model("hf_pretrained")'))
    facts += [("loading", field) for field in candidate.mapping if field.harmless]
    facts.append(("device", device))
    facts += [] if report.answered else [("transformers", report.transformers)]
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
    if report.probes:
        facts.append(("probes", report.probes))
    if report.isolated:
        facts.append(("isolated", report.isolated))
    facts += [("recorded on", other) for other in report.environment_differences]
    facts += [("not covered", one.text) for one in report.coverage if not one.reached]
    facts += [("warning", warning) for warning in report.warnings]
    return [(name, str(fact)) for name, fact in facts]


def candidate_text(info: CandidateInfo, *, base: str) -> str:
    """Return the implementation; a path below the folder `base` is shortened."""
    parts = [info.name, info.path, f"version {info.version}" if info.version else ""]
    if info.commit:
        parts.append(f"commit {info.commit[:12]} ({'dirty' if info.dirty else 'clean'})")
    return " ".join(part for part in parts if part).replace(f"{base}/", "")


def grid(report: CheckReport) -> list[tuple[str, list[Result]]]:
    """Return each case and its results: the worst first, then those that passed."""
    cases: dict[str, list[Result]] = {}
    for result in report.results:
        cases.setdefault(result.case, []).append(result)

    def badness(row: tuple[str, list[Result]]) -> tuple[int, float]:
        verdict = worst_verdict(row[1])
        if not verdict.is_bad:
            return len(_SEVERITY), 0.0  # in the order of the run
        return _SEVERITY.index(verdict), -max(result.tolerance_used or 0.0 for result in row[1])

    return sorted(cases.items(), key=badness)


def worst_verdict(results: Iterable[Result]) -> Verdict:
    """Return the most serious verdict of a non-empty sequence of results."""
    return min((result.verdict for result in results), key=_SEVERITY.index)


def outcome(results: Sequence[Result]) -> str:
    """Return the verdict of some results and the greatest share of the tolerance that was used.

    Returns "" without results, if the case does not have the phase or it was not selected.
    """
    if not results:
        return ""
    verdict = worst_verdict(results)
    used = [result.tolerance_used for result in results if result.tolerance_used is not None]
    if not used or verdict not in (Verdict.PASS, Verdict.FAIL):
        return verdict.value
    if any(map(math.isnan, used)):
        return f"{verdict.value} NaN"
    if max(used) == 0:
        return "pass equal" if verdict is Verdict.PASS else verdict.value
    return f"{verdict.value} {max(used):.2g}x" if max(used) < math.inf else f"{verdict.value} Inf"


Cell = tuple[str, Verdict | None]


def table(report: CheckReport, *, width: int | None) -> list[list[Cell]]:
    """Return the grid as lines of padded cells; the worst cases come first.

    width: the terminal's; None: unlimited. In a narrow terminal, headings are shortened and figures
    left out.
    """
    rows = grid(report)
    narrow = width is not None and width < _NARROW
    gap = " " if narrow else "  "
    heading = [phase.value[:3] if narrow else phase.value for phase in report.phases]
    for cell in (outcome, _verdict_alone):
        lines: list[list[Cell]] = [[("case", None), *((name, None) for name in heading)]]
        for case, results in rows[:_SHOWN_CASES]:
            of_phases = [[r for r in results if r.phase is phase] for phase in report.phases]
            cells = [(cell(found), worst_verdict(found) if found else None) for found in of_phases]
            lines.append([(case, None), *cells])
        padded = pad(lines, gap)
        if width is None or sum(len(text) for text, _ in padded[0]) - len(gap) <= width:
            break
    if left := rows[_SHOWN_CASES:]:
        verdict = worst_verdict(left[0][1])
        worst = "all passed" if verdict is Verdict.PASS else f"at worst {verdict}"
        padded.append([(f"… and {len(left)} more cases: {worst}", None)])
    return padded


def pad(lines: list[list[Cell]], gap: str) -> list[list[Cell]]:
    """Return lines of cells padded to the width of their column, with a gap after each."""
    widths = [max(len(text) for text, _ in column) for column in zip(*lines, strict=True)]
    return [
        [
            (text.ljust(size) + gap, verdict)
            for (text, verdict), size in zip(line, widths, strict=True)
        ]
        for line in lines
    ]


def _verdict_alone(results: Sequence[Result]) -> str:
    return outcome(results).partition(" ")[0]


def exploration_lines(report: CheckReport) -> list[Cell]:
    """Return the number of derived questions by kind, and the command to replay a failure.

    Each line has a verdict for its colour, or None.
    """
    found = report.exploration
    if found is None:
        return []
    replay = re.sub(r" --(explore|seed|shard) \S+", "", report.command)
    drawn = "" if found.seed is None else f", drawn from seed {found.seed}"
    lines: list[Cell] = [(f"derived questions{drawn}", None)]
    for kind in found.kinds:
        text = f"  {kind.kind:<18}{kind.asked:>6} run  {outcome(kind.results)}"
        lines.append((text, worst_verdict(kind.results) if kind.results else None))
        if kind.failure and found.seed is not None:
            question = shlex.quote(kind.failure.tensor)
            lines.append((f"    smallest: {replay} --replay {question}", None))
    return [*lines, ("", None)]


def oracle_lines(report: CheckReport) -> list[str]:
    """Return the candidate's errors compared with the reference's own."""
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


def agreement_lines(report: CheckReport) -> list[str]:
    """Return how far log-probabilities agree, for positions of prompts and for steps."""
    lines = []
    for tensor, what in (("position_logprobs", "prompt positions"), ("step_logprobs", "steps")):
        found = [r.agreement for r in report.results if r.tensor == tensor and r.agreement]
        if count := sum(one.positions for one in found):
            top1 = sum(one.top1 for one in found)
            kl = sum(one.kl * one.positions for one in found) / count
            lines.append(f"{what}: same best token at {top1} of {count}, mean KL {kl:.2g}")
    return lines


def problem_lines(report: CheckReport, *, verbose: bool = False) -> list[str]:
    """Return fields and weights that differ, the worst failure of each phase, and skips by reason.

    verbose: return every failure.
    """
    fields = [f"FAIL loading / {field}" for field in report.wrong_fields]
    differing = report.weights.differing if report.weights else ()
    weights = [f"FAIL weights / {weight}" for weight in differing]
    modules = [f"FAIL modules / {trial}" for trial in report.wrong_modules]
    problems = list(report.bad)
    if not verbose:
        fields, weights = _first_few(fields), _first_few(weights)
        modules = modules if report.isolated else _first_few(modules)  # --isolate lists all
        phases = dict.fromkeys(result.phase for result in problems)
        problems = [next(r for r in problems if r.phase is phase) for phase in phases]
    lines = [*fields, *weights, *modules, *map(problem_text, problems)]
    if left := len(report.bad) - len(problems):
        lines.append(f"     … and {left} more: --verbose or --json FILE")
    skips: dict[tuple[Phase, str], list[Result]] = {}
    for result in sorted(report.all_results, key=lambda result: phase_order(result.phase)):
        if result.verdict is Verdict.SKIP:
            skips.setdefault((result.phase, result.reason), []).append(result)
    for (phase, reason), found in skips.items():
        several = f"SKIP {phase}, {len(found)} times: {reason}"
        lines.append(several if len(found) > 1 else problem_text(found[0]))
    return lines


def _first_few(lines: list[str]) -> list[str]:
    left = len(lines) - _SHOWN_WEIGHTS
    return [*lines[:_SHOWN_WEIGHTS], *([f"     … and {left} more"] if left > 0 else [])]


def problem_text(result: Result) -> str:
    """Return a result that did not pass, on one line or two."""
    where = " / ".join(part for part in (result.phase.value, result.case, result.tensor) if part)
    reason = result.reason
    if result.divergence:  # a difference between token ids has no meaning
        reason = reason.partition("; worst at ")[0]
    return f"{result.verdict.value.upper()} {where}: {wrap_worst(reason)}"


def wrap_worst(reason: str) -> str:
    """Return a reason with its worst element on a second line."""
    return reason.replace("; worst at ", "\n     worst at ", 1)


def localisation_lines(found: Localisation | None, location: str = "") -> list[str]:
    """Return the faulty module, and the modules around it in order of execution.

    location: the location of the fault if it is not in a module.
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
    """Return whether the error remains after the first bad module, or ""."""
    if found.first_bad is None or found.skipped or found.raised or found.guess:
        return ""
    if found.recovers:
        return "a spike that disappears later: possibly another layout"
    return "a step that remains: a fault"


def conclusion(found: Localisation, location: str = "") -> str:
    """Return the module in which the error arises, or `location` if it is not in a module."""
    bad = found.first_bad_module
    if found.first_bad is None and not found.between:
        if not found.compared:
            return "no module could be compared"
        agree = "every module of the forward pass agrees with the reference"
        return f"{agree}: the error is in {location}" if location else agree
    text = "raised in" if found.raised else "never called:" if found.skipped else "first wrong in"
    if found.guess:
        text = "no module is beyond its limit; as a guess, the error rises most in"
    if found.own_code or found.first_bad is None:
        text += " the own code of"
    text += f" {found.module or 'the model'}"
    if bad and bad.candidate:
        text += f" ({bad.candidate})"
    after, before = found.neighbours
    return text + (f", after {after}" if after else "") + (f", before {before}" if before else "")


def error_text(value: float | None) -> str:
    """Return a relative error, or "-" if there is none."""
    return "-" if value is None else f"{value:.1e}"


def source_lines(report: CheckReport) -> list[str]:
    """Return the class of the first bad module, and the changed files of the checkout."""
    found, changed = report.localisation, report.candidate.changed
    lines = []
    if found and found.source:
        own = "" if found.source.name == found.module_class else f"{found.module_class} of "
        lines.append(f"class    {own}{found.source.name}, {found.source.file}:{found.source.line}")
    if changed:
        lines.append(f"changed  {list_names(changed)} (not committed)")
    return lines


def next_lines(report: CheckReport, *, page: Path | None = None) -> list[str]:
    """Return counts, the module's class, changed files and commands after a failure.

    page: the HTML report; None if there is none.
    """
    if not report.verdict.is_bad:
        return []
    look = f"open {page} in a browser" if page else f"{report.command} --html report.html"
    commands = [*report.next_commands, look]
    after = [f"next     {command}" for command in commands]
    return [counts_text(report), *source_lines(report), *after]


def counts_text(report: CheckReport) -> str:
    """Return the number of results with each verdict."""
    words = {Verdict.PASS: "passed", Verdict.FAIL: "failed", Verdict.ERROR: "errors"}
    words |= {Verdict.SKIP: "skipped"}
    counts = [f"{n} {words[v]}" for v, n in report.counts.items() if n or v is Verdict.PASS]
    of_what = [f"tensors of {_number_of_cases(report)} cases"] if report.results else []
    of_what += ["derived questions"] if report.exploration else []
    return f"{', '.join(counts)} ({' and '.join(of_what)})"


def _number_of_cases(report: CheckReport) -> int:
    return len({result.case for result in report.results})


def summary_line(report: CheckReport) -> str:
    """Return the verdict in one line; for a failure with its phase, cases and module."""
    first, failed = report.divergence, report.verdict.is_bad
    facts = [] if failed else [counts_text(report)]
    if first is not None:
        same = {r.case for r in report.bad if r.phase is first.phase}
        where = f"in {len(same)} of {_number_of_cases(report)} cases"
        if first not in report.results:
            where = f"in a derived question, {first.tensor}"
        facts.append(f"{first.phase.value} {where}{_cause(report, first)}")
    if report.wrong_fields:
        facts.append(f"wrong fields of FMS's own mapping: {len(report.wrong_fields)}")
    if report.weights and (differing := report.weights.differing):
        weights = f"weights that differ from the checkpoint: {len(differing)}"
        facts.append(f"{weights}, first {differing[0].name}")
    if wrong := report.wrong_modules:
        modules = f"modules that are wrong by themselves: {len(wrong)}"
        facts.append(f"{modules}, first {wrong[0].module or 'the model'}")
    if report.near_ties:
        facts.append(f"near-ties allowed: {len(report.near_ties)}")
    if report.unmet:
        facts.append(f"required but missing: {', '.join(report.unmet)}")
    return f"{report.verdict.value.upper()}{' ' if failed else ': '}{'; '.join(facts)}"


def _cause(report: CheckReport, first: Result) -> str:
    """Return the cause of the first failure as a suffix, or "" if unknown."""
    found = report.localisation
    if first.verdict is Verdict.ERROR:
        return f": {first.reason}"
    if first.phase is Phase.PREPROCESSING or not report.location:
        return ""
    if found is None or not found.module:
        return f": {report.location}"
    return f", {module_text(found)}"


def module_text(found: Localisation) -> str:
    """Return the first bad module by the candidate's name and the end of the reference's name."""
    bad = found.first_bad_module
    how = "raised in" if found.raised else "never called" if found.skipped else "first wrong"
    own = "the own code of " if found.own_code or found.first_bad is None else ""
    if bad is None or not bad.candidate:
        return f"{how}: {own}{found.module}"
    parts = found.module.split(".")
    end = ".".join(parts[-3:] if parts[-2:-1] and parts[-2].isdigit() else parts[-2:])
    return f"{how}: {own}{bad.candidate} (HF {'…' if end != found.module else ''}{end})"
