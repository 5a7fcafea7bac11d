"""`make aftu AFTU=DIR`: aiu-fms-testing-utils reads what `snap ask --format aftu` writes.

    python -m tests.families.aftu DIR

DIR is a clone of github.com/foundation-model-stack/aiu-fms-testing-utils.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from click.testing import CliRunner

from snapshot_tool.cli.commands import cli

VERSION = (0, 8, 1)
_PACKAGE = "aiu_fms_testing_utils"


def main() -> None:
    """Write, find the folder by their rule, read with their reader, and compare by their rule."""
    clone = Path(sys.argv[1])
    sys.path.insert(0, str(clone))
    if not (clone / _PACKAGE / "_version.py").exists():  # made when the package is built
        version = ModuleType(f"{_PACKAGE}._version")
        vars(version).update(version_tuple=VERSION, __version__="0.8.1")
        sys.modules[version.__name__] = version
    theirs = importlib.import_module(f"{_PACKAGE}.testing.validation")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "info")
        asked = CliRunner().invoke(cli, ["ask", "--format", "aftu", "--out", str(out)])
        assert asked.exit_code == 0, asked.output
        path = theirs.find_validation_info_path(
            str(out), "local/tiny-idefics3", 1, 64, 20, 0, "sdpa",
            aftu_version=VERSION, dtype="fp32",
        )  # fmt: skip
        assert path is not None, f"not where they look: {asked.output}"
        read = theirs.load_validation_information(path, "logits", 1)
        again = theirs.load_validation_information(path, "logits", 1)
    tokens, logits = read.get_info("tokens"), read.get_info("logits")
    assert [len(sentence) for sentence in tokens] == [84]
    assert theirs.validate_level_0(tokens, again.get_info("tokens")) == []
    difference = theirs.top_k_loss_calculator(20, lambda a, b: float((a - b).abs().mean()))
    figures = theirs.capture_level_1_metrics(logits, again.get_info("logits"), difference)
    assert len(figures) == 20
    assert all(figure == 0 for _, _, figure in figures)
    assert all(row.dtype == torch.float32 for sentence in logits for row in sentence)
    print(f"{_PACKAGE} reads {len(tokens)} prompts with {len(figures)} steps")


if __name__ == "__main__":
    main()
