"""What is known of the checkpoints on which FMS 1.13.1 differs from Hugging Face, in words.

Figures and modules are not here: the table measures them. A checkpoint that fails and is not named
here makes `make families` fail.
"""

from collections.abc import Mapping

FINDINGS: Mapping[str, str] = {
    "bert-four-heads": "a text of exactly as many tokens as the model has heads is computed "
    "wrongly: without a cache FMS's attention takes such keys for transposed already "
    "(`key_cache.shape[1] != kvheads` in fms.modules.attention); "
    "so does every model that is run without one",
    "gpt-oss": "FMS's adapter reads MXFP4 weights alone, this checkpoint has dense ones, whose "
    "experts are numbers of MXFP4 all the same; packed by the repair, its model is right. FMS's "
    "own mapping of the configuration takes max_position_embeddings for YaRN's first length, where "
    "Hugging Face has original_max_position_embeddings: with it logits are off by up to 4.6; "
    "snap's mapping gives FMS the latter",
    "granite-wide-heads": "with `head_dim` larger than hidden_size / heads FMS's adapter stretches "
    "weights that need no stretching",
    "ministral3-yarn": "FMS rounds YaRN's range of frequencies before it divides by "
    "`2 * math.log(self.base)`, Hugging Face afterwards (CachedYarnRotaryEmbedding in "
    "fms.modules.positions): frequencies between are blended otherwise",
    "mistral-window": "FMS ignores `sliding_window`: it attends to the whole prompt",
    "mistral3": "with several images in a prompt FMS's Pixtral attends from one image to another, "
    "where Hugging Face keeps them apart; cases with one image pass",
    "mixtral": "FMS's \"hf\" adapter expects the names of Mistral's own files and fails on Hugging "
    "Face's; with the weights renamed by the repair its model is right",
}
# The same with the newest release of transformers.
FINDINGS_AGAIN: Mapping[str, str] = {
    "bamba": "it answers prompts with padding on the left otherwise than it did",
    "llava-next": "it no longer divides Granite's logits by `logits_scaling`, FMS does",
}
_WIDTH = "multiple_of stays 256, so the MLP of this checkpoint, 96 wide, is taken for 256"
# FMS's own mapping of configurations, fms.models.hf.config_utils.param_builders.
FINDINGS_OWN: Mapping[str, str] = {
    "bamba": "the mapping leaves out attn_layer_indices and rope_theta: the model has those of "
    "FMS's variant",
    "gpt-bigcode": "the mapping divides n_inner, which is null here: Hugging Face takes four times "
    "the hidden size then",
    "gpt-oss (repaired)": "the mapping reads rope_base, which Hugging Face's configuration does "
    "not have, and takes 150000",
    "ministral3": _WIDTH,
    "ministral3-yarn": _WIDTH,
    "mistral": _WIDTH,
    "mistral-window": _WIDTH,
    "mistral3": _WIDTH,
    "mpnet": "FMS has no mapping for this class",
    "qwen3": "the mapping fills rope_base, the model's field is rope_theta; " + _WIDTH,
    "siglip-vision": "FMS has no mapping for this class",
}
REPAIRS: Mapping[str, str] = {
    "gpt-oss": "tests.families.repairs:gpt_oss",
    "mixtral": "tests.families.repairs:mixtral",
}
