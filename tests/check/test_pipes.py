"""A command whose reader has gone ends as it would have, with the same exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import CHECKOUT, ROOT


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "--json"], 0),
        (["check", "--fms-path", str(CHECKOUT), "--case", "variant-02", "--atol", "0"], 1),
        (["show", "nonsense"], 3),
        (["show", "--nonsense"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_the_exit_code_holds_when_nobody_reads_the_output(arguments: list[str], code: int) -> None:
    """Neither standard output nor standard error has a reader from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-m", "snapshot_tool", *arguments],
        cwd=ROOT, stdout=writer, stderr=writer,
    ) as process:  # fmt: skip
        os.close(writer)
    assert process.returncode == code


def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    """`snap show | head -1` is what people do."""
    answer = subprocess.run(
        f"{sys.executable} -m snapshot_tool show --json | head -1",
        shell=True, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.stdout == "{\n"
    assert answer.stderr == ""
