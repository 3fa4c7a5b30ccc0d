"""The same model comes out of every container that public checkpoints come in, without a second copy."""

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

import minti
from minti.formats import configs
from minti.formats.checkpoint import make_plan, probe_prediction_type, trained_size
from minti.formats.load_plan import CheckpointPlan, PartPlan
from minti.formats.vocabulary import read_tokenizer
from minti.model.clip import CLIPTextModel
from minti.model.config import ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from minti.model.diffusion import Schedule
from minti.model.unet import UNet
from minti.model.vae import VAE

from .oracles import pipeline, randomise, save_folder, shared, single_file, write_tokenizer

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        family: save_folder(root / family, family, "v_prediction" if family == "sd2" else "epsilon")
        for family in ("sd1", "sd2", "inpainting")
    }


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, minti.StableDiffusion]:
    return {family: minti.load(folder, device="cpu") for family, folder in folders.items()}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the SD 1.x folder, to do things to."""
    return Path(shutil.copytree(folders["sd1"], tmp_path / "folder"))


def same(ours: minti.StableDiffusion, expected: minti.StableDiffusion) -> None:
    """Bit for bit the same weights, configs, schedule and token ids."""
    for part in ("unet", "vae", "text_encoder"):
        a, b = getattr(ours, part), getattr(expected, part)
        # Single files do not tell the size of the pictures in training; upcasting changes float16 only.
        free = {"sample_size": (64, 64), "upcast_attention": False} if part == "unet" else {}
        assert vars(a.config) | free == vars(b.config) | free
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype, key
            assert torch.equal(a[key], b[key]), key
            assert not a[key].requires_grad
        assert not getattr(ours, part).training
    assert ours.schedule.config == expected.schedule.config
    prompts = ["a photo of the cat!", "", "red dog on grass"]
    assert torch.equal(ours.tokenizer(prompts), expected.tokenizer(prompts))


def same_picture(ours: minti.StableDiffusion, expected: minti.StableDiffusion) -> None:
    """The same up to the last bit of rounding: memory lies differently, and SD 2 files ask for upcasting."""
    options = {"steps": 2, "seed": 3, "size": 64}
    (a,), (b,) = (sd.sample("a photo of the cat", **options) for sd in (ours, expected))
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


# Folders ---


@pytest.mark.parametrize("family", ["sd1", "sd2", "inpainting"])
def test_a_folder_gives_the_weights_of_its_pipeline(family: str, models: dict, tmp_path: Path) -> None:
    pipe = pipeline(tmp_path, family)
    for part in WEIGHTS:
        ours = getattr(models[family], part).state_dict()
        theirs = getattr(pipe, part).state_dict()
        theirs = {
            key.removeprefix("text_model."): t for key, t in theirs.items() if "position_ids" not in key
        }
        assert {key.removeprefix("text_model.") for key in ours} == theirs.keys()
        assert all(torch.equal(t, theirs[key.removeprefix("text_model.")]) for key, t in ours.items())
    config = models[family].schedule.config
    assert config.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    assert (config.steps_offset, config.set_alpha_to_one) == (1, False)


def as_cache(folder: Path, root: Path) -> Path:
    """The folder as huggingface_hub keeps it: snapshots of links to content-addressed files."""
    cache = root / "models--some--model"
    snapshot = cache / "snapshots" / "0123456789abcdef"
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(snapshot.name)
    for number, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = cache / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return cache


def test_the_cache_of_huggingface_hub(models: dict, folder: Path, tmp_path: Path) -> None:
    cache = as_cache(folder, tmp_path)
    for path in (cache, cache / "snapshots" / "0123456789abcdef", str(cache)):
        same(minti.load(path, device="cpu"), models["sd1"])
    same_picture(minti.load(cache, device="cpu"), models["sd1"])


def test_the_cache_of_huggingface_hub_with_an_older_revision(
    models: dict, folder: Path, tmp_path: Path
) -> None:
    cache = as_cache(folder, tmp_path)
    older = cache / "snapshots" / "ffff"
    older.mkdir()
    (older / "model_index.json").write_text("{}")
    os.utime(older, (1, 1))
    same(minti.load(cache, device="cpu"), models["sd1"])


def test_variant(models: dict, folder: Path) -> None:
    marks = {}
    for part, stem in WEIGHTS.items():
        weights = load_file(folder / part / f"{stem}.safetensors")
        marks[part] = {key: tensor + 1 for key, tensor in weights.items()}
        save_file(marks[part], folder / part / f"{stem}.fp16.safetensors")
    same(minti.load(folder, device="cpu"), models["sd1"])
    other = minti.load(folder, device="cpu", variant="fp16")
    assert torch.equal(other.unet.conv_in.weight, marks["unet"]["conv_in.weight"])
    assert torch.equal(other.vae.quant_conv.bias, marks["vae"]["quant_conv.bias"])
    with pytest.raises(minti.InputError, match=r"no weights of variant 'bf16' in any part"):
        minti.load(folder, device="cpu", variant="bf16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_variant_that_is_the_only_one(dtype: str, models: dict, folder: Path) -> None:
    for part, stem in WEIGHTS.items():
        path = folder / part / f"{stem}.safetensors"
        weights = {key: tensor.half() for key, tensor in load_file(path).items()}
        save_file(weights, folder / part / f"{stem}.fp16.safetensors")
        path.unlink()
    sd = minti.load(folder, device="cpu", dtype=dtype)
    expected = models["sd1"].unet.state_dict()
    assert all(torch.equal(t, expected[key].half().to(sd.dtype)) for key, t in sd.unet.state_dict().items())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_safetensors(variant: str | None, models: dict, folder: Path, tmp_path: Path) -> None:
    pipe = pipeline(tmp_path, "sd1")
    for part, stem in WEIGHTS.items():
        (folder / part / f"{stem}.safetensors").unlink()
        size = "200KB" if part == "text_encoder" else "2MB"
        getattr(pipe, part).save_pretrained(folder / part, max_shard_size=size, variant=variant)
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
        assert len(list((folder / part).glob("*.index*.json"))) == 1
    same(minti.load(folder, device="cpu"), models["sd1"])
    same(minti.load(folder, device="cpu", variant=variant), models["sd1"])


@pytest.mark.parametrize("zipped", [True, False])
def test_bin(zipped: bool, models: dict, folder: Path) -> None:
    for part, stem in WEIGHTS.items():
        path = folder / part / f"{stem}.safetensors"
        name = "pytorch_model" if part == "text_encoder" else stem
        weights = load_file(path)
        torch.save(weights, folder / part / f"{name}.bin", _use_new_zipfile_serialization=zipped)
        path.unlink()
    same(minti.load(folder, device="cpu"), models["sd1"])


def test_sharded_bin(models: dict, folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    keys = list(weights := load_file(path))
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for i, name in enumerate(names):
        torch.save({key: weights[key] for key in keys[i::2]}, path.with_name(name))
    index = {"metadata": {}, "weight_map": {key: names[i % 2] for i, key in enumerate(keys)}}
    path.with_name("pytorch_model.bin.index.json").write_text(json.dumps(index))
    path.unlink()
    same(minti.load(folder, device="cpu"), models["sd1"])


def test_safetensors_go_before_bin(models: dict, folder: Path) -> None:
    torch.save({"x": torch.ones(1)}, folder / "unet" / "diffusion_pytorch_model.bin")
    same(minti.load(folder, device="cpu"), models["sd1"])


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("position_ids", [False, True])
def test_text_encoder_with_and_without_prefix_and_position_ids(
    prefix: str, position_ids: bool, models: dict, folder: Path
) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"{prefix}{key.removeprefix('text_model.')}": t for key, t in load_file(path).items()}
    if position_ids:
        weights[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path)
    same(minti.load(folder, device="cpu"), models["sd1"])


def test_old_names_of_the_autoencoders_attention(models: dict, folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    weights = load_file(path)
    for new, name in old.items():
        weights = {key.replace(new, name): tensor for key, tensor in weights.items()}
    assert sum("proj_attn" in key for key in weights) == 4
    save_file(weights, path)
    same(minti.load(folder, device="cpu"), models["sd1"])


def test_the_schedulers_of_public_checkpoints_are_read(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    for model in ("sd14", "sd15", "sd21", "sd21-base", "sd15-inpainting", "sd2-inpainting"):
        shutil.copyfile(shared(f"configs/{model}/scheduler/scheduler_config.json"), path)
        config = make_plan(folder).schedule
        kind = "v_prediction" if model == "sd21" else "epsilon"
        assert config == replace(ScheduleConfig(), prediction_type=kind), model


# Single files ---


def save_single(path: Path, weights: dict[str, torch.Tensor], kind: str = "safetensors") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "safetensors":
        save_file(weights, path)
    else:
        content = {"state_dict": weights, "global_step": 470000, "epoch": 2}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy ckpt")
    return path


def load_single(path: Path, family: str = "sd1", **options) -> minti.StableDiffusion:
    if not (path.parent / "tokenizer").exists():
        write_tokenizer(path.parent / "tokenizer", pad="<|endoftext|>")  # the pad is the family's, not this
    return minti.load(path, device="cpu", **options)


def expected(models: dict, family: str, kind: str = "epsilon") -> minti.StableDiffusion:
    sd = models[family]
    return replace(sd, schedule=Schedule(replace(sd.schedule.config, prediction_type=kind)))


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "legacy ckpt"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "inpainting"])
def test_single_file(family: str, kind: str, models: dict, tmp_path: Path) -> None:
    suffix = ".safetensors" if kind == "safetensors" else ".ckpt"
    path = save_single(tmp_path / f"model{suffix}", single_file(models[family]), kind)
    sd = load_single(path)
    same(sd, expected(models, family))
    if kind != "legacy ckpt":
        same_picture(sd, expected(models, family))


def test_single_file_with_objects_of_a_training_framework(
    models: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("pytorch_lightning_like")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {
        "state_dict": single_file(models["sd1"]),
        "callbacks": {module.ModelCheckpoint: {"best": module.ModelCheckpoint()}},
    }
    torch.save(content, tmp_path / "model.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    same(load_single(tmp_path / "model.ckpt"), expected(models, "sd1"))


def with_extras(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What training leaves beside the weights."""
    return weights | {
        "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        "alphas_cumprod": Schedule(ScheduleConfig()).alphas_cumprod,
        "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
        "posterior_log_variance_clipped": torch.ones(1000),
        "logvar": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "first_stage_model.loss.logvar": torch.tensor(0.0),
    }


