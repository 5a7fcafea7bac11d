"""RoBERTa with its heads: masked tokens, classes of a text, spans of an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import Side
from snapshot_tool.families.family import Capture, Config, Family, Fields, FmsPort, ModulePair
from snapshot_tool.families.fms_calls import EncoderCalls, FmsCalls
from snapshot_tool.families.llama import grow_factor

if TYPE_CHECKING:
    import torch

ENCODER_PHASES = (Phase.FORWARD,)
HIDDEN = "last_hidden_state"
CLASSES = Capture(Phase.FORWARD, "class_logits", "classifier", Side.OUTPUT)
SPANS = Capture(Phase.FORWARD, "span_logits", "qa_outputs", Side.OUTPUT)

# Positions are counted from after the padding token's id: the first embeddings are unused.
_RESERVED = 2


def encoder_config(config: Config) -> Fields:
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


def _fms_config(config: Config) -> Fields:
    return {
        **encoder_config(config),
        "max_pos": config["max_position_embeddings"] - _RESERVED,
        "pos_emb": "roberta",
    }


def _class_config(config: Config) -> Fields:
    return {**_fms_config(config), "num_classes": class_count(config)}


def class_count(config: Config) -> int:
    """Return the number of classes, two if the configuration names none."""
    return len(config.get("id2label") or (0, 1))


class ClassCalls(EncoderCalls):
    """The head gives one row of logits for the whole text, (1, classes)."""

    def head_outputs(self, answer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of the classes."""
        return {CLASSES.name: answer}


class _SpanCalls(EncoderCalls):
    """The head gives two logits for each position: an answer's start and its end."""

    def head_outputs(self, answer: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return both side by side, (1, length, 2)."""
        import torch

        return {SPANS.name: torch.stack(answer, dim=-1)}


def encoder_pairs(base: str) -> tuple[ModulePair, ...]:
    """Return the module pairs of a BERT-like encoder, whose Hugging Face name is `base`."""
    layer, hf_layer = r"base_model\.layers\.(\d+)", rf"{base}.encoder.layer.\1"
    attention = f"{hf_layer}.attention"
    return (
        ModulePair("base_model", base),
        ModulePair(r"base_model\.embedding", f"{base}.embeddings.word_embeddings"),
        ModulePair(r"base_model\.enc_norm", f"{base}.embeddings.LayerNorm"),
        # What FMS adds up by itself before it: the sum of all embeddings, normalised.
        ModulePair(r"base_model\.enc_norm", f"{base}.embeddings"),
        ModulePair(layer, hf_layer),
        # FMS's attention is Hugging Face's "self" and the dense layer after it: no pair.
        ModulePair(rf"{layer}\.attn\.in_proj", f"{attention}.self.query", 0),
        ModulePair(rf"{layer}\.attn\.in_proj", f"{attention}.self.key", 1),
        ModulePair(rf"{layer}\.attn\.in_proj", f"{attention}.self.value", 2),
        ModulePair(rf"{layer}\.attn\.dense", f"{attention}.output.dense"),
        ModulePair(rf"{layer}\.ln", f"{attention}.output.LayerNorm"),
        ModulePair(rf"{layer}\.ff_sub_layer\.w1", f"{hf_layer}.intermediate.dense"),
        ModulePair(rf"{layer}\.ff_sub_layer\.a", f"{hf_layer}.intermediate.intermediate_act_fn"),
        ModulePair(rf"{layer}\.ff_sub_layer\.w2", f"{hf_layer}.output.dense"),
        ModulePair(rf"{layer}\.ff_ln", f"{hf_layer}.output.LayerNorm"),
    )


def encoder_family(
    name: str,
    hf_class: str,
    config: Callable[[Config], Fields],
    head_pairs: tuple[ModulePair, ...],
    *,
    base: str,
    calls: type[FmsCalls] = EncoderCalls,
    head: Capture | None = None,
    absent: Mapping[str, Any] | None = None,
    reserved_positions: int = 0,
) -> Family:
    """Return a BERT-like encoder with a head, called the same in FMS's registry.

    base: the encoder's Hugging Face name.
    head: what the head returns, if it is not logits of every position.
    """
    hidden = Capture(Phase.FORWARD, HIDDEN, base, Side.OUTPUT)
    pairs = (*encoder_pairs(base), *head_pairs)
    return Family(
        name=name,
        hf_class=hf_class,
        phases=ENCODER_PHASES,
        captures=(hidden, head) if head else (hidden,),
        logits=head is None,
        reserved_positions=reserved_positions,
        fms=FmsPort(name, config, calls, pairs, absent=absent or {}),
    )


_roberta_family = partial(
    encoder_family,
    base="roberta",
    # Before RoBERTaConfig served BERT, too.
    absent={"pos_emb": "roberta"},
    reserved_positions=_RESERVED,
)
_HEAD = "classification_head"

ROBERTA = _roberta_family(
    "roberta",
    "RobertaForMaskedLM",
    _fms_config,
    (
        ModulePair(_HEAD, "lm_head"),
        ModulePair(rf"{_HEAD}\.dense", "lm_head.dense"),
        ModulePair(rf"{_HEAD}\.ln", "lm_head.layer_norm"),
        ModulePair(rf"{_HEAD}\.head", "lm_head.decoder"),
    ),
)
ROBERTA_CLASSIFICATION = _roberta_family(
    "roberta_classification",
    "RobertaForSequenceClassification",
    _class_config,
    (
        ModulePair(_HEAD, "classifier"),
        ModulePair(rf"{_HEAD}\.dense", "classifier.dense"),
        ModulePair(rf"{_HEAD}\.head", "classifier.out_proj"),
    ),
    calls=ClassCalls,
    head=CLASSES,
)
ROBERTA_QUESTION_ANSWERING = _roberta_family(
    "roberta_question_answering",
    "RobertaForQuestionAnswering",
    _fms_config,
    (ModulePair("qa_head", "qa_outputs"),),
    calls=_SpanCalls,
    head=SPANS,
)
