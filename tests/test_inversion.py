"""The method: that it is Textual Inversion, and that every option does what it says."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import minti
from minti import Concept, InputError, StableDiffusion
from minti.formats.photos import load_photos
from minti.formats.views import make_views
from minti.inversion import shares
from minti.inversion.batches import Batch, Settings, Word, sample_batch
from minti.inversion.divergence import Diverged
from minti.inversion.inversion import Inversion
from minti.inversion.latents import Latents, encode_views
from minti.inversion.learn import diffusion_loss, learn_word
from minti.inversion.optimizers import DirectionDescent
from minti.inversion.prompt_variants import photo_word
from minti.inversion.start import initial_rows
from minti.inversion.templates import CONTEXT, OBJECT
from minti.model.fitting import SPECIAL

from .oracles import pipeline, save_folder

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small model that predicts the given thing."""
    base, made = tmp_path_factory.mktemp("inversion"), {}

    def folder(prediction_type: str) -> Path:
        if prediction_type not in made:
            made[prediction_type] = save_folder(base / prediction_type, "small", prediction_type)
        return made[prediction_type]

    return folder


@pytest.fixture
def load(folders: Callable[[str], Path]) -> Callable[..., StableDiffusion]:
    def load(prediction_type: str = "epsilon", **options) -> StableDiffusion:
        return minti.load(folders(prediction_type), device="cpu", **options)

    return load


def latents(photos: int = 3, seed: int = 0, side: int = 8) -> Latents:
    """As if of this many photos, each with its mirror image."""
    g = torch.Generator().manual_seed(seed)
    shape = (2 * photos, 4, side, side)
    mean, std = torch.randn(shape, generator=g), 0.1 * torch.rand(shape, generator=g)
    weight, photo = torch.ones(2 * photos, 1, side, side), torch.arange(2 * photos) // 2
    return Latents(mean, std, weight, photo, sizes=torch.zeros(2 * photos, 6))


def a_word(sd: StableDiffusion, n: int = 1, placeholder: str = "<toy>", **changes) -> Word:
    return replace(Word(placeholder, initial_rows(sd, "word", "red toy", n), latents()), **changes)


def run(sd: StableDiffusion, words: list[Word], settings: Settings, steps: int) -> Inversion:
    inversion = Inversion(sd, words, settings)
    for _ in range(steps):
        inversion.step()
    return inversion


def weights(sd: StableDiffusion) -> dict[str, Tensor]:
    """Everything of the model but the learned rows, which are new."""
    state = {}
    for name in ("text_encoder", "unet", "vae"):
        state |= {f"{name}.{key}": value for key, value in getattr(sd, name).state_dict().items()}
    return {key: value.clone() for key, value in state.items() if ".words." not in key}


# Against the textbook
# ----------------------------------------------------------------------------------------------------------


class Textbook:
    """Textual Inversion as the reference libraries' users write it.

    The new tokens are further rows of a dense table; the gradient of the whole table is set to zero outside
    of them, AdamW updates the whole table, and what weight decay did to the vocabulary is undone.
    """

    def __init__(self, pipe: StableDiffusionPipeline, word: Word, settings: Settings) -> None:
        self.word, self.n, self.unet = word, len(word.init), pipe.unet
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.text_encoder = copy.deepcopy(pipe.text_encoder).requires_grad_(False)
        self.tokenizer = copy.deepcopy(pipe.tokenizer)
        self.tokens = [f"[token{i}]" for i in range(self.n)]
        assert self.tokenizer.add_tokens(self.tokens) == self.n
        old = self.text_encoder.get_input_embeddings().weight
        self.table = nn.Embedding(len(self.tokenizer), old.shape[1])
        with torch.no_grad():
            self.table.weight.copy_(torch.cat([old, word.init]))
        self.before = self.table.weight.detach().clone()
        self.text_encoder.set_input_embeddings(self.table)
        self.optimizer = torch.optim.AdamW(
            self.table.parameters(), lr=word.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    @property
    def rows(self) -> Tensor:
        return self.table.weight.detach()[-self.n :]

    @property
    def gradient(self) -> Tensor:
        return self.table.weight.grad[-self.n :]

    def losses(self, samples: Batch) -> Tensor:
        """Of each sample."""
        x0 = self.word.latents.mean[samples.view] + (
            self.word.latents.std[samples.view] * samples.posterior_noise
        )
        prompts = [p.replace(self.word.placeholder, " ".join(self.tokens)) for p in samples.prompts]
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        context = self.text_encoder(ids)[0]
        noisy = self.scheduler.add_noise(x0, samples.eps, samples.t)
        targets = {
            "epsilon": lambda: samples.eps,
            "v_prediction": lambda: self.scheduler.get_velocity(x0, samples.eps, samples.t),
            "sample": lambda: x0,
        }
        target = targets[self.scheduler.config.prediction_type]()
        prediction = self.unet(noisy, samples.t, context).sample
        return F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))

    def step(self, samples: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self.losses(samples).mean()
        loss.backward()
        self.table.weight.grad[: -self.n] = 0
        self.optimizer.step()
        with torch.no_grad():
            self.table.weight[: -self.n] = self.before[: -self.n]
        return loss.item()


def samples_of(sd: StableDiffusion, word: Word, settings: Settings, step: int) -> Batch:
    return sample_batch(word, settings, sd.schedule.config.num_train_timesteps, settings.batch_size, step)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_it_is_the_textbook_method(prediction_type: str, n: int, load: Callable, tmp_path: Path) -> None:
    """Step by step the same rows, and the rest of the model bit by bit as it was.

    The gradients agree to 1e-5, from sums in another order. AdamW divides each number by its own size, so an
    update of 5e-3 is off by some 1e-7, unless a gradient happens to be near zero.
    """
    sd = load(prediction_type)
    before = weights(sd)
    settings = Settings(betas=(0.8, 0.95), weight_decay=0.1)
    word = a_word(sd, n, lr=5e-3, seed=4)
    textbook = Textbook(pipeline(tmp_path, "small", prediction_type), word, settings)
    inversion = Inversion(sd, [word], settings)
    for step in range(6):
        expected = textbook.step(samples_of(sd, word, settings, step))
        torch.testing.assert_close(inversion.step(), torch.tensor([expected]), rtol=1e-5, atol=0)
        torch.testing.assert_close(inversion.rows[0].detach(), textbook.rows, rtol=0, atol=1e-6)
    moved = (inversion.rows[0].detach() - word.init).abs()
    assert moved.max() > 0.01  # a hundred thousand times the tolerance
    after = weights(sd)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert inversion.step_count == 6


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_gradient_is_that_of_the_reference_libraries(
    prediction_type: str, load: Callable, tmp_path: Path
) -> None:
    sd = load(prediction_type)
    settings = Settings(batch_size=3)
    word = a_word(sd, 2)
    textbook = Textbook(pipeline(tmp_path, "small", prediction_type), word, settings)
    textbook.step(samples_of(sd, word, settings, 0))
    inversion = run(sd, [word], settings, 1)
    gradient = textbook.gradient
    scale = gradient.abs().max().item()
    assert scale > 1e-5
    torch.testing.assert_close(inversion.rows[0].grad, gradient, rtol=1e-4, atol=1e-5 * scale)


def test_only_the_rows_can_learn(load: Callable) -> None:
    sd = load()
    sd.add_concept(Concept("<old>", torch.ones(1, 32)))
    inversion = run(sd, [a_word(sd)], Settings(), 1)
    modules = (sd.text_encoder, sd.unet, sd.vae)
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    assert [id(p) for p in learning] == [id(inversion.rows[0])]
    assert all(p.grad is None for module in modules for p in module.parameters() if not p.requires_grad)


def test_an_inpainting_model(tmp_path: Path) -> None:
    """Learning for a UNet that also sees a mask and a picture: everything masked, nothing to be seen."""
    sd = minti.load(save_folder(tmp_path / "m", "inpainting"), device="cpu")
    word = Word("<toy>", torch.ones(1, 64), latents(side=4))
    inversion = Inversion(sd, [word], Settings(batch_size=2))
    inputs = []
    sd.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    inversion.step()
    grey = sd.vae.encode(torch.zeros(1, 3, 32, 32)).mean * 0.18215
    assert inputs[0].shape == (2, 9, 4, 4)
    assert torch.equal(inputs[0][:, 4:5], torch.ones(2, 1, 4, 4))
    torch.testing.assert_close(inputs[0][:, 5:], grey.expand(2, -1, -1, -1))
    assert inversion.rows[0].grad.abs().max() > 0


# Where rows start
# ----------------------------------------------------------------------------------------------------------

PHRASE = "photo of the red toy on grass"  # of seven words, each one token


def share_out(vectors: Tensor, n: int) -> Tensor:
    """k vectors to n: vector i takes the tokens from i k/n up to (i + 1) k/n, rounded down, at least one."""
    k = len(vectors)
    parts = [(i * k // n, max((i + 1) * k // n, i * k // n + 1)) for i in range(n)]
    return torch.stack([vectors[a:b].mean(0) for a, b in parts])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 14, 75])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_a_phrase_of_k_tokens_for_n_vectors(k: int, n: int, load: Callable) -> None:
    sd = load()
    phrase = " ".join(PHRASE.split()[:k])
    ids = sd.tokenizer.encode(phrase)
    assert len(ids) == k
    table = sd.text_encoder.token_embedding.weight
    rows = initial_rows(sd, "word", phrase, n)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, share_out(table[ids], n), rtol=0, atol=1e-7)


