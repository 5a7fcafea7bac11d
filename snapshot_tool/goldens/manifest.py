"""manifest.json: everything about a golden set but the numbers themselves.

The schema is these classes; `docs/golden-format.md` explains it. msgspec validates on reading:
types, ranges and patterns, and refuses unknown fields. A manifest may be a stranger's: what it says
is bounded here, and `_require_consistent` compares its parts.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound, ManifestInvalid
from snapshot_tool.base.files import (
    MAX_JSON_BYTES,
    file_size,
    leaves_root,
    open_plain,
    require_bounded_json,
)
from snapshot_tool.base.protocol import Phase
from snapshot_tool.base.recipes import NamedRecipe
from snapshot_tool.base.tolerance import PhaseTolerance
from snapshot_tool.families.family import FILE
from snapshot_tool.goldens.layout import MANIFEST, SetLocation

# 2: generate has step_logsumexp, and 20 greatest logits are kept, not 8.
SCHEMA_VERSION = 2

# \Z, not $: $ also matches before a newline at the end.
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Revision = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})\Z")]
CheckpointName = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*\Z")
]
CaseName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]*\Z", max_length=64)]
# JSON readers keep integers exactly up to 2**53.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
TokenId = Annotated[int, msgspec.Meta(ge=-1, le=2**31)]
TensorKey = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]*/[A-Za-z0-9_.-]+\Z", max_length=200)
]
# Printed as it is: no control characters, no line ends, no marks that turn text.
Text = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]*\Z",
        max_length=20_000,
    ),
]
Device = Annotated[str, msgspec.Meta(pattern=r"^(cpu|cuda)\Z")]
Dtype = Annotated[str, msgspec.Meta(pattern=r"^(float32|float64|bfloat16|float16)\Z")]
# A file inside the checkpoint's folder or the set: no absolute path, no way up.
RelativePath = Annotated[
    str, msgspec.Meta(pattern=r"(?s)^(?!/)(?!.*(^|/)\.\.(/|\Z))[^\\\x00]+\Z", max_length=512)
]


# safetensors' own names.
DtypeLetters = Literal[
    "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "I16", "U16", "F16", "BF16",
    "I32", "U32", "F32", "I64", "U64", "F64",
]  # fmt: skip


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of manifest.json."""


class TensorEntry(Entry, frozen=True, gc=False):
    """One tensor: its shape, its dtype and the digest of its bytes."""

    # Nine tenths of a manifest are these. A pattern for each digest doubled the time to read it.
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]
    dtype: DtypeLetters
    sha256: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]


class FileEntry(Entry, frozen=True):
    """One safetensors file of the set and the tensors in it, by key."""

    size: Count
    sha256: Digest
    tensors: dict[TensorKey, TensorEntry]


class CheckpointEntry(Entry, frozen=True):
    """The weights that were run.

    `location` is a folder's path relative to the goldens folder's parent; None for the hub and for
    folders elsewhere. `config` is the reference's own configuration with all defaults.
    `unknown_fields` are those of config.json that the reference's class does not have,
    `changed_fields` those that differ from what the class makes of all others, `unused_weights` the
    names of weights in the files that no output depends on.
    """

    name: CheckpointName
    revision: Revision
    family: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]+\Z", max_length=64)]
    location: RelativePath | None
    files: dict[RelativePath, Digest]
    config: dict[str, Any]
    unknown_fields: tuple[Text, ...] = ()
    changed_fields: tuple[Text, ...] = ()
    unused_weights: tuple[Text, ...] = ()


class HistoryEntry(Entry, frozen=True):
    """Why a golden version came to be: the day (UTC), the reason given, and what moved.

    `snap` is the version of snap that recorded it; `command` records the same again.
    """

    version: Positive
    when: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")]
    reason: Text
    moved: tuple[Text, ...]
    snap: Text = ""
    command: Text = ""


class Draws(Entry, frozen=True):
    """How many variants were requested, and how many inputs the reference refused, by reason.

    `left_out` has the cases that are missing because the reference refuses them, and why.
    """

    variants: Count
    refused: Count
    reasons: dict[Text, Count]
    left_out: dict[CaseName, Text] = {}


class CaseEntry(Entry, frozen=True):
    """One case: its recipe, the text that was tokenized, and what applies to it.

    `eos_token_ids` end this case's generation in place of the set's; None for those of the set.
    `not_finite` names the recorded outputs that contain NaN or Inf, as phase/tensor.
    """

    name: CaseName
    origin: Text
    recipe: Any  # decoded in two steps, so that recipes validate themselves: see `case_recipe`
    text: str
    phases: tuple[Phase, ...]
    images: Count
    tiles: Count
    tokens: Count
    generated: str
    eos_token_ids: tuple[TokenId, ...] | None = None
    not_finite: tuple[Text, ...] = ()


class GenerationEntry(Entry, frozen=True):
    """How greedy tokens were made."""

    max_new_tokens: Positive
    eos_token_ids: tuple[TokenId, ...]
    pad_token_id: TokenId


class TapsEntry(Entry, frozen=True):
    """What `taps.safetensors` sketches: the reference's modules, in order of execution."""

    seed: Count
    modules: tuple[Text, ...]


class Storage(StrEnum):
    """Whether large tensors are kept whole, or in the form of `numerics/compact.py`."""

    FULL = "full"
    COMPACT = "compact"


