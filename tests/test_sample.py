"""`python -m minti.sample`: the files it writes, and that they tell how to make them again."""

import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import minti
import minti.evaluate
import minti.study.__main__
from minti import Concept, InputError
from minti.formats.vocabulary import read_tokenizer
from minti.judge.scorer import Scorer
from minti.sample import Picture, main, notices, plan_pictures, write_grids

from .compare import assert_same_picture
from .oracles import save_clip

ROOT = Path(minti.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(small_checkpoint: Path) -> Path:
    return small_checkpoint


@pytest.fixture
def word(tmp_path: Path) -> Path:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    Concept("<toy>", vectors).save(tmp_path / "word.safetensors")
    return tmp_path / "word.safetensors"


def sample(folder: Path, out: Path, *argv: str) -> Path:
    main(["--checkpoint", str(folder), "--out", str(out), "--steps", "2", "--device", "cpu", *argv])
    return out


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_pictures_grid_and_config(folder: Path, tmp_path: Path) -> None:
    argv = ["--prompt", "A photo of the Cat!", "--prompt", "dog", "--num-images", "2", "--seed", "5"]
    out = sample(folder, tmp_path / "new" / "out", *argv)
    pictures = ["a-photo-of-the-cat-5.png", "a-photo-of-the-cat-6.png", "dog-5.png", "dog-6.png"]
    assert names(out) == sorted([*pictures, "grid.png", "config.yaml"])
    sd = minti.load(folder, device="cpu")
    images = sd.sample(["A photo of the Cat!", "dog"], steps=2, seed=5, num_images=2)
    for name, image in zip(pictures, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(out / name)), np.asarray(image))
        assert image.size == (16, 16)
    grid = np.asarray(Image.open(out / "grid.png"))
    rows = [np.concatenate([np.asarray(i) for i in images[r : r + 2]], axis=1) for r in (0, 2)]
    assert np.array_equal(grid, np.concatenate(rows))
    for path in out.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444  # not the private mode of temporary files


def test_the_pictures_do_not_depend_on_the_batch(folder: Path, tmp_path: Path) -> None:
    """One by one or together: the same picture, up to rounding of a different order of sums."""
    argv = ["--prompt", "cat", "--num-images", "3"]
    one = sample(folder, tmp_path / "one", *argv, "--batch-size", "1")
    all_ = sample(folder, tmp_path / "all", *argv, "--batch-size", "3")
    for i in range(3):
        a, b = (np.asarray(Image.open(out / f"cat-{i}.png")).astype(int) for out in (one, all_))
        assert np.abs(a - b).max() <= 1


def test_png_metadata(folder: Path, word: Path, tmp_path: Path) -> None:
    argv = ["--prompt", "a <toy> — 猫 & “dog”", "--negative-prompt", "blurry", "--concept", str(word)]
    argv += ["--num-images", "1", "--seed", "7", "--guidance-scale", "3", "--eta", "0.5", "--size", "32x16"]
    out = sample(folder, tmp_path / "out", *argv)
    (path,) = [p for p in out.glob("*.png") if p.name != "grid.png"]
    assert path.name == "a-toy-猫-dog-7.png"
    text = Image.open(path).text
    assert text["prompt"] == "a <toy> — 猫 & “dog”"
    assert text["seed"] == "7"
    assert text["software"] == f"minti {minti.__version__}"
    settings = json.loads(text["settings"])
    expected = {"steps": 2, "guidance_scale": 3.0, "eta": 0.5, "width": 32, "height": 16}
    assert expected | {"negative_prompt": "blurry", "checkpoint": str(folder)} == {
        key: settings[key] for key in (*expected, "negative_prompt", "checkpoint")
    }
    assert json.loads(text["concepts"]) == {"<toy>": Concept.load(word).digest}


def test_a_picture_can_be_made_again_from_its_metadata(folder: Path, tmp_path: Path) -> None:
    out = sample(folder, tmp_path / "out", "--prompt", "the cat", "--num-images", "2", "--eta", "1")
    image = Image.open(out / "the-cat-1.png")
    settings = json.loads(image.text["settings"])
    sd = minti.load(settings["checkpoint"], device="cpu")
    (again,) = sd.sample(
        image.text["prompt"],
        seed=int(image.text["seed"]),
        size=(settings["width"], settings["height"]),
        **{key: settings[key] for key in ("steps", "guidance_scale", "eta", "negative_prompt")},
    )
    difference = np.asarray(again).astype(int) - np.asarray(image).astype(int)
    assert np.abs(difference).max() <= 1  # made alone here, in a batch of two there


