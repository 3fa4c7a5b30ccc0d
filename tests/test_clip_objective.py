"""`minti.train --objective clip`: equal to a plain loop over transformers' CLIPModel; refused elsewhere."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import minti
from minti import Concept, InputError
from minti.inversion.batches import Settings, Word, sample_batch
from minti.inversion.clip_objective import ClipInversion, ClipTarget
from minti.inversion.latents import Latents
from minti.inversion.start import word_rows
from minti.judge.scorer import Scorer
from minti.train import main

from . import oracles
from .oracles import save_folder
from .test_train_durable import assert_same_results

CLASS, STEPS = "red toy", 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, the CLIP that its text encoder is a part of, and photos."""
    base = tmp_path_factory.mktemp("clip objective")
    save_folder(base / "model", "small")
    tower = transformers.CLIPTextModel.from_pretrained(base / "model" / "text_encoder")
    text = tower.config.to_dict() | {"projection_dim": 24}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(projection_dim=24, text_config=text, vision_config=vision))
    clip.text_model.load_state_dict({k.removeprefix("text_model."): v for k, v in tower.state_dict().items()})
    clip.save_pretrained(base / "clip")
    oracles.write_tokenizer(base / "clip")
    oracles.save_clip(base / "other clip")
    (base / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "photos" / f"{i}.png")
    return base


def arguments(base: Path, out: Path, *more: str, clip: str = "clip") -> list[str]:
    argv = ["--objective", "clip", "--clip", base / clip, "--checkpoint", base / "model", "--device", "cpu"]
    argv += ["--images", base / "photos", "--placeholder", "<toy>", "--init-word", CLASS, "--out", out]
    argv += ["--steps", STEPS, "--batch-size", 2, "--lr", 0.01, "--weight-decay", 0, "--save-every", 2]
    argv += ["--eval-every", 3, "--eval-size", 4, "--sample-every", 0]
    return [*map(str, argv), *more]


def unit(x: Tensor) -> Tensor:
    x = getattr(x, "pooler_output", x)
    return x / x.norm(dim=-1, keepdim=True)


