"""Putting image features in the places that a prompt keeps for them."""

import torch


def pack_image_embeddings(
    input_ids: torch.Tensor,
    inputs_embeds: torch.Tensor,
    image_features: torch.Tensor,
    image_token_id: int,
    expected_L: int,
) -> torch.Tensor:
    """Return embeddings (rows, length, width) with image tokens in their places.

    input_ids: (rows, length). image_features: (rows, tiles, tokens, width), or (rows, tokens,
    width) for one tile; tiles beyond those that a row has places for are filler.
    """
    if image_features.dim() == 3:
        image_features = image_features[:, None]
    if image_features.shape[2] != expected_L:
        raise ValueError(
            f"a tile has {image_features.shape[2]} tokens, expected {expected_L}"
        )
    tokens = image_features.flatten(1, 2).to(inputs_embeds.dtype)
    merged = inputs_embeds.clone()
    for row, places in enumerate(input_ids == image_token_id):
        count = int(places.sum())
        if count % expected_L or count > tokens.shape[1]:
            raise ValueError(
                f"prompt {row} has {count} places, {tokens.shape[1]} tokens were made"
            )
        merged[row, places] = tokens[row, :count]
    return merged
