"""What the pytest plugin collects and runs: golden set, case, phase. Imported only when used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from snapshot_tool.base.errors import SnapError, UsageError
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.protocol import Candidate, Loading, SilentProgress
from snapshot_tool.base.report import parse_share
from snapshot_tool.base.results import Result, Verdict, tolerance_used
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.check.request import CheckRequest, select_cases
from snapshot_tool.check.session import Session, open_session
from snapshot_tool.families.own import name_families
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.layout import MANIFEST
from snapshot_tool.goldens.manifest import CaseEntry, load_manifest
from snapshot_tool.reports import text as run_text

_CANDIDATE = "snap candidate"
_BAD = (Verdict.FAIL, Verdict.ERROR)


class GoldenFile(pytest.File):
    """The manifest of a golden set: its cases, and the candidate's weights."""

    @classmethod
    def at(cls, path: Path, parent: pytest.Collector) -> Self:
        """Return the node of a manifest; its id names the file also outside of pytest's root."""
        name = Path(os.path.relpath(path, parent.config.rootpath)).as_posix()
        node: Self = cls.from_parent(parent, path=path, nodeid=name)
        return node

    def collect(self) -> Iterator[pytest.Collector | pytest.Item]:
        """Yield the cases that --snap-case names, and the weights where a phase has any."""
        request = make_request(self.config)
        with _usage_errors():
            for case in select_cases(load_manifest(self.path.parent), request):
                node: GoldenCase = GoldenCase.from_parent(self, name=case.name, case=case)
                yield node
        if request.needs_weights:
            weights: GoldenWeights = GoldenWeights.from_parent(self, name="weights")
            yield weights


