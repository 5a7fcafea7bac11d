"""Text encoders: BERT and RoBERTa with their heads, and MPNet for sentence embeddings."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from snapshot_tool.base.protocol import CaseInputs, Phase, Side
from snapshot_tool.families.family import (
    Capture,
    Config,
    Family,
    Fields,
    FmsPort,
    ModulePair,
    fused_pairs,
    pairs_below,
    renamed,
)
from snapshot_tool.families.fms_calls import EncoderCalls
from snapshot_tool.families.llama import layers_config

if TYPE_CHECKING:
    import torch

_CLASSES = Capture(Phase.FORWARD, "class_logits", "classifier", Side.OUTPUT)
_SPANS = Capture(Phase.FORWARD, "span_logits", "qa_outputs", Side.OUTPUT)
_POOLED = Capture(Phase.FORWARD, "pooler_output", "pooler", Side.OUTPUT)

# Positions are counted from after the padding token's id: the first embeddings are unused.
_RESERVED = 2


def _fms_config(config: Config, *, base: str) -> Fields:
    """Return the fields of FMS's RoBERTaConfig; base: "bert" or "roberta"."""
    reserved = _RESERVED if base == "roberta" else 0
    return {
        **layers_config(config),
        **renamed(
            config,
            "type_vocab_size",
            norm_eps="layer_norm_eps",
            p_dropout="hidden_dropout_prob",
            pad_id="pad_token_id",
            tie_heads="tie_word_embeddings",
        ),
        "max_pos": config["max_position_embeddings"] - reserved,
        "pos_emb": base,
    }


def _class_config(config: Config, *, base: str) -> Fields:
    # Two classes if the configuration names none.
    return {**_fms_config(config, base=base), "num_classes": len(config.get("id2label") or (0, 1))}


class _ClassCalls(EncoderCalls):
    """The head returns one row of logits for the whole text, (1, classes)."""

    def head_outputs(self, answer: torch.Tensor) -> dict[str, torch.Tensor]:
        return {_CLASSES.name: answer}


