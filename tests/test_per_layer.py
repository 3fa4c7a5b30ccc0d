"""Words per layer against diffusers: for each cross-attention a context of its own."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minti
from minti import Concept, InputError, evaluate, sample, train
from minti.inversion.batches import Settings, Word
from minti.inversion.inversion import Inversion
from minti.inversion.start import word_rows
from minti.model.per_layer import TextEncoderPerLayer, layer_names
from minti.tune import __main__ as tune

from . import compare, oracles
from .compare import assert_parity
from .test_inversion import latents

TINY = Path(__file__).parents[1] / "weights" / "tiny"
KOHYA = ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{i:02}" for i in range(3, 12))]
PROMPT = "a photo of <toy> on grass"


def per_layer(sd: minti.StableDiffusion) -> minti.StableDiffusion:
    sd.text_encoder = TextEncoderPerLayer(sd.text_encoder, sd.unet)
    return sd


def attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """The cross-attentions of diffusers' UNet by the names of kohya's files, level by level."""
    found = {}
    for block, names in ((0, ("IN01", "IN02")), (1, ("IN04", "IN05")), (2, ("IN07", "IN08"))):
        found |= dict(zip(names, unet.down_blocks[block].attentions, strict=True))
    if unet.mid_block is not None:
        found["MID"] = unet.mid_block.attentions[0]
    for block in (1, 2, 3):
        for i, attention in enumerate(unet.up_blocks[block].attentions):
            found[f"OUT{3 * block + i:02}"] = attention
    return {name: attention.transformer_blocks[0].attn2 for name, attention in found.items()}


def with_contexts(unet: nn.Module, contexts: dict[str, Tensor]) -> None:
    """Let each cross-attention see its own context, whatever the UNet is called with."""
    layers = attentions(unet)
    assert layers.keys() == contexts.keys()
    for name, layer in layers.items():

        def replace(module: nn.Module, args: tuple, kwargs: dict, own: Tensor = contexts[name]) -> tuple:
            return args, kwargs | {"encoder_hidden_states": own}

        layer.register_forward_pre_hook(replace, with_kwargs=True)


@pytest.mark.parametrize("family", ["sd1", "sd2", "inpainting"])
def test_each_layer_reads_its_own_vectors(family: str, tmp_path: Path) -> None:
    """A prompt with a word of two vectors, whose layers differ, and a plain word."""
    folder = oracles.save_folder(tmp_path / "model", family)
    pipe = oracles.pipeline(tmp_path / "pipe", family)
    pipe.unet, pipe.text_encoder = copy.deepcopy((pipe.unet, pipe.text_encoder))  # tests share them
    sd = minti.load(folder, device="cpu")
    width = sd.tables[0].weight.shape[1]
    vectors = torch.randn(2, len(KOHYA) * width, generator=torch.Generator().manual_seed(0))
    plain = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    sd.add_concept(Concept("<plain>", plain))
    sd.add_concept(Concept("<toy>", vectors, widths=dict.fromkeys(KOHYA, width)))
    assert layer_names(sd.unet) == KOHYA
    prompt = f"{PROMPT} by <plain>"

    pipe.load_textual_inversion({"<plain>": plain}, token="<plain>")
    contexts = {}
    for name, rows in zip(KOHYA, vectors.split(width, dim=1), strict=True):
        word = f"<toy{name.lower()}>"
        pipe.load_textual_inversion({word: rows}, token=word)
        text = pipe.maybe_convert_prompt(prompt.replace("<toy>", word), pipe.tokenizer)
        ids = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        contexts[name] = pipe.text_encoder(ids)[0]
    x, t = torch.randn(1, pipe.unet.config.in_channels, 8, 8), torch.tensor([500])
    alike = pipe.unet(x, t, contexts["MID"]).sample
    with_contexts(pipe.unet, contexts)
    expected = pipe.unet(x, t, contexts["MID"]).sample
    context = sd.encode_prompt([prompt])
    with torch.no_grad():
        assert_parity(
            {
                "contexts": (context, torch.cat([*contexts.values()], dim=-1)),
                "output": (sd.unet(x, t, context), expected),
            }
        )
    assert (alike - expected).abs().max() > 1e-2 * expected.abs().max()


def test_layers_without_a_middle_block() -> None:
    unet = compare.ours(oracles.unet("sd1", mid_block_type=None, layers_per_block=1))
    names = ["IN01", "IN03", "IN05", *(f"OUT{i:02}" for i in range(2, 8))]
    assert layer_names(unet) == names


@pytest.mark.parametrize("family", ["small", "ldm"])
def test_equal_vectors_in_all_layers_are_a_plain_word(family: str, tmp_path: Path) -> None:
    """To 1e-5 of the latents: batches of another size sum in another order."""
    if family == "ldm":
        oracles.ldm_pipeline(tmp_path / "vocabulary").save_pretrained(folder := tmp_path / "model")
        (tmp_path / "vocabulary" / "vocab.txt").rename(folder / "tokenizer" / "vocab.txt")
    else:
        folder = oracles.save_folder(tmp_path / "model", family)
    found = []
    for layers in (False, True):
        sd = minti.load(folder, device="cpu")
        rows = torch.randn(2, sd.tables[0].weight.shape[1], generator=torch.Generator().manual_seed(0))
        widths = {}
        if layers:
            widths = dict.fromkeys(layer_names(sd.unet), rows.shape[1])
            rows = rows.repeat(1, len(widths))
        sd.add_concept(Concept("<toy>", rows, widths=widths))
        *_, z = sd.denoise([PROMPT], [0], steps=3, size=32)
        found.append(z)
    assert_parity({"latents": tuple(found)}, 1e-5)


def test_learning(tmp_path: Path) -> None:
    """The gradient of equal vectors sums up to that of a plain word; every layer goes its own way."""
    folder = oracles.save_folder(tmp_path / "model", "small")
    gradients = []
    for prepare in (lambda sd: sd, per_layer):
        sd = prepare(minti.load(folder, device="cpu"))
        word = Word("<toy>", word_rows(sd, "red toy", 2), latents())
        inversion = Inversion(sd, [word], Settings(steps=3))
        inversion.step()
        gradients.append(inversion.rows[0].grad.clone())
    names = layer_names(sd.unet)
    parts = gradients[1].unflatten(1, (len(names), -1))
    torch.testing.assert_close(
        parts.sum(1), gradients[0], rtol=1e-3, atol=1e-5 * gradients[0].abs().max().item()
    )
    inversion.step()
    rows = inversion.rows[0].detach().unflatten(1, (len(names), -1))
    assert all((rows[:, i] - rows[:, j]).abs().max() > 1e-3 for i in range(len(names)) for j in range(i))
    concept = inversion.concept(0)
    assert [*concept.widths] == names and concept.vectors.shape == word.init.shape


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_files(suffix: str, tmp_path: Path) -> None:
    """As kohya's `train_textual_inversion_XTI.py` writes them, whatever the order of the keys."""
    g = torch.Generator().manual_seed(0)
    content = {name: torch.randn(2, 8, generator=g) for name in reversed(KOHYA)}
    path = tmp_path / f"toy{suffix}"
    if suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    concept = Concept.load(path)
    assert (concept.placeholder, [*concept.widths.items()]) == ("toy", [(name, 8) for name in KOHYA])
    assert torch.equal(concept.vectors, torch.cat([content[name] for name in KOHYA], dim=1))
    Concept("<cup>", concept.vectors, {"step": "5"}, concept.widths).save(again := tmp_path / f"cup{suffix}")
    read = Concept.load(again)
    assert torch.equal(read.vectors, concept.vectors) and [*read.widths] == KOHYA
    if suffix == ".safetensors":
        assert (read.placeholder, read.metadata) == ("<cup>", {"step": "5"})
        assert {name: rows.shape for name, rows in load_file(again).items()} == dict.fromkeys(KOHYA, (2, 8))


