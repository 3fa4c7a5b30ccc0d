"""Checkpoints as other tools write them: what they leave out, add, rename, and say in odd places."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import minti
from minti.formats import shapes_to_config
from minti.formats.checkpoint import make_plan
from minti.model.diffusion import Schedule

from .oracles import SCHEDULE, pipeline, save_folder, shared, single_file, write_tokenizer

TEXT = "cond_stage_model.transformer.text_model."
MODULES = ("text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    return {family: save_folder(root / family, family) for family in ("sd1", "sd2")}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, minti.StableDiffusion]:
    return {family: minti.load(folder, device="cpu") for family, folder in folders.items()}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the SD 1.x folder, to do things to."""
    return Path(shutil.copytree(folders["sd1"], tmp_path / "folder"))


def load(tmp_path: Path, weights: dict[str, torch.Tensor], **options) -> minti.StableDiffusion:
    """Load a single file of these weights; `metadata` goes into its header."""
    save_file(weights, tmp_path / "m.safetensors", options.pop("metadata", None))
    write_tokenizer(tmp_path / "tokenizer")
    return minti.load(tmp_path / "m.safetensors", device="cpu", **options)


def same(ours: minti.StableDiffusion, theirs: minti.StableDiffusion) -> None:
    """The same weights, the same activation, and the same ids, padding included."""
    for part in MODULES:
        a, b = (getattr(sd, part).state_dict() for sd in (ours, theirs))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), part
    assert ours.text_encoder.config.hidden_act == theirs.text_encoder.config.hidden_act
    assert torch.equal(ours.tokenizer("a cat!"), theirs.tokenizer("a cat!"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The text encoder of Stable Diffusion 2


def last_block(weights: dict) -> str:
    numbers = {int(key.split(".resblocks.")[1].split(".")[0]) for key in weights if ".resblocks." in key}
    return f".resblocks.{max(numbers)}."


def test_sd2_without_the_block_it_does_not_use(models: dict, tmp_path: Path) -> None:
    """As diffusers' own script writes it: the blocks of the folder, and no projection."""
    weights = single_file(models["sd2"])
    gone = (last_block(weights), "text_projection", "logit_scale")
    weights = {key: t for key, t in weights.items() if not any(part in key for part in gone)}
    same(load(tmp_path, weights, prediction_type="epsilon"), models["sd2"])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("projection", [True, False])
def test_sd2_at_its_true_size_has_23_layers(whole: bool, projection: bool) -> None:
    """Of the published names, with and without the last block, and with and without what is behind it."""
    prefix = "cond_stage_model.model."
    names = json.loads(shared("manifests/sd21-compvis.json").read_text())
    shapes = {key.removeprefix(prefix): tuple(s) for key, s in names.items() if key.startswith(prefix)}
    if not whole:
        shapes = {key: shape for key, shape in shapes.items() if ".resblocks.23." not in key}
    if not projection:
        del shapes["text_projection"]
    published = json.loads(shared("configs/sd21/text_encoder/config.json").read_text())
    config = shapes_to_config.openclip_text_config(shapes)
    assert config.num_hidden_layers == published["num_hidden_layers"] == 23


def renamed(models: dict) -> dict[str, torch.Tensor]:
    """Stable Diffusion 2 with the text encoder under the names of transformers."""
    text = models["sd2"].text_encoder.state_dict()
    weights = {k: t for k, t in single_file(models["sd2"]).items() if not k.startswith("cond_stage_model.")}
    return weights | {f"cond_stage_model.transformer.{key}": t.clone() for key, t in text.items()}


def test_sd2_with_names_of_transformers(models: dict, tmp_path: Path) -> None:
    """Told from SD 1 by its UNet: GELU, padding with "!", and eps or v is asked."""
    weights = renamed(models)
    sd = load(tmp_path, weights)
    same(sd, models["sd2"])
    assert sd.schedule.config.prediction_type == "epsilon"
    weights["model.diffusion_model.out.2.bias"] = weights["model.diffusion_model.out.2.bias"] - 3
    assert load(tmp_path, weights).schedule.config.prediction_type == "v_prediction"


def test_sd2_in_the_layout_of_the_later_training_code(models: dict, tmp_path: Path) -> None:
    weights = {
        key.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): t
        for key, t in single_file(models["sd2"]).items()
    }
    same(load(tmp_path, weights), models["sd2"])


# Keys that change nothing, and keys that do


def extra(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    text = {key: t for key, t in weights.items() if key.startswith(TEXT)}
    return {
        "projection": {"cond_stage_model.text_projection": torch.ones(64, 64)},
        "scale": {"cond_stage_model.logit_scale": torch.tensor(4.6)},
        "projection of transformers": {
            "cond_stage_model.transformer.text_projection.weight": torch.ones(64, 64)
        },
        "embedding manager": {
            key.replace("cond_stage_model", "embedding_manager.embedder"): t.clone()
            for key, t in text.items()
        },
        "both names": {key.replace("text_model.", ""): t + 1 for key, t in text.items()},
        "ema of the autoencoder": {"first_stage_model.model_ema.decay": torch.tensor(0.99)},
        "other half": {"cond_stage_model.transformer.vision_model.x": torch.ones(1)},
        "loss weights": {"lvlb_weights": torch.ones(1000)},
        "filter": {"safety_checker.x": torch.ones(1)},
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "projection",
        "scale",
        "projection of transformers",
        "embedding manager",
        "both names",
        "ema of the autoencoder",
        "other half",
        "loss weights",
        "filter",
    ],
)
def test_keys_that_change_nothing(name: str, models: dict, tmp_path: Path) -> None:
    weights = single_file(models["sd1"])
    same(load(tmp_path, weights | extra(name, weights)), models["sd1"])


@pytest.mark.parametrize("key", ["control_model.x", "lora_unet_x", "bundle_emb.word", "scaled_fp8", "spam"])
def test_keys_that_would_change_something_are_refused(key: str, models: dict, tmp_path: Path) -> None:
    with pytest.raises(minti.InputError, match=f"unexpected key {key}"):
        load(tmp_path, single_file(models["sd1"]) | {key: torch.ones(1)})


def test_inputs_that_minti_does_not_give_are_named(models: dict, tmp_path: Path) -> None:
    label = {"0.0.weight": (128, 40), "0.0.bias": (128,), "0.2.weight": (128, 128), "0.2.bias": (128,)}
    more = {f"model.diffusion_model.label_emb.{key}": torch.zeros(shape) for key, shape in label.items()}
    with pytest.raises(minti.InputError, match=r"needs more than a prompt .*unCLIP"):
        load(tmp_path, single_file(models["sd1"]) | more)


# What a file says of its prediction and its noise


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"ss_v_parameterization": "True"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False"}, "epsilon"),
        ({}, "epsilon"),
    ],
)
def test_metadata_tells_the_prediction(metadata: dict, kind: str, models: dict, tmp_path: Path) -> None:
    sd = load(tmp_path, single_file(models["sd1"]), metadata=metadata)
    assert sd.schedule.config.prediction_type == kind
    (tmp_path / "m.yml").write_text("model: {params: {parameterization: eps}}")
    assert (
        load(tmp_path, single_file(models["sd1"]), metadata=metadata).schedule.config.prediction_type
        == "epsilon"
    )