def test_ema(models: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = single_file(models["sd1"])
    prefix = "model.diffusion_model."
    averaged = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor * 2
        for key, tensor in weights.items()
        if key.startswith(prefix)
    }
    assert "model_ema.diffusion_modelinput_blocks00weight" in averaged
    path = save_single(tmp_path / "model.safetensors", with_extras(weights) | averaged)
    with caplog.at_level(logging.INFO):
        same(load_single(path), expected(models, "sd1"))
        assert "UNet: raw weights (--ema for the averaged ones)" in caplog.text
        caplog.clear()
        sd = load_single(path, ema=True)
        assert "UNet: averaged (EMA) weights" in caplog.text
    for key, tensor in sd.unet.state_dict().items():
        assert torch.equal(tensor, models["sd1"].unet.state_dict()[key] * 2)
    assert torch.equal(sd.vae.quant_conv.weight, models["sd1"].vae.quant_conv.weight)


def test_ema_where_there_is_none(models: dict, tmp_path: Path) -> None:
    path = save_single(tmp_path / "model.safetensors", with_extras(single_file(models["sd1"])))
    same(load_single(path), expected(models, "sd1"))
    with pytest.raises(minti.InputError, match="holds no EMA weights beside the others; leave out --ema"):
        load_single(path, ema=True)