class _SpanCalls(EncoderCalls):
    """The head returns two logits for each position: (1, length, 2), an answer's start and end."""

    def head_outputs(self, answer: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        return {_SPANS.name: torch.stack(answer, dim=-1)}


class _MpnetCalls(EncoderCalls):
    """FMS counts positions itself only in a whole prompt; Hugging Face leaves padding out."""

    def padding(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        padding, pad_id = inputs.attention_mask == 0, self.model.config.pad_id
        seen = self.pad(inputs, offset=pad_id + 1)
        seen["position_ids"] = seen["position_ids"].masked_fill(padding, pad_id)
        if not bool(padding.any()):
            del seen["mask"]
        return seen

    def head_outputs(self, answer: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {_POOLED.name: answer[1]}  # (1, width), of the first token


_LAYER = r"base_model\.layers\.(\d+)"
_MLP = {
    "ff_sub_layer.w1": "intermediate.dense",
    "ff_sub_layer.w2": "output.dense",
    "ff_ln": "output.LayerNorm",
}


def _encoder_pairs(base: str) -> tuple[ModulePair, ...]:
    """Return the module pairs of an encoder, whose Hugging Face name is `base`."""
    hf_layer = rf"{base}.encoder.layer.\1"
    embeddings = {"embedding": "word_embeddings", "enc_norm": "LayerNorm"}
    attention = {"attn.dense": "output.dense", "ln": "output.LayerNorm"}
    return (
        ModulePair("base_model", base),
        *pairs_below("base_model", f"{base}.embeddings", embeddings),
        # FMS itself adds up all embeddings before it, so the output is theirs.
        ModulePair(r"base_model\.enc_norm", f"{base}.embeddings"),
        # FMS's attention is Hugging Face's "self" and the dense layer after it: no pair.
        *fused_pairs(
            rf"{_LAYER}\.attn\.in_proj", f"{hf_layer}.attention.self", "query", "key", "value"
        ),
        *pairs_below(_LAYER, f"{hf_layer}.attention", attention),
        *pairs_below(_LAYER, hf_layer, {"": "", **_MLP}),
        ModulePair(rf"{_LAYER}\.ff_sub_layer\.a", f"{hf_layer}.intermediate.intermediate_act_fn"),
    )


def _encoder_family(
    name: str,
    hf_class: str,
    head_pairs: tuple[ModulePair, ...],
    *,
    base: str = "roberta",
    calls: type[EncoderCalls] = EncoderCalls,
    head: Capture | None = None,
) -> Family:
    """Return an encoder with a head, called the same in FMS's registry.

    base: the encoder's Hugging Face name.
    head: what the head returns, if it is not logits of every position.
    """
    hidden = Capture(Phase.FORWARD, "last_hidden_state", base, Side.OUTPUT)
    is_roberta = base == "roberta"
    return Family(
        name=name,
        hf_class=hf_class,
        phases=(Phase.FORWARD,),
        captures=(hidden, head) if head else (hidden,),
        logits=head is None,
        reserved_positions=_RESERVED if is_roberta else 0,
        fms=FmsPort(
            name,
            partial(_class_config if head is _CLASSES else _fms_config, base=base),
            calls,
            (*_encoder_pairs(base), *head_pairs),
            # Before RoBERTaConfig served BERT, too.
            absent={"pos_emb": "roberta"} if is_roberta else {},
        ),
    )


_HEAD = "classification_head"

ROBERTA = _encoder_family(
    "roberta",
    "RobertaForMaskedLM",
    pairs_below(
        _HEAD, "lm_head", {"": "", "dense": "dense", "ln": "layer_norm", "head": "decoder"}
    ),
)
ROBERTA_CLASSIFICATION = _encoder_family(
    "roberta_classification",
    "RobertaForSequenceClassification",
    pairs_below(_HEAD, "classifier", {"": "", "dense": "dense", "head": "out_proj"}),
    calls=_ClassCalls,
    head=_CLASSES,
)
ROBERTA_QUESTION_ANSWERING = _encoder_family(
    "roberta_question_answering",
    "RobertaForQuestionAnswering",
    (ModulePair("qa_head", "qa_outputs"),),
    calls=_SpanCalls,
    head=_SPANS,
)
BERT = _encoder_family(
    "bert",
    "BertForMaskedLM",
    pairs_below(
        _HEAD,
        "cls.predictions",
        {"": "", "dense": "transform.dense", "ln": "transform.LayerNorm", "head": "decoder"},
    ),
    base="bert",
)
BERT_CLASSIFICATION = _encoder_family(
    "bert_classification",
    "BertForSequenceClassification",
    (
        *pairs_below(_HEAD, "bert.pooler", {"dense": "dense", "act": "activation"}),
        ModulePair(rf"{_HEAD}\.head", "classifier"),
    ),
    base="bert",
    calls=_ClassCalls,
    head=_CLASSES,
)


def _mpnet_config(config: Config) -> Fields:
    return {
        **layers_config(config),
        **renamed(
            config,
            *("layer_norm_eps", "relative_attention_num_buckets"),
            max_expected_seq_len="max_position_embeddings",
            pad_id="pad_token_id",
        ),
    }


_MPNET_EMBEDDINGS = {
    "word_embedding": "word_embeddings",
    "position_embeddings": "position_embeddings",
    "enc_norm": "LayerNorm",
}
_MPNET_ATTENTION = {"attn": "attn", "attn.dense": "attn.o", "ln": "LayerNorm"}

MPNET = Family(
    name="mpnet",
    hf_class="MPNetModel",
    phases=(Phase.FORWARD,),
    captures=(Capture(Phase.FORWARD, "last_hidden_state", "encoder", Side.OUTPUT), _POOLED),
    logits=False,
    reserved_positions=_RESERVED,
    attention="eager",
    fms=FmsPort(
        "mpnet",
        _mpnet_config,
        _MpnetCalls,
        (
            ModulePair("base_model", "encoder"),
            *pairs_below("base_model", "embeddings", _MPNET_EMBEDDINGS),
            ModulePair(r"base_model\.enc_norm", "embeddings"),
            ModulePair("den", "pooler.dense"),
            ModulePair("activation", "pooler.activation"),
            *fused_pairs(
                rf"{_LAYER}\.attn\.in_proj", r"encoder.layer.\1.attention.attn", "q", "k", "v"
            ),
            *pairs_below(_LAYER, r"encoder.layer.\1.attention", _MPNET_ATTENTION),
            *pairs_below(_LAYER, r"encoder.layer.\1", {"": "", **_MLP}),
        ),
    ),
)
