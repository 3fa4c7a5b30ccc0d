"""Whole pictures against the diffusers pipelines, from the files of a checkpoint and for the same seeds."""

import copy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline

import minti
from minti import Concept
from minti.errors import InputError
from minti.formats.checkpoint import set_clip_skip
from minti.model import kernels
from minti.model.kernels import graph as kernel_graph

from . import oracles
from .compare import assert_parity, assert_same_picture, compare_pictures, relative_error

PROMPTS = ["a photo of the cat", "red toy on the grass", "the dog"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(family, prediction type) -> minti's model, and the diffusers pipeline that wrote its files."""
    loaded = {}

    def get(family="sd1", kind="epsilon"):
        if (family, kind) not in loaded:
            folder = tmp_path_factory.mktemp("models") / f"{family}-{kind}"
            oracles.save_folder(folder, family, kind)
            sd = minti.load(folder, device="cpu", dtype="float32")
            loaded[family, kind] = sd, oracles.pipeline(folder.parent, family, kind)
        return loaded[family, kind]

    return get


def assert_same_pictures(pairs):
    """Equal latents at every step, and equal pictures up to the rounding to 256 levels.

    The UNet answers to its own rounding, and guidance multiplies that by 7.5: where single modules agree to
    1e-6, the x_t of 20 steps have been seen 5e-5 apart, of which minti's share,
    against a run in float64, is 1e-5.
    """
    assert_parity({"latents": pairs["latents"]}, 2e-4)
    pixels, reference = pairs["pixels"]
    assert pixels.shape == reference.shape
    assert reference.std() > 0.05  # grey pictures would prove nothing
    assert (pixels - reference).abs().mean() < 0.5 / 255
    levels = (pixels * 255).round() - (reference * 255).round()
    assert levels.abs().max() <= 1


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_pictures(models, family, kind, guidance_scale, eta):
    assert_same_pictures(compare_pictures(*models(family, kind), guidance_scale=guidance_scale, eta=eta))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        pytest.param({"steps": 20}, marks=pytest.mark.slow),
        {"steps": 7, "eta": 1.0},
        {"negative_prompt": "red grass"},
        {"size": (96, 64)},  # width and height of latents: 12 x 8
        {"size": (72, 104)},  # odd: 9 x 13
        {"prompts": PROMPTS, "num_images": 2, "batch_size": 4, "eta": 0.7},  # a batch across prompts
        {"num_images": 2, "batch_size": 1, "negative_prompt": "photo"},
        {"prompts": [""], "guidance_scale": 3.0},
        {"prompts": [" ".join(["cat dog"] * 60)]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:a prompt has 75 tokens at most")
def test_options(models, options):
    assert_same_pictures(compare_pictures(*models("sd1"), **options))


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_clip_skip(models, family):
    """The formula of diffusers' encode_prompt, which looks for the norm where transformers 4 had it.

    It counts the layers that are left out: its clip_skip=1 is our 2.
    """
    sd, pipe = models(family)
    ids = sd.tokenizer(PROMPTS)
    for layer in (1, 2, 3):
        set_clip_skip(sd.text_encoder, layer)
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
        theirs = pipe.text_encoder.final_layer_norm(states[-layer])
        assert_parity({"context": (sd.condition(ids, None).context, theirs)})
    set_clip_skip(sd.text_encoder, 1)
    for layer in (0, 4):
        with pytest.raises(InputError, match=f"clip_skip = {layer}: should be"):
            set_clip_skip(sd.text_encoder, layer)


LONG = "the " * 60 + "cat , ", "red dog " * 20  # in two parts, since the comma is near the end of the first
LONG_NEGATIVE = "dog " * 75, "red"


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_long_prompts(models, family):
    """diffusers is given what its encoder makes of each part."""
    sd, pipe = models(family)
    embeds = [
        torch.cat(pipe.encode_prompt(list(p), "cpu", 1, False)[0].split(1), 1) for p in (LONG, LONG_NEGATIVE)
    ]
    how = {"num_inference_steps": 2, "guidance_scale": 7.5, "generator": torch.Generator().manual_seed(3)}
    theirs = pipe(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], output_type="latent", **how
    ).images
    prompt, negative = "".join(LONG), "".join(LONG_NEGATIVE)
    *_, latents = sd.denoise([prompt], [3], negative_prompt=negative, steps=2, long_prompts=True)
    assert_parity({"latents": (latents, theirs)}, 2e-4)
    *_, cut = sd.denoise([prompt], [3], negative_prompt=negative, steps=2)
    assert relative_error(cut, theirs) > 1e-3


def test_long_prompts_beside_short_ones(models):
    """The first step is linear in the UNet's output, so guidance can be had from two runs without it."""
    sd, _ = models()
    texts = ["the " * 151 + "cat", "the " * 76 + "dog", "red"]  # in three parts, two parts, one
    how = {"steps": 1, "long_prompts": True}
    alone = [next(sd.denoise([text], [3], guidance_scale=1, **how)) for text in texts]
    guided = next(sd.denoise(texts[:2], [3, 3], guidance_scale=5, negative_prompt=texts[2], **how))
    expected = [alone[2] + 5 * (alone[i] - alone[2]) for i in (0, 1)]
    assert_parity({"latents": (guided, torch.cat(expected))}, 1e-4)
    image = sd.sample(
        texts[0], seed=3, steps=1, guidance_scale=5, negative_prompt=texts[2], long_prompts=True
    )
    assert_same_picture(image[0], sd.decode_latents(guided[:1])[0])


def test_pictures_depend_on_what_they_should(models):
    """Were they all alike, equality with the reference would prove little."""
    sd, _ = models()
    base = {"prompt": "a photo of the cat", "steps": 3, "guidance_scale": 7.5, "eta": 0.0, "seed": 0}
    changes = [{"prompt": "red toy"}, {"negative_prompt": "red toy"}, {"seed": 1}, {"steps": 4}]
    changes += [{"eta": 0.7}, {"guidance_scale": 1.0}]
    (reference,) = sd.sample(**base)
    for change in changes:
        (image,) = sd.sample(**base | change)
        assert np.abs(np.asarray(image, float) - np.asarray(reference, float)).mean() > 1, change
    assert sd.sample(**base)[0].tobytes() == reference.tobytes()


@pytest.mark.parametrize("eta", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_batch_size_does_not_change_pictures(models, eta):
    sd, _ = models()
    how = {"num_images": 2, "steps": 3, "eta": eta, "seed": 11}
    pictures = [np.stack(sd.sample(PROMPTS, batch_size=n, **how)).astype(int) for n in (1, 4)]
    assert pictures[0].shape == (6, 64, 64, 3)
    assert np.abs(pictures[1] - pictures[0]).max() <= 1


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("sd1", "float16"),
        ("sd2", "bfloat16"),
        pytest.param("sd1", "bfloat16", marks=pytest.mark.slow),
        pytest.param("sd2", "float16", marks=pytest.mark.slow),
    ],
)
def test_half_precision(tmp_path, models, family, dtype):
    """Close to float32: within a few of the 256 levels, of which bfloat16 with its 8 bits takes the most."""
    folder = oracles.save_folder(tmp_path / "model", family)
    sd = minti.load(folder, device="cpu", dtype=dtype)
    how = {"prompt": PROMPTS[0], "steps": 3, "guidance_scale": 3.0, "size": 32}
    half, full = (np.stack(m.sample(**how)).astype(float) for m in (sd, models(family)[0]))
    assert next(sd.denoise(PROMPTS, [0, 1, 2], steps=1)).dtype == torch.float32
    assert {p.dtype for m in (sd.unet, sd.vae, sd.text_encoder) for p in m.parameters()} == {sd.dtype}
    assert 0 < np.abs(half - full).mean() < (4 if dtype == "bfloat16" else 1.5)


