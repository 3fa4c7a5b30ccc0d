"""Configs: every key that the reference libraries know is acted on as they do, or refused by name."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel

from minti.errors import InputError
from minti.formats import configs
from minti.formats.json_checks import HARMLESS, JSON_LIMIT, read_json

from . import compare, oracles
from .oracles import SCHEDULE, SHARED, UNETS, VAE, shared

READERS: dict[str, Callable] = {
    "unet": configs.unet_config,
    "vae": configs.vae_config,
    "text_encoder": configs.text_config,
    "text_encoder_2": configs.text_config,
    "image_encoder": configs.vision_config,
    "scheduler": configs.schedule_config,
}
TEXT = oracles.text_config("sd1", 600).to_dict()
VISION = oracles.image_encoder().config.to_dict()
GOOD = {
    "unet": UNETS["sd1"],
    "vae": VAE,
    "text_encoder": TEXT,
    "image_encoder": VISION,
    "scheduler": SCHEDULE,
}


def read(part: str, **changes: Any) -> Any:
    return READERS[part](GOOD[part] | changes, f"{part}/config.json")


def refused(part: str, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(part, **changes)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def other(value: Any) -> list[Any]:
    """Values of the same kind as a default, and unlike it."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1]
    return [f"another {value}"] if isinstance(value, str) else [7, "something", [1, 2]]


# Published ones


@pytest.mark.parametrize("path", sorted(SHARED.glob("configs/*/*/*config.json")) or [None])
def test_published_configs_are_read(path: Path | None) -> None:
    shared("configs")
    if "tokenizer" not in path.parent.name:
        READERS[path.parent.name](read_json(path), str(path))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "image_encoder", "scheduler"])
def test_shipped_configs_are_read(part: str) -> None:
    folder = Path(__file__).parents[1] / "weights" / "tiny" / part
    path = folder / ("scheduler_config.json" if part == "scheduler" else "config.json")
    READERS[part](read_json(path), str(path))


# Every key of the reference


def parameters(module: type) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(module).parameters.items()}


ACTED_ON = {  # values for which the networks of the test can still be built
    "force_upcast": False,  # which changes nothing in float32
    "in_channels": 5,
    "out_channels": 5,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "norm_eps": 1e-3,
    "cross_attention_dim": 32,
    "transformer_layers_per_block": 2,
    "attention_head_dim": 4,
    "use_linear_projection": True,
    "upcast_attention": True,
    "mid_block_type": None,
    "sample_size": 16,
    "addition_time_embed_dim": 8,  # without effect, unless addition_embed_type is set
    "projection_class_embeddings_input_dim": 8,
    "latent_channels": 8,
    "scaling_factor": 0.5,
}


@pytest.mark.parametrize("key", sorted(parameters(UNet2DConditionModel)))
def test_every_key_of_a_unet_is_acted_on_or_refused_by_name(key: str) -> None:
    """Where a changed value is accepted, our UNet of that config gives what the reference gives."""
    default = parameters(UNet2DConditionModel)[key]
    if key in ("down_block_types", "up_block_types", "block_out_channels"):
        assert key in refused("unet", **{key: ["UNetMidBlock2D"] * 4})
        return
    values = [ACTED_ON[key]] if key in ACTED_ON else other(default)
    for value in values:
        if key not in ACTED_ON and key not in HARMLESS:
            assert key in refused("unet", **{key: value})
            continue
        compare.assert_parity(compare.compare_unet(oracles.unet("sd1", **{key: value}), 16, 16))


@pytest.mark.parametrize("key", sorted(parameters(AutoencoderKL)))
def test_every_key_of_an_autoencoder_is_acted_on_or_refused_by_name(key: str) -> None:
    default = parameters(AutoencoderKL)[key]
    if key in ("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels"):
        assert key in refused("vae", **{key: 4})
        return
    for value in [ACTED_ON[key]] if key in ACTED_ON else other(default):
        if key not in ACTED_ON and key not in HARMLESS:
            assert key in refused("vae", **{key: value})
            continue
        compare.assert_parity(compare.compare_vae(oracles.vae(**{key: value}), 32, 32))


@pytest.mark.parametrize("kind", [name.strip() for name in configs.DDPM_FAMILY.split()])
def test_a_config_of_each_sampler_is_read(kind: str) -> None:
    """With all defaults that the sampler's class writes; and what stands for another process is refused."""
    module = getattr(diffusers, f"{kind}Scheduler")
    try:
        raw = dict(module.from_config(SCHEDULE | {"num_train_timesteps": 1000}).config)
    except ImportError:
        pytest.skip("this sampler needs another package")
    config = configs.schedule_config(raw | {"_class_name": f"{kind}Scheduler"}, "scheduler")
    assert config.beta_start == 0.00085
    for key, value in (("trained_betas", [0.1] * 1000), ("thresholding", True), ("use_flow_sigmas", True)):
        assert key in refused("scheduler", **raw | {key: value})
    for key, value in (("beta_schedule", "squaredcos_cap_v2"), ("prediction_type", "flow_prediction")):
        assert key in refused("scheduler", **{key: value})


