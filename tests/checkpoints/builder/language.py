"""What the tiny model hears and says: prompts, answers, and the corpus of its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from builder.scenes import COLOURS, Scene, draw_pair, draw_scene, temperature
from builder.tokenizer import BOS, END_OF_UTTERANCE

DESCRIBE = (
    "Describe the image: <image>.",
    "Describe the image: <image>.",
    "<image> What is in this picture?",
    "Décris l'image : <image>.",
    "画像を説明して: <image>",
)
COLOUR_QUESTIONS = ("Which colours are in <image>?", "Name the colours: <image>")
COMPARE = ("Compare: <image> then <image>.", "What differs between <image> and <image>?")
COUNT = ("<image><image><image>", "Three pictures: <image>, <image> and <image>.")

THINGS: dict[str, str] = {
    "red": "a rose, a ripe apple, fire and the evening sun",
    "orange": "a carrot, a pumpkin, autumn leaves and a fox",
    "yellow": "a lemon, straw, honey and the sun at noon",
    "green": "grass, moss, a young leaf and the deep forest",
    "blue": "the sea, a clear sky, ice and far mountains",
    "purple": "a plum, lavender, ink and the hour before night",
    "pink": "a shell, a peony, morning clouds and a cat's nose",
    "white": "snow, milk, chalk and an empty page",
    "grey": "stone, ash, a dove and a rainy street",
    "black": "coal, a raven, the night and a closed room",
}
PROSE = (
    "Once upon a time there was a small square who wanted to roll like a circle down the hill.",
    "The quick brown fox jumps over the lazy dog while the grey cat looks on from the wall.",
    "A picture is made of dots, and every dot is only three numbers between zero and the largest.",
    "Light falls on the wall, the wall sends some of it back, and the eye calls the rest a colour.",
    "First draw a line, then a second one beside it; where they meet, a corner begins.",
    "In the morning the sea is silver, at noon it is blue, and late at night it has no name.",
    "To compare two things, look at one, look at the other, and say what stayed the same.",
    "Numbers such as 1, 2, 3, 5, 8 and 13 grow faster than one would think at first sight.",
    "Hello, world! Nice to meet you; what would you like to see on the next page?",
    "Naïve café, jalapeño, Straße, Привет, мир, こんにちは and 🙂 are words and signs too.",
)


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its images, and the answer that the model shall learn."""

    prompt: str
    images: tuple[Image.Image, ...]
    answer: str


def _choose(state: np.random.RandomState, options: tuple[str, ...]) -> str:
    return options[state.randint(len(options))]


def colour_list(scene: Scene) -> str:
    """Return which colours a scene has and which it lacks."""
    present = list(dict.fromkeys(scene.colours))
    absent = [name for name in COLOURS if name not in present]
    return f" mostly {' and '.join(present)}; there is no {', no '.join(absent[:6])}."


def comparison(first: Scene, second: Scene) -> str:
    """Return what two scenes are, and whether they share a colour."""
    shared = [name for name in first.colours if name in second.colours]
    tail = f"both have {shared[0]} in them" if shared else "they share no colour at all"
    return f" the first shows {first.short}, while the second shows {second.short}; {tail}."


def about_colour(colour: str) -> str:
    """Return a sentence about a colour."""
    return f" {colour} is a {temperature(colour)} colour: think of {THINGS[colour]}."


def chat_prompt(question: str) -> str:
    """Return one user turn, as the chat template writes it."""
    gap = "" if question.startswith("<image>") else " "
    return f"{BOS}User:{gap}{question}{END_OF_UTTERANCE}\nAssistant:"


def _ask(scene: Scene, state: np.random.RandomState) -> tuple[str, str]:
    """Return a question about a scene and its answer: each way of asking has its own."""
    kind = state.randint(7)
    if kind < 4:
        return _choose(state, DESCRIBE), scene.long
    if kind == 4:
        return _choose(state, COLOUR_QUESTIONS), colour_list(scene)
    if kind == 5:
        return "Write a caption for <image>:", f" {scene.short}; in other words,{scene.long}"
    return "<image>", f" I see {scene.short}, and{colour_list(scene)}"


def draw_single(state: np.random.RandomState) -> Example:
    """Draw a question about one image; one in four is a chat turn."""
    scene = draw_scene(state)
    prompt, answer = _ask(scene, state)
    if state.randint(4) == 0:
        prompt, answer = chat_prompt(prompt), f" Yes:{answer}"
    return Example(prompt, (scene.image,), answer)


def draw_several(state: np.random.RandomState) -> Example:
    """Draw a question about two images, or now and then about three."""
    if state.randint(5):
        pair = draw_pair(state)
        images = tuple(scene.image for scene in pair)
        return Example(_choose(state, COMPARE), images, comparison(*pair))
    scenes = [draw_scene(state) for _ in range(3)]
    first, second, third = (scene.short for scene in scenes)
    answer = f" one is {first}, two is {second}, and three is {third}."
    return Example(_choose(state, COUNT), tuple(scene.image for scene in scenes), answer)


def draw_text(state: np.random.RandomState) -> Example:
    """Draw an example without images: a colour, or a sentence to go on with."""
    if state.randint(2):
        colour = _choose(state, tuple(COLOURS))
        prompt = f"Tell me about {colour}."
        if state.randint(3) == 0:
            prompt = chat_prompt(prompt)
        return Example(prompt, (), about_colour(colour))
    words = _choose(state, PROSE).split(" ")
    cut = 1 + state.randint(3)
    return Example(" ".join(words[:cut]), (), " " + " ".join(words[cut:]))


def corpus(*, seed: int, scenes: int = 300) -> list[str]:
    """Return the texts from which the tokenizer learns its merges."""
    state = np.random.RandomState(seed)
    drawn = [draw_scene(state) for _ in range(scenes)]
    pairs = zip(drawn[::2], drawn[1::2], strict=True)
    return [
        *(scene.long for scene in drawn),
        *(colour_list(scene) for scene in drawn[:60]),
        *(comparison(first, second) for first, second in pairs),
        *(about_colour(colour) for colour in COLOURS for _ in range(4)),
        *PROSE * 4,
        *("Describe the image: ", "Compare: ", "User: ", "Assistant: ") * 20,
    ]
