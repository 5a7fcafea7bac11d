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
)
from snapshot_tool.base.recipes import CaseRecipe
from snapshot_tool.base.tap import Side
from snapshot_tool.families import family_of_config
from snapshot_tool.families.family import PADDING, PAGE, UNSEEN, Capture, Family
from snapshot_tool.reference.loading import (
    changed_fields,
    float64_throughout,
    require_computed,
    require_filled,
    unknown_fields,
    unused_weights,
    widen_rotary_frequencies,
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
_REMEDY = (
    "install what it names as missing, or see that the checkpoint is whole and for transformers "
    f"{transformers.__version__}"
)


@dataclass(frozen=True, slots=True)
class HuggingFaceReference:
    """transformers' own implementation of a checkpoint, in evaluation mode.

    warned: what it has warned of so far.
    unknown_fields, changed_fields, unused_weights: see ReferenceInfo.
    facts: what was found out by running a model that no family declares.
    """

    family: Family
    model: Any
    processor: Any
    dtype: str
    settings: LoadSettings
    warned: Warned
    unknown_fields: tuple[str, ...] = ()
    changed_fields: tuple[str, ...] = ()
    unused_weights: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, checkpoint: Path, *, dtype: str, settings: LoadSettings) -> HuggingFaceReference:
        """Load processor and model from a folder alone: nothing is fetched.

        No pickled weights are read, and no code of the checkpoint runs unless it is trusted.
        """
        log_to_handlers_alone()
        accelerate.utils.set_seed(settings.seed, deterministic=True)
        _require_files(checkpoint)
        config = read_json(checkpoint / CONFIG)
        family = family_of_config(config)
        warned = Warned(checkpoint)
        model_class = _model_class(family, config, trusts_code=settings.trusts_code)
        with _loading("the configuration", checkpoint, settings), warned.listening():
            known = _configuration(model_class, checkpoint, settings)
            require_computed(config, known, checkpoint / CONFIG)
        with _loading("the processor", checkpoint, settings), warned.listening():
            processor = Preparation.load(family, checkpoint, trusts_code=settings.trusts_code)
        with _loading("the model", checkpoint, settings), warned.listening():
            model, report = model_class.from_pretrained(
                checkpoint,
                local_files_only=True,
                **_trust(model_class, settings),
                use_safetensors=True,
                attn_implementation=family.attention or None,
                output_loading_info=True,
                **_placement(settings),
                **{_dtype_argument(): getattr(torch, dtype)},
            )
            require_filled(model, report, checkpoint)
            # A model that accelerate placed stays where it is.
            model = model.eval() if settings.device_map else model.to(settings.device).eval()
            if dtype == "float64":
                widen_rotary_frequencies(model)
            reference = cls(
                family=family,
                model=model,
                processor=processor,
                dtype=dtype,
                settings=settings,
                warned=warned,
                unknown_fields=unknown_fields(config, known),
                changed_fields=changed_fields(model.config),
                unused_weights=unused_weights(model, report, checkpoint),
            )
            reference.info()  # raises now if a special token is not a number
        if family.is_declared:
            return reference
        return replace(reference, facts=_try_decoder(reference, checkpoint))

    def info(self) -> ReferenceInfo:
        """Say which family answers, with which configuration and end tokens."""
        config = self.model.config
        eos = self._token("eos_token_id")
        eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        return ReferenceInfo(
            family=self.family.name,
            phases=self.family.phases,
            config=_public_fields(json.loads(config.to_json_string(use_diff=False))),
            environment={
                "attention": str(config._attn_implementation),  # noqa: SLF001 - no other name
                **({"remote_code": "trusted"} if self.settings.trusts_code else {}),
                **self.family.environment,
                **self.facts,
                **_placement_facts(self.settings),
            },
            eos_token_ids=tuple(int(token) for token in eos_ids),
            pad_token_id=self._pad_token_id(),
            modules=tuple(name for name, _ in self.model.named_modules() if name),
            unknown_fields=self.unknown_fields,
            changed_fields=self.changed_fields,
            unused_weights=self.unused_weights,
        )

    def warnings(self) -> tuple[str, ...]:
        """Return what transformers has warned of so far."""
        return self.warned.texts()

    def prepare(
        self, recipe: CaseRecipe, images: Sequence[Image.Image], *, new_tokens: int = 0
    ) -> PreparedCase:
        """Run the checkpoint's own processor on a prompt and its images."""
        types = getattr(self.model.config, "type_vocab_size", None) or 1
        pad = self.info().pad_token_id
        preparation = Preparation(self.family, self.processor, pad, types)
        text = recipe.prompt
        with self.warned.listening():
            if recipe.chat:
                with raised_as(lambda why: TemplateRefused(f"the chat template: {why}")):
                    text = preparation.chat_text(recipe.prompt)
            with raised_as(InputRefused):
                inputs = preparation.encode(recipe, text, images)
                self._require_taken(inputs, new_tokens)
                grids = preparation.image_grids(images)
        return PreparedCase(text, inputs, grids)

    def forward(
        self,
        inputs: CaseInputs,
        *,
        observe: Observer,
        continuation: torch.Tensor | None = None,
        ask_connector: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> ForwardPass:
        """Run the model end to end, keeping what the family names."""
        arguments: dict[str, Any] = self._arguments(inputs)
        if self.family.generates:
            arguments["use_cache"] = continuation is not None
            arguments |= self._positions(arguments["attention_mask"])
        connector = None if ask_connector is None else self._connector()
        with self._running(), torch.inference_mode(), self._precision():
            with (
                capture_tensors(self.model, self.family.captures) as captured,
                keep_calls(connector[1] if connector else self.model) as calls,
                tap_modules(self.model, observe),
            ):
                answer = self.model(**arguments)
            if connector and calls and ask_connector:
                features = ask_connector(_widened(self._vision_output(captured)))
                captured[connector[0]] = _call_again(calls[0], self._cast(features))
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
        """Run tokens after a prompt whose cache `answer` holds; return their logits.

        Another cache than one that grows (a hybrid or a static one, a recurrent state) is not gone
        on with: the whole is run once more.
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
        """Return position ids, as transformers' generate gives them to models that take them."""
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return {}
        return {"position_ids": _position_ids(attention_mask)}

    def _connector(self) -> tuple[Capture, Any] | None:
        """Return the capture of the connector's output and its module, or None without one."""
        for capture in self.family.captures:
            if capture.phase is Phase.CONNECTOR and capture.side is Side.OUTPUT:
                return capture, self.model.get_submodule(module_name(self.model, capture))
        return None

    def _vision_output(self, captured: Mapping[Capture, torch.Tensor]) -> torch.Tensor:
        """Return what the connector is given."""
        name = self.family.compared[Phase.VISION]
        by_name = {(c.phase, c.name): tensor for c, tensor in captured.items()}
        return by_name[Phase.VISION, name]

    def _precision(self) -> AbstractContextManager[Any]:
        return float64_throughout() if self.dtype == "float64" else nullcontext()

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor to the model's device and, where it is floating-point, to its dtype."""
        dtype = getattr(torch, self.dtype) if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.settings.device, dtype)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Collect the model's warnings; raise ReferenceUnavailable for what it raises itself."""

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
        info = self.info()
        ends = info.eos_token_ids if eos_token_ids is None else eos_token_ids
        settings = transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=info.pad_token_id,
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
        logits = _widened(torch.stack([step[0] for step in answer.logits]))
        return Generation(new, logits, self._decode(new))

    def _decode(self, tokens: torch.Tensor) -> str:
        """Return new tokens as text, for people to read; "" if the tokenizer cannot."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        try:
            with raised_as(InputRefused):
                return str(tokenizer.decode(tokens))
        except InputRefused:
            return ""

    def modules(self) -> torch.nn.Module:
        """Return the model itself."""
        model: torch.nn.Module = self.model
        return model

    def _token(self, name: str) -> Any:
        """Return a special token's id: generation's own, else the configuration's."""
        generation = getattr(self.model, "generation_config", None)
        own = getattr(generation, name, None)
        return own if own is not None else getattr(self.model.config, name, None)

    def _pad_token_id(self) -> int:
        """Return what prompts are padded with: the checkpoint's own id if it has an embedding."""
        pad = self._token("pad_token_id")
        rows = self._embedded() if self.family.takes_text else 0
        return int(pad) if pad is not None and 0 <= int(pad) < rows else 0

    def _embedded(self) -> int:
        """Return how many token ids have an embedding."""
        return len(self._words().weight)

    def _words(self) -> Any:
        return self.model.get_input_embeddings()

    def _require_taken(self, inputs: CaseInputs, new_tokens: int) -> None:
        """Raise InputRefused for what the model cannot compute, or only by accident."""
        if self.family.takes_text:
            self._require_length(inputs.input_ids.shape[1], new_tokens)
            ids, rows = inputs.input_ids, self._embedded()
            if int(ids.max()) >= rows or int(ids.min()) < 0:
                wrong = int(ids.max()) if int(ids.max()) >= rows else int(ids.min())
                raise InputRefused(f"token id {wrong} has no embedding, the model has {rows}")
        if inputs.pixel_values is not None and not inputs.pixel_values.isfinite().all():
            raise InputRefused("the processor's pixel values are not finite")

    def _require_length(self, tokens: int, new_tokens: int) -> None:
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
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
        tables = (m for m in self.model.modules() if isinstance(m, torch.nn.Embedding))
        return any(t.num_embeddings >= positions and t is not self._words() for t in tables)

    def _arguments(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        arguments = {}
        if self.family.takes_text:
            arguments["input_ids"] = inputs.input_ids
            arguments["attention_mask"] = inputs.attention_mask
        if inputs.pixel_values is not None:
            batched = self.family.pixel_dims > inputs.pixel_values.dim()
            pixels = inputs.pixel_values
            arguments["pixel_values"] = pixels.unsqueeze(0) if batched else pixels
        if inputs.pixel_attention_mask is not None:
            arguments["pixel_attention_mask"] = inputs.pixel_attention_mask.unsqueeze(0)
        if inputs.image_sizes is not None:
            arguments["image_sizes"] = inputs.image_sizes
        if inputs.token_type_ids is not None:
            arguments["token_type_ids"] = inputs.token_type_ids
        return {name: self._cast(tensor) for name, tensor in arguments.items()}


def _require_files(checkpoint: Path) -> None:
    """Raise CheckpointUnavailable if a file is missing, cut short or damaged."""
    if not weight_files(checkpoint):
        raise CheckpointUnavailable(
            f"cannot load {checkpoint}: it has no {WEIGHTS} and no {INDEX}",
            "convert its weights to safetensors: pickled weights are not read",
        )
    require_whole(checkpoint, loaded_files(checkpoint))


def _loading(what: str, checkpoint: Path, settings: LoadSettings) -> AbstractContextManager[None]:
    # transformers 4.51 takes no map that has everything on disk.
    remedy = "allow more with --max-memory" if settings.max_memory else _REMEDY
    return raised_as(
        lambda why: CheckpointUnavailable(
            f"transformers cannot load {what} of {checkpoint}: {why}", remedy
        )
    )


def _placement(settings: LoadSettings) -> dict[str, Any]:
    """Return what tells transformers where modules go, or nothing."""
    if not settings.device_map:
        return {}
    most = {int(k) if k.isdigit() else k: size for k, size in settings.max_memory.items()}
    return {
        "device_map": settings.device_map,
        "max_memory": most or None,
        "offload_folder": settings.offload,
    }


def _placement_facts(settings: LoadSettings) -> dict[str, str]:
    if not settings.device_map:
        return {}
    most = ", ".join(f"{device}={size}" for device, size in sorted(settings.max_memory.items()))
    return {"device_map": settings.device_map, **({"max_memory": most} if most else {})}


def _call_again(call: Call, features: torch.Tensor) -> torch.Tensor:
    """Make a module's call again with another tensor in the first one's place."""
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


def _configuration(model_class: Any, checkpoint: Path, settings: LoadSettings) -> Any:
    """Return the configuration as the model's class reads it."""
    kind = transformers.AutoConfig if _is_auto(model_class) else model_class.config_class
    return kind.from_pretrained(checkpoint, local_files_only=True, **_trust(model_class, settings))


def _is_auto(model_class: Any) -> bool:
    """Tell whether the class is chosen by the checkpoint, as that of trusted code is."""
    return getattr(model_class, "config_class", None) is None


def _trust(model_class: Any, settings: LoadSettings) -> dict[str, bool]:
    """Return the argument of Auto classes; transformers warns of it for other classes."""
    return {"trust_remote_code": settings.trusts_code} if _is_auto(model_class) else {}


def _dtype_argument() -> str:
    """Return from_pretrained's name of the dtype, which transformers 4.56 changed."""
    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def _position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count positions from the first real token, as transformers' generate does."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _public_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out transformers' own notes, such as the path that a model was loaded from."""
    return {
        name: _public_fields(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not name.startswith("_")
    }


def _try_decoder(reference: HuggingFaceReference, checkpoint: Path) -> dict[str, str]:
    """Return what nobody says of an undeclared model, and what derived questions go by.

    Raises CheckpointUnavailable where a token changes the logits before it.
    """

    def logits(*ids: int, pads: int = 0) -> torch.Tensor:
        row = torch.tensor([[reference.info().pad_token_id] * pads + list(ids)])
        mask = (torch.arange(row.shape[1]) >= pads).long()[None]
        answer = reference.forward(CaseInputs(row, mask), observe=_look_away)
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


def _look_away(module: str, side: Side, tensor: torch.Tensor) -> None:
    """Observe nothing."""
