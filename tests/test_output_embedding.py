"""Output embeddings against transformers and diffusers, where the encoder's output is replaced by hand."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

import minti
from minti import Concept, InputError, sample, train
from minti.concept import describe
from minti.inversion.batches import Settings, Word, sample_batch
from minti.inversion.inversion import Inversion
from minti.inversion.optimizers import vocabulary_norm
from minti.inversion.start import initial_rows
from minti.judge.picture_jobs import Protocol, prompt_job
from minti.model.fitting import prepare
from minti.model.per_layer import layer_names
from minti.tune import __main__ as tune

from . import oracles
from .compare import assert_parity
from .test_inversion import latents

PROMPT, NEGATIVE = "a photo of <toy> on grass by <plain> and <both>", "the cat on the grass"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outputs(sd: minti.StableDiffusion) -> minti.StableDiffusion:
    sd.text_encoder = prepare(sd.text_encoder, sd.unet, output_embedding=True)
    return sd


def add_tokens(tokenizer: CLIPTokenizer, text_encoder: nn.Module, rows: dict[str, Tensor]) -> list[int]:
    """Give words to the reference, in its own table of word vectors. Returns their ids."""
    tokenizer.add_tokens([*rows])
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids([*rows])
    text_encoder.get_input_embeddings().weight.data[ids] = torch.stack([*rows.values()])
    return ids


def replace_by_hand(context: Tensor, ids: Tensor, vectors: dict[int, Tensor]) -> Tensor:
    """(B, L, D), another vector wherever one of some token ids is."""
    context = context.clone()
    for row, prompt in enumerate(ids.tolist()):
        for position, token in enumerate(prompt):
            if token in vectors:
                context[row, position] = vectors[token]
    return context


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_output_is_replaced(family: str, tmp_path: Path) -> None:
    """Beside a plain word, which came first, and with a negative prompt that names none of the words."""
    sd = minti.load(oracles.save_folder(tmp_path / "model", family), device="cpu")
    pipe = oracles.pipeline(tmp_path / "pipe", family)
    tokenizer, text_encoder = copy.deepcopy((pipe.tokenizer, pipe.text_encoder))  # tests share them
    inputs, outputs, plain = random(1, 64, seed=1), random(3, 64, seed=2), random(1, 64, seed=3)
    save_file({"emp_params_out": outputs[:2].clone()}, tmp_path / "toy.safetensors")
    save_file({"emp_params_out": outputs[2:].clone(), "emp_params": inputs}, tmp_path / "both.safetensors")
    sd.add_concept(Concept("<plain>", plain))
    sd.add_concept(Concept.load(tmp_path / "toy.safetensors", "<toy>"))
    sd.add_concept(Concept.load(tmp_path / "both.safetensors", "<both>"))
    sd.add_concept(Concept("<late>", plain))

    zeros = torch.zeros(64)
    rows = {"<toya>": zeros, "<toyb>": zeros, "<both>": inputs[0], "<plain>": plain[0]}
    tokens = add_tokens(tokenizer, text_encoder, rows)[:3]
    texts = [PROMPT.replace("<toy>", "<toya><toyb>"), NEGATIVE]
    ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    theirs = replace_by_hand(text_encoder(ids)[0], ids, dict(zip(tokens, outputs, strict=True)))
    ours = sd.encode_prompt([PROMPT, NEGATIVE])
    assert_parity({"contexts": (ours, theirs)})
    assert torch.equal(sd.encode_prompt([PROMPT.replace("plain", "late"), NEGATIVE]), ours)
    how = {"prompt_embeds": theirs[:1], "negative_prompt_embeds": theirs[1:], "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(3)
    expected = pipe(**how, num_inference_steps=2, generator=generator, output_type="latent").images
    *_, found = sd.denoise([PROMPT], [3], negative_prompt=NEGATIVE, guidance_scale=5.0, steps=2)
    assert_parity({"latents": (found, expected)}, 2e-4)


def test_sdxl(tmp_path: Path) -> None:
    """The layers that become the context, not normalised; the pooled text sees the input rows alone."""
    sd = minti.load(oracles.save_sdxl(tmp_path / "model"), device="cpu")
    pipe = copy.deepcopy(oracles.sdxl_pipeline(tmp_path / "pipe"))
    toy, both, ids, vectors = {}, {}, {}, {}
    for i, (key, width) in enumerate((("clip_l", 64), ("clip_g", 32))):
        first, second, inputs = (random(1, width, seed=3 * i + j) for j in range(3))
        toy[f"{key}_out"], both[f"{key}_out"], both[key] = first, second, inputs
        parts = (pipe.tokenizer_2, pipe.text_encoder_2) if i else (pipe.tokenizer, pipe.text_encoder)
        tokens = add_tokens(*parts, {"<toy>": torch.zeros(width), "<both>": inputs[0], "<plain>": inputs[0]})
        ids[key] = parts[0](PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
        vectors[key] = {tokens[0]: first[0], tokens[1]: second[0]}
    plain = {key: both[key] for key in ("clip_l", "clip_g")}
    for name, content in (("toy", toy), ("plain", plain), ("both", both)):
        save_file(content, tmp_path / f"{name}.safetensors")
        sd.add_concept(Concept.load(tmp_path / f"{name}.safetensors", f"<{name}>"))
    context, (pooled, _) = sd.condition(sd.tokenizer([PROMPT]), torch.zeros(1, 6))
    theirs, _, their_pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    parts = zip(theirs.split((64, 32), dim=-1), ids.values(), vectors.values(), strict=True)
    theirs = torch.cat([replace_by_hand(*part) for part in parts], dim=-1)
    assert_parity({"context": (context, theirs), "pooled": (pooled, their_pooled)})


def test_learning(tmp_path: Path) -> None:
    """The gradient is that of the reference, in the output rows alone; nothing else in the model changes."""
    sd = with_outputs(minti.load(oracles.save_folder(tmp_path / "model", "small"), device="cpu"))
    pipe = oracles.pipeline(tmp_path / "pipe", "small")
    tokenizer, text_encoder = copy.deepcopy((pipe.tokenizer, pipe.text_encoder))
    word = Word("<toy>", initial_rows(sd, "word", "red toy", 2), latents())
    before = [p.clone() for module in (sd.text_encoder, sd.unet) for p in module.parameters()]
    settings = Settings(steps=3)
    inversion = Inversion(sd, [word], settings)
    batch = sample_batch(word, settings, 1000, settings.batch_size, 0)

    v = word.init[:, 32:].clone().requires_grad_(True)
    tokens = add_tokens(tokenizer, text_encoder, {"<toya>": torch.zeros(32), "<toyb>": torch.zeros(32)})
    texts = [prompt.replace("<toy>", "<toya><toyb>") for prompt in batch.prompts]
    ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    context = replace_by_hand(text_encoder(ids)[0], ids, dict(zip(tokens, v, strict=True)))
    x0 = word.latents_at(batch)[0]
    x_t = pipe.scheduler.add_noise(x0, batch.eps, batch.t)
    loss = F.mse_loss(pipe.unet(x_t, batch.t, context).sample, batch.eps)
    loss.backward()
    assert_parity({"loss": (inversion.step()[0], loss)}, 1e-4)
    (rows,) = inversion.rows
    assert_parity({"gradient": (rows.grad[:, 32:], v.grad)}, 1e-3)
    assert not rows.grad[:, :32].any()
    inversion.step()
    after = [p for module in (sd.text_encoder, sd.unet) for p in module.parameters() if p is not rows]
    assert all(map(torch.equal, before, after)) and len(before) == len(after)
    assert not rows[:, :32].any() and not torch.isclose(rows[:, 32:], word.init[:, 32:]).any()
    assert inversion.concept(0).widths == {"emp_params": 32, "emp_params_out": 32}


def test_starts(tmp_path: Path) -> None:
    """At what transformers makes of the init word by itself, or of a plain word from a file."""
    folder = oracles.save_folder(tmp_path / "model", "small")
    sd = with_outputs(minti.load(folder, device="cpu"))
    pipe = oracles.pipeline(tmp_path / "pipe", "small")
    tokenizer, text_encoder = copy.deepcopy((pipe.tokenizer, pipe.text_encoder))
    ids = tokenizer(["red toy"], return_tensors="pt").input_ids
    expected = text_encoder(ids)[0][0, 1:3]
    for kind, n in (("word", 2), ("output", 2), ("word", 1)):
        rows = initial_rows(sd, kind, "red toy", n)
        want = expected if n == 2 else expected.mean(0, keepdim=True)
        torch.testing.assert_close(rows, F.pad(want, (32, 0)), rtol=1e-5, atol=1e-5)

    old = random(2, 32)
    Concept("<old>", old).save(tmp_path / "old.safetensors")
    tokens = add_tokens(tokenizer, text_encoder, {"<olda>": old[0], "<oldb>": old[1]})
    ids = torch.tensor([[tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]])
    start = initial_rows(sd, "file", tmp_path / "old.safetensors")
    torch.testing.assert_close(start, F.pad(text_encoder(ids)[0][0, 1:3], (32, 0)), rtol=1e-5, atol=1e-5)
    assert "<old>" not in sd.tokenizer.placeholders
    save_file({"emp_params_out": old}, tmp_path / "out.safetensors")
    assert torch.equal(initial_rows(sd, "file", tmp_path / "out.safetensors"), F.pad(old, (32, 0)))

    layers = minti.load(folder, device="cpu")
    layers.text_encoder = prepare(layers.text_encoder, layers.unet, per_layer=True)
    n = len(layer_names(layers.unet))
    assert torch.equal(initial_rows(layers, "file", tmp_path / "old.safetensors"), old.repeat(1, n))
    with pytest.raises(InputError, match="knows words per layer, which exclude words of this kind"):
        initial_rows(layers, "file", tmp_path / "out.safetensors")
    with pytest.raises(InputError, match=r"out\.safetensors: holds a word .* with --output-embedding; give"):
        initial_rows(minti.load(folder, device="cpu"), "file", tmp_path / "out.safetensors")


def test_what_words_are_compared_with(tmp_path: Path) -> None:
    """The mean length of what transformers gives out for the words of the vocabulary, each in a prompt."""
    sd = with_outputs(minti.load(oracles.save_folder(tmp_path / "model", "small"), device="cpu"))
    pipe = oracles.pipeline(tmp_path / "pipe", "small")
    start, end, size = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id, len(pipe.tokenizer)
    prompts = torch.tensor([[start, i, *[end] * 75] for i in range(0, size, 1 + size // 512)])
    outputs = pipe.text_encoder(prompts)[0][:, 1]
    assert vocabulary_norm(sd) == pytest.approx(outputs.norm(dim=1).mean().item(), rel=1e-4)
    rows = initial_rows(sd, "random", "", 75)
    assert not rows[:, :32].any()
    torch.testing.assert_close(rows[:, 32:].std(), outputs.std(), rtol=0.2, atol=0)


FILES = {
    "SD 1, only the output": ({"emp_params_out": (2, 8)}, 8),
    "SD 1, as OneTrainer writes it": ({"emp_params": (2, 8), "emp_params_out": (2, 8)}, 8),
    "SDXL": ({"clip_l": (2, 8), "clip_g": (2, 6), "clip_l_out": (2, 8), "clip_g_out": (2, 6)}, 14),
    "SDXL, only the output": ({"clip_l_out": (2, 8), "clip_g_out": (2, 6)}, 14),
}


@pytest.mark.parametrize(("shapes", "width"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files(shapes: dict, width: int, suffix: str, tmp_path: Path) -> None:
    content = {key: random(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    path = tmp_path / f"toy{suffix}"
    backwards = dict(reversed(content.items()))
    save_file(backwards, path) if suffix == ".safetensors" else torch.save(backwards, path)
    concept = Concept.load(path)
    assert concept.placeholder == "toy"
    assert [*concept.widths.items()] == [(key, shape[1]) for key, shape in shapes.items()]
    assert torch.equal(concept.vectors, torch.cat([*content.values()], dim=1))
    assert f"2 vectors for the output of a {width}-wide encoder, norm" in describe(path)
    Concept("<cup>", concept.vectors, {"step": "5"}, concept.widths).save(again := tmp_path / f"c{suffix}")
    read = Concept.load(again)
    assert torch.equal(read.vectors, concept.vectors) and read.widths == concept.widths
    if suffix == ".safetensors":
        assert (read.placeholder, read.metadata) == ("<cup>", {"step": "5"})
        written = load_file(again)
        assert written.keys() == content.keys()
        assert all(torch.equal(written[key], content[key]) for key in content)


def test_bundled_with_a_lora(tmp_path: Path) -> None:
    content = {"lora_unet_x.lora_up.weight": torch.ones(4, 8), "bundle_emb.<a>.clip_l_out": random(1, 8)}
    save_file(content | {"bundle_emb.<b>.emb_params": random(1, 8)}, tmp_path / "l.safetensors")
    found = {concept.placeholder: concept.widths for concept in Concept.load_all(tmp_path / "l.safetensors")}
    assert found == {"<a>": {"clip_l_out": 8}, "<b>": {}}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"emp_params": (2, 8), "emp_params_out": (1, 8)}, "different numbers of vectors"),
        ({"emp_params": (2, 8), "emp_params_out": (2, 9)}, "emp_params do not go with emp_params_out"),
        (
            {"clip_l": (2, 8), "clip_l_out": (2, 8), "clip_g_out": (2, 6)},
            "clip_l do not go with clip_l_out",
        ),
        ({"clip_l": (2, 8), "clip_g": (2, 6), "clip_g_out": (2, 6)}, "clip_l, clip_g do not go with clip_g_"),
    ],
)
def test_files_whose_parts_do_not_fit_together(shapes: dict, message: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "toy.safetensors")
    with pytest.raises(InputError, match=rf"toy\.safetensors: is not a learned word: .*{message}"):
        Concept.load(tmp_path / "toy.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("output")
    oracles.save_folder(base / "model", "small")
    (base / "photos").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "photos" / f"{i}.png")
    return base


def learn(base: Path, out: Path, *more: str) -> Concept:
    argv = ["--checkpoint", base / "model", "--images", base / "photos", "--placeholder", "<toy>"]
    argv += ["--init-word", "red toy", "--out", out, "--device", "cpu", "--batch-size", 2]
    argv += ["--sample-every", 0, "--eval-every", 2, "--eval-size", 2, "--save-every", 2]
    train.main([*map(str, argv), "--output-embedding", *more])
    return Concept.load(out)


def test_the_commands(base: Path, tmp_path: Path) -> None:
    """Learned, interrupted and resumed bit for bit, reported, and painted beside a plain word."""
    whole = learn(base, tmp_path / "whole", "--steps", "4")
    learn(base, tmp_path / "parts", "--steps", "2")
    resumed = learn(base, tmp_path / "parts", "--steps", "4", "--resume")
    assert torch.equal(whole.vectors, resumed.vectors)
    assert whole.widths == {"emp_params": 32, "emp_params_out": 32}
    assert not whole.vectors[:, :32].any() and whole.vectors[:, 32:].all()
    report = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert "1 vector in the place of the text encoder's output (output embedding), started" in report
    Concept("<plain>", random(1, 32)).save(tmp_path / "plain.safetensors")
    argv = ["--checkpoint", str(base / "model"), "--device", "cpu", "--size", "16", "--concept"]
    argv += [str(tmp_path / "plain.safetensors"), "--concept", str(tmp_path / "whole")]
    argv += ["--prompt", "<toy> <plain>", "--steps", "1", "--num-images", "1", "--out", str(tmp_path / "p")]
    sample.main(argv)
    assert len([*(tmp_path / "p").glob("*.png")]) == 2
    argv = ["--checkpoint", str(base / "model"), "--device", "cpu", "--images", str(base / "photos")]
    argv += ["--concept", str(tmp_path / "whole"), "--train-text-encoder", "--out", str(tmp_path / "tuned")]
    with pytest.raises(InputError, match="is not for a word per layer or an output embedding"):
        tune.main(argv)


def test_pictures_of_two_words_are_told_apart(base: Path) -> None:
    """So that an evaluation that is continued does not keep pictures of another word of this name."""
    identities = set()
    for seed in range(2):
        sd = minti.load(base / "model", device="cpu")
        sd.add_concept(Concept("<toy>", random(1, 32, seed=seed), widths={"emp_params_out": 32}))
        identities.add(prompt_job(sd, "a photo of <toy>", Protocol(), {}, "n").inputs["prompt"])
    assert len(identities) == 2


def test_learn(base: Path) -> None:
    """In one call; the optimizer "direction" keeps the mean length of the encoder's outputs."""
    sd = minti.load(base / "model", device="cpu")
    how = {"output_embedding": True, "steps": 2, "batch_size": 1}
    words = [minti.learn(sd, base / "photos", "<toy>", "toy", **how)]
    words += [minti.learn(sd, base / "photos", "<cup>", "toy", optimizer="direction", **how)]
    context = sd.encode_prompt(["<toy> <cup>"])[0, 1:3]
    assert torch.equal(context, torch.cat([word.vectors[:, 32:] for word in words]))
    assert not torch.cat([word.vectors[:, :32] for word in words]).any()
    assert context[1].norm().item() == pytest.approx(vocabulary_norm(sd), rel=1e-5)
    with pytest.raises(InputError, match=r"knows output embeddings, which exclude .* load it without those"):
        minti.learn(sd, base / "photos", "<plain>", "toy", steps=1)


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--output-embedding is for --objective diffusion"):
        learn(base, tmp_path / "clip", "--objective", "clip")
    with pytest.raises(InputError, match="words per layer and output embeddings do not go together"):
        learn(base, tmp_path / "layers", "--per-layer")
    sd = minti.load(base / "model", device="cpu")
    n = len(layers := layer_names(sd.unet))
    output, layer = {"emp_params_out": 32}, dict.fromkeys(layers, 32)
    for wrong in (
        Concept("<a>", torch.ones(1, 32), widths={"emp_params_out": 16, "other_out": 16}),
        Concept("<a>", torch.ones(1, 32), widths={"emp_params": 16, "emp_params_out": 16}),
        Concept("<a>", torch.ones(1, 768), widths={"emp_params_out": 768}),
    ):
        with pytest.raises(InputError, match=r"'<a>' was learned on a .*this checkpoint has a 32-wide enc"):
            sd.add_concept(wrong)
    sd.add_concept(Concept("<toy>", torch.ones(1, 32), widths=output))
    with pytest.raises(InputError, match="the model knows output embeddings, which exclude words of this"):
        sd.add_concept(Concept("<b>", torch.ones(1, n * 32), widths=layer))
    for width in (64, 768):  # 64 is what the rows of an output embedding have
        message = rf"'<c>' was learned on a {width}-wide encoder.*, this checkpoint has a 32-wide encoder;"
        with pytest.raises(InputError, match=message):
            sd.add_concept(Concept("<c>", torch.ones(1, width), widths={"clip_l": width - 8, "clip_g": 8}))