@pytest.mark.parametrize("change", [{"MID": torch.zeros(3, 8)}, {"MID": torch.zeros(2, 9)}])
def test_files_whose_layers_do_not_fit_together(change: dict, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2, 8) for name in KOHYA} | change, path := tmp_path / "toy.safetensors")
    with pytest.raises(InputError, match=r"toy\.safetensors: is not a learned word: its "):
        Concept.load(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("per_layer")
    oracles.save_folder(base / "model", "small")
    oracles.add_image_encoder(base / "model")
    (base / "photos").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "photos" / f"{i}.png")
    return base


def learn(base: Path, out: Path, *more: str) -> Concept:
    argv = ["--checkpoint", base / "model", "--images", base / "photos", "--placeholder", "<toy>"]
    argv += ["--init-word", "red toy", "--out", out, "--device", "cpu", "--batch-size", 2, "--per-layer"]
    argv += ["--sample-every", 0, "--eval-every", 2, "--eval-size", 2, "--save-every", 2]
    train.main([*map(str, argv), *more])
    return Concept.load(out)


@pytest.mark.parametrize("optimizer", ["adamw", "direction"])
def test_the_commands(optimizer: str, base: Path, tmp_path: Path) -> None:
    """Learned, interrupted and resumed bit for bit, and painted beside a plain word."""
    whole = learn(base, tmp_path / "whole", "--steps", "4", "--optimizer", optimizer)
    learn(base, tmp_path / "parts", "--steps", "2", "--optimizer", optimizer)
    resumed = learn(base, tmp_path / "parts", "--steps", "4", "--optimizer", optimizer, "--resume")
    assert torch.equal(whole.vectors, resumed.vectors)
    assert [*whole.widths] == layer_names(minti.load(base / "model", device="cpu").unet)
    width = whole.widths["MID"]
    Concept("<plain>", torch.randn(1, width)).save(tmp_path / "plain.safetensors")
    argv = ["--checkpoint", str(base / "model"), "--device", "cpu", "--size", "16", "--concept"]
    argv += [str(tmp_path / "whole"), "--concept", str(tmp_path / "plain.safetensors")]
    argv += ["--prompt", "<toy> <plain>", "--steps", "1", "--num-images", "1", "--out", str(tmp_path / "p")]
    sample.main(argv)
    assert len([*(tmp_path / "p").glob("*.png")]) == 2
    argv = ["--checkpoint", str(base / "model"), "--device", "cpu", "--images", str(base / "photos")]
    argv += ["--concept", str(tmp_path / "whole"), "--train-text-encoder", "--out", str(tmp_path / "tuned")]
    with pytest.raises(InputError, match="--train-text-encoder is not for a word per layer"):
        tune.main(argv)


