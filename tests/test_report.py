"""The report of a run: numbers against logs made by hand, and the page against a parser."""

import base64
import io
import os
import re
import shlex
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from minti import sample
from minti.cli.svg import Point, chart, scatter, short
from minti.formats.concept import Concept
from minti.runs.folder import RunRecord as Run
from minti.runs.report import write_report
from minti.runs.verdict import advice, command_line, trend, trend_of, verdict, warnings

COLUMNS = "step,loss,eval_loss,lr,norm,cosine,seconds"
CONFIG = {"placeholder": "<toy>", "init_word": "toy", "checkpoint": "my weights/sd", "lr": 0.004, "steps": 8}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects them and the text that is seen."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text, self.commands = [], [], "", []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "pre":
            self.commands.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "pre" in self.open:
            self.commands[-1] += data


def log_rows(evals, norm=1.3, cosine=0.8):
    return [
        f"{step},0.2,{'' if loss is None else loss},0.004,{norm},{cosine},0.5"
        for step, loss in enumerate(evals, 1)
    ]


@pytest.fixture
def make(tmp_path):
    """Make a run's folder out of the parts that are given."""

    def make(evals=None, *, config=CONFIG, word=None, previews=(), name="my toy", **values):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if evals is not None:
            (folder / "log.csv").write_text("\n".join([COLUMNS, *log_rows(evals, **values)]) + "\n")
        if word is not None:
            Concept(word, torch.ones(values.get("num_vectors", 2), 8)).save(
                folder / "learned_embeds.safetensors"
            )
        for step in previews:
            Image.new("RGB", (16, 4), (step % 256, 0, 0)).save(folder / f"samples/step-{step:06d}.png")
        return folder

    return make


def page_of(folder, nearest=()):
    write_report(folder, nearest)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


FALLING = [0.5, 0.48, 0.46, 0.44, 0.42, 0.4, 0.38, 0.36]
FLAT = [0.5, 0.42, 0.405, 0.402, 0.401, 0.4, 0.401, 0.402]
RISING = [0.5, 0.42, 0.4, 0.41, 0.42, 0.43, 0.44, 0.45]
FAILED = [0.5, 0.501, 0.499, 0.502, 0.51, 0.52, 0.53, 0.54]


@pytest.mark.parametrize(
    "losses, kind, words",
    [
        (FALLING, "falling", ["still learning", "from 0.5 to 0.36", "step 8"]),
        (FLAT, "flat", ["from 0.5 to 0.4", "best at step 6", "since step 3"]),
        (RISING, "rising", ["Best at step 3", "from 0.5 to 0.4", "rose to 0.45"]),
        (FAILED, "failed", ["No progress", "0.5 at step 1", "0.499", "0.54"]),
        ([0.5, 0.4], "short", ["0.5 to 0.4"]),
    ],
)
def test_verdict(make, losses, kind, words):
    assert trend(np.arange(1, len(losses) + 1), np.array(losses)).kind == kind
    folder = make(losses)
    text = verdict(Run(folder))
    assert all(word in text for word in words), text
    assert text in page_of(folder).text


def test_evaluations_between_other_steps(make):
    folder = make([None, 0.5, None, 0.47, None, 0.44, None, 0.4])
    t = trend_of(Run(folder))
    assert (t.kind, t.first, t.first_step, t.best, t.best_step) == ("falling", 0.5, 2, 0.4, 8)
    assert "−20.0 % since step 2" in page_of(folder).text  # noqa: RUF001


def test_numbers_in_the_tiles(make):
    text = page_of(make(FLAT, norm=1.34, cosine=0.5)).text
    for part in ("1.3 times", "turned by 60°", "4.0 s", "8 steps, median 0.5 s"):
        assert part in text


def test_long_vectors(make):
    assert warnings(Run(make(FLAT, norm=4.9, name="a"))) == []
    run = Run(make(FLAT, norm=7.25, name="b"))
    assert "7.2 times" in warnings(run)[0]
    command = next(command for _, command in advice(run) if "minti.train" in command)
    assert "--lr 0.002 --max-norm 3" in command


def test_vectors_that_have_not_moved(make):
    run = Run(make(FAILED, cosine=0.999))
    assert "point where they started" in warnings(run)[0]
    assert any("--lr 0.02" in command for _, command in advice(run))