def test_text_encoder_without_its_prefix_as_in_some_fine_tuned_files(models: dict, tmp_path: Path) -> None:
    weights = {key.replace("text_model.", ""): t for key, t in single_file(models["sd1"]).items()}
    assert "cond_stage_model.transformer.final_layer_norm.weight" in weights
    weights["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    same(load_single(save_single(tmp_path / "m.ckpt", weights, "ckpt")), expected(models, "sd1"))


def test_vae_attention_stored_as_matrices(models: dict, tmp_path: Path) -> None:
    weights = single_file(models["sd1"])
    for key in [key for key in weights if ".attn_1." in key and weights[key].ndim == 4]:
        weights[key] = weights[key][:, :, 0, 0]
    same(load_single(save_single(tmp_path / "m.safetensors", weights)), expected(models, "sd1"))


def test_misaligned_header(models: dict, tmp_path: Path) -> None:
    content = save(single_file(models["sd1"]))
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    header += b" " * ((-len(header) + 3) % 8)  # three bytes past a multiple of eight
    path = tmp_path / "old.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    sd = load_single(path)
    same(sd, expected(models, "sd1"))
    same_picture(sd, models["sd1"])


ODD = {
    "three levels, one layer, depth 2": (
        UNetConfig(
            block_out_channels=(32, 96, 64),
            layers_per_block=1,
            transformer_depth=(1, 2, 0),
            mid_depth=2,
            num_attention_heads=(8, 8, 8),
            cross_attention_dim=64,
        ),
        VAEConfig(block_out_channels=(32, 64, 32), layers_per_block=1, latent_channels=4),
    ),
    "two levels, three layers, linear": (
        UNetConfig(
            in_channels=3,
            out_channels=3,
            block_out_channels=(64, 128),
            layers_per_block=3,
            transformer_depth=(0, 2),
            mid_depth=1,
            num_attention_heads=(1, 2),
            cross_attention_dim=64,
            use_linear_projection=True,
        ),
        VAEConfig(block_out_channels=(32, 64), layers_per_block=3, latent_channels=3),
    ),
    "one level, no middle": (
        UNetConfig(
            block_out_channels=(32,),
            layers_per_block=2,
            transformer_depth=(1,),
            mid_depth=None,
            num_attention_heads=(8,),
            cross_attention_dim=64,
        ),
        VAEConfig(block_out_channels=(32, 32, 32, 32)),
    ),
}


@pytest.mark.parametrize(
    ("name", "hidden_act"),
    # A UNet that projects with matrices is one of Stable Diffusion 2, whose text encoder has GELU.
    [(name, act) for name in ODD for act in ("quick_gelu", "gelu") if act == "gelu" or "linear" not in name],
)
def test_odd_sizes_are_inferred_from_the_shapes(name: str, hidden_act: str, tmp_path: Path) -> None:
    unet, vae = ODD[name]
    words = read_tokenizer(
        write_tokenizer(tmp_path / "tokenizer"), pad="!" if hidden_act == "gelu" else "<|endoftext|>"
    )
    text = TextConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act=hidden_act,
        eos_token_id=len(words) - 1,
    )
    torch.manual_seed(0)
    modules = [randomise(module, 1) for module in (CLIPTextModel(text), UNet(unet), VAE(vae))]
    sd = minti.StableDiffusion(words, *modules, Schedule(ScheduleConfig()))
    again = load_single(save_single(tmp_path / "odd.safetensors", single_file(sd)), prediction_type="epsilon")
    same(again, sd)
    same_picture(again, sd)


