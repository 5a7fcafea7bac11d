"""FMS as the candidate, without transformers: built through its registry from the recorded config.

FMS's own way from a Hugging Face checkpoint, get_model("hf_pretrained", …), imports transformers.
Its registry and adapters do not: this module fills in the configuration that they need.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from snapshot_tool.base.errors import (
    CandidateUnavailable,
    PhaseUnsupported,
    SnapError,
    UsageError,
    is_out_of_memory,
)
from snapshot_tool.base.places import describe_error
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
)
from snapshot_tool.candidates.fms.importing import FmsSource, import_fms
from snapshot_tool.candidates.fms.modules import graft_twin, observe_twins, twin_output
from snapshot_tool.candidates.fms.own_loading import load_by_fms
from snapshot_tool.candidates.fms.weights import (
    find_doubles,
    pair_weights,
    read_shapes,
    require_coverage,
    require_few_layers,
    require_no_more_numbers,
    require_shapes,
    require_split,
    stray_files,
)
from snapshot_tool.candidates.output_cache import OutputCache
from snapshot_tool.families import family_of_config
from snapshot_tool.families.family import (
    PAGE,
    Family,
    computed_without,
    pairs_of,
    text_config,
    unmapped_fields,
)
from snapshot_tool.families.fms_calls import FmsCalls, LoadedFms
from snapshot_tool.families.llama import head_dim

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class FmsCandidate(Candidate):
    """FMS's model of a family; `calls` calls it, phase by phase."""

    model: Any
    calls: FmsCalls
    source: FmsSource
    family: Family
    request: CandidateRequest
    unset: tuple[str, ...] = ()
    mapping: tuple[FieldDifference, ...] = ()
    doubles: tuple[str, ...] = ()

    def supports(self, method: str) -> bool:
        """Return whether there is such a method; without twins, modules have no known names."""
        return method != "observe_forward" or bool(self.family.fms.module_pairs)

    def info(self) -> CandidateInfo:
        """Return which FMS this is."""
        stray = [
            f"FMS also loads {name}, which is not part of the checkpoint"
            for name in stray_files(self.request.checkpoint)
        ]
        return CandidateInfo(
            "fms",
            path=str(self.source.path),
            version=self.source.version,
            commit=self.source.commit,
            dirty=self.source.dirty,
            notes=(
                *self.calls.notes,
                *stray,
                *_unmapped(self.family, self.request),
                *self.doubles,
            ),
            loading=self.request.loading,
            mapping=self.mapping,
        )

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        """Return the tiles of all images, (tiles, channels, height, width)."""
        answer: Mapping[str, torch.Tensor] = self._call("preprocess", images)
        return answer

    def vision(self, pixel_values: torch.Tensor, *, image_sizes: torch.Tensor | None = None) -> Any:
        """Return the connector's input, or the encoder's outputs by name."""
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        return self._call("vision", self._moved(pixel_values), **sizes)

    def connector(
        self, features: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the text model's image tokens."""
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        tokens: torch.Tensor = self._call("connector", self._moved(features), **sizes)
        return tokens

    def forward(self, inputs: CaseInputs) -> Any:
        """Return the logits of every position, or an encoder's outputs by name."""
        return self._call("forward", self._inputs(inputs))

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Return the greedy new tokens, the end token included."""
        ends = eos_token_ids
        new: torch.Tensor = self._call(
            "generate", self._inputs(inputs), max_new_tokens=max_new_tokens, eos_token_ids=ends
        )
        return new

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of prompts padded to one length, (rows, length, vocabulary)."""
        logits: torch.Tensor = self._call("forward_batch", list(map(self._inputs, rows)))
        return logits

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of all parts of a prompt, each run on the cache of those before it."""
        logits: torch.Tensor = self._call("forward_in_parts", list(map(self._inputs, parts)))
        return logits

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the greedy new tokens of each prompt, its own end token included."""
        moved, ends = list(map(self._inputs, rows)), eos_token_ids
        new: list[torch.Tensor] = self._call(
            "generate_batch", moved, max_new_tokens=max_new_tokens, eos_token_ids=ends
        )
        return new

    def observe_forward(self, inputs: CaseInputs, observe: Observer) -> Mapping[str, str]:
        """Run forward and show the modules; return FMS's name of each, by Hugging Face's."""
        twins, head_dim = self.family.fms.module_pairs, self._head_dim()
        with observe_twins(self.model, twins, observe, head_dim=head_dim) as names:
            if self.family.takes_text:
                self.forward(inputs)
            elif inputs.pixel_values is not None:
                self.vision(inputs.pixel_values)
        return names

    def weights(self) -> Iterator[WeightPair]:
        """Yield every weight of the checkpoint beside the model's own, as it is now."""
        request, unused = self.request, self.request.unused_weights
        port = self.family.fms
        return pair_weights(self.model, request.checkpoint, port, request.config, unused=unused)

    def unset_weights(self) -> tuple[str, ...]:
        """Return the model's weights that the checkpoint leaves unset: they are NaN."""
        return self.unset

    def modules(self) -> torch.nn.Module:
        """Return the model itself."""
        model: torch.nn.Module = self.model
        return model

    def twin_outputs(self, module: str, output: object) -> Mapping[str, torch.Tensor]:
        """Return the outputs of Hugging Face's modules in an output, as Hugging Face has them."""
        found = {
            hf_name: twin_output(output, twin, head_dim=self._head_dim())
            for hf_name, twin in pairs_of(module, self.family.fms.module_pairs)
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def graft(self, module: str, output: torch.Tensor) -> AbstractContextManager[str]:
        """Return a context in which a module, by Hugging Face's name, returns `output`."""
        pairs, head_dim = self.family.fms.module_pairs, self._head_dim()
        return graft_twin(self.model, pairs, module, output, head_dim=head_dim)

    def output_cache(self) -> KeepOutputs:
        """Keep the image encoder's outputs; nothing if this branch of FMS names it otherwise."""
        port = self.family.fms
        encoder = dict(self.model.named_modules()).get(port.encoder) if port.encoder else None
        if encoder is None:
            return keep_nothing
        return OutputCache(encoder, tiles_apart=port.tiles_apart).for_case

    def _call(self, name: str, *given: Any, **options: Any) -> Any:
        """Call FMS; raise PhaseUnsupported if it has nothing for this of the family."""
        method = getattr(self.calls, name, None)
        if method is None:
            raise PhaseUnsupported(f"FMS has no {name} of {self.family.name}")
        return method(*given, **options)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor to the model's device and, if it is floating-point, to its dtype."""
        dtype = getattr(torch, self.request.dtype) if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.request.device, dtype)

    def _inputs(self, inputs: CaseInputs) -> CaseInputs:
        given = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
        moved: dict[str, Any] = {n: self._moved(t) for n, t in given.items() if t is not None}
        return CaseInputs(**moved)

    def _head_dim(self) -> int:
        """Return the elements of one head of the text model; 0 if no twin is rotary."""
        if not any(twin.rotary for twin in self.family.fms.module_pairs):
            return 0
        return head_dim(text_config(self.request.config))


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
    every = read_shapes(request.checkpoint, port, request.config)
    weights = {name: shape for name, shape in every.items() if name not in request.unused_weights}
    require_few_layers(request.config, weights, request.checkpoint)
    mapping: tuple[FieldDifference, ...] = ()
    try:
        with warnings.catch_warnings():
            # The error of a configuration without sense is enough.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            if request.loading is Loading.OWN:
                model, mapping = load_by_fms(family, request)
            else:
                model = _build_model(family, request, weights)
        pad = getattr(generation, "pad_input_ids", None)
        loaded = LoadedFms(
            model.eval(), models, generation.generate, pad, request.checkpoint, request.config
        )
        calls = port.calls(loaded)
    except CandidateUnavailable as error:
        missing = _unmapped(family, request)
        raise CandidateUnavailable("; ".join([error.problem, *missing]), error.remedy) from error
    except SnapError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CandidateUnavailable(
            f"FMS at {source.path} cannot load {request.checkpoint}: {describe_error(error)}"
        ) from error
    require_split(model, architecture=port.architecture)
    unset = require_coverage(model, weights, request.checkpoint, port, request.config)
    doubles = tuple(
        f"FMS loads {' and '.join(names)} into one weight, {own}"
        for own, names in find_doubles(model, every, port).items()
    )
    return FmsCandidate(model, calls, source, family, request, unset, mapping, doubles)


def _unmapped(family: Family, request: CandidateRequest) -> list[str]:
    """Return one line that names the fields that may change answers and that FMS does not get."""
    fields = unmapped_fields(family.fms.config, request.config, request.changed_fields)
    return [f"fields that FMS is not given: {', '.join(fields)}"] if fields else []


def _build_model(
    family: Family, request: CandidateRequest, weights: Mapping[str, torch.Tensor]
) -> Any:
    """Build the model through FMS's registry, with every field that matters set."""
    from fms import models

    architecture = family.fms.architecture
    variant = models.list_variants(architecture)[0]
    fields = family.fms.config(request.config)
    # get_model begins with this, too, but takes the memory before it ends. FMS 1.13.1 has no
    # public name for it.
    without_memory = models._get_model_instance(  # noqa: SLF001
        architecture, variant, device=torch.device("meta"), extra_args=fields
    )
    _require_taken(fields, without_memory.config, architecture, family.fms.absent)
    require_no_more_numbers(without_memory, weights, request.checkpoint)
    require_shapes(without_memory, weights, request.checkpoint, family.fms, request.config)
    return models.get_model(
        architecture,
        variant,
        model_path=str(request.checkpoint),
        source="hf",
        device_type=request.device,
        data_type=getattr(torch, request.dtype),
        **fields,
    )


def _require_taken(
    fields: Mapping[str, Any], config: Any, path: str, absent: Mapping[str, Any]
) -> None:
    """Raise unless FMS's configuration holds every field: it ignores unknown ones silently."""
    for name, value in fields.items():
        if not hasattr(config, name):
            if name in absent and value == computed_without(absent, name, fields):
                continue
            raise CandidateUnavailable(
                f"FMS's {path} configuration has no field {name}, which is {value!r} here",
                f"check an FMS that has it, or declare the family otherwise: {PAGE}",
            )
        actual = getattr(config, name)
        if isinstance(value, dict) and name.endswith("_config"):
            _require_taken(value, actual, f"{path}.{name}", absent)
        elif actual != value:
            raise CandidateUnavailable(
                f"FMS's {path} configuration took {name}={actual}, not {value} from the checkpoint"
            )
