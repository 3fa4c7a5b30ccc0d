"""The benchmark: that it compares the same work, counts it right, and reports what it measured."""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from minti.errors import InputError
from minti.formats.vocabulary import read_tokenizer
from minti.judge.prompts import PromptList, load_prompts
from minti.model.config import TextConfig, UNetConfig, VAEConfig
from tools.bench import main
from tools.benchmark import floor, ours, parts, quality, theirs
from tools.benchmark.jobs import Job
from tools.benchmark.models import MODELS, build, write_checkpoint, write_tokenizer
from tools.benchmark.quality import Measured, overtakes
from tools.benchmark.quality import to_markdown as quality_table
from tools.benchmark.table import rows, to_markdown

from . import oracles

TINY = Path(__file__).parents[1] / "weights" / "tiny"
FEW = ["--small", "--device", "cpu", "--size", "32", "--steps", "2", "--repeats", "2"]
SD15 = Job("sd-1.5", "", "", "cpu", "float32", batch_size=1, size=512, steps=50)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict]]:
    """Run the command at its smallest: what it writes with --out."""
    path = tmp_path_factory.mktemp("bench") / "out.json"

    def run(*argv: str) -> dict:
        main([*FEW, *argv, "--out", str(path)])
        return json.loads(path.read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floor, "SIDE", 64)
        axes = {"batch_size": (1, 2), "concepts": (2,), "vectors": (2,), "size": (0.5,), "steps": (0.5,)}
        patch.setattr(parts, "SMALL_AXES", axes)
        for key in (
            "TRANSFORMERS_VERBOSITY",
            "DIFFUSERS_VERBOSITY",
            "HF_HUB_OFFLINE",
            "TORCHINDUCTOR_CACHE_DIR",
        ):
            patch.setenv(key, os.environ.get(key, ""))  # so that it is put back at the end
        yield run


@pytest.fixture(scope="module")
def report(bench) -> dict:
    return bench("--only", "train", "sample", "scaling")


def test_every_row_is_there(report):
    found = {(row["part"], row["what"], row["contender"]) for row in report["rows"]}
    both = ("minti", "diffusers")
    whats = {"train": ["training step"], "sample": ["picture", "sampling step", "decoding"]}
    axes = ("batch 1", "batch 2", "vectors 2", "size 16")
    whats["scaling"] = [*(f"training step, {axis}" for axis in axes), "picture, steps 1"]
    expected = {(part, what, name) for part in whats for what in whats[part] for name in both}
    # One process of the peer learns one word.
    expected.add(("scaling", "training step, concepts 2", "minti"))
    assert found == expected
    assert len(report["rows"]) == len(expected)


def test_numbers_follow_from_what_was_measured(report):
    by_key = {(row["part"], row["what"], row["contender"]): row for row in report["rows"]}
    for (part, what, name), row in by_key.items():
        assert len(row["values"]) == 2
        assert min(row["values"]) > 0
        assert row["median"] == median(row["values"])
        assert row["minimum"] == min(row["values"])
        peer = by_key.get((part, what, "diffusers"))
        if name == "diffusers" or not peer:
            assert row["peer_ratio"] is None
        else:
            assert row["peer_ratio"] == peer["median"] / row["median"]
        job = Job(
            row["model"], "", "", "cpu", row["dtype"], row["batch_size"], row["size"], row["steps"] or 2
        )
        words = int(what.split()[-1]) if "concepts" in what else 1
        count = words * floor.needed(job)[what.partition(",")[0]]
        assert row["floor"] == pytest.approx(count / report["matrix product, FLOP/s"]["float32"])
        assert row["floor_ratio"] == row["median"] / row["floor"]
    first = by_key["scaling", "training step, batch 1", "minti"]
    second = by_key["scaling", "training step, batch 2", "minti"]
    assert (first["growth"], second["growth"]) == (1, second["median"] / first["median"])


def test_both_sides_did_the_same(report):
    """As in tests of parity: float32, so nothing but the order of sums differs."""
    training = [check for check in report["differences"] if "loss" in check]
    sampling = [check for check in report["differences"] if "latents" in check]
    assert (len(training), len(sampling)) == (5, 2)
    assert all(check["loss"] < 1e-5 and check["way"] < 1e-3 for check in training)
    assert all(check["latents"] < 1e-4 for check in sampling)
    cases = {(check["batch_size"], check["vectors"], check["size"]) for check in training}
    assert cases == {(1, 1, 32), (2, 1, 32), (1, 2, 32), (1, 1, 16)}


