"""The first latent diffusion model, text2img-large with its BERT, against diffusers' pipeline."""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, LDMTextToImagePipeline
from safetensors.torch import load_file

import minti
from minti import Concept, InputError
from minti.formats import keymap
from minti.formats.checkpoint import make_plan
from minti.inversion.batches import Settings, Word, sample_batch
from minti.inversion.inversion import Inversion
from minti.inversion.latents import Latents
from minti.inversion.start import initial_rows
from minti.model.bert import BertConfig

from . import oracles
from .compare import assert_parity, assert_same_picture, relative_error
from .test_keymap import fake_file, manifest, shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldm") / "ldm"
    oracles.ldm_pipeline(path.parent / "words").save_pretrained(path)
    return path


def oracle(folder: Path) -> LDMTextToImagePipeline:
    return oracles.ldm_pipeline(folder.parent / "words")


def compare_pictures(
    sd: minti.StableDiffusion, pipe: LDMTextToImagePipeline, prompts: list[str], **how
) -> dict:
    """Pictures before they are rounded, (B, 3, H, W): the pipeline says nothing of its latents."""
    steps, (width, height) = how.get("steps", 3), how.get("size", (64, 64))
    *_, latents = sd.denoise(prompts, range(len(prompts)), **{"steps": 3, "size": (64, 64)} | how)
    with torch.no_grad():
        ours = sd.vae.decode(latents / sd.vae.config.scaling_factor)
    noise = [
        torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(i))
        for i in range(len(prompts))
    ]
    theirs = pipe(
        prompts,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=how["guidance_scale"],
        latents=torch.cat(noise),
        output_type="np",
    ).images
    reference = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    assert reference.std() > 0.05
    return {"pixels": ((ours / 2 + 0.5).clamp(0, 1), reference)}


@pytest.mark.parametrize(
    ("schedule", "size", "guidance_scale"),
    [("auto", (64, 32), 5.0), ("auto", (32, 32), 1.0), ("as-published", (32, 64), 5.0)],
)
def test_pictures(schedule: str, size: tuple[int, int], guidance_scale: float, folder: Path) -> None:
    """With the folder's schedule as diffusers has it; with the right one once diffusers is told of it."""
    sd = minti.load(folder, device="cpu", dtype="float32", schedule=schedule)
    pipe = oracle(folder)
    if schedule == "auto":
        pipe.scheduler = DDIMScheduler(**oracles.SCHEDULE)
    prompts = ["a photo of the cat", "red toy on the grass"]
    assert_parity(compare_pictures(sd, pipe, prompts, size=size, guidance_scale=guidance_scale), 1e-4)


def test_the_schedule_is_noted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        sd = minti.load(folder, device="cpu")
    assert "noise schedule: scaled_linear, with which the model was trained" in caplog.text
    # families of sqrt-linear and linear betas: alpha-bar at 500 of the published tables
    assert sd.schedule.alphas_cumprod[500].item() == pytest.approx(0.276, abs=1e-3)
    wrong = minti.load(folder, device="cpu", schedule="as-published")
    assert wrong.schedule.alphas_cumprod[500].item() == pytest.approx(0.161, abs=1e-3)
    assert (wrong.schedule.config.steps_offset, wrong.schedule.config.set_alpha_to_one) == (0, True)


def test_pickles_and_the_plain_vocabulary(folder: Path, tmp_path: Path) -> None:
    """The published folder has .bin files, old names of the autoencoder's attention, and vocab.txt."""
    sd = minti.load(folder, device="cpu")
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    stems = {"bert": "pytorch_model", "unet": "diffusion_pytorch_model", "vqvae": "diffusion_pytorch_model"}
    for part, stem in stems.items():
        (tmp_path / part).mkdir()
        weights = load_file(next((folder / part).glob("*.safetensors")))
        if part == "vqvae":
            for new, name in old.items():
                weights = {key.replace(new, name): tensor for key, tensor in weights.items()}
        torch.save(weights, tmp_path / part / f"{stem}.bin")
        (tmp_path / part / "config.json").write_bytes((folder / part / "config.json").read_bytes())
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_bytes((folder.parent / "words" / "vocab.txt").read_bytes())
    again = minti.load(tmp_path, device="cpu")
    for part in ("text_encoder", "unet", "vae"):
        ours, theirs = (getattr(model, part).state_dict() for model in (again, sd))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(again.tokenizer("a red cat."), sd.tokenizer("a red cat."))
    (tmp_path / "tokenizer" / "vocab.txt").unlink()
    oracles.write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(InputError, match=r"is CLIP's tokenizer, .* needs BERT's"):
        minti.load(tmp_path, device="cpu")


def test_single_file(folder: Path, tmp_path: Path) -> None:
    sd = minti.load(folder, device="cpu")
    state, prefix = sd.text_encoder.state_dict(), "cond_stage_model.transformer."
    blocks = keymap.bert_blocks(sd.text_encoder.config)
    weights = oracles.to_single_file(state, keymap.find_origins(state, blocks, {}, prefix))
    weights[f"{prefix}to_logits.weight"] = torch.ones(5, 64)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    weights["betas"] = betas.float()
    for module, *names in (
        (sd.unet, keymap.unet_blocks(sd.unet.config), keymap.UNET_LAYERS, "model.diffusion_model."),
        (sd.vae, keymap.vae_blocks(sd.vae.config), keymap.VAE_LAYERS, "first_stage_model."),
    ):
        weights |= oracles.to_single_file(
            module.state_dict(), keymap.find_origins(module.state_dict(), *names)
        )
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"put vocab\.txt of bert-base-uncased beside it"):
        minti.load(tmp_path / "model.ckpt", device="cpu")
    again = minti.load(tmp_path / "model.ckpt", device="cpu", tokenizer=folder.parent / "words" / "vocab.txt")
    for part in ("text_encoder", "unet", "vae"):
        ours, theirs = (getattr(model, part).state_dict() for model in (again, sd))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert again.schedule.config == sd.schedule.config
    assert again.image_size == (256, 256)
    how = {"steps": 2, "size": 64, "seed": 3}
    assert_same_picture(again.sample("the cat", **how)[0], sd.sample("the cat", **how)[0])


