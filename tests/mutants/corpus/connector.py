"""Faults in the connector."""

from tests.mutants.mutant import Edit, Mutant

_FILE = "fms/models/idefics3_components/connector.py"
_HF = "model.connector"
_PERMUTE = "x = x.permute(0, 1, 3, 2, 4, 5)"
_PROJECT = "return self.proj(self.pixel_unshuffle(patch_embeds, H, W))"


def _mutant(
    name: str, what: str, place: str, old: str, new: str, *, phase: str = "connector"
) -> Mutant:
    return Mutant(name, what, phase, place, Edit(_FILE, old, new))


CONNECTOR = (
    _mutant(
        "shuffle-transposed",
        "a square's patches are taken column by column",
        _HF,
        _PERMUTE,
        "x = x.permute(0, 1, 3, 4, 2, 5)",
    ),
    _mutant(
        "shuffle-by-columns",
        "tokens run down the columns",
        _HF,
        _PERMUTE,
        "x = x.permute(0, 3, 1, 2, 4, 5)",
    ),
    _mutant(
        "shuffle-channels-first",
        "a token holds its features channel by channel",
        _HF,
        _PERMUTE,
        "x = x.permute(0, 1, 3, 5, 2, 4)",
    ),
    _mutant(
        "shuffle-missing",
        "patches are joined as they follow each other",
        _HF,
        _PERMUTE,
        "x = x.contiguous()",
    ),
    _mutant(
        "shuffle-height-and-width-swapped",
        "height and width change places",
        _HF,
        "self.pixel_unshuffle(patch_embeds, H, W)",
        "self.pixel_unshuffle(patch_embeds, W, H)",
    ),
    _mutant(
        "shuffle-wants-contiguous",
        "view instead of reshape: it raises on the encoder's own output",
        _HF,
        "x = x.reshape(tiles, H // scale, scale, W // scale, scale, width)",
        "x = x.view(tiles, H // scale, scale, W // scale, scale, width)",
        phase="forward",
    ),
    _mutant(
        "features-normalised-again",
        "features are normalised once more before the projection",
        _HF,
        _PROJECT,
        "patch_embeds = nn.functional.layer_norm(patch_embeds, patch_embeds.shape[-1:])\n        "
        + _PROJECT,
    ),
    _mutant(
        "projection-scaled",
        "tokens are scaled by the root of the text model's width",
        _HF,
        _PROJECT,
        f"{_PROJECT} * self.proj.out_features**0.5",
    ),
    _mutant(
        "projection-in-bfloat16",
        "the projection computes in bfloat16",
        _HF,
        _PROJECT,
        "x, weight = self.pixel_unshuffle(patch_embeds, H, W), self.proj.weight\n"
        "        return nn.functional.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)",
    ),
    _mutant(
        "projection-with-bias",
        "the projection has a bias, which the checkpoint lacks",
        f"{_HF}.modality_projection.proj",
        "text_hidden, bias=False)",
        "text_hidden, bias=True)",
    ),
)
