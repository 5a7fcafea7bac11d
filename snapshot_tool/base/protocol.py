"""The seams between the parts: what a reference and a candidate must offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.recipes import CaseRecipe
from snapshot_tool.base.tap import Side

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, slots=True)
class CaseInputs:
    """What a prompt and its images became; the same for the reference and the candidate.

    Args:
        input_ids: (1, length) int64.
        attention_mask: (1, length) int64; 0 marks padding.
        pixel_values: (tiles, channels, height, width) float32, the tiles of all images in order;
            None without images.
        pixel_attention_mask: (tiles, height, width) bool, False where a tile is padded; None
            without images.
        image_sizes: (images, 2) int64, height and width in pixels, for families that are told the
            sizes of their images; None for others.
        token_type_ids: (1, length) int64, 1 for each token of the second of two texts; None if
            there is one text, or the family does not tell them apart.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor | None = None
    pixel_attention_mask: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None


class Loading(StrEnum):
    """How FMS's model is loaded.

    snap: with snap's mapping of the configuration, without transformers.
    own: by FMS's get_model("hf_pretrained"), which imports transformers.
    """

    SNAP = "snap"
    OWN = "own"


@dataclass(frozen=True, slots=True)
class CandidateRequest:
    """What a candidate is built from.

    Args:
        checkpoint: folder with config.json and the weights.
        config: the reference's complete configuration, defaults filled in, as recorded.
        device: "cpu" or "cuda".
        dtype: a torch dtype's name, e.g. "float32".
        loading: who maps the configuration and loads the weights; it concerns FMS alone.
        changed_fields: of the configuration, which are not what its class makes of all others.
        unused_weights: of the checkpoint, which take part in no answer of the reference.
    """

    checkpoint: Path
    config: Mapping[str, Any]
    device: str
    dtype: str
    loading: Loading = Loading.SNAP
    changed_fields: tuple[str, ...] = ()
    unused_weights: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """A field that FMS's own mapping of a configuration fills otherwise than it should be.

    Args:
        field: its dotted name in FMS's configuration.
        actual: what FMS's mapping made of it.
        expected: what it should be.
        sources: the fields of Hugging Face's configuration that it is made from.
        harmless: whether it has no effect on numbers where the weights fit.
    """

    field: str
    actual: str
    expected: str
    sources: tuple[str, ...]
    harmless: bool = False

    def __str__(self) -> str:
        """Say it in a sentence."""
        source = f", from Hugging Face's {', '.join(self.sources)}" if self.sources else ""
        return f"FMS's own mapping has {self.field} {self.actual}, expected {self.expected}{source}"


@dataclass(frozen=True, slots=True)
class CandidateInfo:
    """Which implementation ran: where its code is, at which commit, with what in its process.

    `mapping` is how FMS's own mapping of the configuration differs, with Loading.OWN.
    """

    name: str
    path: str = ""
    version: str = ""
    commit: str = ""
    dirty: bool | None = None
    notes: tuple[str, ...] = ()
    loading: Loading = Loading.SNAP
    mapping: tuple[FieldDifference, ...] = ()


