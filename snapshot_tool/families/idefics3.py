"""Idefics3 (SmolVLM): a SigLIP encoder, a pixel-shuffle connector and a Llama decoder.

Hugging Face: transformers.models.idefics3. FMS: fms.models.idefics3, on a branch of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.errors import PhaseUnsupported
from snapshot_tool.base.protocol import PHASES, CaseInputs, Phase, Side
from snapshot_tool.families.family import Capture, Config, Family, Fields, FmsPort, ModulePair
from snapshot_tool.families.fms_calls import DecoderCalls, EndToken, cut_after_end
from snapshot_tool.families.llama import decoder_pairs, llama_config
from snapshot_tool.families.siglip_vision import VISION_OUTPUT, siglip_config, siglip_pairs

if TYPE_CHECKING:
    import torch
    from PIL import Image

CONNECTOR_OUTPUT = "image_hidden_states"


def _patches_along_a_side(vision: Config) -> int:
    return int(vision["image_size"] // vision["patch_size"])


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's Idefics3Config, SiglipVisionConfig and LLaMAConfig."""
    vision, scale = config["vision_config"], config["scale_factor"]
    text = llama_config(config["text_config"])
    pad = config["text_config"].get("pad_token_id")
    return {
        "vision_config": {
            **siglip_config(vision),
            "use_navit_position_buckets": True,  # as Idefics3VisionEmbeddings numbers patches
        },
        # FMS's generate puts it in the place of every padding token: it must be in the vocabulary.
        "text_config": {**text, "pad_id": 0 if pad is None else pad},
        "image_token_id": config["image_token_id"],
        "connector_scale": scale,
        "image_span_len": (_patches_along_a_side(vision) // scale) ** 2,
    }


class _Calls(DecoderCalls):
    """The interface of fms.models.idefics3, as it was in any commit of FMS's pull request 503."""

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        """Return the tiles of all images, (tiles, channels, height, width), and their mask."""
        import torch

        answers = [self._preprocessor.preprocess(image) for image in images]
        found = {
            # Without the batch that an image's tiles stand in.
            "pixel_values": [a["pixel_values"].flatten(0, -4) for a in answers],
            "pixel_attention_mask": [
                a["pixel_attention_mask"].flatten(0, -3).bool()
                for a in answers
                if "pixel_attention_mask" in a
            ],
        }
        return {n: torch.cat(tiles) for n, tiles in found.items() if len(tiles) == len(images)}

    @functools.cached_property
    def _preprocessor(self) -> Any:
        """FMS's preprocessor, which wraps Hugging Face's processor: loaded when it is needed."""
        load = self.loaded.models.idefics3.load_smolvlm_preprocessor
        try:
            return load(str(self.loaded.checkpoint))
        except ImportError as error:
            if importlib.util.find_spec("transformers"):
                raise
            raise PhaseUnsupported(
                "FMS preprocesses with Hugging Face's processor, and transformers is not installed"
            ) from error

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the encoder's last hidden state, (tiles, patches, width)."""
        # FMS has no public method for this step. _encode_images is the one that forward calls (pull
        # request 503, 08a7f5b2 to 2603441a): it decides which patch mask the encoder is given.
        encode = getattr(self.model, "_encode_images", None)
        features: torch.Tensor = (
            encode(pixel_values) if encode else self.model.vision_tower(pixel_values)[0]
        )
        return features

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        """Return the text model's image tokens, (tiles, tokens, width)."""
        side = _patches_along_a_side(self.loaded.config["vision_config"])
        tokens: torch.Tensor = self.model.connector(features, H=side, W=side)
        return tokens

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        return self.forward_batch([inputs])

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        return _logits(self.model(**self._arguments(rows)))

    def forward_on_cache(
        self, part: CaseInputs, cache: Any, seen: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Any]:
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise PhaseUnsupported(
                "FMS's forward takes no position_ids: it cannot continue from a key-value cache"
            )
        return self._run_on_cache(self._arguments([part]), cache, seen)

    def embed(self, inputs: CaseInputs) -> torch.Tensor:
        if inputs.pixel_values is None:
            return inputs.input_ids
        hook = getattr(self.model, "prepare_inputs_for_generation", None)
        if hook is None:
            raise PhaseUnsupported(
                "FMS's idefics3 has no prepare_inputs_for_generation, which embeds images"
            )
        given = self._arguments([inputs])
        embedded: torch.Tensor = hook(0, inputs.input_ids, {**given, "use_cache": True})[0]
        return embedded

    def step(
        self, embedded: torch.Tensor, cache: Any, seen: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        return self._run_on_cache({"input_ids": embedded}, cache, seen)

    def _run_on_cache(
        self, given: Mapping[str, Any], cache: Any, seen: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Return the logits and the cache; seen: the mask, positions, and other arguments."""
        answer = self.model(
            **{**given, **seen, "attention_mask": None}, past_key_value_states=cache, use_cache=True
        )
        named = answer.get("past_key_value_states") if isinstance(answer, Mapping) else None
        cache = answer[1] if isinstance(answer, tuple | list) and len(answer) > 1 else named
        if cache is None:
            raise PhaseUnsupported("FMS's forward returns no key-value cache")
        return _logits(answer), cache

    @property
    def generation(self) -> Callable[..., Any]:
        generate: Callable[..., Any] = self.model.generate
        return generate

    def new_tokens(
        self, rows: Sequence[CaseInputs], max_new_tokens: int, end: EndToken
    ) -> torch.Tensor:
        ids: torch.Tensor = self.generation(
            **self._arguments(rows), max_new_tokens=max_new_tokens, eos_token_id=end
        )
        return ids[:, rows[0].input_ids.shape[1] :]

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        import torch

        end, found = self.end_token(eos_token_ids), []
        pad = self.loaded.config.get("pad_token_id")
        filler = [*eos_token_ids, *([] if pad is None else [pad])]
        for new in self.new_tokens(rows, max_new_tokens, end):
            cut = cut_after_end(new, eos_token_ids)
            rest = new[len(cut) :]
            is_filled = bool(torch.isin(rest, torch.tensor(filler, device=new.device)).all())
            # A row that continues after its end stays whole: the model was given its end tokens.
            found.append(cut if end is None or is_filled else new)
        return found

    def _arguments(self, rows: Sequence[CaseInputs]) -> dict[str, torch.Tensor | None]:
        """Return prompts of one length as FMS's forward and generate take them.

        `pixel_values` are (rows, tiles, channels, height, width). A row with fewer tiles than
        others is filled up; `pixel_attention_mask` is passed if it marks such tiles, or if a tile
        is padded: without one, FMS takes all pixels as real.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        given: dict[str, torch.Tensor | None] = {
            "input_ids": torch.cat([row.input_ids for row in rows]),
            "attention_mask": torch.cat([row.attention_mask for row in rows]),
            "pixel_values": None,
        }
        some = next((row.pixel_values for row in rows if row.pixel_values is not None), None)
        if some is None:
            return given
        tiles, masks = [], []
        for row in rows:
            pixels = some[:0] if row.pixel_values is None else row.pixel_values
            real = row.pixel_attention_mask
            if real is None:
                real = pixels.new_ones((len(pixels), *pixels.shape[-2:]), dtype=torch.bool)
            tiles.append(pixels)
            masks.append(real)
        # A copy of the tiles of a large image takes 100 MB.
        alone = len(tiles) == 1
        given["pixel_values"] = tiles[0][None] if alone else pad_sequence(tiles, batch_first=True)
        mask = pad_sequence(masks, batch_first=True)
        taken = inspect.signature(self.model.forward).parameters
        if not bool(mask.all()) and "pixel_attention_mask" in taken:
            given["pixel_attention_mask"] = mask.long()  # as Hugging Face has it
        return given


def _logits(answer: Any) -> torch.Tensor:
    """Return the logits that FMS's forward returns, alone, first in a tuple, or by name."""
    found = answer["logits"] if isinstance(answer, Mapping) else answer
    logits: torch.Tensor = found[0] if isinstance(found, tuple | list) else found
    return logits


IDEFICS3 = Family(
    name="idefics3",
    hf_class="Idefics3ForConditionalGeneration",
    phases=PHASES,
    captures=(
        Capture(Phase.VISION, VISION_OUTPUT, "model.vision_model", Side.OUTPUT),
        # Kept since transformers changed how it computes them: 4.57 is off by one in float32.
        Capture(
            Phase.VISION,
            "position_ids",
            "model.vision_model.embeddings.position_embedding",
            Side.INPUT,
            judged=False,
        ),
        Capture(Phase.CONNECTOR, CONNECTOR_OUTPUT, "model.connector", Side.OUTPUT),
    ),
    compared={Phase.VISION: VISION_OUTPUT, Phase.CONNECTOR: CONNECTOR_OUTPUT},
    pixel_dims=5,
    tile_id_field="image_token_id",
    fms=FmsPort(
        "idefics3",
        _fms_config,
        _Calls,
        (
            *siglip_pairs("vision_tower.base_model", "model.vision_model"),
            ModulePair("connector", "model.connector"),
            ModulePair(r"connector\.proj", "model.connector.modality_projection"),
            ModulePair(r"connector\.proj", "model.connector.modality_projection.proj"),
            *decoder_pairs("text_model.base_model", "model.text_model", fms_head="text_model.head"),
        ),
        # Before 4383c72e FMS numbered only whole tiles, as Hugging Face does.
        absent={"use_navit_position_buckets": True},
        encoder="vision_tower",
        tiles_apart=True,
    ),
)
