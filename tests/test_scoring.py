"""The CLIP that judges: loaded from any layout it sees and says what the reference does; and the scores."""

import json
import math
import operator
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from minti import InputError
from minti.formats import configs, keymap
from minti.formats.clip_checkpoint import Preprocess
from minti.formats.vocabulary import read_tokenizer
from minti.judge.prompts import replace_words
from minti.judge.scorer import Scorer, choose_clip
from minti.judge.scores import (
    Score,
    bootstrap,
    clip_i,
    clip_t,
    clip_t_pairwise,
    combine,
    image_only,
    mean_of_words,
    mean_score,
    student_t,
)
from minti.model.model_hash import model_hash

from . import compare, oracles
from .oracles import add_image_encoder, save_clip, save_folder, shared, write_tokenizer

# The processor that works on Pillow's pictures, as OpenAI's code does; newer versions call it so.
Processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
TEXTS = ["a photo of the cat", "red toy on the grass", ""]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def unit(x: Tensor) -> Tensor:
    """The reference normalises by itself in `CLIPModel.forward` only."""
    x = getattr(x, "pooler_output", x)
    return x / x.norm(dim=-1, keepdim=True)


def assert_same_embeddings(scorer: Scorer, reference: CLIPModel, images: list[Image.Image]) -> None:
    """Both see the very same files and texts, each with its own preprocessing and model."""
    size = scorer.preprocess.crop
    processor = Processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = unit(reference.get_image_features(pixel_values=pixels))
        texts = unit(reference.get_text_features(input_ids=scorer.tokenizer(TEXTS)))
    compare.assert_parity({"images": (scorer.embed_images(images, batch_size=2), theirs)})
    compare.assert_parity({"texts": (scorer.embed_texts(TEXTS), texts)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion with an image encoder of its own."""
    folder = save_folder(tmp_path_factory.mktemp("pair") / "model", "small")
    add_image_encoder(folder)
    return folder


# Preprocessing ---


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (32, 47), (5, 3), (100, 31), (427, 640), (97, 400)])
@pytest.mark.parametrize("side", [32, 224])
def test_preprocessing_is_that_of_the_reference(size: tuple[int, int], side: int) -> None:
    """To rounding of float32: the same pixels, whatever the size and shape."""
    image = picture(*size)
    processor = Processor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    theirs = processor([image], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(Preprocess(side, side)(image), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("concept", ["cat", "duck_toy", "teapot"])
def test_preprocessing_of_photos(concept: str) -> None:
    image = Image.open(shared(f"photos/{concept}/01.jpg")).convert("RGB")
    theirs = Processor()([image], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(Preprocess()(image), theirs, rtol=0, atol=1e-6)


def test_a_fine_pattern_becomes_grey() -> None:
    """A resize without antialiasing would keep only black or only white lines."""
    lines = np.zeros((256, 256, 3), dtype=np.uint8)
    lines[::2] = 255
    pixels = Preprocess(32, 32, (0.0,) * 3, (1.0,) * 3)(Image.fromarray(lines))
    assert pixels.sub(0.5).abs().max() < 0.02


def test_a_preprocessor_config_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"size": 40, "crop_size": 32, "image_mean": [0.1, 0.2, 0.3]}))
    image = picture(70, 90)
    theirs = Processor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
    )([image], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(Preprocess.read(tmp_path, 32)(image), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"resample": 2},
        {"crop_size": 48},
        {"size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 16}},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_other_preprocessing_is_refused(change: dict, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"size": {"shortest_edge": 32}, "crop_size": 32} | change))
    with pytest.raises(InputError, match=r"preprocessor_config\.json: asks for something else"):
        Preprocess.read(tmp_path, 32)


# Layouts ---


def test_transformers_folder(folder: Path, reference: CLIPModel) -> None:
    assert_same_embeddings(Scorer.load(folder), reference, [picture(40, 33), picture(32, 80), picture(9, 9)])


def test_real_photos(folder: Path, reference: CLIPModel) -> None:
    paths = sorted(shared("photos/duck_toy").glob("*.jpg"))
    assert_same_embeddings(Scorer.load(folder), reference, [Image.open(p).convert("RGB") for p in paths])


def test_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    """Snapshots of links, and a file that says which of them is the newest."""
    snapshot = tmp_path / "models--clip" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    (tmp_path / "models--clip" / "refs").mkdir()
    (tmp_path / "models--clip" / "refs" / "main").write_text("0123abc")
    found = Scorer.load(tmp_path / "models--clip").embed_texts(TEXTS)
    assert torch.equal(found, Scorer.load(folder).embed_texts(TEXTS))


def test_bin_and_old_config(folder: Path, reference: CLIPModel, tmp_path: Path) -> None:
    """The oldest folders: a pickle, position_ids in it, half of the config under another name."""
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        shutil.copy(folder / name, tmp_path)
    state = reference.state_dict()
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config["text_config_dict"], config["text_config"] = config["text_config"], {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_embeddings(Scorer.load(tmp_path), reference, [picture(40, 33)])


def test_defaults_left_out_of_a_config(tmp_path: Path) -> None:
    """transformers writes only what differs from ViT-B/32; the shapes of such a config are those of B/32."""
    config = {"projection_dim": 512, "text_config": {"num_hidden_layers": 1}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    one = torch.zeros(1)
    torch.save({"text_model.embeddings.token_embedding.weight": one, "spare": one}, tmp_path / "model.bin")
    with pytest.raises(
        InputError, match=r"does not fit; text_model.embeddings.token_embedding.weight has shape \(1,\)"
    ):
        Scorer.load(tmp_path)
    with torch.device("meta"):
        expected = CLIPModel(CLIPConfig(**config)).state_dict()
    with pytest.raises(InputError) as caught:
        Scorer.load(tmp_path)
    assert str(tuple(expected["text_model.embeddings.token_embedding.weight"].shape)) in str(caught.value)
    count = len([key for key in expected if "position_ids" not in key and key != "logit_scale"])
    assert f"and {count + 1 - 3} more" in str(caught.value)  # all but three are missing, one is not known


def test_the_pair_in_a_checkpoint_folder(pair: Path) -> None:
    """The text encoder's output is the shared space: nothing projects it."""
    scorer = Scorer.load(pair)
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(pair / "image_encoder")
    text = transformers.CLIPTextModel.from_pretrained(pair / "text_encoder")
    images = [picture(32, 32), picture(50, 40)]
    pixels = torch.stack([scorer.preprocess(image) for image in images])
    with torch.no_grad():
        compare.assert_parity({"images": (scorer.embed_images(images), unit(vision(pixels).image_embeds))})
        output = text(scorer.tokenizer(TEXTS))
    compare.assert_parity({"texts": (scorer.embed_texts(TEXTS), unit(output.pooler_output))})


class Block(nn.Module):
    """OpenAI's names for the parts of a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.ln_1 = nn.MultiheadAttention(width, width // 64), nn.LayerNorm(width)
        gelu = type("QuickGELU", (nn.Module,), {"forward": lambda self, x: x * torch.sigmoid(1.702 * x)})()
        layers = (("c_fc", nn.Linear(width, 96)), ("gelu", gelu), ("c_proj", nn.Linear(96, width)))
        self.mlp, self.ln_2 = nn.Sequential(OrderedDict(layers)), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, mask: Tensor | None) -> None:
        super().__init__()
        self.resblocks, self.mask = nn.ModuleList(Block(width) for _ in range(2)), mask

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, self.mask)
        return x.transpose(0, 1)


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(64))
        self.positional_embedding = nn.Parameter(torch.randn(17, 64))
        self.ln_pre, self.transformer, self.ln_post = (
            nn.LayerNorm(64),
            Transformer(64, None),
            nn.LayerNorm(64),
        )
        self.proj = nn.Parameter(torch.randn(64, 24))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, 64), patches], 1)
        return self.ln_post(self.transformer(self.ln_pre(x + self.positional_embedding))[:, 0]) @ self.proj


class OpenAI(nn.Module):
    """A second, independent CLIP on torch's own attention, its weights named as in OpenAI's files."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual, self.token_embedding = Visual(), nn.Embedding(vocab_size, 64)
        self.positional_embedding = nn.Parameter(torch.randn(77, 64))
        self.transformer = Transformer(64, torch.full((77, 77), -math.inf).triu(1))
        self.ln_final, self.text_projection = nn.LayerNorm(64), nn.Parameter(torch.randn(64, 24))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        for name, size in (("input_resolution", 32), ("context_length", 77), ("vocab_size", vocab_size)):
            self.register_buffer(name, torch.tensor(size))  # as in the state dict of OpenAI's program

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding))
        # The end token has the largest id of all.
        return self.visual(pixels), x[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection


@pytest.fixture(scope="module")
def openai(folder: Path) -> OpenAI:
    vocab_size = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    return oracles.randomise(OpenAI(vocab_size), 6)


def assert_is_openai(scorer: Scorer, model: OpenAI, tolerance: float = 1e-5) -> None:
    images = [picture(32, 40), picture(64, 32)]
    pixels = torch.stack([scorer.preprocess(image) for image in images])
    with torch.no_grad():
        image, text = model(pixels, scorer.tokenizer(TEXTS))
    pairs = {
        "images": (scorer.embed_images(images), unit(image)),
        "texts": (scorer.embed_texts(TEXTS), unit(text)),
    }
    compare.assert_parity(pairs, tolerance)


def test_openai_names_both_ways(openai: OpenAI, folder: Path, tmp_path: Path) -> None:
    """Every one of OpenAI's weights has one place in ours, and comes out of it as it went in."""
    state = openai.state_dict()
    torch.save(state, tmp_path / "ViT.pt")
    scorer, found = Scorer.load(tmp_path / "ViT.pt", tokenizer=folder), {}
    for module, blocks in (
        (scorer.text_encoder, keymap.openai_text_blocks),
        (scorer.image_encoder, keymap.openai_image_blocks),
    ):
        ours = module.state_dict()
        origins = keymap.find_origins(ours, blocks(module.config), keymap.OPENAI_LAYERS, "")
        found |= oracles.to_single_file(ours, origins)
    for name in ("logit_scale", "input_resolution", "context_length", "vocab_size"):
        del state[name]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def as_open_clip(model: CLIPModel, folder: Path, **changes: object) -> Path:
    """A model of transformers in the files of open_clip, whose names are OpenAI's (proved above)."""
    vision, text = model.config.vision_config, model.config.text_config
    weights: dict[str, Tensor] = {"logit_scale": torch.tensor(4.6)}
    for config, blocks in (
        (configs.text_config(text.to_dict(), "", projected=True), keymap.openai_text_blocks),
        (configs.vision_config(vision.to_dict(), ""), keymap.openai_image_blocks),
    ):
        kind = "text" if config.__class__.__name__.startswith("Text") else "vi"
        ours = {
            key: t
            for key, t in model.state_dict().items()
            if key.startswith(kind if kind == "text" else "vis")
        }
        origins = keymap.find_origins(ours, blocks(config), keymap.OPENAI_LAYERS, "")
        weights |= oracles.to_single_file(ours, origins)
    torch.save({key: t.clone() for key, t in weights.items()}, folder / "open_clip_pytorch_model.bin")
    halves = {
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": text.vocab_size,
            "width": 64,
            "heads": 4,
            "layers": 1,
        },
    }
    pictures = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bicubic"}
    described = {"model_cfg": {"embed_dim": 24, **halves, **changes}, "preprocess_cfg": pictures}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder / "open_clip_pytorch_model.bin"


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_open_clip(act: str, tmp_path: Path) -> None:
    """Activation, heads, mean and std are those of its config; without a config it is refused."""
    write_tokenizer(tmp_path)
    vocab_size = len(json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")))
    model = oracles.clip(vocab_size, hidden_act=act, num_attention_heads=2)
    text = model.config.text_config.to_dict() | {"num_attention_heads": 4, "hidden_act": act}
    other = CLIPModel(
        CLIPConfig(projection_dim=24, text_config=text, vision_config=model.config.vision_config.to_dict())
    )
    other.load_state_dict(model.state_dict())
    path = as_open_clip(other.eval(), tmp_path, **({"quick_gelu": True} if act == "quick_gelu" else {}))
    images = [picture(40, 33), picture(32, 80)]
    processor = Processor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.5, 0.6, 0.7],
    )
    for place in (path, tmp_path):
        scorer = Scorer.load(place, tokenizer=tmp_path)
        with torch.no_grad():
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            pictures = unit(other.get_image_features(pixel_values=pixels))
            texts = unit(other.get_text_features(input_ids=scorer.tokenizer(TEXTS)))
        compare.assert_parity({"images": (scorer.embed_images(images), pictures)})
        compare.assert_parity({"texts": (scorer.embed_texts(TEXTS), texts)})
    config = tmp_path / "open_clip_config.json"
    raw = json.loads(config.read_text())
    for changed in (
        {"custom_text": True},
        {"quick_gelu": "yes"},
        {"vision_cfg": 3},
        {"text_cfg": {"heads": 0}},
    ):
        config.write_text(json.dumps(raw | {"model_cfg": raw["model_cfg"] | changed}))
        with pytest.raises(InputError, match=r"open_clip_config\.json"):
            Scorer.load(path, tokenizer=tmp_path)
    config.unlink()
    with pytest.raises(
        InputError, match=r"open_clip's, which compute differently; put open_clip_config\.json"
    ):
        Scorer.load(path, tokenizer=tmp_path)


