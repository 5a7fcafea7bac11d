"""manifest.json: everything about a golden set but the numbers themselves.

The schema is these classes; `docs/golden-format.md` explains it. msgspec validates on reading:
types, ranges and patterns, and refuses fields that the schema does not know. A manifest may be a
stranger's: what it says is bounded here, and `_require_consistent` sees that its parts agree.

Nine tenths of a manifest are its tensors. A folder of many sets is looked through by their heads,
which leave those out: reading one takes an eighth of the time. They are listed by their summaries,
which leave out all that is long, and see nothing of what is wrong in it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound, ManifestInvalid
from snapshot_tool.base.files import (
    MAX_JSON_BYTES,
    FileMissing,
    file_size,
    leaves_root,
    open_plain,
    require_bounded_json,
)
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.recipes import NamedRecipe
from snapshot_tool.base.tolerance import PhaseTolerance
from snapshot_tool.goldens.layout import MANIFEST

SCHEMA_VERSION = 1

_Kind = TypeVar("_Kind", bound="ManifestSummary")

# \Z, not $: $ also matches before a newline at the end.
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Revision = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})\Z")]
CheckpointName = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*\Z")
]
CaseName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]*\Z", max_length=64)]
# Up to 2**53 every number is one in any JSON reader, and far beyond what anything here counts.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
TokenId = Annotated[int, msgspec.Meta(ge=-1, le=2**31)]
TensorKey = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]*/[A-Za-z0-9_.-]+\Z", max_length=200)
]
# Printed as it stands: nothing that a terminal obeys, no line ends, no marks that turn text.
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


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """One tensor: its shape, its dtype in safetensors' letters (F32, I64 …), its bytes' digest."""

    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]
    dtype: Annotated[str, msgspec.Meta(pattern=r"^[A-Z0-9_]{2,12}\Z")]
    sha256: Digest


class FileHead(msgspec.Struct, frozen=True, kw_only=True):
    """One safetensors file of the set, whatever tensors are in it."""

    size: Count
    sha256: Digest


class FileEntry(FileHead, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One safetensors file of the set and the tensors in it, by key."""

    tensors: dict[TensorKey, TensorEntry]


