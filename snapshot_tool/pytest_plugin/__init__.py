"""The pytest plugin: every phase of every case of the golden sets as a test of its own.

    pytest --snap-goldens goldens --fms-path ./foundation-model-stack

Every pytest run of an environment that has snap imports this module: so it imports pytest alone,
and without --snap-goldens it does nothing. docs/pytest.md is for users.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from snapshot_tool.base.protocol import Candidate
    from snapshot_tool.goldens.golden import Golden

_GOLDENS = "--snap-goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer what `snap check` offers; values stay strings, which pytest-xdist can send."""
    option = parser.getgroup("snap", "golden references of snap").addoption
    devices = ["cpu", "cuda"]
    option(_GOLDENS, metavar="DIR", help="Folder of golden sets to run as tests.")
    option("--fms-path", metavar="DIR", help="Root of an FMS checkout. Its code is run.")
    option(
        "--snap-candidate",
        default="fms",
        metavar="SPEC",
        help="'fms', or 'module:factory' for anything else. Its code is run.",
    )
    option(
        "--snap-family",
        action="append",
        default=[],
        metavar="FILE.py",
        help="A file that declares a model family, or an entry point's name. Its code is run.",
    )
    option("--snap-checkpoint", metavar="NAME", help="Folder or hub id.")
    option("--snap-revision", metavar="SHA", help="Revision of the golden set.")
    option("--snap-device", default="cpu", choices=devices, help="Where the candidate runs.")
    option("--snap-golden-device", choices=devices, help="Device of the golden set, if another.")
    option("--snap-phase", action="append", default=[], metavar="PHASE", help="May be repeated.")
    option("--snap-case", default="*", metavar="GLOB", help="Cases to run.")
    option("--snap-shard", metavar="K/N", help="The K-th of N shares of the cases.")
    option("--snap-dtype", metavar="DTYPE", help="What the candidate computes in.")
    option("--snap-tolerance", choices=["table", "oracle"], help="What judges.")
    option("--snap-loading", choices=["snap", "own"], default="snap", help="Who loads FMS.")
    option("--snap-quick", action="store_true", help="Verify generation in one pass.")


def pytest_configure(config: pytest.Config) -> None:
    """Load the families that --snap-family names, in every process that runs tests."""
    if config.getoption(_GOLDENS) and config.getoption("--snap-family"):
        from snapshot_tool.pytest_plugin.nodes import load_named_families

        load_named_families(config)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Add the golden sets to what pytest collects.

    --snap-goldens on the command line, with no path beside it, stands for the goldens alone; in
    `addopts` it adds them to the project's own tests.
    """
    config = session.config
    if not config.getoption(_GOLDENS):
        return
    from snapshot_tool.pytest_plugin.nodes import manifests, path_of

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
    """Run a test that asks for `snap_case` once for each case, by its name."""
    if "snap_case" in metafunc.fixturenames:
        from snapshot_tool.pytest_plugin.nodes import case_names

        metafunc.parametrize("snap_case", case_names(metafunc.config))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which implementation ran, in this process or in pytest-xdist's workers."""
    if config.getoption(_GOLDENS):
        from snapshot_tool.pytest_plugin.nodes import candidate_names

        for name in candidate_names(terminalreporter.stats):
            terminalreporter.write_line(f"snap: checked {name}")


@pytest.fixture(scope="session")
def snap_golden(pytestconfig: pytest.Config) -> Golden:
    """Return the one golden set that the options select: inputs, images, tensors, taps."""
    from snapshot_tool.pytest_plugin.nodes import open_one

    return open_one(pytestconfig)


@pytest.fixture(scope="session")
def snap_candidate(pytestconfig: pytest.Config, snap_golden: Golden) -> Candidate:
    """Return the loaded candidate, the same one that the golden tests of this process use."""
    from snapshot_tool.pytest_plugin.nodes import load_candidate_for

    return load_candidate_for(pytestconfig, snap_golden.folder).candidate


@pytest.fixture
def snap_compare(pytestconfig: pytest.Config, snap_golden: Golden) -> Callable[..., None]:
    """Return a function that asserts that a phase's output is what the golden says.

    snap_compare(output, case="one-image", phase="vision"): output is what a candidate's method of
    that phase returns, the tolerance the golden's own.
    """
    from snapshot_tool.pytest_plugin.nodes import problems

    def compare(output: object, *, case: str, phase: str) -> None:
        __tracebackhide__ = True
        found = problems(pytestconfig, snap_golden, output, case=case, phase=phase)
        if found:
            pytest.fail("\n".join(found))

    return compare
