"""`python -m minti.tune`: equal to a plain loop of the reference, and careful with what is on disk."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import minti
from minti import Concept, InputError, sample
from minti.cli.command import run_command
from minti.formats.photos import load_photos
from minti.formats.views import make_views
from minti.inversion.batches import Settings, Word, sample_batch
from minti.inversion.latents import encode_views
from minti.model.model_hash import model_hash
from minti.tune import __main__ as door
from minti.tune.__main__ import main
from minti.tune.tuner import Tuner, TuneSettings, choose_weights, memory_needed

from . import oracles

PROMPT, CLASS = "a photo of the red toy", "a photo of the toy"
STEPS = 4


class Killed(BaseException):
    """A process that ends at once, whatever it is doing."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    """A small model, photos, and a learned word."""
    base = tmp_path_factory.mktemp("tune")
    (base / "model").symlink_to(small_checkpoint)
    for name, seed in (("photos", 0), ("others", 1)):
        (base / name).mkdir()
        for i in range(3):
            pixels = np.random.default_rng([seed, i]).integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / name / f"{i}.png")
    Concept("<toy>", torch.randn(2, 32, generator=torch.Generator().manual_seed(0))).save(
        base / "word.safetensors"
    )
    return base


def pivotal(base: Path) -> list[str]:
    return ["--concept", str(base / "word.safetensors")]


def dreambooth(base: Path) -> list[str]:
    return ["--instance-prompt", PROMPT, "--class-prompt", CLASS, "--class-images", "6"]


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(*more: str, out: str = "run", kind: Callable = pivotal) -> Path:
        argv = ["--checkpoint", str(base / "model"), "--images", str(base / "photos"), *kind(base)]
        argv += ["--lr", "1e-3", "--steps", str(STEPS), "--sample-steps", "1", "--sample-every", "0"]
        main([*argv, "--out", str(tmp_path / out), *more])
        return tmp_path / out

    return run


def tuned(out: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(out / f"{part}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log_of(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def make_word(sd: minti.StableDiffusion, folder: Path, prompt: str, seed: int = 0) -> Word:
    latents = encode_views(sd, make_views(load_photos(folder), 16, flip=True))
    return Word("", torch.empty(0), latents, [prompt], seed=seed)


# The method
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("what", ["unet", "cross-kv"])
def test_tuning_equals_the_reference(what: str, prediction_type: str, base: Path, tmp_path: Path) -> None:
    """The UNet of diffusers in a loop of its own: mean squared errors, clipping, PyTorch's AdamW.

    The way that all weights went together differs by less than 2 % of its length. AdamW makes steps of the
    same size of gradients that are large or almost nothing, whose sign is a matter of rounding.
    """
    folder = oracles.save_folder(tmp_path / "model", "small", prediction_type)
    pipe = oracles.pipeline(tmp_path, "small", prediction_type)
    sd = minti.load(folder, device="cpu", dtype="float32")
    settings = TuneSettings(lr=1e-3, batch_size=2, prior_weight=0.7, weight_decay=0.1, max_grad_norm=0.1)
    words = make_word(sd, base / "photos", PROMPT), make_word(sd, base / "others", CLASS, 1)
    before = {key: p.clone() for key, p in sd.unet.state_dict().items()}
    tuner = Tuner(sd, choose_weights(sd, what), *words, settings)
    ours = [tuner.step() for _ in range(3)]

    unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
    parameters = [p for key, p in unet.named_parameters() if key in tuner.weights["unet"]]
    assert len(parameters) == len(tuner.weights["unet"]) == (len(before) if what == "unet" else 8)
    for p in parameters:
        p.requires_grad_(True)
    optimizer, theirs = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.1), []
    for step in range(3):
        losses = []
        for word, key in zip(words, ((step,), ("prior", step)), strict=True):
            batch = sample_batch(word, Settings(), 1000, 2, *key)
            x0 = word.latents_at(batch)[0]
            x_t = pipe.scheduler.add_noise(x0, batch.eps, batch.t)
            ids = pipe.tokenizer(
                batch.prompts, padding="max_length", max_length=77, return_tensors="pt"
            ).input_ids
            output = unet(x_t, batch.t, pipe.text_encoder(ids).last_hidden_state).sample
            is_eps = prediction_type == "epsilon"
            target = batch.eps if is_eps else pipe.scheduler.get_velocity(x0, batch.eps, batch.t)
            losses.append((output - target).square().mean())
        optimizer.zero_grad()
        (losses[0] + 0.7 * losses[1]).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        assert norm > 0.1
        optimizer.step()
        theirs.append([losses[0].item(), losses[1].item(), norm.item()])
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    after = unet.state_dict()
    way = {key: after[key] - before[key] for key in before}
    error = sum((sd.unet.state_dict()[key] - after[key]).square().sum() for key in before)
    assert error.sqrt() < 0.02 * sum(w.square().sum() for w in way.values()).sqrt()
    moved = {key for key, w in way.items() if w.any()}
    assert moved == set(tuner.weights["unet"])


@pytest.mark.parametrize("name", ["sdxl", "ldm", pytest.param("inpainting", marks=pytest.mark.slow)])
def test_every_family(name: str, base: Path, tmp_path: Path) -> None:
    """What is named changes, all else is equal bit for bit, and the file gives the same model again."""
    if name == "sdxl":
        folder = oracles.save_sdxl(tmp_path / name)
    elif name == "ldm":
        oracles.ldm_pipeline(tmp_path / "words").save_pretrained(folder := tmp_path / name)
        shutil.copy(tmp_path / "words" / "vocab.txt", folder / "tokenizer" / "vocab.txt")
    else:
        folder = oracles.save_folder(tmp_path / name, name)
    files = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    out, start = tmp_path / "run", minti.load(folder, device="cpu")
    argv = ["--checkpoint", str(folder), "--images", str(base / "photos"), "--instance-prompt", PROMPT]
    argv += ["--train-text-encoder", "--what", "cross-kv", "--steps", "1", "--sample-every", "0"]
    main([*argv, "--size", "32", "--lr", "1e-3", "--out", str(out)])
    assert all(path.read_bytes() == content for path, content in files.items())
    now = minti.load(folder, device="cpu", unet=out, text_encoder=out)
    old = start.unet.state_dict()
    changed = {key for key, weight in now.unet.state_dict().items() if not torch.equal(weight, old[key])}
    assert changed == {key for key in old if ".attn2.to_k." in key or ".attn2.to_v." in key}
    assert model_hash(now.vae) == model_hash(start.vae)
    assert model_hash(now.text_encoder) != model_hash(start.text_encoder)
    assert model_hash(now.unet) != model_hash(start.unet)
    if name == "sdxl":  # some weights of its first text encoder never have a gradient
        main(["--resume", "--steps", "2", "--out", str(out)])
        assert len(log_of(out)) == 2


def test_lower_precision_keeps_float32_weights(base: Path) -> None:
    """Steps that are less than half of bfloat16's resolution add up."""
    sd = minti.load(base / "model", device="cpu", dtype="bfloat16")
    start = {key: p.clone() for key, p in sd.unet.state_dict().items()}
    tuner = Tuner(
        sd, choose_weights(sd, "cross-kv"), make_word(sd, base / "photos", PROMPT), None, TuneSettings()
    )
    for _ in range(3):
        tuner.step()
    for key, weight in tuner.weights["unet"].items():
        assert weight.dtype == torch.float32
        moved = (weight - start[key].float()).abs()
        assert 1e-6 < moved.max() < 5 * 5e-6
        assert torch.equal(sd.unet.state_dict()[key], weight.bfloat16())