def test_config_yaml_makes_the_same_bytes(folder: Path, word: Path, tmp_path: Path) -> None:
    argv = ["--prompt", "a <toy>: yes, 'no' # \"cat\"", "--prompt", "-- on", "--concept", f"<pet>={word}"]
    argv += ["--concept", str(word), "--num-images", "2", "--seed", "3", "--size", "16x32"]
    argv += ["--negative-prompt", "off", "--guidance-scale", "2.5", "--eta", "0.25"]
    first = sample(folder, tmp_path / "first", *argv)
    config = yaml.safe_load((first / "config.yaml").read_text(encoding="utf-8"))
    assert config["prompt"] == ["a <toy>: yes, 'no' # \"cat\"", "-- on"]
    assert config["size"] == "16x32"
    assert (config["sample_steps"], config["seed"], config["eta"]) == (2, 3, 0.25)
    assert config["device"] == "cpu"

    second = tmp_path / "second"
    main(["--config", str(first / "config.yaml"), "--out", str(second)])
    assert names(first) == names(second)
    for name in names(first):
        if name != "config.yaml":
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    again = yaml.safe_load((second / "config.yaml").read_text(encoding="utf-8"))
    assert again == config | {"out": str(second)}


def test_flags_go_before_the_config(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"checkpoint: {folder}\nprompt: [cat, dog]\nnum_images: 1\nsteps: 1\nseed: 4\n")
    main(["--config", str(config), "--out", str(tmp_path / "a")])
    assert {"cat-4.png", "dog-4.png"} < set(names(tmp_path / "a"))
    main(["--config", str(config), "--set", "seed=5", "--prompt", "toy", "--out", str(tmp_path / "b")])
    assert "toy-5.png" in names(tmp_path / "b")
    assert "cat-5.png" not in names(tmp_path / "b")


def test_a_renamed_word_gives_the_same_picture(folder: Path, word: Path, tmp_path: Path) -> None:
    a = sample(folder, tmp_path / "a", "--concept", str(word), "--prompt", "red <toy>", "--num-images", "1")
    argv = ["--concept", f"<thing>={word}", "--prompt", "red <thing>", "--num-images", "1"]
    b = sample(folder, tmp_path / "b", *argv)
    c = sample(folder, tmp_path / "c", "--prompt", "red <toy>", "--num-images", "1")
    pixels = [Image.open(next(out.glob("red-*.png"))).tobytes() for out in (a, b, c)]
    assert pixels[0] == pixels[1]
    assert pixels[0] != pixels[2]


def test_a_word_whose_name_is_taken(folder: Path, word: Path, tmp_path: Path) -> None:
    """By the vocabulary, or by another word, whose case does not matter."""
    width = Concept.load(word).vectors.shape[1]
    for name, remedy in (("cat", "<cat>"), ("<TOY>", "<new>")):
        files = [tmp_path / "<toy>.pt", tmp_path / f"{name}.pt"]
        for file in files:
            Concept("x", torch.ones(1, width)).save(file)  # in this format the word is the file's name
        argv = ["--prompt", "a", *(part for file in files for part in ("--concept", str(file)))]
        with pytest.raises(
            InputError, match=f"^{files[1]}: placeholder .*: --concept '{remedy}={files[1]}'$"
        ):
            sample(folder, tmp_path / "out", *argv)
    Concept("x", torch.ones(1, width - 1)).save(tmp_path / "narrow.pt")
    with pytest.raises(InputError, match=rf"a {width - 1}-wide encoder.*use the model it was learned on$"):
        sample(folder, tmp_path / "out", "--prompt", "a", "--concept", str(tmp_path / "narrow.pt"))


def test_file_names() -> None:
    def files(*prompts: str, n: int = 1) -> list[str]:
        return [picture.file for (picture,) in plan_pictures(prompts, 3, n)]

    assert files("A photo, of: <toy>!", n=2) == ["a-photo-of-toy-3.png", "a-photo-of-toy-4.png"]
    assert files("cat", "Cat", "CAT!") == ["cat-3.png", "cat-no2-3.png", "cat-no3-3.png"]
    assert files("", "...", "../../etc/passwd") == ["picture-3.png", "picture-no2-3.png", "etc-passwd-3.png"]
    for prompt in ("x" * 300, "猫" * 300, "\N{MATHEMATICAL BOLD SCRIPT CAPITAL A}" * 300, "a " * 300):
        (name,) = files(prompt)
        assert len(name.encode()) <= 230
    assert plan_pictures(["a"], 0, 1, 2) == [[Picture("a", 0, "a-0.png"), Picture("a", 1, "a-1.png")]]


