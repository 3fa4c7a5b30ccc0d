"""`python -m minti.train`: what it writes, what its options do, and several words or processes at once."""

import contextlib
import csv
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minti
from minti import Concept, InputError, StableDiffusion, train
from minti.cli.command import run_command
from minti.cli.images import image_grid
from minti.cli.model_options import load_model
from minti.cli.processes import Processes
from minti.cli.yaml_files import RECIPES
from minti.formats.photos import load_photos
from minti.formats.views import make_views
from minti.inversion import shares
from minti.inversion.batches import Settings, Word
from minti.inversion.inversion import Inversion
from minti.inversion.latents import encode_views
from minti.inversion.start import initial_rows
from minti.inversion.templates import OBJECT
from minti.model.model_hash import model_hash
from minti.model.vae import VAE
from minti.runs import trainer
from minti.runs.folder import RunRecord
from minti.runs.report import nearest_words
from minti.runs.run_word import RunWord, Watching
from minti.runs.stop import Stop
from minti.runs.trainer import Trainer
from minti.runs.words import view_picture

from .oracles import save_folder
from .processes import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and photos of two concepts."""
    base = tmp_path_factory.mktemp("train")
    save_folder(base / "model", "small")
    for name, seed in (("photos", 0), ("others", 1)):
        (base / name).mkdir()
        for i in range(2 + seed):
            pixels = np.random.default_rng([seed, i]).integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / name / f"{i}.png")
    return base


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report, which takes longer than a short run."""
    monkeypatch.setattr(trainer, "write_report", lambda *_: None)


def arguments(base: Path, out: Path, *more: str) -> list[str]:
    argv = ["--checkpoint", base / "model", "--images", base / "photos", "--placeholder", "<toy>"]
    argv += ["--init-word", "red toy", "--out", out, "--device", "cpu", "--steps", 4, "--batch-size", 2]
    argv += ["--eval-every", 2, "--eval-size", 2, "--sample-every", 0]
    return [*map(str, argv), *more]


@pytest.fixture
def run(base: Path, tmp_path: Path, quick: None) -> Callable[..., Path]:
    def run(*more: str, out: Path | None = None) -> Path:
        out = out or tmp_path / "run"
        train.main(arguments(base, out, *more))
        return out

    return run


def rows(path: Path) -> list[dict[str, float | None]]:
    """The rows of a log.csv after its steps; that of step 0 is left out."""
    with path.open(newline="") as file:
        steps = [row for row in csv.DictReader(file) if row["step"] != "0"]
    return [{k: float(v) if v else None for k, v in row.items()} for row in steps]


def learned(out: Path) -> torch.Tensor:
    return Concept.load(out / "learned_embeds.safetensors").vectors


def log_of(out: Path) -> list[dict[str, float | None]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out / "log.csv")]


def test_the_start_is_evaluated(run: Callable, tmp_path: Path) -> None:
    """A word that does not move has the eval loss of its start, which is logged as that of step 0."""
    out = run("--lr", "0", "--eval-every", "4", "--steps", "4")
    with (out / "log.csv").open(newline="") as file:
        first, *_, last = csv.DictReader(file)
    assert first["step"] == "0" and first["loss"] == first["lr"] == first["seconds"] == ""
    assert first["eval_loss"] == last["eval_loss"] != "" and float(first["cosine"]) == 1
    moved = RunRecord(run("--lr", "0.05", "--eval-every", "2", "--steps", "4", out=tmp_path / "moved"))
    steps, losses = moved.series("eval_loss")
    assert steps.tolist() == [0, 2, 4] and f"{losses[0]}" == first["eval_loss"]


# What a run writes
# ----------------------------------------------------------------------------------------------------------


