"""Key by key and shape by shape: our modules against public checkpoints, the key map against diffusers'."""

import json
import types

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as reference

from minti.formats import configs, keymap
from minti.formats import shapes_to_config as infer
from minti.formats.single_file import plan_single_file
from minti.formats.weightfile import WeightFile
from minti.model.clip import CLIPTextModel
from minti.model.config import ScheduleConfig, TextConfig
from minti.model.diffusion import Schedule
from minti.model.unet import UNet
from minti.model.vae import VAE

from .oracles import UNET, UNETS, shared, to_single_file
from .oracles import VAE as SMALL_VAE

PARTS = {
    "unet": (configs.unet_config, UNet),
    "vae": (configs.vae_config, VAE),
    "text_encoder": (configs.text_config, CLIPTextModel),
    "text_encoder_2": (configs.text_config, CLIPTextModel),
}


def on_meta(model: str, part: str) -> torch.nn.Module:
    """A full-size module, without memory, from the published config.json."""
    config, module = PARTS[part]
    path = shared(f"configs/{model}/{part}/config.json")
    with torch.device("meta"):
        return module(config(json.loads(path.read_text()), str(path)))


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads(shared(f"manifests/{name}").read_text()).items()}


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def all_blocks(model: torch.nn.Module) -> tuple[dict, dict]:
    if isinstance(model, UNet):
        return keymap.unet_blocks(model.config), keymap.UNET_LAYERS
    if isinstance(model, VAE):
        return keymap.vae_blocks(model.config), keymap.VAE_LAYERS
    return keymap.openclip_blocks(model.config), keymap.OPENCLIP_LAYERS


def origins(model: torch.nn.Module, prefix: str = "") -> dict[str, keymap.Origin]:
    return keymap.find_origins(model.state_dict(), *all_blocks(model), prefix)


# The diffusers layout ---


@pytest.mark.parametrize(
    ("model", "part", "name"),
    [
        ("sd14", "unet", "sd15-diffusers.unet"),
        ("sd14", "vae", "sd15-diffusers.vae"),
        ("sd14", "text_encoder", "sd15-diffusers.text_encoder"),
        ("sd15", "unet", "sd15-diffusers.unet"),
        ("sd15", "vae", "sd15-diffusers.vae"),
        ("sd15", "text_encoder", "sd15-diffusers.text_encoder"),
        ("sd15-inpainting", "unet", "sd15-inpainting-diffusers.unet"),
        ("sd21", "unet", "sd21-diffusers.unet"),
        ("sd21", "vae", "sd21-diffusers.vae"),
        ("sd21", "text_encoder", "sd21-diffusers.text_encoder"),
        ("sd21-base", "unet", "sd21-diffusers.unet"),
        ("sd21-base", "text_encoder", "sd21-diffusers.text_encoder"),
        ("sdxl-base", "unet", "sdxl-base-diffusers.unet"),
        ("sdxl-base", "vae", "sdxl-base-diffusers.vae"),
        ("sdxl-base", "text_encoder", "sdxl-base-diffusers.text_encoder"),
        ("sdxl-base", "text_encoder_2", "sdxl-base-diffusers.text_encoder_2"),
    ],
)
def test_modules_have_the_keys_and_shapes_of_published_folders(model: str, part: str, name: str) -> None:
    assert shapes(on_meta(model, part).state_dict()) == manifest(f"{name}.json")


@pytest.mark.parametrize(
    ("model", "part", "name"),
    [
        ("sd15", "text_encoder", "sd15-diffusers.text_encoder-transformers5"),
        ("sd15", "text_encoder", "sd15-diffusers.text_encoder-position_ids"),
        ("sd15", "vae", "sd15-diffusers.vae-old-attn-names"),
        ("sd21", "text_encoder", "sd21-diffusers.text_encoder-transformers5"),
        ("sd21", "text_encoder", "sd21-diffusers.text_encoder-position_ids"),
    ],
)
def test_other_spellings_of_folders_are_claimed_key_by_key(model: str, part: str, name: str) -> None:
    from minti.formats.folder import find_alias

    theirs = manifest(f"{name}.json")
    ours = shapes(on_meta(model, part).state_dict())
    found = {find_alias(key, set(theirs)): shape for key, shape in ours.items()}
    left = {key for key in theirs if key not in found}
    assert {key: theirs[key] for key in found} == found
    assert all(keymap.IGNORED.fullmatch(key) for key in left)
    assert left == {key for key in theirs if key.endswith("position_ids")}


# The CompVis layout ---