def test_no_two_pictures_share_a_file() -> None:
    prompts = ["a", "A", "a no2", "a-no2", "a!", "", " ", "a-0", "a 0", "grid"]
    files = [picture.file for (picture,) in plan_pictures(prompts, 0, 3)]
    assert len({*files, "grid.png", "grid_2.png"}) == len(files) + 2 == 32


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_same_command_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after two of four pictures; they stay, with a grid, and only the others are made."""
    argv = ["--prompt", "cat", "--prompt", "dog", "--num-images", "2", "--batch-size", "2"]
    whole = snapshot(sample(folder, tmp_path / "whole", *argv))
    made, each, decode = [], minti.StableDiffusion.sample_each, minti.StableDiffusion.decode_latents

    def counting(self: minti.StableDiffusion, pictures: list, **options: object) -> Iterator[Image.Image]:
        made.append([prompt for prompt, _ in pictures])
        return each(self, pictures, **options)

    def interrupted(self: minti.StableDiffusion, latents: torch.Tensor) -> list[Image.Image]:
        monkeypatch.setattr(minti.StableDiffusion, "decode_latents", stop)
        return decode(self, latents)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(minti.StableDiffusion, "sample_each", counting)
    monkeypatch.setattr(minti.StableDiffusion, "decode_latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(folder, tmp_path / "out", *argv)
    assert names(tmp_path / "out") == ["cat-0.png", "cat-1.png", "config.yaml", "grid.png"]
    monkeypatch.setattr(minti.StableDiffusion, "decode_latents", decode)
    found = snapshot(sample(folder, tmp_path / "out", *argv))
    assert made == [["cat", "cat", "dog", "dog"], ["dog", "dog"]]
    assert found.keys() == whole.keys()
    assert all(found[name] == whole[name] for name in whole if name != "config.yaml")


def test_other_settings_are_refused_or_replace_everything(folder: Path, tmp_path: Path) -> None:
    out = sample(folder, tmp_path / "out", "--prompt", "cat", "--num-images", "2")
    before = snapshot(out)
    for argv, change in (
        (["--prompt", "cat", "--num-images", "1"], "num_images was 2, now it is 1"),
        (["--prompt", "cat", "--num-images", "2", "--seed", "1"], "seed was 0, now it is 1"),
        (["--prompt", "dog", "--num-images", "2"], r"prompt was \['cat'\], now it is \['dog'\]"),
    ):
        with pytest.raises(InputError, match=f"{change}; .*--overwrite"):
            sample(folder, out, *argv)
        assert snapshot(out) == before
    own = str(out / "cat-0.png")
    with pytest.raises(InputError, match=r"cat-0\.png: is in --out, which is to be replaced"):
        sample(folder, out, "--prompt", "dog", "--init-image", own, "--overwrite")
    with pytest.raises(InputError, match="--strength has no effect without --init-image; leave it out"):
        sample(folder, out, "--prompt", "dog", "--strength", "0.5", "--overwrite")
    assert snapshot(out) == before
    (out / "mine.txt").write_text("kept")
    sample(folder, out, "--prompt", "dog", "--num-images", "1", "--overwrite")
    assert names(out) == ["config.yaml", "dog-0.png", "grid.png", "mine.txt"]


@pytest.mark.parametrize("what", ["word", "unet"])
def test_pictures_of_an_earlier_file_are_not_taken_for_new_ones(
    what: str, folder: Path, word: Path, tmp_path: Path
) -> None:
    """The same command, after another word, or other weights, were saved in the same place."""
    unet = tmp_path / "unet.safetensors"
    argv = ["--prompt", "a <toy>", "--num-images", "1", "--concept", str(word), "--unet", str(unet)]
    key, weight = next(iter(minti.load(folder, device="cpu").unet.state_dict().items()))
    save_file({key: weight}, unet)
    out = sample(folder, tmp_path / "out", *argv)
    before = snapshot(out)
    sample(folder, out, *argv)
    if what == "word":
        Concept("<toy>", torch.ones(2, 32)).save(word)
    else:
        save_file({key: weight + 1}, unet)
    with pytest.raises(
        InputError, match=rf"{what}[ <toy>]*: has changed since this was begun; .*--overwrite"
    ):
        sample(folder, out, *argv)
    assert {name: content for name, content in snapshot(out).items() if "grid" not in name} == {
        name: content for name, content in before.items() if "grid" not in name
    }
    again = sample(folder, out, *argv, "--overwrite")
    assert snapshot(again)["a-toy-0.png"] != before["a-toy-0.png"]


def test_a_folder_that_does_not_say_what_it_was_made_of(folder: Path, word: Path, tmp_path: Path) -> None:
    """As folders of earlier versions do not: they can be continued."""
    argv = ["--prompt", "a <toy>", "--num-images", "1", "--concept", str(word)]
    config = sample(folder, tmp_path / "out", *argv) / "config.yaml"
    text = config.read_text()
    config.write_text(text[: text.index("made_of:")])
    sample(folder, tmp_path / "out", *argv)


def foreign(tmp_path: Path) -> list[Path]:
    """Folders that other commands, and people, have made."""
    made = [tmp_path / name for name in ("run", "evaluation", "mine")]
    for path, key in zip(
        made, ("init_word: toy\nsave_every: 5\neval_size: 16", "references: true", "a: 1"), strict=True
    ):
        path.mkdir()
        (path / "config.yaml").write_text(f"{key}\nsteps: 3\n")
        (path / "grid.png").write_bytes(b"a picture")
    return made


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_folders_of_others_are_left_alone(overwrite: list[str], folder: Path, tmp_path: Path) -> None:
    """Of a training run, of an evaluation, or somebody's own, which have a config.yaml as well."""
    for out in foreign(tmp_path):
        before = snapshot(out)
        with pytest.raises(InputError, match=r"holds something that minti\.sample did not make"):
            sample(folder, out, "--prompt", "cat", *overwrite)
        assert snapshot(out) == before


