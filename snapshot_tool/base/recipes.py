"""A recipe is enough to build a case again without hypothesis: it is what a manifest keeps."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from snapshot_tool.base.protocol import Phase

IMAGE_TOKEN = "<image>"  # noqa: S105 - a placeholder in prompts, no secret
IMAGE_KINDS = ("gradient", "inverse-gradient", "flat", "noise", "checkerboard", "shapes")
IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")
MAX_IMAGE_SIDE = 8192  # pixels: a manifest from a stranger must not make us draw gigabytes
MAX_IMAGE_PIXELS = 2**24
MAX_IMAGES = 64
MAX_PADDING = 4096  # tokens


class InputKind(StrEnum):
    """What a family's inputs consist of."""

    TEXT = "text"
    ENCODER_TEXT = "text of an encoder"
    IMAGES = "images"
    BOTH = "text and images"

    @classmethod
    def of(cls, phases: Collection[Phase]) -> "InputKind":
        """Return the kind of a family with these phases."""
        if Phase.VISION in phases:
            return cls.BOTH if Phase.FORWARD in phases else cls.IMAGES
        return cls.TEXT if Phase.GENERATE in phases else cls.ENCODER_TEXT


@dataclass(frozen=True, slots=True)
class ImageRecipe:
    """A synthetic image: what is drawn, how large (pixels), in which PIL mode, from which seed."""

    kind: str
    width: int
    height: int
    mode: str = "RGB"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what `render` cannot draw."""
        if self.kind not in IMAGE_KINDS:
            raise ValueError(f"image kind {self.kind!r} is none of {', '.join(IMAGE_KINDS)}")
        if self.mode not in IMAGE_MODES:
            raise ValueError(f"image mode {self.mode!r} is none of {', '.join(IMAGE_MODES)}")
        if not (1 <= self.width <= MAX_IMAGE_SIDE and 1 <= self.height <= MAX_IMAGE_SIDE):
            raise ValueError(f"image size {self.width}x{self.height} is out of range")
        if self.width * self.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"image size {self.width}x{self.height} has too many pixels")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"image seed {self.seed} is out of range")


@dataclass(frozen=True, slots=True)
class CaseRecipe:
    """A prompt and its images.

    Args:
        prompt: the text, with one `<image>` for each image, in order.
        images: the images that the placeholders stand for.
        chat: whether the prompt is one user turn of the checkpoint's chat template.
        left_padding: pad tokens put before the prompt, with a zero attention mask.
        right_padding: the same after it; of encoders.
        second: a second text, given to the tokenizer beside the prompt; "" for none. Of encoders,
            which distinguish both by token types.
    """

    prompt: str
    images: tuple[ImageRecipe, ...] = ()
    chat: bool = False
    left_padding: int = 0
    right_padding: int = 0
    second: str = ""

    def __post_init__(self) -> None:
        """Refuse a recipe whose prompt and images do not belong together."""
        placeholders = self.prompt.count(IMAGE_TOKEN)
        if placeholders != len(self.images):
            raise ValueError(
                f"{placeholders} {IMAGE_TOKEN} in the prompt for {len(self.images)} images"
            )
        if placeholders > MAX_IMAGES:
            raise ValueError(f"{placeholders} images, allowed are {MAX_IMAGES}")
        for side, padding in (("left", self.left_padding), ("right", self.right_padding)):
            if not 0 <= padding <= MAX_PADDING:
                raise ValueError(f"{side} padding {padding} is out of range")


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A recipe with the name and the origin of its case.

    Args:
        name: the case's name.
        origin: "fixed"; "variant", which hypothesis drew; "end-token", which meets one;
            "prompt", from the user's file; "long", of a length that the user named.
    """

    name: str
    origin: str
    recipe: CaseRecipe


_GRADIENT = ImageRecipe("gradient", 512, 512)
_INVERSE = ImageRecipe("inverse-gradient", 512, 512)

# In which a generation may end by itself, the likeliest first.
END_PROMPTS = (
    CaseRecipe("Answer with one word: is water wet?", chat=True),
    CaseRecipe("Say yes.", chat=True),
    CaseRecipe("Question: is water wet? Answer: yes."),
    CaseRecipe("One two three."),
)

# Of families with text and images; vision encoders leave the words out.
FIXED_CASES: tuple[NamedRecipe, ...] = (
    NamedRecipe("one-image", "fixed", CaseRecipe("Describe the image: <image>.", (_GRADIENT,))),
    NamedRecipe(
        "two-images", "fixed", CaseRecipe("Compare: <image> then <image>.", (_GRADIENT, _INVERSE))
    ),
)
_TEXT_CASES: tuple[NamedRecipe, ...] = (
    NamedRecipe("one-sentence", "fixed", CaseRecipe("Describe the image in one sentence.")),
    NamedRecipe(
        "left-padded", "fixed", CaseRecipe("Compare the first and the second.", left_padding=5)
    ),
)
_ENCODER_CASES: tuple[NamedRecipe, ...] = (
    *_TEXT_CASES,
    NamedRecipe(
        "right-padded", "fixed", CaseRecipe("Compare the first and the second.", right_padding=5)
    ),
    NamedRecipe(
        "two-texts",
        "fixed",
        CaseRecipe("Is the sky blue?", right_padding=3, second="The sky is blue."),
    ),
)


def fixed_cases(kind: InputKind) -> tuple[NamedRecipe, ...]:
    """Return the cases that every recording of a kind of family begins with."""
    cases = {InputKind.TEXT: _TEXT_CASES, InputKind.ENCODER_TEXT: _ENCODER_CASES}
    return cases.get(kind, FIXED_CASES)
