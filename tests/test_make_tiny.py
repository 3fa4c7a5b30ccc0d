"""The tiny world and the tools that train `weights/tiny` on it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import minti
from minti.errors import InputError
from minti.formats import configs
from minti.formats.vocabulary import read_tokenizer
from minti.inversion import templates
from minti.model.clip import CLIPTextModel
from minti.model.image_encoder import CLIPVisionModel
from minti.model.unet import UNet
from minti.model.vae import VAE
from minti.study.classifier import Judge
from minti.study.concepts import read_concepts
from tools.make_tiny import (
    bpe,
    captions,
    clip,
    concepts,
    decoder,
    export,
    models,
    probe,
    training,
    vae,
    world,
)
from tools.make_tiny.captions import caption
from tools.make_tiny.data import Pictures, caption_at, picture_at, to_pictures, to_pixels
from tools.make_tiny.draw import labels, render

TINY = Path(__file__).parents[1] / "weights" / "tiny"


def facts(scene: world.Scene) -> dict[str, object]:
    """Everything a caption or a twin can change, without places and sizes."""
    first = scene.things[0]
    return {
        "noun": first.noun,
        "color": first.color,
        "color2": first.color2,
        "pattern": first.pattern,
        "background": scene.background,
        "style": scene.style,
    }


def test_pictures_are_functions_of_seed_and_index() -> None:
    first = [picture_at(i, seed=3) for i in range(6)]
    assert all((a == picture_at(i, seed=3)).all() for i, a in enumerate(first))
    assert not any((a == b).all() for i, a in enumerate(first) for b in first[:i])
    assert first[0].shape == (64, 64, 3) and first[0].dtype == np.uint8


def test_every_attribute_value_occurs() -> None:
    seen = [facts(world.scene(0, i)) for i in range(4000)]
    for fact, values in captions.FACTS.items():
        assert {f[fact] or "" for f in seen} == set(values), fact


def test_things_stand_out_from_their_background() -> None:
    """The picture with the thing differs from the one without it over most of the thing."""
    for i in range(60):
        scene = world.scene(0, i)
        bare = render(replace(scene, things=()))
        changed = np.abs(render(scene).astype(int) - bare).max(axis=-1) > 40
        area = sum(3.1 * t.radius**2 for t in scene.things)
        assert changed.sum() > 0.15 * min(area, 64 * 64), f"scene {i}: {scene}"


def test_twins_differ_in_one_attribute() -> None:
    for i in range(300):
        scene = world.scene(0, i)
        other, which = world.twin(scene, 0, i)
        before, after = facts(scene), facts(other)
        changed = {fact for fact in before if before[fact] != after[fact]}
        toys = {before["noun"], after["noun"]} & set(world.TOY_NAMES)
        # A toy's looks are its own, and plain things have no second colour: these change along.
        along = {"noun": {"color", "color2", "pattern"} if toys else set(), "pattern": {"color2"}}
        assert which in changed and changed <= {which} | along.get(which, set()), (which, changed)


def test_captions_tell_the_truth() -> None:
    for i in range(500):
        scene = world.scene(0, i)
        said = caption(scene, np.random.default_rng(i))
        truth = facts(scene)
        for fact, value in said.facts.items():
            assert (truth[fact] or "") == value, said
        for color in world.COLORS:
            named = color in said.text.split()
            shown = {c for t in scene.things for c in (t.color, t.color2)} | {scene.background}
            assert not named or color in shown, said


def test_must_names_the_difference_of_twins() -> None:
    for i in range(200):
        rng = np.random.default_rng(i)
        _, which = world.twin(world.scene(0, i), 0, i)
        texts = [caption_at(2 * i + k, rng, contrast=True) for k in (0, 1)]
        if which in ("noun", "background", "style"):
            assert texts[0].facts[which] != texts[1].facts[which], texts


def test_templates_of_the_trainer_are_in_the_grammar() -> None:
    known = {t for group in captions.PHOTO_TEMPLATES.values() for t in group} | set(captions.RENDITIONS)
    assert set(templates.OBJECT) <= known
    assert set(templates.load_templates("style")) <= {
        t for group in captions.STYLE_TEMPLATES.values() for t in group
    }


def test_concepts_are_held_out() -> None:
    def silhouette(thing: world.Thing) -> np.ndarray:
        return labels(replace(thing, x=32.0, y=32.0, radius=24.0)) > 0

    known = [silhouette(world.Thing(noun, "red")) for noun in world.NOUNS]
    known += [silhouette(toy) for toy in world.toys().values()]
    for concept in concepts.held_out().values():
        shown = concepts.pictures(concept)
        assert len(shown) == 6 and all(p.shape == (64, 64, 3) for p in shown)
        assert not any((a == b).all() for i, a in enumerate(shown) for b in shown[:i])
        if concept.thing:
            assert concept.name not in captions.FACTS["noun"]
            own = silhouette(concept.thing)
            overlap = max((own & other).sum() / (own | other).sum() for other in known)
            assert overlap < 0.85, f"{concept.name} has the silhouette of something known"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    texts = [caption_at(i, np.random.default_rng(i)).text for i in range(3000)]
    bpe.write(folder, bpe.learn(texts, limit=2000))
    return folder


def test_vocabulary_is_read_alike_by_transformers(tokenizer_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(tokenizer_folder)
    ours = read_tokenizer(tokenizer_folder)
    texts = [caption_at(i, np.random.default_rng(i)).text for i in range(200)]
    texts += ["", "A  Red cup!!", "naïve café 😀", "12 wugs' hats", "zzyzx-qwerty " * 30]
    padded = theirs(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    torch.testing.assert_close(ours(texts), torch.tensor(padded), rtol=0, atol=0)


def test_words_of_the_world_are_single_tokens(tokenizer_folder: Path) -> None:
    tokenizer = read_tokenizer(tokenizer_folder)
    words = (*world.COLORS, *world.NOUNS, *world.TOY_NAMES, "photo", "toy", "animal", "striped", "style")
    assert [w for w in words if len(tokenizer.encode(w)) != 1] == []


def test_bpe_learns_the_most_frequent_pair_first() -> None:
    # "ab" 5 times, "abc" 3 times: a+b</w> has 5, a+b has 3, then ab+c</w> with 3.
    merges = bpe.learn(["ab ab ab ab ab abc abc abc"], limit=10)
    assert merges == [("a", "b</w>"), ("a", "b"), ("ab", "c</w>")]


def test_pixels_round_trip() -> None:
    picture = np.arange(256, dtype=np.uint8).repeat(3 * 16).reshape(1, 64, 64, 3)
    assert (to_pictures(to_pixels(picture)) == picture).all()


def test_spread_loss_is_zero_for_white_latents_only() -> None:
    z = torch.randn((64, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    assert vae.spread_loss(z) < 1e-3  # 16,384 samples a channel: errors of about 0.01, squared
    assert vae.spread_loss(z * torch.tensor([1, 1, 0.4, 1])[:, None, None]) > 0.02
    assert vae.spread_loss(z[:, :1].expand(-1, 4, -1, -1)) > 0.5


def test_contrastive_loss_formula() -> None:
    """Against the definition, pair by pair."""
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randn((2, 5, 8), generator=generator)
    t, v = (x / x.norm(dim=-1, keepdim=True) for x in (text, image))
    loss = 0.0
    for i in range(5):
        row = torch.stack([10 * t[i] @ v[j] for j in range(5)])
        column = torch.stack([10 * t[j] @ v[i] for j in range(5)])
        loss += (row.logsumexp(0) - row[i] + column.logsumexp(0) - column[i]) / 10
    torch.testing.assert_close(clip.contrastive_loss(text, image, torch.tensor(10.0)), loss)


def small_run(
    folder: Path, steps: int, total: int = 6, rank: int = 0, world: int = 1
) -> dict[str, torch.Tensor]:
    """Regression on a fixed target, stopped after `steps` of `total` steps."""
    settings = {"seed": 0, "lr": 0.1, "batch": 4, "rank": rank, "world": world}
    run = training.Run("toy", folder, total, float("inf"), torch.device("cpu"), **settings)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn((4, 3), generator=run.rng(step))[run.share]
        if step + 1 == steps:
            run.interrupted = True
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    training.train(run, {"model": model}, loss_of, lambda ema, step: None)
    return training.ema_of(folder, "toy")["model"] if rank == 0 else {}


def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = small_run(tmp_path / "a", 6)
    small_run(tmp_path / "b", 3)
    pieces = small_run(tmp_path / "b", 6)
    for key, value in whole.items():
        torch.testing.assert_close(pieces[key], value, rtol=0, atol=0)


def one_of_two(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    small_run(folder, 6, rank=rank, world=2)
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Each on its half of every batch; 1e-6 for the mean of two means."""
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    together = training.ema_of(tmp_path, "toy")["model"]
    torch.testing.assert_close(together, small_run(tmp_path / "alone", 6), rtol=1e-5, atol=1e-6)


