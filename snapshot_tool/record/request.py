"""The request of a recording: checkpoint, device and inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from snapshot_tool.base.checkpoint import DEFAULT_CHECKPOINT
from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.options import (
    DEVICES,
    family_field,
    goldens_field,
    normalise_options,
    option,
)
from snapshot_tool.base.protocol import PHASES, Phase, named_phases
from snapshot_tool.base.tolerance import ORACLE_DTYPES

DEFAULT_SEED = 42
DEFAULT_VARIANTS = 12
DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """The options of `snap record`.

    If seed, variants, max_new_tokens or storage is None, its value is that of the set that is
    replaced, or of one of the same revision on another device, or the default of the help text. If
    oracle is None, or whole_outputs or modules are empty, it is that of the set that is replaced.
    """

    checkpoint: str = option(
        DEFAULT_CHECKPOINT, "Hub id, or a folder with config.json and weights."
    )
    goldens: str | Path = goldens_field()
    _: KW_ONLY
    revision: str | None = option(
        None,
        "Commit SHA of a hub checkpoint; a branch or tag is resolved to one, by default main. The "
        "revision of a folder is computed from its files; if given, it must match.",
    )
    device: str = option("cpu", "Device of the reference.", choices=DEVICES)
    dtype: str = option("float32", "Dtype of the reference.", choices=ORACLE_DTYPES)
    phase: Sequence[str] = option(
        (),
        "Phases to record, separated by commas.  [default: all]",
        commas=True,
        choices=("all", *PHASES),
    )
    variants: int | None = option(
        None, f"Number of inputs to draw.  [default: {DEFAULT_VARIANTS}]", limits=(0, 10_000)
    )
    seed: int | None = option(
        None, f"Seed of all draws.  [default: {DEFAULT_SEED}]", limits=(0, 2**31 - 1)
    )
    max_new_tokens: int | None = option(
        None, f"Number of greedy tokens.  [default: {DEFAULT_NEW_TOKENS}]", limits=(1, 100_000)
    )
    oracle: bool | None = option(
        None,
        "Also run the reference in float64 and half precision, and record its rounding errors.",
    )
    whole_outputs: Sequence[str] = option(
        (),
        "Cases for which to record the whole output of every module, for --graft.",
        commas=True,
        metavar="GLOB",
    )
    modules: Sequence[str] = option(
        (),
        "Cases of which to keep every module's input and output whole, for snap check --isolate.",
        commas=True,
        metavar="GLOB",
    )
    device_map: str | None = option(
        None,
        "Distribute the reference over GPUs, memory and disk with accelerate.",
        choices=("auto",),
    )
    max_memory: Sequence[str] = option(
        (),
        "With --device-map: memory limit of a GPU or the CPU, for example 0=20GiB or cpu=64GiB.",
        metavar="DEVICE=SIZE",
    )
    storage: str | None = option(
        None,
        "Store large tensors whole, or as sample, moments and signed sums.  [default: full]",
        choices=("full", "compact"),
    )
    family: Sequence[str] = family_field()
    redraw: bool = option(False, "Draw new variants instead of using the stored recipes.")
    update: bool = option(False, "Replace the golden set by a new version.")
    case: Sequence[str] = option(
        (),
        "With --update: cases whose new outputs are recorded; the others keep the old ones.",
        commas=True,
        metavar="GLOB",
    )
    reason: str = option("", "Reason of the change, for the history of the set.")
    resume: bool = option(False, "Continue an unfinished recording.")
    fresh: bool = option(False, "Delete an unfinished recording and start again.")
    prompt: Sequence[str | Path] = option(
        (),
        "Record more cases: each line of a text file is a prompt, with <image> for an image; a "
        "JSON file has a list of prompts.",
        metavar="FILE",
    )
    long: Sequence[int] = option(
        (),
        "Record one more case, with a prompt of at least N tokens.",
        limits=(1, 10_000_000),
        metavar="N",
    )
    drop_phase: Sequence[str] = option(
        (), "With --update: phases to remove from the set.", commas=True, choices=PHASES
    )
    allow_nan: bool = option(False, "Accept outputs with NaN or Inf.")
    trust_remote_code: bool = option(
        False, "Run the Python files of the checkpoint; the manifest records it."
    )

    def __post_init__(self) -> None:
        """Raise UsageError for a value that an option does not take."""
        normalise_options(self)
        if self.case and not self.update:
            raise UsageError("--case selects what an --update accepts", "add --update")
        if self.max_memory and not self.device_map:
            raise UsageError("--max-memory needs --device-map auto", "pass both, or neither")
        for text in self.max_memory:
            if not re.fullmatch(r"(\d+|cpu)=\d+(\.\d+)?[KMG]i?B", text):
                raise UsageError(
                    f"invalid --max-memory {text}: expected DEVICE=SIZE", "for example: cpu=64GiB"
                )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases to record, in their order."""
        return named_phases(self.phase) or PHASES

    @property
    def dropped(self) -> tuple[Phase, ...]:
        """The phases to remove from the set."""
        return named_phases(self.drop_phase)

    @property
    def memory(self) -> dict[str, str]:
        """The memory limit of each device, by its name."""
        return dict(text.split("=", 1) for text in self.max_memory)

    def read_prompts(self) -> tuple[str, ...]:
        """Return the distinct prompts of the files; raise UsageError for an unreadable file."""
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