def test_one_token_is_repeated_and_two_are_averaged(load: Callable) -> None:
    sd = load()
    red, toy = sd.text_encoder.token_embedding.weight[sd.tokenizer.encode("red toy")]
    assert torch.equal(initial_rows(sd, "word", "toy"), toy[None])
    assert torch.equal(initial_rows(sd, "word", "Toy", 3), toy.expand(3, -1))
    assert torch.equal(initial_rows(sd, "word", "red toy", 2), torch.stack([red, toy]))
    assert torch.equal(initial_rows(sd, "word", "red toy", 4), torch.stack([red, red, toy, toy]))
    torch.testing.assert_close(initial_rows(sd, "word", "red toy"), (red + toy)[None] / 2)


def test_every_token_of_a_phrase_has_its_part(load: Callable) -> None:
    """Whatever rounding does to the shares: as many tokens as vectors, one each."""
    sd = load()
    for k in range(1, 76):
        ids = sd.tokenizer.encode("toy " * k)
        assert len(ids) == k
    words = PHRASE.split()
    table = sd.text_encoder.token_embedding.weight
    for k in range(2, 60):
        phrase = " ".join(words[i % 7] for i in range(k))
        vectors = table[sd.tokenizer.encode(phrase)]
        assert torch.equal(initial_rows(sd, "word", phrase, k), vectors), k


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_output_of_the_text_encoder(n: int, load: Callable, tmp_path: Path) -> None:
    """Cross Initialization: what the reference's text encoder makes of each token, up to rounding."""
    sd, pipe = load(), pipeline(tmp_path, "small")
    ids = pipe.tokenizer(["red toy"], padding="max_length", return_tensors="pt").input_ids
    output = pipe.text_encoder(ids)[0][0, 1:3]
    rows = initial_rows(sd, "output", "red toy", n)
    torch.testing.assert_close(rows, share_out(output, n), rtol=1e-5, atol=1e-5)
    assert (rows - initial_rows(sd, "word", "red toy", n)).abs().max() > 0.1


def test_random_rows_look_like_the_vocabulary(load: Callable) -> None:
    sd = load()
    table = sd.text_encoder.token_embedding.weight
    with torch.no_grad():
        table += torch.linspace(-1, 1, 32)
        table *= torch.linspace(0.5, 3, 32)
    rows = initial_rows(sd, "random", "", 4000, seed=3)
    error = table.std(0) / 4000**0.5  # standard deviation of the mean; that of the deviation is smaller
    assert ((rows.mean(0) - table.mean(0)).abs() < 5 * error).all()
    assert ((rows.std(0) - table.std(0)).abs() < 5 * error).all()
    assert torch.equal(rows, initial_rows(sd, "random", "", 4000, seed=3))
    assert not torch.equal(rows, initial_rows(sd, "random", "", 4000, seed=4))


def test_random_rows_do_not_depend_on_words_learned_before(load: Callable) -> None:
    alone, taught = load(), load()
    taught.add_concept(Concept("<old>", torch.full((3, 32), 100.0)))
    settings = Settings(max_norm=1.0)
    assert torch.equal(*(initial_rows(sd, "random", "", 2) for sd in (alone, taught)))
    norms = [Inversion(sd, [a_word(sd)], settings).vocabulary_norm for sd in (alone, taught)]
    assert norms[0] == norms[1]


def test_rows_of_a_file(load: Callable, tmp_path: Path) -> None:
    sd = load()
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    Concept("<old>", vectors).save(tmp_path / "old.safetensors")
    assert torch.equal(initial_rows(sd, "file", str(tmp_path / "old.safetensors")), vectors)
    assert torch.equal(initial_rows(sd, "file", tmp_path / "old.safetensors", 3), vectors)
    with pytest.raises(InputError, match=r"old\.safetensors: has 3 vectors, num_vectors is 2"):
        initial_rows(sd, "file", tmp_path / "old.safetensors", 2)
    save_file({"clip_l": vectors, "clip_g": torch.ones(3, 40)}, tmp_path / "xl.safetensors")
    assert torch.equal(initial_rows(sd, "file", tmp_path / "xl.safetensors"), vectors)
    Concept("<wide>", torch.ones(1, 768)).save(tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"768.*SD 1\.x.*32-wide"):
        Inversion(sd, [a_word(sd, init=initial_rows(sd, "file", tmp_path / "wide.safetensors"))], Settings())


@pytest.mark.parametrize(
    ("kind", "word", "message"),
    [
        ("word", "", "init word '' is empty; give a coarse description"),
        ("output", "  ", "is empty"),
        ("words", "toy", "init 'words': choose from word, output, random, file"),
        ("file", "no/such/file.safetensors", "no/such/file.safetensors"),
        ("output", "toy " * 80, "toy"),
    ],
)
def test_starts_that_cannot_be(kind: str, word: str, message: str, load: Callable) -> None:
    with pytest.raises(InputError) as error:
        initial_rows(load(), kind, word)
    assert message in str(error.value)


