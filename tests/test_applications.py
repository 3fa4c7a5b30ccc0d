"""The applications of a study: what is made is what is said, and what is counted is right, by hand."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import minti
from minti import InputError
from minti.judge.picture_jobs import PictureStore, Protocol
from minti.judge.prompts import Prompt, PromptList
from minti.study import __main__ as study
from minti.study.applications import APPLICATIONS, Applications, right
from minti.study.classifier import Judge, Probe
from minti.study.concepts import ConceptSpec

from .oracles import add_image_encoder, save_folder

FACTS = {"noun": ["cat", "dog", "toy"], "color": ["red", "green", "blue"]}
FACTS |= {"background": ["grass", "snow"], "style": ["photo", "riso"]}
PHRASES = {"on the grass": {"background": "grass"}, "in the snow": {"background": "snow"}}


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "SIZE", 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("applications")
    save_folder(base / "model", "small")
    add_image_encoder(base / "model")
    for k, name in enumerate(("cat", "dog", "ink", "toys")):
        (base / name).mkdir()
        for i in range(2):
            pixels = np.random.default_rng((k, i)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / name / f"{i}.png")
    return base


def add_probe(folder: Path) -> None:
    (folder / "probe").mkdir(exist_ok=True)
    torch.manual_seed(0)
    save_file(Probe(FACTS).state_dict(), folder / "probe" / "model.safetensors")
    (folder / "probe" / "config.json").write_text(json.dumps({"facts": FACTS, "phrases": PHRASES}))


def read_colours(images: Sequence[Image.Image]) -> list[dict[str, str]]:
    """A judge who goes by the mean colour: red is a cat, green a dog, blue a toy."""
    found = []
    for image in images:
        i = int(np.asarray(image).mean((0, 1)).argmax())
        facts = {"noun": FACTS["noun"][i], "color": FACTS["color"][i]}
        found.append(facts | {"background": "grass", "style": "riso" if i else "photo"})
    return found


def picture(left: int, right: int) -> Image.Image:
    """One half full of one colour, by its channel, the other of another."""
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8, left] = pixels[:, 8:, right] = 255
    return Image.fromarray(pixels)


@pytest.fixture
def applications(base: Path, monkeypatch: pytest.MonkeyPatch) -> Applications:
    judge = Judge(Probe(FACTS).eval(), PHRASES)
    monkeypatch.setattr(judge, "read", read_colours)
    cat = ConceptSpec("cat", base / "cat", "cat", captions={"short": ["red cat"]}, facts={"noun": "cat"})
    dog = ConceptSpec("dog", base / "dog", "dog", facts={"noun": "dog", "color": "green"})
    ink = ConceptSpec("ink", base / "ink", "the cat", kind="style", facts={"style": "riso"})
    toys = ConceptSpec("toys", base / "toys", "toy", kind="set")
    lists = PromptList([Prompt("the cat on the grass in the {}"), Prompt("a cat and a dog in the {}")])
    words = {cat: "cat", dog: "dog", ink: "red", toys: "toy"}
    sd = minti.load(base / "model", device="cpu")
    return Applications(sd, judge, words, {"ink": lists}, Protocol(num_images=3, steps=2), {})


def findings(applications: Applications, name: str, folder: Path) -> list[dict]:
    store = PictureStore(folder)
    return [finding for trial in applications.trials([name]) for finding in trial.findings(store)]


def shares(found: list[dict]) -> list[tuple[str, str, float]]:
    return [(f["about"], f["what"], pytest.approx(f["share"], abs=1e-6)) for f in found]


def test_both_things_are_there_in_either_order(
    applications: Applications, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}

    def sample(self: Applications, prompts: Sequence[str], on_step: object) -> list[Image.Image]:
        made[tuple(prompts)] = None
        return [picture(0, 1), picture(1, 0), picture(0, 0), picture(2, 2)]

    monkeypatch.setattr(Applications, "_sample", sample)
    found = findings(applications, "composition", tmp_path)
    assert list(made) == [("a photo of cat and dog",), ("a photo of red cat and dog",)]
    assert shares(found)[:2] == [
        ("cat and dog, the words", "both shapes", 0.5),
        ("cat and dog, the words", "one of them at least", 0.75),
    ]


def test_bias_and_style(applications: Applications, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(0, 0), picture(2, 2), picture(2, 2), picture(1, 1)]
    monkeypatch.setattr(Applications, "_sample", lambda self, prompts, on_step: images)
    found = findings(applications, "bias", tmp_path)
    assert [(f["what"], f["share"]) for f in found[:2]] == [("not blue", 0.5), ("a toy", 0.5)]
    found = findings(applications, "style", tmp_path)
    assert [(f["what"], f["share"]) for f in found[:2]] == [
        ("the style", 0.75),
        ("what else the prompt asks for", 1.0),
    ]
    assert [f["about"] for f in found[::2]] == ["ink, the word", "ink, its init word"]


def test_outside_the_mask_the_photo_stays(applications: Applications, base: Path, tmp_path: Path) -> None:
    """And inside it does not; if a pixel outside is changed, that is counted."""
    found = findings(applications, "blending", tmp_path)
    same = [f for f in found if f["what"].startswith("outside the mask")]
    assert [f["share"] for f in same] == [1.0, 1.0] and [f["count"] for f in same] == [3, 3]
    trial = applications.trials(["blending"])[0]
    photo = Image.open(base / "dog" / "0.png").convert("RGB")
    images = trial.job.make(lambda: None)
    differ = (np.asarray(images[0]) != np.asarray(photo)).any(-1)
    assert differ[4:12, 4:12].mean() > 0.9 and not differ[:2].any() and not differ[:, :2].any()
    images[1].putpixel((0, 15), tuple(255 - value for value in images[1].getpixel((0, 15))))
    assert trial.read(trial.measure(images))["outside the mask every pixel that of the photo"].tolist() == [
        1,
        0,
        1,
    ]


def test_inversion_goes_through_every_photo(applications: Applications, tmp_path: Path) -> None:
    found = findings(applications, "inversion", tmp_path)
    assert {f["count"] for f in found} == {2}  # there are two photos, and three pictures were asked for
    abouts = list(dict.fromkeys(f["about"] for f in found))
    assert abouts[:2] == ["cat, in the snow, guidance 2", "cat, in the snow, guidance 5"]
    trials = applications.trials(["inversion"])
    low, high = ([np.asarray(i) for i in t.job.make(lambda: None)] for t in trials[:2])
    assert any((a != b).any() for a, b in zip(low, high, strict=True))


def test_shares_of_facts() -> None:
    readings = [{"noun": "cat", "color": "red"}, {"noun": "dog", "color": "red"}]
    assert right(readings, {"noun": "cat", "color": "red"}).tolist() == [1.0, 0.5]


def recipe(base: Path, folder: Path, **changes: object) -> str:
    kinds = {"ink": "style", "toys": "set"}
    own = {"cat": {"noun": "cat"}, "dog": {"noun": "dog"}, "ink": {"style": "riso"}}
    entries = {
        name: {
            "images": str(base / name),
            "init_word": "toy",
            "set": "final",
            "kind": kinds.get(name, "object"),
        }
        | ({"facts": own[name]} if name in own else {})
        for name in ("cat", "dog", "ink", "toys")
    }
    content = {"checkpoint": str(base / "model"), "concepts": entries, "kinds": ["object", "style", "set"]}
    content |= {"prompts": ["{} on the grass"], "base": {"steps": 2, "batch_size": 1}, "setups": {"word": {}}}
    content |= {"applications": list(APPLICATIONS), "num_images": 2, "sample_steps": 2, "device": "cpu"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return str(folder / "recipe.yaml")


def test_a_study_reports_its_applications(base: Path, tmp_path: Path) -> None:
    """Once made, pictures stay."""
    add_probe(base / "model")
    argv = [recipe(base, tmp_path), "--out", str(tmp_path / "out")]
    study.main(argv)
    found = json.loads((tmp_path / "out" / "study.json").read_text())["applications"]
    assert list(dict.fromkeys(f["application"] for f in found)) == list(APPLICATIONS)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Applications</h2>" in report and "composition: cat and dog, the words" in report
    pictures = sorted((tmp_path / "out" / "pictures" / "applications").iterdir())
    before = [path.stat().st_mtime_ns for path in pictures]
    study.main(argv)
    assert [path.stat().st_mtime_ns for path in pictures] == before


def test_what_cannot_be_judged_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="applications: 'cooking'; there are style, composition"):
        study.main([recipe(base, tmp_path, applications=["cooking"]), "--out", str(tmp_path / "out")])
    save_folder(tmp_path / "model", "small")
    add_image_encoder(tmp_path / "model")
    with pytest.raises(InputError, match="only a checkpoint with a probe/"):
        study.main(
            [recipe(base, tmp_path, checkpoint=str(tmp_path / "model")), "--out", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()