def zero_snr() -> DDIMScheduler:
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    return DDIMScheduler.from_config(SCHEDULE | more)


@pytest.mark.parametrize("told_by", ["keys", "alphas_cumprod", "betas", "metadata"])
def test_zero_terminal_snr_is_acted_on(told_by: str, models: dict, tmp_path: Path) -> None:
    """Marker keys of fine-tunes, or the buffers of training; with the picture that diffusers makes."""
    reference = zero_snr()
    more = {
        "keys": {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
        "alphas_cumprod": {"alphas_cumprod": reference.alphas_cumprod.half()},
        "betas": {"betas": reference.betas},
        "metadata": {},
    }[told_by]
    metadata = {"ss_zero_terminal_snr": "True"} if told_by == "metadata" else None
    sd = load(tmp_path, single_file(models["sd1"]) | more, metadata=metadata)
    assert sd.schedule.config.prediction_type == "v_prediction"
    torch.testing.assert_close(sd.schedule.alphas_cumprod, reference.alphas_cumprod, rtol=0, atol=1e-5)
    pipe = pipeline(tmp_path, "sd1")
    pipe.scheduler = reference
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        theirs = pipe("a photo of the cat", num_inference_steps=2, generator=generator, height=64, width=64)
    (ours,) = sd.sample("a photo of the cat", steps=2, seed=3, size=64)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs.images[0]).astype(int)).max() <= 1


