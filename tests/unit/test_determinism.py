"""What is fixed for the same numbers every time."""

from __future__ import annotations

import subprocess
import sys

_SETTLED = """
import sys
import torch
before = set(sys.modules)
from snapshot_tool.base.environment import make_deterministic
for strict in (False, True):
    settings = make_deterministic(1, strict=strict)
    print(torch.get_deterministic_debug_mode(), settings["deterministic_algorithms"])
new = set(sys.modules) - before
compiler = any(name.startswith(("torch._inductor", "torch._dynamo")) for name in new)
import torch._inductor.config as inductor
# torch 2.5 does not have the last one.
print(compiler, getattr(inductor, "deterministic", True))
"""


def test_algorithms_are_deterministic_without_importing_the_compiler() -> None:
    """A process of its own: torch imports a module once."""
    answer = subprocess.run(
        [sys.executable, "-c", _SETTLED], capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines() == ["1 true", "2 true", "False True"]