class CheckpointEntry(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The weights that answered.

    `location` is where a folder lies, relative to the goldens folder's parent; None for the hub and
    for folders elsewhere. `config` is the reference's own configuration with all defaults.
    `unknown_fields` are those of config.json that the reference's class does not know,
    `changed_fields` those that are not what the class makes of all others,
    `unused_weights` the names of weights in the files that take part in no answer.
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


class HistoryEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Why a golden version came to be: the day (UTC), the reason given, and what moved."""

    version: Positive
    when: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")]
    reason: Text
    moved: tuple[Text, ...]


class Draws(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """How the variants came about: asked for, and how many inputs the reference refused, by why.

    `left_out` has the cases that there are none of, since the reference takes none, and why.
    """

    variants: Count
    refused: Count
    reasons: dict[Text, Count]
    left_out: dict[CaseName, Text] = {}


class CaseSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One case, whatever is in it."""

    name: CaseName


class CaseEntry(
    CaseSummary, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """One case: its recipe, the text that the tokenizer was given, and what applies to it.

    `eos_token_ids` end this case's generation in place of the set's; None for those of the set.
    `not_finite` names the recorded answers that have NaN or Inf in them, as phase/tensor.
    """

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


class GenerationEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How greedy tokens were made."""

    max_new_tokens: Positive
    eos_token_ids: tuple[TokenId, ...]
    pad_token_id: TokenId


class TapsEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `taps.safetensors` sketches: the reference's modules, in order of execution."""

    seed: Count
    modules: tuple[Text, ...]


class Storage(StrEnum):
    """Whether large tensors are kept whole, or in the compact form of `store/compact.py`."""

    FULL = "full"
    COMPACT = "compact"


class ManifestSummary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What tells a set from others, and how large it is: all of manifest.json but what is long.

    Passed over are what is in a case and in a file, the modules of the taps and the environment.
    """

    schema_version: Positive
    golden_version: Positive
    history: tuple[HistoryEntry, ...]
    checkpoint: CheckpointEntry
    device: Device
    dtype: Dtype
    seed: Count
    draws: Draws
    generation: GenerationEntry
    cases: tuple[CaseSummary, ...]
    tolerances: dict[Phase, PhaseTolerance]
    files: Mapping[str, FileHead]
    storage: Storage = Storage.FULL

    @property
    def title(self) -> str:
        """Name the set as people read it."""
        return (
            f"{self.checkpoint.name} at {self.checkpoint.revision[:12]} "
            f"({self.device}-{self.dtype}), golden version {self.golden_version}"
        )


class ManifestHead(
    ManifestSummary, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """All of manifest.json but its tensors.

    `warnings` are what Hugging Face's libraries warned of while the set was recorded.
    """

    environment: dict[Text, Text]
    cases: tuple[CaseEntry, ...]
    taps: TapsEntry
    warnings: tuple[Text, ...] = ()

    @property
    def reference_warnings(self) -> tuple[str, ...]:
        """Each warning, with where it comes from."""
        return tuple(f"transformers warned: {text}" for text in self.warnings)

    def eos_token_ids(self, case: CaseEntry) -> tuple[int, ...]:
        """Return the tokens that end a case's generation."""
        own = case.eos_token_ids
        return self.generation.eos_token_ids if own is None else own


class Manifest(
    ManifestHead, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The whole of manifest.json."""

    files: dict[str, FileEntry]


def case_recipe(case: CaseEntry) -> NamedRecipe:
    """Return a case's recipe; raise ManifestInvalid where it makes no case."""
    try:
        fields = {"name": case.name, "origin": case.origin, "recipe": case.recipe}
        return msgspec.convert(fields, NamedRecipe)
    except (msgspec.ValidationError, ValueError) as error:
        raise ManifestInvalid(f"case {case.name}: its recipe is invalid: {error}") from error


def to_builtins(value: object) -> Any:
    """Return a record as plain dictionaries, lists and strings."""
    return msgspec.to_builtins(value)


def encode(value: msgspec.Struct | Mapping[str, Any]) -> bytes:
    """Return JSON with sorted keys and an indent of two: the same bytes for the same content."""
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n"


def encode_readable(manifest: Manifest) -> bytes:
    """Return a manifest as `encode` does; raise ManifestInvalid where no reader would take it."""
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


def decode(data: bytes, *, source: Path) -> Manifest:
    """Return the manifest; raise ManifestInvalid, naming the field, where it breaks the schema."""
    manifest = _decode(data, Manifest, source=source)
    with _explained(source):
        _require_known_cases(manifest)
    return manifest


def _decode(data: bytes, kind: type[_Kind], *, source: Path) -> _Kind:
    with _explained(source):
        require_bounded_json(data)
        try:
            manifest = msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError:
            # A newer schema may have changed anything but this one field.
            written = msgspec.json.decode(data, type=_SchemaOnly).schema_version
            _require_known_schema(written, source)
            raise
        _require_known_schema(manifest.schema_version, source)
        if isinstance(manifest, ManifestHead):
            _require_consistent(manifest)
    return manifest


def _require_known_schema(written: int, source: Path) -> None:
    if written > SCHEMA_VERSION:
        raise ManifestInvalid(
            f"{source} follows manifest schema {written}, this snap knows {SCHEMA_VERSION}",
            "update snap to read it",
        )


@contextmanager
def _explained(source: Path) -> Iterator[None]:
    """Raise ManifestInvalid where what is written in `source` is no manifest."""
    try:
        yield
    except (msgspec.DecodeError, RecursionError, ValueError, UnicodeDecodeError) as error:
        raise ManifestInvalid(
            f"{source} is no valid manifest: {error}",
            "restore it from version control, or record the set again with --update",
        ) from error


def _require_consistent(manifest: ManifestHead) -> None:
    """Raise ValueError where parts of a manifest contradict each other."""
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


def _require_known_cases(manifest: Manifest) -> None:
    """Raise ValueError where a tensor belongs to no case."""
    known = {case.name for case in manifest.cases}
    for file, entry in manifest.files.items():
        for key in entry.tensors:
            if key.partition("/")[0] not in known:
                raise ValueError(f"{file} has tensor {key} of no case")


class _SchemaOnly(msgspec.Struct):
    """The one field that every schema has."""

    schema_version: Positive


def load_manifest(folder: Path) -> Manifest:
    """Read and validate a set's manifest."""
    path = folder / MANIFEST
    return decode(_read(path, folder), source=path)


def load_head(folder: Path) -> ManifestHead:
    """Read and validate the head of a set's manifest."""
    path = folder / MANIFEST
    return _decode(_read(path, folder), ManifestHead, source=path)


def load_summary(folder: Path) -> ManifestSummary:
    """Read and validate the summary of a set's manifest."""
    path = folder / MANIFEST
    return _decode(_read(path, folder), ManifestSummary, source=path)


def _read(path: Path, folder: Path) -> bytes:
    if leaves_root(path, folder):
        raise GoldenDamaged(f"{path} is a link out of the golden set")
    try:
        file = open_plain(path)
    except FileMissing as missing:
        if path.is_symlink():
            raise
        raise GoldenNotFound(
            missing.problem, "restore it from version control, or record the set again"
        ) from None
    with file:
        if file_size(file) > MAX_JSON_BYTES:
            raise ManifestInvalid(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        try:
            return file.read()
        except OSError as error:
            raise GoldenDamaged(f"{path} cannot be read: {error.strerror}") from error
