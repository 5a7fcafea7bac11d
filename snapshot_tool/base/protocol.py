"""What a candidate and a reference must offer, and what they are given.

The phases of a run, and the paths on which FMS runs, are declared here, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from snapshot_tool.base.errors import PhaseUnsupported, UsageError

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Phase(StrEnum):
    """One stage of a run, whose output is recorded and compared on its own."""

    PREPROCESSING = "preprocessing"
    VISION = "vision"
    CONNECTOR = "connector"
    FORWARD = "forward"
    GENERATE = "generate"


PHASES: tuple[Phase, ...] = tuple(Phase)

# What a model does only for some inputs, besides its phases: `snap check --require` takes both.
END_TOKEN, ALL_END_TOKENS = "end-token", "all-end-tokens"
WINDOW, ROPE = "sliding-window", "rope-length"
LEFT, RIGHT, TOKEN_TYPES = "left-padding", "right-padding", "token-types"
COVERAGE_NAMES = (END_TOKEN, ALL_END_TOKENS, WINDOW, ROPE, LEFT, RIGHT, TOKEN_TYPES)


def phase_order(phase: Phase) -> int:
    """Return the phase's place in the order of execution, from 0."""
    return PHASES.index(phase)


def named_phases(names: Collection[str]) -> tuple[Phase, ...]:
    """Return the phases that are named, in the order of execution; "all" names all of them."""
    return tuple(phase for phase in PHASES if "all" in names or phase in names)


class Side(StrEnum):
    """Whether a tensor is an input of a module or an output."""

    INPUT = "input"
    OUTPUT = "output"


# Called with a module's name and its first input or output, which may change afterwards. A tensor
# that it returns takes its place.
Observer = Callable[[str, Side, "torch.Tensor"], "torch.Tensor | None"]


