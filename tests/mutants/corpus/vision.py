"""Faults in the vision encoder, and in FMS's modules as far as it is the first to use them."""

from tests.mutants.mutant import DERIVED, Edit, Mutant

_SIGLIP = "fms/models/siglip_vision.py"
_LAYERNORM = "fms/modules/layernorm.py"
_HF = "model.vision_model"
_LAYER = f"{_HF}.encoder.layers.0"


def _mutant(name: str, what: str, place: str, old: str, new: str, *, file: str = _SIGLIP) -> Mutant:
    return Mutant(name, what, "vision", place, Edit(file, old, new))


VISION = (
    _mutant(
        "exact-gelu",
        "the exact GELU instead of its tanh form",
        f"{_LAYER}.mlp.activation_fn",
        '"gelu-tanh": GELUTanh,',
        '"gelu-tanh": nn.GELU,',
        file="fms/utils/activation.py",
    ),
    _mutant(
        "activation-missing",
        "no activation between the MLP's projections",
        f"{_LAYER}.mlp.activation_fn",
        "out = self.a(self.w1(x))\n",
        "out = self.w1(x)\n",
        file="fms/modules/feedforward.py",
    ),
    _mutant(
        "causal-vision",
        "causal attention between patches",
        f"{_LAYER}.self_attn",
        'attn_kwargs.get("attn_name", "sdpa_bidirectional")',
        'attn_kwargs.get("attn_name", "sdpa_causal")',
    ),
    _mutant(
        "vision-attention-scale",
        "attention scaled by the model's width, not the head's",
        f"{_LAYER}.self_attn",
        "attn_scale_factor = head_dim**-0.5",
        "attn_scale_factor = self.embed_dim**-0.5",
    ),
    _mutant(
        "vision-head-dropped",
        "the first attention head gives zeros",
        f"{_LAYER}.self_attn",
        "        out = self.dense(attn)\n",
        "        if self.position_encoder is None:\n"
        "            attn[..., : self.emb_v_per_head] = 0\n"
        "        out = self.dense(attn)\n",
        file="fms/modules/attention.py",
    ),
    Mutant(
        "tiles-attend-to-each-other",
        "patches of all tiles attend to each other",
        "vision",
        f"{_LAYER}.self_attn",
        Edit(
            _SIGLIP,
            "hidden_states = self.attn(q=hidden_states, **attn_kwargs)",
            "hidden_states = self.attn(q=hidden_states.flatten(0, 1)[None], **attn_kwargs)"
            ".reshape(hidden_states.shape)",
        ),
        also=(_LAYER,),  # whose code it is that joins the tiles
    ),
    _mutant(
        "vision-norm-epsilon",
        "epsilon 1e-5 instead of 1e-6 in the first norm of each layer",
        f"{_LAYER}.layer_norm1",
        "self.layer_norm1 = LayerNormParameterized(\n"
        "            self.embed_dim,\n"
        "            elementwise_shift=True,\n"
        "            use_mean=True,\n"
        "            eps=config.layer_norm_eps,",
        "self.layer_norm1 = LayerNormParameterized(\n"
        "            self.embed_dim,\n"
        "            elementwise_shift=True,\n"
        "            use_mean=True,\n"
        "            eps=1e-5,",
    ),
    _mutant(
        "epsilon-after-the-root",
        "epsilon is added to the deviation, not to the variance",
        f"{_LAYER}.layer_norm1",
        "xf = xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + self.eps)",
        "xf = xf / (xf.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)",
        file=_LAYERNORM,
    ),
    _mutant(
        "unbiased-variance",
        "the variance is divided by n - 1",
        f"{_LAYER}.layer_norm1",
        "xf.pow(2).mean(-1, keepdim=True)",
        "xf.pow(2).sum(-1, keepdim=True) / (xf.size(-1) - 1)",
        file=_LAYERNORM,
    ),
    _mutant(
        "norm-without-mean",
        "layer norms do not take the mean off",
        f"{_LAYER}.layer_norm1",
        "if self.use_mean:",
        "if False:",
        file=_LAYERNORM,
    ),
    _mutant(
        "norm-without-shift",
        "layer norms do not add their bias",
        f"{_LAYER}.layer_norm1",
        "            x = x + self.bias",
        "            x = x + 0 * self.bias",
        file=_LAYERNORM,
    ),
    _mutant(
        "norm-in-bfloat16",
        "norms compute in bfloat16",
        f"{_LAYER}.layer_norm1",
        "xf = x.float()",
        "xf = x.bfloat16().float()",
        file=_LAYERNORM,
    ),
    _mutant(
        "norm-after-attention",
        "attention before its norm",
        _LAYER,
        "hidden_states = self.layer_norm1(hidden_states)\n"
        "        hidden_states = self.attn(q=hidden_states, **attn_kwargs)",
        "hidden_states = self.attn(q=hidden_states, **attn_kwargs)\n"
        "        hidden_states = self.layer_norm1(hidden_states)",
    ),
    _mutant(
        "residual-after-norm",
        "the MLP's residual is taken after its norm",
        _LAYER,
        "residual = hidden_states\n        hidden_states = self.layer_norm2(hidden_states)",
        "hidden_states = residual = self.layer_norm2(hidden_states)",
    ),
    _mutant(
        "residual-missing",
        "the MLP's residual is not added",
        _LAYER,
        "hidden_states = residual + hidden_states\n\n        return hidden_states",
        "return hidden_states",
    ),
    _mutant(
        "post-norm-missing",
        "the encoder's output is not normalised",
        f"{_HF}.post_layernorm",
        "        last_hidden_state = self.post_layernorm(last_hidden_state)\n",
        "",
    ),
    _mutant(
        "last-layer-skipped",
        "the last layer is not run",
        f"{_HF}.encoder.layers.2",
        "for encoder_layer in self.layers:",
        "for encoder_layer in self.layers[:-1]:",
    ),
    _mutant(
        "first-layer-skipped",
        "the first layer is not run",
        _LAYER,
        "for encoder_layer in self.layers:",
        "for encoder_layer in self.layers[1:]:",
    ),
    _mutant(
        "layers-reversed",
        "layers run from the last to the first",
        f"{_HF}.encoder",
        "for encoder_layer in self.layers:",
        "for encoder_layer in reversed(self.layers):",
    ),
    _mutant(
        "position-ids-late",
        "position ids are one too low: 0, 0, 1, 2 …",
        f"{_HF}.embeddings",
        "self.position_ids = torch.arange(self.num_positions, device=device).expand(\n"
        "            (1, -1)\n        )",
        "self.position_ids = (\n"
        "            (torch.arange(self.num_positions, device=device) - 1)\n"
        "            .clamp(min=0)\n            .expand((1, -1))\n        )",
    ),
    _mutant(
        "position-ids-by-columns",
        "positions run down the columns",
        f"{_HF}.embeddings",
        "embeddings = embeddings + self.position_embedding(self.position_ids)",
        "side = self.image_size // self.patch_size\n"
        "        ids = self.position_ids.view(1, side, side).transpose(1, 2).flatten(1)\n"
        "        embeddings = embeddings + self.position_embedding(ids)",
    ),
    _mutant(
        "patches-by-columns",
        "patches run down the columns",
        f"{_HF}.embeddings",
        "patch_embeds.flatten(2).transpose(1, 2)",
        "patch_embeds.transpose(2, 3).flatten(2).transpose(1, 2)",
    ),
    _mutant(
        "positions-added-twice",
        "position embeddings are added twice",
        f"{_HF}.embeddings",
        "embeddings = embeddings + self.position_embedding(self.position_ids)",
        "embeddings = embeddings + 2 * self.position_embedding(self.position_ids)",
    ),
    _mutant(
        "pixels-in-bfloat16",
        "pixels are rounded to bfloat16",
        f"{_HF}.embeddings",
        "pixel_values.to(dtype=target_dtype)",
        "pixel_values.bfloat16().to(dtype=target_dtype)",
    ),
    Mutant(
        "single-tile-squeezed",
        "a single tile loses its batch dimension",
        DERIVED,
        "tiles",
        Edit(
            _SIGLIP,
            "last_hidden_state = self.post_layernorm(last_hidden_state)",
            "last_hidden_state = self.post_layernorm(last_hidden_state).squeeze(0)",
        ),
    ),
)