def test_the_command_is_one_that_sample_takes(make):
    folder = make(FLAT, word="<it's>", config=CONFIG | {"size": 64, "ema": True, "variant": "fp16"})
    command = shlex.split(page_of(folder).commands[0])
    assert command[:3] == ["python", "-m", "minti.sample"]
    args = sample.options().parse(command[3:], required=["checkpoint", "prompt", "out"])
    assert args.checkpoint == "my weights/sd"
    assert args.concept == [str(folder / "learned_embeds.safetensors")]
    assert args.prompt == ["a photo of <it's> on the beach"]
    assert (args.size, args.ema, args.variant) == (64, True, "fp16")


def test_style_prompt(make):
    run = Run(make(FLAT, word="<ink>", config=CONFIG | {"templates": "style"}))
    assert "in the style of <ink>" in advice(run)[0][1]


def test_the_best_saved_step(make):
    folder = make(RISING)
    (folder / "embeds").mkdir()
    for step in (2, 6, 8):
        (folder / f"embeds/step-{step:06d}.safetensors").touch()
    (folder / "embeds/notes.safetensors").touch()
    commands = page_of(folder).commands
    assert any("step-000002.safetensors" in command for command in commands)
    assert any("--lr 0.002 --keep best" in command for command in commands)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"keep": "best"}))
    page = page_of(folder)
    assert not any("step-000002" in command for command in page.commands)
    assert "its vectors at step 3, the best" in page.text


def test_more_steps_and_interruption(make):
    finished = advice(Run(make(FALLING, name="a")))
    assert any("--steps 16" in command for _, command in finished)
    folder = make(FALLING, name="b", config=CONFIG | {"steps": 20})
    text, command = next((t, c) for t, c in advice(Run(folder)) if "--resume" in c)
    assert "step 8 of 20" in text
    assert shlex.split(command) == ["python", "-m", "minti.train", "--out", str(folder), "--resume"]
    assert not any("--steps" in command for _, command in advice(Run(folder)))


def test_one_word_of_several(make):
    folder = make(RISING, config=None, name="two/cat")
    entries = [{"name": "dog", "placeholder": "<dog>", "lr": 1}, {"name": "cat", "placeholder": "<cat>"}]
    config = CONFIG | {"concepts": entries, "steps": 20}
    (folder.parent / "config.yaml").write_text(yaml.safe_dump(config))
    page = page_of(folder)
    assert "<cat>" in page.text and "<dog>" not in page.text
    assert any(
        f"--out '{folder.parent}' --resume" in c or f"--out {folder.parent} " in c for c in page.commands
    )
    assert not any("--keep" in command for command in page.commands)


def test_escaping_and_no_outside(make):
    nasty = "<script>alert('&\"')</script>"
    config = CONFIG | {"init_word": nasty, nasty: nasty, "sample_prompt": [f"{nasty} {{}}"]}
    folder = make(RISING, config=config, word=nasty, previews=[2])
    Image.new("RGB", (8, 8)).save(folder / "inputs.png")
    page = page_of(folder, [[(nasty, 0.5)], [("toy</w>", 0.25)]])
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "base", "form"}
    assert page.text.count(nasty) >= 8
    assert "toy 0.25" in page.text and "vector 2" in page.text
    for tag, attrs in page.elements:
        for key, value in attrs.items():
            assert not key.startswith("on")
            assert key not in ("src", "href") or value.startswith("data:image/")
        assert tag != "img" or attrs["alt"]
        assert tag != "svg" or attrs["aria-label"]
    assert not re.search(r"url\(|@import|https?:", (folder / "report.html").read_text())


def test_previews(make):
    folder = make(FLAT, previews=range(1, 31))
    page = page_of(folder)
    alts = [attrs["alt"] for tag, attrs in page.elements if tag == "img"]
    assert len(alts) == 10 and alts[0].endswith("step 30") and alts[-1].endswith("step 1")
    assert "10 of 30" in page.text
    source = next(attrs["src"] for tag, attrs in page.elements if tag == "img")
    image = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
    assert image.format == "PNG" and image.getpixel((0, 0)) == (30, 0, 0)