def test_inpainting_model_paints_everything(models, monkeypatch):
    """Without a picture, an inpainting model gets a grey one under a mask that is white all over.

    Where diffusers draws from the autoencoder's distribution for the grey picture, minti takes its mean.
    """
    sd, pipe = models("inpainting")
    pipe = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def mean_latents(image, generator):
        return pipe.vae.encode(image).latent_dist.mode() * pipe.vae.config.scaling_factor

    monkeypatch.setattr(pipe, "_encode_vae_image", mean_latents)
    for guidance_scale, eta, size in ((1.0, 0.0, (64, 64)), (7.5, 0.7, (96, 64))):
        width, height = size
        picture = torch.rand(2, 3, height, width)  # all of which the mask hides
        inputs = {"image": picture, "mask_image": torch.ones(2, 1, height, width), "strength": 1.0}
        assert_same_pictures(
            compare_pictures(sd, pipe, guidance_scale=guidance_scale, eta=eta, size=size, **inputs)
        )


@pytest.mark.parametrize(
    ("family", "num_vectors"),
    [
        ("sd1", 3),
        ("sd2", 1),
        pytest.param("sd1", 1, marks=pytest.mark.slow),
        pytest.param("sd2", 3, marks=pytest.mark.slow),
    ],
)
def test_concept(tmp_path, family, num_vectors):
    """A learned word in both, from the same file."""
    folder = oracles.save_folder(tmp_path / "model", family)
    sd = minti.load(folder, device="cpu", dtype="float32")
    pipe = oracles.pipeline(tmp_path, family)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)  # gets a larger table
    generator = torch.Generator().manual_seed(num_vectors)
    Concept("<cat-toy>", torch.randn(num_vectors, 64, generator=generator)).save(tmp_path / "toy.safetensors")
    Concept("<style>", torch.randn(2, 64, generator=generator)).save(tmp_path / "style.safetensors")

    prompts = ["a photo of <cat-toy> on the grass", "<cat-toy>, in <style>, and the dog"]
    for name in ("toy", "style"):
        sd.add_concept(Concept.load(tmp_path / f"{name}.safetensors"))
        pipe.load_textual_inversion(tmp_path / f"{name}.safetensors")
    pairs = compare_pictures(sd, pipe, prompts, negative_prompt="red <cat-toy>")
    assert_same_pictures(pairs)

    learned = len(sd.tokenizer) - sd.text_encoder.config.vocab_size
    assert learned == num_vectors + 2
    plain = minti.load(folder, device="cpu", dtype="float32").sample(
        [prompt.replace("<cat-toy>", "toy").replace("<style>", "red") for prompt in prompts], steps=3, seed=3
    )
    assert (pairs["pixels"][0] * 255 - torch.from_numpy(np.stack(plain))).abs().mean() > 1


