"""RoBERTa with its heads: masked tokens, classes of a text, spans of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.tap import Side
from snapshot_tool.families.family import Capture, Family, FmsPort, Twin
from snapshot_tool.families.fms_calls import EncoderCalls
from snapshot_tool.families.llama import grow_factor

if TYPE_CHECKING:
    import torch

ENCODER_PHASES = (Phase.FORWARD,)
HIDDEN = "last_hidden_state"
CLASSES = "class_logits"
SPANS = "span_logits"

# Positions are counted from after the padding token's id: the first embeddings are unused.
_RESERVED = 2


def encoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's RoBERTaConfig that BERT and RoBERTa share."""
    return {
        "src_vocab_size": config["vocab_size"],
        "emb_dim": config["hidden_size"],
        "nheads": config["num_attention_heads"],
        "nlayers": config["num_hidden_layers"],
        "hidden_grow_factor": grow_factor(config["intermediate_size"], config["hidden_size"]),
        "activation_fn": config["hidden_act"],
        "norm_eps": config["layer_norm_eps"],
        "type_vocab_size": config["type_vocab_size"],
        "p_dropout": config["hidden_dropout_prob"],
        "pad_id": config["pad_token_id"],
        "tie_heads": config["tie_word_embeddings"],
    }


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **encoder_config(config),
        "max_pos": config["max_position_embeddings"] - _RESERVED,
        "pos_emb": "roberta",
    }


# Before RoBERTaConfig served BERT, too.
_ABSENT = {"pos_emb": "roberta"}


def _class_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_fms_config(config), "num_classes": class_count(config)}


def class_count(config: Mapping[str, Any]) -> int:
    """Return the number of classes, two where the configuration names none."""
    return len(config.get("id2label") or (0, 1))


class ClassCalls(EncoderCalls):
    """The head gives one row of logits for the whole text, (1, classes)."""

    def head_outputs(self, answer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of the classes."""
        return {CLASSES: answer}


class _SpanCalls(EncoderCalls):
    """The head gives two logits for each position: an answer's start and its end."""

    def head_outputs(self, answer: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return both side by side, (1, length, 2)."""
        import torch

        return {SPANS: torch.stack(answer, dim=-1)}


def encoder_twins(base: str) -> tuple[Twin, ...]:
    """Return the twins of a BERT-like encoder, whose Hugging Face name is `base`."""
    layer, hf_layer = r"base_model\.layers\.(\d+)", rf"{base}.encoder.layer.\1"
    attention = f"{hf_layer}.attention"
    return (
        Twin("base_model", base),
        Twin(r"base_model\.embedding", f"{base}.embeddings.word_embeddings"),
        Twin(r"base_model\.enc_norm", f"{base}.embeddings.LayerNorm"),
        # What FMS adds up by itself before it: the sum of all embeddings, normalised.
        Twin(r"base_model\.enc_norm", f"{base}.embeddings"),
        Twin(layer, hf_layer),
        # FMS's attention is Hugging Face's "self" and the dense layer after it: no twin.
        Twin(rf"{layer}\.attn\.in_proj", f"{attention}.self.query", 0),
        Twin(rf"{layer}\.attn\.in_proj", f"{attention}.self.key", 1),
        Twin(rf"{layer}\.attn\.in_proj", f"{attention}.self.value", 2),
        Twin(rf"{layer}\.attn\.dense", f"{attention}.output.dense"),
        Twin(rf"{layer}\.ln", f"{attention}.output.LayerNorm"),
        Twin(rf"{layer}\.ff_sub_layer\.w1", f"{hf_layer}.intermediate.dense"),
        Twin(rf"{layer}\.ff_sub_layer\.a", f"{hf_layer}.intermediate.intermediate_act_fn"),
        Twin(rf"{layer}\.ff_sub_layer\.w2", f"{hf_layer}.output.dense"),
        Twin(rf"{layer}\.ff_ln", f"{hf_layer}.output.LayerNorm"),
    )


_HIDDEN = Capture(Phase.FORWARD, HIDDEN, "roberta", Side.OUTPUT)
_HEAD = "classification_head"

ROBERTA = Family(
    name="roberta",
    hf_class="RobertaForMaskedLM",
    phases=ENCODER_PHASES,
    captures=(_HIDDEN,),
    reserved_positions=_RESERVED,
    fms=FmsPort(
        "roberta",
        _fms_config,
        EncoderCalls,
        (
            *encoder_twins("roberta"),
            Twin(_HEAD, "lm_head"),
            Twin(rf"{_HEAD}\.dense", "lm_head.dense"),
            Twin(rf"{_HEAD}\.ln", "lm_head.layer_norm"),
            Twin(rf"{_HEAD}\.head", "lm_head.decoder"),
        ),
        absent=_ABSENT,
    ),
)
ROBERTA_CLASSIFICATION = Family(
    name="roberta_classification",
    hf_class="RobertaForSequenceClassification",
    phases=ENCODER_PHASES,
    captures=(_HIDDEN, Capture(Phase.FORWARD, CLASSES, "classifier", Side.OUTPUT)),
    logits=False,
    reserved_positions=_RESERVED,
    fms=FmsPort(
        "roberta_classification",
        _class_config,
        ClassCalls,
        (
            *encoder_twins("roberta"),
            Twin(_HEAD, "classifier"),
            Twin(rf"{_HEAD}\.dense", "classifier.dense"),
            Twin(rf"{_HEAD}\.head", "classifier.out_proj"),
        ),
        absent=_ABSENT,
    ),
)
ROBERTA_QUESTION_ANSWERING = Family(
    name="roberta_question_answering",
    hf_class="RobertaForQuestionAnswering",
    phases=ENCODER_PHASES,
    captures=(_HIDDEN, Capture(Phase.FORWARD, SPANS, "qa_outputs", Side.OUTPUT)),
    logits=False,
    reserved_positions=_RESERVED,
    fms=FmsPort(
        "roberta_question_answering",
        _fms_config,
        _SpanCalls,
        (*encoder_twins("roberta"), Twin("qa_head", "qa_outputs")),
        absent=_ABSENT,
    ),
)