class GoldenCase(pytest.Collector):
    """One case of a golden set: its phases."""

    def __init__(self, *, case: CaseEntry, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.case = case

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the phases that the case has, in order."""
        for phase in make_request(self.config).phases:
            if phase in self.case.phases:
                node: GoldenPhase = GoldenPhase.from_parent(
                    self, name=phase.value, case=self.case, phase=phase
                )
                yield node


class GoldenPhase(pytest.Item):
    """One phase of one case, run on the candidate and judged against the golden."""

    def __init__(self, *, case: CaseEntry, phase: Phase, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.case, self.phase = case, phase

    def setup(self) -> None:
        """Load the candidate, unless an earlier test has done it."""
        load_candidate_for(self.config, self.path.parent)

    def runtest(self) -> None:
        """Fail with what `snap check` would say; skip with the reason where nothing compares."""
        loaded = load_candidate_for(self.config, self.path.parent)
        results = loaded.session.run(self.case, self.phase)
        figures = _figures(results, loaded.session.judge.rule)
        self.user_properties += [(_CANDIDATE, loaded.name), *figures]
        bad = [result for result in results if result.verdict in _BAD]
        if bad:
            pytest.fail("\n".join([*_told(bad), *loaded.first_bad_module(bad)]), pytrace=False)
        if skipped := [r.reason for r in results if r.verdict is Verdict.SKIP]:
            pytest.skip("; ".join(skipped))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Name the test in the headings of the report."""
        return self.path, None, f"{self.case.name} / {self.phase.value}"


class GoldenWeights(pytest.Item):
    """The candidate's weights beside the checkpoint's, after what this process ran before."""

    def setup(self) -> None:
        """Load the candidate, unless an earlier test has done it."""
        load_candidate_for(self.config, self.path.parent)

    def runtest(self) -> None:
        """Fail with the weights that differ; skip where the candidate shows none."""
        loaded = load_candidate_for(self.config, self.path.parent)
        self.user_properties.append((_CANDIDATE, loaded.name))
        found = loaded.session.compare_weights()
        if found is None:
            pytest.skip("the candidate has no method 'weights'")
        if found.differing:
            pytest.fail("\n".join(map(str, found.differing)), pytrace=False)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Name the test in the headings of the report."""
        return self.path, None, self.name


def _told(bad: list[Result]) -> list[str]:
    """Return the first problem in full and the names of the others."""
    others = ", ".join(result.tensor for result in bad[1:])
    return [run_text.problem_text(bad[0]), *([f"     and in {others}"] if others else [])]


def _figures(results: Iterable[Result], rule: Rule) -> Iterator[tuple[str, str]]:
    """Yield how much of the tolerance each tensor used: JUnit files keep it as a property."""
    for result in results:
        used = tolerance_used(result, rule)
        if used is not None:
            yield f"{result.tensor} tolerance used", f"{used:.3g}"


def candidate_names(reports: Mapping[str, Iterable[Any]]) -> list[str]:
    """Return the implementations that finished tests ran on, from the reports by outcome."""
    properties = (
        item
        for group in reports.values()
        for report in group
        for item in getattr(report, "user_properties", ())
    )
    return sorted({str(value) for name, value in properties if name == _CANDIDATE})


@dataclass(slots=True)
class LoadedCandidate:
    """A candidate loaded for a golden set, for all tests of that set in this process."""

    folder: Path
    session: Session
    name: str
    _conclusions: dict[str, list[str]] = field(default_factory=dict)

    @property
    def candidate(self) -> Candidate:
        """The candidate itself, watched."""
        candidate: Candidate = self.session.candidate
        return candidate

    def first_bad_module(self, bad: list[Result]) -> list[str]:
        """Return a line that names the module at fault; one forward pass for each failed case."""
        case = bad[0].case
        if case not in self._conclusions:
            found = self.session.localise(tuple(bad))
            lines = [run_text.conclusion(found)] if found and found.module else []
            self._conclusions[case] = lines
        return self._conclusions[case]


_LOADED = pytest.StashKey[LoadedCandidate | SnapError]()
_MANIFESTS = pytest.StashKey[list[Path]]()


def load_candidate_for(config: pytest.Config, folder: Path) -> LoadedCandidate:
    """Return the candidate for a golden set; what cannot be loaded is not tried again."""
    loaded = config.stash.get(_LOADED, None)
    if loaded is None or (isinstance(loaded, LoadedCandidate) and loaded.folder != folder):
        try:
            loaded = _load(config, folder)
        except SnapError as error:
            loaded = error
        config.stash[_LOADED] = loaded
    if isinstance(loaded, SnapError):
        pytest.fail(str(loaded), pytrace=False)
    return loaded


def _load(config: pytest.Config, folder: Path) -> LoadedCandidate:
    request = make_request(config)
    session = open_session(request, open_golden(folder), SilentProgress())
    name = run_text.candidate_text(session.info, base=str(config.invocation_params.dir))
    return LoadedCandidate(folder, session, name)


def load_named_families(config: pytest.Config) -> None:
    """Register what --snap-family names."""
    names = config.getoption("--snap-family")
    with _usage_errors():
        name_families(str(path_of(config, n)) if n.endswith(".py") else n for n in names)


def make_request(config: pytest.Config) -> CheckRequest:
    """Return what the options ask for, as `snap check` would."""
    option = config.getoption
    names = option("--snap-phase") or list(PHASES)
    if unknown := set(names) - set(PHASES):
        raise pytest.UsageError(f"--snap-phase {min(unknown)} is none of {', '.join(PHASES)}")
    fms_path, rule = option("--fms-path"), option("--snap-tolerance")
    shard = option("--snap-shard")
    return CheckRequest(
        goldens=path_of(config, option("--snap-goldens")),
        candidate=option("--snap-candidate"),
        fms_path=path_of(config, fms_path) if fms_path else None,
        checkpoint=option("--snap-checkpoint"),
        revision=option("--snap-revision"),
        device=option("--snap-device"),
        golden_device=option("--snap-golden-device"),
        phases=tuple(phase for phase in PHASES if phase in names),
        case=option("--snap-case"),
        dtype=option("--snap-dtype"),
        rule=Rule(rule) if rule else None,
        quick=option("--snap-quick"),
        share=parse_share(shard) if shard else None,
        loading=Loading(option("--snap-loading")),
    )


def path_of(config: pytest.Config, argument: str) -> Path:
    """Return the absolute path that an argument or a node's id begins with."""
    return (config.invocation_params.dir / argument.partition("::")[0]).absolute()


def manifests(config: pytest.Config) -> list[Path]:
    """Return the manifests of the golden sets that the options select; looked for once."""
    if _MANIFESTS not in config.stash:
        with _usage_errors():
            sets = make_request(config).golden_choice.find()
        config.stash[_MANIFESTS] = [found.folder / MANIFEST for found in sets]
    return config.stash[_MANIFESTS]


def case_names(config: pytest.Config) -> list[str]:
    """Return the selected cases of the one golden set."""
    with _usage_errors():
        manifest = load_manifest(_one_folder(config))
        return [case.name for case in select_cases(manifest, make_request(config))]


def open_one(config: pytest.Config) -> Golden:
    """Open the one golden set that the options select."""
    try:
        return open_golden(_one_folder(config))
    except SnapError as error:
        pytest.fail(str(error), pytrace=False)


def _one_folder(config: pytest.Config) -> Path:
    if not config.getoption("--snap-goldens"):
        raise UsageError("no golden set was named", "pass --snap-goldens DIR")
    folders = [path.parent for path in manifests(config)]
    if len(folders) > 1:
        raise UsageError(
            f"{len(folders)} golden sets answer: {', '.join(map(str, folders))}",
            "choose one with --snap-checkpoint or --snap-revision",
        )
    return folders[0]


def problems(
    config: pytest.Config, golden: Golden, output: object, *, case: str, phase: str
) -> list[str]:
    """Return what is wrong with a phase's output; nothing, where the golden would pass it.

    output: what a candidate's method of that phase returns (docs/candidates.md).
    """
    method = "preprocess" if phase == Phase.PREPROCESSING else phase
    candidate: Any = SimpleNamespace(**{method: lambda *_inputs, **_options: output})
    request = replace(make_request(config), case=case, quick=False)
    session = Session(request, golden, candidate)
    results = [
        result
        for entry in select_cases(golden.manifest, request)
        for result in session.run(entry, Phase(phase))
    ]
    return [run_text.problem_text(r) for r in results if r.verdict is not Verdict.PASS]


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Turn snap's errors into pytest's, which it prints without a traceback."""
    try:
        yield
    except SnapError as error:
        raise pytest.UsageError(str(error)) from error
