"""Faults on the way from an image to its tiles."""

from tests.mutants.mutant import PREPROCESSING as PLACE
from tests.mutants.mutant import Edit, Mutant

_PHASE = "preprocessing"
_FILE = "fms/models/idefics3_components/own_preprocessing.py"
_LAST_LINE = "return [*tiles, picture.resized(side, side, self.resample).pixels]"


def _mutant(name: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(name, what, _PHASE, PLACE, Edit(_FILE, old, new))


PREPROCESSING = (
    _mutant(
        "tiles-swapped",
        "the first two tiles change places",
        _LAST_LINE,
        f"tiles[:2] = tiles[1::-1]\n        {_LAST_LINE}",
    ),
    _mutant(
        "tiles-by-columns",
        "tiles are cut column by column",
        "for top in range(0, height, side)\n            for left in range(0, width, side)",
        "for left in range(0, width, side)\n            for top in range(0, height, side)",
    ),
    _mutant(
        "whole-image-first",
        "the whole image stands before its tiles",
        _LAST_LINE,
        "return [picture.resized(side, side, self.resample).pixels, *tiles]",
    ),
    _mutant(
        "whole-image-missing",
        "the tiles come without the whole image",
        _LAST_LINE,
        "return tiles",
    ),
    _mutant(
        "bicubic-resize",
        "bicubic instead of Lanczos",
        'self.resample = config.get("resample", Image.Resampling.LANCZOS)',
        "self.resample = Image.Resampling.BICUBIC",
    ),
    _mutant(
        "grey-resized-smoothly",
        "pictures of one channel are resized by the filter, not by nearest neighbour",
        "as_palette = (wide if self.channels_first else channels) == 1",
        "as_palette = False",
    ),
    _mutant(
        "odd-edge-kept",
        "the shorter edge is not made even",
        "        height += height % 2\n",
        "",
    ),
    _mutant(
        "tiles-rounded-down",
        "edges are rounded down to whole tiles",
        "return math.ceil(length / multiple) * multiple",
        "return max(1, length // multiple) * multiple",
    ),
    _mutant(
        "channels-reversed",
        "blue, green, red",
        "values.transpose(0, 3, 1, 2).copy()",
        "values[..., ::-1].transpose(0, 3, 1, 2).copy()",
    ),
    _mutant(
        "layout-guess-dropped",
        "low pictures are not read as channels first",
        "if array.shape[0] in _CHANNELS:",
        "if False:",
    ),
    _mutant(
        "transparency-dropped",
        "the alpha channel is cut off",
        'return np.array(Image.alpha_composite(white, opaque).convert("RGB"))',
        'return np.array(opaque.convert("RGB"))',
    ),
    _mutant(
        "black-background",
        "transparent pictures are laid on black",
        'Image.new("RGBA", opaque.size, (255, 255, 255))',
        'Image.new("RGBA", opaque.size, (0, 0, 0))',
    ),
    _mutant(
        "palette-ignored",
        "palette indices are taken for grey values",
        "            image.putpalette(palette)",
        "            image.putpalette(bytes(i for i in range(256) for _ in range(3)))",
    ),
    _mutant(
        "rescale-by-256",
        "bytes are divided by 256",
        'self.rescale_factor = config.get("rescale_factor", 1 / 255)',
        "self.rescale_factor = 1 / 256",
    ),
    _mutant(
        "rescale-in-float32",
        "bytes are rescaled in float32, not float64",
        "(pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)",
        "pixels.astype(np.float32) * np.float32(self.rescale_factor)",
    ),
    _mutant(
        "imagenet-mean",
        "ImageNet's mean",
        'self.mean = np.array(config["image_mean"], dtype=np.float32)',
        "self.mean = np.array([0.485, 0.456, 0.406], dtype=np.float32)",
    ),
    _mutant(
        "std-dropped",
        "values are not divided by the standard deviation",
        "return (values - self.mean) / self.std if",
        "return (values - self.mean) if",
    ),
    _mutant(
        "mean-and-std-swapped",
        "the mean divides, the standard deviation is taken off",
        "return (values - self.mean) / self.std if",
        "return (values - self.std) / self.mean if",
    ),
)
