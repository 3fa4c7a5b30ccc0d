"""`python -m minti.study`: what a recipe means, that nothing is done twice, that the report is complete."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import minti
from minti import Concept, InputError
from minti.cli.images import THUMBNAIL
from minti.inversion.batches import Settings
from minti.inversion.inversion import Inversion
from minti.judge.benchmark import Evaluation
from minti.judge.picture_jobs import PictureJob, PictureStore
from minti.judge.scores import Score, student_t
from minti.study import __main__ as study
from minti.study import learner
from minti.study.applications import APPLICATIONS
from minti.study.classifier import Judge, Probe, Truth
from minti.study.concepts import ConceptSpec, choose_concepts, read_concepts
from minti.study.recipe import StudyPlan
from minti.study.summary import Outcome, claim_numbers, disagreements, judge_claims, means, rank_correlation
from minti.study.variants import KEYS, expand, group_words, make_variant
from minti.study.ways import WAYS, Way
from minti.tune import __main__ as tune
from tools.make_tiny import captions, concepts, probe

ROOT = Path(minti.__file__).parents[1]
FACTS = {"color": ["red", "green"], "background": ["grass", "snow"]}
PHRASES = {"on the grass": {"background": "grass"}, "red {}": {"color": "red"}}
TOY = {"init_word": "toy", "set": "final"}
SEEDS = list(range(1000))
CLAIM = {"says": "One is better.", "first": "1 vector", "second": "caption", "score": "clip_i"}


# What a recipe means
# ----------------------------------------------------------------------------------------------------------


def concept(name: str = "toy", **changes: object) -> ConceptSpec:
    return ConceptSpec(name, Path("photos"), "toy", **changes)


def test_lists_are_spread_out() -> None:
    setups = expand({"plain": {}, "seed": {"seed": [0, 1]}, "both": {"lr": [1, 2], "seed": [3, 4]}}, {})
    names = ["plain", "seed 0", "seed 1"]
    names += [f"both, lr {lr}, seed {seed}" for lr in (1, 2) for seed in (3, 4)]
    assert [setup.name for setup in setups] == names
    assert setups[-1].family == "both" and setups[-1].values == {"lr": 2, "seed": 4}


def test_progressive_is_a_list_by_itself() -> None:
    (one,) = expand({"p": {"progressive": [10, 20]}}, {})
    assert make_variant(one, concept()).settings.progressive == (10, 20)
    assert make_variant(one, concept()).num_vectors == 3
    (late,) = expand({"p": {"progressive": [10, 20], "steps": 15}}, {})
    with pytest.raises(InputError, match="'p' ends before step 20 of progressive; give more steps"):
        make_variant(late, concept())

    setups = expand({"p": {"progressive": [[10], [10, 20]]}}, {})
    assert [setup.name for setup in setups] == ["p, progressive 10", "p, progressive 10-20"]


def test_setups_go_before_the_base_and_the_concept_before_both_defaults() -> None:
    (setup,) = expand({"own": {"lr": 0.1}}, {"lr": 0.2, "batch_size": 2})
    word = make_variant(setup, concept(templates="style"))
    assert (word.lr, word.settings.batch_size, word.templates, word.init_word) == (0.1, 2, "style", "toy")
    assert word.settings.steps == 3000  # as `minti.train` has it


def test_every_setting_reaches_the_word() -> None:
    values = {
        **{
            "init": "random",
            "init_word": "cat",
            "num_vectors": 2,
            "templates": "style",
            "lr": 0.5,
            "seed": 7,
        },
        **{"crop": "random", "flip": False, "photos": 2, "steps": 9, "batch_size": 3, "accumulate": 2},
        **{
            "lr_schedule": "cosine",
            "warmup": 4,
            "optimizer": "direction",
            "kappa": 0.5,
            "weight_decay": 0.3,
            "progressive": [5],
        },
        **{"objective": "clip", "t_min": 5, "t_max": 900, "average": 2},
        **{"regularization": 0.7, "max_norm": 2.0, "per_image": 0.25, "caption_dropout": 0.1},
    }
    apart = {"context_weight": 0.3}  # which does not go together with progressive
    assert set(values | apart) == set(KEYS) - set(WAYS)
    (setup,) = expand({"apart": apart}, {})
    assert make_variant(setup, concept()).settings.context_weight == 0.3
    (setup,) = expand({"all": values}, {})
    word = make_variant(setup, concept())
    for key, value in values.items():
        value = tuple(value) if key == "progressive" else value
        assert getattr(word if hasattr(word, key) else word.settings, key) == value, key


def words(setups: Mapping[str, Mapping], names: Sequence[str] = ("toy",), **base: object) -> list:
    return [make_variant(setup, concept(name)) for name in names for setup in expand(setups, base)]


def test_words_of_the_same_settings_share_a_batch() -> None:
    """What `Word` holds may differ; what `Settings` hold may not."""
    setups = {
        "a": {},
        "b": {"lr": 1.0},
        "c": {"num_vectors": 2},
        "d": {"init_word": "cat"},
        "e": {"photos": 1},
    }
    groups = group_words(words(setups | {"f": {"per_image": 0.25}}, ("toy", "cup"), steps=5), together=100)
    assert sorted(len(group.words) for group in groups) == [2, 10]
    for group in groups:
        assert group.settings.per_image == (0.25 if len(group.words) == 2 else 0)
    limited = group_words(words(setups, ("toy", "cup"), steps=5), together=4)
    assert [len(group.words) for group in limited] == [4, 4, 2]


def test_equal_words_are_learned_once() -> None:
    (group,) = group_words(words({"a": {}, "seed": {"seed": [0, 1]}, "lr": {"lr": 5e-3}}), together=9)
    assert len(group.words) == 2


def test_numbers_of_steps_are_snapshots_of_one_word() -> None:
    (group,) = group_words(words({"steps": {"steps": [2, 8, 4]}}), together=9)
    assert group.settings.steps == 8 and list(group.words.values()) == [(2, 4, 8)]
    groups = group_words(words({"steps": {"steps": [2, 8]}}, lr_schedule="cosine"), together=9)
    assert [(group.settings.steps, *group.words.values()) for group in groups] == [(2, (2,)), (8, (8,))]


def test_keys_tell_words_apart() -> None:
    setups = {"a": {}, "b": {"seed": 1}, "c": {"photos": 2}, "d": {"regularization": 0.1}, "e": {"steps": 5}}
    found = [word.key for word in words(setups, ("toy", "cup"))]
    assert len(set(found)) == len(found) == 10


def test_concepts_are_chosen_by_set_or_name() -> None:
    entries = {
        "imp": {"init_word": "toy", "set": "development"},
        "robot": {"init_word": "toy", "set": "final"},
        "riso": {"init_word": "drawing", "set": "final", "kind": "style"},
    }
    found = read_concepts(entries)

    def choose(choice: str) -> list[str]:
        return [c.name for c in choose_concepts(found, choice, ["object"])]

    assert choose("final") == ["robot"] and choose("development") == ["imp"]
    assert choose("riso, robot") == ["riso", "robot"]
    with pytest.raises(InputError, match=r"choose a set \(development, final\) or among imp, robot, riso"):
        choose("dragon")
    with pytest.raises(InputError, match="of the sets development and final; study one at a time"):
        choose("imp, robot")


# The shipped recipes
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("concepts") / "concepts.yaml"
    path.write_text(yaml.safe_dump(concepts.describe(), sort_keys=False))
    return str(path)


def plan_of(recipe: str, described: str, *flags: str) -> StudyPlan:
    base = study.read_recipe(recipe) | {"concepts": described}
    return study.plan_of(study.options().parse([recipe, *flags], required=["checkpoint"], base=base))


@pytest.mark.parametrize("recipe", sorted({*study.shipped()} - {"applications"}))
def test_shipped_recipes_make_sense(recipe: str, described: str) -> None:
    full, quick = plan_of(recipe, described), plan_of(recipe, described, "--quick")
    assert {c.set for c in full.concepts} == {"final"} and len(full.concepts) == 3
    assert len(quick.concepts) == 1 and quick.protocol.num_images == 8 and quick.protocol.steps == 15
    assert quick.prompts["rocket"].prompts[0] == full.prompts["rocket"].prompts[0]
    longest = [max(a.variant.settings.steps for a in plan.requests if a.variant) for plan in (full, quick)]
    assert longest[1] == round(longest[0] * 0.4)
    development = plan_of(recipe, described, "--choose", "development")
    assert [c.name for c in development.concepts] == ["imp", "mushroom", "teapot"]
    texts = [{p.text for p in plan.prompts[plan.concepts[0].name].prompts} for plan in (full, development)]
    assert len(texts[0]) >= {"table1": 3, "rivals": 4}.get(recipe, 15)
    assert not texts[0] & texts[1], "defaults are not chosen by the final prompts"


def test_every_application_has_concepts(described: str) -> None:
    """A style and a set there is only among the concepts for development, which the report says."""
    plan = plan_of("applications", described)
    assert list(plan.applications) == list(APPLICATIONS)
    assert {c.kind for c in plan.concepts} == {"object", "style", "set"}
    assert {c.set for c in plan.concepts} == {"development"}


def test_the_rivals_are_those_of_the_paper(described: str) -> None:
    """Words are learned once for all guidance scales; so are tuned UNets."""
    plan = plan_of("rivals", described, "--choose", "robot")
    own = {request.name: request for request in plan.requests}
    for name in ("word", "short caption", "CLIP word", "pivotal", "DreamBooth"):
        assert [own[f"{name}, guidance {g}"].way.guidance for g in (2, 5, 10)] == [2, 5, 10]
    assert len({request.variant for request in own.values()} - {None}) == 2
    assert own["pivotal, guidance 2"].variant == own["word, guidance 10"].variant
    assert own["CLIP word, guidance 5"].variant.settings.objective == "clip"
    assert own["DreamBooth, guidance 5"].text == "sks machine"
    assert own["CLIP-guided from photo"].way == Way(text="init_word", clip_guidance=30, from_photo=True)
    assert len({request.key for request in own.values()}) == len(own)


def test_figure_10_has_every_setup_of_the_paper(described: str) -> None:
    plan = plan_of("figure10", described)
    own = {a.name: a.variant for a in plan.requests if a.concept.name == "robot"}
    assert {own[f"{n} vector{'s' * (n > 1)}"].num_vectors for n in (1, 2, 3)} == {1, 2, 3}
    settings = own["3 progressive"].settings
    assert settings.progressive == (settings.steps * 2 // 5, settings.steps * 4 // 5)
    assert own["per-image words"].settings.per_image == 0.25
    assert own["low lr"].lr < own["1 vector"].lr < own["high lr"].lr
    assert own["regularization 0.01"].settings.regularization == 0.01
    kinds = [a.name for a in plan.requests if a.concept.name == "robot" and not a.variant]
    assert kinds == ["short caption"] * 2 + ["long caption"] * 2 + ["prompt only"]


def test_sizes_of_the_set(described: str) -> None:
    plan = plan_of("set-size", described)
    assert [a.variant.photos for a in plan.requests if a.variant and a.concept.name == "robot"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_described_concepts_are_those_of_the_world(described: str) -> None:
    for name, found in read_concepts(described).items():
        if thing := concepts.held_out()[name].thing:
            expected = {"color": thing.color, "color2": thing.color2, "pattern": thing.pattern}
            assert found.facts == expected | {"noun": name}
        assert all(value in probe.READS[fact] for fact, value in found.facts.items())
        short, long = found.captions["short"], found.captions["long"]
        assert all(len(c.split()) <= 12 for c in short) and all(12 < len(c.split()) <= 30 for c in long)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"setups": {"a": {"learning_rate": 1}}}, "setups: 'a': unknown setting 'learning_rate'; there are"),
        ({"setups": {"a": {"lr": "fast"}}}, "setups: 'a': argument --lr: invalid float value: 'fast'"),
        ({"setups": {"a": {"steps": []}}}, "steps is an empty list"),
        ({"setups": {"a": {"photos": 0}}}, "photos 0 should be a count"),
        ({"setups": {"a": 3}}, "setups: 'a' should be settings"),
        ({"setups": ["a"]}, "setups: should have entries"),
        ({"setups": {"seed": {"seed": [1, 1]}}}, "two of them are called 'seed 1'"),
        ({"setups": {}, "captions": {}, "claims": None}, "there is nothing to study"),
        ({"setups": {"a": {"progressive": [3], "num_vectors": 5}}}, "'a' has 5 vectors, progressive"),
        ({"base": {"stepz": 3}}, "base: unknown setting 'stepz'"),
        ({"captions": {"long one": "epic"}}, "captions: toy has none of the kind 'epic'"),
        ({"concepts": None}, "concepts: must be given"),
        ({"concepts": {"toy": {"images": "x"}}}, "concepts: toy needs init_word"),
        ({"concepts": {"toy": TOY | {"init_word": None}}}, "concepts: toy needs init_word"),
        ({"concepts": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
        ({"prompts": "nothing-here"}, "prompts 'nothing-here': neither"),
        ({"prompts": {"other": "tiny"}}, "prompts: none for toy, which is in the set 'final'"),
        ({"prompts": ["no word in it"]}, "needs words, and exactly one"),
        ({"claims": [{"says": "x"}]}, "claims: each needs says, first"),
        ({"claims": [CLAIM | {"expect": "more"}]}, "should expect above, at least, at most"),
        ({"claims": [CLAIM | {"expect": "above", "first": "x"}]}, "claims: no setup is called 'x'"),
        ({"claims": [CLAIM | {"expect": "above", "first": 1}]}, "should be names of setups"),
        ({"captions": {"1 vector": "short"}}, "two of them are called '1 vector'"),
        ({"concepts": {"../../evil": TOY}}, "name '../../evil' should consist of letters"),
        ({"concepts": {"/absolute": TOY}}, "name '/absolute' should consist of letters"),
        ({"concepts": {"a/../../../evil": TOY}}, "name 'a/../../../evil' should consist"),
        ({"concepts": {"..": TOY}}, "name '..' should consist"),
        ({"concepts": {1: TOY}}, "concepts: 1 should be text; put it between quotes"),
        ({"concepts": ["toy"]}, "concepts: should have entries like"),
        ({"concepts": {"toy": TOY | {"init_word": ["a"]}}}, "init_word of toy: ['a'] should be text"),
        ({"concepts": {"toy": TOY | {"kind": 3}}}, "kind of toy: 3 should be text"),
        ({"concepts": {"toy": TOY | {"images": 3}}}, "images of toy: 3 should be text"),
        ({"concepts": {"toy": TOY | {"prompts": ["a {}"]}}}, "prompts of toy: ['a {}'] should be text"),
        ({"concepts": {"toy": TOY | {"captions": {"short": "red"}}}}, "'red' should be a list of texts"),
        (
            {"concepts": {"toy": TOY | {"captions": {"short": [1]}}}},
            "captions of toy: 1 should be text",
        ),
        ({"concepts": {"toy": TOY | {"facts": {"color": 1}}}}, "color of toy: 1 should be text"),
        ({"title": ["a"]}, "title: ['a'] should be text"),
        ({"about": 3}, "about: 3 should be text"),
        ({"kinds": "object"}, "kinds: 'object' should be a list of texts"),
        ({"prompts": [3]}, "prompts: 3 should be text"),
        ({"captions": {"caption": 3}}, "captions: caption: 3 should be text"),
        ({"setups": {1: {}}}, "setups: 1 should be text"),
        ({"base": [1]}, "base: should have entries"),
        ({"claims": {"says": 1}}, "claims: should be a list"),
        ({"claims": [CLAIM | {"expect": "above", "says": 1}]}, "claims: says: 1 should be text"),
        ({"claims": [CLAIM | {"expect": "above", "score": ["clip_i"]}]}, "of one of clip_i"),
        ({"claims": [CLAIM | {"expect": "above", "second": []}]}, "should be names of setups"),
        ({"setups": {"a": {"seed": SEEDS, "lr": SEEDS}}}, "'a' brings them to 1,000,000; 1,000 is the limit"),
        ({"setups": {"a": {}, "b": {"lr": SEEDS}}}, "'b' brings them to 1,001; 1,000 is the limit"),
        ({"repeats": 1000, "num_images": 1}, "words to learn and compare; 10,000 is the limit"),
        ({"num_images": 1_000_000_000}, "at most 10000"),
        ({"colour": "red"}, "unknown option 'colour'"),
        ({"num_images": "many"}, "num-images"),
    ],
)
def test_bad_recipes(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        study.main([write_recipe(tmp_path, tmp_path, **change), "--out", str(tmp_path / "out")])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# A study
# ----------------------------------------------------------------------------------------------------------


def write_recipe(root: Path, folder: Path, **changes: object) -> str:
    recipe = {
        "title": "A <small> study",
        "about": "Of nothing much.",
        "checkpoint": str(root / "model"),
        "concepts": {
            "toy": {
                **{"images": str(root / "toy"), "init_word": "toy", "set": "final"},
                **{"captions": {"short": ["red toy", "red dog"]}, "facts": {"color": "red"}},
            },
            "cat": {
                "images": str(root / "cat"),
                "init_word": "cat",
                "set": "final",
                "captions": {"short": ["cat"]},
            },
        },
        "prompts": ["red {} on the grass", "{} on the grass", "the dog and {}"],
        "base": {"steps": 4, "batch_size": 2},
        "setups": {
            "1 vector": {},
            "steps": {"steps": [2, 4]},
            "late": {"progressive": [2], "steps": [2, 4]},
            "per image": {"per_image": 0.5, "photos": 2},
        },
        "captions": {"caption": "short"},
        "claims": [CLAIM | {"expect": "above"}],
        **{"num_images": 2, "sample_steps": 2, "device": "cpu"},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def small_probe() -> Iterator[None]:
    """The pictures of the small model are too small for the probe; one that fits knows as little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "SIZE", 16)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_probe: None, small_checkpoint: Path) -> Path:
    """A checkpoint with CLIP and probe, and photos of two concepts."""
    base = tmp_path_factory.mktemp("study")
    shutil.copytree(small_checkpoint, base / "model")
    (base / "model" / "probe").mkdir()
    torch.manual_seed(0)
    save_file(Probe(FACTS).half().state_dict(), base / "model" / "probe" / "model.safetensors")
    config = {"facts": FACTS, "phrases": PHRASES, "accuracy": {"color": 0.97}}
    (base / "model" / "probe" / "config.json").write_text(json.dumps(config))
    for k, name in enumerate(("toy", "cat")):
        (base / name).mkdir()
        for i in range(3):
            pixels = np.random.default_rng((k, i)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / name / f"{i}.png")
    return base


