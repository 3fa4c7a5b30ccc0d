"""Whatever is wrong with what the user gives: one clear line, exit code 2 (130 for Ctrl-C), nothing lost."""

import errno
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import minti
from minti import Concept, sample
from minti.cli.command import run_command

from .oracles import save_folder, single_file, write_tokenizer

ROOT = Path(minti.__file__).parents[1]
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("bad") / "sd1")


@pytest.fixture(scope="module")
def weights(original: Path) -> dict[str, torch.Tensor]:
    return single_file(minti.load(original, device="cpu"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A good checkpoint folder, to break."""
    return Path(shutil.copytree(original, tmp_path / "folder"))


@pytest.fixture
def file(weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A good single file, to break."""
    write_tokenizer(tmp_path / "tokenizer")
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def arguments(checkpoint: Path, out: Path, *more: str) -> list[str]:
    given = ["--checkpoint", str(checkpoint), "--prompt", "cat", "--out", str(out)]
    return [*given, "--steps", "1", "--num-images", "1", "--device", "cpu", *more]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Run the command in this process: it exits with 2, says one line with `parts`, and writes nothing."""

    def check(checkpoint: Path, *parts: str, more: Sequence[str] = (), out: Path | None = None) -> str:
        out = out or tmp_path / "out"
        argv = arguments(checkpoint, out, *more)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_command("minti.sample", lambda _: sample.main(argv))
        assert caught.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(lines) == 1
        assert lines[0].startswith("minti.sample: error: ")
        for part in parts:
            assert str(part) in lines[0]
        assert not out.exists() or not list(out.iterdir())
        return lines[0]

    return check


def command(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "minti.sample", *argv], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


# As users see it: real processes ---


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_one_line_and_exit_code_2_from_the_real_command(original: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(original, tmp_path / "broken"))
    cut(broken / UNET_FILE)
    evil, marker = tmp_path / "evil.ckpt", tmp_path / "was-here"
    evil.write_bytes(pickle.dumps(Call(os.system, f"touch {marker}")))
    (tmp_path / "a-file").write_text("")
    elsewhere = [  # which differ in nothing that a process of their own could show
        (arguments(tmp_path / "nowhere", tmp_path / "out"), [str(tmp_path / "nowhere"), "does not exist"]),
        (arguments(original, tmp_path / "a-file" / "out"), ["a-file"]),
    ]
    for argv, parts in elsewhere:
        with pytest.raises(minti.InputError) as error:
            sample.main(argv)
        assert all(part in str(error.value) for part in parts)
    cases = [
        (arguments(broken, tmp_path / "out"), [str(broken / UNET_FILE), "truncated or damaged"]),
        (arguments(evil, tmp_path / "out"), [str(evil), "system", "malicious"]),
        (arguments(original, tmp_path / "out", "--size", "100"), ["100x100", "multiples of 8"]),
    ]
    for argv, parts in cases:
        done = command(*argv)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("minti.sample: error: ")
        assert all(part in done.stderr for part in parts), done.stderr
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_keeps_what_is_finished(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--num-images", "500", "--batch-size", "1", "--steps", "10", "--seed", "7"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minti.sample", *arguments(original, out, *more)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 90
        while len(list(out.glob("cat-*.png"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert text.strip().splitlines()[-1] == "minti.sample: interrupted; what was finished is kept"
    pictures = sorted(out.glob("cat-*.png"))
    assert 3 <= len(pictures) < 500
    assert {p.name for p in pictures} == {f"cat-{7 + i}.png" for i in range(len(pictures))}
    for path in pictures:
        Image.open(path).load()
    width, height = Image.open(out / "grid.png").size
    assert width * height >= len(pictures) * 64 * 64
    assert {p.name for p in out.iterdir()} == {p.name for p in pictures} | {"grid.png", "config.yaml"}


# Paths ---


def test_paths_that_hold_no_checkpoint(refused: Callable, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "empty", "not a whole Stable Diffusion folder", "no unet")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused(tmp_path / "link", tmp_path / "link", "link to something that is not there")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", tmp_path / "loop")


def test_a_folder_with_a_single_file_in_it_is_a_hint(refused: Callable, file: Path) -> None:
    refused(file.parent, "did you mean", file)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("FluxPipeline", ["transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"]),
        ("StableDiffusion3Pipeline", ["transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"]),
        ("PixArtAlphaPipeline", ["transformer", "vae", "text_encoder", "scheduler"]),
        ("DDPMPipeline", ["unet", "scheduler"]),
    ],
)
def test_folders_of_other_models(kind: str, parts: list[str], refused: Callable, tmp_path: Path) -> None:
    for part in parts:
        (tmp_path / kind / part).mkdir(parents=True)
    (tmp_path / kind / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    line = refused(tmp_path / kind, tmp_path / kind)
    assert kind in line
    assert "SDXL" not in line


def test_a_clip_model_instead_of_a_checkpoint(refused: Callable, folder: Path) -> None:
    refused(folder / "text_encoder", "not a whole Stable Diffusion folder")
    refused(
        folder / "text_encoder" / "model.safetensors", "model.safetensors", "not a whole Stable Diffusion"
    )
    refused(folder / "unet", "not a whole Stable Diffusion folder")
    refused(folder / UNET_FILE, "not a whole Stable Diffusion")


def test_single_files_of_other_models(refused: Callable, weights: dict, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(weights | {"conditioner.embedders.0.x": torch.ones(1)}, path)
    refused(path, path, "conditioner.embedders.0.x")
    save_file(weights | {"cond_stage_model.transformer.token_emb.weight": torch.ones(1)}, path)
    refused(path, path, "unexpected key cond_stage_model.transformer.token_emb.weight")
    save_file({"double_blocks.0.img_attn.proj.weight": torch.ones(2, 2)}, path)
    refused(path, path, "not a whole Stable Diffusion model")
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)}, path)
    refused(path, path, "not a whole Stable Diffusion model")
    save_file({k: t for k, t in weights.items() if not k.startswith("first_stage_model.")}, path)
    refused(path, path, "not a whole Stable Diffusion model")


# Damaged files ---


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_files_of_a_folder_that_are_no_weights(part: str, refused: Callable, folder: Path) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    refused(folder, path, "truncated or damaged", "safetensors", "download it again")
    path.write_bytes(content[:8] + b"}" + content[9:])
    refused(folder, path)
    path.write_bytes(b"")
    refused(folder, path, "download it again")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167536\n")
    refused(folder, path, "git-LFS pointer", "git lfs pull")
    path.write_bytes(b"<!doctype html><html>Please log in</html>")
    refused(folder, path, "web page")
    path.unlink()
    refused(folder, folder / part, "no weights")
    path.symlink_to("../../blobs/0123")
    refused(folder, path, "link to a file that is not there", "download")


def test_a_missing_shard(refused: Callable, folder: Path) -> None:
    path = folder / UNET_FILE
    path.rename(path.with_name(f"{path.stem}-00001-of-00002.safetensors"))
    refused(folder, folder / "unet", "1 of the 2 pieces")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_ckpt(zipped: bool, refused: Callable, weights: dict, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for part in (0.001, 0.5, 0.99):
        path.write_bytes(content[: int(part * len(content))])
        refused(path, path, "damaged", "download it again")


class Call:
    """Pickles as the call of any function."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


@pytest.mark.parametrize("name", ["model.ckpt", "unet/diffusion_pytorch_model.bin"])
def test_a_pickle_that_wants_to_run_code(
    name: str, refused: Callable, weights: dict, folder: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "was-here"
    path = folder / name
    (folder / UNET_FILE).unlink()
    for call in (Call(os.system, f"touch {marker}"), Call(eval, f"open({str(marker)!r}, 'w')")):
        torch.save({"state_dict": weights, "callbacks": call}, path)
        refused(path if path.suffix == ".ckpt" else folder, path, "wants to run", "malicious")
        assert not marker.exists()


# Weights that do not fit ---


def test_wrong_shapes_and_keys_of_a_folder(refused: Callable, folder: Path) -> None:
    path = folder / UNET_FILE
    good = load_file(path)
    key = "mid_block.attentions.0.proj_in.weight"
    save_file(good | {key: torch.ones(3, 5)}, path)
    refused(folder, key, "(3, 5)", str(tuple(good[key].shape)))
    save_file({k: t for k, t in good.items() if k != key}, path)
    refused(folder, f"missing key {key}")
    save_file(good | {"mid_block.extra.weight": torch.ones(1)}, path)
    refused(folder, "unexpected key unet/mid_block.extra.weight")
    save_file({k: t for k, t in good.items() if "up_blocks" not in k}, path)
    refused(folder, "missing key up_blocks.0", "more)")


def test_wrong_shapes_and_keys_of_a_single_file(refused: Callable, weights: dict, file: Path) -> None:
    for key in (
        "model.diffusion_model.middle_block.1.proj_in.bias",
        "first_stage_model.decoder.up.2.block.1.conv1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias",
    ):
        save_file({k: t for k, t in weights.items() if k != key}, file)
        refused(file, f"missing key {key}")
        save_file(weights | {key: torch.ones(3, 5)}, file)
        refused(file, key, "(3, 5)")
        save_file(weights | {f"{key}.extra": torch.ones(1)}, file)
        refused(file, f"unexpected key {key}.extra")


def test_no_tensor_of_a_single_file_can_be_spoiled_unnoticed(
    weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each left out, flattened, or of another size in turn: always a clear refusal, and never a traceback."""
    from minti.formats.single_file import plan_single_file
    from minti.formats.weightfile import WeightFile

    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}

    def init(self: WeightFile, path: Path) -> None:
        self.path, self.shapes = path, dict(current)
        self.dtypes = {key: torch.float32 for key in current}
        self.nbytes, self.metadata = {key: 4 for key in current}, {}

    monkeypatch.setattr(WeightFile, "__init__", init)
    structural = [  # those that configs are read from
        key
        for key in shapes
        if ".layers.0.mlp.fc1" in key or "embedding" in key or "conv_in" in key or "conv_out" in key
        if key.endswith("weight")
    ]
    structural += [f"model.diffusion_model.{k}.weight" for k in ("input_blocks.0.0", "out.2", "time_embed.0")]
    structural += [f"model.diffusion_model.input_blocks.{i}.0.out_layers.3.weight" for i in (1, 4, 7, 10)]
    structural += ["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"]
    structural += [
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "first_stage_model.post_quant_conv.weight",
    ]
    # The others are only compared, all in the same way, so a few of them stand for all.
    spoilings = {key: (None, (7, 5)) for key in list(shapes)[::83]}
    for key in structural:
        spoilings[key] = (None, (), (48, *shapes[key][1:]))
    for key, ways in spoilings.items():
        for spoiled in ways:
            current = {k: s for k, s in shapes.items() if k != key}
            if "token_embedding" in key and spoiled == (48, 64):
                continue  # a smaller vocabulary is possible; it is compared with the tokenizer's
            if spoiled is not None:
                current |= {key: spoiled}
            try:
                problems = plan_single_file(tmp_path / "m.safetensors", ema=False).problems()
            except minti.InputError as error:
                problems = [str(error)]
            except Exception as error:
                raise AssertionError(f"{key} as {spoiled}: {type(error).__name__}: {error}") from error
            assert problems, f"{key} as {spoiled}"


def test_weights_that_are_no_numbers(refused: Callable, folder: Path) -> None:
    for name in (UNET_FILE, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        path = folder / name
        good = load_file(path)
        key = list(good)[5]
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoiled = good[key].clone()
            spoiled.view(-1)[-1] = bad
            save_file(good | {key: spoiled}, path)
            refused(folder, folder, key, "NaN or infinity")
        save_file(good, path)


def test_weights_too_large_for_the_dtype(refused: Callable, folder: Path) -> None:
    path = folder / UNET_FILE
    good = load_file(path)
    save_file(good | {"conv_in.bias": good["conv_in.bias"] + 1e5}, path)
    refused(folder, "conv_in.bias", "float16", "--dtype", more=["--dtype", "float16"])
    minti.load(folder, device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_quantised_weights(dtype: torch.dtype, refused: Callable, folder: Path, weights: dict) -> None:
    path = folder / UNET_FILE
    good = load_file(path)
    save_file(good | {"conv_in.weight": good["conv_in.weight"].to(dtype)}, path)
    refused(folder, "conv_in.weight", "int", "quantised")
    torch.save({k: t.to(dtype) if "proj_in" in k else t for k, t in weights.items()}, folder / "m.ckpt")
    refused(folder / "m.ckpt", "proj_in", "quantised")


# Configs ---


@pytest.mark.parametrize(
    "name",
    ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"],
)
def test_broken_json(name: str, refused: Callable, folder: Path) -> None:
    path = folder / name
    for content in (b"{", b"", b"[1, 2]", b"\xff\xfe{}", b"<html>"):
        path.write_bytes(content)
        refused(folder, path)
    path.unlink()
    refused(folder, path)


def test_broken_model_index_and_tokenizer(refused: Callable, folder: Path) -> None:
    good = (folder / "tokenizer" / "vocab.json").read_bytes()
    for name in ("model_index.json", "tokenizer/vocab.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_text("{")
        refused(folder, folder / name)
        (folder / name).write_bytes(content)
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    refused(folder, "tokenizer")
    (folder / "tokenizer" / "vocab.json").write_bytes(good)
    (folder / "tokenizer" / "merges.txt").unlink()
    refused(folder, "merges.txt")
    shutil.rmtree(folder / "tokenizer")
    refused(folder, "tokenizer", "tools/download.py")


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            ["FlowMatch"],
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "MyScheduler"}, ["_class_name", "MyScheduler"]),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, ["prediction_type", "flow"]),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, ["beta_schedule", "cosine"]),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "odd"}, ["timestep_spacing", "odd"]),
        ("unet/config.json", {"act_fn": "gelu"}, ["act_fn", "gelu"]),
        ("unet/config.json", {"block_out_channels": None}, ["block_out_channels"]),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 4}, ["AttnDownBlock2D"]),
        ("unet/config.json", {"attention_head_dim": [8, 8]}, ["attention_head_dim"]),
        ("unet/config.json", {"in_channels": 7}, ["conv_in.weight"]),
        ("unet/config.json", {"cross_attention_dim": 32}, ["attn2.to_k.weight"]),
        ("vae/config.json", {"latent_channels": 16}, ["latent"]),
        ("text_encoder/config.json", {"hidden_act": "relu"}, ["hidden_act", "relu"]),
        ("text_encoder/config.json", {"num_hidden_layers": 4}, ["missing key", "layers.3"]),
        ("text_encoder/config.json", {"num_hidden_layers": 2}, ["unexpected key", "layers.2"]),
    ],
)
def test_configs_that_are_not_supported_or_do_not_fit(
    name: str, changes: dict, parts: list[str], refused: Callable, folder: Path
) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if name == "vae/config.json":
        refused(folder)
    else:
        refused(folder, *parts)


@pytest.mark.parametrize(
    "name",
    ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"],
)
def test_values_of_the_wrong_kind_in_configs(name: str, refused: Callable, folder: Path) -> None:
    path = folder / name
    good = json.loads(path.read_text())
    keys = (
        "block_out_channels",
        "layers_per_block",
        "in_channels",
        "norm_num_groups",
        "down_block_types",
        "cross_attention_dim",
        "latent_channels",
        "hidden_size",
        "num_attention_heads",
        "vocab_size",
        "num_train_timesteps",
        "beta_start",
    )
    if name.startswith("vae"):
        del good["down_block_types"]  # there is one kind only, so nobody reads it
    for key in (key for key in keys if good.get(key) is not None):
        for bad in ("many", [], {"a": 1}, -3):
            if (key, bad) != ("beta_start", -3):
                path.write_text(json.dumps(good | {key: bad}))
                try:
                    refused(folder)
                except BaseException as error:
                    raise AssertionError(f"{key} = {bad!r}: {type(error).__name__}: {error}") from error


def test_a_broken_yaml_beside_a_single_file(refused: Callable, file: Path) -> None:
    for content in ("model: [", "- 1", "model: {params: {parameterization: w}}"):
        file.with_suffix(".yaml").write_text(content)
        refused(file, file.with_suffix(".yaml"))


# Options ---


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--size", "100"], ["100x100", "multiples of 8", "104x104"]),
        (["--size", "64x60"], ["64x60", "64x64"]),
        (["--size", "0"], ["0"]),
        (["--size", "4"], ["multiples of 8"]),
        (["--size", "-64"], ["64"]),
        (["--steps", "1000"], ["1000", "999"]),
        (["--steps", "0"], ["--steps"]),
        (["--device", "cuda:7" if not torch.cuda.is_available() else "cuda:99"], ["cuda"]),
        (["--device", "toaster"], ["toaster"]),
        (["--variant", "bf16"], ["bf16"]),
        (["--config", "/nonexistent/c.yaml"], ["/nonexistent/c.yaml"]),
        (["--guidance", "3", "--stesp", "4"], ["--stesp", "did you mean"]),
        (["--concept", "/nonexistent/word.safetensors"], ["/nonexistent/word.safetensors"]),
        (["--tokenizer", "/nonexistent"], ["/nonexistent"]),
    ],
)
def test_bad_options(more: list[str], parts: list[str], refused: Callable, original: Path) -> None:
    refused(original, *parts, more=more)


def test_bad_concepts(refused: Callable, original: Path, tmp_path: Path) -> None:
    wide, word = tmp_path / "wide.safetensors", tmp_path / "word.safetensors"
    Concept("<toy>", torch.ones(1, 768)).save(wide)
    refused(original, "<toy>", "768", "64", "SD 1.x", more=["--concept", str(wide)])
    Concept("<toy>", torch.ones(1, 64)).save(word)
    refused(original, "<toy>", "twice", more=["--concept", str(word), "--concept", str(word)])
    refused(original, "'cat'", "know", more=["--concept", f"cat={word}"])
    word.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(original, word, "git-LFS", more=["--concept", str(word)])


def test_a_word_that_does_not_fit_into_the_prompt(refused: Callable, original: Path, tmp_path: Path) -> None:
    Concept("<toy>", torch.ones(3, 64)).save(tmp_path / "word.safetensors")
    prompt = "the " * 74 + "<toy>"
    more = ["--concept", str(tmp_path / "word.safetensors"), "--prompt", prompt]
    refused(original, "<toy>", "does not fit", more=more)


# Output ---


def test_output_below_a_file(refused: Callable, original: Path, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("mine")
    for out in (tmp_path / "a-file", tmp_path / "a-file" / "out"):
        with pytest.raises(SystemExit) as caught:
            run_command("minti.sample", lambda _, out=out: sample.main(arguments(original, out)))
        assert caught.value.code == 2
    assert (tmp_path / "a-file").read_text() == "mine"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_leaves_whole_files_only(
    after: int,
    call: str,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The disk fills up before the config, the first picture, the second, or the grid."""
    out, done, real = tmp_path / "out", [], getattr(os, call)

    def filling_up(*args: object) -> None:
        if call == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode):
            return  # a folder is flushed after the file in it is complete
        if len(done) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(args)
        real(*args)

    monkeypatch.setattr(os, call, filling_up)
    with pytest.raises(SystemExit) as caught:
        argv = arguments(original, out, "--num-images", "2", "--batch-size", "1")
        run_command("minti.sample", lambda _: sample.main(argv))
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "No space left on device; free some space" in line
    assert str(out) in line
    monkeypatch.undo()
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []
    expected = ["config.yaml", "cat-0.png", "cat-1.png"][:after]
    assert sorted(p.name for p in out.iterdir()) == sorted(expected)
    for path in out.glob("*.png"):
        Image.open(path).load()


def test_what_was_there_survives_a_full_disk(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    sample.main(arguments(original, out))
    before = {path: path.read_bytes() for path in out.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit):
        run_command("m", lambda _: sample.main(arguments(original, out, "--overwrite", "--seed", "0")))
    assert {path: path.read_bytes() for path in out.iterdir()} == before
