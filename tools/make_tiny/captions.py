"""From a scene to a caption that names some of what is shown, and to the facts that it names.

    "a photo of a red and white striped cup on the beach"
    "pixel art of a fish at night"
    "the weird painting in the style of pixel art"

The grammar is that of the CLIP prompt templates (arXiv 2103.00020, section 3.1.4), in the two selections that
Textual Inversion trains with (arXiv 2208.01618, appendix): all of both lists occur.
"""

from dataclasses import dataclass

import numpy as np

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
    """`facts` holds those of noun, color, color2, pattern, background and style that `text` settles."""

    text: str
    facts: dict[str, str]


def describe(thing: Thing, named: set[str], rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """A noun with some of its adjectives, without an article."""
    noun, facts = thing.noun, {"noun": thing.noun}
    plural_of = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}
    toy = thing.noun in TOY_NAMES or bool(thing.parts)
    if toy and "noun" in named:
        return noun, facts | {"color": thing.color, "pattern": thing.pattern, "color2": thing.color2 or ""}
    if "noun" not in named:
        facts = {}
        animal = (
            ("animal", "creature", "toy animal")
            if toy or thing.noun in ANIMALS
            else ("toy", "thing", "object")
        )
        noun = ("toy", "thing", *animal)[int(rng.integers(2 + len(animal)))]
    adjective = ""
    if "color" in named:
        facts["color"] = thing.color
        adjective = thing.color
    if "pattern" in named and thing.pattern != "plain":
        facts["pattern"] = thing.pattern
        if "color" in named:
            facts["color2"] = thing.color2 or ""
            if rng.random() < 0.3:
                return f"{adjective} {noun} with {thing.color2} {plural_of[thing.pattern]}", facts
            adjective = f"{adjective} and {thing.color2} {thing.pattern}"
        else:
            adjective = thing.pattern
    elif "pattern" in named:
        facts["pattern"] = "plain"
        if rng.random() < 0.3 or "color" not in named:
            adjective = f"plain {adjective}".strip()
        elif rng.random() < 0.7:
            del facts["pattern"]
    return f"{adjective} {noun}".strip(), facts


def _indefinite(text: str) -> str:
    """Mend "a orange" to "an orange"."""
    words = text.split(" ")
    for i, word in enumerate(words[:-1]):
        if word == "a" and words[i + 1][0] in "aeiou" and words[i + 1] != "ubo":
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

    subject, facts = describe(scene.things[0], named, rng)
    if len(scene.things) == 2:
        second, _ = describe(scene.things[1], named | {"noun"}, rng)
        subject = f"{subject} and a {second}"
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
    return Caption(_indefinite(template.format(subject)), facts)


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
