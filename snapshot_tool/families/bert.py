"""BERT with two of its heads: masked tokens, classes of a text."""

from snapshot_tool.families.family import Config, Fields, ModulePair
from snapshot_tool.families.roberta import (
    CLASSES,
    ClassCalls,
    class_count,
    encoder_config,
    encoder_family,
)


def _fms_config(config: Config) -> Fields:
    return {
        **encoder_config(config),
        "max_pos": config["max_position_embeddings"],
        "pos_emb": "bert",
    }


def _class_config(config: Config) -> Fields:
    return {**_fms_config(config), "num_classes": class_count(config)}


_HEAD, _HF_HEAD = "classification_head", "cls.predictions"

BERT = encoder_family(
    "bert",
    "BertForMaskedLM",
    _fms_config,
    (
        ModulePair(_HEAD, _HF_HEAD),
        ModulePair(rf"{_HEAD}\.dense", f"{_HF_HEAD}.transform.dense"),
        ModulePair(rf"{_HEAD}\.ln", f"{_HF_HEAD}.transform.LayerNorm"),
        ModulePair(rf"{_HEAD}\.head", f"{_HF_HEAD}.decoder"),
    ),
    base="bert",
)
BERT_CLASSIFICATION = encoder_family(
    "bert_classification",
    "BertForSequenceClassification",
    _class_config,
    (
        ModulePair(rf"{_HEAD}\.dense", "bert.pooler.dense"),
        ModulePair(rf"{_HEAD}\.act", "bert.pooler.activation"),
        ModulePair(rf"{_HEAD}\.head", "classifier"),
    ),
    base="bert",
    calls=ClassCalls,
    head=CLASSES,
)
