"""A Hugging Face model as the reference: processor, one forward pass with hooks, generation."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from packaging.version import Version
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

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
from snapshot_tool.base.protocol import (
    CaseInputs,
    ForwardPass,
    Generation,
    LoadSettings,
    Observer,
    Phase,
    PreparedCase,
    ReferenceInfo,
    Side,
)
from snapshot_tool.base.recipes import CaseRecipe
from snapshot_tool.families import family_of_config
from snapshot_tool.families.family import PADDING, PAGE, UNSEEN, Family
from snapshot_tool.goldens.parts import widened
from snapshot_tool.reference.loading import (
    Warned,
    changed_fields,
    find_model_class,
    loading,
    loading_settings,
    log_to_handlers_alone,
    pad_token_id,
    placement,
    public_fields,
    raised_as,
    require_computed,
    require_filled,
    special_token,
    unknown_fields,
    unused_weights,
)
from snapshot_tool.reference.preparation import Preparation
from snapshot_tool.taps.hooks import (
    capture_tensors,
    first_tensor,
    module_name,
    tap_modules,
    watch_modules,
)

_LOGITS = 3  # dimensions: rows, length, vocabulary


@dataclass(frozen=True, slots=True)
class HuggingFaceReference:
    """transformers' own implementation of a checkpoint, in evaluation mode.

    warned: the warnings so far.
    """

    family: Family
    model: Any
    preparation: Preparation
    dtype: str
    settings: LoadSettings
    warned: Warned
    loaded: ReferenceInfo

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
        model_class = find_model_class(family, config, trusts_code=settings.trusts_code)
        is_auto = getattr(model_class, "config_class", None) is None
        # transformers warns of this argument unless the class is an Auto class.
        trust = {"trust_remote_code": settings.trusts_code} if is_auto else {}
        config_class = transformers.AutoConfig if is_auto else model_class.config_class
        with loading("the configuration", warned, settings):
            known = config_class.from_pretrained(checkpoint, local_files_only=True, **trust)
            require_computed(config, known, checkpoint / CONFIG)
        with loading("the processor", warned, settings):
            processor = Preparation.load(family, checkpoint, trusts_code=settings.trusts_code)
        with loading("the model", warned, settings):
            # transformers 4.56 changed the name.
            is_new = Version(transformers.__version__) >= Version("4.56")
            model, report = model_class.from_pretrained(
                checkpoint,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation=family.attention or None,
                output_loading_info=True,
                **{"dtype" if is_new else "torch_dtype": getattr(torch, dtype)},
                **trust,
                **placement(settings),
            )
            require_filled(model, report, checkpoint)
            # A model that accelerate placed stays where it is.
            model = model.eval() if settings.device_map else model.to(settings.device).eval()
            if dtype == "float64":
                widen_rotary_frequencies(model)
            eos = special_token(model, "eos_token_id")
            ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
            pad = pad_token_id(model, family)
            info = ReferenceInfo(
                family=family.name,
                phases=family.phases,
                config=public_fields(json.loads(model.config.to_json_string(use_diff=False))),
                environment=loading_settings(model, family, settings),
                eos_token_ids=tuple(map(int, ends)),
                pad_token_id=pad,
                modules=tuple(name for name, _ in model.named_modules() if name),
                unknown_fields=unknown_fields(config, known),
                changed_fields=changed_fields(model.config),
                unused_weights=unused_weights(model, report, checkpoint),
            )
            types = getattr(model.config, "type_vocab_size", None) or 1
            preparation = Preparation(family, processor, pad, types)
            reference = cls(family, model, preparation, dtype, settings, warned, info)
        if family.is_declared:
            return reference
        environment = {**info.environment, **_try_decoder(reference, checkpoint)}
        return replace(reference, loaded=replace(info, environment=environment))

    def info(self) -> ReferenceInfo:
        """Return the family, the configuration, the end tokens, and what else a manifest keeps."""
        return self.loaded

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings of Hugging Face's libraries so far, each once, sorted."""
        return self.warned.texts()

    def modules(self) -> torch.nn.Module:
        """Return the model itself."""
        model: torch.nn.Module = self.model
        return model

    def run_module(
        self, module: str, given: Sequence[torch.Tensor], *, dtype: str
    ) -> Sequence[torch.Tensor]:
        """Run one module by itself on several inputs, computing in a dtype."""
        own = self.model.get_submodule(module)
        if dtype != self.dtype:
            own = copy.deepcopy(own).to(getattr(torch, dtype))
        precision = float64_throughout() if dtype == "float64" else nullcontext()
        with torch.inference_mode(), precision:
            answers = [first_tensor(own(self._cast(value, dtype))) for value in given]
        return [widened(answer) for answer in answers if answer is not None]

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
        connectors = [c for c in self.family.captures if c.phase is Phase.CONNECTOR]
        connector = next((c for c in connectors if c.side is Side.OUTPUT), None)
        repeated = []  # modules that run again
        if connector and connector_input:
            repeated = [self.model.get_submodule(module_name(self.model, connector))]
        calls: list[tuple[Sequence[Any], Mapping[str, Any]]] = []

        def keep_call(_name: str, side: Side, given: Any) -> None:
            if side is Side.INPUT:
                calls.append(given)

        precision = float64_throughout() if self.dtype == "float64" else nullcontext()
        with self._running(), torch.inference_mode(), precision:
            with (
                capture_tensors(self.model, self.family.captures) as captured,
                watch_modules([("", module) for module in repeated], keep_call),
                tap_modules(self.model, observe),
            ):
                answer = self.model(**arguments)
            if connector and connector_input and calls:
                given, keywords = calls[0]
                name = self.family.compared[Phase.VISION]
                vision = {c.name: t for c, t in captured.items() if c.phase is Phase.VISION}
                features = self._cast(connector_input(widened(vision[name].cpu())))
                output = first_tensor(repeated[0](features, *given[1:], **keywords))
                if output is not None:
                    captured[connector] = output
            logits = self._logits(answer) if self.family.logits else None
            if logits is not None and continuation is not None and len(continuation):
                logits = torch.cat([logits, self._continue(answer, arguments, continuation)])
        outputs: dict[Phase, dict[str, torch.Tensor]] = {}
        for capture, tensor in captured.items():
            outputs.setdefault(capture.phase, {})[capture.name] = widened(tensor.cpu())
        return ForwardPass(outputs, None if logits is None else widened(logits.cpu()))

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

    def _cast(self, tensor: torch.Tensor, dtype: str = "") -> torch.Tensor:
        is_float = tensor.is_floating_point()
        wanted = getattr(torch, dtype or self.dtype) if is_float else tensor.dtype
        return tensor.to(self.settings.device, wanted)

    @contextmanager
    def _running(self) -> Iterator[None]:
        def make(why: str) -> ReferenceUnavailable:
            return ReferenceUnavailable(
                f"{self.family.hf_class} of transformers {transformers.__version__} raises {why}",
                "check that config.json, the tokenizer and --dtype fit the weights"
                + ("" if self.family.is_declared else f"; to declare the model: {PAGE}"),
            )

        with self.warned.listening(), raised_as(make):
            yield

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int] | None = None
    ) -> Generation:
        """Generate by argmax, without the checkpoint's sampling or penalty settings."""
        ends = self.loaded.eos_token_ids if eos_token_ids is None else eos_token_ids
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
        return Generation(new, widened(torch.stack([step[0] for step in answer.logits]).cpu()))

    def _require_taken(self, inputs: CaseInputs, new_tokens: int) -> None:
        """Raise InputRefused for what the model cannot compute, or only by accident."""
        if inputs.pixel_values is not None and not inputs.pixel_values.isfinite().all():
            raise InputRefused("the processor's pixel values are not finite")
        if not self.family.takes_text:
            return
        words = self.model.get_input_embeddings()
        least, greatest = int(inputs.input_ids.min()), int(inputs.input_ids.max())
        rows = len(words.weight)
        if least < 0 or greatest >= rows:
            wrong = greatest if greatest >= rows else least
            raise InputRefused(f"token id {wrong} has no embedding, the model has {rows}")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(positions, int):
            return
        tokens, longest = inputs.input_ids.shape[1], positions - self.family.reserved_positions
        if tokens > longest:
            raise InputRefused(f"{tokens} tokens, the model takes {longest}")
        # A table of positions has no row for a token beyond it; computed ones have no end. An
        # encoder of images has a table of its own.
        tables = [m for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        has_table = any(t.num_embeddings >= positions and t is not words for t in tables)
        last = tokens + max(new_tokens - 1, 0)
        if last > longest and has_table and not self.family.takes_images:
            raise InputRefused(
                f"{tokens} tokens and {new_tokens} new ones, the model takes {longest}"
            )

    def _arguments(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
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


class _Float64Throughout(TorchDispatchMode):  # type: ignore[no-untyped-call] # untyped in torch
    """Replaces float32 by float64 in every operation.

    Its base class is documented (Extending PyTorch), but up to torch 2.13 only at this path.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation with float64 instead of float32."""

        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {name: widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(widened, args), **named)


def float64_throughout() -> AbstractContextManager[Any]:
    """Return a context in which torch operations use float64 where float32 was requested."""
    context: AbstractContextManager[Any] = _Float64Throughout()  # type: ignore[no-untyped-call]
    return context


def widen_rotary_frequencies(model: torch.nn.Module) -> None:
    """Compute rotary frequencies again, which are float32 buffers whatever dtype a model has."""
    for module in model.modules():
        initialise = getattr(module, "rope_init_fn", None)
        if callable(initialise) and isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            with float64_throughout():
                module.inv_freq, _ = initialise(module.config, module.inv_freq.device)