# eps or v ---


def shifted(models: dict, family: str = "sd2", by: float = -3.0) -> dict[str, torch.Tensor]:
    """A file whose UNet answers the probe as one that predicts v."""
    weights = single_file(models[family])
    weights["model.diffusion_model.out.2.bias"] += by
    return weights


def test_the_probe_tells_v_from_eps(models: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for by, kind in ((0.0, "epsilon"), (-3.0, "v_prediction")):
        path = save_single(tmp_path / f"{kind}.safetensors", shifted(models, by=by))
        with caplog.at_level(logging.INFO):
            sd = load_single(path)
        assert sd.schedule.config.prediction_type == kind
        assert probe_prediction_type(sd.unet) == kind
        note = f"prediction type: {kind}, judging by the UNet's output (--prediction-type overrides)"
        assert f"{path}: {note}" in caplog.text


def test_the_threshold_of_the_probe_is_minus_one(models: dict) -> None:
    """Input 0.5, time 999, context 0.5; the mean of output minus input below -1 means v."""
    unet = models["sd1"].unet
    x, context = torch.full((1, 4, 8, 8), 0.5), torch.full((1, 77, 64), 0.5)
    with torch.no_grad():
        middle = (unet(x, torch.tensor([999]), context) - x).mean().item()
        bias = unet.conv_out.bias.clone()
        try:
            for shift, kind in ((-0.99, "epsilon"), (-1.01, "v_prediction")):
                unet.conv_out.bias.copy_(bias + shift - middle)
                assert probe_prediction_type(unet) == kind
        finally:
            unet.conv_out.bias.copy_(bias)


def test_sd1_files_are_not_probed(models: dict, tmp_path: Path) -> None:
    path = save_single(tmp_path / "m.safetensors", shifted(models, "sd1"))
    assert load_single(path).schedule.config.prediction_type == "epsilon"


def test_prediction_type_option_goes_before_everything(
    models: dict, folders: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_single(tmp_path / "m.safetensors", shifted(models))
    (tmp_path / "m.yaml").write_text("model: {params: {parameterization: v}}")
    for kind in ("v_prediction", "sample"):
        assert load_single(path, prediction_type=kind).schedule.config.prediction_type == kind
        sd = minti.load(folders["sd2"], device="cpu", prediction_type=kind)
        assert sd.schedule.config.prediction_type == kind


@pytest.mark.parametrize(("family", "by"), [("sd2", 0.0), ("sd2", -3.0), ("sd1", 0.0)])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("model:\n  params:\n    parameterization: v\n", "v_prediction"),
        ("model:\n  params:\n    parameterization: eps\n", "epsilon"),
        ("model:\n  params:\n    linear_start: 0.00085\n", "epsilon"),
    ],
)
def test_a_yaml_beside_the_file_goes_before_the_probe(
    content: str,
    kind: str,
    family: str,
    by: float,
    models: dict,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = save_single(tmp_path / "m.safetensors", shifted(models, family, by))
    (tmp_path / "m.yaml").write_text(content)
    with caplog.at_level(logging.INFO):
        assert load_single(path).schedule.config.prediction_type == kind
    assert f"prediction type: {kind}, as m.yaml says" in caplog.text


def test_a_yaml_that_is_no_config(models: dict, tmp_path: Path) -> None:
    path = save_single(tmp_path / "m.safetensors", single_file(models["sd1"]))
    for content in ("model: [", "3", "model: {params: 3}", "model: {params: {parameterization: w}}", ""):
        (tmp_path / "m.yaml").write_text(content)
        with pytest.raises(minti.InputError, match=r"m\.yaml: .*not the config of a latent diffusion"):
            load_single(path)


# The tokenizer of a single file ---


def test_tokenizer_beside_given_or_missing(models: dict, tmp_path: Path) -> None:
    path = save_single(tmp_path / "alone" / "m.safetensors", single_file(models["sd1"]))
    with pytest.raises(minti.InputError) as caught:
        minti.load(path, device="cpu")
    command = f"python tools/download.py tokenizer {tmp_path / 'alone' / 'tokenizer'}"
    assert f"{path}: comes without a tokenizer" in str(caught.value)
    assert command in str(caught.value)
    assert "--tokenizer PATH" in str(caught.value)

    words = write_tokenizer(tmp_path / "words")
    same(minti.load(path, device="cpu", tokenizer=words), models["sd1"])
    with pytest.raises(minti.InputError, match="no tokenizer here"):
        minti.load(path, device="cpu", tokenizer=tmp_path)

    for name in ("vocab.json", "merges.txt"):
        shutil.copy(words / name, path.parent)
    same(minti.load(path, device="cpu"), models["sd1"])


def test_openais_vocabulary_beside_the_file(models: dict, tmp_path: Path) -> None:
    path = save_single(tmp_path / "m.safetensors", single_file(models["sd1"]))
    shutil.copy(shared("clip-bpe/bpe_simple_vocab_16e6.txt.gz"), tmp_path)
    # Found, and refused because this model is too small for its 49,408 ids.
    rows = models["sd1"].text_encoder.config.vocab_size
    with pytest.raises(minti.InputError, match=f"has 49408 ids, .* text encoder of .* knows {rows}"):
        minti.load(path, device="cpu")


@pytest.mark.parametrize(("family", "pad"), [("sd1", "<|endoftext|>"), ("sd2", "!")])
def test_the_padding_of_a_single_file_is_its_familys(
    family: str, pad: str, models: dict, tmp_path: Path
) -> None:
    path = save_single(tmp_path / "m.safetensors", single_file(models[family]))
    sd = load_single(path)
    assert sd.tokenizer("a cat")[0, -1] == sd.tokenizer.vocab[pad]


# Plans ---


def test_a_plan_reads_no_weights(folders: dict, models: dict, tmp_path: Path) -> None:
    for path in (folders["sd1"], save_single(tmp_path / "m.safetensors", single_file(models["sd2"]))):
        plan = make_plan(path)
        assert plan.problems() == []
        assert plan.unexpected == []
        for part in plan.parts.values():
            assert all(p.is_meta for p in part.module.parameters())
    assert make_plan(folders["sd1"]).layout == "diffusers"
    assert plan.layout == "single file"


def test_family_names(folders: dict) -> None:
    assert make_plan(folders["inpainting"]).family == "Stable Diffusion, own size inpainting"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("container", ["folder", "safetensors", "ckpt"])
def test_dtypes(container: str, dtype: str, folders: dict, models: dict, tmp_path: Path) -> None:
    path = folders["sd1"]
    if container != "folder":
        path = save_single(tmp_path / f"m.{container}", single_file(models["sd1"]), container)
        write_tokenizer(tmp_path / "tokenizer")
    sd = minti.load(path, device="cpu", dtype=dtype)
    for part in WEIGHTS:
        exact = getattr(models["sd1"], part).state_dict()
        for key, tensor in getattr(sd, part).state_dict().items():
            assert torch.equal(tensor, exact[key].to(getattr(torch, dtype)))


# Memory ---

MEASURE = """
import sys
from pathlib import Path
import torch
import minti
from minti.formats import weightfile
from minti.formats.checkpoint import make_plan

def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

path, dtype, chunk = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
weightfile.CHUNK = chunk or weightfile.CHUNK
plan = make_plan(path)  # holds no weights yet, but makes torch import all it needs for it
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = kib("VmRSS")
modules = [part.load(dtype, torch.device("cpu")) for part in plan.parts.values()]
peak = kib("VmHWM")
weights = sum(p.nbytes for module in modules for p in module.parameters())
print(weights, (peak - before) * 1024)
"""


def measure(path: Path, dtype: str, chunk: int = 0) -> float:
    """Peak resident size while loading, without what Python and torch take, over the size of the weights."""
    command = [sys.executable, "-c", MEASURE, str(path), dtype, str(chunk)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(minti.__file__).parents[1]
    )
    weights, peak = map(int, done.stdout.split())
    print(f"{path.name} as {dtype}: {weights / 2**20:.0f} MiB of weights, peak {peak / weights:.3f} of them")
    return peak / weights


needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="reads the peak resident size from Linux's /proc"
)


