"""Weights that are not the checkpoint's: changed in memory, or loaded into the wrong place."""

import torch

from tests.mutants.mutant import Change, Edit, Mutant
from tests.mutants.weights import all_rounded, changed, rounded, scaled, swapped

_VISION, _HF_VISION = "vision_tower.base_model", "model.vision_model"
_TEXT, _HF_TEXT = "text_model.base_model", "model.text_model"


def _vision(name: str, what: str, place: str, change: Change) -> Mutant:
    return Mutant(name, what, "vision", f"{_HF_VISION}.{place}", change)


def _text(name: str, what: str, place: str, fault: Change | Edit) -> Mutant:
    return Mutant(name, what, "forward", f"{_HF_TEXT}.{place}", fault)


def _without_column_block(tensor: torch.Tensor) -> torch.Tensor:
    tensor[:, :16] = 0
    return tensor


def _with_one_element_moved(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 5] += 0.05
    return tensor


def _with_rows_swapped(tensor: torch.Tensor) -> torch.Tensor:
    tensor[[100, 200]] = tensor[[200, 100]]
    return tensor


def _with_first_row_doubled(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0] *= 2
    return tensor


WEIGHTS = (
    _vision(
        "vision-query-transposed",
        "one query projection transposed",
        "encoder.layers.1.self_attn.q_proj",
        changed(f"{_VISION}.encoder.layers.1.attn.in_proj.query.weight", "transposed", torch.t),
    ),
    _vision(
        "vision-query-and-key-swapped",
        "one layer's query and key projections change places",
        "encoder.layers.0.self_attn.q_proj",
        swapped(
            f"{_VISION}.encoder.layers.0.attn.in_proj.query.weight",
            f"{_VISION}.encoder.layers.0.attn.in_proj.key.weight",
        ),
    ),
    _vision(
        "vision-key-bias-zeroed",
        "one key projection without its bias",
        "encoder.layers.1.self_attn.k_proj",
        changed(f"{_VISION}.encoder.layers.1.attn.in_proj.key.bias", "zeroed", torch.zeros_like),
    ),
    _vision(
        "vision-mlp-layers-swapped",
        "two layers' first MLP projections change places",
        "encoder.layers.0.mlp.fc1",
        swapped(
            f"{_VISION}.encoder.layers.0.mlp.w1.weight", f"{_VISION}.encoder.layers.1.mlp.w1.weight"
        ),
    ),
    _vision(
        "vision-mlp-bias-zeroed",
        "one MLP projection without its bias",
        "encoder.layers.2.mlp.fc1",
        changed(f"{_VISION}.encoder.layers.2.mlp.w1.bias", "zeroed", torch.zeros_like),
    ),
    _vision(
        "vision-mlp-rounded",
        "one MLP projection rounded to bfloat16",
        "encoder.layers.1.mlp.fc2",
        rounded(f"{_VISION}.encoder.layers.1.mlp.w2.weight"),
    ),
    _vision(
        "vision-norm-scaled",
        "one norm's weight times 1.001",
        "encoder.layers.2.layer_norm1",
        scaled(f"{_VISION}.encoder.layers.2.layer_norm1.weight", 1.001),
    ),
    _vision(
        "patch-kernel-transposed",
        "height and width of the patch kernel change places",
        "embeddings.patch_embedding",
        changed(
            f"{_VISION}.embeddings.patch_embedding.weight",
            "transposed",
            lambda kernel: kernel.transpose(-1, -2),
        ),
    ),
    _vision(
        "patch-bias-scaled",
        "the patch embedding's bias times 1.001",
        "embeddings.patch_embedding",
        scaled(f"{_VISION}.embeddings.patch_embedding.bias", 1.001),
    ),
    _vision(
        "positions-rolled",
        "the table of positions is shifted by one row",
        "embeddings.position_embedding",
        changed(
            f"{_VISION}.embeddings.position_embedding.weight",
            "shifted by one row",
            lambda table: table.roll(1, 0),
        ),
    ),
    Mutant(
        "connector-scaled",
        "the projection times 1.001",
        "connector",
        "model.connector.modality_projection.proj",
        scaled("connector.proj.weight", 1.001),
    ),
    Mutant(
        "connector-rounded",
        "the projection rounded to bfloat16",
        "connector",
        "model.connector.modality_projection.proj",
        rounded("connector.proj.weight"),
    ),
    _text(
        "embedding-rounded",
        "token embeddings rounded to bfloat16",
        "embed_tokens",
        rounded(f"{_TEXT}.embedding.weight"),
    ),
    _text(
        "unused-embedding-doubled",
        "the embedding of the unknown token times 2, which no recorded prompt has",
        "embed_tokens",
        changed(f"{_TEXT}.embedding.weight", "row 0 doubled", _with_first_row_doubled),
    ),
    _text(
        "output-projection-transposed",
        "one output projection transposed",
        "layers.2.self_attn.o_proj",
        changed(f"{_TEXT}.layers.2.attn.dense.weight", "transposed", torch.t),
    ),
    _text(
        "head-columns-zeroed",
        "one output projection drops a head",
        "layers.1.self_attn.o_proj",
        changed(f"{_TEXT}.layers.1.attn.dense.weight", "first head zeroed", _without_column_block),
    ),
    _text(
        "key-and-value-swapped",
        "one layer's key and value projections change places",
        "layers.1.self_attn.k_proj",
        swapped(
            f"{_TEXT}.layers.1.attn.in_proj.key.weight",
            f"{_TEXT}.layers.1.attn.in_proj.value.weight",
        ),
    ),
    _text(
        "value-scaled",
        "one value projection times 1.001",
        "layers.3.self_attn.v_proj",
        scaled(f"{_TEXT}.layers.3.attn.in_proj.value.weight", 1.001),
    ),
    _text(
        "query-scaled",
        "one query projection times 1.001",
        "layers.2.self_attn.q_proj",
        scaled(f"{_TEXT}.layers.2.attn.in_proj.query.weight", 1.001),
    ),
    _text(
        "gate-rounded",
        "one gate projection rounded to bfloat16",
        "layers.2.mlp.gate_proj",
        rounded(f"{_TEXT}.layers.2.ff_sub_layer.wg.weight"),
    ),
    _text(
        "up-scaled",
        "one up projection times 1.001",
        "layers.1.mlp.up_proj",
        scaled(f"{_TEXT}.layers.1.ff_sub_layer.w1.weight", 1.001),
    ),
    _text(
        "down-one-element",
        "one element of a down projection is 0.05 off",
        "layers.0.mlp.down_proj",
        changed(
            f"{_TEXT}.layers.0.ff_sub_layer.w2.weight", "[3, 5] + 0.05", _with_one_element_moved
        ),
    ),
    _text(
        "norms-of-a-layer-swapped",
        "one layer's two norms change places",
        "layers.1.input_layernorm",
        swapped(f"{_TEXT}.layers.1.ln.weight", f"{_TEXT}.layers.1.ff_ln.weight"),
    ),
    _text(
        "final-norm-scaled",
        "the final norm's weight times 1.001",
        "norm",
        scaled(f"{_TEXT}.dec_norm.weight", 1.001),
    ),
    Mutant(
        "head-negated",
        "the head's weight with the other sign",
        "forward",
        "lm_head",
        scaled("text_model.head.weight", -1.0),
    ),
    Mutant(
        "vocabulary-permuted",
        "two tokens change places in the head",
        "forward",
        "lm_head",
        changed("text_model.head.weight", "rows 100 and 200 swapped", _with_rows_swapped),
    ),
    Mutant(
        "all-rounded",
        "every weight rounded to bfloat16",
        "vision",
        f"{_HF_VISION}.embeddings.patch_embedding",
        all_rounded(""),
    ),
    _text(
        "rotary-order-kept",
        "query and key weights are not reordered on loading",
        "layers.0.self_attn.q_proj",
        Edit(
            "fms/models/llama.py",
            "if bool(trans_required_pattern.match(name)) and param.size(0) > 1:",
            "if False:",
        ),
    ),
    _text(
        "gate-and-up-loaded-swapped",
        "gate and up projections are loaded into each other's place",
        "layers.0.mlp.gate_proj",
        Edit(
            "fms/models/llama.py",
            '(r"mlp\\.gate_proj", "ff_sub_layer.wg"),\n'
            '        (r"mlp\\.up_proj", "ff_sub_layer.w1"),',
            '(r"mlp\\.gate_proj", "ff_sub_layer.w1"),\n'
            '        (r"mlp\\.up_proj", "ff_sub_layer.wg"),',
        ),
    ),
    _text(
        "norms-loaded-swapped",
        "both norms of a layer are loaded into each other's place",
        "layers.0.input_layernorm",
        Edit(
            "fms/models/llama.py",
            '(r"input_layernorm", "ln"),\n        (r"post_attention_layernorm", "ff_ln"),',
            '(r"input_layernorm", "ff_ln"),\n        (r"post_attention_layernorm", "ln"),',
        ),
    ),
)