def test_memory_is_counted(base: Path, monkeypatch: pytest.MonkeyPatch, run: Callable) -> None:
    """16 bytes for each weight in float32, as in the usual sum for 860 million: 13.8 GB."""
    sd = minti.load(base / "model", device="cpu")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (sd.unet, sd.vae, sd.text_encoder)]
    assert memory_needed(sd, choose_weights(sd, "unet")) == 16 * sizes[0] + 4 * sum(sizes[1:])
    half = minti.load(base / "model", device="cpu", dtype="bfloat16")
    assert memory_needed(half, choose_weights(half, "unet")) == 20 * sizes[0] + 2 * sum(sizes[1:])
    monkeypatch.setattr(door, "memory_needed", lambda sd, weights: len(weights["unet"]) * 10**15)
    with pytest.raises(
        InputError, match=r"cpu has .* GB of memory, which is too little; --what cross-kv needs"
    ):
        run()


# The folder
# ----------------------------------------------------------------------------------------------------------


def test_what_a_run_writes_and_how_it_is_used(run: Callable, base: Path, tmp_path: Path) -> None:
    """Previews before and after, whole files; diffusers and minti make the same prediction with them."""
    out = run("--sample-every", "3", "--train-text-encoder", "--sample-prompt", "<toy> on the grass")
    names = {"config.yaml", "inputs.png", "log.csv", "samples", "state.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"unet.safetensors", "text_encoder.safetensors"}
    previews = ["step-000000.png", "step-000003.png", "step-000004.png"]
    assert sorted(path.name for path in (out / "samples").iterdir()) == previews
    assert (out / "unet.safetensors").stat().st_mode == (out / "log.csv").stat().st_mode
    assert not any(key.endswith("words.0") for key in tuned(out, "text_encoder"))

    unet = UNet2DConditionModel.from_pretrained(base / "model" / "unet")
    unet.load_state_dict(tuned(out))
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (tmp_path / part).mkdir()
        shutil.copy(base / "model" / part / "config.json", tmp_path / part)
        shutil.copy(out / f"{part}.safetensors", tmp_path / part / f"{file}.safetensors")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    text = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    sd = minti.load(base / "model", device="cpu", unet=out, text_encoder=out / "text_encoder.safetensors")
    x, t, ids = torch.randn(1, 4, 8, 8), torch.tensor([300]), sd.tokenizer(["the cat"])
    with torch.no_grad():
        context = text(ids).last_hidden_state
        assert torch.allclose(context, sd.encode_prompt(["the cat"]), atol=1e-5)
        for theirs in (unet, again):
            assert torch.allclose(theirs(x, t, context).sample, sd.unet(x, t, context), atol=1e-5)
    pictures = tmp_path / "pictures"
    argv = ["--checkpoint", str(base / "model"), "--unet", str(out), "--text-encoder", str(out)]
    argv += [*pivotal(base), "--prompt", "<toy>", "--steps", "1", "--num-images", "1", "--out", str(pictures)]
    sample.main(argv)
    plain = sample.main([*argv[:2], *argv[6:-1], str(tmp_path / "plain")])
    assert plain is None
    two = [np.asarray(Image.open(tmp_path / name / "toy-0.png")) for name in ("pictures", "plain")]
    assert (two[0] != two[1]).any()
    assert "unet" in Image.open(pictures / "toy-0.png").text["settings"]


@pytest.mark.parametrize("reason", ["memory", "file"])
def test_a_preview_that_fails(
    reason: str, run: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Costs the preview, and one warning; the weights are tuned to the end."""

    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if reason == "memory":
        monkeypatch.setattr(minti.StableDiffusion, "sample", fail)
    else:
        (run("--steps", "2") / "samples").write_text("")
    out = run("--sample-every", "1", *(["--resume"] if reason == "file" else []))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and "--sample-every 0 leaves them out" in warnings[0]
    assert len((out / "log.csv").read_text().splitlines()) == 1 + STEPS


@pytest.mark.parametrize("kind", [pivotal, dreambooth])
def test_resuming_equals_going_on(
    kind: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or after any file gets its name, and run again, it ends with the same bytes."""
    whole = run("--save-every", "2", out="whole", kind=kind)
    replace, count = os.replace, 0

    def counted(crash: int) -> Callable:
        def wrapper(source: str, target: str) -> None:
            nonlocal count
            count += 1
            if count == crash:
                raise Killed
            replace(source, target)

        return wrapper

    # Config, inputs, 6 pictures of the class, and twice the UNet, the log, the state.
    for crash in (4, 7) if kind is pivotal else (5, 11):
        count, out = 0, tmp_path / f"crash-{crash}"
        monkeypatch.setattr(os, "replace", counted(crash))
        with pytest.raises(Killed):
            run("--save-every", "2", out=out.name, kind=kind)
        monkeypatch.setattr(os, "replace", replace)
        run("--save-every", "2", "--resume", out=out.name, kind=kind)
        for name in ("unet.safetensors", "state.safetensors"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), crash
        assert log_of(out) == log_of(whole)
        if kind is dreambooth:
            assert [p.read_bytes() for p in sorted((out / "class").iterdir())] == [
                p.read_bytes() for p in sorted((whole / "class").iterdir())
            ]


def test_ctrl_c_saves(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, step = run(out="whole"), Tuner.step

    def interrupted(self: Tuner) -> tuple:
        if self.step_count == 2:
            os.kill(os.getpid(), 2)
        return step(self)

    monkeypatch.setattr(Tuner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(log_of(tmp_path / "run")) == 3
    monkeypatch.setattr(Tuner, "step", step)
    main(["--resume", "--out", str(tmp_path / "run")])
    assert same(tuned(tmp_path / "run"), tuned(whole)) and log_of(tmp_path / "run") == log_of(whole)


def failed(action: Callable[[], object], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as status:
        run_command("minti.tune", lambda _: action())
    assert status.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "1e30"], "lower the learning rate"),
        (["--concept", "no/such.safetensors"], "no/such.safetensors"),
        (["--images", "no/such"], "no/such"),
        (["--what", "vae"], "what"),
        (["--sample-prompt", "<toy> " * 60], "<toy>"),
        (["--sample-prompt", "{} " * 60], "<toy>"),
        (["--instance-prompt", "a {} toy"], "no word that {} could stand for"),
        (["--class-images", "5"], "--class-images has no effect without --class-prompt; leave it out"),
    ],
)
def test_bad_options(flags: list[str], message: str, run: Callable, capsys: pytest.CaptureFixture) -> None:
    assert message in failed(lambda: run(*flags), capsys)


def test_what_the_thing_is_called(run: Callable, base: Path, capsys: pytest.CaptureFixture) -> None:
    assert "neither --concept nor --instance-prompt" in failed(lambda: run(kind=lambda _: []), capsys)
    twice = ["--concept", f"<b>={base}/word.safetensors"]
    assert "several words, and no --instance-prompt" in failed(lambda: run(*twice), capsys)


def test_a_run_that_began_otherwise(run: Callable, base: Path, capsys: pytest.CaptureFixture) -> None:
    out = run()
    state = (out / "state.safetensors").read_bytes()
    others = ["--resume", "--images", str(base / "others")]
    assert "begun with another set of photos" in failed(lambda: run(*others), capsys)
    word = base / "other.safetensors"
    Concept("<toy>", torch.ones(2, 32)).save(word)
    resumed = ["--resume", "--out", str(out), "--concept", f"<toy>={word}"]
    assert "learned word" in failed(lambda: main(resumed), capsys)
    assert "lr was 0.001" in failed(lambda: run("--resume", "--lr", "1"), capsys)
    assert "exists already" in failed(run, capsys)
    (out / "state.safetensors").write_bytes(state[:-100])
    assert "is damaged" in failed(lambda: run("--resume"), capsys)
    assert len(log_of(run("--overwrite", "--steps", "2"))) == 2
    assert "--overwrite removes it" in failed(lambda: run("--overwrite", "--resume"), capsys)
    assert len(tuned(out)) > 100
    itself = ["--overwrite", "--unet", str(out)]
    assert f"{out}: is in --out, which is to be replaced" in failed(lambda: run(*itself), capsys)


def test_weights_that_were_lost(run: Callable) -> None:
    """They are in the state, and are written again by a run that is resumed after its last step."""
    out = run()
    content = (out / "unet.safetensors").read_bytes()
    (out / "unet.safetensors").unlink()
    run("--resume")
    assert (out / "unet.safetensors").read_bytes() == content


def test_files_that_are_no_tuned_unet(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refusal(tensors: dict[str, torch.Tensor] | Path, part: str = "unet") -> str:
        path = tensors if isinstance(tensors, Path) else tmp_path / "file.safetensors"
        if not isinstance(tensors, Path):
            save_file(tensors, path)
        with pytest.raises(InputError) as error:
            minti.load(base / "model", device="cpu", **{part: path})
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    key = "conv_in.bias"
    (tmp_path / "empty").mkdir()
    good = torch.ones(32)
    assert "unexpected key other" in refusal({key: good, "other": good + 1})
    assert "has shape (31,), that of the model has (32,)" in refusal({key: good[:31].clone()})
    assert "quantised" in refusal({key: good.int()})
    assert "conv_in.bias holds NaN" in refusal({key: good / 0 * 0})
    assert "a LoRA" in refusal({"lora_unet_down.lora_up.weight": good})
    assert "CLIP text encoder" in refusal(base / "model" / "text_encoder" / "model.safetensors")
    assert "no weights" in refusal(tmp_path / "empty")
    assert "no weights of the text encoder" in refusal({key: good}, "text_encoder")
    assert "cannot be read" in refusal(tmp_path / "nowhere")
    save_file({key: good}, tmp_path / "file.safetensors")
    sd, plain = (
        minti.load(base / "model", device="cpu", unet=u) for u in (tmp_path / "file.safetensors", None)
    )
    changed = [k for k, v in sd.unet.state_dict().items() if not torch.equal(v, plain.unet.state_dict()[k])]
    assert changed == [key] and "another UNet" not in caplog.text


def test_another_model_of_the_same_shapes_is_noticed(
    run: Callable, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = run("--what", "cross-kv")
    minti.load(base / "model", device="cpu", unet=out)
    assert "another UNet" not in caplog.text
    minti.load(base / "model", device="cpu", unet=run("--unet", str(out), out="second"))
    assert "was tuned from another UNet" in caplog.text
