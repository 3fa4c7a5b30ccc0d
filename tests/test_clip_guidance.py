"""CLIP-guided sampling, and sampling from a picture: equal to the reference, and to plain sampling at 0."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

import minti
from minti import InputError, StableDiffusion
from minti.edit.clip_guidance import ClipGuidance, cutouts
from minti.edit.inverting import encode_mean
from minti.edit.region import as_tensor
from minti.judge.scorer import Scorer
from minti.sample import main

from .oracles import pipeline, save_folder

TINY = Path(__file__).resolve().parents[1] / "weights" / "tiny"
PROMPT = "a photo of the red toy"


@pytest.fixture(scope="module")
def sd(small_checkpoint: Path) -> StableDiffusion:
    return minti.load(small_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def scorer(small_checkpoint: Path) -> Scorer:
    return Scorer.load(small_checkpoint)


def noise(*key: int, shape: tuple[int, ...] = (2, 4, 8, 8)) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(sum(key)))


def guided(sd: StableDiffusion, sampler: ClipGuidance | None, **options) -> list[Tensor]:
    how = {"steps": 4, "guidance_scale": 3.0} | options
    return list(sd.denoise([PROMPT] * 2, [0, 1], sampler=sampler, **how))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_changed_noise_is_that_of_the_reference(
    tmp_path: Path, small_checkpoint: Path, scorer: Scorer, prediction: str, guidance: float
) -> None:
    """UNet and autoencoder of diffusers, image encoder of transformers, autograd: to float32's rounding."""
    sd = minti.load(save_folder(tmp_path / "model", "small", prediction), device="cpu")
    pipe = pipeline(tmp_path / "reference", "small", prediction)
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(small_checkpoint / "image_encoder")
    texts, t, scale = F.normalize(noise(1, shape=(2, 32)), dim=1), 601, 50.0  # a time of 5 steps
    x_t = noise(2).requires_grad_()
    contexts = [pipe.text_encoder(sd.tokenizer([text] * 2))[0].detach() for text in (PROMPT, "")]
    with_prompt, without = (pipe.unet(x_t, t, encoder_hidden_states=c).sample for c in contexts)
    output = with_prompt if guidance == 1 else without + guidance * (with_prompt - without)
    alpha = pipe.scheduler.alphas_cumprod[t].item()
    signal, noisy = alpha**0.5, (1 - alpha) ** 0.5
    x0 = {"epsilon": (x_t - noisy * output) / signal, "sample": output}.get(
        prediction, signal * x_t - noisy * output
    )
    mixed = noisy * x0 + (1 - noisy) * x_t
    pixels = (pipe.vae.decode(mixed / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    pixels = F.interpolate(pixels, (32, 32), mode="bicubic", antialias=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    seen = F.normalize(image_encoder((pixels - mean) / std).image_embeds, dim=1)
    angle = 2 * ((seen - texts).norm(dim=1) / 2).arcsin()
    (gradient,) = torch.autograd.grad((angle**2 / 2).sum(), x_t)
    eps = (x_t - signal * x0) / noisy + noisy * scale * gradient
    assert (noisy * scale * gradient).abs().mean() > 1e-3  # else this would be no test
    sampler = ClipGuidance(sd, 4, [0, 1], scorer, texts, scale)
    found = {}

    def probe(predict: Callable[[Tensor, int], Tensor], x_T: Tensor):
        found["prediction"] = sampler.guide(predict, x_t.detach(), t, texts, [0, 1])
        yield x_T

    list(sd.denoise([PROMPT] * 2, [0, 1], steps=5, guidance_scale=guidance, sampler=probe))
    _, ours = sd.schedule.x0_and_eps(found["prediction"], x_t.detach(), t)
    torch.testing.assert_close(ours, eps.detach(), rtol=1e-3, atol=1e-4)


def test_at_scale_0_it_is_plain_sampling(sd: StableDiffusion, scorer: Scorer) -> None:
    """Bit for bit; and at another scale it is not."""
    texts = scorer.embed_texts([PROMPT] * 2)
    plain = guided(sd, None)
    for ours, theirs in zip(guided(sd, ClipGuidance(sd, 4, [0, 1], scorer, texts, 0.0)), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(guided(sd, ClipGuidance(sd, 4, [0, 1], scorer, texts, 10.0))[-1], plain[-1])


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_from_a_picture_is_img2img_of_diffusers(tmp_path: Path, strength: float) -> None:
    """From the same latents and noise; to the rounding of a few steps."""
    sd = minti.load(save_folder(tmp_path / "model", "small"), device="cpu")
    parts = pipeline(tmp_path / "reference", "small").components
    pipe = StableDiffusionImg2ImgPipeline(**parts | {"image_encoder": None}, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    z0 = noise(7, shape=(1, 4, 8, 8))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    how = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = pipe(
        [PROMPT] * 2, image=z0.repeat(2, 1, 1, 1), strength=strength, generator=generators, **how
    ).images
    sampler = ClipGuidance(sd, 8, [0, 1], z0=z0, strength=strength)
    found = guided(sd, sampler, steps=8)
    assert len(found) == 8 * strength
    torch.testing.assert_close(found[-1], theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_cutouts() -> None:
    """As large as CLIP's input at least, within the picture, and decided by the generator."""
    picture = torch.arange(40 * 48.0).view(1, 40, 48).expand(3, -1, -1)
    found = [cutouts(picture, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert found[0].shape == (4, 3, 16, 16)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0].std(dim=0).mean() > 10
    assert torch.equal(cutouts(picture[:, :16, :16], 16, torch.Generator()), picture[None, :, :16, :16])
    middle = cutouts(picture[:, :, 4:44], 40, torch.Generator())
    torch.testing.assert_close(middle, picture[None, :, :, 4:44], rtol=0, atol=1e-3)


def test_clip_finds_the_pictures_closer_to_the_text_the_larger_the_scale() -> None:
    """Of the real model; at much larger scales pictures fall apart."""
    sd, scorer, means = minti.load(TINY, device="cpu"), Scorer.load(TINY), []
    prompt = "a drawing of a red cat on the beach"
    text = scorer.embed_texts([prompt])
    for scale in (0.0, 50.0):
        sampler = ClipGuidance(sd, 10, [2, 3], scorer, text.expand(2, -1), scale)
        each = [(prompt, seed) for seed in (2, 3)]
        images = list(sd.sample_each(each, steps=10, guidance_scale=3.0, sampler=sampler))
        means.append((scorer.embed_images(images) @ text[0]).mean().item())
    assert means[0] + 0.01 < means[1]


# The command


def arguments(checkpoint: Path, out: Path, *more: str) -> list[str]:
    argv = ["--checkpoint", checkpoint, "--prompt", PROMPT, "--num-images", 3, "--steps", 4, "--out", out]
    return [*map(str, argv), "--device", "cpu", *more]


def pictures(out: Path) -> dict[str, bytes]:
    return {
        p.name: np.asarray(Image.open(p)).tobytes() for p in sorted(out.glob("*.png")) if "grid" not in p.name
    }


def test_the_command(small_checkpoint: Path, tmp_path: Path) -> None:
    """The same pictures whatever the batch, and after an interruption; others than without guidance."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        tmp_path / "i.png"
    )
    more = ["--clip-guidance", "20", "--init-image", str(tmp_path / "i.png"), "--strength", "0.5"]
    main(arguments(small_checkpoint, tmp_path / "one", *more, "--batch-size", "1"))
    main(arguments(small_checkpoint, tmp_path / "all", *more))
    first, again = pictures(tmp_path / "one"), pictures(tmp_path / "all")
    for name, content in first.items():
        ours, theirs = (np.frombuffer(c, dtype=np.uint8).astype(int) for c in (content, again[name]))
        assert np.abs(ours - theirs).max() <= 1  # a larger batch rounds differently
    for path in sorted((tmp_path / "one").glob("*-[12].png")):
        path.unlink()
    main(arguments(small_checkpoint, tmp_path / "one", *more, "--batch-size", "1"))
    assert pictures(tmp_path / "one") == first
    main(arguments(small_checkpoint, tmp_path / "plain"))
    assert not set(pictures(tmp_path / "plain").values()) & set(first.values())
    sd = minti.load(small_checkpoint, device="cpu")
    z0 = encode_mean(sd, as_tensor(ImageOps.fit(Image.open(tmp_path / "i.png"), (16, 16))))
    main(arguments(small_checkpoint, tmp_path / "start", *more[2:]))
    sampler = ClipGuidance(sd, 4, [0, 1, 2], z0=z0, strength=0.5)
    expected = list(sd.sample_each([(PROMPT, i) for i in range(3)], steps=4, sampler=sampler))
    assert list(pictures(tmp_path / "start").values()) == [np.asarray(image).tobytes() for image in expected]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clip-guidance", "10", "--eta", "0.5"], "--eta: should be 0"),
        (["--init-image", "nothing.png"], "nothing.png"),
        (["--init-image", "IMAGE", "--strength", "0.1"], "none of 4 steps remain"),
        (["--clip-guidance", "10", "--clip", "nowhere"], "nowhere: does not exist"),
        (["--clip-guidance", "-1"], "at least 0"),
    ],
)
def test_bad_options(small_checkpoint: Path, tmp_path: Path, more: list[str], message: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "i.png")
    more = [str(tmp_path / "i.png") if text == "IMAGE" else text for text in more]
    with pytest.raises(InputError, match=message):
        main(arguments(small_checkpoint, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
