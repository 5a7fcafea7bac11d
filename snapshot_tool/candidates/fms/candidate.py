"""FMS as the candidate, without transformers: built through its registry from the recorded config.

FMS's own way from a Hugging Face checkpoint, get_model("hf_pretrained", …), imports transformers.
Its registry and adapters do not: this module fills in the configuration that they need.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch

from snapshot_tool.base.errors import (
    CandidateUnavailable,
    PhaseUnsupported,
    SnapError,
    UsageError,
    describe_error,
    is_out_of_memory,
)
from snapshot_tool.base.protocol import (
    Candidate,
    CandidateInfo,
    CandidateRequest,
    CaseInputs,
    FieldDifference,
    KeepOutputs,
    Loading,
    Observer,
    WeightPair,
    keep_nothing,
    parse_path,
)
from snapshot_tool.candidates.distributed import joined_ranks
from snapshot_tool.candidates.fms.configuration import (
    compare_mappings,
    require_taken,
    unmapped_fields,
)
from snapshot_tool.candidates.fms.importing import FmsSource, import_fms
from snapshot_tool.candidates.fms.modules import PairedModules
from snapshot_tool.candidates.fms.paths import PagedCalls, PathCalls, PieceObserver, calls_on_path
from snapshot_tool.candidates.fms.shards import split_modules
from snapshot_tool.candidates.fms.weights import CheckpointWeights, stray_files
from snapshot_tool.candidates.output_cache import OutputCache
from snapshot_tool.families import family_of_config
from snapshot_tool.families.family import PAGE, Family, FmsPort, text_config
from snapshot_tool.families.fms_calls import FmsCalls, LoadedFms
from snapshot_tool.families.llama import head_dim

Method = TypeVar("Method", bound=Callable[..., Any])


def _phase(method: Method) -> Method:
    """Return a Candidate's method that calls FMS's, with tensors on the model's device."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: FmsCandidate, *given: Any, **options: Any) -> Any:
        own = getattr(self.calls, name, None)
        if own is None:
            raise PhaseUnsupported(f"FMS has no {name} of {self.family.name}")
        named = {key: value for key, value in options.items() if value is not None}
        return own(*self.moved(given), **self.moved(named))

    return cast("Method", call)


