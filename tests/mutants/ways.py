"""Ways to run the unchanged port: each computes the same, by other steps or in another order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.backends import mkldnn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from snapshot_tool.base.protocol import CaseInputs, KeepOutputs
from snapshot_tool.candidates.fms import candidate as fms
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.families import family_of_config
from snapshot_tool.families.family import Family

ROOT = Path(__file__).parent.parent.parent
COMPACT = ROOT / "tests" / "compact-goldens"
OTHER = ROOT / "build" / "benign"
OTHER_CHECKPOINT = OTHER / "checkpoints" / "one-key-head"

Context = Callable[[], AbstractContextManager[Any]]
Function = Callable[..., Any]
OTHER_SHAPES = "a checkpoint of other shapes"
_CHUNK = 3
_NO_ORACLE = frozenset(("dtype",))


def _as_it_is(candidate: FmsCandidate) -> FmsCandidate:
    return candidate


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the unchanged port.

    Args:
        part: what it is about; a run takes one way for each part at most.
        kind: its row on the page.
        alter: changes the loaded port.
        within: entered around every call of the port.
        around: entered around the check, loading included.
        options: of the check.
        excludes: parts that it cannot be combined with.
        compiles: whether the port is compiled.
    """

    part: str
    kind: str
    alter: Callable[[FmsCandidate], FmsCandidate] = _as_it_is
    within: Context = nullcontext
    around: Context = nullcontext
    options: Mapping[str, Any] = field(default_factory=dict)
    excludes: frozenset[str] = frozenset()
    compiles: bool = False


