"""What to record: which checkpoint, on which device, with which inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.phases import PHASES, Phase


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """The options of `snap record`.

    None for seed, variants, max_new_tokens and storage: as in the set that is replaced, or in one
    of the same revision on another device; else 42, 12, 20 and full. None for oracle, and no
    whole_outputs: as in the set that is replaced, else without.
    """

    checkpoint: str
    goldens: str | Path
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    phase: Sequence[str] = ()
    variants: int | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    oracle: bool | None = None
    whole_outputs: Sequence[str] = ()
    device_map: str | None = None
    max_memory: Sequence[str] = ()
    storage: str | None = None
    redraw: bool = False
    update: bool = False
    reason: str = ""
    resume: bool = False
    fresh: bool = False
    prompt: Sequence[str | Path] = ()
    long: Sequence[int] = ()
    drop_phase: Sequence[str] = ()
    allow_nan: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError for a value that an option does not take."""
        if self.max_memory and not self.device_map:
            raise UsageError("--max-memory goes with --device-map auto", "give both, or neither")
        for text in self.max_memory:
            if not re.fullmatch(r"(\d+|cpu)=\d+(\.\d+)?[KMG]i?B", text):
                raise UsageError(f"--max-memory {text} is no DEVICE=SIZE", "for example: cpu=64GiB")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases to record, in their order."""
        named = tuple(p for p in PHASES if "all" in self.phase or p in self.phase)
        return named or PHASES

    @property
    def dropped(self) -> tuple[Phase, ...]:
        """The phases that the new version does not have."""
        return tuple(phase for phase in PHASES if phase in self.drop_phase)

    @property
    def memory(self) -> dict[str, str]:
        """The memory limit of each device, by its name."""
        return {device: size for device, _, size in (t.partition("=") for t in self.max_memory)}

    def read_prompts(self) -> tuple[str, ...]:
        """Return the prompts of the files, each once; raise UsageError for an unreadable file."""
        prompts = [prompt for path in self.prompt for prompt in _read_prompts(Path(path))]
        return tuple(dict.fromkeys(prompts))


def _read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file: its lines, or the strings of a JSON list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        prompts = json.loads(text) if path.suffix == ".json" else re.split(r"\r?\n", text)
    except (OSError, ValueError) as error:
        raise UsageError(f"--prompt {path} cannot be read: {error}", "name a UTF-8 file") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(f"--prompt {path} is not a list of prompts", 'write ["first", "second"]')
    found = [prompt for prompt in prompts if prompt.strip()]
    if not found:
        raise UsageError(f"--prompt {path} has no prompts", "write one on each line")
    return found