def big_file(path: Path, unet: UNetConfig, vae: VAEConfig, text: TextConfig) -> Path:
    with torch.device("meta"):
        modules = [CLIPTextModel(text), UNet(unet), VAE(vae)]
    sd = minti.StableDiffusion(None, *modules, None)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**20, generator=generator) * 0.02
    weights = {}
    for key, tensor in single_file(sd).items():
        copies = -(-tensor.numel() // len(block))
        weights[key] = block.repeat(copies)[: tensor.numel()].view(tensor.shape).clone()
    return save_single(path, weights, "ckpt" if path.suffix == ".ckpt" else "safetensors")


@needs_proc
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".safetensors", "float16"),
        (".ckpt", "float16"),
        pytest.param(".safetensors", "float32", marks=pytest.mark.slow),
    ],
)
def test_loading_never_holds_two_copies(suffix: str, dtype: str, tmp_path: Path) -> None:
    path = big_file(
        tmp_path / f"big{suffix}",
        UNetConfig(block_out_channels=(160, 320, 320, 320), cross_attention_dim=256),
        VAEConfig(block_out_channels=(64, 128, 128, 128)),
        TextConfig(
            vocab_size=20000,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
        ),
    )
    assert path.stat().st_size > 250e6
    try:
        # Pieces in the same proportion as at the size of SD 1.5, of which the next test makes one.
        chunk = int(path.stat().st_size / 4.27e9 * 128 * 2**20)
        assert measure(path, dtype, chunk) <= 1.15
    finally:
        path.unlink()


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_loading_never_holds_two_copies_at_the_size_of_sd15(suffix: str, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 10e9:
        pytest.skip("needs 10 GB of disk")
    path = big_file(tmp_path / f"big{suffix}", UNetConfig(), VAEConfig(), TextConfig())
    assert path.stat().st_size > 4.2e9
    try:
        for dtype in ("float32", "float16", "bfloat16"):
            assert measure(path, dtype) <= 1.15
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("config", "prediction_type", "pixels"),
    [("sd15", "epsilon", 512), ("sd21-base", "epsilon", 512), ("sd21", "v_prediction", 768)],
)
def test_size_of_the_pictures_a_single_file_was_trained_on(
    config: str, prediction_type: str, pixels: int
) -> None:
    """Single files do not say it; their folders' configs do."""
    raw = json.loads(shared(f"configs/{config}/unet/config.json").read_text())
    published = configs.unet_config(raw, config)
    with torch.device("meta"):
        unet = UNet(replace(published, sample_size=(64, 64)))  # what a single file is taken for
    schedule = ScheduleConfig(prediction_type=prediction_type)
    plan = CheckpointPlan(
        Path("model.safetensors"), "single file", {"unet": PartPlan(unet, {}, [])}, schedule
    )
    assert trained_size(plan) == published.sample_size == (pixels // 8, pixels // 8)