@pytest.fixture(scope="module")
def done(base: Path) -> Path:
    """A complete study."""
    study.main([write_recipe(base, base), "--out", str(base / "out")])
    return base / "out"


def result(out: Path) -> dict:
    return json.loads((out / "study.json").read_text(encoding="utf-8"))


NAMES = [
    "1 vector",
    "steps 2",
    "steps 4",
    "late, steps 2",
    "late, steps 4",
    "per image",
    "caption",
    "prompt only",
]


def test_study_json_is_complete(done: Path) -> None:
    found = result(done)
    assert [m["name"] for m in found["means"]] == [*NAMES, "image only"]
    toy = [*NAMES[:6], "caption", *NAMES[6:], "image only"]  # it has two captions
    assert [o["name"] for o in found["outcomes"]] == [*toy, *NAMES, "image only"]
    word = found["outcomes"][0]
    assert word["truth"].keys() == {"kept", "kept_edited", "followed", "color"} and word["length"] > 0
    assert [p["prompt"] for p in word["prompts"]] == ["a photo of {}", *read_prompts(done)]
    judged = [o["truth"]["color"] for o in found["outcomes"] if o["name"] == "1 vector" and o["truth"]]
    assert found["means"][0]["truth"]["color"] == pytest.approx(sum(judged) / len(judged), abs=2e-6)
    for mean in found["means"]:
        same = [o for o in found["outcomes"] if o["name"] == mean["name"]]
        for score in ("clip_i", "clip_t", "clip_t_pairwise"):
            assert mean[score] == pytest.approx(sum(o[score] for o in same) / len(same), abs=2e-6)
    assert found["claims"][0]["verdict"] in ("holds", "does not hold", "too close to tell")
    assert found["sets"] == {"toy": "final", "cat": "final"} and found["settings"]["quick"] is False


