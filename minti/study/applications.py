"""What the paper does with words beside naming one thing (arXiv 2208.01618, section 4 and appendix A).

Styles, two words in one prompt, a fairer word, painting into a photo, and DDIM inversion: each is tried with
the words of a study, and judged by what the classifier of the small world reads in the pictures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..cli.html import picture
from ..edit.blending import paint
from ..edit.inverting import encode_mean, invert_photo, sample_from
from ..edit.region import as_tensor, whole
from ..formats.photos import load_photos
from ..judge.picture_jobs import Measure, OnStep, PictureJob, PictureStore, Protocol, file_name
from ..judge.prompts import PromptList, fill
from ..model.stable_diffusion import StableDiffusion, last
from .classifier import Facts, Judge
from .concepts import ConceptSpec

COMMON_COLOR = "blue"  # of most birds in the small world; the fairer word was learned from others
LOW_GUIDANCE = 2.0  # at which the structure of an inverted photo holds
PLACE = "in the snow"


@dataclass(frozen=True)
class Trial:
    """One application, tried with one word, or with a text in its place.

    Attributes:
        about: what was tried, for people.
        job, measure: the pictures, and what is to be known of them.
        read: what was measured -> for each thing that should hold, how far it does in each picture, (n,).
    """

    application: str
    about: str
    job: PictureJob
    measure: Measure
    read: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

    def findings(self, store: PictureStore) -> list[dict[str, Any]]:
        """What came out of it, for study.json, once the pictures are made."""
        found = self.read(self.job.measure(self.measure, store))
        about = {"application": self.application, "about": self.about, "pictures": self.job.name}
        return [
            about | {"what": what, "share": values.mean().item(), "count": len(values)}
            for what, values in found.items()
        ]


@dataclass
class Applications:
    """All trials of a study.

    Attributes:
        words: what the model calls each concept.
        prompts: the prompts of each concept, by its name.
        inputs: what pictures depend on beside those; see `picture_jobs.models_of`.
    """

    sd: StableDiffusion
    judge: Judge
    words: Mapping[ConceptSpec, str]
    prompts: Mapping[str, PromptList]
    protocol: Protocol
    inputs: Mapping[str, str]

    def trials(self, names: Sequence[str]) -> list[Trial]:
        """The trials of some of APPLICATIONS."""
        return [trial for name in names for trial in APPLICATIONS[name](self)]

    def _of(self, kind: str, fact: str = "") -> list[ConceptSpec]:
        """The concepts of a kind of which something is known: this fact, or any."""
        known = [concept for concept in self.words if concept.kind == kind]
        return [concept for concept in known if (fact in concept.facts if fact else concept.facts)]

    def _trial(
        self, application: str, about: str, make: Callable, read: Callable, measure: Measure | None = None
    ) -> Trial:
        name = f"applications/{file_name(f'{application} {about}')}"
        ids = self.sd.tokenizer(list(self.words.values())).to(self.sd.device)
        vectors = self.sd.look_up(ids).detach().double().sum().item()  # tells the learned words apart
        inputs = {**self.inputs, **asdict(self.protocol), "about": about, "words": round(vectors, 6)}
        job = PictureJob(name, inputs, make, num_images=self.protocol.num_images, steps=self.protocol.steps)
        return Trial(application, about, job, measure or self.judge.measure, read)

    def _sample(self, prompts: Sequence[str], on_step: OnStep) -> list[Image.Image]:
        """`num_images` pictures of some prompts in turn."""
        p = self.protocol
        each = [(prompts[i % len(prompts)], p.seed + i) for i in range(p.num_images)]
        how = {"steps": p.steps, "guidance_scale": p.guidance_scale, "batch_size": p.batch_size}
        return list(self.sd.sample_each(each, on_step=on_step, **how))

    def style(self) -> Iterator[Trial]:
        """Pictures of known things in a learned style, and in the style that its init word names."""
        for concept in self._of("style", "style"):
            groups = self.prompts[concept.name].groups
            templates = [p.text for group in groups for p in group if self.judge.asked(p.text)]
            asked = [self.judge.asked(t) for t in templates]

            def read(found: Mapping[str, Tensor], concept=concept, asked=asked) -> dict[str, Tensor]:
                readings = self.judge.readings(found)
                wanted = [
                    {k: v for k, v in asked[i % len(asked)].items() if k != "style"}
                    for i in range(len(readings))
                ]
                return {
                    "the style": right(readings, concept.facts),
                    "what else the prompt asks for": torch.cat(
                        [right([r], w) for r, w in zip(readings, wanted, strict=True)]
                    ),
                }

            for about, text in (("the word", self.words[concept]), ("its init word", concept.init_word)):
                make = partial(self._sample, [fill(t, text) for t in templates])
                yield self._trial("style", f"{concept.name}, {about}", make, read)

    def composition(self) -> Iterator[Trial]:
        """Two learned things, side by side, as this world draws two things; and captions in their places."""
        for a, b in pairwise(self._of("object", "noun")):

            def read(found: Mapping[str, Tensor], a=a, b=b) -> dict[str, Tensor]:
                halves = [self.judge.readings({"facts": found[half]}) for half in ("left", "right")]
                nouns = [{left["noun"], right["noun"]} for left, right in zip(*halves, strict=True)]
                shapes = [a.facts["noun"], b.facts["noun"]]
                return {
                    "both shapes": torch.tensor([float({*shapes} <= there) for there in nouns]),
                    "one of them at least": torch.tensor([float(bool({*shapes} & there)) for there in nouns]),
                }

            texts = {"the words": (self.words[a], self.words[b])}
            texts["short captions"] = tuple(c.captions.get("short", [c.init_word])[0] for c in (a, b))
            for about, (first, second) in texts.items():
                make = partial(self._sample, [f"a photo of {first} and {second}"])
                yield self._trial("composition", f"{a.name} and {b.name}, {about}", make, read, self._halves)

    def _halves(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the left and the right half of each picture show, enlarged to the size of a picture."""
        found = {}
        for half, x in (("left", 0.02), ("right", 0.48)):
            side = images[0].width
            box = (round(x * side), side // 4, round(x * side) + side // 2, side // 4 + side // 2)
            found[half] = self.judge.measure(
                [image.resize(image.size, Image.Resampling.BICUBIC, box) for image in images]
            )["facts"]
        return found

    def bias(self) -> Iterator[Trial]:
        """How many are not of the colour that most of their kind have."""
        nouns = self.judge.probe.facts.get("noun", ())
        for concept in (c for c in self.words if c.kind == "set" and c.init_word in nouns):

            def read(found: Mapping[str, Tensor], concept=concept) -> dict[str, Tensor]:
                readings = self.judge.readings(found)
                return {
                    f"not {COMMON_COLOR}": 1 - right(readings, {"color": COMMON_COLOR}),
                    f"a {concept.init_word}": right(readings, {"noun": concept.init_word}),
                }

            for about, text in (("the word", self.words[concept]), ("its init word", concept.init_word)):
                make = partial(self._sample, [f"a photo of {text}"])
                yield self._trial("bias", f"{concept.name}, {about}", make, read)

    def blending(self) -> Iterator[Trial]:
        """A learned thing painted into the middle of a photo of another one."""
        objects = self._of("object")
        for concept, other in zip(objects, [*objects[1:], *objects[:1]], strict=True):
            photo = self._photo(other, 0)
            mask, edge = Image.new("L", photo.size), photo.width // 8
            ImageDraw.Draw(mask).rectangle((edge, edge, photo.width - edge, photo.height - edge), fill=255)
            region = whole(photo.size, self.sd.image_size, self.sd.vae.config.downscale)

            def make(
                on_step: OnStep, concept=concept, photo=photo, mask=mask, region=region
            ) -> list[Image.Image]:
                p, prompt, edited = self.protocol, f"a photo of {self.words[concept]}", []
                for first in range(0, p.num_images, p.batch_size):
                    seeds = [p.seed + i for i in range(first, min(first + p.batch_size, p.num_images))]
                    how = {"steps": p.steps, "guidance_scale": p.guidance_scale}
                    way = paint(self.sd, region.cut(photo), region.cut_mask(mask), prompt, seeds, **how)
                    images = self.sd.decode_latents(last(way, on_step))
                    edited += [region.put_back(photo, image, mask) for image in images]
                return edited

            def measure(images: Sequence[Image.Image], photo=photo, mask=mask) -> dict[str, Tensor]:
                outside = (as_tensor(mask.convert("RGB")) < 0).expand(1, 3, -1, -1)
                same = [torch.equal(as_tensor(i)[outside], as_tensor(photo)[outside]) for i in images]
                return self.judge.measure(images) | {"same": torch.tensor(same).float()}

            def read(found: Mapping[str, Tensor], concept=concept, photo=photo) -> dict[str, Tensor]:
                readings = self.judge.readings(found)
                background = self.judge.read([photo])[0]["background"]
                return {
                    "the attributes of the concept": right(readings, concept.facts),
                    "the background of the photo": right(readings, {"background": background}),
                    "outside the mask every pixel that of the photo": found["same"],
                }

            about = f"{concept.name} in a photo of {other.name}"
            yield self._trial("blending", about, make, read, measure)

    def inversion(self) -> Iterator[Trial]:
        """The photos of a thing, inverted with its word, and led to another place."""
        for concept in self._of("object"):
            word, asked = self.words[concept], self.judge.asked(f"a photo of {{}} {PLACE}")
            place = {"background": asked["background"]} if asked else {}

            def make(guidance: float, on_step: OnStep, concept=concept, word=word) -> list[Image.Image]:
                edited, steps = [], self.protocol.steps
                for i in range(min(self.protocol.num_images, len(load_photos(concept.images)))):
                    x, prompt = encode_mean(self.sd, as_tensor(self._photo(concept, i))), f"a photo of {word}"
                    way = invert_photo(self.sd, x, prompt, steps=steps, guidance_scale=1.0)
                    x, prompt = last(way, on_step), f"{prompt} {PLACE}"
                    way = sample_from(self.sd, x, prompt, steps=steps, guidance_scale=guidance)
                    edited += self.sd.decode_latents(last(way, on_step))
                return edited

            def read(found: Mapping[str, Tensor], concept=concept, place=place) -> dict[str, Tensor]:
                readings = self.judge.readings(found)
                return {
                    "the attributes of the concept": right(readings, concept.facts),
                    PLACE: right(readings, place),
                }

            for guidance in (LOW_GUIDANCE, self.protocol.guidance_scale):
                about = f"{concept.name}, {PLACE}, guidance {guidance:g}"
                yield self._trial("inversion", about, partial(make, guidance), read)

    def _photo(self, concept: ConceptSpec, index: int) -> Image.Image:
        """A photo in the size of the model's pictures."""
        return ImageOps.fit(load_photos(concept.images)[index].open(), self.sd.image_size)


APPLICATIONS: Mapping[str, Callable[[Applications], Iterator[Trial]]] = {
    **{"style": Applications.style, "composition": Applications.composition, "bias": Applications.bias},
    **{"blending": Applications.blending, "inversion": Applications.inversion},
}


def right(readings: Sequence[Facts], facts: Facts) -> Tensor:
    """The share of right facts in each picture, (n,); 1 where no fact is asked for."""
    return torch.tensor(
        [sum(r[f] == v for f, v in facts.items()) / max(1, len(facts)) if facts else 1.0 for r in readings]
    )


def applications_table(findings: Sequence[Mapping[str, Any]], pictures: Path) -> str:
    """What came out, as HTML, with the pictures, which are in a folder."""
    parts, shown = [], None
    for finding in findings:
        if finding["pictures"] != shown:
            shown = finding["pictures"]
            parts.append(f"<h3>{escape(finding['application'])}: {escape(finding['about'])}</h3>")
            parts.append(picture(pictures / f"{shown}.png", finding["about"]))
        share = f"{100 * finding['share']:.0f} %"
        parts.append(f"<p>{escape(finding['what'])}: <b>{share}</b> of {finding['count']}</p>")
    return "".join(parts)