def plain_loop(base: Path, prompts: Callable[[int], list[str]], steps: int) -> tuple[list[Tensor], Tensor]:
    """PALAVRA's second stage as its formula is written: the loss before each step, and the row at the end."""
    clip = CLIPModel.from_pretrained(base / "clip").requires_grad_(False)
    tokenizer = minti.load(base / "model", device="cpu").tokenizer
    table = clip.text_model.embeddings.token_embedding
    start = tokenizer.encode(CLASS)
    row = table.weight[start].mean(0).clone().requires_grad_(True)
    word_id = len(table.weight)
    tokenizer.add_placeholder("<toy>", [word_id])
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    process = processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    photos = [Image.open(path) for path in sorted((base / "photos").iterdir())]
    pixels = process(photos, return_tensors="pt")["pixel_values"]
    image = unit(unit(clip.get_image_features(pixel_values=pixels)).mean(0))

    def texts(prompts: list[str]) -> Tensor:
        ids = tokenizer(prompts)
        learned = (ids == word_id)[..., None]
        hook = table.register_forward_hook(lambda module, args, output: torch.where(learned, row, output))
        embeddings = unit(clip.get_text_features(input_ids=ids.masked_fill(ids == word_id, 0)))
        hook.remove()
        return embeddings

    optimizer, losses = torch.optim.Adam([row], lr=0.01), []
    for step in range(steps):
        of_word, each = prompts(step), []
        of_class = texts([prompt.replace("<toy>", CLASS) for prompt in of_word])
        for word, name in zip(texts(of_word), of_class, strict=True):
            first, second = torch.stack([image, name]), torch.stack([word, name])
            both = torch.cat([first, second])
            products = torch.exp(both @ both.T / 0.25)
            numerator = torch.exp((first * second).sum(1) / 0.25).repeat(2)
            each.append(-torch.log(numerator / (products.sum(0) - products.diag())).mean())
        losses.append(torch.stack(each).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return [loss.detach() for loss in losses], row.detach()


def latents(photos: int = 3) -> Latents:
    shape = (photos, 4, 8, 8)
    weight, sizes = torch.ones(photos, 1, 8, 8), torch.zeros(photos, 6)
    return Latents(torch.zeros(shape), torch.zeros(shape), weight, torch.arange(photos), sizes)


def test_loss_and_row_are_those_of_the_reference(base: Path) -> None:
    """To rounding of float32; Adam divides by the size of the gradient, so rows tell of errors in it."""
    sd, settings = minti.load(base / "model", device="cpu"), Settings(batch_size=3, weight_decay=0)
    word = Word("<toy>", word_rows(sd, CLASS, 1), latents(), lr=0.01)
    T = sd.schedule.config.num_train_timesteps
    losses, row = plain_loop(base, lambda step: sample_batch(word, settings, T, 3, step).prompts, 4)
    scorer = Scorer.load(base / "clip")
    image = scorer.mean_embedding(Image.open(path) for path in sorted((base / "photos").iterdir()))
    how = {"text_encoder": scorer.text_encoder, "targets": [ClipTarget(image, CLASS)]}
    inversion = ClipInversion(sd, [word], settings, **how)
    start = inversion.rows[0].clone()
    for loss in losses:
        torch.testing.assert_close(inversion.step()[0], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inversion.rows[0][0], row, rtol=0, atol=1e-5)
    assert (inversion.rows[0] - start).abs().max() > 0.02


def test_words_learn_as_if_alone(base: Path) -> None:
    """Each has its own photos and class; to rounding of the larger batch."""
    images = torch.nn.functional.normalize(torch.randn(2, 24, generator=torch.manual_seed(0)), dim=1)
    targets = [ClipTarget(images[0], CLASS), ClipTarget(images[1], "cat")]

    def learn(indices: list[int]) -> list[Tensor]:
        sd = minti.load(base / "model", device="cpu")
        words = [Word(f"<toy{i}>", word_rows(sd, targets[i].class_word, 1), latents(), lr=0.01, seed=i)
                 for i in indices]  # fmt: skip
        how = {
            "text_encoder": Scorer.load(base / "clip").text_encoder,
            "targets": [targets[i] for i in indices],
        }
        inversion = ClipInversion(sd, words, Settings(batch_size=2), **how)
        for _ in range(3):
            inversion.step()
        return [rows.detach() for rows in inversion.rows]

    both, (first,), (second,) = learn([0, 1]), learn([0]), learn([1])
    torch.testing.assert_close(both, [first, second], rtol=0, atol=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    main(arguments(base, tmp_path / "whole"))
    main(arguments(base, tmp_path / "parts", "--steps", "3"))
    main(arguments(base, tmp_path / "parts", "--resume"))
    assert_same_results(tmp_path / "parts", tmp_path / "whole")
    learned = Concept.load(tmp_path / "whole" / "learned_embeds.safetensors")
    assert learned.placeholder == "<toy>"
    # Another image encoder embeds the photos differently.
    shutil.copytree(base / "clip", tmp_path / "clip")
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    clip.visual_projection.weight.data.mul_(-1)
    clip.save_pretrained(tmp_path / "clip")
    config = tmp_path / "parts" / "config.yaml"
    config.write_text(config.read_text().replace(str(base / "clip"), str(tmp_path / "clip")))
    with pytest.raises(InputError, match="another CLIP"):
        main(["--out", str(tmp_path / "parts"), "--resume", "--steps", "9"])


def test_a_model_that_reads_with_the_text_encoder_of_another_clip_is_refused(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is not that of the CLIP") as refused:
        main(arguments(base, tmp_path / "out", clip="other clip"))
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    tuned = load_file(base / "model" / "text_encoder" / "model.safetensors")
    next(w for key, w in tuned.items() if key.endswith("encoder.layers.0.mlp.fc1.weight"))[0, 0] += 0.01
    save_file(tuned, tmp_path / "tuned.safetensors")
    more = ["--text-encoder", str(tmp_path / "tuned.safetensors")]
    with pytest.raises(InputError, match="is not that of the CLIP"):
        main(arguments(base, tmp_path / "out", *more))
    oracles.save_sdxl(tmp_path / "sdxl")
    with pytest.raises(InputError, match="is not that of the CLIP"):
        main(arguments(base, tmp_path / "out", "--checkpoint", str(tmp_path / "sdxl")))


def test_half_precision(base: Path, tmp_path: Path) -> None:
    """A model in bfloat16 has the text encoder of the CLIP all the same, and learns."""
    main(arguments(base, tmp_path / "out", "--dtype", "bfloat16"))
    assert Concept.load(tmp_path / "out" / "learned_embeds.safetensors").vectors.isfinite().all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--per-image", "0.5"], "per_image"),
        (["--init", "random", "--init-word", ""], "needs an init word"),
        (["--clip", "nowhere"], "does not exist"),
    ],
)
def test_what_does_not_go_together_is_refused(
    base: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        main(arguments(base, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_without_its_own_image_encoder_a_clip_must_be_given(base: Path, tmp_path: Path) -> None:
    argv = arguments(base, tmp_path / "out")
    where = argv.index("--clip")
    del argv[where : where + 2]
    with pytest.raises(InputError, match="--clip must be given"):
        main(argv)