def test_learn(base: Path) -> None:
    sd = minti.load(base / "model", device="cpu")
    for placeholder in ("<toy>", "<cup>"):
        word = minti.learn(sd, base / "photos", placeholder, "toy", per_layer=True, steps=1, batch_size=1)
        assert [*word.widths] == layer_names(sd.unet)
    assert sd.encode_prompt(["<toy> <cup>"]).shape[-1] == sum(word.widths.values())


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--per-layer is for --objective diffusion"):
        learn(base, tmp_path / "clip", "--objective", "clip")
    sd = minti.load(base / "model", device="cpu")
    with pytest.raises(
        InputError, match=r"encoder with words for 16 layers, IN01.*, this checkpoint has a 32-wide"
    ):
        sd.add_concept(Concept("<toy>", torch.zeros(1, 16 * 32), widths=dict.fromkeys(KOHYA, 32)))
    sdxl = minti.load(oracles.save_sdxl(tmp_path / "sdxl"), device="cpu")
    with pytest.raises(InputError, match="words per layer are for models with one text encoder"):
        per_layer(sdxl)
    with pytest.raises(InputError, match="'<toy>' was learned on a 32-wide encoder with words for 16 layers"):
        sdxl.add_concept(Concept("<toy>", torch.zeros(1, 16 * 32), widths=dict.fromkeys(KOHYA, 32)))


def test_equal_vectors_are_evaluated_like_a_plain_word(tmp_path: Path) -> None:
    """To 0.02 of scores between -1 and 1: pixels may differ by a level, which CLIP sees."""
    sd, found = minti.load(TINY, device="cpu"), []
    rows, names = word_rows(sd, "cat"), layer_names(sd.unet)
    (tmp_path / "prompts.txt").write_text("a photo of {}\na photo of {} in the snow\n", encoding="utf-8")
    for name, n in (("plain", 1), ("layers", len(names))):
        widths = dict.fromkeys(names, rows.shape[1]) if n > 1 else {}
        Concept("<toy>", rows.repeat(1, n), widths=widths).save(tmp_path / f"{name}.safetensors")
        argv = ["--checkpoint", str(TINY), "--clip", str(TINY), "--images", str(TINY / "concepts" / "imp")]
        argv += [
            "--concept",
            str(tmp_path / f"{name}.safetensors"),
            "--prompts",
            str(tmp_path / "prompts.txt"),
        ]
        argv += ["--num-images", "1", "--sample-steps", "2", "--device", "cpu", "--out", str(tmp_path / name)]
        evaluate.main([*argv, "--no-references"])
        text = (tmp_path / name / "evaluation.json").read_text(encoding="utf-8")
        result = json.loads(text)
        found.append([result["clip_i"], result["clip_t"]])
    assert found[1] == pytest.approx(found[0], abs=0.02)