class Candidate(Protocol):
    """The implementation under test: one method per phase, called under torch.inference_mode.

    A phase whose method is missing, or raises PhaseUnsupported, is a skip with that reason. Any
    other exception makes the phase of that case an error; the rest still runs.
    """

    def info(self) -> CandidateInfo:
        """Say which implementation this is."""

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        """Return pixel_values (tiles, channels, height, width) and, where padded, its mask."""

    def vision(
        self, pixel_values: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """Return what the connector is given, of idefics3 (tiles, patches, vision width).

        `image_sizes` is passed only for families whose inputs have them. An encoder with a head
        returns by name `last_hidden_state` and `pooler_output` (images, width).
        """

    def connector(
        self, features: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tokens of the text model, of idefics3 (tiles, tokens, text width)."""

    def forward(self, inputs: CaseInputs) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """Return the logits of every position, (1, length, vocabulary).

        For encoders, return by name what their family compares: `last_hidden_state` (1, length,
        width), and `logits` or what else the head gives.
        """

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Return the greedy new tokens, (new,) int64, the end token included."""


class Batched(Protocol):
    """A candidate that runs several prompts at once; rows are padded on the left to one length."""

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of every position, (rows, length, vocabulary)."""

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Sequence[torch.Tensor]:
        """Return each row's greedy new tokens, (new,) int64, up to its own end token, included."""


class Cached(Protocol):
    """A candidate that prefills a prompt in parts, each on the key-value cache of the others."""

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of every position of all parts, (1, length, vocabulary).

        A part has its own ids and tiles; its attention_mask is of all parts up to its end.
        """


@dataclass(frozen=True, slots=True)
class WeightPair:
    """A weight of a candidate and what the checkpoint has for it.

    Args:
        name: the candidate's name of it.
        expected: the checkpoint's, laid out as the candidate lays it out, in any dtype.
        actual: the candidate's own; None where it has none by this name.
        modules: returns the reference's modules that it belongs to, where they are known; it is
            asked of weights that differ.
    """

    name: str
    expected: torch.Tensor
    actual: torch.Tensor | None
    modules: Callable[[], tuple[str, ...]] = tuple


class Weighted(Protocol):
    """A candidate that shows its weights: what no recorded input uses can then be judged, too."""

    def weights(self) -> Iterator[WeightPair]:
        """Yield every weight of the checkpoint beside the candidate's own, as it is now."""


class Incomplete(Protocol):
    """A candidate that may have weights which the checkpoint does not fill."""

    def unset_weights(self) -> Sequence[str]:
        """Return the candidate's names of them; each has been filled with NaN."""


class Observable(Protocol):
    """A candidate that can be looked into: needed to name the module that a fault is in."""

    def observe_forward(self, inputs: CaseInputs, observe: Observer) -> Mapping[str, str]:
        """Run forward, showing each module's input and output under the reference's names.

        Returns the candidate's own name of each module, by the reference's name. What the two
        implementations lay out differently is shown as the reference lays it out.
        """


class Inspectable(Protocol):
    """A candidate whose modules can be seen, under its own names: which is which is inferred."""

    def modules(self) -> torch.nn.Module:
        """Return the module that holds all those that run in forward."""


class Graftable(Protocol):
    """A candidate in which a module's output can be replaced, to prove where a fault is."""

    def graft(self, module: str, output: torch.Tensor) -> AbstractContextManager[str]:
        """Let a module, by the reference's name, return `output` while the context is open.

        output: as the reference lays it out. Yields the candidate's own name of the module; raises
        CandidateUnavailable for one that it does not have.
        """


class Serving(Protocol):
    """What a module of a candidate returned in one phase, kept for those after it."""

    def serving(self, case: str) -> AbstractContextManager[None]:
        """Return what was computed on the same input, bit for bit, inside the block.

        case: the one that is run; what others computed is forgotten.
        """


class Caching(Protocol):
    """A candidate whose phases need not compute what another phase of the same case did."""

    def output_cache(self) -> Serving | None:
        """Return an empty cache for one check, or None if nothing can be kept."""


class CandidateFactory(Protocol):
    """What `--candidate module:factory` names."""

    def __call__(self, request: CandidateRequest) -> Candidate:
        """Build the candidate."""


@dataclass(frozen=True, slots=True)
class PreparedCase:
    """A case as the reference's processor made it.

    Args:
        text: what the tokenizer was given, before image placeholders were expanded.
        inputs: the tensors.
        image_grids: (images, 2) int64, rows and columns of tiles of each image; zeros where an
            image stayed whole.
    """

    text: str
    inputs: CaseInputs
    image_grids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Generation:
    """Greedy generation.

    Args:
        token_ids: (new,) int64, without the prompt.
        logits: (new, vocabulary), the row that chose each token.
        text: the new tokens decoded.
    """

    token_ids: torch.Tensor
    logits: torch.Tensor
    text: str


class Observer(Protocol):
    """Shown what every named module is given, and what it returns, as they happen."""

    def __call__(self, module: str, side: Side, tensor: torch.Tensor) -> None:
        """Take what is needed of the tensor; it may change afterwards."""


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One run from end to end.

    Args:
        outputs: per phase (vision, connector, forward) the tensors to keep whole.
        logits: (length, vocabulary), of the continuation's tokens too where there is one; None for
            families without logits of every position.
    """

    outputs: Mapping[Phase, Mapping[str, torch.Tensor]]
    logits: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """What a manifest says of the reference that answered; `modules` in order of definition.

    unknown_fields: of config.json, which the reference's class does not know.
    changed_fields: of the configuration, which are not what its class makes of all others.
    unused_weights: of the checkpoint, which take part in no answer.
    """

    family: str
    phases: tuple[Phase, ...]
    config: Mapping[str, Any]
    environment: Mapping[str, str]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    modules: tuple[str, ...]
    unknown_fields: tuple[str, ...] = ()
    changed_fields: tuple[str, ...] = ()
    unused_weights: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How a reference is loaded.

    Args:
        device: "cpu" or "cuda".
        seed: of everything that could be drawn.
        trusts_code: run the Python files that the checkpoint brings along.
        device_map: accelerate's strategy of placing modules ("auto"); "": all on `device`.
        max_memory: the most that accelerate may place on a device, by its name: "0", "cpu".
        offload: the folder for what fits no device.
    """

    device: str
    seed: int
    trusts_code: bool = False
    device_map: str = ""
    max_memory: Mapping[str, str] = field(default_factory=dict)
    offload: Path | None = None


class Reference(Protocol):
    """The Hugging Face side, for one checkpoint on one device."""

    def info(self) -> ReferenceInfo:
        """Say what answers."""

    def prepare(
        self, recipe: CaseRecipe, images: Sequence[Image.Image], *, new_tokens: int = 0
    ) -> PreparedCase:
        """Tokenize and preprocess; raise InputRefused for what the reference does not take.

        new_tokens: how many tokens are to be generated after the prompt.
        """

    def forward(
        self,
        inputs: CaseInputs,
        *,
        observe: Observer,
        continuation: torch.Tensor | None = None,
        ask_connector: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> ForwardPass:
        """Run the model once, from ids and pixels to logits.

        continuation: (more,) int64, tokens that are run after the prompt, through its cache;
        modules are not shown to `observe` meanwhile.
        ask_connector: gives, for the encoder's own output, what the connector's answer is wanted
            for in its place.
        """

    def generate(
        self,
        inputs: CaseInputs,
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] | None = None,
    ) -> Generation:
        """Generate greedily up to one of the end tokens, by default the checkpoint's own."""

    def warnings(self) -> tuple[str, ...]:
        """Return what Hugging Face's libraries have warned of so far, each thing once, sorted."""

    def modules(self) -> torch.nn.Module:
        """Return the module that holds all others."""


class Progress(Protocol):
    """How a workflow says what it does; the command line draws it, tests may ignore it."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Iterator[int]]:
        """Open a stage of `total` steps; calling next() on what it yields counts one."""

    def now(self, what: str) -> None:
        """Say what the current step of the stage is about."""

    def note(self, message: str) -> None:
        """Say something that the user should know, on one line."""


class SilentProgress:
    """Satisfies the Progress protocol and says nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Iterator[int]]:
        """Count the steps."""
        yield count(1)

    def now(self, what: str) -> None:
        """Drop what a step is about."""

    def note(self, message: str) -> None:
        """Drop a note."""