@dataclass(frozen=True, slots=True)
class CaseInputs:
    """What a prompt and its images became; the same for the reference and the candidate.

    Args:
        input_ids: (1, length) int64.
        attention_mask: (1, length) int64; 0 marks padding.
        pixel_values: (tiles, channels, height, width) float32, the tiles of all images in order;
            None without images.
        pixel_attention_mask: (tiles, height, width) bool, False at the padding of a tile; None
            without images.
        image_sizes: (images, 2) int64, height and width in pixels, for families that use the
            sizes of their images; None for others.
        token_type_ids: (1, length) int64, 1 for each token of the second of two texts; None if
            there is one text, or the family has no token types.
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


class PathKind(StrEnum):
    """How FMS runs a model.

    eager: as it is written, prompts as they are.
    static: prompts padded on the left to a multiple of 64 tokens.
    compiled: the same, compiled by torch.compile.
    paged: with paged attention.
    chunked: the same, with prompts in chunks.
    """

    EAGER = "eager"
    STATIC = "static"
    COMPILED = "compiled"
    PAGED = "paged"
    CHUNKED = "chunked"


_PATH = re.compile(r"eager|static|compiled(:\w+)?|paged|chunked(:[1-9]\d{0,5})?")
_DEFAULTS = {PathKind.COMPILED: "inductor", PathKind.CHUNKED: "64"}


@dataclass(frozen=True, slots=True)
class ExecutionPath:
    """A path; `argument` is the backend of a compiled one, the tokens of a chunk, or ""."""

    kind: PathKind = PathKind.EAGER
    argument: str = ""

    def __str__(self) -> str:
        """Return its name."""
        return f"{self.kind}:{self.argument}" if self.argument else str(self.kind)


EAGER = ExecutionPath()


def parse_path(text: str) -> ExecutionPath:
    """Return the path with a name; raise UsageError for an unknown one."""
    if _PATH.fullmatch(text) is None:
        raise UsageError(
            f"--path {text} is not a valid path",
            "valid paths: eager, static, compiled[:BACKEND], paged, chunked[:N]",
        )
    name, _, argument = text.partition(":")
    kind = PathKind(name)
    return ExecutionPath(kind, argument or _DEFAULTS.get(kind, ""))


@dataclass(frozen=True, slots=True)
class CandidateRequest:
    """What a candidate is built from.

    Args:
        checkpoint: folder with config.json and the weights.
        config: the reference's complete configuration, defaults filled in, as recorded.
        device: "cpu" or "cuda".
        dtype: a torch dtype's name, e.g. "float32".
        loading: who maps the configuration and loads the weights; it concerns only FMS.
        changed_fields: of the configuration, those that its class does not derive from the others.
        unused_weights: of the checkpoint, those that no output of the reference depends on.
        needs_weights: whether the model runs; False: only preprocessing does, and the folder may
            lack the weights.
        path: the name of the path on which FMS runs.
    """

    checkpoint: Path
    config: Mapping[str, Any]
    device: str
    dtype: str
    loading: Loading = Loading.SNAP
    changed_fields: tuple[str, ...] = ()
    unused_weights: frozenset[str] = frozenset()
    needs_weights: bool = True
    path: str = "eager"


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """A field that FMS's own mapping of a configuration fills with another value.

    Args:
        field: its dotted name in FMS's configuration.
        actual: what FMS's mapping fills it with.
        expected: what it should be.
        sources: the fields of Hugging Face's configuration that it is made from.
        harmless: whether it has no effect on numbers if the weights fit.
    """

    field: str
    actual: str
    expected: str
    sources: tuple[str, ...]
    harmless: bool = False

    def __str__(self) -> str:
        """Return it as a sentence."""
        source = f", from Hugging Face's {', '.join(self.sources)}" if self.sources else ""
        return f"FMS's own mapping has {self.field} {self.actual}, expected {self.expected}{source}"


@dataclass(frozen=True, slots=True)
class CandidateInfo:
    """Which implementation ran: the path of its code, its commit, and notes.

    `mapping` is how FMS's own mapping of the configuration differs, with Loading.OWN. `changed` are
    the files that make the checkout dirty.
    """

    name: str
    path: str = ""
    version: str = ""
    commit: str = ""
    dirty: bool | None = None
    notes: tuple[str, ...] = ()
    loading: Loading = Loading.SNAP
    mapping: tuple[FieldDifference, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightPair:
    """A weight of a candidate and the checkpoint's.

    Args:
        name: the candidate's name of it.
        expected: the checkpoint's, laid out as the candidate lays it out, in any dtype.
        actual: the candidate's own; None if it has none by this name.
        modules: returns the reference's modules that it belongs to, if they are known; called only
            for weights that differ.
    """

    name: str
    expected: torch.Tensor
    actual: torch.Tensor | None
    modules: Callable[[], tuple[str, ...]] = tuple


KeepOutputs = Callable[[str], AbstractContextManager[None]]


def keep_nothing(_case: str) -> AbstractContextManager[None]:
    """Return a context in which every output is computed; see `Candidate.output_cache`."""
    return nullcontext()


class Candidate:
    """The implementation under test. Every method is optional: override those that it has.

    A method that is not overridden is not supported. It raises PhaseUnsupported unless it has a
    default. Methods run under torch.inference_mode. A phase (preprocess, vision, connector,
    forward, generate) that raises PhaseUnsupported is skipped with that reason. Any other exception
    makes the phase of that case an error; the rest still runs.
    """

    def supports(self, method: str) -> bool:
        """Return whether the candidate has its own method of this name."""
        own = getattr(self, method)
        return callable(own) and getattr(own, "__func__", None) is not getattr(Candidate, method)

    def info(self) -> CandidateInfo:
        """Return which implementation this is."""
        _raise_unsupported("info")

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        """Return `pixel_values` (tiles, channels, height, width) float32.

        If tiles are padded, return `pixel_attention_mask` (tiles, height, width) bool, too.
        """
        _raise_unsupported("preprocess")

    def vision(
        self, pixel_values: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """Return the connector's input, for idefics3 (tiles, patches, vision width).

        `image_sizes` is passed only for families whose inputs have them. An encoder with a head
        returns by name `last_hidden_state` and `pooler_output` (images, width).
        """
        _raise_unsupported("vision")

    def connector(
        self, features: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tokens of the text model, for idefics3 (tiles, tokens, text width)."""
        _raise_unsupported("connector")

    def forward(self, inputs: CaseInputs) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """Return the logits of every position, (1, length, vocabulary).

        For encoders, return by name what their family compares: `last_hidden_state` (1, length,
        width), and `logits` or the other outputs of the head.
        """
        _raise_unsupported("forward")

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Return the greedy new tokens, (new,) int64, the end token included."""
        _raise_unsupported("generate")

    def forward_batch(
        self, rows: Sequence[CaseInputs]
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """Return the logits of several prompts at once, (rows, length, vocabulary).

        The rows are padded to one length, on the left for decoders. An encoder returns what its
        forward returns, with a row for each prompt.
        """
        _raise_unsupported("forward_batch")

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Sequence[torch.Tensor]:
        """Return each row's greedy new tokens, (new,) int64, up to and including its end token."""
        _raise_unsupported("generate_batch")

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of every position of all parts, (1, length, vocabulary).

        Each part runs on the key-value cache of those before it. A part has its own ids and tiles;
        its attention_mask is of all parts up to its end.
        """
        _raise_unsupported("forward_in_parts")

    def cache_layout(self, *, chunk: int, order: int) -> AbstractContextManager[None]:
        """Return a context in which forward and generate use another layout of a paged cache.

        chunk: tokens of a prompt that are run at once. order: seed of the order of the blocks.
        """
        _raise_unsupported("cache_layout")

    def weights(self) -> Iterator[WeightPair]:
        """Yield every weight of the checkpoint beside the candidate's own, as it is now."""
        _raise_unsupported("weights")

    def unset_weights(self) -> Sequence[str]:
        """Return the names of weights that the checkpoint does not fill.

        Each must have been filled with NaN. By default there are none.
        """
        return ()

    def modules(self) -> torch.nn.Module:
        """Return the module that holds all those that run in forward.

        Which of them is which module of the reference is inferred.
        """
        _raise_unsupported("modules")

    def observe_forward(self, inputs: CaseInputs, observe: Observer) -> Mapping[str, str]:
        """Run forward and call `observe` with each module's input and output.

        Modules have the reference's names there, and tensors the reference's layout. A tensor that
        `observe` returns takes the place of the one that it was given: `--isolate` needs that.
        Return the candidate's own name of each module, by the reference's name.
        """
        _raise_unsupported("observe_forward")

    def run_module(self, module: str, given: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Run one module by itself; return its own name and its output, None if there is none.

        module: the reference's name. given: its input; the output is as the reference has it.
        """
        _raise_unsupported("run_module")

    def graft(self, module: str, output: torch.Tensor) -> AbstractContextManager[str]:
        """Return a context in which a module returns `output`; it yields the module's own name.

        module: the reference's name. output: as the reference lays it out.
        Raises CandidateUnavailable if there is no such module.
        """
        _raise_unsupported("graft")

    def twin_outputs(self, module: str, output: object) -> Mapping[str, torch.Tensor]:
        """Return the outputs of the reference's modules in the output of one of the candidate's.

        By the reference's name and as the reference lays them out; by default there are none.
        """
        return {}

    def output_cache(self) -> KeepOutputs:
        """Return a function that opens a context for a case, for one check.

        Inside of it, what was computed for the case on the same input, bit for bit, need not be
        computed again. By default nothing is kept.
        """
        return keep_nothing


CANDIDATE_METHODS = tuple(
    name for name in vars(Candidate) if not name.startswith("_") and name != "supports"
)


def _raise_unsupported(method: str) -> NoReturn:
    raise PhaseUnsupported(f"the candidate has no method {method!r}")


# What `--candidate module:factory` names: it returns a Candidate, or an object with its methods.
CandidateFactory = Callable[[CandidateRequest], object]


@dataclass(frozen=True, slots=True)
class PreparedCase:
    """A case as the reference's processor made it.

    Args:
        text: the tokenizer's input, before image placeholders were expanded.
        inputs: the tensors.
        image_grids: (images, 2) int64, rows and columns of tiles of each image; zeros for an image
            that stayed whole.
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
    """

    token_ids: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One run from end to end.

    Args:
        outputs: per phase (vision, connector, forward) the tensors to keep whole.
        logits: (length, vocabulary), of the continuation's tokens too if there is one; None for
            families without logits of every position.
    """

    outputs: Mapping[Phase, Mapping[str, torch.Tensor]]
    logits: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """What a manifest says of the reference; `modules` in order of definition.

    unknown_fields: of config.json, those that the reference's class does not have.
    changed_fields: of the configuration, those that its class does not derive from the others.
    unused_weights: of the checkpoint, those that no output depends on.
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


class Progress:
    """How a workflow reports its progress: not at all, unless a subclass does."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Iterator[int]]:
        """Open a stage of `total` steps; calling next() on what it yields counts one."""
        yield count(1)

    def now(self, what: str) -> None:
        """Report what the current step of the stage is about."""

    def note(self, message: str) -> None:
        """Print one line for the user."""