def test_many_pictures_go_onto_several_sheets(tmp_path: Path) -> None:
    """Eight in a line, sixteen lines a sheet; each prompt begins a line; large pictures are made smaller."""
    planned = plan_pictures(["cat", "dog"], 0, 9)
    for i, (picture,) in enumerate(planned):
        Image.new("RGB", (700, 350), (i, 0, 0)).save(tmp_path / picture.file)
    write_grids(tmp_path, planned)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (8 * 512, 4 * 256)
    first = [grid.getpixel((512 * x + 5, 256 * y + 5)) for y in range(4) for x in range(8)]
    white = [(255, 255, 255)] * 7
    assert first == [(i, 0, 0) for i in range(9)] + white + [(i, 0, 0) for i in range(9, 18)] + white
    planned = plan_pictures(["cat"], 0, 130)
    for (picture,) in planned:
        Image.new("RGB", (2, 2)).save(tmp_path / picture.file)
    write_grids(tmp_path, planned)
    assert Image.open(tmp_path / "grid.png").size == (16, 32) and not (tmp_path / "grid_3.png").exists()
    assert Image.open(tmp_path / "grid_2.png").size == (16, 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-images", "1000000000"], "at most 100000"),
        (["--rank-by-clip", "1000000"], "at most 1000"),
        (["--num-images", "100000", "--rank-by-clip", "100"], "more than 1,000,000 pictures"),
        (["--batch-size", "10000000000"], "at most 10000"),
    ],
)
def test_numbers_are_bounded(argv: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        sample(folder, tmp_path / "out", "--prompt", "cat", *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompt", "negative", "scale", "said"),
    [
        ("a cat", "", 7.5, "no prompt contains the learned word '<toy>', so it has no effect"),
        ("a <TOY>", "", 7.5, None),
        ("a cat", "<toy>", 7.5, None),
        ("embedding:<toy>", "", 7.5, "'embedding:' is read as text (ComfyUI's"),
        ("a (red:1.2) <toy>", "", 7.5, "'(red:1.2)' is read as text (for weights"),
        ("((red)) <toy>", "", 7.5, "'((red))' is read as text"),
        ("<toy> [red:dog:0.5]", "", 7.5, "'[red:dog:0.5]' is read as text"),
        ("<toy>", "<lora:x:0.5>", 7.5, "'<lora:x:0.5>' is read as text"),
        ("<<toy>>", "", 7.5, "the brackets around '<toy>' are read as text"),
        ("<toy> BREAK red", "", 7.5, "'BREAK' is read as text (for prompts in several parts"),
        ("<toy> [red|blue]", "", 7.5, "'[red|blue]' is read as text (for choices"),
        ("<toy> {red | blue}", "", 7.5, "'{red | blue}' is read as text (for choices"),
        ("a __color__ <toy>", "", 7.5, "'__color__' is read as text (for choices"),
        ("<toy> (red), at 5:30 [dog] and a|b _c_", "", 7.5, None),
        ("<toy>", "red", 1, "--negative-prompt has no effect with --guidance-scale 1 or less"),
    ],
)
def test_what_has_no_effect_is_said(
    prompt: str, negative: str, scale: float, said: str | None, folder: Path
) -> None:
    tokenizer = read_tokenizer(folder / "tokenizer")
    tokenizer.add_placeholder("<toy>", [1000, 1001])
    found = notices([prompt], negative, scale, tokenizer)
    assert len(found) == (said is not None) and (said or "") in "".join(found)


def test_notices_are_warnings(
    folder: Path, word: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample(folder, tmp_path / "out", "--concept", str(word), "--num-images", "1", "--prompt", "cat")
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "no prompt contains the learned word '<toy>', so it has no effect"
    ]


def test_prompts_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    """Python puts surrogates for bytes that it cannot decode."""
    with pytest.raises(InputError, match=r"'caf\\udce9 cup': is not text in UTF-8"):
        sample(folder, tmp_path / "out", "--prompt", b"caf\xe9 cup".decode("utf-8", "surrogateescape"))
    assert not (tmp_path / "out").exists()


def test_the_number_of_steps_has_one_name(tmp_path: Path) -> None:
    """`--sample-steps` in all commands; `--steps`, also in files, is another name of it."""
    (tmp_path / "c.yaml").write_text("steps: 3\n")
    ways = [["--sample-steps", "3"], ["--steps", "3"], ["--set", "steps=3"]]
    for module in (minti.sample, minti.evaluate):
        for argv in (*ways, ["--config", str(tmp_path / "c.yaml")]):
            assert module.options().parse(argv, required=[]).sample_steps == 3
    assert minti.study.__main__.options().parse(ways[0], required=[]).sample_steps == 3


def test_a_size_that_was_not_trained_is_mentioned(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        sample(folder, tmp_path / "a", "--prompt", "cat", "--num-images", "1")
        assert "trained on" not in caplog.text
        sample(folder, tmp_path / "b", "--prompt", "cat", "--num-images", "1", "--size", "24x16")
    assert "24x16 pixels: the model was trained on 16x16, expect repetitions" in caplog.text


def test_a_prompt_of_500_words_is_cut_with_a_warning_that_quotes_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = " ".join(["the"] * 75 + ["cat", "on", "grass"] + ["dog"] * 422)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = sample(folder, tmp_path / "out", "--prompt", prompt, "--num-images", "1")
    said = caplog.text + "".join(str(w.message) for w in caught)
    assert "75 tokens at most" in said
    assert "cut off: 'cat on grass dog dog" in said
    (path,) = out.glob("the-the-*.png")
    assert Image.open(path).text["prompt"] == prompt
    short = sample(folder, tmp_path / "short", "--prompt", " ".join(["the"] * 75), "--num-images", "1")
    (other,) = short.glob("the-the-*.png")
    assert Image.open(other).tobytes() == Image.open(path).tobytes()


def test_a_usual_stack_of_negative_words_needs_long_prompts(folder: Path, tmp_path: Path) -> None:
    words = {"<deep>": 75, "<easy>": 8}
    arguments = ["--prompt", "a cat", "--negative-prompt", "<deep>, <easy>, red", "--num-images", "1"]
    for word, n in words.items():
        Concept(word, torch.randn(n, 32)).save(tmp_path / f"{word[1:-1]}.safetensors")
        arguments += ["--concept", str(tmp_path / f"{word[1:-1]}.safetensors")]
    with pytest.raises(InputError, match=r"'<easy>' with its 8 vectors does not fit .* with long_prompts"):
        sample(folder, tmp_path / "short", *arguments)
    out = sample(folder, tmp_path / "long", *arguments, "--long-prompts")
    sd = minti.load(folder, device="cpu")
    for concept in words:
        sd.add_concept(Concept.load(tmp_path / f"{concept[1:-1]}.safetensors"))
    how = {"negative_prompt": "<deep>, <easy>, red", "long_prompts": True, "steps": 2}
    with Image.open(out / "a-cat-0.png") as image:
        assert json.loads(image.text["settings"])["long_prompts"] is True
        assert_same_picture(image, sd.sample("a cat", **how)[0])


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """As a user runs it: exit code, progress with the time left, and where the pictures are."""
    command = [sys.executable, "-m", "minti.sample", "--checkpoint", str(folder), "--prompt", "a cat"]
    command += ["--out", str(tmp_path / "out"), "--steps", "2", "--num-images", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"2/2 steps, [\d.]+/s, 0:00 left", lines[0])
    assert re.fullmatch(r"1 pictures? in .*/out \([\d.]+ s\), together in grid\.png", lines[1])
    assert len(lines) == 2
    assert names(tmp_path / "out") == ["a-cat-0.png", "config.yaml", "grid.png"]


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--checkpoint",
        "--concept",
        "--prompt",
        "--negative-prompt",
        "--sample-steps",
        "--guidance-scale",
    ):
        assert option in text
    for option in ("--eta", "--num-images", "--size", "--seed", "--out", "--config", "--set", "--tokenizer"):
        assert option in text
    assert "(default: 50)" in text
    assert "(default: 7.5)" in text


# Choosing the best of several ---


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "clip"
    folder.mkdir()
    save_clip(folder)
    return folder


def rank(folder: Path, out: Path, judge: Path | None, *argv: str) -> Path:
    clip = ["--clip", str(judge)] if judge else []
    return sample(folder, out, *clip, "--seed", "5", "--num-images", "2", "--rank-by-clip", "3", *argv)


def test_the_candidate_closest_to_the_prompt_is_kept(
    folder: Path, judge: Path, word: Path, tmp_path: Path
) -> None:
    """Each picture is the best of three, with the learned word left out, and says which seed makes it."""
    argv = ["--prompt", "a photo of <toy> on the grass", "--prompt", "red dog", "--concept", str(word)]
    out = rank(folder, tmp_path / "out", judge, *argv)
    sd, scorer = minti.load(folder, device="cpu"), Scorer.load(judge)
    sd.add_concept(Concept.load(word))
    expected = {}
    for prompt, text, slug in (
        ("a photo of <toy> on the grass", "a photo of on the grass", "a-photo-of-toy-on-the-grass"),
        ("red dog", "red dog", "red-dog"),
    ):
        images = sd.sample(prompt, steps=2, seed=5, num_images=6)
        cosines = scorer.embed_images(images) @ scorer.embed_texts([text])[0]
        for first in (0, 3):
            best = first + int(cosines[first : first + 3].argmax())
            expected[f"{slug}-{5 + best}.png"] = images[best], cosines[best].item()
    assert names(out) == sorted([*expected, "grid.png", "config.yaml"])
    for name, (image, cosine) in expected.items():
        with Image.open(out / name) as found:
            assert f"{int(found.text['seed'])}.png" == name.split("-")[-1]
            # The batches are others than there, which may move a pixel by one.
            assert np.abs(np.asarray(found).astype(int) - np.asarray(image).astype(int)).max() <= 1
            kept, of = re.fullmatch(r"(\S+), best of (\d)", found.text["clip"]).groups()
            assert float(kept) == pytest.approx(cosine, abs=2e-3)
            assert of == "3"
    assert Image.open(out / "grid.png").size == (2 * 16, 2 * 16)


def test_the_checkpoint_judges_by_itself(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.rmtree(own / "image_encoder")
    with pytest.raises(InputError, match=r"--clip must be given, since .*/model has no image encoder"):
        rank(own, tmp_path / "out", None, "--prompt", "red cat")
    assert not (tmp_path / "out").exists()
    out = rank(folder, tmp_path / "out", None, "--prompt", "red cat")
    assert len(list(out.glob("red-cat-*.png"))) == 2


def test_what_cannot_be_ranked(folder: Path, judge: Path, word: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'<toy>!' says nothing but the learned word"):
        rank(folder, tmp_path / "out", judge, "--concept", str(word), "--prompt", "<toy>!")
    assert not (tmp_path / "out").exists()
