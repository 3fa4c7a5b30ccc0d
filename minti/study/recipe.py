"""A recipe, spread out into everything that a study has to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..judge.picture_jobs import Protocol
from ..judge.prompts import Prompt, PromptList, check_prompt, load_prompts
from .applications import APPLICATIONS
from .concepts import ConceptSpec, choose_concepts, read_concepts, table_of, text_of, texts_of
from .summary import check_claims
from .variants import Setup, Variant, check_settings, expand, make_variant
from .ways import PLAIN, RARE_WORD, Way, way_of

KEYS = (  # what only a recipe can say; it may also give any option of the command
    *("title", "about"),  # texts for the report
    *("concepts", "kinds"),  # see `read_concepts`; the kinds to choose among, by default objects
    "prompts",  # the name of a list, or the prompts; or set -> either of them
    *("base", "setups"),  # settings of all words; name -> settings of its words, see `expand`
    "applications",  # names of APPLICATIONS
    *("captions", "claims"),  # name -> kind of caption, or "init_word"; see `check_claims`
)
MOST_REQUESTS = 10_000  # of a study: ways of asking for a concept, each with pictures of every prompt
SEED_STEP = 1000  # between the seeds of repeated words: more than any recipe spreads seeds out

# What --quick leaves: the share of the steps; and how many of the others, at most.
QUICK_STEPS, QUICK_IMAGES, QUICK_SAMPLE_STEPS = 0.4, 8, 15
QUICK_CONCEPTS, QUICK_PROMPTS_OF_A_GROUP, QUICK_CAPTIONS = 1, 2, 1


@dataclass(frozen=True)
class Request:
    """One way of asking for one concept: with a word that is learned, or with a text.

    Attributes:
        name, kind: those of its `Evaluation`.
        family: the name that all values spread out of one setup share.
        variant: the word to learn; None for a text.
        way: how pictures are made with it.
        note: tells requests of one name apart.
        repeat: 0 for the first of several words that are learned alike.
    """

    concept: ConceptSpec
    name: str
    family: str
    kind: str
    variant: Variant | None = None
    way: Way = PLAIN
    text: str = ""
    note: str = ""
    repeat: int = 0

    @property
    def key(self) -> str:
        """What the store of pictures knows it by."""
        own = self.variant.key if self.variant else self.text or self.name
        return own if self.way == PLAIN else f"{own} {self.concept.name} {self.way}"


@dataclass
class StudyPlan:
    """Everything that a study has to do; nothing has been made or written yet.

    Attributes:
        prompts: the prompts of each concept; `prompt_names`: what they are called.
    """

    title: str
    about: str
    concepts: Sequence[ConceptSpec]
    prompts: dict[str, PromptList]
    prompt_names: dict[str, str]
    requests: Sequence[Request]
    protocol: Protocol
    claims: Sequence[dict[str, Any]]
    applications: Sequence[str] = ()


def make_plan(
    recipe: Mapping[str, Any],
    protocol: Protocol,
    *,
    choose: str = "final",
    repeats: int = 1,
    quick: bool = False,
) -> StudyPlan:
    """Spread out a recipe.

    Args:
        recipe: a value, or None, for each of KEYS.
        choose: which concepts; see `choose_concepts`.
        repeats: how often every word is learned, each time with another seed.
        quick: leave out most of it, for a look that takes minutes.

    Raises:
        InputError: something is wrong with the recipe.
    """
    kinds = texts_of(recipe["kinds"] or ["object"], "kinds")
    concepts = choose_concepts(read_concepts(recipe["concepts"]), choose, kinds)
    if quick:
        concepts = concepts[:QUICK_CONCEPTS]
        images, steps = min(protocol.num_images, QUICK_IMAGES), min(protocol.steps, QUICK_SAMPLE_STEPS)
        protocol = replace(protocol, num_images=images, steps=steps)
    sources = {c.name: c.prompts or prompts_of(recipe["prompts"], c) for c in concepts}
    prompts = {name: load_source(source) for name, source in sources.items()}
    base = table_of(recipe["base"], "base", "`steps: 1000`")
    captions = table_of(recipe["captions"], "captions", "`short caption: short`")
    captions = {name: text_of(kind, f"captions: {name}") for name, kind in captions.items()}
    check_settings(base, "base")
    setups = expand(recipe["setups"], base)
    names = [*(setup.name for setup in setups), *captions, "image only", "prompt only"]
    if len(set(names)) < len(names):
        raise InputError(f"setups and captions: two of them are called {max(names, key=names.count)!r}")
    if not setups and not captions:
        raise InputError("setups: should have entries like `high lr: {lr: 0.02}`; there is nothing to study")
    if (count := len(names) * len(concepts) * repeats) > MOST_REQUESTS:
        raise InputError(f"setups: {count:,} words to learn and compare; {MOST_REQUESTS:,} is the limit")
    requests = [r for c in concepts for r in requests_for(c, setups, captions, repeats, quick)]
    claims = recipe["claims"] or []
    check_claims(claims, names)
    applications = texts_of(recipe.get("applications") or [], "applications")
    if unknown := [name for name in applications if name not in APPLICATIONS]:
        raise InputError(f"applications: {unknown[0]!r}; there are {', '.join(APPLICATIONS)}")
    return StudyPlan(
        title=text_of(recipe["title"] or "", "title"),
        about=text_of(recipe["about"] or "", "about"),
        concepts=concepts,
        prompts={n: few_prompts(p) for n, p in prompts.items()} if quick else prompts,
        prompt_names={n: s if isinstance(s, str) else "the recipe's own" for n, s in sources.items()},
        requests=requests,
        protocol=protocol,
        claims=claims,
        applications=applications,
    )


def prompts_of(prompts: Any, concept: ConceptSpec) -> str | list[str]:
    """The prompts that a recipe has for a concept: those for all, or those for its set."""
    found = prompts.get(concept.set) if isinstance(prompts, dict) else prompts
    if not isinstance(found, str | list):
        raise InputError(
            f"prompts: none for {concept.name}, which is in the set {concept.set!r}; name a list"
        )
    return found


def load_source(source: str | list[str]) -> PromptList:
    """The list of that name, or these prompts."""
    if isinstance(source, str):
        return load_prompts(source)
    templates = texts_of(source, "prompts")
    for template in templates:
        check_prompt(template, "prompts")
    return PromptList([Prompt(template) for template in dict.fromkeys(templates)])


def few_prompts(prompts: PromptList) -> PromptList:
    """Some prompts of each group, from all over it, since neighbours are alike."""
    n = QUICK_PROMPTS_OF_A_GROUP
    few = [group[i * len(group) // n] for group in prompts.groups for i in range(min(n, len(group)))]
    return PromptList(few, prompts.reconstruction)


def requests_for(
    concept: ConceptSpec, setups: Sequence[Setup], captions: dict[str, str], repeats: int, quick: bool
) -> list[Request]:
    """Every way of asking for a concept: learned words, captions, and no word at all."""
    requests = []
    for setup in setups:
        scale = QUICK_STEPS if quick else 1.0
        try:
            way = way_of(setup.values, scale)
        except InputError as error:
            raise InputError(f"setups: {setup.name!r}: {error}") from None
        if not way.has_word:
            text = texts_for(concept, way.text)[0] if way.text else f"{RARE_WORD} {concept.init_word}"
            more = {"text": text, "note": text, "way": way}
            requests.append(Request(concept, setup.name, setup.family, "caption", **more))
            continue
        variant = make_variant(setup, concept, scale)
        for i in range(repeats):
            word = replace(variant, seed=variant.seed + SEED_STEP * i)
            note = f"seed {word.seed}" if repeats > 1 else ""
            requests.append(
                Request(concept, setup.name, setup.family, "word", word, way, note=note, repeat=i)
            )
    for name, kind in captions.items():
        texts = texts_for(concept, kind)[: QUICK_CAPTIONS if quick else None]
        requests += [Request(concept, name, name, "caption", text=text, note=text) for text in texts]
    return [*requests, Request(concept, "prompt only", "prompt only", "prompt only")]


def texts_for(concept: ConceptSpec, kind: str) -> Sequence[str]:
    """The captions of a concept of one kind, or its coarse description. Raises InputError if it has none."""
    texts = [concept.init_word] if kind == "init_word" else concept.captions.get(kind)
    if not texts:
        raise InputError(f"captions: {concept.name} has none of the kind {kind!r}")
    return texts
