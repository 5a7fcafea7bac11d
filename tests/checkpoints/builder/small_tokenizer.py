"""A byte-level tokenizer with few tokens, for the families' tiny checkpoints."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from builder.tokenizer import special_token

BOS, PAD, EOS, MASK = "<s>", "<pad>", "</s>", "<mask>"
IMAGE = "<image>"
PIXTRAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
# In this order: RoBERTa counts positions from after the padding token's id, which is 1.
SPECIAL = (BOS, PAD, EOS, MASK, IMAGE, *PIXTRAL)
VOCAB_SIZE = 384

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{BOS}"
    "{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE_TOKEN{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    f"{EOS}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_CORPUS = (
    "describe the image, compare the first and the second, what is shown in this image and which",
    "colour is the small circle left of the large square, answer briefly, list every shape you see",
)


def build_tokenizer(*, image_token: str = IMAGE, max_length: int) -> Any:
    """Return a tokenizer of 384 tokens that knows every byte, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[special_token(token) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,
        mask_token=MASK,
        chat_template=CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token),
        # token_type_ids, which the class adds by default, are refused by decoders.
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