def test_other_work_is_not_compared(bench, monkeypatch, tmp_path):
    """A peer that has taken its pictures the wrong way round is found out, and nothing is written."""
    read = theirs.Training._read
    monkeypatch.setattr(
        theirs.Training, "_read", lambda self, photo, mirrored: read(self, photo, not mirrored)
    )
    with pytest.raises(InputError, match="minti and diffusers do not compute the same: loss"):
        bench("--only", "train")


@pytest.mark.slow
def test_memory(bench):
    report = bench("--only", "memory", "--repeats", "1")
    found = [(row["what"], row["unit"], row["contender"]) for row in report["rows"]]
    assert found == [
        ("memory, training", "GiB", "minti"),
        ("memory, training", "GiB", "diffusers"),
        ("memory, training", "GiB", "minti, checkpointing"),
        ("memory, sampling", "GiB", "minti"),
        ("memory, sampling", "GiB", "diffusers"),
    ]
    assert all(0.05 < row["median"] < 4 for row in report["rows"])  # torch and a model of 15 MB


def test_without_peers(bench, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    report = bench("--only", "load", "attention", "--repeats", "1")
    assert 'pip install -e ".[bench]"' in capsys.readouterr().err
    found = [(row["what"], row["unit"], row["contender"]) for row in report["rows"]]
    assert found == [("loading", "s", "minti"), ("loading and looking", "s", "minti")]
    assert all(row["floor"] is None for row in report["rows"])
    assert report["machine"]["torch"] and report["settings"]["size"] == 32


def test_operations_of_sd15():
    """Known counts, in multiply-adds of one picture of 512 pixels."""
    ops = floor.operations("sd-1.5", 512)
    found = [count / 2e9 for count in vars(ops).values()]
    assert found == pytest.approx([401.6, 834.6, 6.65, 13.4, 1257], rel=2e-3)
    step = floor.needed(SD15)["training step"]
    assert step == pytest.approx(1.70e12, rel=5e-3)
    many = floor.needed(Job("sd-1.5", "", "", "cpu", "float32", batch_size=4, size=512, steps=1, concepts=3))
    assert many["training step"] == 12 * step
    assert many["picture"] == pytest.approx(2 * (4 * (2 * 401.6 + 1257) + 2 * 6.65) * 1e9, rel=2e-3)


def test_both_sides_load_the_same(tmp_path):
    """Up to the names that transformers gives to the text encoder's weights."""
    write_checkpoint("tiny", tmp_path / "tiny")
    job = Job("tiny", str(tmp_path / "tiny"), "", "cpu", "float32", batch_size=1, size=32, steps=1)
    for ours_module, theirs_module in zip(ours.load(job), theirs.load(job), strict=True):
        found, expected = (
            sorted(p.double().sum() for p in m.parameters()) for m in (ours_module, theirs_module)
        )
        assert found == expected


def test_attention_of_sd15():
    """Where it attends, and with how wide heads, is well known: 4096 x 40 down to 64 x 160."""
    shapes = parts.attention_shapes(SD15)
    queries = {(1, 8, 4096, 40), (1, 8, 1024, 80), (1, 8, 256, 160), (1, 8, 64, 160)}
    assert {shape for shape, _, gradients in shapes if gradients} == queries
    assert {shape for shape, _, gradients in shapes if not gradients} == {(2, *q[1:]) for q in queries}
    assert all(keys in (shape[2], 77) for shape, keys, _ in shapes)
    assert len(shapes) == 16


def test_attention_table(monkeypatch):
    """All but the kernel itself, which runs on a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr("minti.model.kernels.operator.supports", lambda q, k, v: q.shape[3] != 40)
    monkeypatch.setattr(parts, "attention_seconds", lambda *case: {"sdpa": 3.0, "triton": 2.0})
    job = replace(SD15, dtype="bfloat16", size=64)
    bench = SimpleNamespace(args=SimpleNamespace(device="cuda"), jobs=lambda: [job])
    (table,) = parts.attention(bench)
    assert len(table) == 2 * (16 - 4)
    lines = to_markdown(table).splitlines()
    assert "| sdpa / this |" in lines[0]
    assert any("1x8x16x80 to 77, and back (" in line and line.endswith("| 1.50 x |") for line in lines)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "scheduler"])
def test_sd15_is_the_published_one(part):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    published = json.loads(oracles.shared(f"configs/sd15/{part}/{name}").read_text())
    ours = MODELS["sd-1.5"][part]
    same = {key for key in ours.keys() & published.keys() if not key.startswith("_")}
    differing = {key: (ours[key], published[key]) for key in same if ours[key] != published[key]}
    assert differing.keys() <= {"pad_token_id", "bos_token_id", "eos_token_id"}
    assert len(same) > 5


@pytest.mark.parametrize("part", MODELS["tiny"])
def test_tiny_is_the_shipped_one(part):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    shipped = json.loads((TINY / part / name).read_text())
    # Random latents need no scaling; it costs no time.
    assert MODELS["tiny"][part] | {"scaling_factor": 0} == shipped | {"scaling_factor": 0}


def test_sd15_is_what_minti_takes_for_it(tmp_path):
    """The defaults of the config classes are SD 1.x; and its vocabulary."""
    with torch.device("meta"):
        assert build("sd-1.5", "unet").config == UNetConfig()
        assert build("sd-1.5", "vae").config == VAEConfig()
        assert build("sd-1.5", "text_encoder").config == TextConfig()
    write_tokenizer("sd-1.5", tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    assert len(tokenizer) == 49408
    assert len(tokenizer.encode("toy")) == 1


def test_quality(bench, capsys, monkeypatch):
    """The smallest run: every word is measured."""
    few = PromptList(load_prompts("tiny-development").prompts[:2])
    monkeypatch.setattr(quality, "load_prompts", lambda name: few)
    ways = ["minti", "direction", "per layer", "diffusers"]
    flags = ["--ways", *ways, "--concepts", "1", "--seeds", "1", "--at", "2"]
    flags += ["--peer-steps", "3", "--samples", "4", "--num-images", "1", "--steps", "1"]
    rows = bench("--only", "quality", *flags)["rows"]
    expected = [("start", 0), *((way, 2) for way in ways), ("diffusers", 3)]
    assert [(row["way"], row["steps"]) for row in rows] == expected
    for row in rows:
        assert 0 < row["loss"] < 1 and 0 <= row["kept"] <= 1 and 0 <= row["followed"] <= 1
        assert -1 <= row["clip_i"] <= 1 and row["concept"] == rows[0]["concept"]
        assert row["length"] == pytest.approx(1, abs=0.2 if row["way"] != "direction" else 1e-5)
    assert len({row["loss"] for row in rows}) == len(rows)
    assert "minti: loss of the peer after 3 steps" in capsys.readouterr().out


def test_when_the_peer_is_overtaken():
    def word(way: str, steps: int, loss: float, kept: float, seed: int = 0) -> Measured:
        return Measured(way, "thing", seed, steps, steps / 10, loss, kept, 0.5, 0.5, 0.5, 1.0)

    found = [word("diffusers", 10, 0.3, 0.9), word("diffusers", 100, 0.2, 0.6)]
    found += [word("minti", 5, 0.25, 0.6), word("minti", 20, 0.18, 0.7), word("minti", 20, 0.20, 0.7, 1)]
    said = overtakes(found).splitlines()
    assert said[0] == (
        "minti: loss of the peer after 100 steps (0.2000): after 20 steps, 2.0 s (5 and 5 times less)"
    )
    assert "kept of the peer after 100 steps (0.6000): after 5 steps, 0.5 s" in said[1]
    assert overtakes(found[2:]) == ""
    assert "| minti | 20 | 2.0 | 0.1900 ± 0.0100 | 0.700 ± 0.000 |" in quality_table(found)


def test_table():
    found = {"picture": {"minti": [2.0, 1.0, 4.0], "diffusers": [6.0, 5.0, 7.0]}}
    table = rows("sample", SD15, found, first={"picture": {"minti": 12.0}}, floors={"picture": 1.6})
    assert to_markdown(table).splitlines() == [
        "| what | model | px | batch | steps | dtype | contender | median | min | first time "
        "| diffusers / this | this / floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| picture | sd-1.5 | 512 | 1 | 50 | float32 | minti | 2.00 s | 1.00 s | 12.0 s | 3.00 x | 1.25 x |",
        "| picture | sd-1.5 | 512 | 1 | 50 | float32 | diffusers | 6.00 s | 5.00 s |  |  | 3.75 x |",
    ]


def test_bad_option():
    with pytest.raises(InputError, match="--only"):
        main(["--only", "everything"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="there is no GPU"):
            main(["--device", "cuda"])