def test_exclamation_mark_as_transformers_reads_it(tmp_path):
    """The padding of SD 2.x is "!", for which transformers then takes every exclamation mark in a prompt.

    minti reads the mark as a word, as OpenCLIP did in training; this is how to get diffusers' picture.
    """
    folder = oracles.save_folder(tmp_path / "model", "sd2")
    sd = minti.load(folder, device="cpu", dtype="float32")
    pipe = oracles.pipeline(tmp_path, "sd2")
    prompts = ["the cat! on grass", "red toy!! and the dog!"]
    theirs = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    assert not torch.equal(sd.tokenizer(prompts), theirs)
    sd.tokenizer.add_placeholder("!", [0])
    assert torch.equal(sd.tokenizer(prompts), theirs)
    assert_same_pictures(compare_pictures(sd, pipe, prompts))


def test_every_step_is_yielded(models):
    """`denoise` shows all x_t on the way, and `sample` is the picture of the last."""
    sd, _ = models()
    steps = list(sd.denoise([PROMPTS[0]] * 3, [5, 6, 7], steps=4))
    assert [x.shape for x in steps] == [(3, 4, 8, 8)] * 4
    images = sd.sample(PROMPTS[0], steps=4, num_images=3, seed=5)
    assert [i.tobytes() for i in images] == [i.tobytes() for i in sd.decode_latents(steps[-1])]


@pytest.mark.parametrize(
    "vectors",
    [torch.ones(32), torch.ones(0, 32), torch.ones(80, 32), [[1.0] * 32], torch.full((1, 32), torch.nan)],
)
def test_vectors_that_are_no_word(vectors, models):
    sd = copy.deepcopy(models()[0])
    with pytest.raises(InputError, match=r"'<toy>': (its vectors should be|has vectors that are not finite)"):
        sd.add_concept(Concept("<toy>", vectors))
    assert not sd.tokenizer.placeholders


def test_seeds_of_numpy(models):
    sd = models()[0]
    first, second = (sd.sample("the cat", steps=1, seed=seed)[0] for seed in (3, np.int64(3)))
    assert first.tobytes() == second.tobytes()


def test_a_weight_that_is_not_a_number(models):
    """Found where it does harm, and named; a model that merely overflows is told apart."""
    sd = copy.deepcopy(models()[0])
    sd.vae.decoder.conv_out.register_forward_hook(lambda module, args, output: output * float("inf"))
    with pytest.raises(InputError, match="the autoencoder overflows in float32"):
        sd.sample("a cat", steps=1)
    hook = sd.unet.conv_out.register_forward_hook(lambda module, args, output: output * float("inf"))
    with pytest.raises(InputError, match="the UNet overflows in float32"):  # also where sampling begins late
        sd.sample("a cat", steps=4, sampler=lambda predict, x_T: iter([predict(x_T, 251)]))
    hook.remove()
    sd.unet.conv_out.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"unet conv_out.weight holds NaN or infinity as float32"):
        sd.sample("a cat", steps=2)


def test_the_denoiser_compiles_into_one_graph(small_checkpoint, monkeypatch):
    """Without a code generator, which would take minutes: the graph is what is at stake, and its result."""
    sd = minti.load(small_checkpoint, device="cpu")
    expected = [*sd.denoise(["the cat"], [0], steps=3)]
    graph = torch.compile(sd.unet.denoise, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(kernel_graph, "compile_for", lambda device, function: graph)
    kernels.compile_denoiser(sd.unet)
    torch.testing.assert_close([*sd.denoise(["the cat"], [0], steps=3)], expected, rtol=1e-5, atol=1e-5)
