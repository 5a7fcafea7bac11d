"""Why FMS 1.13.1 differs from Hugging Face on some checkpoints.

The table measures figures and modules. `make families` fails if another checkpoint fails.
"""

from collections.abc import Mapping

FINDINGS: Mapping[str, str] = {
    "bert-four-heads": "without a cache, FMS's attention swaps length and heads if a text has "
    "exactly as many tokens as the model has heads (`key_cache.shape[1] != kvheads` in "
    "fms.modules.attention). This affects every model",
    "gpt-oss": "FMS's adapter reads only MXFP4 weights. This checkpoint has dense weights "
    "with MXFP4 values; if the repair packs them, the model is right. For YaRN's original length, "
    "FMS's own mapping uses max_position_embeddings, but Hugging Face and snap's mapping use "
    "original_max_position_embeddings. The logits then differ by up to 4.6",
    "granite-wide-heads": "if `head_dim` is larger than hidden_size / heads, FMS's adapter "
    "expands weights that must not be changed",
    "ministral3-yarn": "FMS rounds YaRN's range of frequencies before it divides by "
    "`2 * math.log(self.base)`, Hugging Face afterwards (CachedYarnRotaryEmbedding in "
    "fms.modules.positions). Frequencies inside the range therefore differ",
    "mistral-window": "FMS ignores `sliding_window` and attends to the whole prompt",
    "mistral3": "with several images in a prompt, FMS's Pixtral attends from one image to another, "
    "but Hugging Face's does not. Cases with one image pass",
    "mixtral": "FMS's \"hf\" adapter expects the names of Mistral's own files and fails on Hugging "
    "Face's; if the repair renames the weights, the model is right",
}
# The same with the newest release of transformers.
FINDINGS_AGAIN: Mapping[str, str] = {
    "bamba": "its outputs for prompts with padding on the left changed",
    "llava-next": "it no longer divides Granite's logits by `logits_scaling`; FMS does",
}
_WIDTH = "multiple_of stays 256, so FMS reads the width of this checkpoint's MLP, 96, as 256"
# FMS's own mapping of configurations, fms.models.hf.config_utils.param_builders.
FINDINGS_OWN: Mapping[str, str] = {
    "bamba": "the mapping omits attn_layer_indices and rope_theta, so the model has the values of "
    "FMS's variant",
    "gpt-bigcode": "the mapping divides n_inner, which is null here; Hugging Face then uses four "
    "times the hidden size",
    "gpt-oss (repaired)": "the mapping reads rope_base, which is not in Hugging Face's "
    "configuration, and uses 150000",
    "ministral3": _WIDTH,
    "ministral3-yarn": _WIDTH,
    "mistral": _WIDTH,
    "mistral-window": _WIDTH,
    "mistral3": _WIDTH,
    "mpnet": "FMS has no mapping for this class",
    "qwen3": "the mapping sets rope_base, but the model's field is rope_theta; " + _WIDTH,
    "siglip-vision": "FMS has no mapping for this class",
}
REPAIRS: Mapping[str, str] = {
    "gpt-oss": "tests.families.repairs:gpt_oss",
    "mixtral": "tests.families.repairs:mixtral",
}