# Options
# ----------------------------------------------------------------------------------------------------------


def in_play(sd: StableDiffusion, vocab_size: int, text: str = "a <toy>") -> int:
    """Learned vectors in a prompt."""
    return int((sd.tokenizer(text) >= vocab_size).sum())


def test_progressive_extension(load: Callable) -> None:
    """One vector, from step 2 two, from step 4 three; each starts where it should, whenever it joins in."""
    sd = load()
    vocab_size = len(sd.text_encoder.token_embedding.weight)
    word = a_word(sd, 3, init=initial_rows(sd, "word", "red toy cat", 3))
    inversion = Inversion(sd, [word], Settings(progressive=(2, 4), weight_decay=0.5, regularization=0.1))
    rows = inversion.rows[0]
    for step in range(6):
        joined = 1 + (step >= 2) + (step >= 4)
        assert in_play(sd, vocab_size) == joined
        assert sd.tokenizer("a <toy> on grass")[0, 2 : 2 + joined].tolist() == [
            vocab_size + i for i in range(joined)
        ]
        inversion.step()
        learning = rows.grad.abs().amax(1) > 0
        assert learning.tolist() == [i < joined for i in range(3)]
        assert torch.equal(rows.detach()[joined:], word.init[joined:]), step
        assert (rows.detach()[:joined] - word.init[:joined]).abs().amin(0).max() > 1e-3
        now = in_play(sd, vocab_size)
        assert torch.equal(inversion.concept(0).vectors, rows.detach()[:now])
    assert now == 3


