"""Faults thought up when the tool was done, to see what it finds of those it was not made with.

Nothing of the tool was changed for one of them: what is missed here stays missed.
"""

import torch

from tests.mutants.mutant import GENERATION, MODEL, PREPROCESSING, Edit, Mutant
from tests.mutants.weights import changed, swapped

_IDEFICS3 = "fms/models/idefics3_components/fms_model.py"
_CONNECTOR = "fms/models/idefics3_components/connector.py"
_PACK = "fms/models/idefics3_components/pack.py"
_PICTURES = "fms/models/idefics3_components/own_preprocessing.py"
_SIGLIP = "fms/models/siglip_vision.py"
_LLAMA = "fms/models/llama.py"
_ATTENTION = "fms/modules/attention.py"
_LOOP = "fms/utils/generation.py"
_VISION = "model.vision_model"
_TEXT = "model.text_model"


def _pictures(name: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(name, what, "preprocessing", PREPROCESSING, Edit(_PICTURES, old, new))


def _loop(name: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(name, what, "generate", GENERATION, Edit(_LOOP, old, new))


def _without_last_tokens(tensor: torch.Tensor) -> torch.Tensor:
    tensor[-10:] = 0
    return tensor


def _with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[7, 7] = torch.nan
    return tensor


def _with_noise(tensor: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return tensor + 1e-4 * float(tensor.std()) * noise


def _clipped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clamp(-2.5 * float(tensor.std()), 2.5 * float(tensor.std()))


def _with_last_row_moved(tensor: torch.Tensor) -> torch.Tensor:
    tensor[-1] += 0.01
    return tensor


FURTHER = (
    _pictures(
        "whole-image-bilinear",
        "the whole image is made smaller by another filter than its tiles",
        "return [*tiles, picture.resized(side, side, self.resample).pixels]",
        "return [*tiles, picture.resized(side, side, Image.Resampling.BILINEAR).pixels]",
    ),
    _pictures(
        "tiles-one-pixel-off",
        "tiles are cut one pixel too far to the right",
        "picture.pixels[top : top + side, left : left + side]",
        "np.roll(picture.pixels, -1, axis=1)[top : top + side, left : left + side]",
    ),
    _pictures(
        "alpha-premultiplied",
        "colours are multiplied by their transparency and divided by it again",
        'opaque = image.convert("RGBA")',
        'opaque = image.convert("RGBA").convert("RGBa").convert("RGBA")',
    ),
    _pictures(
        "edge-rounded",
        "the shorter edge is rounded to the nearest pixel, not down",
        "width, height = longest, int(longest / aspect_ratio)",
        "width, height = longest, round(longest / aspect_ratio)",
    ),
    _pictures(
        "white-clipped",
        "values are kept below 1",
        "torch.from_numpy(values.transpose(0, 3, 1, 2).copy())",
        "torch.from_numpy(values.transpose(0, 3, 1, 2).copy().clip(-1, 0.999))",
    ),
    Mutant(
        "positions-slightly-scaled",
        "position embeddings times 1.0005",
        "vision",
        f"{_VISION}.embeddings",
        Edit(
            _SIGLIP,
            "embeddings = embeddings + self.position_embedding(self.position_ids)",
            "embeddings = embeddings + self.position_embedding(self.position_ids) * 1.0005",
        ),
    ),
    Mutant(
        "last-norm-epsilon",
        "epsilon 1e-5 instead of 1e-6 in the encoder's last norm alone",
        "vision",
        f"{_VISION}.post_layernorm",
        Edit(_SIGLIP, "eps=self.config.layer_norm_eps", "eps=1e-5"),
    ),
    Mutant(
        "second-layer-twice",
        "the second layer is run twice",
        "vision",
        f"{_VISION}.encoder",
        Edit(
            _SIGLIP,
            "for encoder_layer in self.layers:",
            "for encoder_layer in [*self.layers[:2], *self.layers[1:]]:",
        ),
    ),
    Mutant(
        "attention-in-float16",
        "what attention adds is rounded to float16",
        "vision",
        f"{_VISION}.encoder.layers.0",
        Edit(
            _SIGLIP,
            "hidden_states = self.attn(q=hidden_states, **attn_kwargs)",
            "hidden_states = self.attn(q=hidden_states, **attn_kwargs).half().float()",
        ),
    ),
    Mutant(
        "tokens-reversed",
        "the tokens of a tile come from the last to the first",
        "connector",
        "model.connector",
        Edit(
            _CONNECTOR,
            "return self.proj(self.pixel_unshuffle(patch_embeds, H, W))",
            "return self.proj(self.pixel_unshuffle(patch_embeds, H, W)).flip(1)",
        ),
    ),
    Mutant(
        "tokens-clipped",
        "image tokens are kept within 3 of 0",
        "connector",
        "model.connector",
        Edit(
            _CONNECTOR,
            "return self.proj(self.pixel_unshuffle(patch_embeds, H, W))",
            "return self.proj(self.pixel_unshuffle(patch_embeds, H, W)).clamp(-3, 3)",
        ),
    ),
    Mutant(
        "attention-window",
        "tokens see the 64 before them, not all",
        "forward",
        f"{_TEXT}.layers.0.self_attn",
        Edit(
            _IDEFICS3,
            "(real.unsqueeze(-1) == real.unsqueeze(-2)).tril()",
            "(real.unsqueeze(-1) == real.unsqueeze(-2)).tril().triu(-63)",
        ),
    ),
    Mutant(
        "half-the-head-rotated",
        "rotary embedding turns the first half of each head alone",
        "forward",
        f"{_TEXT}.layers.0.self_attn",
        Edit(
            _LLAMA,
            "ratio=self.config.rope_theta,",
            "ratio=self.config.rope_theta, partial_rope=0.5,",
        ),
    ),
    Mutant(
        "logits-capped",
        "logits are capped softly at 50",
        "forward",
        MODEL,
        Edit(
            _IDEFICS3,
            "logits = self.text_model.head(hidden)",
            "logits = 50 * torch.tanh(self.text_model.head(hidden) / 50)",
        ),
    ),
    Mutant(
        "hard-swish",
        "the piecewise form of SiLU",
        "forward",
        f"{_TEXT}.layers.0.mlp.act_fn",
        Edit("fms/utils/activation.py", '"swish": nn.SiLU,', '"swish": nn.Hardswish,'),
    ),
    Mutant(
        "norm-weights-plus-one",
        "norms are scaled by one more than their weight, as Gemma's are",
        "vision",
        f"{_VISION}.encoder.layers.0.layer_norm1",
        Edit("fms/modules/layernorm.py", "x = self.weight * x", "x = (1 + self.weight) * x"),
    ),
    Mutant(
        "one-key-head-for-all",
        "every head takes the first key head's keys",
        "forward",
        f"{_TEXT}.layers.0.self_attn",
        Edit(
            _ATTENTION,
            "keys_e = key_cache.unsqueeze(2).expand(-1, -1, expansion, -1, -1).flatten(1, 2)\n"
            "        values_e = (\n"
            "            value_cache.unsqueeze(2).expand(-1, -1, expansion, -1, -1).flatten(1, 2)\n"
            "        )\n"
            "    else:\n"
            "        keys_e = key_cache\n"
            "        values_e = value_cache\n"
            "\n"
            "    attn_algorithm",
            "keys_e = key_cache[:, :1].expand(-1, nheads, -1, -1)\n"
            "        values_e = (\n"
            "            value_cache.unsqueeze(2).expand(-1, -1, expansion, -1, -1).flatten(1, 2)\n"
            "        )\n"
            "    else:\n"
            "        keys_e = key_cache\n"
            "        values_e = value_cache\n"
            "\n"
            "    attn_algorithm",
        ),
    ),
    Mutant(
        "many-tiles-in-another-order",
        "more than twenty tiles are encoded from the last to the first",
        "forward",
        "model",
        Edit(
            _IDEFICS3,
            "grid = math.isqrt(features.shape[1])",
            "features = features.flip(0) if len(features) > 20 else features\n"
            "        grid = math.isqrt(features.shape[1])",
        ),
    ),
    Mutant(
        "tokens-slightly-scaled",
        "image tokens times 1.0005 among the text",
        "forward",
        "model",
        Edit(
            _PACK,
            "merged[row, places] = tokens[row, :count]",
            "merged[row, places] = tokens[row, :count] * 1.0005",
        ),
    ),
    _loop(
        "chosen-in-float16",
        "the next token is chosen from logits in float16",
        "torch.argmax(logits, dim=-1)",
        "torch.argmax(logits.half(), dim=-1)",
    ),
    _loop(
        "no-token-twice",
        "the last token may not come again at once",
        "torch.argmax(logits, dim=-1)",
        'torch.argmax(logits.scatter(-1, result[:, -1:], -float("inf")), dim=-1)',
    ),
    Mutant(
        "cache-of-100",
        "the cache keeps the last hundred tokens",
        "generate",
        GENERATION,
        Edit(
            _ATTENTION,
            'sliding_window = attn_kwargs.get("sliding_window", 0)\n'
            "        if sliding_window != 0:",
            'sliding_window = attn_kwargs.get("sliding_window", 100)\n'
            "        if sliding_window != 0:",
        ),
    ),
    Mutant(
        "cache-in-float16",
        "cached values are rounded to float16",
        "derived",
        "split",
        Edit(
            _ATTENTION,
            "return out, (keys_return, values_return)",
            "return out, (keys_return, values_return.half().to(values.dtype))",
        ),
    ),
    Mutant(
        "down-projections-swapped",
        "two layers' down projections change places",
        "forward",
        f"{_TEXT}.layers.1.mlp.down_proj",
        swapped(
            "text_model.base_model.layers.1.ff_sub_layer.w2.weight",
            "text_model.base_model.layers.2.ff_sub_layer.w2.weight",
        ),
    ),
    Mutant(
        "last-tokens-never-chosen",
        "the head has zeros for the last ten tokens of the vocabulary",
        "forward",
        "lm_head",
        changed("text_model.head.weight", "last ten rows zeroed", _without_last_tokens),
    ),
    Mutant(
        "one-weight-not-a-number",
        "one element of a value projection is NaN",
        "forward",
        f"{_TEXT}.layers.2.self_attn.v_proj",
        changed(
            "text_model.base_model.layers.2.attn.in_proj.value.weight", "[7, 7] is NaN", _with_nan
        ),
    ),
    Mutant(
        "gate-with-noise",
        "one gate projection with noise of a ten thousandth of its spread",
        "forward",
        f"{_TEXT}.layers.3.mlp.gate_proj",
        changed("text_model.base_model.layers.3.ff_sub_layer.wg.weight", "noise", _with_noise),
    ),
    Mutant(
        "fc1-clipped",
        "one MLP projection is clipped to two and a half times its spread",
        "vision",
        f"{_VISION}.encoder.layers.1.mlp.fc1",
        changed("vision_tower.base_model.encoder.layers.1.mlp.w1.weight", "clipped", _clipped),
    ),
    Mutant(
        "last-position-moved",
        "the last patch's position embedding is 0.01 off",
        "vision",
        f"{_VISION}.embeddings.position_embedding",
        changed(
            "vision_tower.base_model.embeddings.position_embedding.weight",
            "last row + 0.01",
            _with_last_row_moved,
        ),
    ),
)
