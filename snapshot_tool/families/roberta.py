"""BERT and RoBERTa with their heads: masked tokens, classes of a text, spans of an answer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import Side
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


def _encoder_pairs(base: str) -> tuple[ModulePair, ...]:
    """Return the module pairs of an encoder, whose Hugging Face name is `base`."""
    layer, hf_layer = r"base_model\.layers\.(\d+)", rf"{base}.encoder.layer.\1"
    embeddings = {"embedding": "word_embeddings", "enc_norm": "LayerNorm"}
    return (
        ModulePair("base_model", base),
        *pairs_below("base_model", f"{base}.embeddings", embeddings),
        # FMS itself adds up all embeddings before it, so the output is theirs.
        ModulePair(r"base_model\.enc_norm", f"{base}.embeddings"),
        ModulePair(layer, hf_layer),
        # FMS's attention is Hugging Face's "self" and the dense layer after it: no pair.
        *fused_pairs(
            rf"{layer}\.attn\.in_proj", f"{hf_layer}.attention.self", "query", "key", "value"
        ),
        *pairs_below(
            layer,
            hf_layer,
            {
                "attn.dense": "attention.output.dense",
                "ln": "attention.output.LayerNorm",
                "ff_sub_layer.w1": "intermediate.dense",
                "ff_sub_layer.a": "intermediate.intermediate_act_fn",
                "ff_sub_layer.w2": "output.dense",
                "ff_ln": "output.LayerNorm",
            },
        ),
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
