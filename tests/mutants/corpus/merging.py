"""Faults in how image features are put among the text: code of Hugging Face's module `model`."""

from tests.mutants.mutant import DERIVED, Edit, Mutant

_FILE = "fms/models/idefics3.py"
_PLACE = "model"
_TOWER = "features, _ = self.vision_tower(pixel_values.flatten(0, -4))"
_MERGE = "merged[places] = tokens.to(embeddings.dtype)"


def _mutant(name: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(name, what, "forward", _PLACE, Edit(_FILE, old, new))


def _derived(name: str, what: str, old: str, new: str) -> Mutant:
    """Return a fault that only derived questions show."""
    return Mutant(name, what, DERIVED, "batch", Edit(_FILE, old, new))


MERGING = (
    _mutant(
        "images-out-of-order",
        "tiles go through the encoder from the last to the first",
        _TOWER,
        "features, _ = self.vision_tower(pixel_values.flatten(0, -4).flip(0))",
    ),
    _mutant(
        "tokens-backwards",
        "image tokens are placed from the last to the first",
        _MERGE,
        "merged[places] = tokens.flip(0).to(embeddings.dtype)",
    ),
    _mutant(
        "tokens-one-late",
        "image tokens are placed one position late",
        _MERGE,
        "merged[places.roll(1, -1)] = tokens.to(embeddings.dtype)",
    ),
    _mutant(
        "wrong-image",
        "images change places by half of the tokens",
        _MERGE,
        "merged[places] = tokens.roll(len(tokens) // 2, 0).to(embeddings.dtype)",
    ),
    _mutant(
        "last-token-kept",
        "the last image token keeps its text embedding",
        "        return merged\n",
        "        merged[0, places[0].nonzero()[-1]] = embeddings[0, places[0].nonzero()[-1]]\n"
        "        return merged\n",
    ),
    _mutant(
        "tokens-added",
        "image tokens are added to the placeholder's embedding",
        _MERGE,
        "merged[places] += tokens.to(embeddings.dtype)",
    ),
    _mutant(
        "tokens-in-bfloat16",
        "image tokens are rounded to bfloat16",
        _MERGE,
        "merged[places] = tokens.bfloat16().to(embeddings.dtype)",
    ),
    Mutant(
        "images-ignored",
        "placeholders stay as they are",
        "forward",
        _PLACE,
        Edit(_FILE, "if pixel_values is None:", "if True:"),
        also=("model.vision_model",),
    ),
    _mutant(
        "image-token-id",
        "the placeholder's id is one too high",
        "places = input_ids == self.config.image_token_id",
        "places = input_ids == self.config.image_token_id + 1",
    ),
    _derived(
        "batch-takes-first-row",
        "in a batch, every prompt gets the first one's image tokens",
        _MERGE,
        "merged[places] = (\n"
        "            tokens.view(len(merged), -1, tokens.shape[-1])[:1]\n"
        "            .expand(len(merged), -1, -1).flatten(0, 1).to(embeddings.dtype)\n"
        "        )",
    ),
    _derived(
        "images-across-rows",
        "in a batch, image tokens are placed across the rows",
        _MERGE,
        "merged.transpose(0, 1)[places.T] = tokens.to(embeddings.dtype)",
    ),
)