def test_old_configs_of_transformers_are_read() -> None:
    """transformers 4.2x wrote every setting of text generation into each half of a CLIP."""
    old = {"bad_words_ids": None, "chunk_size_feed_forward": 0, "diversity_penalty": 0.0, "do_sample": False}
    old |= {"length_penalty": 1.0, "max_length": 20, "num_beams": 1, "temperature": 1.0, "top_k": 50}
    old |= {"id2label": {"0": "LABEL_0"}, "return_dict": True, "tie_word_embeddings": True, "top_p": 1.0}
    for part in ("text_encoder", "image_encoder"):
        assert read(part, **old) == read(part)


# Types and ranges

NUMBERS = {
    "unet": """in_channels out_channels layers_per_block norm_num_groups norm_eps sample_size
        cross_attention_dim attention_head_dim transformer_layers_per_block""",
    "vae": "latent_channels layers_per_block norm_num_groups scaling_factor",
    "text_encoder": """vocab_size hidden_size intermediate_size num_hidden_layers eos_token_id
        num_attention_heads max_position_embeddings layer_norm_eps""",
    "image_encoder": "image_size patch_size hidden_size num_hidden_layers projection_dim",
    "scheduler": "num_train_timesteps beta_start beta_end steps_offset",
}


@pytest.mark.parametrize(
    ("part", "key"), [(part, key) for part, keys in NUMBERS.items() for key in keys.split()]
)
def test_numbers_that_are_none(part: str, key: str) -> None:
    bad: list[Any] = ["many", "8", {"a": 1}, -3, float("nan"), float("inf"), 10**30, [], [[8]], [None], True]
    bad += [] if key in ("sample_size", "projection_dim") else [None]
    for value in bad:
        assert key in refused(part, **{key: value}), value


@pytest.mark.parametrize("key", ["block_out_channels", "down_block_types", "up_block_types"])
def test_lists_that_are_none(key: str) -> None:
    for value in (None, 3, "text", {}, [], [None] * 4, [-1] * 4, [[32]] * 4, [32] * 10**6):
        assert key in refused("unet", **{key: value})


def test_layers_without_bound_are_refused_before_anything_is_built() -> None:
    assert "num_hidden_layers" in refused("text_encoder", num_hidden_layers=10**6)
    assert "layers_per_block" in refused("unet", layers_per_block=10**6)
    assert "transformer_layers_per_block" in refused("unet", transformer_layers_per_block=[1, 1, 1, 10**6])
    assert "layers_per_block" in refused("vae", layers_per_block=10**6)
    assert "num_train_timesteps" in refused("scheduler", num_train_timesteps=10**9)


def test_numbers_that_contradict_each_other() -> None:
    assert "30 attention heads" in refused("unet", attention_head_dim=30)
    assert "mirror" in refused("unet", up_block_types=UNETS["sd1"]["up_block_types"][::-1])
    assert "or a list of" in refused("unet", attention_head_dim=[8, 8])
    assert "the same for each level" in refused("unet", layers_per_block=[1, 2, 2, 2])
    assert read("unet", layers_per_block=[2, 2, 2, 2]) == read("unet")
    assert "eos_token_id" in refused("text_encoder", eos_token_id=600)


def test_sizes_may_be_pairs() -> None:
    assert read("unet", sample_size=[8, 12]).sample_size == (8, 12)
    assert read("unet", sample_size=None).sample_size == (64, 64)
    for bad in ([8], [8, 8, 8], [8, 0], ["8", "8"]):
        assert "sample_size" in refused("unet", sample_size=bad)


def test_another_class_is_refused() -> None:
    assert "_class_name" in refused("unet", _class_name="UNet3DConditionModel")
    assert "_class_name" in refused("vae", _class_name="AutoencoderTiny")
    assert "model_type" in refused("text_encoder", model_type="t5")
    for bad in (None, 3, "FlowMatchEulerDiscreteScheduler", "LCMScheduler"):
        assert "_class_name" in refused("scheduler", _class_name=bad)


# Files


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"ä": 1}), encoding="utf-8-sig")  # with a byte order mark, as Windows writes
    assert read_json(path) == {"ä": 1}
    for content in (
        b"{",
        b"",
        b"[1]",
        b"3",
        b"\xff\xfe{\0}\0",
        b"[" * 200_000,
        b'{"a":' + b"9" * 10_000 + b"}",
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"config\.json: ") as caught:
            read_json(path)
        assert len(str(caught.value)) < 400
    with path.open("wb") as file:
        file.truncate(JSON_LIMIT + 1)
    with pytest.raises(InputError, match="is it the right file"):
        read_json(path)
    for missing in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(InputError, match="cannot be read"):
            read_json(missing)