@pytest.mark.parametrize("name", ["ldm-text2img-large-compvis", "ldm-text2img-large-compvis-ema"])
def test_the_published_file_is_covered_key_by_key(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors = manifest(f"{name}.json")
    fake_file(monkeypatch, tensors)
    (tmp_path / "model.ckpt").touch()
    plan = make_plan(tmp_path / "model.ckpt", ema=name.endswith("ema"))
    assert plan.problems() == []
    assert plan.family == "LDM"
    assert plan.parts["text_encoder"].module.config == BertConfig()
    elements = {
        name: sum(tensor.numel() for tensor in part.module.state_dict().values())
        for name, part in plan.parts.items()
    }
    head = 30522 * 1280 + 30522  # BERT's, which is not used
    assert elements == {"text_encoder": 581_994_042 - head, "unet": 872_300_484, "vae": 83_653_863}
    reached = {origin.key for part in plan.parts.values() for origin in part.origins.values()}
    for part in plan.parts.values():
        stored = {o.key: torch.empty(tensors[o.key], device="meta") for o in part.origins.values()}
        ours = {key: keymap.to_ours(stored[o.key], o.form) for key, o in part.origins.items()}
        assert shapes(ours) == shapes(part.module.state_dict())
    assert all(keymap.IGNORED.fullmatch(key) or key.startswith("model.") for key in set(tensors) - reached)


# Learning ---


def test_gradient_of_the_row(folder: Path) -> None:
    sd, pipe = minti.load(folder, device="cpu", dtype="float32"), oracle(folder)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 4, 16, 16, generator=generator)
    latents = Latents(mean, 0.1 * mean.abs(), torch.ones(2, 1, 16, 16), torch.arange(2), torch.zeros(2, 6))
    word = Word("*", initial_rows(sd, "word", "toy", 2) + torch.tensor([[0.0], [0.1]]), latents, seed=1)
    settings = Settings(batch_size=3)
    samples = sample_batch(word, settings, 1000, 3, 0)

    tokenizer, bert = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.bert).requires_grad_(False)
    tokens = ["[token0]", "[token1]"]
    assert tokenizer.add_tokens(tokens) == 2
    table = torch.nn.Embedding.from_pretrained(
        torch.cat([bert.model.embed_tokens.weight, word.init]), freeze=False
    )
    bert.model.embed_tokens = table
    prompts = [prompt.replace("*", " ".join(tokens)) for prompt in samples.prompts]
    ids = tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    assert (ids >= len(oracles.BERT_WORDS)).sum() == 6
    scheduler = DDPMScheduler(**{k: v for k, v in oracles.SCHEDULE.items() if k.startswith("beta")})
    x0 = latents.mean[samples.view] + latents.std[samples.view] * samples.posterior_noise
    noisy = scheduler.add_noise(x0, samples.eps, samples.t)
    prediction = pipe.unet(noisy, samples.t, bert(ids).last_hidden_state).sample
    loss = F.mse_loss(prediction, samples.eps)
    loss.backward()

    inversion = Inversion(sd, [word], settings)
    ours = inversion.step()
    assert table.weight.grad[-2:].abs().max() > 0
    assert_parity(
        {"loss": (ours[0], loss.detach()), "gradient": (inversion.rows[0].grad, table.weight.grad[-2:])}
    )


def test_the_official_codes_file(folder: Path, tmp_path: Path) -> None:
    """embeddings.pt of the paper's code: the word and its id in BERT's vocabulary."""
    sd = minti.load(folder, device="cpu")
    rows = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    star = torch.tensor(oracles.BERT_WORDS.index("*"))
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(rows)})
    torch.save({"string_to_token": {"*": star}, "string_to_param": parameters}, tmp_path / "embeddings.pt")
    concept = Concept.load(tmp_path / "embeddings.pt")
    plain = sd.encode_prompt(["a photo of *."])
    sd.add_concept(concept)
    assert relative_error(sd.encode_prompt(["a photo of *."]), plain) > 1e-2
    ids = sd.tokenizer("a photo of *.")[0, :7].tolist()
    assert ids[4] == len(oracles.BERT_WORDS)
    concept.save(tmp_path / "again.safetensors")
    assert torch.equal(Concept.load(tmp_path / "again.safetensors").vectors, rows)
    with pytest.raises(InputError, match="clip_skip is for models with CLIP's text encoder"):
        minti.load(folder, device="cpu", clip_skip=2)
    with pytest.raises(InputError, match="a 64-wide encoder; use the model it was learned on"):
        sd.add_concept(replace(concept, placeholder="<b>", vectors=torch.zeros(1, 768)))


def test_configs_that_are_not_this_model(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "bert" / "config.json").read_text())
    from minti.formats import configs

    assert configs.bert_config(raw, "config").head_dim == 4
    for change in ({"scale_embedding": True}, {"activation_function": "relu"}, {"d_model": None}):
        with pytest.raises(InputError, match=next(iter(change))):
            configs.bert_config(raw | change, "config")