def test_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the stage 'vae' first"):
        training.ema_of(tmp_path, "vae")


def test_shares_count_only_what_is_asked_for() -> None:
    truths = [{"noun": "cup", "color": "red"}, {"noun": "star"}]
    readings = [{"noun": "cup", "color": "blue"}, {"noun": "cup", "color": "red"}]
    result = probe.shares(truths, [dict.fromkeys(captions.FACTS, "") | r for r in readings])
    assert result["noun"] == (0.5, 2) and result["color"] == (0.0, 1) and result["style"] == (0.0, 0)


def test_the_judge_is_shown_every_concept() -> None:
    examples = probe.concept_examples(0, 100, 0)
    assert {c.name for c in probe.OBJECTS} <= {facts["noun"] for _, facts in examples}
    for picture, facts in examples:
        assert picture.shape == (64, 64, 3)
        assert all(value in probe.READS[fact] for fact, value in facts.items())
    assert {facts["style"] for _, facts in examples} == {*world.STYLES, "riso"}


def test_the_decoder_is_trained_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    """It moves, from where the autoencoder stood, and the encoder does not."""
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "tokenizer").symlink_to(tokenizer_folder)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "world" / "pictures.npy", rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8))
    (tmp_path / "latents").mkdir()
    noise = rng.standard_normal((4, 4, 16, 16))
    np.save(tmp_path / "latents" / "latents.npy", noise.astype(np.float16))
    before = VAE(configs.vae_config(models.VAE, "vae")).state_dict()
    (tmp_path / "vae").mkdir()
    torch.save({"ema": {"vae": before}}, tmp_path / "vae" / "state.pt")
    run = training.Run("decoder", tmp_path, 2, float("inf"), torch.device("cpu"), seed=0, lr=1e-2, batch=2)
    decoder.stage(run)
    after = decoder.load_vae(tmp_path).state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"decoder", "post_quant_conv"}


