"""A Hugging Face model as the reference: processor, one forward pass with hooks, generation."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from packaging.version import Version
from PIL import Image

from snapshot_tool.base.checkpoint import (
    CONFIG,
    INDEX,
    WEIGHTS,
    loaded_files,
    read_json,
    require_whole,
    weight_files,
)
from snapshot_tool.base.errors import (
    CheckpointUnavailable,
    InputRefused,
    ReferenceUnavailable,
    TemplateRefused,
)
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import (
    CaseInputs,
    ForwardPass,
    Generation,
    LoadSettings,
    Observer,
    PreparedCase,
    ReferenceInfo,
    Side,
)
from snapshot_tool.base.recipes import CaseRecipe
from snapshot_tool.families import family_of_config
from snapshot_tool.families.family import PADDING, PAGE, UNSEEN, Capture, Family
from snapshot_tool.reference.float64 import float64_throughout, widen_rotary_frequencies
from snapshot_tool.reference.loading import (
    changed_fields,
    require_computed,
    require_filled,
    unknown_fields,
    unused_weights,
)
from snapshot_tool.reference.messages import Warned, log_to_handlers_alone, raised_as
from snapshot_tool.reference.preparation import Preparation
from snapshot_tool.taps.hooks import (
    Call,
    capture_tensors,
    first_tensor,
    keep_calls,
    module_name,
    tap_modules,
)

_LOGITS = 3  # dimensions: rows, length, vocabulary


@dataclass(frozen=True, slots=True)
class HuggingFaceReference:
    """transformers' own implementation of a checkpoint, in evaluation mode.

    warned: the warnings so far.
    eos_token_ids, pad_token_id, unknown_fields, changed_fields, unused_weights: see ReferenceInfo.
    facts: what running a model without a declared family showed, for the environment.
    """

    family: Family
    model: Any
    preparation: Preparation
    dtype: str
    settings: LoadSettings
    warned: Warned
    eos_token_ids: tuple[int, ...]
    unknown_fields: tuple[str, ...] = ()
    changed_fields: tuple[str, ...] = ()
    unused_weights: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, checkpoint: Path, *, dtype: str, settings: LoadSettings) -> HuggingFaceReference:
        """Load processor and model from a folder; nothing is downloaded.

        No pickled weights are read, and no code of the checkpoint runs unless it is trusted.
        """
        log_to_handlers_alone()
        accelerate.utils.set_seed(settings.seed, deterministic=True)
        if not weight_files(checkpoint):
            raise CheckpointUnavailable(
                f"cannot load {checkpoint}: it has no {WEIGHTS} and no {INDEX}",
                "convert its weights to safetensors: pickled weights are not read",
            )
        require_whole(checkpoint, loaded_files(checkpoint))
        config = read_json(checkpoint / CONFIG)
        family = family_of_config(config)
        warned = Warned(checkpoint)
        model_class = _model_class(family, config, trusts_code=settings.trusts_code)
        is_auto = getattr(model_class, "config_class", None) is None
        # transformers warns of this argument unless the class is an Auto class.
        trust = {"trust_remote_code": settings.trusts_code} if is_auto else {}
        config_class = transformers.AutoConfig if is_auto else model_class.config_class
        with _loading("the configuration", warned, settings):
            known = config_class.from_pretrained(checkpoint, local_files_only=True, **trust)
            require_computed(config, known, checkpoint / CONFIG)
        with _loading("the processor", warned, settings):
            processor = Preparation.load(family, checkpoint, trusts_code=settings.trusts_code)
        with _loading("the model", warned, settings):
            model, report = model_class.from_pretrained(
                checkpoint,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation=family.attention or None,
                output_loading_info=True,
                **{_dtype_argument(): getattr(torch, dtype)},
                **trust,
                **_placement(settings),
            )
            require_filled(model, report, checkpoint)
            # A model that accelerate placed stays where it is.
            model = model.eval() if settings.device_map else model.to(settings.device).eval()
            if dtype == "float64":
                widen_rotary_frequencies(model)
            types = getattr(model.config, "type_vocab_size", None) or 1
            reference = cls(
                family=family,
                model=model,
                preparation=Preparation(family, processor, _pad_token_id(model, family), types),
                dtype=dtype,
                settings=settings,
                warned=warned,
                eos_token_ids=_eos_token_ids(model),
                unknown_fields=unknown_fields(config, known),
                changed_fields=changed_fields(model.config),
                unused_weights=unused_weights(model, report, checkpoint),
            )
        if family.is_declared:
            return reference
        return replace(reference, facts=_try_decoder(reference, checkpoint))

    def info(self) -> ReferenceInfo:
        """Return the family, the configuration, the end tokens, and what else a manifest keeps."""
        config, settings = self.model.config, self.settings
        environment = {
            "attention": str(config._attn_implementation),  # noqa: SLF001 - no other name
            **self.family.environment,
            **self.facts,
        }
        if settings.trusts_code:
            environment["remote_code"] = "trusted"
        if settings.device_map:
            environment["device_map"] = settings.device_map
        if settings.max_memory:
            most = sorted(settings.max_memory.items())
            environment["max_memory"] = ", ".join(f"{device}={size}" for device, size in most)
        return ReferenceInfo(
            family=self.family.name,
            phases=self.family.phases,
            config=_public_fields(json.loads(config.to_json_string(use_diff=False))),
            environment=environment,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.preparation.pad_token_id,
            modules=tuple(name for name, _ in self.model.named_modules() if name),
            unknown_fields=self.unknown_fields,
            changed_fields=self.changed_fields,
            unused_weights=self.unused_weights,
        )

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings of Hugging Face's libraries so far, each once, sorted."""
        return self.warned.texts()

    def modules(self) -> torch.nn.Module:
        """Return the model itself."""
        model: torch.nn.Module = self.model
        return model

    def prepare(
        self, recipe: CaseRecipe, images: Sequence[Image.Image], *, new_tokens: int = 0
    ) -> PreparedCase:
        """Run the checkpoint's own processor on a prompt and its images.

        new_tokens: how many tokens are to be generated after the prompt.

        Raises InputRefused for what the reference does not take.
        """
        text = recipe.prompt
        with self.warned.listening():
            if recipe.chat:
                with raised_as(lambda why: TemplateRefused(f"the chat template: {why}")):
                    text = self.preparation.chat_text(recipe.prompt)
            with raised_as(InputRefused):
                inputs = self.preparation.encode(recipe, text, images)
                self._require_taken(inputs, new_tokens)
                grids = self.preparation.image_grids(images)
        return PreparedCase(text, inputs, grids)

    def decode(self, token_ids: torch.Tensor) -> str:
        """Return tokens (length,) as text; "" if the tokenizer cannot decode them."""
        try:
            with raised_as(InputRefused):
                return str(self.preparation.tokenizer.decode(token_ids))
        except InputRefused:
            return ""

    def forward(
        self,
        inputs: CaseInputs,
        *,
        observe: Observer,
        continuation: torch.Tensor | None = None,
        connector_input: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> ForwardPass:
        """Run the model end to end, keeping the tensors that the family names.

        Args:
            inputs: the case.
            observe: called with each module's input and output, the prompt's alone.
            continuation: (more,) int64, tokens that are run after the prompt, through its cache.
            connector_input: returns, given the encoder's own output, the features on which the
                connector's output is computed instead.
        """
        arguments: dict[str, Any] = self._arguments(inputs)
        if self.family.generates:
            arguments["use_cache"] = continuation is not None
            arguments |= self._positions(arguments["attention_mask"])
        connector = next(
            (
                c
                for c in self.family.captures
                if c.phase is Phase.CONNECTOR and c.side is Side.OUTPUT
            ),
            None,
        )
        watched = self.model
        if connector and connector_input:
            watched = self.model.get_submodule(module_name(self.model, connector))
        with self._running(), torch.inference_mode(), self._precision():
            with (
                capture_tensors(self.model, self.family.captures) as captured,
                keep_calls(watched) as calls,
                tap_modules(self.model, observe),
            ):
                answer = self.model(**arguments)
            if connector and connector_input and calls:
                features = connector_input(_widened(self._vision_output(captured)))
                captured[connector] = _call_again(calls[0], self._cast(features))
            logits = self._logits(answer) if self.family.logits else None
            if logits is not None and continuation is not None and len(continuation):
                logits = torch.cat([logits, self._continue(answer, arguments, continuation)])
        outputs: dict[Phase, dict[str, torch.Tensor]] = {}
        for capture, tensor in captured.items():
            outputs.setdefault(capture.phase, {})[capture.name] = _widened(tensor)
        return ForwardPass(outputs, None if logits is None else _widened(logits))

    def _logits(self, answer: Any) -> torch.Tensor:
        logits = getattr(answer, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.dim() != _LOGITS:
            raise ReferenceUnavailable(
                f"{self.family.hf_class} gives no logits (1, length, vocabulary)",
                f"declare it with logits=False and captures; see {PAGE}",
            )
        return logits[0]

    def _continue(
        self, answer: Any, arguments: dict[str, torch.Tensor], tokens: torch.Tensor
    ) -> torch.Tensor:
        """Run tokens after a prompt whose cache is in `answer`; return their logits.

        If the cache does not simply grow (a hybrid or a static one, a recurrent state), prompt and
        tokens are run once more as a whole.
        """
        ids = tokens[None].to(self.settings.device)
        new = ids.shape[1]
        mask = torch.cat([arguments["attention_mask"], torch.ones_like(ids)], dim=1)
        positions = self._positions(mask)
        cache = getattr(answer, "past_key_values", None)
        if not isinstance(cache, transformers.DynamicCache | tuple | list):
            whole = torch.cat([arguments["input_ids"], ids], dim=1)
            again = self.model(input_ids=whole, attention_mask=mask, use_cache=False, **positions)
        else:
            again = self.model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **{name: ids[:, -new:] for name, ids in positions.items()},
            )
        logits: torch.Tensor = again.logits[0, -new:]
        return logits

    def _positions(self, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return position ids as transformers' generate does, for models that take them.

        They are counted from the first real token.
        """
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return {}
        return {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}

    def _vision_output(self, captured: Mapping[Capture, torch.Tensor]) -> torch.Tensor:
        """Return the tensor that the connector takes."""
        name = self.family.compared[Phase.VISION]
        by_name = {(c.phase, c.name): tensor for c, tensor in captured.items()}
        return by_name[Phase.VISION, name]

    def _precision(self) -> AbstractContextManager[Any]:
        return float64_throughout() if self.dtype == "float64" else nullcontext()

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor to the model's device, and a floating-point one to its dtype."""
        dtype = getattr(torch, self.dtype) if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.settings.device, dtype)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Collect the model's warnings; raise ReferenceUnavailable for the errors it raises."""

        def make(why: str) -> ReferenceUnavailable:
            return ReferenceUnavailable(
                f"{self.family.hf_class} of transformers {transformers.__version__} raises {why}",
                "see that config.json, the tokenizer and --dtype fit the weights"
                + ("" if self.family.is_declared else f"; to declare the model: {PAGE}"),
            )

        with self.warned.listening(), raised_as(make):
            yield

    def generate(
        self,
        inputs: CaseInputs,
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] | None = None,
    ) -> Generation:
        """Generate by argmax alone: none of the checkpoint's sampling or penalty settings."""
        ends = self.eos_token_ids if eos_token_ids is None else eos_token_ids
        settings = transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=self.preparation.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        # `generate` fills gaps of the settings given from the model's own; these must not count.
        own, self.model.generation_config = self.model.generation_config, settings
        try:
            with self._running(), torch.inference_mode():
                answer = self.model.generate(**self._arguments(inputs), generation_config=settings)
        finally:
            self.model.generation_config = own
        new = answer.sequences[0, inputs.input_ids.shape[1] :].cpu()
        return Generation(new, _widened(torch.stack([step[0] for step in answer.logits])))

    def _require_taken(self, inputs: CaseInputs, new_tokens: int) -> None:
        """Raise InputRefused for what the model cannot compute, or only by accident."""
        if self.family.takes_text:
            self._require_length(inputs.input_ids.shape[1], new_tokens)
            least, greatest = int(inputs.input_ids.min()), int(inputs.input_ids.max())
            rows = len(self.model.get_input_embeddings().weight)
            if least < 0 or greatest >= rows:
                wrong = greatest if greatest >= rows else least
                raise InputRefused(f"token id {wrong} has no embedding, the model has {rows}")
        if inputs.pixel_values is not None and not inputs.pixel_values.isfinite().all():
            raise InputRefused("the processor's pixel values are not finite")

    def _require_length(self, tokens: int, new_tokens: int) -> None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(positions, int):
            return
        longest = positions - self.family.reserved_positions
        if tokens > longest:
            raise InputRefused(f"{tokens} tokens, the model takes {longest}")
        # A table of positions has no row for a token beyond it; computed ones have no end.
        last = tokens + max(new_tokens - 1, 0)
        if last > longest and self._has_position_table(positions):
            raise InputRefused(
                f"{tokens} tokens and {new_tokens} new ones, the model takes {longest}"
            )

    def _has_position_table(self, positions: int) -> bool:
        if self.family.takes_images:
            return False  # an encoder of images has one of its own
        words = self.model.get_input_embeddings()
        tables = (m for m in self.model.modules() if isinstance(m, torch.nn.Embedding))
        return any(t.num_embeddings >= positions and t is not words for t in tables)

    def _arguments(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        """Return the inputs as the model's forward takes them."""
        pixels, mask = inputs.pixel_values, inputs.pixel_attention_mask
        if pixels is not None and self.family.pixel_dims > pixels.dim():
            pixels = pixels.unsqueeze(0)
        given = {
            "input_ids": inputs.input_ids if self.family.takes_text else None,
            "attention_mask": inputs.attention_mask if self.family.takes_text else None,
            "pixel_values": pixels,
            "pixel_attention_mask": None if mask is None else mask.unsqueeze(0),
            "image_sizes": inputs.image_sizes,
            "token_type_ids": inputs.token_type_ids,
        }
        return {name: self._cast(tensor) for name, tensor in given.items() if tensor is not None}


@contextmanager
def _loading(what: str, warned: Warned, settings: LoadSettings) -> Iterator[None]:
    """Collect warnings; raise CheckpointUnavailable for the errors of transformers."""
    remedy = (
        "install what it names as missing, or see that the checkpoint is whole and for "
        f"transformers {transformers.__version__}"
    )
    if settings.max_memory:  # transformers 4.51 takes no map that has everything on disk
        remedy = "allow more with --max-memory"

    def make(why: str) -> CheckpointUnavailable:
        return CheckpointUnavailable(
            f"transformers cannot load {what} of {warned.checkpoint}: {why}", remedy
        )

    with raised_as(make), warned.listening():
        yield


def _placement(settings: LoadSettings) -> dict[str, Any]:
    """Return from_pretrained's arguments for the placement of modules by accelerate, if any."""
    if not settings.device_map:
        return {}
    most = {int(k) if k.isdigit() else k: size for k, size in settings.max_memory.items()}
    return {
        "device_map": settings.device_map,
        "max_memory": most or None,
        "offload_folder": settings.offload,
    }


def _special_token(model: Any, name: str) -> Any:
    """Return a special token's id: generation's own, else the configuration's."""
    own = getattr(getattr(model, "generation_config", None), name, None)
    return own if own is not None else getattr(model.config, name, None)


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    eos = _special_token(model, "eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(int(token) for token in ids)


def _pad_token_id(model: Any, family: Family) -> int:
    """Return the id that pads prompts: the checkpoint's own if it has an embedding, else 0."""
    pad = _special_token(model, "pad_token_id")
    rows = len(model.get_input_embeddings().weight) if family.takes_text else 0
    return int(pad) if pad is not None and 0 <= int(pad) < rows else 0


def _call_again(call: Call, features: torch.Tensor) -> torch.Tensor:
    """Repeat a call of a module with another first tensor."""
    answer = first_tensor(call.module(features, *call.arguments[1:], **call.keywords))
    if answer is None:
        raise TypeError(f"{type(call.module).__name__} returned no tensor")
    return answer


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return half precision as float32, which holds it exactly: sums of it must not round again."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.to("cpu", torch.float32) if half else tensor.cpu()


def _model_class(family: Family, config: Mapping[str, Any], *, trusts_code: bool) -> Any:
    """Return transformers' class of a family, or the one that a trusted checkpoint brings."""
    found = getattr(transformers, family.hf_class, None)
    brought = config.get("auto_map") or {} if trusts_code else {}
    for auto, name in brought.items():
        if found is None and str(name).endswith(f".{family.hf_class}"):
            found = getattr(transformers, auto, None)
    if found is None:
        raise ReferenceUnavailable(
            f"transformers {transformers.__version__} has no {family.hf_class}",
            "record with a release that has it; if the checkpoint brings it: --trust-remote-code",
        )
    return found


def _dtype_argument() -> str:
    """Return from_pretrained's name of the dtype, which transformers 4.56 changed."""
    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def _public_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out transformers' own notes, such as the path that a model was loaded from."""
    return {
        name: _public_fields(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not name.startswith("_")
    }


def _try_decoder(reference: HuggingFaceReference, checkpoint: Path) -> dict[str, str]:
    """Return whether padding changes logits, for the environment; derived questions depend on it.

    Raises CheckpointUnavailable if a token changes the logits before it.
    """

    def logits(*ids: int, pads: int = 0) -> torch.Tensor:
        row = torch.tensor([[reference.preparation.pad_token_id] * pads + list(ids)])
        mask = (torch.arange(row.shape[1]) >= pads).long()[None]
        answer = reference.forward(CaseInputs(row, mask), observe=lambda *_: None)
        return answer.logits[pads:]  # type: ignore[index]  # it has logits, or has raised

    alike = functools.partial(torch.allclose, rtol=1e-3, atol=1e-3)
    plain = logits(3, 4)
    if not alike(plain[0], logits(3, 5)[0]):
        raise CheckpointUnavailable(
            f"{reference.family.hf_class} of {checkpoint} is not causal: a token changes the "
            "logits before it",
            f"set is_decoder in config.json, or declare a family without generate; see {PAGE}",
        )
    return {PADDING: UNSEEN} if alike(plain, logits(3, 4, pads=3)) else {}
