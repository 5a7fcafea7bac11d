"""Faults in the text model, and in FMS's modules as far as only it uses them."""

from tests.mutants.mutant import DERIVED, MODEL, Edit, Mutant

_IDEFICS3 = "fms/models/idefics3_components/fms_model.py"
_LLAMA = "fms/models/llama.py"
_ATTENTION = "fms/modules/attention.py"
_POSITIONS = "fms/modules/positions.py"
_HF = "model.text_model"
_LAYER = f"{_HF}.layers.0"
_SELF_ATTENTION = f"{_LAYER}.self_attn"


def _mutant(name: str, what: str, place: str, old: str, new: str, *, file: str = _LLAMA) -> Mutant:
    return Mutant(name, what, "forward", place, Edit(file, old, new))


def _in_rope(name: str, what: str, old: str, new: str) -> Mutant:
    """Return a fault in the rotary embedding, which both implementations apply in attention."""
    return _mutant(name, what, _SELF_ATTENTION, old, new, file=_POSITIONS)


def _derived(
    name: str,
    what: str,
    kind: str,
    old: str,
    new: str,
    *,
    file: str,
    also: tuple[str, ...] = (),
) -> Mutant:
    """Return a fault that only derived questions show, by the kind of question that should."""
    return Mutant(name, what, DERIVED, kind, Edit(file, old, new), also)


