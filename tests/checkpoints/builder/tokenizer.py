"""A byte-level BPE tokenizer with SmolVLM's special tokens, trained on the builder's corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
BOS = "<|im_start|>"
PAD = "<|im_end|>"
FAKE_TOKEN = "<fake_token_around_image>"
IMAGE_TOKEN = "<image>"
GLOBAL_IMAGE = "<global-img>"
END_OF_UTTERANCE = "<end_of_utterance>"
ROWS_AND_COLUMNS = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
FIRST_TOKENS = (END_OF_TEXT, BOS, PAD)
LAST_TOKENS = (*ROWS_AND_COLUMNS, GLOBAL_IMAGE, FAKE_TOKEN, IMAGE_TOKEN, END_OF_UTTERANCE)

CHAT_TEMPLATE = (
    f"{BOS}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}"
    "{{ ' ' + message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    f"{IMAGE_TOKEN}"
    "{% elif part['type'] == 'text' %}"
    "{{ (' ' if loop.first else '') + part['text'] }}"
    "{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    f"{END_OF_UTTERANCE}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def special_token(token: str) -> AddedToken:
    """Return a token that is never split, and that decoding may leave out."""
    return AddedToken(token, special=True, normalized=False)


def train_tokenizer(texts: list[str], *, vocab_size: int) -> Any:
    """Train the tokenizer, special tokens included, to exactly `vocab_size` tokens.

    All 256 bytes are in its alphabet: no text is unknown to it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LAST_TOKENS),
        special_tokens=[special_token(token) for token in FIRST_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([special_token(token) for token in LAST_TOKENS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return tokenizer


def wrap_tokenizer(tokenizer: Any, *, max_length: int) -> Any:
    """Return the tokenizer as transformers wants it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END_OF_UTTERANCE,
        pad_token=PAD,
        unk_token=END_OF_TEXT,
        additional_special_tokens=[FAKE_TOKEN, IMAGE_TOKEN, END_OF_UTTERANCE],
        # token_type_ids, which the class adds by default, are refused by the model's forward.
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_tokenizer(texts: list[str], text_shapes: Mapping[str, Any]) -> Any:
    """Return a trained tokenizer for a text model of these shapes (LlamaConfig's words)."""
    trained = train_tokenizer(texts, vocab_size=text_shapes["vocab_size"])
    return wrap_tokenizer(trained, max_length=text_shapes["max_position_embeddings"])
