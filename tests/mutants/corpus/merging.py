"""Faults in how image features are put among the text: code of Hugging Face's module `model`."""

from tests.mutants.mutant import DERIVED, Edit, Mutant

_FILE = "fms/models/idefics3_components/pack.py"
_MODEL = "fms/models/idefics3_components/fms_model.py"
_PLACE = "model"
_MERGE = "merged[row, places] = tokens[row, :count]"


def _mutant(name: str, what: str, old: str, new: str, *, file: str = _FILE) -> Mutant:
    return Mutant(name, what, "forward", _PLACE, Edit(file, old, new))


def _derived(name: str, what: str, old: str, new: str) -> Mutant:
    """Return a fault that only derived questions show."""
    return Mutant(name, what, DERIVED, "batch", Edit(_FILE, old, new))


MERGING = (
    _mutant(
        "images-out-of-order",
        "tiles go through the encoder from the last to the first",
        "pixel_values.flatten(0, -4),",
        "pixel_values.flatten(0, -4).flip(0),",
        file=_MODEL,
    ),
    _mutant(
        "tokens-backwards",
        "image tokens are placed from the last to the first",
        _MERGE,
        "merged[row, places] = tokens[row, :count].flip(0)",
    ),
    _mutant(
        "tokens-one-late",
        "image tokens are placed one position late",
        _MERGE,
        "merged[row, places.roll(1)] = tokens[row, :count]",
    ),
    _mutant(
        "wrong-image",
        "images change places by half of the tokens",
        _MERGE,
        "merged[row, places] = tokens[row, :count].roll(count // 2, 0)",
    ),
    _mutant(
        "last-token-kept",
        "the last image token keeps its text embedding",
        _MERGE,
        f"{_MERGE}\n"
        "        last = places.nonzero()[-1:, 0]\n"
        "        merged[row, last] = inputs_embeds[row, last]",
    ),
    _mutant(
        "tokens-added",
        "image tokens are added to the placeholder's embedding",
        _MERGE,
        "merged[row, places] += tokens[row, :count]",
    ),
    _mutant(
        "tokens-in-bfloat16",
        "image tokens are rounded to bfloat16",
        _MERGE,
        "merged[row, places] = tokens[row, :count].bfloat16().to(merged.dtype)",
    ),
    Mutant(
        "images-ignored",
        "placeholders stay as they are",
        "forward",
        _PLACE,
        Edit(_MODEL, "if pixel_values is None:", "if True:"),
        also=("model.vision_model",),
    ),
    _mutant(
        "image-token-id",
        "the placeholder's id is one too high",
        "image_token_id=self.config.image_token_id,",
        "image_token_id=self.config.image_token_id + 1,",
        file=_MODEL,
    ),
    _derived(
        "batch-takes-first-row",
        "in a batch, every prompt gets the first one's image tokens",
        _MERGE,
        "merged[row, places] = tokens[0, :count]",
    ),
    _derived(
        "images-across-rows",
        "in a batch, image tokens are placed across the rows",
        "    return merged\n",
        "    everywhere = input_ids == image_token_id\n"
        "    count = int(everywhere.sum())\n"
        "    merged.transpose(0, 1)[everywhere.T] = tokens.flatten(0, 1)[:count]\n"
        "    return merged\n",
    ),
)