def test_everything_a_run_writes(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    """With the report and all."""
    out = tmp_path / "new" / "run"
    more = ["--save-every", "3", "--sample-every", "2", "--sample-steps", "1", "--num-vectors", "2"]
    more += ["--sample-prompt", "a {}", "--sample-prompt", "{} on grass", "--steps", "5", "--lr", "0.01"]
    with caplog.at_level(logging.INFO):
        train.main(arguments(base, out, *more))
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {
        "config.yaml",
        "learned_embeds.safetensors",
        "embeds/step-000003.safetensors",
        "embeds/step-000005.safetensors",
        "state.safetensors",
        "log.csv",
        "inputs.png",
        "report.html",
        *(f"samples/step-{step:06d}.png" for step in (2, 4, 5)),
    }

    # The words
    tensors = load_file(out / "learned_embeds.safetensors")
    assert tensors.keys() == {"<toy>"}
    assert tensors["<toy>"].shape == (2, 32)
    assert tensors["<toy>"].dtype == torch.float32
    metadata = Concept.load(out / "learned_embeds.safetensors").metadata
    sd = minti.load(base / "model", device="cpu")
    expected = {"init_word": "red toy", "step": "5", "seed": "0", "minti": minti.__version__}
    model = model_hash(sd.text_encoder, sd.unet, sd.vae)
    expected |= {"base_model": str(base / "model"), "base_model_hash": model, "dtype": "float32"}
    assert expected.items() <= metadata.items()
    with safe_open(out / "learned_embeds.safetensors", "pt") as file:
        assert "red toy" in str(file.metadata())  # there for other programs to see
    assert torch.equal(Concept.load(out / "embeds" / "step-000005.safetensors").vectors, tensors["<toy>"])

    # The log
    log = rows(out / "log.csv")
    assert list(log[0]) == ["step", "loss", "eval_loss", "lr", "norm", "cosine", "seconds"]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    assert [row["eval_loss"] is not None for row in log] == [False, True, False, True, True]
    assert {row["lr"] for row in log} == {0.01}
    assert all(0 < row["seconds"] < 60 for row in log)
    table = sd.text_encoder.token_embedding.weight
    start = initial_rows(sd, "word", "red toy", 2)
    assert log[-1]["norm"] == pytest.approx(
        (tensors["<toy>"].norm(dim=1).mean() / table.norm(dim=1).mean()).item(), rel=1e-5
    )
    cosine = torch.nn.functional.cosine_similarity(tensors["<toy>"], start).mean().item()
    assert log[-1]["cosine"] == pytest.approx(cosine, rel=1e-5)
    assert log[0]["cosine"] > log[-1]["cosine"]

    # The pictures
    views = make_views(load_photos(base / "photos"), 16, flip=True)
    with Image.open(out / "inputs.png") as image:
        sheet = image_grid([view_picture(view, 16) for view in views], 8)
        assert np.array_equal(np.asarray(image), np.asarray(sheet))
    sd.add_concept(Concept.load(out / "learned_embeds.safetensors"))
    images = sd.sample(["a <toy>", "<toy> on grass"], steps=1, num_images=4)
    with Image.open(out / "samples" / "step-000005.png") as image:
        assert json.loads(image.text["prompts"]) == ["a <toy>", "<toy> on grass"]
        assert image.size == (64, 32)
        assert np.array_equal(np.asarray(image)[16:, :16], np.asarray(images[4]))

    # What it said
    messages = [record.getMessage() for record in caplog.records]
    assert "<toy>: 2 photos, 4 views of 16 pixels" in messages
    assert f"5 steps of 2 samples on cpu, saved in {out} every 3 steps" in messages
    assert any(re.fullmatch(r"memory after one step: \d+ MB", m) for m in messages)
    assert messages[-1] == f"<toy>: learned in {out / 'learned_embeds.safetensors'}"
    said = re.search(r"5/5 steps, .*, loss \d\.\d+, eval loss \d\.\d+, (\d+) MB", capsys.readouterr().err)
    assert 10 < int(said[1]) < 100_000


def test_the_config_repeats_the_run(run: Callable, tmp_path: Path) -> None:
    """config.yaml has every option, also the defaults, and gives the same bytes again."""
    more = ["--lr-schedule", "cosine", "--warmup", "2", "--per-image", "0.3", "--max-norm", "2", "--no-flip"]
    out = run(*more, "--num-vectors", "3", "--progressive", "1", "--progressive", "3", "--seed", "4")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["progressive"] == [1, 3]
    assert config["flip"] is False
    assert config["beta2"] == 0.999
    assert not config.keys() & {"resume", "overwrite"}
    again = tmp_path / "again"
    train.main(["--config", str(out / "config.yaml"), "--out", str(again)])
    for name in ("learned_embeds.safetensors", "state.safetensors", "inputs.png"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    assert log_of(again) == log_of(out)


def test_the_config_of_a_run_does_not_replace_it(run: Callable) -> None:
    """Also where the run itself had replaced another."""
    run()
    out = run("--overwrite")
    with pytest.raises(InputError, match="exists already"):
        train.main(["--config", str(out / "config.yaml"), "--lr", "0.1"])


def test_it_is_the_method_with_the_options_of_the_command_line(run: Callable, base: Path) -> None:
    """The same vectors and losses as `Inversion` gives in a loop, to the last bit."""
    out = run("--init", "output", "--num-vectors", "2", "--lr", "0.02", "--seed", "3", "--accumulate", "2")
    sd = minti.load(base / "model", device="cpu")
    views = make_views(load_photos(base / "photos"), 16, flip=True, seed=3)
    init = initial_rows(sd, "output", "red toy", 2)
    word = Word("<toy>", init, encode_views(sd, views), OBJECT, [None, None], lr=0.02, seed=3)
    inversion = Inversion(sd, [word], Settings(steps=4, batch_size=2, accumulate=2, eval_size=2))
    for row in log_of(out):
        assert row["loss"] == inversion.step().item()
        if row["eval_loss"] is not None:
            assert row["eval_loss"] == inversion.evaluate().item()
    assert torch.equal(learned(out), inversion.concept(0).vectors)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"accumulate": 1, "betas": (0.9, 0.999), "weight_decay": 0.01, "progressive": ()}),
        (["--beta1", "0.5", "--beta2", "0.9"], {"betas": (0.5, 0.9)}),
        (["--weight-decay", "0.2"], {"weight_decay": 0.2}),
        (["--accumulate", "3"], {"accumulate": 3}),
        (["--lr-schedule", "cosine", "--warmup", "3"], {"lr_schedule": "cosine", "warmup": 3}),
        (["--regularization", "0.1", "--max-norm", "1.5"], {"regularization": 0.1, "max_norm": 1.5}),
        (["--context-weight", "0.2"], {"context_weight": 0.2}),
        (["--per-image", "0.25", "--caption-dropout", "0.1"], {"per_image": 0.25, "caption_dropout": 0.1}),
        (["--eval-size", "6"], {"eval_size": 6}),
        (["--steps", "7", "--batch-size", "3"], {"steps": 7, "batch_size": 3}),
        (["--num-vectors", "2", "--progressive", "3"], {"progressive": (3,)}),
        (["--optimizer", "direction", "--kappa", "0.1"], {"optimizer": "direction", "kappa": 0.1}),
        (["--t-min", "40", "--t-max", "60", "--average", "2"], {"t_min": 40, "t_max": 60, "average": 2}),
    ],
)
def test_options_become_settings(
    flags: list[str], expected: dict, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the memory trick reaches the model. Training itself is left out."""
    seen = []
    monkeypatch.setattr(Trainer, "train", lambda self, stop: seen.append(self) or True)
    run(*flags, "--gradient-checkpointing")
    settings = seen[0].inversion.settings
    assert {key: getattr(settings, key) for key in expected} == expected
    assert seen[0].sd.unet.gradient_checkpointing


def test_the_scaled_learning_rate(run: Callable, tmp_path: Path) -> None:
    """As in the paper: times batch size, and accumulated batches. Two processes: see below."""
    out = run("--scale-lr", "--lr", "0.001", "--accumulate", "3")
    assert {row["lr"] for row in rows(out / "log.csv")} == {0.001 * 2 * 3}
    other = run("--lr", "0.006", "--accumulate", "3", out=tmp_path / "other")
    assert torch.equal(learned(out), learned(other))


def test_how_photos_are_cut(run: Callable, tmp_path: Path) -> None:
    for flags, views in (
        (["--crop", "random"], 32),
        (["--crop", "none", "--no-flip"], 2),
        (["--crop", "squash", "--size", "32"], 4),
    ):
        out = run(*flags, out=tmp_path / flags[1])
        with Image.open(out / "inputs.png") as image:
            side = 32 if "--size" in flags else 16
            assert image.size == (side * min(views, 8), side * -(-views // 8))


def test_a_start_from_a_file(run: Callable, tmp_path: Path) -> None:
    vectors = torch.linspace(-0.1, 0.1, 96).view(3, 32)
    Concept("<old>", vectors).save(tmp_path / "old.safetensors")
    more = ["--lr", "0", "--weight-decay", "0"]
    out = run("--init", "file", "--init-word", str(tmp_path / "old.safetensors"), *more)
    assert torch.equal(learned(out), vectors)
    assert Concept.load(out / "learned_embeds.safetensors").placeholder == "<toy>"


def test_vectors_that_join_in_later(run: Callable) -> None:
    """Files hold those that were in use when they were written; so do norm and cosine."""
    more = ["--num-vectors", "3", "--progressive", "2", "--progressive", "4", "--steps", "6"]
    out = run(*more, "--save-every", "1", "--regularization", "10", "--keep", "best", "--eval-every", "1")
    steps = [Concept.load(path).vectors for path in sorted((out / "embeds").iterdir())]
    assert [len(vectors) for vectors in steps] == [1, 2, 2, 3, 3, 3]
    log = log_of(out)
    best = min(range(6), key=lambda i: log[i]["eval_loss"])
    assert torch.equal(learned(out), steps[best])
    state = load_file(out / "state.safetensors")
    for row, vectors in zip(log, steps, strict=True):
        cosine = torch.nn.functional.cosine_similarity(vectors, state["init.0"][: len(vectors)]).mean()
        assert row["cosine"] == pytest.approx(cosine.item(), rel=1e-5)


def test_a_random_start(run: Callable, base: Path) -> None:
    """Needs no init word, and does not say it had one."""
    out = run("--init", "random", "--seed", "3", "--lr", "0", "--weight-decay", "0")
    concept = Concept.load(out / "learned_embeds.safetensors")
    sd = minti.load(base / "model", device="cpu")
    assert torch.equal(concept.vectors, initial_rows(sd, "random", "", 1, 3))
    assert concept.metadata["init_word"] == ""
    argv = arguments(base, out.parent / "other", "--init", "random", "--steps", "1")
    i = argv.index("--init-word")
    train.main(argv[:i] + argv[i + 2 :])


def test_a_word_that_is_replaced(run: Callable) -> None:
    out = run("--placeholder", "cat", "--replace-word")
    assert Concept.load(out / "learned_embeds.safetensors").placeholder == "cat"


def test_the_compiled_loss(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(shares, "compile_for", lambda device, f: compiled.append(f) or f)
    run("--steps", "1")
    assert not compiled
    run("--steps", "1", "--compile", "--overwrite")
    assert len(compiled) == 1


def test_captions_are_learned_with(run: Callable, base: Path, tmp_path: Path) -> None:
    """The same one beside each photo: as if it were the only template."""
    shutil.copytree(base / "photos", tmp_path / "photos")
    for path in [*tmp_path.glob("photos/*.png")]:
        path.with_suffix(".txt").write_text("the red {} on grass")
    (tmp_path / "templates.txt").write_text("the red {} on grass")
    with_captions = run("--images", str(tmp_path / "photos"))
    as_templates = run("--templates", str(tmp_path / "templates.txt"), out=tmp_path / "other")
    assert torch.equal(learned(with_captions), learned(as_templates))


def test_the_vae_makes_way(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the device once the photos are encoded, and back for previews only."""
    moves, to, step = [], VAE.to, Inversion.step
    monkeypatch.setattr(VAE, "to", lambda self, *args, **kw: moves.append(args) or to(self, *args, **kw))
    monkeypatch.setattr(Inversion, "step", lambda *args, **kw: moves.append("step") or step(*args, **kw))
    run("--steps", "3", "--sample-every", "2", "--sample-steps", "1")
    preview = [(torch.device("cpu"),), ("cpu",)]  # the first is where the model is, on a GPU another one
    assert moves[moves.index("step") - 1 :] == [("cpu",), "step", "step", *preview, "step", *preview]


@pytest.mark.parametrize(
    ("asked", "world", "there", "expected"),
    [
        ("auto", 2, True, "cuda:1"),
        ("cuda", 2, True, "cuda:1"),
        ("cuda:0", 2, True, "cuda:0"),
        ("cpu", 2, True, "cpu"),
        ("auto", 2, False, "auto"),
        ("auto", 1, True, "auto"),
    ],
)
def test_the_gpu_of_a_process(
    asked: str, world: int, there: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert Processes(1, world, 1).device(asked) == expected


def test_the_device_that_was_asked_for_is_what_is_saved(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "device", lambda self, asked: "cpu")
    out = run("--device", "cuda", "--steps", "1")
    assert yaml.safe_load((out / "config.yaml").read_text())["device"] == "cuda"


def test_half_precision(run: Callable) -> None:
    """float32 vectors that move, and a scaler that is saved."""
    out = run("--dtype", "float16")
    assert learned(out).dtype == torch.float32
    state = load_file(out / "state.safetensors")
    assert state["scaler.scale"] > 1
    assert state["0.0.exp_avg"].dtype == torch.float32


def test_evaluations_and_previews_can_be_left_out(run: Callable) -> None:
    out = run("--eval-every", "0")
    assert all(row["eval_loss"] is None for row in rows(out / "log.csv"))
    assert not (out / "samples").exists()


@pytest.mark.parametrize("recipe", ["object", "style", "paper", "fast", "low-memory"])
def test_recipes(recipe: str, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each can be run, and what it says is done, where the flags do not say otherwise."""
    out = run("--config", recipe)
    config = yaml.safe_load((out / "config.yaml").read_text())
    said = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    flags = ("steps", "batch_size", "eval_every", "eval_size", "sample_every")
    assert {k: config[k] for k in said if k not in flags} == {k: v for k, v in said.items() if k not in flags}
    assert config["steps"] == 4
    assert len(rows(out / "log.csv")) == 4


# The best, and when to stop
# ----------------------------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, *values: list[float]) -> None:
    """Evaluations after steps that give these values, one after the other, for each word its own."""
    sequence = zip(*values, strict=True)

    def evaluate(self: Inversion) -> torch.Tensor:
        return torch.tensor(next(sequence)) if self.step_count else torch.ones(len(values))

    monkeypatch.setattr(Inversion, "evaluate", evaluate)


def test_keep_the_best(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors, and the number, of the step with the lowest evaluation, not of the last."""
    pretend(monkeypatch, [0.5, 0.3, 0.2, 0.4, 0.2, 0.6])
    out = run("--keep", "best", "--eval-every", "1", "--save-every", "1", "--steps", "6")
    best = Concept.load(out / "embeds" / "step-000003.safetensors")
    found = Concept.load(out / "learned_embeds.safetensors")
    assert torch.equal(found.vectors, best.vectors)
    assert found.metadata["step"] == "3"
    assert not torch.equal(best.vectors, Concept.load(out / "embeds" / "step-000006.safetensors").vectors)


def test_keep_the_last(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [0.1, 0.5, 0.6, 0.7])
    out = run("--eval-every", "1")
    assert torch.equal(learned(out), Concept.load(out / "embeds" / "step-000004.safetensors").vectors)


CURVE = [1.2 + 0.8 * math.exp(-i / 4) + 0.02 * (-1) ** i for i in range(40)]


def stops_after(values: list[float], window: int, threshold: float) -> int | None:
    """DVAR: variance over the last window below threshold times that over the first."""

    def variance(part: list[float]) -> float:
        return sum((v - sum(part) / window) ** 2 for v in part) / window

    for n in range(2 * window, len(values) + 1):
        if variance(values[n - window : n]) < threshold * variance(values[:window]):
            return n
    return None


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.15, 0.5])
@pytest.mark.parametrize("window", [2, 5, 10])
def test_when_to_stop(window: int, threshold: float) -> None:
    expected = stops_after(CURVE, window, threshold)
    watching = Watching(early_stop=threshold, early_stop_window=window)
    found = None
    for n in range(len(CURVE) + 1):
        rows = [{"eval_loss": v} for x in CURVE[:n] for v in (None, x)]
        if RunWord(None, "", Path(), "", torch.zeros(32), rows).has_converged(watching):
            found = n
            break
    assert found == expected


def test_some_of_these_curves_stop_and_at_different_times() -> None:
    steps = {stops_after(CURVE, window, t) for window in (2, 5, 10) for t in (0.01, 0.05, 0.15, 0.5)}
    assert len(steps) >= 4
    assert None in steps


def test_a_run_stops_early(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the evaluation the rule says, with everything saved, and stays so when resumed."""
    pretend(monkeypatch, CURVE)
    expected = 2 * stops_after(CURVE, 5, 0.15)
    assert expected < 60
    more = ["--steps", "60", "--early-stop", "0.15", "--early-stop-window", "5", "--keep", "last"]
    more += ["--sample-every", "50", "--sample-steps", "1"]
    out = run(*more)
    assert len(rows(out / "log.csv")) == expected
    assert [path.name for path in (out / "samples").iterdir()] == [f"step-{expected:06d}.png"]
    assert torch.equal(
        learned(out), Concept.load(out / "embeds" / f"step-{expected:06d}.safetensors").vectors
    )
    pretend(monkeypatch, [])
    run(*more, "--resume")
    assert len(rows(out / "log.csv")) == expected


def test_not_before_the_last_vector_has_learned() -> None:
    for step, expected in ((3, True), (4, False)):
        rows = [{"step": i, "eval_loss": v} for i, v in enumerate((3.0, 1.0, 2.0, None), 1)]
        word = RunWord(None, "", Path(), "", torch.zeros(32), rows)
        watching = Watching(early_stop=0.1, early_stop_window=2)
        word.evaluated(2.0, torch.zeros(1, 32), watching, last_vector=step)
        assert (word.final is not None) == expected


def test_each_word_stops_by_itself(
    run: Callable, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what a separate run has when it stops there; also if interrupted in between."""
    curves = {"a": [2.0, 1.0, *[0.5 + 0.5 * (-1) ** i for i in range(9)]]}
    curves["b"] = [3.0, 1.0, 1.0, 1.0, *[0.1] * 7]
    more = ["--steps", "11", "--eval-every", "1", "--early-stop", "0.5", "--early-stop-window", "2"]
    more += ["--sample-every", "20", "--sample-steps", "1", "--save-every", "3", "--keep", "best"]
    words = [{"name": n, "placeholder": f"<{n}>", "images": str(base / "photos")} for n in "ab"]
    pretend(monkeypatch, *curves.values())
    out = run("--config", write_config(tmp_path, words), *more)

    stop, count = Stop.anywhere, 0

    def after_seven(self: Stop, world: int) -> bool:
        nonlocal count
        count += 1
        return count == 7 or stop(self, world)

    monkeypatch.setattr(Stop, "anywhere", after_seven)
    again = tmp_path / "again"
    for curve in ([c[:7] for c in curves.values()], [c[7:] for c in curves.values()]):
        pretend(monkeypatch, *curve)
        with contextlib.suppress(KeyboardInterrupt):
            run("--config", write_config(tmp_path, words), *more, "--resume", out=again)
    for name, steps in (("a", 11), ("b", 4)):
        pretend(monkeypatch, curves[name])
        alone = run("--placeholder", f"<{name}>", *more, out=tmp_path / f"{name}-alone")
        assert len(log_of(alone)) == steps
        for folder in (out, again):
            torch.testing.assert_close(learned(folder / name), learned(alone), rtol=0, atol=1e-5)
            assert [row["eval_loss"] for row in log_of(folder / name)] == curves[name][:steps]
            words = [Concept.load(out / "learned_embeds.safetensors") for out in (folder / name, alone)]
            assert words[0].metadata == words[1].metadata
            assert (folder / name / "samples" / f"step-{steps:06d}.png").exists()
            assert {p.name for p in (folder / name / "samples").iterdir()} == {
                p.name for p in (alone / "samples").iterdir()
            }
        assert {p.name for p in (out / name / "embeds").iterdir()} == {
            p.name for p in (alone / "embeds").iterdir()
        }
        assert torch.equal(learned(again / name), learned(out / name))
    assert (again / "state.safetensors").read_bytes() == (out / "state.safetensors").read_bytes()


# When it goes wrong
# ----------------------------------------------------------------------------------------------------------


def failed(action: Callable[[], object], capsys: pytest.CaptureFixture) -> str:
    """Exit code 2; the last line of what was said, of which there is one but for progress."""
    with pytest.raises(SystemExit) as status:
        run_command("minti.train", lambda _: action())
    assert status.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_learning_rate_that_is_too_high(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    monkeypatch.setattr(trainer, "write_report", lambda folder, nearest: reports.append(folder))
    said = failed(lambda: run("--lr", "1e30"), capsys)
    assert "minti.train: error: step " in said
    assert "lower the learning rate" in said
    assert reports == [tmp_path / "run"]


def test_a_broken_checkpoint(
    run: Callable, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Noticed before anything is written."""
    shutil.copytree(base / "model", tmp_path / "model")
    (path,) = (tmp_path / "model" / "unet").glob("*.safetensors")
    weights = load_file(path)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, path)
    said = failed(lambda: run("--checkpoint", str(tmp_path / "model")), capsys)
    assert "unet conv_out.bias holds NaN or infinity as float32" in said


def test_weights_that_break_in_use(
    run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def load_poisoned(args: Namespace) -> StableDiffusion:
        sd = load_model(args)
        sd.unet.conv_out.register_forward_hook(lambda module, args, output: output * float("nan"))
        return sd

    monkeypatch.setattr(train, "load_model", load_poisoned)
    said = failed(run, capsys)
    assert "error: step 1: the loss is not finite; probably weights of the checkpoint" in said


def test_the_last_good_vectors_are_kept(
    run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A loss that is no number from step 6 on: saved are vectors that work, and the log until then."""
    losses = Inversion._losses

    def breaking(self: Inversion, samples: list) -> torch.Tensor:
        return losses(self, samples) * (float("nan") if self.step_count >= 5 else 1)

    monkeypatch.setattr(Inversion, "_losses", breaking)
    more = ["--steps", "10", "--save-every", "2", "--eval-every", "0"]
    said = failed(lambda: run(*more), capsys)
    monkeypatch.undo()
    out = Path(said.rsplit(" in ", 1)[1])
    assert "error: step 6: the loss is not finite; probably the learning rate is too high" in said
    assert [row["step"] for row in rows(out / "log.csv")] == [1, 2, 3, 4, 5]
    vectors = learned(out)
    assert vectors.isfinite().all()
    fourth = Concept.load(out / "embeds" / "step-000004.safetensors").vectors
    assert torch.equal(vectors, fourth)  # the loss was last finite for what step 4 had left


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--t-min", "2000"], "t_min 2000, t_max 999: the time steps of this model are 0 to 999"),
        (["--t-min", "2", "--t-max", "1"], "t_max = 1: should be an integer of at least 2"),
        (["--optimizer", "sgd"], "optimizer"),
        (["--kappa", "-1"], "kappa: -1 should be at least 0"),
        (["--average", "0"], "average: 0 should be at least 1"),
        (["--images", "no/such"], "no/such: is not a folder"),
        (["--checkpoint", "no/such"], "no/such"),
        (["--init-word", ""], "--init-word must be given"),
        (["--placeholder", "cat"], "'cat' is a word the model knows"),
        (["--size", "15"], "size 15x15: both sides must be multiples of 2"),
        (["--num-vectors", "0"], "num-vectors"),
        (["--num-vectors", "76"], "num-vectors"),
        (["--steps", "0"], "steps"),
        (["--lr", "-1"], "lr"),
        (["--lr", "fast"], "lr"),
        (["--lr", "nan"], "lr"),
        (["--beta1", "1"], "beta1: 1 should be at least 0 and below 1"),
        (["--beta2", "1"], "beta2: 1 should be at least 0 and below 1"),
        (["--lr", "inf"], "lr: inf should be at least 0 and finite"),
        (["--regularization", "1e38"], "regularization: 1e38 should be at least 0 and at most 1000000.0"),
        (
            ["--batch-size", "1000000000000"],
            "batch-size: 1000000000000 should be at least 1 and at most 4096",
        ),
        (["--size", "512x768"], "photos are trained as squares; give one number"),
        (["--sample-steps", "5000"], "--sample-steps: "),
        (["--placeholder", "emb_params"], "'emb_params' would not be read as a word again"),
        (["--placeholder", "toy.bias"], "'toy.bias' would not be read as a word again"),
        (["--num-vectors", "2", "--progressive", "4"], "progressive 4: should be less than --steps, 4"),
        (["--keep", "best", "--eval-every", "0"], "go by evaluations: give --eval-every"),
        (["--early-stop", "0.1", "--eval-every", "0"], "go by evaluations: give --eval-every"),
        (["--crop", "middle"], "crop"),
        (["--learning-rate", "1"], "unknown option '--learning-rate'"),
        (
            ["--config", "no-such-recipe"],
            "recipes are clip-word, fast, low-memory, object, paper, style, tiny, tiny-all, tune-tiny",
        ),
        (["--device", "tpu"], "device 'tpu'"),
        (["--set", "crop=middle"], "crop"),
        (["--set", "conceps=1"], "did you mean 'concepts'"),
    ],
)
def test_bad_options(flags: list[str], message: str, run: Callable, capsys: pytest.CaptureFixture) -> None:
    said = failed(lambda: run(*flags), capsys)
    assert said.startswith("minti.train: error: ")
    assert message in said


@pytest.mark.parametrize("missing", ["--checkpoint", "--images", "--placeholder", "--out"])
def test_options_that_must_be_given(missing: str, base: Path, tmp_path: Path) -> None:
    argv = arguments(base, tmp_path / "run")
    i = argv.index(missing)
    with pytest.raises(InputError, match=f"{missing} must be given"):
        train.main(argv[:i] + argv[i + 2 :])


# Several words
# ----------------------------------------------------------------------------------------------------------


def write_config(tmp_path: Path, concepts: object, **common: object) -> str:
    (tmp_path / "words.yaml").write_text(yaml.safe_dump({"concepts": concepts} | common))
    return str(tmp_path / "words.yaml")


def test_flags_that_every_word_overrules(
    run: Callable, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [{"name": n, "placeholder": f"<{n}>", "images": str(base / "others")} for n in "ab"]
    run("--config", write_config(tmp_path, words), "--steps", "1")
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    has_no_effect = "has no effect: every entry of concepts in the config has its own"
    assert warned == [f"--images {has_no_effect}", f"--placeholder {has_no_effect}"]  # but --init-word has


def test_several_words(run: Callable, base: Path, tmp_path: Path) -> None:
    """A folder for each, with the vectors of separate runs but for rounding, and one state for all."""
    words = [
        {"name": "a", "placeholder": "<a>", "images": str(base / "photos")},
        {
            "name": "b",
            "placeholder": "<b>",
            "images": str(base / "others"),
            "init_word": "cat",
            "num_vectors": 2,
            "lr": 0.02,
            "seed": 5,
            "templates": "style",
        },
        {"name": "c", "placeholder": "<c>", "images": str(base / "others"), "init": "random", "seed": 6},
    ]
    more = ["--steps", "5", "--sample-every", "5", "--sample-steps", "1", "--keep", "best"]
    out = run("--config", write_config(tmp_path, words), *more)
    top = {p.name for p in out.iterdir()}
    assert top == {"config.yaml", "state.safetensors", "a", "b", "c"}
    for word in words:
        files = {str(p.relative_to(out / word["name"])) for p in (out / word["name"]).rglob("*.*")}
        assert files == {
            "learned_embeds.safetensors",
            "embeds/step-000005.safetensors",
            "samples/step-000005.png",
            "log.csv",
            "inputs.png",
        }
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in word.items() if k != "name"]
        alone = run(*flags, *more, out=tmp_path / f"{word['name']}-alone")
        together = Concept.load(out / word["name"] / "learned_embeds.safetensors")
        assert together.placeholder == word["placeholder"]
        torch.testing.assert_close(together.vectors, learned(alone), rtol=0, atol=1e-5)
        for a, b in zip(log_of(out / word["name"]), log_of(alone), strict=True):
            assert [v is None for v in a.values()] == [v is None for v in b.values()]
            assert [v or 0 for v in a.values()] == pytest.approx([v or 0 for v in b.values()], rel=1e-4)
        assert (out / word["name"] / "inputs.png").read_bytes() == (alone / "inputs.png").read_bytes()


def test_several_words_go_on(
    run: Callable, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [{"name": n, "placeholder": f"<{n}>", "images": str(base / "photos")} for n in "ab"]
    config = write_config(tmp_path, words)
    expected = run("--config", config, out=tmp_path / "expected")
    monkeypatch.setattr(Stop, "anywhere", lambda self, world: True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("--config", config, "--resume")
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "write_report", lambda *_: None)
    out = run("--resume")  # nothing but the folder is needed
    for name in "ab":
        assert torch.equal(learned(out / name), learned(expected / name))
        assert log_of(out / name) == log_of(expected / name)
    assert (out / "state.safetensors").read_bytes() == (expected / "state.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "fast"}, "lr"),
        ({"lr": -1}, "lr"),
        ({"num_vectors": 0}, "num-vectors"),
        ({"seed": "x"}, "seed"),
        ({"init": "words"}, "init"),
        ({"images": None}, "images"),
        ({"images": "no/such"}, "no/such: is not a folder"),
        ({"name": ".."}, "name '..'"),
        ({"name": "a/b"}, "name 'a/b'"),
        ({"name": ""}, "name ''"),
        ({"name": 1.10}, "name 1.1 is no text in YAML; put it between quotes"),
        ({"name": "con.1"}, "name 'con.1'"),
        ({"name": "First"}, "same name"),
        ({"placeholder": 83}, "placeholder: 83 is no text in YAML"),
        ({"name": "first"}, "same name"),
        *(({"name": name}, f"name '{name}'") for name in ("state.safetensors", "config.yaml", "embeds")),
        ({"steps": 5}, "unknown key 'steps'"),
        ({7: 5}, "unknown key '7'"),
        ({"templates": ["a {}"]}, "templates"),
    ],
)
def test_bad_entries_of_concepts(
    changes: dict, message: str, run: Callable, base: Path, tmp_path: Path
) -> None:
    good = {"images": str(base / "photos")}
    words = [
        good | {"name": "first", "placeholder": "<first>"},
        good | {"name": "second", "placeholder": "<second>"} | changes,
    ]
    if changes == {"images": None}:
        words[1].pop("images")
    argv = arguments(base, tmp_path / "run", "--config", write_config(tmp_path, words))
    i = argv.index("--images")
    with pytest.raises(InputError) as error:
        train.main(argv[:i] + argv[i + 2 :])
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["<toy>", "cat"])
def test_several_seeds_of_a_word(word: str, run: Callable, base: Path, tmp_path: Path) -> None:
    """Each entry learns for itself, and is saved under the one name."""
    words = [{"name": f"seed-{s}", "placeholder": w, "seed": s} for s, w in enumerate((word, word.upper()))]
    more = ["--replace-word", "--per-image", "0.5", "--sample-every", "4", "--sample-steps", "1"]
    out = run("--config", write_config(tmp_path, words), *more)
    for entry in words:
        folder = out / entry["name"]
        alone = run(f"--placeholder={word}", f"--seed={entry['seed']}", *more, out=tmp_path / entry["name"])
        assert Concept.load(folder / "learned_embeds.safetensors").placeholder == entry["placeholder"]
        torch.testing.assert_close(learned(folder), learned(alone), rtol=0, atol=1e-5)
        with Image.open(folder / "samples" / "step-000004.png") as image:
            assert json.loads(image.text["prompts"]) == [f"a photo of {entry['placeholder']}"]
    assert (learned(out / "seed-0") - learned(out / "seed-1")).abs().max() > 1e-3


@pytest.mark.parametrize("concepts", [[], "toy", {"name": "a"}, ["a"], [None]])
def test_concepts_that_are_no_list_of_words(concepts: object, run: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="concepts: should list entries like"):
        run("--config", write_config(tmp_path, concepts))


# Several processes
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "direction"])
def test_two_processes(optimizer: str, run: Callable, base: Path, tmp_path: Path) -> None:
    """With the same batch in all, the vectors of one process up to 1e-5: sums in another order."""
    more = ["--num-vectors", "2", "--scale-lr", "--lr", "0.001", "--regularization", "0.01", "--steps", "5"]
    more += ["--per-image", "0.5", "--keep", "best", "--sample-every", "5", "--sample-steps", "1"]
    more += ["--average", "2", "--optimizer", optimizer]
    two = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "minti.train", *arguments(base, two, *more)]
    command += ["--batch-size", "1", "--accumulate", "2"]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    one = run(*more, "--batch-size", "4")
    torch.testing.assert_close(learned(two), learned(one), rtol=0, atol=1e-5)
    moved = learned(one) - initial_rows(minti.load(base / "model", device="cpu"), "word", "red toy", 2)
    assert moved.abs().max() > 0.005
    for a, b in zip(log_of(two), log_of(one), strict=True):
        assert {k: a[k] for k in ("step", "lr")} == {k: b[k] for k in ("step", "lr")}
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert {p.name for p in two.iterdir()} - {"report.html"} == {p.name for p in one.iterdir()}
    for text in ("<toy>: 2 photos, 4 views", "5/5 steps"):
        assert result.stderr.count(text) == 1  # said once, not by each process
    images = [np.asarray(Image.open(out / "samples" / "step-000005.png")).astype(int) for out in (two, one)]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_the_model_is_not_touched(run: Callable, base: Path) -> None:
    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in (base / "model").rglob("*") if p.is_file()}

    before = files()
    run()
    assert files() == before


def test_nearest_words(base: Path) -> None:
    """For the report: the words of the vocabulary with the largest cosine, by plain arithmetic."""
    sd: StableDiffusion = minti.load(base / "model", device="cpu")
    table = sd.text_encoder.token_embedding.weight.clone()
    ids = sd.tokenizer.encode("cat toy")
    vectors = table[ids] * torch.tensor([[3.0], [0.5]])
    sd.add_concept(Concept("<toy>", vectors))  # which is no word of the vocabulary
    nearest = nearest_words(sd, vectors, 3)
    assert [len(words) for words in nearest] == [3, 3]
    assert [words[0][0] for words in nearest] == ["cat</w>", "toy</w>"]
    for words, vector in zip(nearest, vectors, strict=True):
        cosines = sorted((torch.dot(vector, row) / vector.norm() / row.norm()).item() for row in table)
        assert [c for _, c in words] == pytest.approx(cosines[:-4:-1], abs=1e-5)
