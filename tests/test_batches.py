"""What a training step looks at: a function of seed and step, balanced and spread out."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from minti.errors import InputError
from minti.inversion.batches import Batch, Settings, Word, generator, sample_batch
from minti.inversion.latents import Latents
from minti.inversion.prompt_variants import photo_word

T = 1000


def word(photos: int = 3, views: int = 2, side: int = 2, **changes) -> Word:
    """Photos of `views` views each."""
    count = photos * views
    latents = Latents(
        mean=torch.zeros(count, 4, side, side),
        std=torch.ones(count, 4, side, side),
        weight=torch.ones(count, 1, side, side),
        photo=torch.arange(photos).repeat_interleave(views),
        sizes=torch.zeros(count, 6),
    )
    return replace(Word("<toy>", torch.zeros(1, 8), latents, ("a {}", "the {}", "{} here")), **changes)


def same(a: Batch, b: Batch) -> bool:
    tensors = [x for x in vars(a) if x != "prompts"]
    return a.prompts == b.prompts and all(torch.equal(getattr(a, x), getattr(b, x)) for x in tensors)


def test_a_function_of_seed_and_step() -> None:
    samples = sample_batch(word(), Settings(), T, 8, 17)
    torch.manual_seed(123)  # whatever the rest of the program does with random numbers
    torch.rand(10)
    assert same(samples, sample_batch(word(), Settings(), T, 8, 17))
    assert not same(samples, sample_batch(word(), Settings(), T, 8, 18))
    assert not same(samples, sample_batch(word(seed=1), Settings(), T, 8, 17))
    state = torch.random.get_rng_state()
    sample_batch(word(), Settings(), T, 8, 17)
    assert torch.equal(state, torch.random.get_rng_state())


def test_nothing_else_about_a_word_or_the_settings_changes_the_numbers() -> None:
    samples = sample_batch(word(), Settings(), T, 8, 17)
    other = word(lr=1.0, init=torch.ones(5, 8))
    settings = Settings(steps=7, batch_size=2, accumulate=4, lr_schedule="cosine", weight_decay=0.5)
    assert same(samples, sample_batch(other, settings, T, 8, 17))


def test_seeds_and_steps_are_not_mixed_up() -> None:
    """(1, 2) is not (12,) nor (2, 1), and evaluation is not a step."""
    keys = [(1, 2), (12,), (2, 1), (1, "2"), ("evaluation", 1, 2), (0, 1, 2)]
    assert len({torch.rand(1, generator=generator(*key)).item() for key in keys}) == len(keys)


def test_shapes_and_slices() -> None:
    samples = sample_batch(word(side=3), Settings(), T, 5, 0)
    assert samples.view.shape == samples.t.shape == (5,)
    assert samples.view.dtype == samples.t.dtype == torch.int64
    assert samples.eps.shape == samples.posterior_noise.shape == (5, 4, 3, 3)
    assert len(samples.prompts) == 5
    part = samples[1:3]
    assert part.prompts == samples.prompts[1:3]
    for name in ("view", "t", "eps", "posterior_noise"):
        assert torch.equal(getattr(part, name), getattr(samples, name)[1:3])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_photos_take_turns(count: int) -> None:
    """In a batch no photo comes twice before all have come, and in the long run all come equally often, as do
    their views: 600 draws of a third each have a standard deviation of 12, of a sixth 9; bounds at 5 of them.
    """
    photo, views = word().latents.photo, []
    for step in range(600 // count):
        view = sample_batch(word(), Settings(), T, count, step).view
        times = Counter(photo[view].tolist())
        assert max(times.values()) - min(times.get(p, 0) for p in range(3)) <= 1
        views += view.tolist()
    n = len(views)
    for p, times in Counter(photo[views].tolist()).items():
        assert abs(times - n / 3) < 60, p
    assert len(set(views)) == 6
    for view, times in Counter(views).items():
        assert abs(times - n / 6) < 45, view


def test_photos_with_different_numbers_of_views() -> None:
    latents = word(2, 3).latents
    latents = replace(latents, photo=torch.tensor([0, 1, 1, 1, 1, 1]))
    views = torch.cat(
        [sample_batch(word(latents=latents), Settings(), T, 2, step).view for step in range(300)]
    )
    counts = views.bincount(minlength=6)
    assert counts[0] == 300
    assert (counts[1:] - 60).abs().max() < 35  # standard deviation 7


def test_times_are_stratified_and_uniform() -> None:
    """One in every eighth of the schedule; all together uniform, by Kolmogorov's test.

    The bound on the distance of the distributions, 1.95 / sqrt(n), would be passed by chance once in 1,000
    times for independent numbers, and these are fixed by their seeds and spread better.
    """
    times = []
    for step in range(500):
        t = sample_batch(word(), Settings(), T, 8, step).t
        assert sorted((t // 125).tolist()) == list(range(8))
        times.append(t)
    first = torch.stack(times)[:, 0]  # a sample is in no particular stratum
    every = torch.cat(times)
    for t in (first, every):
        empirical = torch.arange(1, len(t) + 1) / len(t)
        distance = (empirical - (t.sort().values + 1) / T).abs().max().item()
        assert distance < 1.95 / math.sqrt(len(t))
    assert every.min() < 5
    assert every.max() > 994


@pytest.mark.parametrize(("low", "high"), [(400, None), (0, 99), (7, 7), (500, 899)])
def test_times_of_a_range(low: int, high: int | None) -> None:
    """All of them and no others, one from each quarter, and nothing else of a batch is another."""
    settings = Settings(t_min=low, t_max=high)
    last = T - 1 if high is None else high
    plain, batches = ([sample_batch(word(), s, T, 4, i) for i in range(400)] for s in (Settings(), settings))
    every = torch.stack([batch.t for batch in batches])
    assert low <= every.min() < low + 10 and last - 10 < every.max() <= last
    if last > low:
        assert ((every - low) * 4 // (last - low + 1)).sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 400
    assert all(
        torch.equal(a.eps, b.eps) and a.prompts == b.prompts for a, b in zip(plain, batches, strict=True)
    )


@pytest.mark.parametrize("count", [1, 4, 256])
def test_the_last_time_is_not_passed(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the random numbers are as close to 1 as float32 can be, t is T - 1."""
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 1 - 2.0**-24))
    assert sample_batch(word(), Settings(), T, count, 0).t.max() == T - 1