@dataclass(frozen=True)
class FmsCandidate(Candidate):
    """FMS's model of a family; `calls` calls it, phase by phase."""

    model: Any
    calls: FmsCalls | PathCalls
    source: FmsSource
    family: Family
    request: CandidateRequest
    unset: tuple[str, ...] = ()
    mapping: tuple[FieldDifference, ...] = ()
    doubles: tuple[str, ...] = ()

    preprocess = _phase(Candidate.preprocess)
    vision: ClassVar[Any] = _phase(Candidate.vision)
    connector = _phase(Candidate.connector)
    forward: ClassVar[Any] = _phase(Candidate.forward)
    generate = _phase(Candidate.generate)
    forward_batch = _phase(Candidate.forward_batch)
    forward_in_parts = _phase(Candidate.forward_in_parts)
    generate_batch = _phase(Candidate.generate_batch)

    def moved(self, value: Any) -> Any:
        """Return tensors on the model's device and, if they are floating-point, in its dtype."""
        if isinstance(value, torch.Tensor):
            dtype = getattr(torch, self.request.dtype) if value.is_floating_point() else value.dtype
            return value.to(self.request.device, dtype)
        if isinstance(value, CaseInputs):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return CaseInputs(**self.moved(fields))
        if isinstance(value, Mapping):
            return {name: self.moved(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self.moved, value))
        return value

    def supports(self, method: str) -> bool:
        """Return whether there is such a method; without pairs, modules have no known names."""
        if method == "cache_layout":
            return isinstance(self.calls, PagedCalls)
        named = method in ("observe_forward", "run_module")
        return not named or bool(self.family.fms.module_pairs)

    def cache_layout(self, *, chunk: int, order: int) -> AbstractContextManager[None]:
        """Return a context in which a paged cache has another layout."""
        if not isinstance(self.calls, PagedCalls):
            return super().cache_layout(chunk=chunk, order=order)
        return self.calls.cache_layout(chunk=chunk, order=order)

    def info(self) -> CandidateInfo:
        """Return which FMS this is."""
        stray: list[str] = []
        if self.request.needs_weights:
            stray = [
                f"FMS also loads {name}, which is not part of the checkpoint"
                for name in stray_files(self.request.checkpoint)
            ]
        unmapped = unmapped_fields(self.family, self.request)
        return CandidateInfo(
            "fms",
            path=str(self.source.path),
            version=self.source.version,
            commit=self.source.commit,
            dirty=self.source.dirty,
            notes=(*self.calls.notes, *stray, *unmapped, *self.doubles),
            loading=self.request.loading,
            mapping=self.mapping,
            changed=self.source.changed,
        )

    def observe_forward(self, inputs: CaseInputs, observe: Observer) -> Mapping[str, str]:
        """Run forward and show the modules; return FMS's name of each, by Hugging Face's."""
        if isinstance(self.calls, PathCalls):
            observe = PieceObserver(observe, self.calls, self.family.fms.encoder)
        with self._paired.observed(observe) as names:
            if isinstance(observe, PieceObserver):
                observe.names = names
            if self.family.takes_text:
                self.forward(inputs)
            elif inputs.pixel_values is not None:
                self.vision(inputs.pixel_values)
        return names

    def weights(self) -> Iterator[WeightPair]:
        """Yield every weight of the checkpoint beside the model's own, as it is now."""
        return CheckpointWeights(self.request, self.family.fms).pair(self.model)

    def unset_weights(self) -> tuple[str, ...]:
        """Return the model's weights that the checkpoint leaves unset: they are NaN."""
        return self.unset

    def modules(self) -> torch.nn.Module:
        """Return the model itself."""
        model: torch.nn.Module = self.model
        return model

    def twin_outputs(self, module: str, output: object) -> Mapping[str, torch.Tensor]:
        """Return the outputs of the Hugging Face modules that an FMS module's output holds."""
        return self._paired.outputs(module, output)

    def run_module(self, module: str, given: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Run FMS's counterpart of one of Hugging Face's modules by itself."""
        return self._paired.run(module, self.moved(given))

    def graft(self, module: str, output: torch.Tensor) -> AbstractContextManager[str]:
        """Return a context in which a module, by Hugging Face's name, returns `output`."""
        return self._paired.grafted(module, output)

    def output_cache(self) -> KeepOutputs:
        """Keep the image encoder's outputs; nothing if this branch of FMS names it otherwise."""
        port = self.family.fms
        encoder = dict(self.model.named_modules()).get(port.encoder) if port.encoder else None
        if encoder is None:
            return keep_nothing
        return OutputCache(encoder, tiles_apart=port.tiles_apart).for_case

    @functools.cached_property
    def _paired(self) -> PairedModules:
        pairs = self.family.fms.module_pairs
        is_rotary = any(pair.rotary for pair in pairs)
        elements = head_dim(text_config(self.request.config)) if is_rotary else 0
        return PairedModules(self.model, pairs, elements)


def family_in_fms(config: Mapping[str, Any], source: FmsSource) -> Family:
    """Return a checkpoint's family; raise CandidateUnavailable if the imported FMS lacks it."""
    from fms import models

    try:
        family = family_of_config(config)
    except UsageError as unknown:  # the family of a golden set, which the user did not name
        raise CandidateUnavailable(unknown.problem, unknown.remedy) from unknown
    known = models.list_models()
    if family.fms.architecture not in known:
        wanted = family.fms.architecture or f"architecture that is declared for {family.name}"
        raise CandidateUnavailable(
            f"FMS at {source.path} has no {wanted}",
            f"it has: {', '.join(known)}; pass a checkout that has it (--fms-path DIR), or another "
            f"--candidate module:factory; see {PAGE}",
        )
    return family


def load_fms_candidate(request: CandidateRequest, *, fms_path: Path | None) -> FmsCandidate:
    """Import FMS and build its model of a checkpoint; raise CandidateUnavailable if it cannot."""
    source = import_fms(fms_path)
    from fms import models
    from fms.utils import generation

    family = family_in_fms(request.config, source)
    port = family.fms
    if not request.needs_weights:
        model = torch.nn.Module()
        loaded = LoadedFms(
            model, models, generation.generate, None, request.checkpoint, request.config
        )
        return FmsCandidate(model, port.calls(loaded), source, family, request)
    weights = CheckpointWeights(request, port)
    weights.require_few_layers()
    mapping: tuple[FieldDifference, ...] = ()
    try:
        with warnings.catch_warnings():
            # The error of a configuration that makes no sense is enough.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            if request.loading is Loading.OWN:
                model, mapping = _load_as_users_do(family, request)
            else:
                model = _build_model(port, request, weights)
        pad = getattr(generation, "pad_input_ids", None)
        loaded = LoadedFms(
            model.eval(), models, generation.generate, pad, request.checkpoint, request.config
        )
        calls = calls_on_path(port.calls(loaded), parse_path(request.path), family)
    except CandidateUnavailable as error:
        problems = [error.problem, *unmapped_fields(family, request)]
        raise CandidateUnavailable("; ".join(problems), error.remedy) from error
    except SnapError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CandidateUnavailable(
            f"FMS at {source.path} cannot load {request.checkpoint}: {describe_error(error)}"
        ) from error
    if joined_ranks() and not split_modules(model):
        raise CandidateUnavailable(
            f"FMS does not split {port.architecture}: every rank would hold the whole model",
            "check it in one process, without torchrun",
        )
    unset = weights.fill_unset(model)
    doubles = tuple(
        f"FMS loads {' and '.join(names)} into one weight, {own}"
        for own, names in weights.find_doubles(model).items()
    )
    return FmsCandidate(model, calls, source, family, request, unset, mapping, doubles)


def _build_model(port: FmsPort, request: CandidateRequest, weights: CheckpointWeights) -> Any:
    """Build the model through FMS's registry, with every field that matters set."""
    from fms import models

    variant = models.list_variants(port.architecture)[0]
    fields = port.config(request.config)
    # get_model begins with this, too, but takes the memory before it ends. FMS 1.13.1 has no
    # public name for it.
    without_memory = models._get_model_instance(  # noqa: SLF001
        port.architecture, variant, device=torch.device("meta"), extra_args=fields
    )
    require_taken(port, fields, without_memory.config, port.architecture)
    weights.require_no_more_numbers(without_memory)
    weights.adapt(without_memory)
    return models.get_model(
        port.architecture,
        variant,
        model_path=str(request.checkpoint),
        source="hf",
        device_type=request.device,
        data_type=getattr(torch, request.dtype),
        **fields,
    )


def _load_as_users_do(
    family: Family, request: CandidateRequest
) -> tuple[Any, tuple[FieldDifference, ...]]:
    """Return FMS's get_model("hf_pretrained"), and the fields that its mapping fills differently.

    Raises CandidateUnavailable without transformers, and if FMS cannot load the checkpoint: with
    the differences, since they may be the cause.
    """
    from fms import models

    differences = compare_mappings(family, request)
    try:
        model = models.get_model(
            "hf_pretrained",
            variant=str(request.checkpoint),
            device_type=request.device,
            data_type=getattr(torch, request.dtype),
        )
    except Exception as error:
        why = "".join(f"; {difference}" for difference in differences)
        raise CandidateUnavailable(
            f"FMS's own loading of {request.checkpoint} raises {describe_error(error)}{why}",
            "repair FMS's mapping, or leave out --loading own",
        ) from error
    return model, differences