class Replaced(TorchFunctionMode):
    """Calls other functions in the place of some of torch's."""

    def __init__(self, functions: Mapping[Function, Function]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes every operation on, as profilers and counters of operations do."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class AlteredCalls:
    """FMS's calls, some of them replaced, and each inside of contexts."""

    def __init__(self, calls: Any, contexts: Sequence[Context], **replaced: Function) -> None:
        self._calls = calls
        self._contexts = contexts
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        found = self._replaced.get(name) or getattr(self._calls, name)
        if not callable(found):
            return found

        def call(*given: Any, **named: Any) -> Any:
            with ExitStack() as stack:
                for context in self._contexts:
                    stack.enter_context(context())
                return found(*given, **named)

        return call


def with_calls(candidate: FmsCandidate, *contexts: Context, **replaced: Function) -> FmsCandidate:
    """Return a candidate whose calls run inside of contexts, or are replaced."""
    calls: Any = AlteredCalls(candidate.calls, contexts, **replaced)
    return replace(candidate, calls=calls)


# Threads and kernels.


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _without_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _kernel(backend: SDPBackend) -> AbstractContextManager[Any]:
    # Flash attention on a CPU refuses some masks: math computes these, as by default.
    return sdpa_kernel([backend, SDPBackend.MATH], set_priority=True)


def _in_place_of(*pairs: tuple[Function, Function]) -> Context:
    return functools.partial(Replaced, dict(pairs))


# Attention.


def _eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute attention step by step, as models did before torch had it in one call."""
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def _attention_by_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any
) -> torch.Tensor:
    heads = zip(*(torch.split(part, 1, dim=1) for part in (query, key, value)), strict=True)
    return torch.cat(
        [functional.scaled_dot_product_attention(*head, **rest) for head in heads], dim=1
    )


def _attention_in_float64(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any
) -> torch.Tensor:
    return _eager_attention(query.double(), key.double(), value.double(), **rest).to(query.dtype)


# Products of matrices.


def _columns_apart(
    given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    biases = [None] * _CHUNK if bias is None else bias.chunk(_CHUNK)
    parts = zip(weight.chunk(_CHUNK), biases, strict=False)
    return torch.cat([functional.linear(given, *part) for part in parts], dim=-1)


def _rows_apart(
    given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows = given.reshape(-1, given.shape[-1])
    found = torch.cat([functional.linear(part, weight, bias) for part in torch.split(rows, 7)])
    return found.view(*given.shape[:-1], -1)


def _sums_apart(
    given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    parts = zip(given.chunk(_CHUNK, -1), weight.chunk(_CHUNK, -1), strict=True)
    found = sum(part @ columns.T for part, columns in parts)
    return found if bias is None else found + bias  # type: ignore[return-value]


def _in_float64(
    given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    wide = functional.linear(
        given.double(), weight.double(), None if bias is None else bias.double()
    )
    return wide.to(given.dtype)


# Everything between the products.


def _written_gelu(given: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    if approximate == "none":
        return given * 0.5 * (1 + torch.erf(given * 0.5**0.5))
    inner = (2 / torch.pi) ** 0.5 * (given + 0.044715 * given**3)
    return 0.5 * given * (1 + torch.tanh(inner))


def _written_silu(given: torch.Tensor, inplace: bool = False) -> torch.Tensor:  # noqa: FBT001, FBT002 - torch's signature
    return given / (1 + torch.exp(-given))


_WRITTEN = _in_place_of(
    (functional.gelu, _written_gelu),
    (functional.silu, _written_silu),
    (torch.rsqrt, lambda given: 1 / torch.sqrt(given)),
)


# Weights, inputs and outputs.


@contextmanager
def _unfused_on_loading() -> Iterator[None]:
    with mock.patch.object(fms, "family_of_config", _unfused_family):
        yield


def _unfused_family(config: Mapping[str, Any]) -> Family:
    """Return the family with a configuration for unfused weights."""
    family = family_of_config(config)

    def unfused(config: Mapping[str, Any]) -> dict[str, Any]:
        fields = family.fms.config(config)
        parts = {n: {**fields[n], "fused_weights": False} for n in ("vision_config", "text_config")}
        return {**fields, **parts}

    return replace(family, fms=replace(family.fms, config=unfused))


def _unfused_in_memory(candidate: FmsCandidate) -> FmsCandidate:
    from fms.utils.fusion import apply_unfuse_weights

    apply_unfuse_weights(candidate.model)
    return candidate


def _by_columns(candidate: FmsCandidate) -> FmsCandidate:
    """Lay out every matrix by columns, as `weight = other.T` does."""
    for parameter in candidate.model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.T.contiguous().T
    return candidate


def _channels_last(candidate: FmsCandidate) -> FmsCandidate:
    candidate.model.vision_tower.to(memory_format=torch.channels_last)
    return _with_inputs(candidate, _in_channels_last)


def _in_channels_last(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _with_inputs(candidate: FmsCandidate, lay_out: Callable[[Any], Any]) -> FmsCandidate:
    """Lay out the inputs of encoder, connector and text model otherwise."""
    model = candidate.model

    def lay_out_first(_module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (lay_out(given[0]), *given[1:]) if given else given

    model.vision_tower.register_forward_pre_hook(lay_out_first)
    model.connector.register_forward_pre_hook(lay_out_first)
    return candidate


def _with_outputs(candidate: FmsCandidate, keep: Callable[[Any], Any]) -> FmsCandidate:
    """Return every phase's output in other memory."""

    def wrapped(name: str) -> Function:
        own = getattr(candidate.calls, name)
        return lambda *given, **named: keep(own(*given, **named))

    names = ("vision", "connector", "forward", "forward_batch")
    return with_calls(candidate, **{name: wrapped(name) for name in names})


def _reusing_memory(candidate: FmsCandidate) -> FmsCandidate:
    """Return outputs in memory that the next output of this shape overwrites."""
    kept: dict[torch.Size, torch.Tensor] = {}

    def keep(output: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(output.shape, torch.empty_like(output)).copy_(output)

    return _with_outputs(candidate, keep)


def _tiles_apart(candidate: FmsCandidate, tiles: int) -> FmsCandidate:
    encoder = candidate.model.vision_tower.base_model.encoder
    whole = encoder.forward

    def run(inputs_embeds: torch.Tensor, **keywords: Any) -> Any:
        parts = [
            whole(inputs_embeds=part, **keywords) for part in torch.split(inputs_embeds, tiles)
        ]
        return torch.cat([part[0] for part in parts]), ()

    encoder.forward = run
    return candidate


def _in_a_batch(candidate: FmsCandidate, rows: int) -> FmsCandidate:
    """Run each prompt, and each tile, as the last row of a batch."""
    calls: Any = candidate.calls

    def alike(run: Function) -> Function:
        def call(given: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = run(given.repeat(rows, *[1] * (given.dim() - 1)))
            return found[-len(given) :]

        return call

    def forward(inputs: CaseInputs) -> torch.Tensor:
        found: torch.Tensor = calls.forward_batch([inputs] * rows)
        return found[-1:]

    def generate(inputs: CaseInputs, **options: Any) -> Any:
        return calls.generate_batch([inputs] * rows, **options)[-1]

    return with_calls(
        candidate,
        vision=alike(calls.vision),
        connector=alike(calls.connector),
        forward=forward,
        generate=generate,
    )


# Hooks and compilers.


def _hooked(candidate: FmsCandidate, *, copies: bool) -> FmsCandidate:
    """Put hooks on every module, as profilers and quantisers do."""

    def before(_module: Any, _given: Any) -> None:
        return None

    def after(_module: Any, _given: Any, output: Any) -> Any:
        return output.clone() if copies and isinstance(output, torch.Tensor) else None

    for module in candidate.model.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    return candidate


class Compiled(FmsCandidate):
    """A candidate that serves several checks: all get the one output cache, which is traced."""

    def output_cache(self) -> KeepOutputs:
        """Return the one cache."""
        return self._cache

    @functools.cached_property
    def _cache(self) -> KeepOutputs:
        return super().output_cache()


def _compiled(candidate: FmsCandidate, names: Sequence[str], backend: str) -> FmsCandidate:
    modules = dict(candidate.model.named_modules())
    for name in names:
        modules[name].compile(backend=backend, dynamic=True)
    return Compiled(**{f.name: getattr(candidate, f.name) for f in fields(candidate)})


_EAGER_PARTS = frozenset(
    ("attention", "products", "elementwise", "inputs", "tiles", "batch", "hooks", "modes", "memory")
)
_PARTS_COMPILED = {
    "encoder and text model": ("vision_tower", "text_model.base_model"),
    "the connector": ("connector",),
    "text layers": tuple(f"text_model.base_model.layers.{n}" for n in range(3)),
}


def _attention(instead: Function) -> Way:
    context = _in_place_of((functional.scaled_dot_product_attention, instead))
    return Way("attention", "attention written out", within=context)


def _products(kind: str, instead: Function) -> Way:
    return Way("products", kind, within=_in_place_of((functional.linear, instead)))


def _inputs(kind: str, lay_out: Callable[[FmsCandidate], FmsCandidate]) -> Way:
    return Way("inputs", kind, alter=lay_out)


def _compiling(names: Sequence[str], backend: str) -> Way:
    return Way(
        "compiled",
        f"compiled {'as a whole' if names == ('',) else 'in part'}, {backend}",
        alter=lambda candidate: _compiled(candidate, names, backend),
        excludes=_EAGER_PARTS,
        compiles=True,
    )


_CHUNKED = "products of matrices in chunks"
_STRIDES = "strides of inputs, weights and outputs"
_FUSION = "unfused weights"

# By the words for each, which name a run.
WAYS: Mapping[str, Way] = {
    "2 threads": Way("threads", "threads", around=lambda: _threads(2)),
    "4 threads": Way("threads", "threads", around=lambda: _threads(4)),
    "attention by torch's math": Way(
        "attention", "kernels of attention", within=lambda: _kernel(SDPBackend.MATH)
    ),
    "attention by torch's flash": Way(
        "attention", "kernels of attention", within=lambda: _kernel(SDPBackend.FLASH_ATTENTION)
    ),
    "eager attention": _attention(_eager_attention),
    "attention head by head": _attention(_attention_by_heads),
    "attention in float64": _attention(_attention_in_float64),
    "outputs of products in chunks": _products(_CHUNKED, _columns_apart),
    "rows of products in chunks": _products(_CHUNKED, _rows_apart),
    "sums of products in chunks": _products(_CHUNKED, _sums_apart),
    "products in float64": _products("products of matrices in float64", _in_float64),
    "norms and activations written out": Way(
        "elementwise", "norms and activations written out", within=_WRITTEN
    ),
    "without oneDNN": Way(
        "processor", "settings of the processor", around=lambda: mkldnn.flags(enabled=False)
    ),
    "denormal numbers flushed": Way(
        "processor", "settings of the processor", around=_without_denormals
    ),
    "weights unfused on loading": Way("fusion", _FUSION, around=_unfused_on_loading),
    "weights unfused in memory": Way("fusion", _FUSION, alter=_unfused_in_memory),
    "weights by columns": Way("memory", _STRIDES, alter=_by_columns),
    "inputs strided": _inputs(_STRIDES, lambda candidate: _with_inputs(candidate, _strided)),
    "outputs strided": Way(
        "outputs", _STRIDES, alter=lambda candidate: _with_outputs(candidate, _strided)
    ),
    "channels last": _inputs("channels last", _channels_last),
    "outputs in reused memory": Way("outputs", "outputs in reused memory", alter=_reusing_memory),
    "1 tile at once": Way("tiles", "tiles at once", alter=lambda c: _tiles_apart(c, 1)),
    "2 tiles at once": Way("tiles", "tiles at once", alter=lambda c: _tiles_apart(c, 2)),
    "4 tiles at once": Way("tiles", "tiles at once", alter=lambda c: _tiles_apart(c, 4)),
    **{
        f"last of {rows} rows": Way(
            "batch",
            "batch sizes",
            alter=functools.partial(_in_a_batch, rows=rows),
            # The modules of such a port have more rows than the reference's.
            options={"localise": False},
        )
        for rows in (2, 3)
    },
    "hooks": Way("hooks", "hooks on every module", alter=lambda c: _hooked(c, copies=False)),
    "hooks that copy": Way(
        "hooks", "hooks on every module", alter=lambda c: _hooked(c, copies=True)
    ),
    "a dispatch mode": Way("modes", "dispatch modes", within=Watching),
    "a function mode": Way("modes", "dispatch modes", within=lambda: Replaced({})),
    "bfloat16": Way("dtype", "half precision", options={"dtype": "bfloat16"}),
    "float16": Way("dtype", "half precision", options={"dtype": "float16"}),
    "each phase twice": Way("options", "options of the check", options={"repeat": 2}),
    "quick": Way("options", "options of the check", options={"quick": True}),
    "the compact golden set": Way(
        "goldens", "the compact golden set", options={"goldens": COMPACT}, excludes=_NO_ORACLE
    ),
    OTHER_SHAPES: Way(
        "goldens",
        OTHER_SHAPES,
        options={"goldens": OTHER / "goldens", "checkpoint": str(OTHER_CHECKPOINT)},
    ),
    **{
        f"compiled as a whole by {backend}": _compiling(("",), backend)
        for backend in ("inductor", "aot_eager")
    },
    **{
        f"{part} compiled by {backend}": _compiling(names, backend)
        for part, names in _PARTS_COMPILED.items()
        for backend in ("inductor", "aot_eager")
    },
}
# Those of which make mutants draws: they check the committed golden set in float32.
USUAL = tuple(
    name
    for name, way in WAYS.items()
    if not way.compiles and way.options.keys().isdisjoint(("goldens", "dtype"))
)
