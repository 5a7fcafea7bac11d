"""The nodes of the pytest plugin: golden set, case, phase. Imported only when used."""

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
from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.protocol import Phase, Progress
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.candidates import PlainCandidate
from snapshot_tool.check.request import CheckRequest, select_cases
from snapshot_tool.check.session import Session, open_session
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.layout import MANIFEST
from snapshot_tool.goldens.manifest import CaseEntry, load_manifest
from snapshot_tool.pytest_plugin import OPTIONS, plugin_flag
from snapshot_tool.reports import text as run_text

_CANDIDATE = "snap candidate"


class GoldenFile(pytest.File):
    """The manifest of a golden set: its cases, and the candidate's weights."""

    @classmethod
    def at(cls, path: Path, parent: pytest.Collector) -> Self:
        """Return the node of a manifest. Its id is the name of the golden set."""
        name = next(name for name, own in set_names(parent.config).items() if own == path)
        node: Self = cls.from_parent(parent, path=path, nodeid=name)
        return node

    def collect(self) -> Iterator[pytest.Collector | pytest.Item]:
        """Yield the selected cases, and the weights if a phase uses them."""
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
        """Yield the selected phases that the case has, in order."""
        for phase in make_request(self.config).phases:
            if phase in self.case.phases:
                node: GoldenPhase = GoldenPhase.from_parent(
                    self, name=phase.value, case=self.case, phase=phase
                )
                yield node


class _GoldenItem(pytest.Item):
    """A test that runs on the candidate of its golden set."""

    @property
    def loaded(self) -> LoadedCandidate:
        """The candidate, loaded by the first test of the set."""
        return load_candidate_for(self.config, self.path.parent)

    def setup(self) -> None:
        """Load the candidate; if this fails, the test has an error, not a failure."""
        self.user_properties.append((_CANDIDATE, self.loaded.name))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return the test's heading in the report: "one-image / vision"."""
        return self.path, None, " / ".join(self.nodeid.split("::")[1:])