def test_the_first_of_progressive_steps_are_those_of_a_single_vector(load: Callable) -> None:
    init = initial_rows(load(), "word", "red toy cat", 3)
    sd = load()
    alone = run(sd, [a_word(sd, init=init[:1])], Settings(), 3)
    sd = load()
    progressive = run(sd, [a_word(sd, init=init)], Settings(progressive=(3, 5)), 3)
    torch.testing.assert_close(progressive.rows[0][:1], alone.rows[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("n", "progressive"), [(1, (5,)), (4, (5,))])
def test_vectors_and_steps_that_do_not_fit_together(n: int, progressive: tuple, load: Callable) -> None:
    """A vector that would never be used, or a step at which there is none left, is a mistake."""
    sd = load()
    with pytest.raises(InputError, match="progressive"):
        Inversion(sd, [a_word(sd, n)], Settings(progressive=progressive))


def test_words_for_single_photos(load: Callable) -> None:
    """Each has a row that starts at random and learns only from its photo."""
    sd = load()
    table = sd.text_encoder.token_embedding.weight
    word = a_word(sd)
    inversion = Inversion(sd, [word], Settings(per_image=1.0, batch_size=2))
    rows = inversion.photo_rows[0]
    assert [p.shape for p in rows] == [(1, 32)] * 3
    assert {photo_word(word.placeholder, i) for i in range(3)} <= set(sd.tokenizer.placeholders)
    starts = torch.cat(rows).detach().clone()
    torch.testing.assert_close(starts.std(), table.std(), rtol=0.5, atol=0)
    samples = samples_of(sd, word, inversion.settings, 0)
    shown = set((samples.view // 2).tolist())
    inversion.step()
    assert [p.grad.abs().max().item() > 0 for p in rows] == [i in shown for i in range(3)]
    assert inversion.rows[0].grad.abs().max() > 0
    for _ in range(5):
        inversion.step()
    assert ((torch.cat(rows).detach() - starts).abs().amax(1) > 1e-3).all()
    assert inversion.concept(0).vectors.shape == (1, 32)  # they are scaffolding, not part of the word


@pytest.mark.parametrize("accumulate", [1, 2])
def test_regularization(accumulate: int, load: Callable) -> None:
    """Its gradient is that of weight * mean over the vectors of ||v - v_init||^2."""
    gradients = []
    offset = torch.linspace(-1, 1, 64).view(2, 32)
    for weight in (0.0, 0.3):
        sd = load()
        word = a_word(sd, 2)
        inversion = Inversion(sd, [word], Settings(regularization=weight, accumulate=accumulate))
        with torch.no_grad():
            inversion.rows[0] += offset
        inversion.step()
        gradients.append(inversion.rows[0].grad)
    torch.testing.assert_close(gradients[1] - gradients[0], 2 * 0.3 * offset / 2, rtol=1e-5, atol=1e-6)


def test_the_loss_that_is_shown_is_that_of_the_pictures(load: Callable) -> None:
    losses = []
    for weights in ({}, {"regularization": 1e3}, {"context_weight": 1e3}):
        sd = load()
        losses.append([run(sd, [a_word(sd)], Settings(**weights), 0).step() for _ in range(1)])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("step", [0, 2])
def test_context_term(step: int, load: Callable) -> None:
    """The gradient of what a step adds is that of the mean distance between what the text encoder makes, of
    all 77 tokens, of every other word in this step's prompts, with the vectors now and with those before."""
    gradients, offset = [], torch.linspace(-1, 1, 64).view(2, 32)
    for weight in (0.0, 0.3):
        sd = load()
        inversion = Inversion(sd, [a_word(sd, 2)], Settings(context_weight=weight))
        with torch.no_grad():
            inversion.rows[0] += offset
        inversion.step_count = step
        inversion.step()
        gradients.append(inversion.rows[0].grad)

    sd = load()
    word = a_word(sd, 2)
    rows = sd.add_concept(Concept(word.placeholder, word.init))
    prompts = [CONTEXT[(8 * step + i) % 24].format(word.placeholder) for i in range(8)]
    before = sd.encode_prompt(prompts)
    rows += offset
    rows.requires_grad_(True)
    now = sd.text_encoder(sd.tokenizer(prompts)).context
    distances = []
    for i, prompt in enumerate(prompts):
        texts = sd.tokenizer.encode(prompt)
        own = set(sd.tokenizer.placeholders[word.placeholder])
        assert len(own) == 2 <= sum(token in own for token in texts)
        for place, token in enumerate(texts, start=1):  # behind the token that begins every prompt
            if token not in own:
                distances.append(1 - torch.cosine_similarity(now[i, place], before[i, place], dim=0))
    (expected,) = torch.autograd.grad(0.3 * torch.stack(distances).mean(), rows)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-4, atol=1e-6)


def test_the_context_term_needs_room_and_a_word_that_stays(load: Callable) -> None:
    with pytest.raises(InputError, match="context_weight: not with progressive"):
        Settings(context_weight=0.1, progressive=(5,))
    sd = load()
    word = a_word(sd, 72, templates=("{}",))
    Inversion(sd, [word], Settings())
    sd = load()
    with pytest.raises(InputError, match="does not fit into the 75 tokens"):
        Inversion(sd, [word], Settings(context_weight=0.1))
    assert not sd.tokenizer.placeholders


def test_a_cap_on_the_length(load: Callable) -> None:
    sd = load()
    mean_length = sd.text_encoder.token_embedding.weight.norm(dim=1).mean().item()
    word = a_word(sd, 2, init=torch.stack([torch.full((32,), 0.01), torch.ones(32)]), lr=1e-4)
    inversion = Inversion(sd, [word], Settings(max_norm=0.9))
    assert inversion.vocabulary_norm == pytest.approx(mean_length)
    for _ in range(3):
        inversion.step()
        lengths = inversion.rows[0].detach().norm(dim=1)
        assert lengths.max() < 0.9 * mean_length * (1 + 1e-6)
        assert lengths[1] > 0.85 * mean_length
        assert 0 < lengths[0] < 0.7 * mean_length
    direction = F.cosine_similarity(inversion.rows[0].detach()[1], torch.ones(32), dim=0)
    assert direction > 0.95  # shortened, not turned


def test_the_learning_rate_of_each_step(load: Callable) -> None:
    sd = load()
    settings = Settings(steps=6, warmup=2, lr_schedule="cosine")
    inversion = Inversion(sd, [a_word(sd, lr=0.1), a_word(sd, placeholder="<b>", lr=0.02)], settings)
    for step in range(6):
        inversion.step()
        rates = [group["lr"] for group in inversion.optimizer.param_groups]
        assert rates == [0.1 * settings.lr_factor(step), 0.02 * settings.lr_factor(step)]


def test_a_first_step_moves_every_number_by_the_learning_rate(load: Callable) -> None:
    """AdamW's first update is lr * sign(gradient), whatever the loss was scaled with or divided by."""
    sd = load()
    word = a_word(sd, lr=0.01)
    inversion = run(sd, [word], Settings(weight_decay=0.0, warmup=2), 1)
    moved = word.init - inversion.rows[0].detach()
    expected = 0.005 * inversion.rows[0].grad.sign()
    assert ((moved - expected).abs() < 1e-4).float().mean() > 0.9  # all but numbers of hardly any gradient


@pytest.mark.parametrize("options", [{}, {"per_image": 0.5, "regularization": 0.1}])
def test_accumulation(options: dict, load: Callable) -> None:
    """Two batches of two are one batch of four; 1e-6 for sums in another order."""
    results = []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        sd = load()
        settings = Settings(batch_size=batch_size, accumulate=accumulate, **options)
        inversion = Inversion(sd, [a_word(sd, 2), a_word(sd, 1, "<b>", seed=1)], settings)
        losses = [inversion.step() for _ in range(3)]
        results.append((torch.stack(losses), *(rows.detach() for rows in inversion.rows)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing(load: Callable) -> None:
    """The same gradient, computed from fewer remembered tensors."""
    gradients, saved = [], []
    for checkpointing in (False, True):
        sd = load()
        sd.unet.gradient_checkpointing = checkpointing
        inversion = Inversion(sd, [a_word(sd)], Settings())
        size = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            inversion.step()
        gradients.append(inversion.rows[0].grad)
        saved.append(size)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert gradients[0].abs().max() > 1e-5


@pytest.mark.parametrize(
    "what", ["step", *(pytest.param(w, marks=pytest.mark.slow) for w in ("checkpointing", "evaluation"))]
)
def test_the_loss_compiles_into_one_graph(what: str, load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and rows. Without a code generator, which would take minutes."""
    graph = partial(torch.compile, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(shares, "compile_for", lambda device, function: graph(function))
    results = []
    for compiled in (False, True):
        sd = load()
        sd.unet.gradient_checkpointing = what == "checkpointing"
        inversion = Inversion(sd, [a_word(sd, 2)], Settings(), compiled=compiled)
        run = inversion.evaluate if what == "evaluation" else inversion.step
        results.append((run(), run(), inversion.rows[0].detach()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_steps_that_are_checked_later(load: Callable) -> None:
    """Whether or not each is looked at, the steps are the same, and so is what is left after a failure."""
    results = []
    for check in (True, False):
        sd = load()
        inversion = Inversion(sd, [a_word(sd)], Settings())
        losses = [inversion.step(check=check) for _ in range(3)]
        inversion.rows[0].register_hook(lambda grad: grad * float("nan"))
        with pytest.raises(Diverged, match=r"^step 4: .* the learning rate is too high"):
            for _ in range(1 if check else 3):
                inversion.step(check=check)
            inversion.check()
        assert inversion.step_count == 3
        results.append((torch.stack(losses), inversion.rows[0].detach().clone()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_masked_part_of_a_photo_does_not_count(load: Callable) -> None:
    """With a UNet that treats each latent alone, what lies under the mask changes neither loss nor gradient.
    The loss is the mean over what counts, weighted."""
    g = torch.Generator().manual_seed(1)
    weight = torch.zeros(6, 1, 8, 8)
    weight[:, :, :5] = torch.rand(6, 1, 5, 8, generator=g)
    results = []
    for change in (0.0, 50.0):
        sd = load()
        sd.unet.forward = lambda x, t, context, added: x * context.mean(dim=(1, 2))[:, None, None, None]
        masked = replace(latents(), weight=weight)
        masked.mean[:, :, 5:] += change
        word = a_word(sd, latents=masked)
        inversion = Inversion(sd, [word], Settings())
        samples = samples_of(sd, word, inversion.settings, 0)
        context = sd.encode_prompt(samples.prompts).mean(dim=(1, 2))[:, None, None, None]
        x0 = masked.mean[samples.view] + masked.std[samples.view] * samples.posterior_noise
        error = (sd.schedule.q_sample(x0, samples.eps, samples.t) * context - samples.eps) ** 2
        w = weight[samples.view].expand_as(error)
        expected = ((error * w).sum(dim=(1, 2, 3)) / w.sum(dim=(1, 2, 3))).mean()
        loss = inversion.step()
        torch.testing.assert_close(loss, expected[None], rtol=1e-5, atol=0)
        results.append((loss, inversion.rows[0].grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)


def test_a_photo_that_is_masked_altogether(load: Callable) -> None:
    sd = load()
    word = a_word(sd, latents=replace(latents(), weight=torch.zeros(6, 1, 8, 8)))
    inversion = Inversion(sd, [word], Settings())
    assert inversion.step().item() == 0
    assert inversion.rows[0].isfinite().all()


# Directions, times, averages
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.0, 0.02])
def test_direction_only(kappa: float, load: Callable, tmp_path: Path) -> None:
    """As Riemannian gradient descent on unit vectors, by autograd through the textbook's own loss.

    The gradient of L - kappa mu v at v / |v| has no part along v, which is the projection. One update turns
    a row by about 0.05; the gradients agree to 1e-5.
    """
    sd = load()
    settings = Settings(steps=4, optimizer="direction", kappa=kappa, lr_schedule="cosine")
    word = a_word(sd, 2, lr=0.05)
    textbook = Textbook(pipeline(tmp_path, "small", "epsilon"), word, settings)
    length = textbook.before[:-2].norm(dim=1).mean()
    inversion = Inversion(sd, [word], settings)
    mu = F.normalize(word.init, dim=1)
    v = mu.clone().requires_grad_(True)
    plain = torch.optim.SGD([v], lr=1.0)
    for step in range(4):
        torch.testing.assert_close(inversion.rows[0].detach(), length * v.detach(), rtol=0, atol=2e-6)
        with torch.no_grad():
            textbook.table.weight[-2:] = length * v
        textbook.optimizer.zero_grad()
        textbook.losses(samples_of(sd, word, settings, step)).mean().backward()
        surrogate = (textbook.gradient * length * (v / v.norm(dim=1, keepdim=True))).sum()
        surrogate = surrogate - kappa * (mu * (v / v.norm(dim=1, keepdim=True))).sum()
        plain.zero_grad()
        surrogate.backward()
        v.grad *= 0.05 * settings.lr_factor(step) / v.grad.norm(dim=1, keepdim=True)
        plain.step()
        v.data = F.normalize(v.data, dim=1)
        inversion.step()
    torch.testing.assert_close(inversion.rows[0].detach(), length * v.detach(), rtol=0, atol=2e-6)
    assert (F.cosine_similarity(v.detach(), mu) < 0.998).all()
    assert not inversion.state_dict().keys() - {"step", "0.0.rows", *scaler_keys(inversion)}


def scaler_keys(inversion: Inversion) -> set[str]:
    return {f"scaler.{key}" for key in inversion.scaler.state_dict()}


def test_kappa_keeps_words_near_their_start(load: Callable) -> None:
    cosines = []
    for kappa in (0.0, 1e-2, 1e6):
        sd = load()
        settings = Settings(optimizer="direction", kappa=kappa)
        inversion = run(sd, [word := a_word(sd, lr=0.05)], settings, 6)
        cosines.append(F.cosine_similarity(inversion.rows[0].detach(), word.init).item())
    assert cosines[0] + 0.005 < cosines[1] < cosines[2] - 0.005
    assert cosines[2] > 1 - 2 * 0.05**2


def test_directions_for_two_text_encoders() -> None:
    """Each part of a row keeps a length of its own; a row without a gradient stays."""
    g = torch.Generator().manual_seed(0)
    rows = nn.Parameter(torch.randn(3, 8, generator=g))
    optimizer = DirectionDescent([{"params": [rows], "lr": 0.1}], [(3, 2.0), (5, 0.5)], kappa=1e-3)
    start = rows.detach().clone()
    rows.grad = torch.randn(3, 8, generator=g)
    rows.grad[1] = 0
    optimizer.step()
    for part, length in ((rows[:, :3], 2.0), (rows[:, 3:], 0.5)):
        torch.testing.assert_close(part.detach().norm(dim=1), torch.full((3,), length))
    moved = (rows.detach() - start).abs().amax(1)
    assert moved[1] < 1e-6 < 0.01 < min(moved[0], moved[2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_directions_in_half_precision(dtype: str, load: Callable) -> None:
    """About the rows of float32: after three turns of 0.05 the two have turned the same way."""
    rows = []
    for kind in (dtype, "float32"):
        sd = load(dtype=kind)
        inversion = run(sd, [word := a_word(sd, lr=0.05)], Settings(optimizer="direction"), 3)
        rows.append(inversion.rows[0].detach())
        assert rows[-1].dtype == torch.float32
        mean_length = sd.tables[0].weight.float().norm(dim=1).mean().item()
        assert rows[-1].norm().item() == pytest.approx(mean_length, rel=1e-5)
    start = F.normalize(word.init, dim=1) * rows[1].norm()
    assert F.cosine_similarity(rows[0] - start, rows[1] - start).item() > 0.98


@pytest.mark.parametrize("options", [{}, {"optimizer": "direction"}, {"max_norm": 0.9}], ids=str)
def test_the_mean_of_the_last_steps(options: dict, load: Callable) -> None:
    def start(**more) -> Inversion:
        sd = load()
        return Inversion(sd, [a_word(sd, 2, lr=0.05)], Settings(steps=5, **options, **more))

    plain, averaged = start(), start(average=3)
    seen = []
    for step in range(5):
        plain.step()
        averaged.step()
        seen.append(plain.rows[0].detach().clone())
        if step < 4:
            assert torch.equal(averaged.rows[0].detach(), seen[-1])
    mean = torch.stack(seen[2:]).mean(0)
    if options.get("optimizer") == "direction":
        mean = F.normalize(mean, dim=1) * plain.vocabulary_norm
    torch.testing.assert_close(averaged.rows[0].detach(), mean, rtol=0, atol=1e-6)
    assert (mean - seen[-1]).abs().max() > 1e-3
    assert torch.equal(averaged.concept(0).vectors, averaged.rows[0].detach())
    every = run(sd := load(), [a_word(sd, 2, lr=0.05)], Settings(steps=2, average=9, **options), 2)
    assert (every.rows[0].detach() - torch.stack(seen[:2]).mean(0)).abs().max() < 0.01


# Precision, and when it fails
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision(dtype: str, load: Callable) -> None:
    """The rows are float32, start exactly where they should, and get about the gradient of float32."""
    sd, whole = load(dtype=dtype), load()
    assert sd.text_encoder.token_embedding.weight.dtype == getattr(torch, dtype)
    start = torch.linspace(-0.1, 0.1, 64).view(2, 32)
    inversions = [Inversion(s, [a_word(s, init=start)], Settings()) for s in (sd, whole)]
    assert torch.equal(inversions[0].rows[0].detach(), start)
    for _ in range(3):
        losses = [inversion.step() for inversion in inversions]
        torch.testing.assert_close(*losses, rtol=0.03, atol=0)
    assert losses[0].dtype == torch.float32
    rows = inversions[0].rows[0]
    assert rows.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in inversions[0].optimizer.state[rows].values())
    assert (rows.detach() - rows.detach().to(sd.dtype).float()).abs().max() > 0  # bits that halves lack
    scale = inversions[0].scaler.get_scale()
    gradients = [inversion.rows[0].grad for inversion in inversions]
    assert F.cosine_similarity(*(grad.flatten() for grad in gradients), dim=0) > 0.98
    assert (scale > 1) == (dtype == "float16")


def test_overflowing_gradients_in_float16(load: Callable) -> None:
    """The step is left out and the loss scaled less, until it works; both survive a resumption."""
    sd = load(dtype="float16")
    inversion = Inversion(sd, [a_word(sd)], Settings())
    inversion.scaler.load_state_dict(inversion.scaler.state_dict() | {"scale": 2.0**26})
    start = inversion.rows[0].detach().clone()
    inversion.step()
    assert torch.equal(inversion.rows[0].detach(), start)
    assert inversion.scaler.get_scale() == 2.0**25
    assert inversion.step_count == 1
    state = {key: value.clone() for key, value in inversion.state_dict().items()}
    sd = load(dtype="float16")
    resumed = Inversion(sd, [a_word(sd)], Settings())
    resumed.load_state_dict(state)
    assert resumed.scaler.get_scale() == 2.0**25
    for _ in range(6):
        assert torch.equal(inversion.step(), resumed.step())
    assert resumed.scaler.state_dict() == inversion.scaler.state_dict()
    assert resumed.scaler.get_scale() < 2.0**25
    assert resumed.scaler.state_dict()["_growth_tracker"] > 0
    assert torch.equal(inversion.rows[0], resumed.rows[0])
    assert (resumed.rows[0].detach() - start).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_with_a_broken_weight(dtype: str, load: Callable) -> None:
    """Stops at once, says where, and does not blame what has not happened yet."""
    sd = load(dtype=dtype)
    sd.unet.conv_out.weight.data[0, 0, 0, 0] = float("nan")
    inversion = Inversion(sd, [a_word(sd)], Settings())
    start = inversion.rows[0].detach().clone()
    with pytest.raises(Diverged, match=r"^step 1: the loss is not finite; probably ") as error:
        inversion.step()
    assert "learning rate" not in str(error.value)
    assert torch.equal(inversion.rows[0].detach(), start)
    assert inversion.step_count == 0


def test_a_learning_rate_that_is_too_high(load: Callable) -> None:
    sd = load()
    inversion = Inversion(sd, [a_word(sd, lr=1e30)], Settings())
    message = r"^step (\d+): .* too long: lower the learning rate, or set max_norm"
    with pytest.raises(Diverged, match=message) as error:
        for _ in range(5):
            inversion.step()
    assert str(error.value).startswith(f"step {inversion.step_count + 1}:")


def test_which_word_went_wrong(load: Callable) -> None:
    sd = load()
    words = [a_word(sd, placeholder=f"<{i}>", lr=1e30 if i == 1 else 5e-3) for i in range(3)]
    with pytest.raises(Diverged, match="a vector of '<1>' has become"):
        run(sd, words, Settings(), 5)


def test_a_broken_gradient(load: Callable) -> None:
    """The loss is finite, the gradient is not: rows that lead there are not kept."""
    sd = load()
    inversion = Inversion(sd, [a_word(sd)], Settings())
    inversion.step()
    before = inversion.rows[0].detach().clone()
    inversion.step()
    inversion.rows[0].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(Diverged, match=r"^step 3: .* probably the learning rate is too high"):
        inversion.step()
    assert torch.equal(inversion.rows[0].detach(), before)


def test_rows_that_leave_the_range_of_float32(load: Callable) -> None:
    """Noticed at once, not at the next step, which may never come."""
    sd = load()
    inversion = Inversion(sd, [a_word(sd)], Settings())
    rows = inversion.rows[0]
    start = rows.detach().clone()
    inversion.optimizer.register_step_post_hook(lambda *_: rows.data.mul_(float("inf")))
    with pytest.raises(Diverged, match=r"^step 1"):
        inversion.step()
    assert torch.equal(rows.detach(), start)


def test_the_rows_that_are_left_are_good(load: Callable) -> None:
    """After a divergence the rows are the last ones that gave a finite loss."""
    sd = load()
    inversion = Inversion(sd, [a_word(sd, lr=1e30)], Settings())
    with pytest.raises(Diverged):
        for _ in range(5):
            inversion.step()
    assert inversion.evaluate().isfinite().all()


# Evaluation
# ----------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_mean_loss_of_fixed_samples(load: Callable, tmp_path: Path) -> None:
    sd = load()
    settings = Settings(eval_size=7, batch_size=3, eval_seed=5)  # batches of 3, 3 and 1
    word = a_word(sd, 2)
    inversion = run(sd, [word], settings, 2)
    textbook = Textbook(
        pipeline(tmp_path, "small"), replace(word, init=inversion.concept(0).vectors), settings
    )
    samples = sample_batch(word, settings, 1000, 7, "evaluation", 5)
    expected = textbook.losses(samples).mean().detach()
    torch.testing.assert_close(inversion.evaluate(), expected[None], rtol=1e-5, atol=0)


def test_evaluation_has_no_side_effects(load: Callable) -> None:
    results = []
    for evaluate in (False, True):
        sd = load()
        inversion = Inversion(sd, [a_word(sd, 2)], Settings(per_image=0.5, progressive=(2,)))
        for _ in range(4):
            if evaluate:
                torch.manual_seed(0)
                first = inversion.evaluate()
                torch.manual_seed(1)
                assert torch.equal(first, inversion.evaluate())
                assert not first.requires_grad
            inversion.step()
        results.append(inversion.state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_evaluation_shows_that_a_word_gets_better(load: Callable) -> None:
    """Every ten steps: what is noise in the loss of training is a clear descent here.

    Words hardly matter to a model that has learned nothing: one per cent is what there is to gain.
    """
    sd = load()
    inversion = Inversion(sd, [a_word(sd, 8, lr=0.2)], Settings())
    values = [inversion.evaluate().item()]
    for _ in range(3):
        for _ in range(10):
            inversion.step()
        values.append(inversion.evaluate().item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.996 * values[0]


def test_evaluations_of_other_seeds_are_others(load: Callable) -> None:
    sd = load()
    values = [
        Inversion(sd, [a_word(sd, placeholder=f"<{i}>")], Settings(eval_seed=i)).evaluate().item()
        for i in (0, 1)
    ]
    assert values[0] != values[1]


# Several words at once, and going on
# ----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "per_image": {"per_image": 0.5, "caption_dropout": 0.3},
    "regularization": {"regularization": 0.1, "max_norm": 1.0, "accumulate": 2},
    "context": {"context_weight": 0.5, "accumulate": 2},
    "direction": {"optimizer": "direction", "per_image": 0.5, "t_min": 100, "t_max": 800},
    "average": {"average": 3, "lr_schedule": "cosine", "warmup": 2, "weight_decay": 0.2, "betas": (0.5, 0.9)},
    "direction, average": {"optimizer": "direction", "average": 2},
}


def three_words(sd: StableDiffusion) -> list[Word]:
    return [
        a_word(sd, 1, "<toy>", lr=5e-3, seed=0),
        a_word(sd, 3, "<toy>2", latents=latents(5, seed=1), lr=2e-2, seed=7, templates=("my {}", "{}")),
        a_word(
            sd,
            2,
            "sks",
            init=initial_rows(sd, "random", "", 2, seed=9),
            latents=latents(2, seed=2),
            lr=1e-3,
            seed=7,
            captions=("the {} on grass", None),
        ),
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_words_learned_together_are_those_learned_alone(options: dict, load: Callable) -> None:
    """1e-5 after three steps: a batch of another size sums in another order."""
    settings = Settings(steps=3, eval_size=6, **options)
    sd = load()
    together = Inversion(sd, three_words(sd), settings)
    losses = torch.stack([together.step() for _ in range(3)])
    for i in range(3):
        sd = load()
        word = three_words(sd)[i]
        alone = Inversion(sd, [word], settings)
        torch.testing.assert_close(
            torch.cat([alone.step() for _ in range(3)]), losses[:, i], rtol=1e-5, atol=0
        )
        torch.testing.assert_close(together.rows[i], alone.rows[0], rtol=0, atol=1e-5)
        for a, b in zip(together.photo_rows[i], alone.photo_rows[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.evaluate()[i : i + 1], alone.evaluate(), rtol=1e-5, atol=0)
        moved = F.normalize(alone.rows[0].detach()) - F.normalize(word.init)
        assert moved.abs().max() > word.lr / 10
        assert together.concept(i).placeholder == word.placeholder


def test_a_word_that_is_taken(load: Callable) -> None:
    sd = load()
    with pytest.raises(InputError, match="'cat' is a word the model knows"):
        Inversion(sd, [a_word(sd, placeholder="cat")], Settings())
    Inversion(load(), [a_word(sd, placeholder="cat")], Settings(), replace=True).step()
    with pytest.raises(InputError, match="'<toy>' is in use already"):
        Inversion(sd, [a_word(sd), a_word(sd)], Settings())


LONG = "a photo of the red toy on grass {}"


@pytest.mark.parametrize(
    ("n", "settings", "templates"),
    [
        (70, {}, ()),
        (67, {"per_image": 0.1}, ()),  # there is room for the word, but not for that of the photo
        (4, {"progressive": (1, 2, 3)}, ["cat " * 72 + "{}"]),  # for one vector, but not for four
    ],
)
def test_prompts_without_room_leave_nothing_behind(
    n: int, settings: dict, templates: list[str], load: Callable
) -> None:
    """Noticed at once, and the model knows neither the word nor less than before."""
    sd = load()
    sd.add_concept(Concept("<toy>", torch.ones(1, 32)))
    sd.add_concept(Concept("<old>", torch.ones(1, 32)))
    before = dict(sd.tokenizer.placeholders)
    word = a_word(sd, n, templates=[LONG])
    with pytest.raises(InputError, match="does not fit"):
        Inversion(sd, [word], Settings(**settings), replace=True, templates=templates)
    assert sd.tokenizer.placeholders == before
    with pytest.raises(InputError, match="'<old>' is in use already"):
        Inversion(sd, [a_word(sd, placeholder="<new>"), a_word(sd, placeholder="<old>")], Settings())
    assert sd.tokenizer.placeholders == before
    assert not any(p.requires_grad for p in sd.text_encoder.parameters())
    Inversion(sd, [replace(word, init=word.init[:1])], Settings(), replace=True, templates=templates)


RESUMED = OPTIONS | {"progressive": {"progressive": (1, 3), "weight_decay": 0.3}, "float16": {}}


@pytest.mark.parametrize(("name", "options"), RESUMED.items(), ids=RESUMED)
def test_going_on_from_any_step(name: str, options: dict, load: Callable) -> None:
    """Bit for bit as without a break."""
    settings = Settings(steps=4, batch_size=2, **options)
    dtype = "float16" if name == "float16" else "float32"

    def start() -> Inversion:
        sd = load(dtype=dtype)
        words = [a_word(sd, 3)]
        if "progressive" not in options:
            words.append(a_word(sd, 1, "<b>", seed=3))
        return Inversion(sd, words, settings)

    def snapshot(inversion: Inversion) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in inversion.state_dict().items()}

    inversion = start()
    states = [snapshot(inversion)]
    for _ in range(4):
        inversion.step()
        states.append(snapshot(inversion))
    for first in (1, 3):  # with all of three steps, and with the last alone, to go
        resumed = start()
        resumed.load_state_dict(states[first])
        assert resumed.step_count == first
        for expected in states[first + 1 :]:
            resumed.step()
            found = resumed.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)


# minti.learn
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("the {} on grass")
    return folder


def test_learn(load: Callable, photos: Path) -> None:
    sd = load()
    seen = []
    concept = minti.learn(
        sd,
        images=photos,
        placeholder="<toy>",
        init_word="toy",
        steps=4,
        batch_size=2,
        num_vectors=2,
        lr=0.01,
        seed=3,
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    assert isinstance(concept, Concept)
    assert concept.placeholder == "<toy>"
    assert concept.vectors.shape == (2, 32)

    by_hand = load()
    pictures = load_photos(photos)
    word = Word(
        "<toy>",
        initial_rows(by_hand, "word", "toy", 2),
        encode_views(by_hand, make_views(pictures, 16, flip=True)),
        OBJECT,
        (None, "the {} on grass", None),
        lr=0.01,
        seed=3,
    )
    inversion = Inversion(by_hand, [word], Settings(steps=4, batch_size=2))
    losses = [inversion.step().item() for _ in range(4)]
    assert seen == list(zip(range(1, 5), losses, strict=True))
    assert torch.equal(concept.vectors, inversion.concept(0).vectors)

    # The model knows the word now, as if it had been loaded.
    taught = load()
    taught.add_concept(concept)
    images = [np.asarray(s.sample("a <toy>", steps=2)[0]) for s in (sd, taught, load())]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_learn_one_word_after_the_other(load: Callable, photos: Path) -> None:
    sd = load()
    options = {"init_word": "toy", "steps": 2, "batch_size": 2}
    first = minti.learn(sd, photos, "<a>", **options)
    second = minti.learn(sd, str(photos), "<b>", **options)
    assert torch.equal(sd.text_encoder.token_embedding.words[0].detach(), first.vectors)
    torch.testing.assert_close(second.vectors, first.vectors)  # the same seed, the same photos
    with pytest.raises(InputError, match="'<b>' is in use already"):
        minti.learn(sd, photos, "<b>", **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": "no/such/folder"}, InputError, "no/such/folder: is not a folder"),
        ({"init_word": ""}, InputError, "init word '' is empty"),
        ({"size": 17}, InputError, "size 17x17: both sides must be multiples of 2"),
        ({"templates": "objekt"}, InputError, "templates 'objekt'"),
        ({"placeholder": " "}, InputError, "placeholder ' ' is empty"),
        ({"lr_schedule": "linear"}, InputError, "lr_schedule 'linear'"),
        ({"objective": "clip"}, InputError, "objective: minti.learn learns with diffusion only"),
        ({"max_norm": -1}, InputError, "max_norm = -1: should be a number of at least 0"),
        ({"betas": (0.9, 1.0)}, InputError, "betas = 1.0: should be a number"),
        ({"progressive": (-5,)}, InputError, "progressive = -5: should be an integer of at least 1"),
        ({"step": 3}, TypeError, "step"),
    ],
)
def test_learn_with_what_cannot_be(
    changes: dict, error: type, message: str, load: Callable, photos: Path
) -> None:
    """And the model is as it was: it does not know the word."""
    sd = load()
    arguments = {"images": photos, "placeholder": "<toy>", "init_word": "toy", "steps": 1} | changes
    with pytest.raises(error) as caught:
        minti.learn(sd, **arguments)
    assert message in str(caught.value)
    assert not sd.tokenizer.placeholders
    for special in ("per_layer", "output_embedding"):  # nor was it made ready for words of another kind
        with pytest.raises(error):
            minti.learn(sd, **arguments, **{special: True})
        assert not isinstance(sd.text_encoder, SPECIAL)


def test_seeds_give_different_words_from_the_same_photos(load: Callable, photos: Path) -> None:
    words = [
        minti.learn(load(), photos, "<toy>", "toy", steps=2, batch_size=2, seed=seed).vectors
        for seed in (0, 1, 0)
    ]
    assert torch.equal(words[0], words[2])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(words))


def test_init_words_that_the_vocabulary_lacks(load: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """Pieces mean little: they are left out where whole words remain, unless there is a vector for each."""
    sd = load()
    with caplog.at_level("WARNING"):
        assert torch.equal(initial_rows(sd, "word", "wug toy"), initial_rows(sd, "word", "toy"))
    assert (
        "init word 'wug toy': the vocabulary has no 'wug', only 'w', 'u', 'g'; it is left out" in caplog.text
    )
    caplog.clear()
    ids = sd.tokenizer.encode("wug toy")
    assert len(ids) == 4
    exact = initial_rows(sd, "word", "wug toy", 4)
    assert torch.equal(exact, sd.tables[0].weight[ids])
    assert not caplog.text
    assert torch.equal(initial_rows(sd, "word", "wug"), sd.tables[0].weight[ids[:3]].mean(0, keepdim=True))
    assert "their mean is taken; better choose" in caplog.text


def test_a_learned_word_as_init_word(load: Callable) -> None:
    sd, vectors = load(), torch.arange(64.0).view(2, 32)
    sd.add_concept(Concept("<old>", vectors))
    assert torch.equal(initial_rows(sd, "word", "<old>", 2), vectors)
    assert torch.equal(initial_rows(sd, "word", "<OLD>"), vectors.mean(0, keepdim=True))
    sd.add_concept(Concept("<output>", initial_rows(sd, "output", "<old> toy", 3)))


def test_placeholders_in_the_prompts(load: Callable, caplog: pytest.LogCaptureFixture) -> None:
    sd = load()
    with pytest.raises(
        InputError, match=r"placeholder 'photo of' occurs in the prompt .* such as <photo of>"
    ):
        Inversion(sd, [a_word(sd, placeholder="photo of")], Settings())
    assert not sd.tokenizer.placeholders
    words = [
        a_word(sd, placeholder="<a>"),
        a_word(sd, placeholder="<b>", captions=("{} beside <A>", None, None)),
    ]
    with caplog.at_level("WARNING"):
        Inversion(sd, words, Settings())
    assert caplog.messages == ["'<b>' and '<a>' influence each other: '{} beside <A>' names both"]


def test_learn_from_files_and_pictures(load: Callable, photos: Path) -> None:
    options = {"placeholder": "<toy>", "init_word": "toy", "steps": 2, "batch_size": 2}
    files = [str(photos / "0.png"), photos / "2.png"]
    from_files = minti.learn(load(), files, **options)
    from_pictures = minti.learn(load(), [Image.open(path) for path in files], **options)
    assert torch.equal(from_files.vectors, from_pictures.vectors)
    exif, clear = Image.Exif(), Image.open(files[0]).convert("RGBA")
    exif[0x0112] = 6  # turned, and half of it transparent
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(photos / "clear.png", exif=exif)
    pair = ([photos / "clear.png"], [Image.open(photos / "clear.png")])
    from_file, from_picture = (minti.learn(load(), images, **options) for images in pair)
    assert torch.equal(from_file.vectors, from_picture.vectors)
    with pytest.raises(InputError, match="images is empty"):
        minti.learn(load(), [], **options)
    with pytest.raises(InputError, match="images should be a folder, or a list of files and pictures"):
        minti.learn(load(), Image.open(files[0]), **options)
    with pytest.raises(InputError, match=r"size = \(16, 8\): should be an integer"):
        minti.learn(load(), files, **options, size=(16, 8))
    with pytest.raises(InputError, match="ndarray is neither a path nor a picture"):
        minti.learn(load(), [np.zeros((4, 4, 3))], **options)


def test_learn_a_word_again(load: Callable, photos: Path) -> None:
    sd, options = load(), {"init_word": "toy", "steps": 2, "batch_size": 2}
    first = minti.learn(sd, photos, "<toy>", **options)
    second = minti.learn(sd, photos, "<toy>", replace=True, **options | {"seed": 1})
    assert not torch.equal(first.vectors, second.vectors)
    ids = sd.tokenizer.placeholders["<toy>"]
    assert torch.equal(sd.look_up(torch.tensor([ids]))[0], second.vectors)
    assert not any(p.requires_grad for p in sd.text_encoder.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2.5}, "steps = 2.5: should be an integer of at least 1"),
        ({"num_vectors": 0}, "num_vectors = 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"seed": -1}, "seed = -1"),
        ({"caption_dropout": 2}, "caption_dropout = 2: should be a number from 0 to 1"),
        ({"optimizer": "sgd"}, "optimizer 'sgd': choose from adamw, direction"),
        ({"kappa": -1}, "kappa = -1"),
        ({"average": 0}, "average = 0: should be an integer of at least 1"),
        ({"t_min": -1}, "t_min = -1"),
        ({"t_min": 500, "t_max": 400}, "t_max = 400: should be an integer of at least 500"),
        ({"t_max": 1000}, "t_min 0, t_max 1000: the time steps of this model are 0 to 999"),
        ({"t_min": 1000}, "t_min 1000, t_max 999: the time steps of this model are 0 to 999"),
        ({"placeholder": None}, "None: a prompt or a word should be text"),
        ({"init_word": 3}, "3: a prompt or a word should be text"),
    ],
)
def test_learn_with_odd_numbers(changes: dict, message: str, load: Callable, photos: Path) -> None:
    arguments = {"images": photos, "placeholder": "<toy>", "init_word": "toy", "steps": 1} | changes
    with pytest.raises(InputError, match=message):
        minti.learn(load(), **arguments)


def test_the_plain_loop_learns_the_same(load: Callable) -> None:
    """`learn_word` is the method as `Inversion` takes it, to the last bit for one word and one process."""
    settings = Settings(steps=4, batch_size=3, caption_dropout=0.3, betas=(0.8, 0.95), weight_decay=0.1)
    sd = load()
    expected = run(sd, [a_word(sd, 2, seed=5)], settings, 4).concept(0).vectors
    sd = load()
    concept = learn_word(sd, a_word(sd, 2, seed=5), settings)
    assert torch.equal(concept.vectors, expected)
    assert concept.placeholder == "<toy>"
    assert not any(p.requires_grad for p in sd.text_encoder.parameters())


def test_masked_latents_do_not_count(load: Callable) -> None:
    """The loss is the mean over the latents that count: what lies under the mask changes nothing."""
    sd = load()
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 4, 8, 8, generator=g)
    t, ids, sizes = torch.tensor([10, 800]), sd.tokenizer(["a toy", "the cat"]), torch.zeros(2, 6)
    weight = torch.zeros(2, 1, 8, 8)
    weight[..., :4, :] = torch.rand(2, 1, 4, 8, generator=g)
    x_t = sd.schedule.q_sample(x0, eps, t)
    error = (sd.unet(x_t, t, sd.text_encoder(ids).context) - eps) ** 2
    expected = (weight * error).sum(dim=(1, 2, 3)) / (4 * weight.sum(dim=(1, 2, 3)))
    loss = diffusion_loss(sd, x0, eps, t, ids, weight, sizes)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (loss / diffusion_loss(sd, x0, eps, t, ids, torch.ones_like(weight), sizes) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("key", ["step", "0.0.rows", "0.0.exp_avg", "0.0.exp_avg_sq", "0.0.step"])
def test_a_state_without_one_of_its_parts(key: str, load: Callable) -> None:
    sd = load()
    inversion = run(sd, [a_word(sd)], Settings(), 2)
    state = inversion.state_dict()
    missing = {name: value for name, value in state.items() if name != key}
    for damaged in (missing, state | {key: torch.zeros(3)}, state | {key: state[key].to(torch.float16)}):
        with pytest.raises(InputError, match=f"the saved state is damaged or of another run: {key}"):
            inversion.load_state_dict(damaged)