@pytest.fixture(scope="module")
def exported(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder exported from untrained models."""
    work = tmp_path_factory.mktemp("work")
    (work / "world").mkdir()
    (work / "world" / "tokenizer").symlink_to(tokenizer_folder)
    torch.manual_seed(0)
    size = len(read_tokenizer(tokenizer_folder))
    parts = {
        "clip": {
            "text_encoder": CLIPTextModel(configs.text_config(models.text_config(size), "text_encoder")),
            "image_encoder": CLIPVisionModel(configs.vision_config(models.VISION, "image_encoder")),
        },
        "vae": {"vae": VAE(configs.vae_config(models.VAE, "vae"))},
        "unet": {"unet": UNet(configs.unet_config(models.UNET, "unet"))},
        "probe": {"probe": probe.Probe(probe.READS)},
    }
    for stage, modules in parts.items():
        (work / stage).mkdir()
        torch.save({"ema": {k: m.state_dict() for k, m in modules.items()}}, work / stage / "state.pt")
    (work / "latents").mkdir()
    noise = np.random.default_rng(0).standard_normal((50, 4, 16, 16))
    np.save(work / "latents" / "latents.npy", (1.25 * noise).astype(np.float16))
    run = training.Run("export", work, 0, float("inf"), torch.device("cpu"), seed=0, lr=0.0, batch=0)
    export.stage(run)
    return work / "export"


def same_pictures_as_diffusers(folder: Path) -> None:
    """Both sample the same prompt from the same noise; 8-bit pictures may differ by a rounding step."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    prompt = "a photo of a red cup on the beach"
    expected = theirs(prompt, latents=noise, height=64, width=64, num_inference_steps=8, guidance_scale=4.0)
    sd = minti.load(folder, device="cpu", dtype="float32")
    (ours,) = sd.sample(prompt, seed=7, steps=8, guidance_scale=4.0)
    difference = np.asarray(ours).astype(int) - np.asarray(expected.images[0])
    assert np.abs(difference).max() <= 1


def test_export_is_read_alike_by_diffusers(exported: Path) -> None:
    same_pictures_as_diffusers(exported)


def test_export_is_complete_and_small(exported: Path) -> None:
    config = json.loads((exported / "vae" / "config.json").read_text())
    assert config["scaling_factor"] == pytest.approx(0.8, rel=0.03)  # 1 / 1.25, from 51,200 samples
    assert len(list((exported / "concepts").glob("*/*.png"))) == 6 * len(concepts.held_out())
    assert Judge.load(exported).asked("a photo of a {} in the snow") == {
        "style": "photo",
        "background": "snow",
    }
    assert read_concepts(str(exported / "concepts" / "concepts.yaml")).keys() == concepts.held_out().keys()
    assert sum(p.stat().st_size for p in exported.rglob("*") if p.is_file()) <= 20e6


@pytest.mark.skipif(not (TINY / "model_index.json").is_file(), reason="weights/tiny is not there")
def test_shipped_weights_are_read_alike_by_diffusers() -> None:
    same_pictures_as_diffusers(TINY)


def test_batches_visit_every_picture_once_an_epoch(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "tokenizer").symlink_to(tokenizer_folder)
    np.save(tmp_path / "world" / "pictures.npy", np.zeros((12, 64, 64, 3), dtype=np.uint8))
    pictures = Pictures(tmp_path)
    first = np.concatenate([pictures.indices(step, 4) for step in range(3)])
    second = np.concatenate([pictures.indices(step, 4) for step in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()
