"""Faults in the connector."""

from tests.mutants.mutant import LOADING, Edit, Mutant

_FILE = "fms/models/idefics3.py"
_HF = "model.connector"
_PERMUTE = "x = x.permute(0, 1, 3, 2, 4, 5)"
_PROJECT = "return self.modality_projection(self.pixel_shuffle(features, H, W))"


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
        "self.pixel_shuffle(features, H, W)",
        "self.pixel_shuffle(features, W, H)",
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
        "features = nn.functional.layer_norm(features, features.shape[-1:])\n        " + _PROJECT,
    ),
    _mutant(
        "projection-scaled",
        "tokens are scaled by the root of the text model's width",
        f"{_HF}.modality_projection",
        "return self.proj(x)",
        "return self.proj(x) * self.proj.out_features**0.5",
    ),
    _mutant(
        "projection-in-bfloat16",
        "the projection computes in bfloat16",
        f"{_HF}.modality_projection",
        "return self.proj(x)",
        "return nn.functional.linear(x.bfloat16(), self.proj.weight.bfloat16()).to(x.dtype)",
    ),
    _mutant(
        "projection-with-bias",
        "the projection has a bias, which the checkpoint lacks",
        f"{_HF}.modality_projection.proj",
        "config.text_config.emb_dim, bias=False)",
        "config.text_config.emb_dim, bias=True)",
        phase=LOADING,
    ),
)