class Manifest(Entry, frozen=True):
    """The whole of manifest.json.

    `warnings` are those of Hugging Face's libraries while the set was recorded.
    """

    schema_version: Annotated[int, msgspec.Meta(ge=1, le=SCHEMA_VERSION)]
    golden_version: Positive
    history: tuple[HistoryEntry, ...]
    checkpoint: CheckpointEntry
    device: Device
    dtype: Dtype
    seed: Count
    environment: dict[Text, Text]
    draws: Draws
    generation: GenerationEntry
    cases: tuple[CaseEntry, ...]
    tolerances: dict[Phase, PhaseTolerance]
    taps: TapsEntry
    files: dict[str, FileEntry]
    storage: Storage = Storage.FULL
    warnings: tuple[Text, ...] = ()

    @property
    def title(self) -> str:
        """The set's name for messages."""
        return f"{self.location(Path())}, golden version {self.golden_version}"

    def location(self, root: Path) -> SetLocation:
        """Return where the set belongs below a goldens folder."""
        checkpoint = self.checkpoint
        return SetLocation(root, checkpoint.name, checkpoint.revision, self.device, self.dtype)

    @property
    def reference_warnings(self) -> tuple[str, ...]:
        """Each warning and where it comes from."""
        return tuple(f"transformers warned: {text}" for text in self.warnings)

    def eos_token_ids(self, case: CaseEntry) -> tuple[int, ...]:
        """Return the tokens that end a case's generation."""
        own = case.eos_token_ids
        return self.generation.eos_token_ids if own is None else own


def case_recipe(case: CaseEntry) -> NamedRecipe:
    """Return a case's recipe; raise ManifestInvalid if it is not valid."""
    try:
        fields = {"name": case.name, "origin": case.origin, "recipe": case.recipe}
        return msgspec.convert(fields, NamedRecipe)
    except (msgspec.ValidationError, ValueError) as error:
        raise ManifestInvalid(f"case {case.name}: its recipe is invalid: {error}") from error


# What rounds differently; versions of tools that compute nothing are left out.
_ROUNDS = ("processor", "torch", "torch_threads", "pillow", "numpy", FILE)


def environment_differences(
    recorded: Mapping[str, str], here: Mapping[str, str]
) -> tuple[str, ...]:
    """Return "name was, is" for everything that may round differently than when recording."""

    def short(value: str) -> str:
        return value[:12] if re.fullmatch(r"[0-9a-f]{64}", value) else value  # a digest

    return tuple(
        f"{name} {short(recorded[name])}, here {short(here[name])}"
        for name in _ROUNDS
        if name in recorded and name in here and recorded[name] != here[name]
    )


def encode(value: msgspec.Struct | Mapping[str, Any]) -> bytes:
    """Return JSON with sorted keys and an indent of two: the same bytes for the same content."""
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n"


def encode_readable(manifest: Manifest) -> bytes:
    """Return a manifest as `encode` does; raise ManifestInvalid if it is too large to be read."""
    data = encode(manifest)
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"it has {len(data)} bytes, allowed are {MAX_JSON_BYTES}")
        return require_bounded_json(data)
    except ValueError as error:
        raise ManifestInvalid(
            f"the manifest of {len(manifest.cases)} cases is too large to be read: {error}",
            "record fewer --variants, or without --oracle",
        ) from error


class _SchemaOnly(msgspec.Struct):
    """The one field that every schema has."""

    schema_version: Positive


def decode(data: bytes, *, source: Path) -> Manifest:
    """Return the manifest; raise ManifestInvalid, naming the field, if it breaks the schema."""
    try:
        require_bounded_json(data)
        try:
            manifest = msgspec.json.decode(data, type=Manifest)
        except msgspec.ValidationError:
            # A newer schema may have changed anything but this one field.
            written = msgspec.json.decode(data, type=_SchemaOnly).schema_version
            if written <= SCHEMA_VERSION:
                raise
            raise ManifestInvalid(
                f"{source} follows manifest schema {written}, this snap reads {SCHEMA_VERSION}",
                "update snap to read it",
            ) from None
        _require_consistent(manifest)
    except (RecursionError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise ManifestInvalid(
            f"{source} is not a valid manifest: {error}",
            "restore it from version control, or record the set again with --update",
        ) from error
    return manifest


def _require_consistent(manifest: Manifest) -> None:
    """Raise ValueError if parts of a manifest contradict each other."""
    names = Counter(case.name for case in manifest.cases)
    if len(names) < len(manifest.cases):
        name, times = names.most_common(1)[0]
        raise ValueError(f"case {name} is there {times} times")
    for case in manifest.cases:
        images = len(case_recipe(case).recipe.images)
        if images != case.images:
            raise ValueError(f"case {case.name} has {case.images} images and a recipe of {images}")
        for phase in case.phases:
            if phase not in manifest.tolerances:
                raise ValueError(f"case {case.name} has phase {phase}, which has no tolerance")
    for file, entry in manifest.files.items():
        for key in entry.tensors:
            if key.partition("/")[0] not in names:
                raise ValueError(f"{file} has tensor {key} of no case")


def load_manifest(folder: Path) -> Manifest:
    """Read and validate a set's manifest."""
    path = folder / MANIFEST
    if leaves_root(path, folder):
        raise GoldenDamaged(f"{path} is a link out of the golden set")
    if not os.path.lexists(path):
        raise GoldenNotFound(
            f"{path} is missing", "restore it from version control, or record the set again"
        )
    with open_plain(path) as file:
        if file_size(file) > MAX_JSON_BYTES:
            raise ManifestInvalid(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        try:
            data = file.read()
        except OSError as error:
            raise GoldenDamaged(f"{path} cannot be read: {error.strerror}") from error
    return decode(data, source=path)
