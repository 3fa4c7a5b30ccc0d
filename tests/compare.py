"""minti beside the reference: the same weights, the same input, and what each makes of it."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from minti import StableDiffusion
from minti.formats import configs
from minti.model.clip import CLIPTextModel as TextModel
from minti.model.image_encoder import CLIPVisionModel
from minti.model.unet import UNet
from minti.model.vae import VAE

Pairs = dict[str, tuple[Tensor, Tensor]]
"""What minti makes of an input, and what the reference makes of it: {name: (ours, the reference's)}."""


def ours(reference: nn.Module) -> nn.Module:
    """minti's module of the same config, with the very same weights: shared, not copied."""
    config, module = {
        UNet2DConditionModel: (configs.unet_config, UNet),
        AutoencoderKL: (configs.vae_config, VAE),
        CLIPTextModel: (configs.text_config, TextModel),
        CLIPTextModelWithProjection: (configs.text_config, TextModel),
        CLIPVisionModelWithProjection: (configs.vision_config, CLIPVisionModel),
    }[type(reference)]
    raw = dict(reference.config) if isinstance(reference.config, dict) else reference.config.to_dict()
    if "model_type" in raw:  # transformers adds the class when it saves a model
        raw["architectures"] = [type(reference).__name__]
    with torch.device("meta"):
        built = module(config(raw, "config of the oracle"))
    prefix = "text_model." if type(reference) is CLIPTextModel else ""  # which transformers 4 writes itself
    state = {prefix + key.removeprefix(prefix): value for key, value in reference.state_dict().items()}
    built.load_state_dict(state, strict=True, assign=True)
    return built.requires_grad_(False).eval()


def compare_unet(reference: UNet2DConditionModel, height: int, width: int) -> Pairs:
    """One forward pass of two pictures at different times, with random conditions of all kinds it takes."""
    config, generator = reference.config, torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, height, width, generator=generator)
    context = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    t = torch.tensor([801, 20])
    added, kwargs = None, {}
    if config.addition_embed_type:
        sizes = torch.tensor([[512.0, 768, 0, 64, 1024, 1024], [640, 640, 32, 0, 512, 512]])
        pooled_dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pooled = torch.randn(2, pooled_dim, generator=generator)
        added, kwargs = (pooled, sizes), {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    if config.class_embed_type:
        shown = torch.randn(2, config.projection_class_embeddings_input_dim, generator=generator)
        added, kwargs = (shown,), {"class_labels": shown}
    return {"output": (ours(reference)(x, t, context, added), reference(x, t, context, **kwargs).sample)}


def prompt_ids(vocab_size: int, lengths: Sequence[int] = (75, 5, 0, 30)) -> Tensor:
    """Random prompts of so many words, between start and end token: (B, 77)."""
    ids = torch.full((len(lengths), 77), vocab_size - 1)
    ids[:, 0] = vocab_size - 2
    words = torch.randint(vocab_size - 2, ids.shape, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        ids[row, 1 : 1 + length] = words[row, :length]
    return ids


def compare_text(reference: CLIPTextModel | CLIPTextModelWithProjection, ids: Tensor) -> Pairs:
    """Everything that one of the families conditions on."""
    output, theirs = ours(reference)(ids), reference(ids, output_hidden_states=True)
    projected = isinstance(reference, CLIPTextModelWithProjection)
    return {
        "context": (output.context, theirs.last_hidden_state),
        "penultimate": (output.hidden_states[-2], theirs.hidden_states[-2]),
        "pooled": (output.pooled, theirs.text_embeds if projected else theirs.pooler_output),
    }


def compare_image_encoder(reference: CLIPVisionModelWithProjection) -> Pairs:
    side = reference.config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"embedding": (ours(reference)(pixels), reference(pixels).image_embeds)}


def compare_vae(reference: AutoencoderKL, height: int, width: int) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
    latents = torch.randn(2, reference.config.latent_channels, height // 8, width // 8, generator=generator)
    vae = ours(reference)
    moments, theirs = vae.encode(pixels), reference.encode(pixels).latent_dist
    return {
        "mean": (moments.mean, theirs.mean),
        "std": (moments.std, theirs.std),
        "sample": (
            moments.sample(torch.Generator().manual_seed(5)),
            theirs.sample(torch.Generator().manual_seed(5)),
        ),
        "decode": (vae.decode(latents), reference.decode(latents).sample),
    }


def compare_pictures(
    sd: StableDiffusion,
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str] = ("a photo of the cat", "red toy on the grass"),
    *,
    negative_prompt: str | None = "",
    steps: int = 3,
    guidance_scale: float = 7.5,
    eta: float = 0.0,
    seed: int = 3,
    num_images: int = 1,
    batch_size: int = 4,
    size: tuple[int, int] | None = None,
    **inputs,
) -> Pairs:
    """The whole way from prompts to pictures, (B, H, W, 3) in [0, 1], and every x_t (steps, B, C, h, w).

    The reference makes all pictures in one batch and keeps them in floating point; `inputs` goes to it alone.
    """
    how = {"negative_prompt": negative_prompt, "steps": steps, "guidance_scale": guidance_scale, "eta": eta}
    how |= {"size": size}
    images = sd.sample(prompts, seed=seed, num_images=num_images, batch_size=batch_size, **how)
    jobs = [(prompt, seed + i) for prompt in prompts for i in range(num_images)]
    texts, seeds = zip(*jobs, strict=True)
    latents = list(sd.denoise(texts, seeds, **how))

    their_latents = []

    def keep(pipe: StableDiffusionPipeline, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict:
        their_latents.append(tensors["latents"])
        return tensors

    width, height = size or (None, None)
    pixels = pipe(
        list(texts),
        negative_prompt=negative_prompt if negative_prompt is None else [negative_prompt] * len(jobs),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        eta=eta,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        width=width,
        height=height,
        callback_on_step_end=keep,
        output_type="np",
        **inputs,
    ).images
    return {
        "latents": (torch.stack(latents), torch.stack(their_latents)),
        "pixels": (torch.from_numpy(np.stack(images)) / 255, torch.from_numpy(pixels)),
    }


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value of the reference."""
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def assert_parity(pairs: Pairs, tolerance: float = 1e-5) -> None:
    """Every pair is equal up to `tolerance` x the largest value of the reference.

    Both sides compute in float32 (epsilon 1.2e-7) but sum in different orders, which over the depth of a
    model leaves errors of about 1e-6 of the output's scale; 1e-5 allows for other processors. Elementwise
    relative errors would say nothing, since sums that happen to cancel have large ones.
    """
    for name, (output, reference) in pairs.items():
        scale = reference.abs().max().item()
        torch.testing.assert_close(
            output, reference, rtol=0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_picture(ours: Image.Image, reference: Image.Image) -> None:
    """Equal up to the last bit of rounding, since weights lie differently in memory."""
    difference = np.asarray(ours).astype(int) - np.asarray(reference).astype(int)
    assert np.abs(difference).max() <= 1


def norm_eps(module: nn.Module) -> dict[str, float]:
    """The eps of every normalisation: a wrong one would hide below any tolerance where inputs are large."""
    norms = {n: m for n, m in module.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    return {name.removeprefix("text_model."): norm.eps for name, norm in norms.items()}
