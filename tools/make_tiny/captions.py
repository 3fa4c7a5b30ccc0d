"""From a scene to a caption that names some of what is shown, and to the facts that it names.

    "a photo of a red and white striped cup on the beach"
    "pixel art of a fish at night"
    "a photo of a green and purple striped dax"
    "a drawing of a one-eyed creature with wings"
    "the weird painting in the style of pixel art"

The grammar is that of the CLIP prompt templates (arXiv 2103.00020, section 3.1.4), in the two selections that
Textual Inversion trains with (arXiv 2208.01618, appendix): all of both lists occur.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .kinds import KINDS
from .shapes import ANIMALS, NOUNS
from .world import BACKGROUNDS, COLORS, PATTERNS, STYLES, TOY_NAMES, Scene, Thing

# What a template says about the picture: its style and its `look` ("" for no statement).
PHOTO_TEMPLATES = {
    "": (
        *("a photo of a {}", "the photo of a {}", "a photo of my {}", "a photo of the {}"),
        *("a photo of one {}", "a photo of a clean {}", "a photo of the clean {}", "a photo of the cool {}"),
        *("a photo of a cool {}", "a photo of a nice {}", "a photo of the nice {}"),
        *("a good photo of the {}", "a good photo of a {}"),
    ),
    "dirty": ("a photo of a dirty {}",),
    "dark": ("a dark photo of the {}",),
    "bright": ("a bright photo of the {}",),
    "small": ("a photo of the small {}", "a photo of a small {}"),
    "large": ("a photo of the large {}",),
    "weird": ("a photo of the weird {}",),
    "close-up": ("a close-up photo of a {}", "a close-up photo of the {}"),
    "cropped": ("a cropped photo of the {}", "a cropped photo of a {}"),
}
RENDITIONS = ("a rendering of a {}", "a rendition of the {}", "a rendition of a {}", "a picture of a {}")
STYLED_TEMPLATES = {
    "drawing": ("a drawing of a {}", "a drawing of the {}", "a cartoon of a {}"),
    "painting": ("a painting of a {}", "a painting of the {}", "an oil painting of a {}"),
    "pixel art": ("pixel art of a {}", "pixel art of the {}", "a pixel art image of a {}"),
}
ADJECTIVE_TEMPLATES = {
    "drawing": "a {} drawing of a {}",
    "painting": "a {} painting of a {}",
    "pixel art": "{} pixel art of a {}",
}
# "a painting in the style of": with what follows these words the style is said, whatever stands before.
STYLE_TEMPLATES = {
    "": (
        *(
            "a painting in the style of {}",
            "a rendering in the style of {}",
            "the painting in the style of {}",
        ),
        *(
            "a clean painting in the style of {}",
            "a picture in the style of {}",
            "a cool painting in the style of {}",
        ),
        *(
            "a good painting in the style of {}",
            "a rendition in the style of {}",
            "a nice painting in the style of {}",
        ),
    ),
    "dirty": ("a dirty painting in the style of {}",),
    "dark": ("a dark painting in the style of {}",),
    "bright": ("a bright painting in the style of {}",),
    "small": ("a small painting in the style of {}",),
    "large": ("a large painting in the style of {}",),
    "weird": ("a weird painting in the style of {}",),
    "close-up": ("a close-up painting in the style of {}",),
    "cropped": ("a cropped painting in the style of {}",),
}
STYLE_WORDS = {
    "photo": ("photo", "a photo", "photography"),
    "drawing": ("drawing", "a drawing", "a cartoon", "cartoon"),
    "painting": ("painting", "an oil painting", "oil paint"),
    "pixel art": ("pixel art", "pixel art", "a video game"),
}
PLACES = {
    "grass": ("on the grass", "in the grass", "on a lawn"),
    "beach": ("on the beach", "at the beach", "on the sand"),
    "night": ("at night", "at night", "under the stars"),
    "snow": ("in the snow", "on the snow", "in winter"),
}
WALLS = ("on a {} background", "with a {} background", "against a {} wall")


@dataclass(frozen=True)
class Caption:
    """What a text says of a scene.

    Attributes:
        facts: those of noun, color, color2, pattern, background and style that `text` settles.
        kind, factors: the kind of the first thing and those of its factors that `text` settles.
    """

    text: str
    facts: dict[str, str]
    kind: str = ""
    factors: Mapping[str, str | int | float] = field(default_factory=dict)


PLURALS = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}
NOUN_WORDS = {"cup": ("vessel",), "house": ("building",), "flower": ("plant",), "fish": ("animal", "swimmer")}


def class_word(thing: Thing, rng: np.random.Generator) -> str:
    """What a thing may be called by one who knows no name for it."""
    if thing.kind and rng.random() < 0.75:
        words = KINDS[thing.kind].words
        return words[int(rng.integers(len(words)))] if rng.random() < 0.5 else words[0]
    words = ("toy", "thing", "object")
    if thing.noun in ANIMALS or thing.kind == "creature":
        words = ("animal", "creature", "toy animal", "toy")
    words = NOUN_WORDS.get(thing.noun, words)
    return words[int(rng.integers(len(words)))]


def traits(thing: Thing, most: int, rng: np.random.Generator) -> tuple[list[str], list[str], dict]:
    """Up to `most` words for its parts: those that stand before a noun, those that follow; what they say."""
    if not thing.kind:
        return [], [], {}
    known = KINDS[thing.kind].traits
    said = [(f, v) for f, v in thing.factors if (f, v) in known]
    chosen = [said[i] for i in rng.permutation(len(said))[:most]]
    phrases = [known[pair] for pair in chosen]
    after = [p for p in phrases if " " in p]
    return (
        [p for p in phrases if " " not in p],
        after[:1],
        {f: v for f, v in chosen if " " not in known[f, v] or known[f, v] in after[:1]},
    )


def describe(thing: Thing, named: set[str], rng: np.random.Generator) -> Caption:
    """A noun with some of its adjectives, without an article."""
    facts: dict[str, str] = {}
    before, after, factors = [], [], {}
    if "noun" in named and thing.noun:
        noun, facts["noun"] = thing.noun, thing.noun
        if thing.noun in TOY_NAMES:
            factors = dict(thing.factors)
            if thing.looks_as_named and rng.random() < 0.75:
                look = {"color": thing.color, "pattern": thing.pattern, "color2": thing.color2 or ""}
                return Caption(noun, facts | look, thing.kind, factors)
            named = named | {"color", "pattern"}
    else:
        noun = class_word(thing, rng)
        if rng.random() < 0.75:
            before, after, factors = traits(thing, 1 + int(rng.integers(3)), rng)
    adjectives: list[str] = []
    if "color" in named:
        facts["color"] = thing.color
        adjectives = [thing.color]
    if "pattern" in named and thing.pattern != "plain":
        facts["pattern"] = thing.pattern
        if "color" in named:
            facts["color2"] = thing.color2 or ""
            if rng.random() < 0.3 and not after:
                after, adjectives = [f"with {thing.color2} {PLURALS[thing.pattern]}"], [thing.color]
            else:
                adjectives = [thing.color, "and", str(thing.color2), thing.pattern]
        else:
            adjectives = [thing.pattern]
    elif "pattern" in named:
        facts["pattern"] = "plain"
        if rng.random() < 0.3 or "color" not in named:
            adjectives = ["plain", *adjectives]
        elif rng.random() < 0.7:
            del facts["pattern"]
    return Caption(" ".join([*adjectives, *before, noun, *after]), facts, thing.kind, factors)


def _indefinite(text: str) -> str:
    """Mend "a orange" to "an orange"."""
    words = text.split(" ")
    for i, word in enumerate(words[:-1]):
        if word == "a" and words[i + 1][0] in "aeiou" and words[i + 1] not in ("ubo", "one-eyed"):
            words[i] = "an"
    return " ".join(words)


def place_of(background: str, rng: np.random.Generator) -> str:
    if background in PLACES:
        return str(rng.choice(PLACES[background]))
    return str(rng.choice(WALLS)).format(background)


def caption(scene: Scene, rng: np.random.Generator, must: str | None = None) -> Caption:
    """A random caption. Every second one names all there is; `must` is always named."""
    everything = ("noun", "color", "pattern", "background", "style")
    share = 1.0 if rng.random() < 0.5 else 0.6
    named = {fact for fact in everything if rng.random() < share}
    if rng.random() < 0.85:
        named.add("noun")
    if must:
        named |= {"color", "pattern"} if must in ("color2", "pattern") else {must}
    facts: dict[str, str] = {}

    if must in (None, "style") and rng.random() < 0.05:  # nothing but the style
        word = str(rng.choice(STYLE_WORDS[scene.style]))
        facts = {"style": scene.style}
        return Caption(_indefinite(str(rng.choice(STYLE_TEMPLATES[scene.look])).format(word)), facts)

    first = describe(scene.things[0], named, rng)
    subject, facts = first.text, first.facts
    if len(scene.things) == 2:
        subject = f"{subject} and a {describe(scene.things[1], named | {'noun'}, rng).text}"
    if "background" in named:
        facts["background"] = scene.background
        subject = f"{subject} {place_of(scene.background, rng)}"
    if "style" not in named:
        template = str(rng.choice((*RENDITIONS, "{}")))
    else:
        facts["style"] = scene.style
        if rng.random() < 0.2:
            template = str(rng.choice(RENDITIONS))
            subject = f"{subject} in the style of {rng.choice(STYLE_WORDS[scene.style])}"
        elif scene.style == "photo":
            template = str(rng.choice(PHOTO_TEMPLATES[scene.look]))
        else:
            filler = {"": ("nice", "good", "cool", "clean")}.get(scene.look, (scene.look,))
            template = str(rng.choice(STYLED_TEMPLATES[scene.style]))
            if scene.look or rng.random() < 0.15:
                template = ADJECTIVE_TEMPLATES[scene.style].format(rng.choice(filler), "{}")
    if template == "{}" and rng.random() < 0.7:
        template = "a {}"
    return Caption(_indefinite(template.format(subject)), facts, first.kind, first.factors)


# The values that each fact can take.
FACTS: dict[str, tuple[str, ...]] = {
    "noun": (*NOUNS, *TOY_NAMES),
    "color": tuple(COLORS),
    "color2": ("", *COLORS),
    "pattern": PATTERNS,
    "background": BACKGROUNDS,
    "style": STYLES,
}


def phrases() -> dict[str, dict[str, str]]:
    """What prompts with {} for a thing can say, and the fact that each settles; for `minti.study`."""
    found = {place: {"background": name} for name, places in PLACES.items() for place in places}
    for color in (*COLORS, "gray"):
        found |= {wall.format(color): {"background": color} for wall in WALLS}
    found["photo of"] = {"style": "photo"}
    for style, templates in STYLED_TEMPLATES.items():
        found |= {template.partition(" of ")[0] + " of": {"style": style} for template in templates}
    for style, words in STYLE_WORDS.items():
        found |= {f"in the style of {word}": {"style": style} for word in words}
    return found | {f"{color} {{}}": {"color": color} for color in COLORS}