TEXT = (
    _mutant(
        "rope-base",
        "rotary base 10,000 instead of the checkpoint's",
        _SELF_ATTENTION,
        "ratio=self.config.rope_theta,",
        "ratio=10_000.0,",
    ),
    _in_rope(
        "rope-exponent",
        "frequencies are spread over dim - 2",
        "        ratio = self.ratio\n        dim = self.dim\n\n        freqs = 1.0 / (",
        "        dim = self.dim\n        ratio = self.ratio ** (dim / (dim - 2))\n\n"
        "        freqs = 1.0 / (",
    ),
    _in_rope(
        "rope-positions-halved",
        "positions are scaled by one half",
        "t = torch.arange(scaled_max_seq_len, device=device, dtype=freqs.dtype)",
        "t = torch.arange(scaled_max_seq_len, device=device, dtype=freqs.dtype) / 2",
    ),
    _in_rope(
        "rope-backwards",
        "pairs rotate the other way",
        "torch.cos(freqs),\n                            -torch.sin(freqs),\n"
        "                            torch.sin(freqs),",
        "torch.cos(freqs),\n                            torch.sin(freqs),\n"
        "                            -torch.sin(freqs),",
    ),
    _in_rope(
        "rope-in-bfloat16",
        "sines and cosines are rounded to bfloat16",
        "freqs = freqs.float()  # 1 L D/2 2 2",
        "freqs = freqs.bfloat16().float()",
    ),
    _in_rope(
        "rope-positions-from-one",
        "positions count from 1",
        "        if self.partial_rope != 1.0:\n            q_rope",
        "        position_ids = position_ids + 1\n"
        "        if self.partial_rope != 1.0:\n            q_rope",
    ),
    _in_rope(
        "rope-positions-end-at-100",
        "positions beyond 100 are taken for 100",
        "freqs = self.cached_freqs[q.device.index][alpha][position_ids]",
        "freqs = self.cached_freqs[q.device.index][alpha][position_ids.clamp(max=100)]",
    ),
    _mutant(
        "keys-not-rotated",
        "only queries are rotated",
        _SELF_ATTENTION,
        "queries, keys = self.position_encoder.adjusted_qk(",
        "queries, _ = self.position_encoder.adjusted_qk(",
        file=_ATTENTION,
    ),
    _mutant(
        "kv-heads-interleaved",
        "grouped heads take their keys and values in turns",
        _SELF_ATTENTION,
        "        keys_e,\n        values_e,\n        attn_mask=attn_mask,",
        "        key_cache.repeat(1, expansion, 1, 1),\n"
        "        value_cache.repeat(1, expansion, 1, 1),\n        attn_mask=attn_mask,",
        file=_ATTENTION,
    ),
    _mutant(
        "text-attention-scale",
        "attention scaled by the model's width, not the head's",
        _SELF_ATTENTION,
        "            position_encoder=rotary_emb,\n",
        "            position_encoder=rotary_emb,\n"
        "            scale_factor=self.config.emb_dim**-0.5,\n",
    ),
    _mutant(
        "text-head-dropped",
        "the last attention head gives zeros",
        _SELF_ATTENTION,
        "        out = self.dense(attn)\n",
        "        if self.position_encoder is not None:\n"
        "            attn[..., -self.emb_v_per_head :] = 0\n"
        "        out = self.dense(attn)\n",
        file=_ATTENTION,
    ),
    _mutant(
        "not-causal",
        "tokens attend to later ones",
        _SELF_ATTENTION,
        "(real.unsqueeze(-1) == real.unsqueeze(-2)).tril()",
        "(real.unsqueeze(-1) == real.unsqueeze(-2))",
        file=_IDEFICS3,
    ),
    _mutant(
        "padding-ignored",
        "padding is attended to",
        _SELF_ATTENTION,
        "real = attention_mask.bool()",
        "real = torch.ones_like(attention_mask).bool()",
        file=_IDEFICS3,
    ),
    _mutant(
        "padding-mask-one-late",
        "with padding, tokens see one token ahead",
        _SELF_ATTENTION,
        "(real.unsqueeze(-1) == real.unsqueeze(-2)).tril()",
        "(real.unsqueeze(-1) == real.unsqueeze(-2)).tril(0 if bool(real.all()) else 1)",
        file=_IDEFICS3,
    ),
    _mutant(
        "padding-not-counted-out",
        "with padding, positions count from the row's start",
        _SELF_ATTENTION,
        '"position_ids": (real.cumsum(-1) - 1).clamp(min=0),',
        '"position_ids": torch.ones_like(attention_mask).cumsum(-1) - 1,',
        file=_IDEFICS3,
    ),
    _mutant(
        "text-norm-epsilon",
        "epsilon 1e-6 instead of 1e-5 in the first norm of each layer",
        f"{_LAYER}.input_layernorm",
        "self.ln = LayerNormParameterized(\n            self.config.emb_dim,\n"
        "            elementwise_scale=True,\n            elementwise_shift=False,\n"
        "            use_mean=False,\n            eps=self.config.norm_eps,",
        "self.ln = LayerNormParameterized(\n            self.config.emb_dim,\n"
        "            elementwise_scale=True,\n            elementwise_shift=False,\n"
        "            use_mean=False,\n            eps=1e-6,",
    ),
    _mutant(
        "final-norm-takes-mean",
        "the final norm is a layer norm",
        f"{_HF}.norm",
        "dec_norm = LayerNormParameterized(\n            self.config.emb_dim,\n"
        "            elementwise_scale=True,\n            elementwise_shift=False,\n"
        "            use_mean=False,",
        "dec_norm = LayerNormParameterized(\n            self.config.emb_dim,\n"
        "            elementwise_scale=True,\n            elementwise_shift=False,\n"
        "            use_mean=True,",
    ),
    _mutant(
        "final-norm-missing",
        "the last layer's output is not normalised",
        f"{_HF}.norm",
        "        dec_out = self.dec_norm(dec_out)\n",
        "",
    ),
    Mutant(
        "mlp-takes-attention-norm",
        "the MLP's input goes through attention's norm",
        "forward",
        f"{_LAYER}.post_attention_layernorm",
        Edit(_LLAMA, "x = self.ff_ln(x)", "x = self.ln(x)"),
        also=(_LAYER,),
    ),
    _mutant(
        "residual-in-bfloat16",
        "attention's sum with its residual is rounded to bfloat16",
        _LAYER,
        "x = x + residual\n\n        # then we do FF",
        "x = (x + residual).bfloat16().to(x.dtype)\n\n        # then we do FF",
    ),
    _mutant(
        "residual-scaled",
        "the MLP's output is halved before it is added",
        _LAYER,
        "x = x + residual\n\n        if use_cache:",
        "x = x / 2 + residual\n\n        if use_cache:",
    ),
    _mutant(
        "gelu-gate",
        "GELU instead of SiLU",
        f"{_LAYER}.mlp.act_fn",
        "activation_fn=str_to_activation(self.config.activation_fn)",
        'activation_fn=str_to_activation("gelu")',
    ),
    _mutant(
        "gate-and-up-swapped",
        "the activation is applied to the up projection",
        f"{_LAYER}.mlp",
        "wg, w1 = torch.split(out_fused, [self.hidden_dim, self.hidden_dim], dim=2)",
        "w1, wg = torch.split(out_fused, [self.hidden_dim, self.hidden_dim], dim=2)",
        file="fms/modules/feedforward.py",
    ),
    _mutant(
        "text-layer-skipped",
        "the last layer is not run",
        f"{_HF}.layers.3",
        "for i, layer in enumerate(self.layers):",
        "for i, layer in enumerate(self.layers[:-1]):",
    ),
    _mutant(
        "embeddings-scaled",
        "embeddings are scaled by the root of the width",
        _HF,
        "x_in = self.embedding(x_in) if inputs_embeds is None else inputs_embeds",
        "x_in = self.embedding(x_in) if inputs_embeds is None else inputs_embeds\n"
        "        x_in = x_in * self.config.emb_dim**0.5",
    ),
    _mutant(
        "logits-scaled",
        "logits are divided by a temperature of 1.01",
        MODEL,
        "logits = self.text_model.head(hidden)",
        "logits = self.text_model.head(hidden) / 1.01",
        file=_IDEFICS3,
    ),
    _mutant(
        "logits-rounded",
        "logits go through bfloat16",
        MODEL,
        "logits = self.text_model.head(hidden)",
        "logits = self.text_model.head(hidden).bfloat16().to(hidden.dtype)",
        file=_IDEFICS3,
    ),
    _derived(
        "length-of-heads",
        "FMS 1.13.1 as it is: lengths and heads are told apart by their sizes",
        "padding",
        "keys_compute, values_compute = keys.transpose(2, 1), values.transpose(2, 1)",
        "keys_compute, values_compute = keys, values",
        file=_ATTENTION,
        also=("prefix", "split"),
    ),
    _derived(
        "mask-of-first-row",
        "in a batch, the first row's mask holds for every row",
        "batch",
        '"mask": torch.where(mask, 0.0, -torch.inf),',
        '"mask": torch.where(mask, 0.0, -torch.inf)[:1],',
        file=_IDEFICS3,
    ),
    _derived(
        "cache-off-by-one",
        "a second part of a prompt takes the positions of the first",
        "split",
        'own["position_ids"] if position_ids is None else position_ids',
        'own["position_ids"] if position_ids is None or input_ids.dim() == 2 else position_ids',
        file=_IDEFICS3,
    ),
    _derived(
        "row-takes-first-positions",
        "in a batch, the first row's positions hold for every row",
        "batch",
        '"position_ids": (real.cumsum(-1) - 1).clamp(min=0),',
        '"position_ids": (real.cumsum(-1) - 1).clamp(min=0)[:1].expand(len(real), -1),',
        file=_IDEFICS3,
    ),
    Mutant(
        "head-tied",
        "the head shares its weight with the embedding, which the checkpoint does not",
        "forward",
        f"{_HF}.embed_tokens",
        Edit(_LLAMA, "if self.config.tie_heads:", "if True:"),
        also=("lm_head",),
    ),
)