def test_noise_is_standard_normal_and_independent() -> None:
    samples = [sample_batch(word(side=8), Settings(), T, 4, step) for step in range(20)]
    eps = torch.stack([s.eps for s in samples]).flatten()
    posterior = torch.stack([s.posterior_noise for s in samples]).flatten()
    n = len(eps)  # standard deviations of what follows: 1/sqrt(n) or a little more
    for value in (eps.mean(), posterior.mean(), eps.std() - 1, posterior.std() - 1, (eps * posterior).mean()):
        assert abs(value) < 5 / math.sqrt(n)


def test_prompts_come_from_the_templates() -> None:
    prompts = Counter(p for step in range(100) for p in sample_batch(word(), Settings(), T, 6, step).prompts)
    assert set(prompts) == {"a <toy>", "the <toy>", "<toy> here"}
    assert min(prompts.values()) > 140  # of 200, standard deviation 12


def test_captions_go_before_templates() -> None:
    captioned = word(captions=("{} one", None, "{} three"))
    seen = {0: set(), 1: set(), 2: set()}
    for step in range(60):
        samples = sample_batch(captioned, Settings(), T, 3, step)
        for view, prompt in zip(samples.view.tolist(), samples.prompts, strict=True):
            seen[view // 2].add(prompt)
    assert seen == {0: {"<toy> one"}, 1: {"a <toy>", "the <toy>", "<toy> here"}, 2: {"<toy> three"}}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_caption_dropout(share: float) -> None:
    """The share of bare words, up to 5 standard deviations of a binomial distribution."""
    captioned = word(captions=("{} one", None, "{} three"))
    settings = Settings(caption_dropout=share)
    prompts = [p for step in range(200) for p in sample_batch(captioned, settings, T, 5, step).prompts]
    tolerance = 5 * math.sqrt(share * (1 - share) / len(prompts))
    assert abs(prompts.count("<toy>") / len(prompts) - share) <= tolerance


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_words_for_single_photos(share: float) -> None:
    """In the given share of prompts, and always that of the photo in the picture."""
    prompts, with_photo = [], 0
    for step in range(200):
        samples = sample_batch(word(), Settings(per_image=share), T, 5, step)
        for view, prompt in zip(samples.view.tolist(), samples.prompts, strict=True):
            base, found, other = prompt.partition(" with ")
            assert base in {"a <toy>", "the <toy>", "<toy> here"}
            if found:
                assert other == photo_word("<toy>", view // 2) == f"<toy>:{view // 2}"
            with_photo += bool(found)
            prompts.append(prompt)
    tolerance = 5 * math.sqrt(share * (1 - share) / len(prompts))
    assert abs(with_photo / len(prompts) - share) <= tolerance


def test_constant_learning_rate_and_warmup() -> None:
    settings = Settings(steps=10, warmup=4)
    assert [settings.lr_factor(i) for i in range(10)] == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert {Settings(steps=10).lr_factor(i) for i in range(10)} == {1.0}


def test_cosine_learning_rate() -> None:
    """The same as torch's scheduler."""
    settings = Settings(steps=20, lr_schedule="cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        assert settings.lr_factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
    warm = Settings(steps=20, lr_schedule="cosine", warmup=5)
    for step in range(20):
        assert warm.lr_factor(step) == pytest.approx(settings.lr_factor(step) * min(1, (step + 1) / 5))


def test_an_unknown_schedule() -> None:
    with pytest.raises(InputError, match="lr_schedule 'linear': choose from constant, cosine"):
        Settings(lr_schedule="linear")


@pytest.mark.parametrize("steps", [(2, 2), (4, 2)])
def test_progressive_steps_that_do_not_rise(steps: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="the steps should rise"):
        Settings(progressive=steps)