def test_v_pred_alone(models: dict, tmp_path: Path) -> None:
    sd = load(tmp_path, single_file(models["sd1"]) | {"v_pred": torch.zeros(0)})
    assert sd.schedule.config == replace(models["sd1"].schedule.config, prediction_type="v_prediction")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_buffers_of_the_usual_schedule(dtype: torch.dtype, models: dict, tmp_path: Path) -> None:
    buffers = {"alphas_cumprod": models["sd1"].schedule.alphas_cumprod.to(dtype)}
    sd = load(tmp_path, single_file(models["sd1"]) | buffers)
    assert sd.schedule.config == models["sd1"].schedule.config


def test_buffers_of_another_schedule(models: dict, tmp_path: Path) -> None:
    """Refused, unless the config beside the file describes it."""
    other = replace(models["sd1"].schedule.config, beta_start=0.0015, beta_end=0.0195)
    weights = single_file(models["sd1"]) | {"alphas_cumprod": Schedule(other).alphas_cumprod}
    with pytest.raises(minti.InputError, match=r"noise schedule .* linear_start and linear_end into m\.yaml"):
        load(tmp_path, weights)
    (tmp_path / "m.yaml").write_text("model: {params: {linear_start: 0.0015, linear_end: 0.0195}}")
    assert load(tmp_path, weights).schedule.config == other
    for bad in ("linear_end: many", "linear_end: -1", "timesteps: 0", "beta_schedule: cosine"):
        (tmp_path / "m.yaml").write_text(f"model: {{params: {{{bad}}}}}")
        with pytest.raises(minti.InputError, match=rf"m\.yaml: {bad.split(':')[0]}"):
            load(tmp_path, weights)


# Folders


def test_a_variant_that_only_one_part_has(
    folder: Path, models: dict, caplog: pytest.LogCaptureFixture
) -> None:
    """As `variant="non_ema"` of SD 1.4 and 1.5: the other parts are taken as they are."""
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    other = plain.with_name("diffusion_pytorch_model.non_ema.safetensors")
    save_file({key: t + 1 for key, t in load_file(plain).items()}, other)
    same(minti.load(folder, device="cpu"), models["sd1"])
    with caplog.at_level("INFO"):
        sd = minti.load(folder, device="cpu", variant="non_ema")
    assert torch.equal(sd.unet.conv_in.weight, models["sd1"].unet.conv_in.weight + 1)
    assert torch.equal(sd.vae.quant_conv.weight, models["sd1"].vae.quant_conv.weight)
    assert "text_encoder: no non_ema weights, using model.safetensors" in caplog.text


def test_a_variant_that_is_all_that_one_part_has(folder: Path, models: dict) -> None:
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.bf16.safetensors"))
    same(minti.load(folder, device="cpu"), models["sd1"])
    same(minti.load(folder, device="cpu", variant="bf16"), models["sd1"])
    with pytest.raises(minti.InputError, match="no weights of variant 'fp16' in any part"):
        minti.load(folder, device="cpu", variant="fp16")