def test_large_pictures_are_made_small(make):
    folder = make(FLAT)
    noise = np.random.default_rng(0).integers(0, 256, (512, 4096, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "inputs.png")
    write_report(folder, [])
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_long_log_stays_small(make):
    folder = make([0.5 - i / 1e5 if i % 100 == 0 else None for i in range(20_000)])
    write_report(folder, [])
    assert (folder / "report.html").stat().st_size < 200_000


@pytest.mark.parametrize("config", [None, {}, CONFIG])
@pytest.mark.parametrize("evals", [None, [], [None], [0.5]])
def test_missing_pieces(make, config, evals):
    page = page_of(make(evals, config=config))
    sections = [title for title in ("Previews", "Photos", "Nearest") if title in page.text]
    assert sections == []
    assert ("Curves" in page.text) == bool(evals)
    assert ("Settings" in page.text) == bool(config)


def test_damaged_pieces(make):
    folder = make(FLAT, previews=[1])
    with (folder / "log.csv").open("a") as file:
        file.write("9,0.2,nan,oops,inf,0.7\n10")
    for name in ("inputs.png", "samples/step-000002.png", "learned_embeds.safetensors"):
        (folder / name).write_bytes(b"half a fi")
    (folder / "config.yaml").write_text("steps: [")
    page = page_of(folder)
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 1
    assert Run(folder).final("cosine") == 0.7 and Run(folder).last_step == 10


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with a name")
def test_pictures_that_are_pipes_are_left_out(make):
    """Opening one would wait for a writer, and the command for ever."""
    folder = make(FLAT)
    os.mkfifo(folder / "inputs.png")
    os.mkfifo(folder / "samples" / "step-000001.png")
    assert not [tag for tag, _ in page_of(folder).elements if tag == "img"]


def test_a_picture_cut_in_its_header_and_a_prompt_that_is_a_number(make):
    folder = make(FLAT, previews=[1])
    path = folder / "inputs.png"
    good = io.BytesIO()
    Image.new("RGB", (8, 8)).save(good, "PNG")
    # The length of the first chunk says 5 bytes, of 13: Pillow raises ValueError while it opens the file.
    path.write_bytes(good.getvalue()[:8] + b"\0\0\0\5" + good.getvalue()[12:])
    (folder / "config.yaml").write_text("steps: 9\nsample_prompt: 5\n")
    page = page_of(folder)
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 1
    assert "a photo of " in page.text


def path_points(svg, name):
    path = re.search(rf'<path class="{name}" d="M([^"]*)"', svg)[1]
    return np.array([point.split() for point in re.split("h0M|L", path.removesuffix("h0"))], dtype=float)


def test_chart_is_to_scale():
    steps, values = np.arange(1.0, 11.0), np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3.5])
    svg = chart("Loss", (steps, values))
    x, y = path_points(svg, "line").T
    # Rounded to 0.1 pixel: linear fits must leave no more than that.
    for pixels, numbers in ((x, steps), (y, values)):
        slope, offset = np.polyfit(numbers, pixels, 1)
        assert np.abs(slope * numbers + offset - pixels).max() < 0.1
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)
    slope, offset = np.polyfit(values, y, 1)
    assert len(labels) >= 4
    for pixel, label in labels:
        assert abs(slope * float(label) + offset + 4 - float(pixel)) < 0.2


def test_chart_takes_logarithms_of_wide_ranges_only():
    steps = np.arange(1.0, 5.0)
    assert "Logarithmic" not in chart("a", (steps, np.array([1.0, 2, 3, 29])), log=True)
    assert "Logarithmic" not in chart("a", (steps, np.array([0.0, 2, 3, 900])), log=True)
    svg = chart("a", (steps, np.array([0.01, 0.1, 1, 10])), log=True)
    y = path_points(svg, "line")[:, 1]
    assert "Logarithmic" in svg and np.abs(np.diff(y, 2)).max() < 0.25


def test_running_median_sees_through_outliers():
    values = np.full(200, 0.5)
    values[::10] = 4.0
    svg = chart("Loss", (np.arange(1.0, 201.0), values), dots=True)
    assert np.ptp(path_points(svg, "line")[:, 1]) == 0
    assert np.ptp(path_points(svg, "dots")[:, 1]) > 100


def test_short_numbers():
    assert [short(v) for v in (3000, 0.1103, 5e-5, 2, 1.5e-10)] == ["3,000", "0.11", "5e-5", "2", "1.5e-10"]


def test_control_characters_leave_a_plot_valid():
    svg = scatter("a", "x", "y\x1b", [Point(0.5, 0.5, "<toy>\x07\x9b")])
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert any(text.startswith("<toy>\N{REPLACEMENT CHARACTER}") for text in texts)


def test_commands_for_windows():
    parts = [
        "python",
        "-m",
        "minti.sample",
        "--concept",
        "C:\\my runs\\toy",
        "--prompt",
        "a <toy>",
        "--out",
        "b\\c",
    ]
    expected = 'python -m minti.sample --concept "C:\\my runs\\toy" --prompt "a <toy>" --out b\\c'
    assert command_line(parts, windows=True) == expected
    assert shlex.split(command_line(parts, windows=False)) == parts