COMPVIS = [
    ("sd15-compvis.json", "sd15"),
    ("sd15-compvis-noema.json", "sd15"),
    ("sd15-inpainting-compvis.json", "sd15-inpainting"),
    ("sd21-compvis.json", "sd21"),
]


def fake_file(monkeypatch: pytest.MonkeyPatch, tensors: dict[str, tuple[int, ...]]) -> None:
    """Let a file seem to hold tensors of these shapes."""

    def init(self: WeightFile, path: object) -> None:
        self.path, self.shapes = path, tensors
        self.dtypes, self.metadata = dict.fromkeys(tensors, torch.float32), {}

    monkeypatch.setattr(WeightFile, "__init__", init)
    schedule = Schedule(ScheduleConfig()).alphas_cumprod  # which public files hold
    monkeypatch.setattr(WeightFile, "read", lambda self, keys, copied: [(key, schedule) for key in keys])


@pytest.mark.parametrize(("name", "model"), COMPVIS)
def test_configs_inferred_from_a_single_file_equal_the_published_ones(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    tensors = manifest(name)
    fake_file(monkeypatch, tensors)
    plan = plan_single_file(tmp_path / "model.safetensors", ema=False)
    assert plan.problems() == []
    for part in ("unet", "vae", "text_encoder"):
        if (model, part) == ("sd15-inpainting", "vae"):
            continue  # the published folder has the VAE of SD 1.5; compared with that below
        told = on_meta(model, part)
        inferred = plan.parts[part].module
        assert shapes(inferred.state_dict()) == shapes(told.state_dict())
        # What no shape tells, and what does not matter: the trained size; upcasting only changes float16.
        same = {"sample_size": 0, "upcast_attention": 0, "projection_dim": 0}
        assert vars(inferred.config) | same == {
            key: value for key, value in (vars(told.config) | same).items()
        }
    claimed = {origin.key for part in plan.parts.values() for origin in part.origins.values()}
    assert claimed <= set(tensors)
    left = set(tensors) - claimed
    assert all(
        keymap.IGNORED.fullmatch(key) or "resblocks.23." in key for key in left
    )  # SD 2's unused last block


@pytest.mark.parametrize(("name", "model"), COMPVIS)
def test_single_file_to_ours_to_single_file_keeps_every_shape_at_full_size(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    tensors = manifest(name)
    fake_file(monkeypatch, tensors)
    plan = plan_single_file(tmp_path / "model.safetensors", ema=False)
    for part in plan.parts.values():
        stored = {o.key: torch.empty(tensors[o.key], device="meta") for o in part.origins.values()}
        ours = {key: keymap.to_ours(stored[o.key], o.form) for key, o in part.origins.items()}
        assert shapes(ours) == shapes(part.module.state_dict())
        assert shapes(to_single_file(ours, part.origins)) == shapes(stored)


def test_ema_names_of_the_published_file_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    tensors = manifest("sd15-compvis.json")
    fake_file(monkeypatch, tensors)
    raw = plan_single_file(tmp_path / "model.safetensors", ema=False)
    averaged = plan_single_file(tmp_path / "model.safetensors", ema=True)
    assert averaged.problems() == []
    keys = {origin.key for origin in averaged.parts["unet"].origins.values()}
    assert len(keys) == 686
    assert keys == {key for key in tensors if key.startswith("model_ema.")} - {
        "model_ema.decay",
        "model_ema.num_updates",
    }
    assert not keys & {origin.key for origin in raw.parts["unet"].origins.values()}


@pytest.mark.parametrize(
    ("part", "prefix"), [("unet", "model.diffusion_model."), ("vae", "first_stage_model.")]
)
def test_sdxl_single_file_is_covered_by_the_same_tables(part: str, prefix: str) -> None:
    module = on_meta("sdxl-base", part)
    expected = {
        key: shape for key, shape in manifest("sdxl-base-compvis.json").items() if key.startswith(prefix)
    }
    assert shapes(to_single_file(module.state_dict(), origins(module, prefix))) == expected
    infer_config = {"unet": infer.unet_config, "vae": infer.vae_config}[part]
    inferred = infer_config({key.removeprefix(prefix): shape for key, shape in expected.items()})
    # Not in the shapes: 0.13025, the latents' scale, and 128 latents, the trained size.
    free = {"scaling_factor": 0, "sample_size": 0}
    assert vars(inferred) | free == vars(module.config) | free


# Against diffusers' own converters, at small size ---

SMALL_UNETS = {name: UNETS[name] for name in ("sd1", "sd2", "inpainting", "sdxl", "unclip")} | {
    "three levels, one layer": {
        "block_out_channels": [32, 96, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 48,
    },
    "three layers, depth 2": {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 3,
        "transformer_layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
    },
    "one level": {
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
    },
    "no attention in the middle levels": UNET
    | {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    },
}


def random_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(t.shape, generator=generator) for k, t in module.state_dict().items()}


@pytest.mark.parametrize("name", SMALL_UNETS)
def test_unet_names_are_those_of_diffusers_converter(name: str) -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**SMALL_UNETS[name])
        config = configs.unet_config(dict(theirs.config), "config")
        ours = UNet(config)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    state = random_state(ours)
    places = origins(ours, "model.diffusion_model.")
    stored = to_single_file(state, places)
    converted = reference.convert_ldm_unet_checkpoint(stored, config=dict(theirs.config))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    # Back again, from nothing but the shapes.
    below = {key.removeprefix("model.diffusion_model."): tuple(t.shape) for key, t in stored.items()}
    inferred = infer.unet_config(below, is_sdxl=name == "sdxl")
    free = {"sample_size": 0, "addition_time_embed_dim": 0, "num_attention_heads": 0, "upcast_attention": 0}
    assert vars(inferred) | free == vars(config) | free
    with torch.device("meta"):
        again = UNet(inferred)
    back = {
        k: keymap.to_ours(stored[o.key], o.form) for k, o in origins(again, "model.diffusion_model.").items()
    }
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_per_block": 1, "latent_channels": 3},
        {"layers_per_block": 3, "block_out_channels": [32, 64]},
    ],
)
def test_vae_names_are_those_of_diffusers_converter(options: dict) -> None:
    options = SMALL_VAE | options
    levels = len(options["block_out_channels"])
    options |= {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    with torch.device("meta"):
        theirs = AutoencoderKL(**options)
        config = configs.vae_config(dict(theirs.config), "config")
        ours = VAE(config)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    state = random_state(ours)
    stored = to_single_file(state, origins(ours, "first_stage_model."))
    converted = reference.convert_ldm_vae_checkpoint(dict(stored), config=dict(theirs.config))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    below = {key.removeprefix("first_stage_model."): tuple(t.shape) for key, t in stored.items()}
    assert infer.vae_config(below) == config


TEXT = {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 80}


def test_clip_names_are_those_of_diffusers_converter() -> None:
    with torch.device("meta"):
        ours = CLIPTextModel(TextConfig(**TEXT, num_hidden_layers=2, num_attention_heads=2, eos_token_id=99))
    state = random_state(ours)
    stored = {f"cond_stage_model.transformer.{key}": tensor for key, tensor in state.items()}
    converted = reference.convert_ldm_clip_checkpoint(dict(stored))
    assert converted.keys() == state.keys()
    assert infer.text_config(shapes(converted)) == ours.config


def test_openclip_names_are_those_of_diffusers_converter() -> None:
    with torch.device("meta"):
        config = TextConfig(
            **TEXT, num_hidden_layers=3, num_attention_heads=2, eos_token_id=99, hidden_act="gelu"
        )
        ours = CLIPTextModel(config)
    state = random_state(ours)
    stored = to_single_file(state, origins(ours, "cond_stage_model.model."))
    config = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=TEXT["hidden_size"]))
    converted = reference.convert_open_clip_checkpoint(config, dict(stored))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    back = {
        k: keymap.to_ours(stored[o.key], o.form) for k, o in origins(ours, "cond_stage_model.model.").items()
    }
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", SMALL_UNETS)
def test_every_key_has_a_place_of_its_own(name: str) -> None:
    with torch.device("meta"):
        unet = UNet(configs.unet_config(SMALL_UNETS[name], "config"))
    places = [origin.key for origin in origins(unet).values()]
    assert len(set(places)) == len(places) == len(unet.state_dict())


@pytest.mark.parametrize(
    ("key", "ignored"),
    [
        ("model_ema.decay", True),
        ("model_ema.num_updates", True),
        ("betas", True),
        ("alphas_cumprod_prev", True),
        ("sqrt_recipm1_alphas_cumprod", True),
        ("posterior_mean_coef1", True),
        ("log_one_minus_alphas_cumprod", True),
        ("logvar", True),
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", True),
        ("text_model.embeddings.position_ids", True),
        ("cond_stage_model.model.logit_scale", True),
        ("cond_stage_model.model.attn_mask", True),
        ("cond_stage_model.model.visual.proj", True),
        ("model.diffusion_model.extra.weight", False),
        ("first_stage_model.betas", False),
        ("control_model.input_blocks.0.0.weight", False),
        ("lora_unet_down.alpha", False),
    ],
)
def test_only_listed_keys_may_be_ignored(key: str, ignored: bool) -> None:
    assert bool(keymap.IGNORED.fullmatch(key)) == ignored
