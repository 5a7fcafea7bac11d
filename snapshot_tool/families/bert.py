"""BERT with two of its heads: masked tokens, classes of a text."""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.tap import Side
from snapshot_tool.families.family import Capture, Family, FmsPort, Twin
from snapshot_tool.families.fms_calls import EncoderCalls
from snapshot_tool.families.roberta import (
    CLASSES,
    ENCODER_PHASES,
    HIDDEN,
    ClassCalls,
    class_count,
    encoder_config,
    encoder_twins,
)


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **encoder_config(config),
        "max_pos": config["max_position_embeddings"],
        "pos_emb": "bert",
    }


def _class_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_fms_config(config), "num_classes": class_count(config)}


_HIDDEN = Capture(Phase.FORWARD, HIDDEN, "bert", Side.OUTPUT)
_HEAD, _HF_HEAD = "classification_head", "cls.predictions"

BERT = Family(
    name="bert",
    hf_class="BertForMaskedLM",
    phases=ENCODER_PHASES,
    captures=(_HIDDEN,),
    fms=FmsPort(
        "bert",
        _fms_config,
        EncoderCalls,
        (
            *encoder_twins("bert"),
            Twin(_HEAD, _HF_HEAD),
            Twin(rf"{_HEAD}\.dense", f"{_HF_HEAD}.transform.dense"),
            Twin(rf"{_HEAD}\.ln", f"{_HF_HEAD}.transform.LayerNorm"),
            Twin(rf"{_HEAD}\.head", f"{_HF_HEAD}.decoder"),
        ),
    ),
)
BERT_CLASSIFICATION = Family(
    name="bert_classification",
    hf_class="BertForSequenceClassification",
    phases=ENCODER_PHASES,
    captures=(_HIDDEN, Capture(Phase.FORWARD, CLASSES, "classifier", Side.OUTPUT)),
    logits=False,
    fms=FmsPort(
        "bert_classification",
        _class_config,
        ClassCalls,
        (
            *encoder_twins("bert"),
            Twin(rf"{_HEAD}\.dense", "bert.pooler.dense"),
            Twin(rf"{_HEAD}\.act", "bert.pooler.activation"),
            Twin(rf"{_HEAD}\.head", "classifier"),
        ),
    ),
)