def test_processor_config_of_transformers_5(folder: Path, reference: CLIPModel, tmp_path: Path) -> None:
    """Where the mean, std and sizes are now: inside of another file."""
    new = copy(folder, tmp_path)
    options = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    options |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    processor = Processor(**options)
    transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(new)
    assert not (new / "preprocessor_config.json").exists()
    image = picture(70, 90)
    theirs = processor([image], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(Scorer.load(new).preprocess(image), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_openai_state_dict(half: bool, openai: OpenAI, folder: Path, tmp_path: Path) -> None:
    """Also in half precision, as published: 2^-11 off in each weight, a few times that in the output."""
    state = {key: t.half() if half and t.is_floating_point() else t for key, t in openai.state_dict().items()}
    torch.save(state, tmp_path / "ViT.pt")
    assert_is_openai(Scorer.load(tmp_path / "ViT.pt", tokenizer=folder), openai, 5e-3 if half else 1e-5)


@pytest.mark.filterwarnings("ignore")  # that tracing is a thing of the past
def test_openai_archive_is_read_but_not_run(
    openai: OpenAI, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files at OpenAI's addresses are programs. Their weights are read, and nothing is executed."""
    ids = torch.tensor([[534, 3, 535] + [0] * 74])
    traced = torch.jit.trace(openai, (torch.zeros(1, 3, 32, 32), ids), check_trace=False)
    torch.jit.save(traced, str(tmp_path / "ViT-B-32.pt"))

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("wants to run the program")

    for name in ("torch.jit.load", "torch.load"):
        monkeypatch.setattr(name, never)
    shutil.copytree(folder, tmp_path / "tokenizer")
    assert_is_openai(Scorer.load(tmp_path / "ViT-B-32.pt"), openai)


@pytest.mark.slow
def test_full_size_b32(tmp_path: Path) -> None:
    """ViT-B/32 at its published sizes, random weights, real photos."""
    torch.manual_seed(0)
    model = oracles.randomise(CLIPModel(CLIPConfig()), 0)
    model.save_pretrained(tmp_path)
    shutil.copy(shared("clip-bpe/bpe_simple_vocab_16e6.txt.gz"), tmp_path)
    images = [Image.open(p).convert("RGB") for p in sorted(shared("photos/cat").glob("*.jpg"))]
    assert_same_embeddings(Scorer.load(tmp_path), model, images)


def test_fingerprints_tell_models_apart(folder: Path, pair: Path) -> None:
    a, b, c = Scorer.load(folder), Scorer.load(folder), Scorer.load(pair)
    assert model_hash(a.image_encoder) == model_hash(b.image_encoder) != model_hash(c.image_encoder)
    b.image_encoder.visual_projection.weight.data[0, 5] += 1
    assert model_hash(a.image_encoder) != model_hash(b.image_encoder)


# What cannot be used ---


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def not_a_clip(folder: Path) -> None:
    edit(folder / "config.json", text_config=None)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("vocab.json"):
        path.unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_width(folder: Path) -> None:
    edit(folder / "config.json", projection_dim=25)


def positions(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config=config["text_config"] | {"max_position_embeddings": 32})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, r"has neither an image_encoder nor CLIP's config\.json"),
        (not_a_clip, r"config\.json: describes no CLIPModel"),
        (no_tokenizer, r"comes without a tokenizer.*--clip-tokenizer PATH"),
        (truncated, r"model\.safetensors: truncated or damaged"),
        (other_width, r"text_projection\.weight has shape \(24, 64\), the config asks for \(25, 64\)"),
        (positions, "32 positions, prompts are 77 tokens long"),
    ],
)
def test_bad_folders(damage: Callable[[Path], None], message: str, folder: Path, tmp_path: Path) -> None:
    broken = copy(folder, tmp_path)
    damage(broken)
    with pytest.raises(InputError, match=message) as caught:
        Scorer.load(broken)
    assert str(broken) in str(caught.value)


