"""`python -m minti.evaluate`: scores are those of their definitions, and nothing finished is made twice."""

import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import minti
from minti import Concept, InputError
from minti.cli.images import thumbnails
from minti.cli.svg import Point, scatter
from minti.evaluate import main
from minti.formats.photos import load_photos
from minti.inversion.templates import load_templates
from minti.judge import picture_jobs as pictures
from minti.judge.benchmark import (
    Benchmark,
    Evaluation,
    best,
    evaluate_word,
    tradeoff,
    with_tradeoffs,
    word_jobs,
)
from minti.judge.evaluation_plan import find_words, read_samples
from minti.judge.picture_jobs import PictureJob, PictureStore, Protocol, file_name, models_of
from minti.judge.prompts import PROMPTS, PromptList, fill, load_prompts
from minti.judge.results import as_json
from minti.judge.scorer import Scorer
from minti.judge.scores import Score
from minti.runs.folder import RunRecord, read_state

from .oracles import save_clip

ROOT = Path(minti.__file__).parents[1]
COUNT = 3  # pictures of each prompt
TEMPLATES = ["a photo of {}", "red {} on the grass", "the dog and {}"]
PROTOCOL = Protocol(num_images=COUNT, steps=2, batch_size=2)
SCORES = ("clip_i", "clip_t", "clip_t_pairwise")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    """A checkpoint that can judge its pictures, photos, prompts, and what a run of training leaves."""
    base = tmp_path_factory.mktemp("evaluate")
    (base / "model").symlink_to(small_checkpoint)
    (base / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "photos" / f"{i}.png")
    (base / "prompts.txt").write_text(f"# background\n{TEMPLATES[1]}\n\n# composition\n{TEMPLATES[2]}\n")
    for step in (5, 10, 15):
        vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(step))
        Concept("<toy>", vectors).save(base / "run" / "embeds" / f"step-{step:06d}.safetensors")
    Concept("<toy>", vectors).save(base / "run" / "learned_embeds.safetensors")
    config = {
        "checkpoint": str(base / "model"),
        "images": str(base / "photos"),
        "placeholder": "<toy>",
        "lr": 0.1,
    }
    (base / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return base


def arguments(base: Path, out: Path, *more: str) -> list[str]:
    argv = ["--checkpoint", base / "model", "--images", base / "photos", "--prompts", base / "prompts.txt"]
    argv += ["--num-images", COUNT, "--steps", 2, "--batch-size", 2, "--out", out, "--device", "cpu"]
    return [*map(str, argv), *more]


def word(base: Path) -> list[str]:
    return ["--concept", str(base / "run" / "learned_embeds.safetensors")]


def result(out: Path) -> dict:
    return json.loads((out / "evaluation.json").read_text(encoding="utf-8"))


def evaluations(out: Path) -> dict[str, dict]:
    return {e["name"]: e for e in result(out)["evaluations"]}


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete evaluation of a word."""
    out = tmp_path_factory.mktemp("done") / "out"
    main([*arguments(base, out), *word(base), "--caption", "the red cat"])
    return out


@pytest.fixture
def makes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts whose pictures are made from now on."""
    made, make = [], pictures.make_pictures

    def counting(sd: minti.StableDiffusion, prompt: str, *rest: object) -> list[Image.Image]:
        made.append(prompt)
        return make(sd, prompt, *rest)

    monkeypatch.setattr(pictures, "make_pictures", counting)
    return made


# Scores ---


def embed(base: Path, images: list[Image.Image]) -> Tensor:
    return Scorer.load(base / "model").embed_images(images)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def expected(base: Path, text: str, photos: list[Tensor] | None = None) -> dict[str, float]:
    """The scores by their definitions: loops over pictures that `sd.sample` makes."""
    sd, scorer = minti.load(base / "model", device="cpu"), Scorer.load(base / "model")
    sd.add_concept(Concept.load(base / "run" / "learned_embeds.safetensors"))
    photos = list(embed(base, [photo.open() for photo in load_photos(base / "photos")]))
    made = {}
    for template in TEMPLATES:
        prompt = " ".join(template.replace("{}", text).split())
        images = sd.sample(prompt, steps=2, guidance_scale=5.0, seed=0, num_images=COUNT, batch_size=2)
        made[template] = list(embed(base, images))
    pairs = [cosine(x, p) for x in made[TEMPLATES[0]] for p in photos]
    mean, single = [], []
    for template, rest in ((TEMPLATES[1], "red on the grass"), (TEMPLATES[2], "the dog and")):
        t = scorer.embed_texts([rest])[0]
        mean.append(cosine(sum(made[template]) / COUNT, t))
        single.append(sum(cosine(x, t) for x in made[template]) / COUNT)
    return {"clip_i": sum(pairs) / len(pairs), "clip_t": sum(mean) / 2, "clip_t_pairwise": sum(single) / 2}


@pytest.mark.parametrize(
    ("name", "text"), [("<toy>", "<toy>"), ("the red cat", "the red cat"), ("prompt only", "")]
)
def test_scores_are_those_of_the_paper(name: str, text: str, base: Path, done: Path) -> None:
    """Word, caption and no word at all. The embeddings are float32, and so are their sums."""
    found = evaluations(done)[name]
    for score, value in expected(base, text).items():
        assert found[score] == pytest.approx(value, rel=1e-5, abs=1e-6), score
        low, high = found["intervals"][score]
        assert low < found[score] < high


def test_image_only(base: Path, done: Path) -> None:
    """The photos as if they had been generated: other photos, and every prompt."""
    photos = embed(base, [photo.open() for photo in load_photos(base / "photos")])
    pairs = [cosine(photos[i], photos[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    texts = Scorer.load(base / "model").embed_texts(["red on the grass", "the dog and"])
    found = evaluations(done)["image only"]
    close = {"rel": 1e-5, "abs": 1e-6}
    assert found["clip_i"] == pytest.approx(sum(pairs) / 3, **close)
    assert found["clip_t"] == pytest.approx(sum(cosine(sum(photos), t) for t in texts) / 2, **close)
    each = [cosine(p, t) for p in photos for t in texts]
    assert found["clip_t_pairwise"] == pytest.approx(sum(each) / 6, **close)


def test_what_is_written(base: Path, done: Path) -> None:
    assert sorted(p.name for p in done.iterdir()) == sorted(
        ["config.yaml", "evaluation.json", "grids", "pictures", "plot.svg"]
    )
    found = result(done)
    lead = evaluations(done)["<toy>"]
    assert {key: found[key] for key in ("name", *SCORES, "intervals")} == {
        key: lead[key] for key in ("name", *SCORES, "intervals")
    }
    assert found["model"] == {
        "checkpoint": str(base / "model"),
        "dtype": "float32",
        "clip": str(base / "model"),
        "minti": minti.__version__,
    }
    settings = {"num_images": 3, "steps": 2, "guidance_scale": 5.0, "eta": 0.0, "seed": 0, "size": [16, 16]}
    assert settings.items() <= found["settings"].items()
    assert [(row["prompt"], row["group"], row["num_images"]) for row in found["prompts"]] == [
        (TEMPLATES[0], "reconstruction", 3),
        (TEMPLATES[1], "background", 3),
        (TEMPLATES[2], "composition", 3),
    ]
    assert found["prompts"][0]["clip_t"] is None
    assert found["clip_t"] == pytest.approx(sum(row["clip_t"] for row in found["prompts"][1:]) / 2, abs=1e-6)
    assert found["clip_i"] == found["prompts"][0]["clip_i"]
    assert [e["kind"] for e in found["evaluations"]] == ["word", "caption", "prompt only", "image only"]


def test_grids_show_the_pictures(base: Path, done: Path) -> None:
    sd = minti.load(base / "model", device="cpu")
    sd.add_concept(Concept.load(base / "run" / "learned_embeds.safetensors"))
    prompts = [template.replace("{}", "<toy>") for template in TEMPLATES]
    images = sd.sample(prompts, steps=2, guidance_scale=5.0, num_images=COUNT, batch_size=2)
    rows = [np.concatenate([np.asarray(i) for i in images[r : r + COUNT]], axis=1) for r in (0, 3, 6)]
    grid = Image.open(done / "grids" / f"{file_name('<toy>')}.png")
    assert np.array_equal(np.asarray(grid), np.concatenate(rows))
    assert json.loads(grid.text["prompts"]) == TEMPLATES


def test_plot_is_an_svg_by_itself(done: Path) -> None:
    root = ElementTree.fromstring((done / "plot.svg").read_text(encoding="utf-8"))
    text = "".join(root.itertext())
    for label in ("<toy>", "the red cat", "prompt only", "image only", "editability", "reconstruction"):
        assert label in text
    assert len(root.findall(".//{http://www.w3.org/2000/svg}circle")) == 4


def test_defaults_are_the_papers() -> None:
    paper = Protocol()
    assert (paper.num_images, paper.steps, paper.guidance_scale, paper.eta) == (64, 50, 5.0, 0.0)


# The Python way ---


def test_evaluate_word(base: Path, done: Path, tmp_path: Path, makes: list[str]) -> None:
    """What the command says, in a few lines; a second word of the same model; and from a store."""
    sd, scorer = minti.load(base / "model", device="cpu"), Scorer.load(base / "model")
    sd.add_concept(Concept.load(base / "run" / "learned_embeds.safetensors"))
    sd.add_concept(Concept.load(base / "run" / "embeds" / "step-000005.safetensors", "<other>"))
    photos = [photo.open() for photo in load_photos(base / "photos")]
    benchmark = Benchmark.make(scorer, photos, load_prompts(str(base / "prompts.txt")))
    steps: list[int] = []
    store = PictureStore(tmp_path)
    found = evaluate_word(
        sd, scorer, benchmark, "<toy>", PROTOCOL, store=store, on_step=lambda: steps.append(1)
    )
    assert as_json(found) == evaluations(done)["<toy>"] | {"tradeoff": None}
    jobs = word_jobs(sd, benchmark.prompts, "<toy>", PROTOCOL, models_of(sd, scorer))
    assert len(steps) == sum(job.steps for job in jobs.values()) == 3 * 2 * 2  # prompts, batches, steps
    assert sum(job.num_images for job in jobs.values()) == 3 * COUNT
    assert makes == ["a photo of <toy>", "red <toy> on the grass", "the dog and <toy>"]

    again = evaluate_word(sd, scorer, benchmark, "<toy>", PROTOCOL, store=store)
    assert as_json(again) == as_json(found)
    assert len(makes) == 3
    other = evaluate_word(sd, scorer, benchmark, "<other>", PROTOCOL, store=store)
    assert len(makes) == 6
    assert other.clip_i != found.clip_i


def test_the_store_notices_what_the_pictures_depend_on(base: Path, tmp_path: Path) -> None:
    sd, scorer = minti.load(base / "model", device="cpu"), Scorer.load(base / "model")
    row = sd.add_concept(Concept.load(base / "run" / "learned_embeds.safetensors"))
    store, prompts = PictureStore(tmp_path), PromptList(())

    def job(**changes: object) -> PictureJob:
        protocol = Protocol(**(vars(PROTOCOL) | changes))
        return word_jobs(sd, prompts, "<toy>", protocol, models_of(sd, scorer))["a photo of {}"]

    embeddings = job().measure(scorer.measure, store)["embeddings"]
    assert torch.equal(store.load(job())["embeddings"], embeddings)
    assert torch.equal(store.load(job(batch_size=1))["embeddings"], embeddings)
    for changes in (
        {"seed": 1},
        {"steps": 3},
        {"num_images": 2},
        {"guidance_scale": 4.0},
        {"eta": 0.5},
        {"size": 8},
    ):
        assert store.load(job(**changes)) is None, changes
    row.data[0, 0] += 1  # learned on
    assert store.load(job()) is None
    row.data[0, 0] -= 1
    sd.unet.conv_in.weight.data[0, 0, 0, 0] += 1  # another model
    assert store.load(job()) is None
    assert len(store.thumbnails(job().name)) == COUNT


def test_what_is_damaged_in_a_store_is_made_again_or_named(tmp_path: Path) -> None:
    store, images = PictureStore(tmp_path), [Image.new("RGB", (8, 8))] * 3
    job = PictureJob("a/b", {"prompt": "x"}, lambda on_step: images)
    kept = {"embeddings": torch.zeros(3, 4), "facts": torch.zeros(3, 2, dtype=torch.int64)}
    store.save(job, kept, images)
    path, sheet = tmp_path / "a/b.safetensors", tmp_path / "a/b.png"
    content, picture = path.read_bytes(), sheet.read_bytes()
    assert store.load(job).keys() == kept.keys()
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    for damaged in ({"embeddings": kept["embeddings"]}, kept | {"embeddings": torch.ones(3, 4)}):
        save_file(damaged, path, about)  # whole for safetensors, but not what was measured
        assert store.load(job) is None
    save_file(kept, path, {"inputs": json.dumps(job.inputs)})
    assert store.load(job) is None
    path.unlink()
    os.mkfifo(path)
    assert store.load(job) is None
    path.unlink()
    path.write_bytes(content)

    nothing, many = PngInfo(), PngInfo()
    many.add_text("num_images", "10" * 20)
    for info, why in ((nothing, "num_images"), (many, "cannot show")):
        Image.new("RGB", (8, 8)).save(sheet, pnginfo=info)
        with pytest.raises(InputError, match=rf"b\.png: cannot be read as a picture .*{why}"):
            store.thumbnails(job.name)
    sheet.write_bytes(picture[: len(picture) // 2])
    with pytest.raises(InputError, match=r"b\.png: cannot be read as a picture"):
        store.thumbnails(job.name)
    sheet.unlink()  # as the message says
    assert store.load(job) is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_pipe_in_the_place_of_a_text_is_no_file(tmp_path: Path) -> None:
    """Opening one would wait for a writer for ever."""
    os.mkfifo(tmp_path / "prompts.csv")
    with pytest.raises(InputError, match=r"neither one of .* nor a text file"):
        load_prompts(str(tmp_path / "prompts.csv"))
    with pytest.raises(InputError, match="neither object nor style"):
        load_templates(str(tmp_path / "prompts.csv"))
    with pytest.raises(InputError, match=r"prompts\.csv: cannot be read .*pipe"):
        read_samples(tmp_path, "<toy>")
    os.mkfifo(tmp_path / "log.csv")
    os.mkfifo(tmp_path / "state.safetensors")
    assert RunRecord(tmp_path).last_step == 0
    with pytest.raises(InputError, match=r"state\.safetensors: cannot be read .*pipe"):
        read_state(tmp_path / "state.safetensors")


def test_large_pictures_are_kept_small_and_all_of_them(tmp_path: Path) -> None:
    images = [Image.new("RGB", (256, 192), (i, 0, 0)) for i in range(11)]
    store = PictureStore(tmp_path)
    job = PictureJob("a/b", {}, lambda on_step: images)
    store.save(job, {"embeddings": torch.zeros(11, 4)}, images)
    kept = store.thumbnails(job.name)
    assert [image.size for image in kept] == [(128, 96)] * 11
    assert [image.getpixel((5, 5)) for image in kept] == [(i, 0, 0) for i in range(11)]
    sizes = {image.size for image in thumbnails([Image.new("RGB", (40, 20)), Image.new("RGB", (30, 60))])}
    assert sizes == {(40, 60)}


# Trade-off ---


def evaluation(name: str, i: float, t: float | None, kind: str = "word") -> Evaluation:
    return Evaluation(name, kind, Score(i), None if t is None else Score(t), None)


def test_tradeoff() -> None:
    image_only = evaluation("image only", 0.8, 0.2, "image only")
    prompt_only = evaluation("prompt only", 0.4, 0.3, "prompt only")

    def of(i: float, t: float | None) -> float | None:
        found = tradeoff(evaluation("w", i, t), image_only, prompt_only)
        return found and found.value

    assert of(0.8, 0.2) == of(0.4, 0.3) == of(0.3, 0.1) == 0  # the references, and worse than both
    assert of(0.6, 0.25) == pytest.approx(0.5)
    assert of(0.8, 0.3) == pytest.approx(1)
    assert of(0.7, 0.22) == pytest.approx(2 / (1 / 0.75 + 1 / 0.2))
    assert of(0.6, None) is None
    assert tradeoff(evaluation("w", 0.6, 0.25), prompt_only, image_only) is None  # spans no scale

    words = [evaluation("1", 0.5, 0.28), evaluation("2", 0.6, 0.25), evaluation("3", 0.79, 0.21)]
    assert best(words) is None
    assert best(words[:1]) == words[0]
    assert best(with_tradeoffs([*words, image_only, prompt_only])).name == "2"
    assert with_tradeoffs(words) == words

    drawn = [Score(0.6, torch.tensor([0.5, 0.6, 0.7]), 5), Score(0.25, torch.tensor([0.275, 0.25, 0.225]), 7)]
    found = tradeoff(Evaluation("w", "word", *drawn, None), image_only, prompt_only)
    expected = [2 / (1 / r + 1 / e) for r, e in ((0.25, 0.75), (0.5, 0.5), (0.75, 0.25))]
    torch.testing.assert_close(found.draws, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert found.dof == 5


def test_steps_of_a_run(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys) -> None:
    """The folder of a run says where model and photos are; every saved step is a point, joined in order."""
    out = tmp_path / "out"
    argv = arguments(base, out)[4:]  # without --checkpoint and --images
    with caplog.at_level(logging.INFO):
        main([*argv, "--concept", str(base / "run")])
    found = evaluations(out)
    assert list(found) == ["step 5", "step 10", "step 15", "prompt only", "image only"]
    table = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", table[0].strip()) == ["CLIP-I", "CLIP-T", "CLIP-T pairwise", "trade-off"]
    assert [line.split("  ")[0] for line in table[1:]] == list(found)
    references = [
        Evaluation(n, n, Score(found[n]["clip_i"]), Score(found[n]["clip_t"]), None)
        for n in ("image only", "prompt only")
    ]
    values = {
        n: tradeoff(evaluation(n, found[n]["clip_i"], found[n]["clip_t"]), *references)
        for n in ("step 5", "step 10", "step 15")
    }
    for n, value in values.items():  # the references are known to six digits
        assert found[n]["tradeoff"] == (value and pytest.approx(value.value, abs=1e-3))
    if None not in values.values():
        winner = max(values, key=lambda n: values[n].value)
        assert result(out)["name"] == winner
        assert f"best trade-off: {winner}" in caplog.text
    else:
        assert result(out)["name"] == "step 15"  # nothing tells which is better
    assert (out / "plot.svg").read_text().count('class="join"') == 1
    # The last step is the word that the run ended with.
    main([*arguments(base, tmp_path / "last"), *word(base)])
    for score in SCORES:
        assert evaluations(tmp_path / "last")["<toy>"][score] == pytest.approx(
            found["step 15"][score], rel=1e-5
        )


def test_the_last_word_is_scored_unless_it_is_one_of_the_steps(base: Path, tmp_path: Path) -> None:
    """With --keep best it may be none of them."""
    run = Path(shutil.copytree(base / "run", tmp_path / "run"))
    steps = [run / "embeds" / f"step-{n:06d}.safetensors" for n in (5, 10, 15)]
    assert find_words(str(run)) == steps
    Concept("<toy>", torch.ones(1, 32)).save(run / "learned_embeds.safetensors")
    assert find_words(str(run)) == [*steps, run / "learned_embeds.safetensors"]


def test_several_files_of_one_word(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "run", tmp_path / "again")
    argv = [*word(base), "--concept", str(tmp_path / "again" / "learned_embeds.safetensors")]
    argv.append("--no-references")
    main([*arguments(base, tmp_path / "out"), *argv])
    found = evaluations(tmp_path / "out")
    assert list(found) == [argv[1], argv[3]]  # the paths, since the word does not tell them apart
    assert [e["tradeoff"] for e in found.values()] == [None, None]
    assert result(tmp_path / "out")["clip_i"] == found[argv[3]]["clip_i"]


# Resuming ---


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_rerun_makes_nothing_again(base: Path, done: Path, makes: list[str]) -> None:
    before = snapshot(done)
    main([*arguments(base, done), *word(base), "--caption", "the red cat", "--batch-size", "3"])
    assert makes == []
    changed = {name for name, content in snapshot(done).items() if content != before.get(name)}
    assert changed == {"config.yaml"}  # the batch size, which the pictures do not depend on


@pytest.mark.parametrize("after", [4])
def test_interrupted_is_uninterrupted(
    after: int, base: Path, done: Path, tmp_path: Path, makes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "out", PictureStore.save
    argv = [*arguments(base, out), *word(base), "--caption", "the red cat"]

    def interrupted(self: PictureStore, *rest: object) -> None:
        save(self, *rest)
        if len(makes) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(PictureStore, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    assert not (out / "evaluation.json").exists()
    # As if it had been killed while it wrote the next.
    finished = sorted((out / "pictures").rglob("*.safetensors"))
    finished[0].write_bytes(finished[0].read_bytes()[:-20])
    main(argv)
    assert len(makes) == 3 * 3 + 1  # all prompts of all subjects, and the one whose file is torn
    expected = snapshot(done)
    found = snapshot(out)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"config.yaml"}:
        assert found[name] == expected[name], name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "3"], "sample_steps was 2, now it is 3"),
        (["--num-images", "4"], "num_images was 3, now it is 4"),
        (["--caption", "cat"], r"caption was \['the red cat'\], now it is \['the red cat', 'cat'\]"),
        (["--no-references"], "references was True, now it is False"),
    ],
)
def test_other_settings_are_refused(more: list[str], message: str, base: Path, done: Path) -> None:
    before = snapshot(done)
    with pytest.raises(InputError, match=rf"config\.yaml: {message}"):
        main([*arguments(base, done), *word(base), "--caption", "the red cat", *more])
    assert snapshot(done) == before


def test_overwrite_begins_anew(base: Path, tmp_path: Path, makes: list[str]) -> None:
    out = tmp_path / "out"
    argv = [*arguments(base, out), *word(base), "--no-references"]
    main(argv)
    main([*argv, "--overwrite", "--seed", "7"])
    assert len(makes) == 6
    assert result(out)["settings"]["seed"] == 7
    assert len(list((out / "pictures").rglob("*.safetensors"))) == 3


@pytest.mark.slow
def test_two_processes_are_one(base: Path, done: Path, tmp_path: Path) -> None:
    """The same batches, so the same bytes; and both have made some."""
    out = tmp_path / "out"
    argv = [*arguments(base, out), *word(base), "--caption", "the red cat"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "-m", "minti.evaluate", *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("CLIP-I") == 1
    ended = re.findall(r"(\d+)/(\d+) sampling steps", run.stderr)
    assert [total for done, total in ended if done == total] in (["20", "16"], ["16", "20"])  # of 9 prompts
    assert (out / "evaluation.json").read_bytes() == (done / "evaluation.json").read_bytes()


# Pictures of other tools ---


@pytest.fixture(scope="module")
def samples(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures that `minti.evaluate` would make, as files, with a table of prompts."""
    folder = tmp_path_factory.mktemp("samples")
    sd = minti.load(base / "model", device="cpu")
    sd.add_concept(Concept.load(base / "run" / "learned_embeds.safetensors"))
    rows = [("file", "prompt")]
    for number, template in enumerate(TEMPLATES):
        prompt = template.replace("{}", "<toy>")
        images = sd.sample(prompt, steps=2, guidance_scale=5.0, num_images=COUNT, batch_size=2)
        for i, image in enumerate(images):
            image.save(folder / f"{number}-{i}.png")
            rows.append((f"{number}-{i}.png", prompt.capitalize()))
    with (folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def score_samples(base: Path, samples: Path, out: Path, *more: str) -> None:
    argv = ["--samples", str(samples), "--images", str(base / "photos"), "--placeholder", "<toy>"]
    main([*argv, "--clip", str(base / "model"), "--out", str(out), "--device", "cpu", *more])


def test_samples(base: Path, done: Path, samples: Path, tmp_path: Path) -> None:
    """The same pictures, the same scores, without a model that makes any."""
    score_samples(base, samples, tmp_path / "out")
    found, wanted = evaluations(tmp_path / "out"), evaluations(done)
    assert list(found) == ["<toy>", "image only"]
    for name in found:
        for score in SCORES:
            assert found[name][score] == pytest.approx(wanted[name][score], rel=1e-5), (name, score)
    assert result(tmp_path / "out")["model"]["samples"] == str(samples)
    assert [row["prompt"] for row in result(tmp_path / "out")["prompts"]] == TEMPLATES
    before = snapshot(tmp_path / "out")
    score_samples(base, samples, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


def test_samples_of_different_sizes_and_numbers(base: Path, samples: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(samples, tmp_path / "samples"))
    Image.new("RGB", (300, 100), "red").save(folder / "more.jpg")
    with (folder / "prompts.csv").open("a") as file:
        file.write("more.jpg,the dog and <TOY>\r\n")
    score_samples(base, folder, tmp_path / "out")
    assert [row["num_images"] for row in result(tmp_path / "out")["prompts"]] == [3, 3, 4]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"prompts\.csv: cannot be read"),
        ("", r"lists no pictures"),
        ("file,prompt\n", "lists no pictures; write rows like: 1.png,a photo of <toy>"),
        (
            "name,text\n0-0.png,a photo of <toy>\n",
            "row 2 lacks file or prompt; the first row is: file,prompt",
        ),
        ("file,prompt\n0-0.png,a photo of <toy>\n0-1.png\n", "row 3 lacks file or prompt"),
        ("file,prompt\nx.png,a photo of <toy>\n", "row 2 names x.png, which is not there"),
        ("file,prompt\n0-0.png,a photo of toys\n", "row 2, with {} for '<toy>': 'a photo of toys' needs"),
        ("file,prompt\n0-0.png,<toy>\n", "row 2, with {} for '<toy>': '{}' needs words"),
        ("file,prompt\n0-0.png,<toy> on the grass\n", "no picture of 'a photo of <toy>' to compare"),
    ],
)
def test_bad_tables(rows: str | None, message: str, base: Path, samples: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(samples, tmp_path / "samples"))
    (folder / "prompts.csv").unlink()
    if rows is not None:
        (folder / "prompts.csv").write_text(rows)
    with pytest.raises(InputError, match=re.escape(message) if rows is not None else message):
        score_samples(base, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_prompt_for_reconstruction(base: Path, samples: Path, tmp_path: Path) -> None:
    score_samples(base, samples, tmp_path / "out", "--reconstruction-prompt", "Red {} on the grass")
    rows = result(tmp_path / "out")["prompts"]
    assert [row["prompt"] for row in rows] == [TEMPLATES[1], TEMPLATES[0], TEMPLATES[2]]
    assert rows[0]["clip_t"] is None and rows[1]["clip_t"] is not None


# Prompts ---


LISTS = ["object", "style", "tiny", "tiny-development", "tiny-style"]


@pytest.mark.parametrize("name", LISTS)
def test_shipped_prompts(name: str) -> None:
    prompts = load_prompts(name)
    assert len(prompts.prompts) >= 14
    groups = {prompt.group for prompt in prompts.prompts}
    assert groups == {"background", "style", "composition", "attribute"} - (
        {"style"} if name == "tiny-style" else set()
    )
    assert prompts.templates[0] == prompts.reconstruction
    assert ("style of {}" in prompts.reconstruction) == ("style" in name)


def test_every_shipped_list_is_tested_and_packaged() -> None:
    assert {p.stem for p in PROMPTS.iterdir()} == set(LISTS)
    assert '"minti.judge" = ["prompt_lists/*.txt"]' in (ROOT / "pyproject.toml").read_text()


def test_the_small_world_knows_every_word_of_its_lists() -> None:
    """By the captions that its model is trained on."""
    from tools.make_tiny.captions import caption
    from tools.make_tiny.world import scene

    rng, known = np.random.default_rng(0), {"in", "the", "style", "of"}
    for i in range(1500):
        known |= set(caption(scene(0, i), rng).text.split())
    for name in ("tiny", "tiny-development", "tiny-style"):
        for template in load_prompts(name).templates:
            assert set(fill(template, "").split()) <= known, template


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs prompts"),
        ("# background\n", "needs prompts"),
        ("a photo\n", "'a photo' needs words, and exactly one {}"),
        ("{} and {}\n", "'{} and {}' needs words"),
        ("{}\n", "'{}' needs words"),
        ("{}!\n", "'{}!' needs words"),
        ("a {}\na {}\n", "all different"),
        ("# reconstruction\na {}\nb {}\n# x\nc {}\n", "at most one"),
        ("# reconstruction\na {}\n# x\na {}\n", "all different"),
    ],
)
def test_bad_prompts(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        load_prompts(str(tmp_path / "p.txt"))
    with pytest.raises(InputError, match=f"neither one of {', '.join(LISTS)}, nor a text file"):
        load_prompts(str(tmp_path / "nowhere.txt"))


def test_the_list_goes_by_what_the_model_knows(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "minti.judge.picture_jobs.make_pictures", lambda *_: [Image.new("RGB", (16, 16))] * COUNT
    )
    run = Path(shutil.copytree(base / "run", tmp_path / "run"))
    shutil.rmtree(run / "embeds")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for style, name in ((False, "tiny"), (True, "tiny-style")):
        (run / "config.yaml").write_text(
            yaml.safe_dump(config | {"templates": "style" if style else "object"})
        )
        out = tmp_path / name
        main(["--concept", str(run), "--out", str(out), "--num-images", "3", "--device", "cpu"])
        assert result(out)["settings"]["prompts"] == name
        assert [row["prompt"] for row in result(out)["prompts"]] == load_prompts(name).templates


# What cannot be used ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--concept", "nowhere.safetensors"], "nowhere.safetensors: cannot be read"),
        ([], "--checkpoint and --concept must be given"),
        (["--images", "nowhere", "WORD"], "nowhere: is not a folder"),
        (["--concept", "PHOTOS"], "no learned word in it"),
        (["WORD", "--clip", "nowhere"], "nowhere: does not exist"),
        (["WORD", "--size", "17"], "size 17x17"),
        (["WORD", "--steps", "2000"], "2000"),
        (["WORD", "--prompts", "nowhere"], "prompts 'nowhere': neither"),
        (["WORD", "--reconstruction-prompt", "cat"], "'cat' needs words"),
        (["WORD", "--samples", "x"], "--samples goes with --placeholder"),
        (["WORD", "--num-images", "0"], "at least 1"),
    ],
)
def test_bad_input(more: list[str], message: str, base: Path, tmp_path: Path) -> None:
    names = {"WORD": word(base), "PHOTOS": [str(base / "photos")]}
    argv = [part for name in more for part in names.get(name, [name])]
    with pytest.raises(InputError, match=re.escape(message)):
        main([*arguments(base, tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()


def test_what_must_be_given(base: Path, tmp_path: Path) -> None:
    argv = [*arguments(base, tmp_path / "out"), *word(base)]
    for missing, message in (
        ("--checkpoint", "--checkpoint and --concept must"),
        ("--images", "--images must"),
    ):
        i = argv.index(missing)
        with pytest.raises(InputError, match=message):
            main(argv[:i] + argv[i + 2 :])


def test_a_word_of_another_model(base: Path, tmp_path: Path) -> None:
    Concept("<toy>", torch.zeros(1, 768)).save(tmp_path / "w.safetensors")
    message = r"w\.safetensors: .*toy.* was learned on a 768-wide encoder \(SD 1\.x\), this checkpoint has"
    with pytest.raises(InputError, match=message):
        main([*arguments(base, tmp_path / "out"), "--concept", str(tmp_path / "w.safetensors")])


def test_a_word_that_does_not_fit(base: Path, tmp_path: Path) -> None:
    Concept("<toy>", torch.zeros(74, 32)).save(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="with its 74 vectors does not fit"):
        main([*arguments(base, tmp_path / "out"), "--concept", str(tmp_path / "w.safetensors")])


def test_a_checkpoint_that_cannot_judge(base: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(base / "model", tmp_path / "model"))
    shutil.rmtree(model / "image_encoder")
    argv = [*arguments(base, tmp_path / "out"), *word(base), "--checkpoint", str(model)]
    with pytest.raises(InputError, match=r"--clip must be given, since .*/model has no image encoder"):
        main(argv)
    save_clip(tmp_path / "clip")
    main([*argv, "--clip", str(tmp_path / "clip"), "--no-references"])
    assert result(tmp_path / "out")["model"]["clip"] == str(tmp_path / "clip")


def test_what_is_not_there_is_named(base: Path, tmp_path: Path) -> None:
    """And not what would have been asked for next."""
    with pytest.raises(InputError, match="/none: does not exist"):
        main([*arguments(base, tmp_path / "out"), *word(base), "--checkpoint", str(tmp_path / "none")])
    with pytest.raises(InputError, match="no learned word in it; give the folder of a run with one"):
        main(["--concept", str(tmp_path)])


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_other_folders_are_left_alone(overwrite: list[str], base: Path, tmp_path: Path) -> None:
    """In particular that of a training run, which has a config.yaml, too."""
    run = Path(shutil.copytree(base / "run", tmp_path / "run"))
    (tmp_path / "file").write_text("")
    for out in (run, tmp_path / "file", base / "photos"):
        before = snapshot(run)
        with pytest.raises(InputError, match=r"holds something that minti\.evaluate did not make"):
            main([*arguments(base, out), *word(base), *overwrite])
        assert snapshot(run) == before


def test_the_default_folder_is_beside_the_word(base: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(base / "run", tmp_path / "run"))
    argv = arguments(base, tmp_path)
    argv = [*argv[: argv.index("--out")], "--device", "cpu", "--no-references"]
    main([*argv, "--concept", str(run / "learned_embeds.safetensors")])
    assert (run / "evaluation" / "evaluation.json").exists()
    with pytest.raises(InputError, match="--out must be given"):
        main([*argv, "--caption", "the cat"])


def test_the_command(base: Path, tmp_path: Path) -> None:
    """As a user runs it: bad input is one line and exit code 2."""
    command = [sys.executable, "-m", "minti.evaluate", *arguments(base, tmp_path / "out")]
    run = subprocess.run([*command, "--concept", "x"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"minti\.evaluate: error: x: cannot be read .*\n", run.stderr)


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for option in (
        "--concept",
        "--samples",
        "--placeholder",
        "--caption",
        "--clip",
        "--prompts",
        "(default: 64)",
    ):
        assert option in text


# Plot ---


def test_scatter_keeps_everything_inside() -> None:
    """Every point and error bar lies on the paper, and labels are escaped."""
    points = [
        Point(0.1 * i, 0.5 - 0.01 * i, f"<{i}> & co", str(i % 2), i > 2, (0.1 * i - 0.3, 0.1 * i), None)
        for i in range(6)
    ]
    svg = scatter("a & b", "x < 1", "y", points)
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 6
    assert all(0 < float(c.get("cx")) < width and 0 < float(c.get("cy")) < height for c in circles)
    xs = [float(c.get("cx")) for c in circles]
    assert xs == sorted(xs)
    numbers = [float(n) for path in re.findall(r' d="([^"]*)"', svg) for n in re.findall(r"-?[\d.]+", path)]
    assert min(numbers) > 0 and max(numbers) < width
    assert scatter("", "", "", []) == ""
    assert ElementTree.fromstring(scatter("one", "x", "y", [Point(0.5, 0.5, "alone")])) is not None
