"""The pytest plugin: every phase of every case of the golden sets is a test.

    pytest --snap-goldens goldens --fms-path ./foundation-model-stack

Every pytest session in an environment with snap imports this module. It imports the declarations
of the options, but neither torch nor msgspec, and does nothing without --snap-goldens. See also
docs/pytest.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from snapshot_tool.base.options import Option, options_of
from snapshot_tool.check.request import CheckRequest

if TYPE_CHECKING:
    from snapshot_tool.base.protocol import Candidate
    from snapshot_tool.goldens.golden import Golden

_GOLDENS = "--snap-goldens"
OPTIONS = [option for option in options_of(CheckRequest).values() if option.in_pytest]


def plugin_flag(option: Option) -> str:
    """Return the plugin's name of an option of `snap check`: "--snap-device" for "--device"."""
    return option.flag if option.field == "fms_path" else f"--snap-{option.flag[2:]}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `snap check` that apply to single tests."""
    group = parser.getgroup("snap", "golden references of snap")
    for option in OPTIONS:
        default = f"  [default: {option.default}]" if option.default else ""
        details: dict[str, Any] = {"help": option.help + default, "default": None}
        if option.field == "goldens":
            details = {"help": "Folder of golden sets to run as tests."}
        if option.kind is bool:
            details |= {"action": "store_true"}
        else:
            # Paths stay text, which pytest-xdist can send to its workers.
            details |= {"type": str if option.kind is Path else option.kind}
            choices = None if option.commas else option.choices or None
            details |= {"choices": choices, "metavar": option.metavar or None}
            details |= {"action": "append"} if option.repeated else {}
        group.addoption(plugin_flag(option), **details)


def pytest_configure(config: pytest.Config) -> None:
    """Register the families that --snap-family names, in every process that runs tests."""
    if config.getoption(_GOLDENS) and config.getoption("--snap-family"):
        from snapshot_tool.base.errors import SnapError
        from snapshot_tool.families import name_families
        from snapshot_tool.pytest_plugin.nodes import make_request

        try:
            name_families(make_request(config).family)
        except SnapError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Collect the manifests of the golden sets, unless the arguments name some of them.

    If --snap-goldens is on the command line without a path, only golden sets are collected. In
    `addopts` the option adds them to the project's own tests.
    """
    config = session.config
    if not config.getoption(_GOLDENS):
        return
    from snapshot_tool.pytest_plugin.nodes import manifests, path_of, with_paths

    config.args = with_paths(config, config.args)
    root = path_of(config, config.getoption(_GOLDENS))
    if any(path_of(config, argument).is_relative_to(root) for argument in config.args):
        return
    on_command_line = any(str(a).startswith(_GOLDENS) for a in config.invocation_params.args)
    has_paths = config.args_source is pytest.Config.ArgsSource.ARGS
    others = [] if on_command_line and not has_paths else config.args
    config.args = [*others, *map(str, manifests(config))]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the manifest of a golden set that the options select."""
    if file_path.name != "manifest.json" or not parent.config.getoption(_GOLDENS):
        return None
    from snapshot_tool.pytest_plugin.nodes import GoldenFile, manifests

    return GoldenFile.at(file_path, parent) if file_path in manifests(parent.config) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that uses `snap_case` once for each case."""
    if "snap_case" in metafunc.fixturenames:
        from snapshot_tool.pytest_plugin.nodes import case_names

        metafunc.parametrize("snap_case", case_names(metafunc.config))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print which implementation ran, in this process or in pytest-xdist's workers."""
    if config.getoption(_GOLDENS):
        from snapshot_tool.pytest_plugin.nodes import candidate_names

        for name in candidate_names(terminalreporter.stats):
            terminalreporter.write_line(f"snap: checked {name}")


@pytest.fixture(scope="session")
def snap_golden(pytestconfig: pytest.Config) -> Golden:
    """Return the golden set that the options select: inputs, images, tensors, taps."""
    from snapshot_tool.pytest_plugin.nodes import open_one

    return open_one(pytestconfig)


@pytest.fixture(scope="session")
def snap_candidate(pytestconfig: pytest.Config, snap_golden: Golden) -> Candidate:
    """Return the loaded candidate, shared with the golden tests of this process."""
    from snapshot_tool.pytest_plugin.nodes import load_candidate_for

    candidate: Candidate = load_candidate_for(pytestconfig, snap_golden.folder).session.candidate
    return candidate


@pytest.fixture
def snap_compare(pytestconfig: pytest.Config, snap_golden: Golden) -> Callable[..., None]:
    """Return a function that fails if a phase's output is not within the golden set's tolerance.

    snap_compare(output, case="one-image", phase="vision"): output is the value that a candidate's
    method of that phase returns.
    """
    from snapshot_tool.pytest_plugin.nodes import problems

    def compare(output: object, *, case: str, phase: str) -> None:
        __tracebackhide__ = True
        found = problems(pytestconfig, snap_golden, output, case=case, phase=phase)
        if found:
            pytest.fail("\n".join(found))

    return compare