def read_prompts(done: Path) -> list[str]:
    return yaml.safe_load((done / "config.yaml").read_text())["prompts"]


def test_one_word_under_two_names_scores_the_same(done: Path) -> None:
    scores = {o["name"]: o["clip_i"] for o in result(done)["outcomes"] if o["concept"] == "toy"}
    assert scores["1 vector"] == scores["steps 4"] != scores["steps 2"]


def test_report_is_self_contained_and_complete(done: Path) -> None:
    html = (done / "report.html").read_text(encoding="utf-8")
    links = re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", html)
    assert "http:" not in links and "https:" not in links and "<script" not in html and "<link" not in html
    assert "default-src 'none'" in html
    sources = re.findall(r'<img[^>]* src="([^"]{0,22})', html)
    assert len(sources) == 2 + len(NAMES) * 2 + 1  # photos, and a row for every way of asking
    assert all(source.startswith("data:image/") for source in sources)
    for text in (
        *NAMES,
        "image only",
        "toy",
        "cat",
        "of the final set",
        "color 97 %",
        "A &lt;small&gt; study",
        "One is better.",
    ):
        assert text in html, text
    assert html.count("<svg") == 3  # all, and each concept


def test_words_are_those_learned_alone(done: Path, base: Path, tmp_path: Path) -> None:
    """Neither batch nor snapshot shows, to rounding."""
    setups = {"steps": {"steps": 2}}
    study.main(
        [
            write_recipe(base, tmp_path, setups=setups, claims=[]),
            "--choose",
            "cat",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    (alone,) = (tmp_path / "out" / "words").glob("*/step-000002.safetensors")
    together = [Concept.load(path) for path in (done / "words").glob("cat-*/step-000002.safetensors")]
    vectors = next(c.vectors for c in together if c.metadata["init_word"] == "cat" and len(c.vectors) == 1)
    torch.testing.assert_close(Concept.load(alone).vectors, vectors, rtol=1e-4, atol=1e-6)


def test_progressive_words_have_the_vectors_in_play(done: Path) -> None:
    counts = [len(Concept.load(path).vectors) for path in (done / "words").glob("toy-*/step-000004*")]
    assert sorted(counts) == [1, 1, 2]  # one vector, per image; progressive


def snapshot(out: Path) -> dict[str, int]:
    files = [path for name in ("words", "pictures") for path in (out / name).rglob("*.safetensors")]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_finished_work_is_not_done_again(done: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, content, config = snapshot(done), result(done), (done / "config.yaml").read_text()
    gone = [next(path for path in before if f"/{kind}/" in path) for kind in ("words", "pictures")]
    old = load_file(gone[0])
    for path in gone:
        Path(path).unlink()
    study.main([write_recipe(base, base), "--out", str(done)])
    after = snapshot(done)
    assert {path for path in after if after[path] != before[path]} == set(gone)
    assert result(done) == content and (done / "config.yaml").read_text() == config
    for key, value in load_file(gone[0]).items():
        torch.testing.assert_close(value, old[key], rtol=0, atol=0)


def test_an_interrupted_study_goes_on(
    base: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a batch, then of the pictures, it ends as if it had not been."""
    monkeypatch.setattr(learner, "SAVE_EVERY", 2)
    step, save, steps, saved = Inversion.step, PictureStore.save, [], []

    def interrupted_step(self: Inversion, **options: object) -> torch.Tensor:
        steps.append(self.step_count)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, **options)

    def interrupted_save(*args: object) -> None:
        saved.append(args)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(*args)

    argv = [write_recipe(base, base), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(Inversion, "step", interrupted_step)
    monkeypatch.setattr(PictureStore, "save", interrupted_save)
    with pytest.raises(KeyboardInterrupt):
        study.main(argv)
    assert steps == [0, 1, 2, 3] and list((tmp_path / "out" / "learning").iterdir())
    with pytest.raises(KeyboardInterrupt):
        study.main(argv)
    assert steps[4] == 2 and len(saved) == 3  # from the last saving; then into the pictures
    study.main(argv)
    assert not (tmp_path / "out" / "learning").exists()
    assert result(tmp_path / "out")["outcomes"] == result(done)["outcomes"]


@pytest.mark.slow
def test_two_processes_share_the_work(base: Path, done: Path, tmp_path: Path) -> None:
    """Both learn and make pictures, and what comes out is what one process finds."""
    recipe = write_recipe(base, base)
    code = "from minti.cli.command import run_command; from minti.study.classifier import Probe; "
    code += "Probe.SIZE = 16; from minti.study.__main__ import main; run_command('minti.study', main)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, recipe, "--out", str(tmp_path / "out")],
            env=env() | address | {"WORLD_SIZE": "2", "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert len(re.findall(r"(\d+)/\1 (?:sampling )?steps", said)) == 2, said
    names = {str(Path(path).relative_to(done)) for path in snapshot(done)}
    assert {str(Path(path).relative_to(tmp_path / "out")) for path in snapshot(tmp_path / "out")} == names
    for one, two in zip(result(done)["outcomes"], result(tmp_path / "out")["outcomes"], strict=True):
        assert one["name"] == two["name"]
        assert one["clip_t"] == pytest.approx(two["clip_t"], abs=1e-3)  # threads may round differently


def test_repeated_words(base: Path, tmp_path: Path) -> None:
    """More of the same are learned, with other seeds; those that are there stay."""
    out = tmp_path / "out"
    argv = [write_recipe(base, tmp_path, setups={"1 vector": {}}, captions={}, claims=[]), "--out", str(out)]
    study.main(argv)
    before = snapshot(out)
    study.main([*argv, "--repeats", "2"])
    assert snapshot(out).items() > before.items()
    assert len(list((out / "words").iterdir())) == 2 * 2
    found = result(out)
    assert found["settings"]["repeats"] == 2
    words = [o for o in found["outcomes"] if o["name"] == "1 vector"]
    assert [(o["concept"], o["note"]) for o in words] == [
        (concept, note) for concept in ("toy", "cat") for note in ("seed 0", "seed 1000")
    ]
    mean = found["means"][0]
    assert mean["note"] == "2 concepts, 4 words"
    assert mean["clip_t"] == pytest.approx(sum(o["clip_t"] for o in words) / 4, abs=2e-6)
    assert "1 vector<br><small>seed 1000</small>" in (out / "report.html").read_text()


def test_another_study_is_refused(base: Path, done: Path, tmp_path: Path) -> None:
    changed = write_recipe(base, tmp_path, setups={"1 vector": {"lr": 0.1}}, claims=[])
    with pytest.raises(InputError, match=r"setups: 1 vector: lr was None, now it is 0.1"):
        study.main([changed, "--out", str(done)])
    with pytest.raises(InputError, match="num_images was 2, now it is 4"):
        study.main([write_recipe(base, tmp_path), "--out", str(done), "--num-images", "4"])
    picture, old = base / "cat" / "0.png", (base / "cat" / "0.png").read_bytes()
    Image.new("RGB", (16, 16)).save(picture)
    try:
        with pytest.raises(
            InputError, match="photos of cat: has changed since this was begun; leave that as it was"
        ):
            study.main([write_recipe(base, base), "--out", str(done)])
    finally:
        picture.write_bytes(old)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear diary")
    with pytest.raises(InputError, match=r"holds something that minti\.study did not make"):
        study.main([changed, "--out", str(tmp_path / "mine"), "--overwrite"])


def test_a_word_that_diverges_stops_no_other(base: Path, tmp_path: Path) -> None:
    """Weight decay by a rate of 1e30 makes numbers infinite within two steps."""
    recipe = write_recipe(base, tmp_path, setups={"good": {}, "bad": {"lr": 1e30}}, claims=[])
    study.main([recipe, "--out", str(tmp_path / "out"), "--choose", "cat"])
    notes = {o["name"]: o["note"] for o in result(tmp_path / "out")["outcomes"]}
    assert notes["good"] == "" and re.fullmatch(r"diverged after step [0-3]", notes["bad"])
    assert "diverged after step" in (tmp_path / "out" / "report.html").read_text()


def test_quick_is_less(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(base, tmp_path, base={"steps": 5, "batch_size": 2}, setups={"1 vector": {}})
    study.main([recipe, "--quick", "--out", str(tmp_path / "out")])
    found = result(tmp_path / "out")
    assert found["sets"] == {"toy": "final"}
    assert [o["name"] for o in found["outcomes"]] == ["1 vector", "caption", "prompt only", "image only"]
    assert [p.name for p in (tmp_path / "out" / "words").rglob("*.safetensors")] == [
        "step-000002.safetensors"
    ]
    assert len(found["outcomes"][0]["prompts"]) == 1 + 2  # all three are of one group
    assert "quick look" in (tmp_path / "out" / "report.html").read_text()


def test_command_line(base: Path, tmp_path: Path) -> None:
    """One line and exit code 2."""
    recipe = write_recipe(base, tmp_path, setups={"a": {"photo": 9}}, claims=[])
    command = [sys.executable, "-m", "minti.study", recipe]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env())
    assert done.stdout == "" and done.returncode == 2
    assert re.fullmatch(
        r"minti\.study: error: setups: 'a': unknown setting 'photo'; there are .*\n", done.stderr
    )


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"shape": "round"}, "toy has shape: 'round'; the probe knows color, background"),
        ({"color": "Red"}, "toy has color: 'Red'; the probe knows red, green"),
    ],
)
def test_facts_that_nobody_reads_are_named(facts: dict, message: str, base: Path, tmp_path: Path) -> None:
    entry = {"images": str(base / "toy"), "init_word": "toy", "set": "final", "facts": facts}
    recipe = write_recipe(base, tmp_path, concepts={"toy": entry}, captions={}, claims=[])
    with pytest.raises(InputError, match=re.escape(message)):
        study.main([recipe, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_too_few_photos_are_named(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(base, tmp_path, setups={"a": {"photos": 9}}, claims=[])
    with pytest.raises(InputError, match="toy: has 3 photos, the study asks for 9"):
        study.main([recipe, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def env() -> dict[str, str]:
    from .processes import ENVIRONMENT

    return ENVIRONMENT


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(InputError, match="recipe 'figure11': neither a file, nor one of ablations"):
        study.main(["figure11"])
    with pytest.raises(InputError, match="a recipe must be given"):
        study.main([])


# Truth
# ----------------------------------------------------------------------------------------------------------


class Oracle(Probe):
    """Reads what the first pixel says: 0 red on grass, 85 red on snow, 170 green on grass."""

    def read(self, pixels: torch.Tensor, batch: int = 100) -> list[dict[str, str]]:
        values = [("red", "grass"), ("red", "snow"), ("green", "grass")]
        codes = [round((p[0, 0, 0].item() + 1) * 1.5) for p in pixels]
        return [dict(zip(("color", "background"), values[code], strict=True)) for code in codes]


def shown(*codes: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (85 * code,) * 3) for code in codes]


def test_truth_by_hand() -> None:
    judge = Judge(Oracle(FACTS), PHRASES)
    pictures = {
        "a photo of {}": shown(0, 1, 2, 2),  # half of them red
        "{} on the grass": shown(0, 1, 1, 1),  # all red, a quarter on grass
        "a red {}": shown(0, 0, 2, 2),  # half do as told; says nothing about the concept's own colour
        "{} and a cup": shown(2, 2, 2, 2),  # not for the probe
    }
    readings = {template: judge.readings(judge.measure(images)) for template, images in pictures.items()}
    assert readings == {template: judge.read(images) for template, images in pictures.items()}
    truth = judge.truth(readings, {"color": "red"}, "a photo of {}")
    red = {"color": Score((0.5 + 1.0) / 2)}  # whatever was not asked to be red
    expected = Truth(Score(0.5), Score(1.0), Score((0.25 + 0.5) / 2), ("{} on the grass", "a red {}"), red)
    assert truth == expected and truth.kept.margin > 0.2 and truth.kept_edited.margin is None
    large = judge.measure([Image.new("RGB", (8, 8))])
    assert large == {} and judge.truth({"a photo of {}": judge.readings(large)}, {"color": "red"}, "") is None


def test_the_probe_reads_pictures_and_not_thumbnails(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures larger than a thumbnail are read as they were made, and the readings are kept."""
    judge, size = Judge(Oracle(FACTS), PHRASES), 4 * THUMBNAIL
    monkeypatch.setattr(Probe, "SIZE", size)
    store, job = PictureStore(base / "store"), PictureJob("x", {}, lambda _: [Image.new("RGB", (size, size))])
    assert job.measure(judge.measure, store)["facts"].tolist() == [[0, 0]]
    assert store.thumbnails(job.name)[0].size == (THUMBNAIL, THUMBNAIL)
    never = PictureJob("x", {}, lambda _: pytest.fail("is made again"))
    assert judge.readings(never.measure(judge.measure, store)) == [{"color": "red", "background": "grass"}]


def test_what_prompts_ask_for() -> None:
    judge = Judge(Probe(FACTS), captions.phrases())
    assert judge.asked("an oil painting of {}") == {"style": "painting"}
    assert judge.asked("a photo of a red {} in the snow") == {
        "style": "photo",
        "color": "red",
        "background": "snow",
    }
    assert judge.asked("a photo of {} against a yellow wall") == {"style": "photo", "background": "yellow"}
    assert judge.asked("a photo of {} and a red ball") is None
    assert judge.asked("a photograph of {} in a snowy place") == {}


def test_phrases_say_what_captions_mean() -> None:
    """Against the grammar of the world: what a phrase is said to settle is what the caption settles."""
    judge, checked = Judge(Probe(FACTS), captions.phrases()), 0
    from tools.make_tiny.world import scene

    for i in range(300):
        caption = captions.caption(scene(0, i), np.random.default_rng(i))
        for fact, value in (judge.asked(caption.text) or {}).items():
            assert caption.facts[fact] == value, caption.text
            checked += 1
    assert checked > 200


def test_a_probe_is_kept_in_half_precision(base: Path) -> None:
    torch.manual_seed(0)
    expected, judge = Probe(FACTS), Judge.load(base / "model")
    for name, value in judge.probe.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name].half().float(), rtol=0, atol=0)
    assert Judge.load(base) is None


def test_a_damaged_probe_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    for name, content in (("config.json", {"facts": {"color": ["red"]}, "phrases": {}}),):
        (tmp_path / "probe" / name).write_text(json.dumps(content))
    weights = base / "model" / "probe" / "model.safetensors"
    (tmp_path / "probe" / "model.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(InputError, match="probe: does not fit together"):
        Judge.load(tmp_path)
    config = json.loads((base / "model" / "probe" / "config.json").read_text())
    for damage, said in (
        ({"facts": "color"}, "probe: does not fit together"),
        ({"phrases": {"red": "color"}}, "probe: does not fit together"),
        ({"phrases": ["red"]}, "probe: does not fit together"),
        ({"accuracy": {"color": "high"}}, "accuracy of color = 'high': should be a number from 0 to 1"),
    ):
        (tmp_path / "probe" / "config.json").write_text(json.dumps(config | damage))
        with pytest.raises(InputError, match=said):
            Judge.load(tmp_path)


def test_a_word_that_lost_its_step_is_named(base: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    for path in (out / "words").rglob("*.safetensors"):
        save_file(load_file(path), path)  # without metadata
    with pytest.raises(InputError, match=r"safetensors: .*remove it, to learn the word again"):
        study.main([write_recipe(base, base), "--out", str(out)])


# Sums
# ----------------------------------------------------------------------------------------------------------


def drawn(value: float, seed: str) -> Score:
    """With a margin of 0.01, and noise of its own."""
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(sum(seed.encode())))
    return Score(value, value + 0.01 / 1.96 * noise / noise.std(), 10_000)


def outcome(name: str, i: float, t: float, kept: float, concept: str = "toy", kind: str = "word") -> Outcome:
    scores = [drawn(v, f"{key}{name}{concept}") for key, v in (("i", i), ("t", t), ("p", t))]
    evaluation = Evaluation(name, kind, *scores, tradeoff=drawn(i * t, name))
    return Outcome(concept, name, evaluation, Truth(drawn(kept, f"k{name}{concept}"), None, Score(kept)))


def test_means_by_hand() -> None:
    rows = means(
        [outcome("a", 0.4, 0.2, 0.5), outcome("a", 0.6, 0.4, 1.0, "cat"), outcome("b", 0.1, 0.1, 0.0)]
    )
    assert [row.name for row in rows] == ["a", "b"] and rows[0].note == "2 concepts" and rows[0].repeats == 1
    assert rows[0].score("clip_i").value == pytest.approx(0.5) and rows[0].score("kept").value == 0.75
    assert rows[0].score("clip_i").margin == pytest.approx(0.01 / 2**0.5, rel=0.1)  # of independent noise
    assert rows[0].score("kept_edited") is None and rows[0].score("followed").interval is None
    (row,) = means([outcome("a", 0.4, 0.2, 0.5), replace(outcome("a", 0.4, 0.2, 0.5, "cat"), diverged=True)])
    assert row.note == "2 concepts, 1 diverged"


def test_repeated_words_count_in_the_interval() -> None:
    """Two words of each of two concepts, 0.1 and 0.2 apart: t of about 1.5 degrees of freedom, by hand."""
    values = {"toy": (0.45, 0.55), "cat": (0.4, 0.6)}
    same = [outcome("a", v, 0.2, 0.5, name) for name, two in values.items() for v in two]
    (row,) = means(same)
    assert row.note == "2 concepts, 4 words" and row.repeats == 2
    variances = [(b - a) ** 2 / 4 for a, b in values.values()]  # of the mean of each concept's words
    dof = sum(variances) ** 2 / sum(v**2 for v in variances)
    assert row.score("clip_i").dof == pytest.approx(dof, rel=0.05)
    expected = student_t(dof) * sum(variances) ** 0.5 / 2
    assert row.score("clip_i").margin == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "expect, first, verdict",
    [
        ("above", "high", "holds"),
        ("above", "low", "does not hold"),
        ("above", "same", "too close to tell"),
        ("at least", "high", "holds"),
        ("at least", "near", "does not hold"),  # no allowance
        ("at least", "same", "too close to tell"),
        ("at most", "low", "holds"),
        ("at most", "high", "does not hold"),
        ("at most", ["low", "high"], "too close to tell"),
    ],
)
def test_verdicts(expect: str, first: str | list[str], verdict: str) -> None:
    """Every score has a margin of 0.01, so that differences up to 0.014 are too close to tell."""
    values = {"middle": 0.6, "same": 0.605, "near": 0.58, "low": 0.5, "high": 0.7}
    rows = [outcome(name, value, 0.2, 0) for name, value in values.items()]
    claim = {"says": "It is.", "first": first, "second": "middle", "score": "clip_i", "expect": expect}
    (found,) = judge_claims([claim], rows)
    assert found["verdict"] == verdict and found["for"] == "other pictures of the same words"
    assert found["margin"] == pytest.approx(0.01 * (1.5 if isinstance(first, list) else 2) ** 0.5, rel=0.1)
    numbers = claim_numbers(found, "CLIP-I")
    assert f"{expect} middle 0.600; difference " in numbers and f"± {found['margin']:.3f}" in numbers


def test_claims_say_what_their_interval_is_for() -> None:
    one, two, text = outcome("a", 0.5, 0, 0), outcome("b", 0.7, 0, 0), outcome("c", 0.6, 0, 0, kind="caption")
    claim = {"says": "", "first": "b", "second": "a", "score": "clip_i", "expect": "above"}
    for repeats, scope in ((1, "other pictures of the same words"), (2, "words learned anew")):
        rows = [replace(one, repeats=2), replace(two, repeats=repeats), text]
        assert judge_claims([claim], rows)[0]["for"] == scope
        assert judge_claims([claim | {"second": "c"}], rows)[0]["for"] == scope


def test_without_a_margin_nothing_is_told() -> None:
    rows = [outcome(name, 0.5, 0.2, kept) for name, kept in (("a", 0.2), ("b", 0.9))]
    claim = {"says": "", "first": "b", "second": "a", "score": "followed", "expect": "above"}
    (found,) = judge_claims([claim], rows)
    assert found["verdict"] == "cannot be told" and found["margin"] is None


def test_rank_correlation_is_spearmans() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)), for ranks without ties; concepts are ranked apart."""
    ranks, n = np.random.default_rng(0).permutation(9), 9
    toy = [outcome(str(k), k / 10, 0, rank / 10) for k, rank in enumerate(ranks)]
    expected = 1 - 6 * ((np.arange(n) - ranks) ** 2).sum() / (n * (n**2 - 1))
    assert rank_correlation(toy, "clip_i", "kept") == pytest.approx(expected)
    cat = [outcome(str(k), k / 100, 0, k / 10, "cat") for k in range(n)]  # in perfect order
    assert rank_correlation(toy + cat, "clip_i", "kept") == pytest.approx((expected + 1) / 2)
    tied = [outcome("a", 0.1, 0, 0.1), outcome("b", 0.1, 0, 0.1), outcome("c", 0.2, 0, 0.2)]
    assert rank_correlation(tied, "clip_i", "kept") == pytest.approx(1)
    assert rank_correlation(tied[:2], "clip_i", "kept") is None


def test_clip_misleads_where_it_prefers_what_is_wrong() -> None:
    good, bad = outcome("good", 0.70, 0.2, 0.9), outcome("bad", 0.80, 0.2, 0.3)
    close, elsewhere = outcome("close", 0.702, 0.2, 0.1), outcome("other", 0.9, 0.2, 0.0, "cat")
    assert disagreements([good, bad, close, elsewhere], "clip_i", "kept") == [(bad, good)]


def test_settings_of_a_group_are_those_asked_for() -> None:
    (group,) = group_words(words({"a": {"regularization": 0.5, "steps": 7}}), together=1)
    assert group.settings == Settings(steps=7, regularization=0.5)


# Rivals
# ----------------------------------------------------------------------------------------------------------


def test_rivals_make_pictures_of_their_own(base: Path, tmp_path: Path) -> None:
    """Each way gives other pictures; the model is what it was; nothing is done twice."""
    setups = {
        "word": {"guidance": [2, 5]},
        "clip word": {"objective": "clip"},
        "pivotal": {"tune": "pivotal", "tune_steps": 3, "tune_lr": 1e-2, "guidance": [2, 5]},
        "dreambooth": {"tune": "dreambooth", "tune_steps": 2, "tune_lr": 1e-2, "class_images": 2},
        "caption": {"text": "short", "guidance": 2},
        "guided": {"text": "init_word", "clip_guidance": 20.0},
        "guided from photo": {"text": "init_word", "clip_guidance": 20.0, "from_photo": True},
        "plain": {"text": "init_word"},
    }
    prompts = ["red {} on the grass"]
    recipe = write_recipe(base, tmp_path, setups=setups, captions={}, claims=[], prompts=prompts)
    argv = [recipe, "--out", str(tmp_path / "out"), "--choose", "toy", "--guidance-scale", "5"]
    study.main(argv)
    made = sorted((tmp_path / "out" / "pictures").rglob("*.png"))
    assert len(made) == 2 * (10 + 1)
    assert len({path.read_bytes() for path in made}) == len(made)
    assert len(list((tmp_path / "out" / "tuned").iterdir())) == 2
    assert len(list((tmp_path / "out" / "words").iterdir())) == 2
    names = {row["name"] for row in result(tmp_path / "out")["means"]}
    assert {"word, guidance 2", "pivotal, guidance 5", "dreambooth", "guided from photo"} <= names
    before = snapshot(tmp_path / "out")
    study.main(argv)
    again = {key: when for key, when in snapshot(tmp_path / "out").items() if "report" not in key}
    assert all(before[key] == when for key, when in again.items() if "study.json" not in key)


def test_pivotal_tuning_in_a_study_is_that_of_minti_tune(base: Path, tmp_path: Path) -> None:
    """The same weights, from the same word and photos; and sampling leaves the model as it was."""
    setups = {"pivotal": {"tune": "pivotal", "tune_steps": 3, "tune_lr": 1e-2}}
    recipe = write_recipe(base, tmp_path, setups=setups, captions={}, claims=[], prompts=["red {}"])
    study.main([recipe, "--out", str(tmp_path / "out"), "--choose", "toy"])
    (word,) = (tmp_path / "out" / "words").rglob("*.safetensors")
    argv = ["--checkpoint", base / "model", "--images", base / "toy", "--concept", word, "--steps", 3]
    argv += ["--lr", 1e-2, "--sample-every", 0, "--device", "cpu", "--out", tmp_path / "tuned"]
    tune.main([*map(str, argv)])
    (ours,) = (tmp_path / "out" / "tuned").iterdir()
    ours, theirs = load_file(ours), load_file(tmp_path / "tuned" / "unet.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_damaged_tuned_weights_are_named(base: Path, tmp_path: Path) -> None:
    setups = {"pivotal": {"tune": "pivotal", "tune_steps": 1}}
    recipe = write_recipe(base, tmp_path, setups=setups, captions={}, claims=[], prompts=["red {}"])
    argv = [recipe, "--out", str(tmp_path / "out"), "--choose", "toy"]
    study.main(argv)
    (path,) = (tmp_path / "out" / "tuned").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    shutil.rmtree(tmp_path / "out" / "pictures")
    with pytest.raises(InputError, match=r"is damaged .* remove it to start again"):
        study.main(argv)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"tune": "everything"}, "choose from pivotal, dreambooth"),
        ({"tune": "pivotal", "text": "short"}, "goes neither with text"),
        ({"text": "rhyme"}, "toy has none of the kind 'rhyme'"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": [2, "much"]}, "guidance"),
        ({"from_photo": 3}, "should be true or false"),
        ({"show_photos": 1}, "should be true or false"),
        ({"show_photos": True}, "'rival': show_photos: the model is no unCLIP"),
    ],
)
def test_impossible_rivals_are_named(setup: dict, message: str, base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(base, tmp_path, setups={"rival": setup}, claims=[])
    with pytest.raises(InputError, match=message) as refused:
        study.main([recipe, "--out", str(tmp_path / "out")])
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
