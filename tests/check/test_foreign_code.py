"""Nothing that a candidate does to the process turns a check into a success, or moves its files."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshot_tool.base.errors import EndedProcess
from snapshot_tool.base.foreign_code import foreign_code
from tests.conftest import ROOT, Snap, run_snap

FAMILIES = ROOT / "tests" / "families"
LLAMA = ("--checkpoint", FAMILIES / "checkpoints" / "llama", "--goldens", FAMILIES / "goldens")

PORT = """
import atexit, os, signal, sys
from snapshot_tool.candidates.fms.candidate import load_fms_candidate
{at_import}
class Port:
    def __init__(self, request):
        self.fms = load_fms_candidate(request, fms_path=None)
        {at_start}
    def forward(self, inputs):
        {in_forward}
        return self.fms.forward(inputs)
    def generate(self, inputs, **options):
        return self.fms.generate(inputs, **options)
    def modules(self):
        return self.fms.model
"""


@pytest.fixture
def write_port(tmp_path: Path) -> Callable[..., Path]:
    """Return what writes a right candidate that does something besides, and its folder."""

    def write(at_import: str = "pass", at_start: str = "pass", in_forward: str = "pass") -> Path:
        text = PORT.format(at_import=at_import, at_start=at_start, in_forward=in_forward)
        (tmp_path / "port.py").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def check(snap: Snap, folder: Path) -> tuple[int, str, Any]:
    """Check the candidate of a folder there; return exit code, output and JSON."""
    run = snap("check", "--candidate", "port:Port", *LLAMA, "--json", "out.json", cwd=folder)
    report = folder / "out.json"
    return run.code, run.out + run.err, json.loads(report.read_bytes()) if report.exists() else None


@pytest.mark.parametrize("ending", ["sys.exit(0)", "raise KeyboardInterrupt", "os._exit(0)"])
def test_a_candidate_that_ends_the_process_on_import_is_an_error(
    snap: Snap, write_port: Callable[..., Path], ending: str
) -> None:
    """The check says so in one line, and ends with 3."""
    code, out, report = check(snap, write_port(at_import=ending))
    assert (code, report) == (3, None)
    assert "port:Port" in out


@pytest.mark.parametrize(
    "ending",
    ["quit()", "os._exit(0)", "os.execlp('true', 'true')", "raise BaseException('odd')"],
)
def test_a_phase_that_ends_the_process_is_an_error_of_that_phase(
    snap: Snap, write_port: Callable[..., Path], ending: str
) -> None:
    """The other phases are judged, and the report is written."""
    code, out, report = check(snap, write_port(in_forward=ending))
    verdicts = {(r["phase"], r["verdict"]) for r in report["results"]}
    assert code == 1
    assert ("forward", "error") in verdicts
    assert ("generate", "pass") in verdicts
    assert "Traceback" not in out


def test_a_candidate_cannot_move_or_silence_the_report(write_port: Callable[..., Path]) -> None:
    """Folder, arguments, streams and signal handlers are put back."""
    folder = write_port(
        at_import="print('a line'); assert sys.argv[1:] == []; sys.argv.append('x')",
        at_start="os.mkdir('elsewhere'); os.chdir('elsewhere'); open('own', 'w').close()",
        in_forward="assert os.path.exists('own'); sys.stdout.close(); sys.exit = print; "
        "signal.signal(signal.SIGINT, signal.SIG_IGN)",
    )
    code, out, report = check(run_snap, folder)
    assert code == 0
    assert report["verdict"] == "pass"
    assert "PASS" in out
    assert not (folder / "elsewhere" / "out.json").exists()


@pytest.mark.parametrize("at_exit", ["os._exit, 0", "sys.exit, 0"])
def test_an_exit_handler_does_not_change_the_exit_code(
    write_port: Callable[..., Path], at_exit: str
) -> None:
    """A check that fails ends with 1, whatever the candidate registered."""
    folder = write_port(
        at_import=f"atexit.register({at_exit})", in_forward="raise ValueError('never right')"
    )
    code, _, report = check(run_snap, folder)
    assert (code, report["verdict"]) == (1, "error")


def test_a_trace_of_a_candidate_that_ends_the_process_is_not_written(
    snap: Snap, write_port: Callable[..., Path]
) -> None:
    """It ends with 3."""
    folder = write_port(in_forward="sys.exit(0)")
    run = snap(
        *("trace", "--candidate", "port:Port", *LLAMA, "--case", "one-sentence"),
        *("--out", "trace.safetensors"),
        cwd=folder,
    )
    assert run.code == 3
    assert not (folder / "trace.safetensors").exists()


def test_an_fms_checkout_that_ends_the_process_is_refused(snap: Snap, tmp_path: Path) -> None:
    """A checkout is foreign code, too."""
    (tmp_path / "fms").mkdir()
    (tmp_path / "fms" / "__init__.py").write_text("import sys; sys.exit(0)", encoding="utf-8")
    run = snap("check", "--fms-path", tmp_path, *LLAMA)
    assert run.code == 3
    assert len(run.err.strip().splitlines()) <= 2


def test_a_pytest_run_of_a_candidate_that_ends_the_process_fails(
    pytester: pytest.Pytester, write_port: Callable[..., Path]
) -> None:
    """The phase fails; pytest itself goes on and ends with 1."""
    folder = write_port(in_forward="sys.exit(0)")
    pytester.makeini("[pytest]")
    os.chdir(folder)
    result = pytester.runpytest_subprocess(
        *("--snap-goldens", LLAMA[3], "--snap-checkpoint", LLAMA[1]),
        *("--snap-candidate", "port:Port", "--snap-case", "one-sentence"),
    )
    assert result.ret == 1
    outcomes = result.parseoutcomes()
    assert (outcomes["failed"], outcomes["passed"]) == (1, 1)


def test_interrupts_of_the_user_are_kept_apart_from_those_of_the_code() -> None:
    """Ctrl-C interrupts, also if the code catches it; KeyboardInterrupt raised by code does not."""
    with pytest.raises(EndedProcess), foreign_code("it"):
        raise KeyboardInterrupt

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    def swallow() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            interrupt()

    with pytest.raises(KeyboardInterrupt), foreign_code("it"):
        interrupt()

    with pytest.raises(KeyboardInterrupt), foreign_code("it"):
        swallow()


def test_what_the_code_changes_is_put_back(tmp_path: Path) -> None:
    """And its own working folder is kept for its next call."""
    before = (Path.cwd(), sys.argv[:], sys.stdout, signal.getsignal(signal.SIGTERM), os._exit)
    with foreign_code("it"):
        os.chdir(tmp_path)
        sys.argv = ["other", "--option"]
        sys.stdout = None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    after = (Path.cwd(), sys.argv[:], sys.stdout, signal.getsignal(signal.SIGTERM), os._exit)
    assert after == before
    with foreign_code("it"):
        assert Path.cwd() == tmp_path
        os.chdir(before[0])
    with foreign_code("it"):
        assert Path.cwd() == before[0]


def test_a_child_of_the_code_may_end_as_it_likes() -> None:
    """A forked process ends by os._exit, as those of multiprocessing do."""
    with foreign_code("it"):
        child = os.fork()
        if child == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_foreign_code_runs_outside_the_main_thread() -> None:
    """Signal handlers belong to the main thread alone."""
    seen: list[str] = []

    def run() -> None:
        with foreign_code("it"):
            seen.append("ran")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == ["ran"]


def test_exit_handlers_of_the_code_run() -> None:
    """They are kept from ending the process, not from running."""
    ran: list[int] = []
    registered: list[Callable[..., object]] = []
    register = atexit.register
    try:
        atexit.register = lambda function, *given: registered.append(  # type: ignore[assignment]
            lambda: function(*given)
        )
        with foreign_code("it"):
            atexit.register(ran.append, 1)
    finally:
        atexit.register = register
    for handler in registered:
        handler()
    assert ran == [1]