def test_pieces_without_their_list(folder: Path, models: dict, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.unet.save_pretrained(tmp_path / "pieces", max_shard_size="200KB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pieces = sorted((tmp_path / "pieces").glob("*.safetensors"))
    assert len(pieces) > 2
    for piece in pieces:
        shutil.copy(piece, folder / "unet")
    same(minti.load(folder, device="cpu"), models["sd1"])
    (folder / "unet" / pieces[1].name).unlink()
    with pytest.raises(minti.InputError, match=f"holds {len(pieces) - 1} of the {len(pieces)} pieces"):
        minti.load(folder, device="cpu")


def test_steps_offset_is_what_the_pipeline_of_diffusers_makes_it(folder: Path) -> None:
    for changes in ({"steps_offset": 0}, {"steps_offset": 1}):
        edit(folder / "scheduler" / "scheduler_config.json", **changes)
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        assert make_plan(folder).schedule.steps_offset == pipe.scheduler.config.steps_offset == 1


def test_a_size_that_is_no_square(folder: Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=[8, 12])
    (picture,) = minti.load(folder, device="cpu").sample("a cat", steps=1)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert picture.size == pipe("a cat", num_inference_steps=1).images[0].size == (96, 64)


@pytest.mark.parametrize("kind", [3, ["StableDiffusionPipeline"], {"a": 1}])
def test_a_pipeline_without_a_name(kind: object, folder: Path) -> None:
    edit(folder / "model_index.json", _class_name=kind)
    with pytest.raises(minti.InputError, match=r"model_index\.json: _class_name"):
        minti.load(folder, device="cpu")


def test_parts_of_different_models(folder: Path, folders: dict) -> None:
    edit(folder / "unet" / "config.json", cross_attention_dim=32)
    with pytest.raises(minti.InputError, match="does not fit"):
        minti.load(folder, device="cpu")


def test_a_stray_file_among_snapshots(folder: Path, tmp_path: Path) -> None:
    snapshots = tmp_path / "models--a--b" / "snapshots"
    snapshots.mkdir(parents=True)
    folder.rename(snapshots / "0123")
    (snapshots / ".DS_Store").write_text("x")
    assert make_plan(tmp_path / "models--a--b").path == snapshots / "0123"


# An autoencoder from elsewhere


@pytest.mark.parametrize("layout", ["folder", "whole folder", "file", "prefixed", "pickle"])
def test_another_autoencoder(layout: str, folders: dict, models: dict, tmp_path: Path) -> None:
    prefix = "first_stage_model."
    own = {k.removeprefix(prefix): t + 0.5 for k, t in single_file(models["sd1"]).items() if prefix in k}
    path = tmp_path / "vae.safetensors"
    if layout == "folder":
        shutil.copytree(folders["sd1"] / "vae", path := tmp_path / "other")
    elif layout == "whole folder":
        shutil.copytree(folders["sd1"], path := tmp_path / "other")
    elif layout == "file":
        save_file(own | {"loss.logvar": torch.zeros(1)}, path)
    elif layout == "prefixed":
        save_file({prefix + key: t for key, t in own.items()}, path)
    else:
        torch.save({"state_dict": own}, path := tmp_path / "vae.pt")
    if path.is_dir():
        file = (path / "vae" if (path / "vae").is_dir() else path) / "diffusion_pytorch_model.safetensors"
        save_file({key: t + 0.5 for key, t in load_file(file).items()}, file)
    expected = models["sd1"].vae.state_dict()
    weights = single_file(models["sd1"])
    for sd in (
        minti.load(folders["sd1"], device="cpu", vae=path),
        load(tmp_path, weights, vae=path),
        load(tmp_path, {k: t for k, t in weights.items() if prefix not in k}, vae=path),
    ):
        assert all(torch.equal(t, expected[key] + 0.5) for key, t in sd.vae.state_dict().items())


def test_a_file_without_autoencoder_says_how_to_give_one(models: dict, tmp_path: Path) -> None:
    weights = {k: t for k, t in single_file(models["sd1"]).items() if "first_stage_model." not in k}
    with pytest.raises(
        minti.InputError, match=r"no autoencoder \(first_stage_model\.\*\): give one with --vae"
    ):
        load(tmp_path, weights)
    save_file({"spam": torch.ones(1)}, tmp_path / "other.safetensors")
    for other in (tmp_path / "nowhere", tmp_path / "other.safetensors"):
        with pytest.raises(minti.InputError, match=other.name):
            load(tmp_path, weights, vae=other)


# What wrong files are


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight"], "LoRA"),
        (["lora_unet_x.hada_w1_a"], "LoRA"),
        (["lycoris_x.lokr_w1"], "LyCORIS"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["model.diffusion_model.joint_blocks.0.x"], "SD 3"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.mid.block_1.conv1.weight"], "VAE"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "UNet in the CompVis layout"),
        (["down_blocks.0.resnets.0.conv1.weight"], "UNet alone"),
        (["ip_adapter.1.to_k_ip.weight"], "IP-Adapter"),
        (["down_blocks.0.motion_modules.0.x"], "AnimateDiff"),
        (["text_model.embeddings.token_embedding.weight"], "text encoder alone"),
        (["module.down_blocks.0.x", "_orig_mod.x"], "torch has wrapped"),
        (["emb_params"], "learned word"),
    ],
)
def test_other_files_are_named(keys: list[str], kind: str, tmp_path: Path) -> None:
    with pytest.raises(
        minti.InputError, match="is not a whole Stable Diffusion model: it seems to be"
    ) as error:
        load(tmp_path, {key: torch.ones(2, 2) for key in keys})
    assert kind in str(error.value)


def test_an_identifier_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(minti.InputError, match=r"tools/download\.py runwayml/stable-diffusion-v1-5"):
        minti.load("runwayml/stable-diffusion-v1-5", device="cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.onnx", "ONNX"),
        ("openvino_model.xml", "OpenVINO"),
        ("model.msgpack", "Flax"),
        ("m.gguf", "gguf"),
    ],
)
def test_folders_of_other_formats(name: str, kind: str, folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / name).write_bytes(b"x")
    with pytest.raises(minti.InputError, match=f"no weights .*{kind}"):
        minti.load(folder, device="cpu")