def test_an_image_encoder_in_another_space_is_refused(pair: Path, tmp_path: Path) -> None:
    """Some checkpoints have one whose output has nothing to do with their text encoder's."""
    other = copy(pair, tmp_path)
    shutil.rmtree(other / "image_encoder")
    for width in (24, 32):  # even of the very width of the text encoder, as with SD 1.5 and IP-Adapters
        oracles.image_encoder(projection_dim=width).save_pretrained(other / "image_encoder")
        with pytest.raises(InputError, match=r"image_encoder/config\.json: shares no space with the text"):
            Scorer.load(other)
    oracles.image_encoder(projection_dim=24).save_pretrained(other / "image_encoder")
    edit(other / "image_encoder" / "config.json", shares_text_space=True)
    with pytest.raises(InputError, match="texts become 32 numbers and pictures 24"):
        Scorer.load(other)


def test_bad_files(folder: Path, openai: OpenAI, tmp_path: Path) -> None:
    def load(name: str, state: dict) -> None:
        torch.save(state, tmp_path / name)
        Scorer.load(tmp_path / name, tokenizer=folder)

    state = openai.state_dict()
    with pytest.raises(InputError, match=r"nowhere: does not exist"):
        Scorer.load(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"model\.safetensors: is from a transformers folder; give that folder"
    ):
        Scorer.load(folder / "model.safetensors")
    with pytest.raises(InputError, match="is a CLIP with a ResNet"):
        load("rn50.pt", {"visual.layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"x\.pt: is not a whole CLIP model \(no token_embedding\.weight\)"):
        load("x.pt", {"spam": torch.zeros(1)})
    with pytest.raises(InputError, match=r"missing key visual\.ln_pre\.bias"):
        load("less.pt", {key: t for key, t in state.items() if key != "visual.ln_pre.bias"})
    with pytest.raises(InputError, match="unexpected key spam"):
        load("more.pt", state | {"spam": torch.zeros(1)})
    with pytest.raises(InputError, match=r"text_projection has shape \(24, 64\), the config asks for"):
        load("wrong.pt", state | {"text_projection": torch.zeros(24, 64)})
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match=r"no tokenizer here"):
        torch.save(state, tmp_path / "ViT.pt")
        Scorer.load(tmp_path / "ViT.pt", tokenizer=tmp_path / "tokenizer")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers(bad: float, folder: Path, tmp_path: Path) -> None:
    broken = copy(folder, tmp_path)
    model = CLIPModel.from_pretrained(broken)
    model.visual_projection.weight.data[3, 4] = bad
    model.save_pretrained(broken)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        Scorer.load(broken).embed_images([picture(32, 32)])


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"spam", b""])
def test_damaged_archives(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pt: "):
        Scorer.load(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")
def test_an_archive_with_a_hole(tmp_path: Path) -> None:
    module = torch.jit.script(nn.Linear(40, 40))
    torch.jit.save(module, str(tmp_path / "x.pt"))
    whole = (tmp_path / "x.pt").read_bytes()
    for cut in (len(whole) // 2, len(whole) - 30):
        (tmp_path / "y.pt").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"y\.pt: "):
            Scorer.load(tmp_path / "y.pt")
    with pytest.raises(InputError, match=r"x\.pt: is not a whole CLIP model"):
        Scorer.load(tmp_path / "x.pt")


def test_which_clip(pair: Path, folder: Path, tmp_path: Path) -> None:
    assert choose_clip(None, str(pair)) == str(pair)
    assert choose_clip(str(folder), str(pair)) == str(folder)
    for checkpoint in (str(tmp_path), None):
        with pytest.raises(InputError, match="--clip must be given"):
            choose_clip(None, checkpoint)


# Scores ---


def random_units(n: int, seed: int, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 0.5, dim=1)


def cosine(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / float(a.norm() * b.norm())


def test_scores_are_their_formulas() -> None:
    """Against loops over pairs; float32 sums of a few dozen numbers of about 1."""
    images, photos, text = random_units(5, 0), random_units(3, 1), random_units(1, 2)[0]
    uniform = torch.full((1, 5), 0.2)
    pairs = [cosine(x, p) for x in images for p in photos]
    close = {"rel": 1e-5, "abs": 1e-6}
    assert clip_i(images, photos, uniform).item() == pytest.approx(sum(pairs) / 15, **close)
    singles = [cosine(x, text) for x in images]
    assert clip_t_pairwise(images, text, uniform).item() == pytest.approx(sum(singles) / 5, **close)
    middle = sum(images) / 5
    assert clip_t(images, text, uniform).item() == pytest.approx(cosine(middle, text), **close)
    assert clip_t(images, text, uniform) > clip_t_pairwise(images, text, uniform) > 0
    others = [cosine(p, q) for i, p in enumerate(photos) for j, q in enumerate(photos) if i != j]
    assert image_only(photos) == pytest.approx(sum(others) / 6, **close)
    assert image_only(photos[:1]) == 1.0


def test_weights_repeat_pictures() -> None:
    """A picture that counts twice is one that is there twice."""
    images, photos, text = random_units(3, 0), random_units(3, 1), random_units(1, 2)[0]
    twice, uniform = images[[0, 0, 2, 1]], torch.full((1, 4), 0.25)
    weights = torch.tensor([[0.5, 0.25, 0.25]])
    for score, other in ((clip_i, photos), (clip_t, text), (clip_t_pairwise, text)):
        torch.testing.assert_close(score(images, other, weights), score(twice, other, uniform))


def test_student_t_is_that_of_the_tables() -> None:
    """The two-sided 95 % points as printed in tables, to their three decimals."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    for dof, t in table.items():
        assert student_t(dof) == pytest.approx(t, abs=6e-4)
    assert 3.182 < student_t(2.5) < 4.303


@pytest.mark.parametrize("n", [2, 3, 8])
def test_intervals_hold_the_truth_in_95_of_100_cases(n: int) -> None:
    """Simulated: the mean of n normal numbers. The plain percentile interval has 50 % for n = 2, 70 % for 3.

    The share of 1000 cases has a standard error of 0.7 %; three of them are allowed.
    """
    numbers = torch.randn(1000, n, generator=torch.Generator().manual_seed(n))
    found = [bootstrap([(lambda w, x=x: w @ x, n)], seed=i, resamples=200) for i, x in enumerate(numbers)]
    assert 0.93 <= np.mean([abs(score.value) <= score.margin for score in found]) <= 0.97
    # The variance of the draws is s^2 / n; drawing n instead of n - 1 would make it (n - 1) / n of that.
    ratios = [score.draws.var() / (x.var() / n) for score, x in zip(found, numbers, strict=True)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("n", [2, 3])
def test_intervals_of_repeated_words_hold_the_truth(n: int) -> None:
    """Simulated: three concepts, n words each; words differ, and so do pictures, which all words share.

    Drawing both words and pictures counts their interaction twice (Owen 2007), so more than 95 % are right.
    """
    generator, inside = torch.Generator().manual_seed(n), 0
    for case in range(150):
        noise = torch.randn(6, generator=generator)  # of the pictures
        groups = []
        for _ in range(3):
            words = [noise + torch.randn(1, generator=generator) for _ in range(n)]
            groups.append([bootstrap([(lambda w, x=x: w @ x, 6)], case, 200) for x in words])
        mean = mean_of_words(groups)
        inside += abs(mean.value) <= mean.margin
    assert inside / 150 >= 0.92  # less 1.7 standard errors


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    """Student's t times the standard error, up to the noise of 4000 resamples (about 3 %)."""
    images, text = random_units(20, 0), random_units(1, 2)[0]
    score = bootstrap([(lambda w: clip_t_pairwise(images, text, w), 20)], resamples=4000)
    values = images @ text
    assert score.value == pytest.approx(values.mean().item(), rel=1e-5)
    assert score.margin == pytest.approx(2.093 * values.std().item() / math.sqrt(20), rel=0.1)
    assert score.interval == (score.value - score.margin, score.value + score.margin)


def test_less_than_two_pictures_have_no_interval() -> None:
    """Nor have scores that do not vary: nothing is known of how far they would."""
    one = bootstrap([(lambda w: w @ torch.tensor([0.3]), 1)])
    some = bootstrap([(lambda w: w @ torch.tensor([0.3]), 1), (lambda w: w @ torch.tensor([0.1, 0.9]), 2)])
    equal = bootstrap([(lambda w: w @ torch.ones(4), 4)])
    for score, shown in ((one, "0.3000"), (some, "0.4000"), (equal, "1.0000")):
        assert score.interval is None and score.margin is None and str(score) == shown


def test_pictures_from_the_same_noise_stay_together() -> None:
    """Two prompts whose scores mirror each other add up to a constant: nothing is left to vary."""
    values = torch.linspace(0, 1, 20)
    score = bootstrap([(lambda w: w @ values, 20), (lambda w: w @ (1 - values), 20)])
    assert score.value == pytest.approx(0.5)
    assert score.margin is None
    alone = bootstrap([(lambda w: w @ values, 20)])
    assert alone.margin > 0.05
    other_number = bootstrap([(lambda w: w @ values, 20), (lambda w: w @ (1 - values[:19]), 19)])
    assert other_number.margin > 0.05


def test_intervals_repeat() -> None:
    images, text = random_units(3, 4), random_units(1, 2)[0]
    one, two, again = (bootstrap([(lambda w: clip_t(images, text, w), 3)], seed) for seed in (0, 1, 0))
    assert one.interval == again.interval != two.interval


def test_scores_of_the_same_noise_are_combined_draw_by_draw() -> None:
    """What two setups owe to their noise cancels in the difference; a constant has no draws to add."""
    values = torch.linspace(0, 1, 20)
    a, b = (bootstrap([(lambda w, s=shift: w @ (values + s), 20)]) for shift in (0.0, 0.1))
    difference = combine(operator.sub, [b, a])
    assert difference.value == pytest.approx(0.1) and difference.margin is None and a.margin > 0.05
    shifted = combine(operator.add, [a, Score(3.0)])
    assert shifted.value == pytest.approx(3.5) and shifted.margin == pytest.approx(a.margin, rel=1e-4)
    assert combine(operator.sub, [Score(3.0), Score(1.0)]) == Score(2.0)
    assert mean_score([a, None, b]).value == pytest.approx(0.55) and mean_score([None]) is None
    few = bootstrap([(lambda w: w @ values[:3], 3)])
    assert combine(operator.sub, [a, few]).dof == 2  # the smaller of both


def test_words_learned_alike_are_drawn_anew() -> None:
    """Of words that are each known exactly, what is left is the textbook interval of their mean."""
    values = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    words = [Score(value, torch.full((4000,), value, dtype=torch.float64)) for value in values.tolist()]
    mean = mean_of_words([words])
    assert mean.value == pytest.approx(values.mean().item()) and mean.dof == 4
    assert mean.margin == pytest.approx(2.776 * values.std().item() / math.sqrt(5), rel=0.1)
    assert mean_of_words([words[:1]]) == words[0] and mean_of_words([]) is None
    other = combine(operator.sub, [mean_of_words([[combine(operator.neg, [w]) for w in words]]), mean])
    assert other.margin == pytest.approx(2 * mean.margin)  # the i-th words of both are drawn together
    # Two groups whose means are equally uncertain have twice the degrees of freedom (Satterthwaite).
    assert mean_of_words([words, words]).dof == pytest.approx(8, rel=0.1)


# The prompt without the word ---


def test_words_are_left_out_as_the_tokenizer_finds_them() -> None:
    assert replace_words("A photo of <toy>, on grass", ["<toy>"]) == "a photo of , on grass"
    assert replace_words("sks in the tasks of SKS.", ["sks"]) == "in the tasks of ."
    assert replace_words("<toy> and <toy>-2", ["<toy>", "<toy>-2"]) == "and"
    assert replace_words("a*b &amp; *", ["*"], "{}") == "a{}b & {}"
    assert replace_words("  Nothing  TO do ", []) == "nothing to do"


def test_the_tokenizer_agrees(tmp_path: Path) -> None:
    """What is left encodes to the same ids as the prompt, apart from the word's."""

    tokenizer = read_tokenizer(write_tokenizer(tmp_path))
    words = ["<toy>", "sks", "*"]
    for i, word in enumerate(words):
        tokenizer.add_placeholder(word, [1000 + i], replace=True)
    for text in ("a photo of <toy>.", "SKS, tasks & sks's (*)", "a*b *c <toy><toy>", "the red <TOY>y"):
        kept = [i for i in tokenizer.encode(text) if i < 1000]
        plain = read_tokenizer(tmp_path)
        assert plain.encode(replace_words(text, words, " ")) == kept
