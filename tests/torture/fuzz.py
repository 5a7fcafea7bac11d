"""Coverage-guided fuzzing of the parsers that read a stranger's bytes.

    python -m tests.torture.fuzz manifest | header RUNS

Anything but a SnapError that comes out of a parser ends the process with another code than 0.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["snapshot_tool"]):
    from snapshot_tool.base.errors import SnapError
    from snapshot_tool.goldens.manifest import decode
    from snapshot_tool.goldens.tensors import describe_file
    from snapshot_tool.goldens.verify import find_misfits

from tests.torture.base_set import write_base


def _fuzz_manifest(data: bytes) -> None:
    with contextlib.suppress(SnapError):
        manifest = decode(data, source=Path("manifest.json"))
        if "inputs.safetensors" in manifest.files:
            find_misfits(manifest)


def _header_fuzzer(folder: Path) -> Callable[[bytes], None]:
    path = folder / "fuzzed.safetensors"

    def fuzz(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(SnapError):
            describe_file(path)

    return fuzz


def main(parser: str, runs: str) -> None:
    """Fuzz one parser, beginning from a whole set's files."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = write_base(root)
        corpus = root / "corpus"
        corpus.mkdir()
        names = ["manifest.json"] if parser == "manifest" else ["generate.safetensors"]
        for name in names:
            (corpus / name).write_bytes((base / name).read_bytes())
        fuzz = _fuzz_manifest if parser == "manifest" else _header_fuzzer(root)
        options = [
            f"-runs={runs}",
            "-max_len=65536",
            "-rss_limit_mb=4096",
            "-timeout=30",
            "-seed=1",
        ]
        atheris.Setup([sys.argv[0], *options, str(corpus)], fuzz)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