class GoldenPhase(_GoldenItem):
    """One phase of one case, run on the candidate and judged against the golden set."""

    def __init__(self, *, case: CaseEntry, phase: Phase, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.case, self.phase = case, phase

    def runtest(self) -> None:
        """Fail with the lines of `snap check`; skip with the reason if nothing is compared."""
        results = self.loaded.session.run(self.case, self.phase)
        for result in results:
            if (used := result.tolerance_used) is not None:
                self.user_properties.append((f"{result.tensor} tolerance used", f"{used:.3g}"))
        bad = [r for r in results if r.verdict.is_bad]
        if bad:
            others = ", ".join(result.tensor for result in bad[1:])
            found = self.loaded.localise(bad)
            # pytest repeats the first line in its summary.
            lines = [bad[0].reason.partition("; worst at ")[0], run_text.problem_text(bad[0])]
            lines += [f"     and in {others}"] if others else []
            if found and found.module:
                lines[0] += f", {run_text.module_text(found)}"
                lines.append(run_text.conclusion(found))
            pytest.fail("\n".join([*lines, bad[0].traceback]).rstrip(), pytrace=False)
        if all(result.verdict is Verdict.SKIP for result in results):
            pytest.skip("; ".join(result.reason for result in results))


class GoldenWeights(_GoldenItem):
    """The candidate's weights compared with the checkpoint's, after the tests of the phases."""

    def runtest(self) -> None:
        """Fail with the weights that differ; skip if the candidate does not list its weights."""
        found = self.loaded.session.compare_weights()
        if found is None:
            pytest.skip("the candidate has no method 'weights'")
        if found.differing:
            pytest.fail("\n".join(map(str, found.differing)), pytrace=False)


def candidate_names(reports: Mapping[str, Iterable[Any]]) -> list[str]:
    """Return the implementations of the finished tests, from the reports by outcome."""
    names = set()
    for group in reports.values():
        for report in group:
            properties = dict(getattr(report, "user_properties", ()))
            names |= {str(properties[_CANDIDATE])} if _CANDIDATE in properties else set()
    return sorted(names)


@dataclass(slots=True)
class LoadedCandidate:
    """A candidate loaded for a golden set, for all tests of that set in this process."""

    folder: Path
    session: Session
    name: str
    _localised: dict[str, Localisation | None] = field(default_factory=dict)

    def localise(self, bad: list[Result]) -> Localisation | None:
        """Return in which module these results' error arises, found once for each failed case."""
        case = bad[0].case
        if case not in self._localised:
            self._localised[case] = self.session.localise(tuple(bad))
        return self._localised[case]


_LOADED = pytest.StashKey[LoadedCandidate | SnapError]()
_MANIFESTS = pytest.StashKey[list[Path]]()


def load_candidate_for(config: pytest.Config, folder: Path) -> LoadedCandidate:
    """Return the candidate for a golden set, loading it at most once, even if that fails."""
    loaded = config.stash.get(_LOADED, None)
    if loaded is None or (isinstance(loaded, LoadedCandidate) and loaded.folder != folder):
        try:
            session = open_session(make_request(config), open_golden(folder), Progress())
            base = str(config.invocation_params.dir)
            name = run_text.candidate_text(session.info, base=base)
            loaded = LoadedCandidate(folder, session, name)
        except SnapError as error:
            loaded = error
        config.stash[_LOADED] = loaded
    if isinstance(loaded, SnapError):
        pytest.fail(str(loaded), pytrace=False)
    return loaded


def make_request(config: pytest.Config) -> CheckRequest:
    """Return the options as a request. Paths are relative to the folder of the call."""
    given = {option.field: config.getoption(plugin_flag(option)) for option in OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    for name in {"goldens", "fms_path", "answers"} & options.keys():
        options[name] = path_of(config, options[name])
    if "family" in options:
        options["family"] = [
            str(path_of(config, name)) if name.endswith(".py") else name
            for name in options["family"]
        ]
    with _usage_errors():
        return CheckRequest(**options)


def path_of(config: pytest.Config, argument: str) -> Path:
    """Return the absolute path at the start of an argument or a node's id."""
    return (config.invocation_params.dir / argument.partition("::")[0]).absolute()


def manifests(config: pytest.Config) -> list[Path]:
    """Return the manifests of the golden sets that the options select, searched for once."""
    if _MANIFESTS not in config.stash:
        with _usage_errors():
            sets = make_request(config).golden_choice.find()
        config.stash[_MANIFESTS] = [found.folder / MANIFEST for found in sets]
    return config.stash[_MANIFESTS]


def set_names(config: pytest.Config) -> Mapping[str, Path]:
    """Return the manifests by the names of their sets: the checkpoint's, device and dtype.

    If two sets share that, their names are their folders, relative to pytest's root folder.
    """
    paths = manifests(config)
    short = [f"{p.parents[2].name.partition('--')[2]}/{p.parent.name}" for p in paths]
    return {
        name if short.count(name) == 1 else os.path.relpath(path.parent, config.rootpath): path
        for name, path in zip(short, paths, strict=True)
    }


def with_paths(config: pytest.Config, arguments: Iterable[str]) -> list[str]:
    """Return arguments of the command line with the paths of golden sets in place of their ids."""
    names = set_names(config)
    parts = [argument.partition("::") for argument in arguments]
    return [f"{names.get(name, name)}{mark}{rest}" for name, mark, rest in parts]


def case_names(config: pytest.Config) -> list[str]:
    """Return the selected cases of the golden set."""
    with _usage_errors():
        manifest = load_manifest(_one_folder(config))
        return [case.name for case in select_cases(manifest, make_request(config))]


def open_one(config: pytest.Config) -> Golden:
    """Open the golden set that the options select."""
    try:
        return open_golden(_one_folder(config))
    except SnapError as error:
        pytest.fail(str(error), pytrace=False)


def _one_folder(config: pytest.Config) -> Path:
    if not config.getoption("--snap-goldens"):
        raise UsageError("no golden set is selected", "pass --snap-goldens DIR")
    folders = [path.parent for path in manifests(config)]
    if len(folders) > 1:
        raise UsageError(
            f"the options select {len(folders)} golden sets: {', '.join(map(str, folders))}",
            "choose one with --snap-checkpoint or --snap-revision",
        )
    return folders[0]


def problems(
    config: pytest.Config, golden: Golden, output: object, *, case: str, phase: str
) -> list[str]:
    """Return the problems of a phase's output; empty if it passes.

    output: the value that a candidate's method of that phase returns (docs/candidates.md).
    """
    method = "preprocess" if phase == Phase.PREPROCESSING else phase
    candidate = PlainCandidate(SimpleNamespace(**{method: lambda *_inputs, **_options: output}))
    request = replace(make_request(config), case=(case,), quick=False)
    session = Session(request, golden, candidate)
    results = [
        result
        for entry in select_cases(golden.manifest, request)
        for result in session.run_once(entry, Phase(phase))
    ]
    return [run_text.problem_text(r) for r in results if r.verdict is not Verdict.PASS]


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Convert snap's errors to pytest's, which are printed without a traceback."""
    try:
        yield
    except SnapError as error:
        raise pytest.UsageError(str(error)) from error
