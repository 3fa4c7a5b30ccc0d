"""The tiny world and the tools that train `weights/tiny` on it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import minti
from minti.cli.processes import Processes
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
    contexts,
    decoder,
    density,
    export,
    kinds,
    latents,
    models,
    names,
    probe,
    text,
    training,
    unet,
    vae,
    words,
    world,
)
from tools.make_tiny.captions import caption
from tools.make_tiny.data import (
    CAPTIONS,
    LATENT,
    PICTURE,
    Pictures,
    append,
    caption_at,
    captions_at,
    encode_captions,
    picture_at,
    records,
    scene_at,
    to_pictures,
    to_pixels,
    vocabulary_texts,
)
from tools.make_tiny.draw import labels, render

TINY = Path(__file__).parents[1] / "weights" / "tiny"


def facts(scene: world.Scene) -> dict[str, object]:
    """Everything a caption or a twin can change, without places and sizes."""
    first = scene.things[0]
    return {
        "noun": (first.noun, first.factors),
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
    scenes = [world.scene(0, i) for i in range(1500)]
    seen = [facts(scene) for scene in scenes]
    for fact, values in captions.FACTS.items():
        if fact != "noun":
            assert {f[fact] or "" for f in seen} == set(values), fact
    nouns = {scene.things[0].noun for scene in scenes}
    assert set(world.NOUNS) <= nouns and len(nouns) > 400
    assert {scene.things[0].kind for scene in scenes} == {"", *kinds.KINDS}


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
        along = {"pattern": {"color2"}}  # plain things have no second colour
        assert which in changed and changed <= {which} | along.get(which, set()), (which, changed)


def test_captions_tell_the_truth() -> None:
    for i in range(500):
        scene = world.scene(0, i)
        said = caption(scene, np.random.default_rng(i))
        truth = facts(scene) | {"noun": scene.things[0].noun}
        factors = dict(scene.things[0].factors)
        assert all(factors[f] == value for f, value in said.factors.items())
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
        if which in ("background", "style"):
            assert texts[0].facts[which] != texts[1].facts[which], texts


def test_templates_of_the_trainer_are_in_the_grammar() -> None:
    known = {t for group in captions.PHOTO_TEMPLATES.values() for t in group} | set(captions.RENDITIONS)
    assert set(templates.OBJECT) <= known
    assert set(templates.load_templates("style")) <= {
        t for group in captions.STYLE_TEMPLATES.values() for t in group
    }


def test_concepts_are_held_out() -> None:
    def silhouette(thing: world.Thing) -> np.ndarray:
        return labels(replace(thing, x=32.0, y=32.0, radius=24.0))[::4, ::4] > 0

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
            assert overlap < 0.87, f"{concept.name} has the silhouette of something known: {overlap:.2f}"


def test_what_is_held_out_never_occurs() -> None:
    """Neither the concepts as combinations nor the pairs of choices, in names or in scenes."""
    held_out = (*kinds.CONCEPTS, *kinds.combinations())
    assert len(kinds.combinations()) == kinds.COMBINATIONS
    things = [thing for i in range(1500) for thing in world.scene(0, i).things if thing.kind]
    assert len(things) > 1000 and {t.noun for t in things} <= {"", *world.TOY_NAMES}
    for kind, factors in [(t.kind, dict(t.factors)) for t in (*things, *world.toys().values())]:
        assert not any(k == kind and kinds.agrees(factors, c) for k, c in held_out)
    found = names.held_out_combinations().values()
    assert len(found) == 50 and all(kinds.is_held_out(t.kind, t.factors) for t in found)
    found = names.held_out_things().values()
    assert len(found) == 50 and not any(kinds.is_held_out(t.kind, t.factors) for t in found)
    known = {(t.kind, tuple(t.factors.items())) for t in names.trained().values()}
    assert not known & {(t.kind, tuple(t.factors.items())) for t in found}


def test_names_are_many_and_all_different() -> None:
    every = [*names.trained(), *names.held_out_things(), *names.held_out_combinations()]
    assert len(names.trained()) >= 1000 and len(set(every)) == len(every)
    assert not set(every) & {*world.NOUNS, *world.COLORS, *concepts.held_out()}


def test_things_fit_in_the_unit_circle_and_have_a_code() -> None:
    for thing in list(names.trained().values())[:150]:
        points = np.concatenate([part.points for part in thing.parts])
        assert np.linalg.norm(points, axis=1).max() == pytest.approx(1)
        code = kinds.code(thing.kind, thing.factors)
        assert code.shape == (len(kinds.code_layout()),) and np.abs(code).max() <= 1.01
        assert (code == 1).sum() >= 1 + len(kinds.KINDS[thing.kind].choices)


@pytest.fixture(scope="module")
def tokenizer_folder() -> Path:
    return Path(minti.__file__).parents[1] / "weights" / "tiny" / "tokenizer"


@pytest.mark.slow
def test_the_shipped_vocabulary_is_the_one_that_captions_give(tokenizer_folder: Path, tmp_path: Path) -> None:
    bpe.write(tmp_path, bpe.learn(vocabulary_texts(), limit=4000))
    for name in ("merges.txt", "vocab.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()


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


def run_of(stage: str, folder: Path, steps: int, **more: object) -> training.Run:
    settings = {"seed": 0, "lr": 1e-3, "batch": 4} | more
    return training.Run(stage, folder, steps, float("inf"), torch.device("cpu"), **settings)


def small_run(folder: Path, steps: int, total: int = 6) -> dict[str, torch.Tensor]:
    """Regression on a fixed target, stopped after `steps` of `total` steps."""
    run = run_of("toy", folder, total, lr=0.1)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn((4, 3), generator=run.rng(step))
        if step + 1 == steps:
            run.interrupted = True
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    training.train(run, {"model": model}, loss_of, lambda ema, step: None)
    return training.ema_of(folder, "toy")["model"]


def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = small_run(tmp_path / "a", 6)
    small_run(tmp_path / "b", 3)
    pieces = small_run(tmp_path / "b", 6)
    for key, value in whole.items():
        torch.testing.assert_close(pieces[key], value, rtol=0, atol=0)


def test_records_go_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    assert len(records(path, (2,), np.float16)) == 0
    append(path, (2,), np.ones((3, 2), np.float16))
    with open(path, "ab") as file:
        file.write(b"ha")  # of a record
    append(path, (2,), np.zeros((1, 2), np.float16))
    assert records(path, (2,), np.float16).tolist() == [[1, 1]] * 3 + [[0, 0]]


@pytest.fixture(scope="module")
def work(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small training set, with all that is computed from it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "world").mkdir()
    (folder / "world" / "tokenizer").symlink_to(tokenizer_folder)
    append(folder / "world" / "pictures.u8", PICTURE, np.stack([picture_at(i, 0) for i in range(12)]))
    captions_of = [encode_captions(captions_at(i), read_tokenizer(tokenizer_folder)) for i in range(12)]
    append(folder / "world" / "captions.bin", (CAPTIONS,), np.stack(captions_of))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "TESTS", 2)
        vae.stage(run_of("vae", folder, 1))
        patch.setattr(text, "PHOTO_TEMPLATES", {"": text.PHOTO_TEMPLATES[""][:1]})
        text.stage(run_of("text", folder, 2))
    latents.stage(run_of("latents", folder, 5))
    latents.stage(run_of("latents", folder, 0, batch=5))
    contexts.stage(run_of("contexts", folder, 0, batch=5))
    return folder


def test_stored_captions_are_those_of_their_pictures(work: Path) -> None:
    pictures = Pictures(work)
    ids, targets, code = pictures.said(np.arange(12), np.full(12, 3))
    said = [captions_at(i)[3] for i in range(12)]
    assert ids.equal(pictures.tokenizer([c.text for c in said]))
    for fact, values in captions.FACTS.items():
        read = [values[t] if t >= 0 else None for t in targets[fact].tolist()]
        assert read == [c.facts.get(fact) for c in said]
    for row, c in zip(code, said, strict=True):
        known = {key for key, i in kinds.code_layout().items() if row[i].isfinite()}
        assert {key[1] for key in known if len(key) > 1} == set(c.factors)
        assert all(
            row[kinds.code_layout()[c.kind, f, v]] == 1 for f, v in c.factors.items() if isinstance(v, str)
        )


def test_stored_contexts_are_what_the_model_sees(work: Path) -> None:
    """All 77 tokens; where no name was moved, to the rounding of float16."""
    pictures = Pictures(work)
    encoder = text.load_text_encoder(work, pictures.tokenizer, torch.device("cpu"))
    (which,) = [k for k, (_, noise) in enumerate(contexts.VARIANTS) if not noise]
    stored = contexts.stored_contexts(work)
    assert stored.shape == (12, 3, 77, 128) and len(latents.stored_latents(work)) == 12
    ids, _, _ = pictures.said(np.arange(12), np.full(12, contexts.VARIANTS[which][0]))
    torch.testing.assert_close(
        torch.tensor(stored[:, which]).float(), encoder(ids).context, rtol=1e-2, atol=2e-3
    )


def test_contexts_of_another_text_encoder_are_refused(work: Path, tmp_path: Path) -> None:
    (tmp_path / "contexts").symlink_to(work / "contexts")
    state = torch.load(work / "text" / "state.pt", weights_only=True)
    state["ema"]["text_encoder"]["text_model.final_layer_norm.bias"] += 1
    (tmp_path / "text").mkdir()
    torch.save(state, tmp_path / "text" / "state.pt")
    with pytest.raises(InputError, match="of an older text encoder"):
        contexts.stored_contexts(tmp_path)


def stopped_and_resumed(stage: ModuleType, name: str, model: str, work: Path, folder: Path) -> None:
    """Two steps in one go, and one by one, are the same to the bit."""
    found = []
    for pieces in ((2,), (1, 2)):
        own = folder / str(len(pieces))
        own.mkdir()
        for made in work.iterdir():
            if made.name != name:
                (own / made.name).symlink_to(made)
        for steps in pieces:
            run = run_of(name, own, 2)
            run.minutes = float("inf")
            stop_after(run, steps)
            stage.stage(run)
        found.append(training.ema_of(own, name)[model])
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def stop_after(run: training.Run, steps: int) -> None:
    """Have it interrupted once that many steps are done."""
    rate = run.learning_rate

    def learning_rate(step: int) -> float:
        run.interrupted = step + 1 >= steps
        return rate(step)

    run.learning_rate = learning_rate


def test_the_text_encoder_resumes_bit_for_bit(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PHOTO_TEMPLATES", {"": text.PHOTO_TEMPLATES[""][:1]})
    stopped_and_resumed(text, "text", "text_encoder", work, tmp_path)


def test_the_image_encoder_resumes_bit_for_bit(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "TESTS", 4)
    stopped_and_resumed(clip, "clip", "image_encoder", work, tmp_path)


def test_the_unet_resumes_bit_for_bit(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = minti.StableDiffusion.sample
    monkeypatch.setattr(minti.StableDiffusion, "sample", lambda *a, **how: sample(*a, **how | {"steps": 1}))
    monkeypatch.setattr(unet, "PREVIEW", ("a red ball",))
    stopped_and_resumed(unet, "unet", "unet", work, tmp_path)


def test_processes_share_a_batch_of_the_unet(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they have the samples of one, take the mean of their gradients, and stop together."""
    stored, empty = (latents.stored_latents(work), contexts.stored_contexts(work)), torch.zeros((77, 128))
    bare = contexts.bare_names(Pictures(work))
    whole, *shares = (
        unet.Batches(run_of("unet", work, 2, processes=processes), *stored, empty, bare).read(1)
        for processes in (Processes(), Processes(0, 2), Processes(1, 2))
    )
    for all_of, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(all_of, torch.cat([first, second]))

    run = run_of("unet", work, 2, processes=Processes(0, 2))
    weights = [torch.zeros((2, 3)), torch.zeros(4), torch.zeros(1)]
    weights[0].grad, weights[1].grad = torch.full((2, 3), 1.0), torch.full((4,), 2.0)
    others = torch.cat([torch.full((6,), 3.0), torch.full((4,), -2.0)])
    for stops in (0.0, 1.0):
        monkeypatch.setattr(
            torch.distributed,
            "all_reduce",
            lambda sums, stops=stops: sums.add_(torch.cat([others, torch.tensor([stops])])),
        )
        assert run.average(weights) == bool(stops)
    assert weights[0].grad.tolist() == [[2.5] * 3] * 2
    assert weights[1].grad.tolist() == [-1.0] * 4
    assert weights[2].grad is None


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: None)
    for rank in (1, 0):
        run, model = run_of("toy", tmp_path, 2, processes=Processes(rank, 2)), nn.Linear(3, 1)
        training.train(run, {"m": model}, lambda step, m=model: (m(torch.ones(3)).sum(), {}), lambda *_: None)
        assert (tmp_path / "toy" / "state.pt").is_file() == (rank == 0)


def test_bare_names_belong_to_their_pictures(work: Path) -> None:
    """Every picture that a name is told of shows one thing, in the look that the name stands for."""
    pictures = Pictures(work)
    encoder = text.load_text_encoder(work, pictures.tokenizer, torch.device("cpu"))
    named = clip.Named(pictures, encoder, torch.device("cpu"))
    assert named.rows and len(named.rows) == len(named.codes)
    for k, rows in enumerate(named.rows):
        (noun,) = {scene_at(i).things[0].noun for i in rows}
        own = world.toys()[noun]
        for i in rows:
            (thing,) = scene_at(i).things
            assert (thing.color, thing.color2, thing.pattern) == (own.color, own.color2, own.pattern)
        expected = encoder(pictures.tokenizer([captions.PHOTO_TEMPLATES[""][3].format(noun)])).pooled[0]
        torch.testing.assert_close(named.features[3, k], expected, rtol=1e-4, atol=1e-5)
        assert named.codes[k].tolist() == kinds.code(own.kind, dict(own.factors)).tolist()


def test_names_begin_where_a_linear_map_puts_their_meaning(tokenizer_folder: Path) -> None:
    """And the word for a kind in their middle."""
    tokenizer = read_tokenizer(tokenizer_folder)
    table = torch.zeros((len(tokenizer), 128))
    words.begin(table, tokenizer)
    rows, means = table[words.name_ids(tokenizer)], words.meanings()
    middle = means.mean(0)
    alike = torch.cosine_similarity((means - middle) @ words.linear_map(128), rows)
    torch.testing.assert_close(alike, torch.ones(len(rows)))
    assert rows.norm(dim=1).mean().item() == pytest.approx(words.LENGTH, rel=1e-4)
    insects = [i for i, thing in enumerate(names.trained().values()) if thing.kind == "insect"]
    torch.testing.assert_close(
        table[tokenizer.encode("insect")[0]], rows[insects].mean(0), atol=1e-5, rtol=1e-4
    )


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
    assert {c.name for c in probe.OBJECTS} == {facts["noun"] for _, facts in examples}
    for picture, facts in examples:
        assert picture.shape == (64, 64, 3)
        assert all(value in probe.READS[fact] for fact, value in facts.items())
    assert {facts["style"] for _, facts in examples} == {*world.STYLES, "riso"}


def test_the_judge_is_told_what_its_pictures_show() -> None:
    """Of all sorts; without drawing them, the same."""
    seen = set()
    for i in range(30):
        scene, riso = probe.special_scene(i)
        picture, facts = probe.special_example(i)
        (thing,) = scene.things
        assert picture.shape == (64, 64, 3) and facts["noun"] == thing.noun in probe.READS["noun"]
        assert facts["style"] == ("riso" if riso else scene.style)
        assert riso or (world.stands_out(thing, scene.background) and facts["color2"] == (thing.color2 or ""))
        groups = (world.NOUNS, concepts.held_out(), probe.HELD_OUT, probe.KNOWN_NAMES)
        seen |= {k for k, group in enumerate(groups) if thing.noun in group}
    assert seen == {0, 1, 2, 3}
    photos = probe.photo_examples()
    assert len(photos) == 2 * 6 * len(probe.OBJECTS)
    assert (photos[1][0] == photos[0][0][:, ::-1]).all() and photos[0][1] == photos[1][1]


def test_the_judge_is_shown_repainted_pictures() -> None:
    """Without a step they are those after the autoencoder; with some, other strokes show the same things."""
    sd, judge = minti.load(TINY, device="cpu", dtype="float32"), Judge.load(TINY)
    examples = probe.concept_examples(1, 24, 0)
    shown, told = (
        np.stack([p for p, _ in examples]),
        [probe.told_of_repainted(facts) for _, facts in examples],
    )
    with torch.no_grad():
        back = to_pictures(sd.vae.decode(sd.vae.encode(to_pixels(shown)).mean))
    assert np.abs(probe.repaint(sd, shown, 0).astype(int) - back).max() <= 1
    again = probe.repaint(sd, shown, 5)
    assert 1 < np.abs(again.astype(int) - back).mean() < 12
    found = probe.shares(told, judge.probe.read(to_pixels(again)))
    assert min(found["background"][0], found["color"][0], found["style"][0]) > 0.85
    assert all("riso" not in facts.values() for facts in told) and found["style"][1] < 24


def test_density_reads_with_the_shipped_judge(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of names, and of vectors that were put in their places, the pictures show the places asked for."""
    density.main(["--checkpoint", str(TINY), "--out", str(tmp_path), "--count", "1", "--steps", "0"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "%" in line][-3:]
    assert [row[0].partition(",")[0].strip() for row in rows] == [
        "names that training knows",
        "things",
        "combinations",
    ]
    assert all(float(row[5].rstrip(" %")) > 80 and float(row[2].rstrip(" %")) > 30 for row in rows)
    assert (tmp_path / "sheet.png").is_file()
    with pytest.raises(InputError, match="has no folder probe; `python tools/make_tiny export` writes one"):
        density.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path)])


def test_pictures_of_another_unet_are_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SPECIAL", "REPAINTED", "PART"):
        monkeypatch.setattr(probe, name, 2)
    shutil.copytree(work, tmp_path / "work", symlinks=True)
    (tmp_path / "work" / "unet").mkdir()
    sd, run = minti.load(TINY, device="cpu", dtype="float32"), run_of("probe", tmp_path / "work", 1)
    for value in (0.0, 1.0):
        state = {"ema": {"unet": {"weight": torch.full((2,), value)}}}
        torch.save(state, tmp_path / "work" / "unet" / "state.pt")
        if value:
            with pytest.raises(InputError, match=r"repainted.u8: of an older UNet; delete the folder"):
                probe.training_set(run, sd)
        else:
            first, again = (probe.training_set(run, sd) for _ in range(2))
            assert [len(pictures) for pictures in first[0][:2]] == [2, 2]
            assert sum(map(len, first[0])) == len(first[1]) and first[1] == again[1]


def test_the_decoder_is_trained_alone(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves, from where the autoencoder stood, and the encoder does not."""
    monkeypatch.setattr(vae, "TESTS", 2)
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "tokenizer").symlink_to(tokenizer_folder)
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    append(tmp_path / "world" / "pictures.u8", PICTURE, shown)
    (tmp_path / "latents").mkdir()
    noise = rng.standard_normal((4, 4, 16, 16))
    append(tmp_path / "latents" / "latents.f16", LATENT, noise.astype(np.float16))
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
        "text": {
            "text_encoder": CLIPTextModel(configs.text_config(models.text_config(size), "text_encoder"))
        },
        "clip": {
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
    append(work / "latents" / "latents.f16", LATENT, (1.25 * noise).astype(np.float16))
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
    assert sum(p.stat().st_size for p in exported.rglob("*") if p.is_file()) <= 25e6


@pytest.mark.skipif(not (TINY / "model_index.json").is_file(), reason="weights/tiny is not there")
def test_shipped_weights_are_read_alike_by_diffusers() -> None:
    same_pictures_as_diffusers(TINY)


def test_every_other_picture_of_the_unet_has_a_bare_name(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, found = Pictures(work), set()
    for i in range(len(pictures)):
        for k, (which, _) in enumerate(contexts.VARIANTS):
            text = captions_at(i)[which].text.split()
            before = dict(zip(text[1:], text, strict=False))
            names = [word for word in before if word in world.TOY_NAMES]
            if any(before[name] not in (*world.COLORS, *world.PATTERNS) for name in names):
                own = [thing.noun for thing in scene_at(i).things if thing.looks_as_named]
                assert set(names) & set(own), text
                found.add((i, k))
    bare = contexts.bare_names(pictures)
    assert {tuple(pair) for pair in bare.tolist()} == found and len(found) > 3

    monkeypatch.setattr(unet, "DROPOUT", 0.0)
    stored = latents.stored_latents(work), contexts.stored_contexts(work)
    batches = unet.Batches(run_of("unet", work, 2), *stored, torch.zeros((77, 128)), bare)
    told = [{c.numpy().astype(np.float16).tobytes() for c in batches.read(step)[3]} for step in range(20)]
    of_bare = {stored[1][i, k].tobytes() for i, k in bare}
    others = {stored[1][i, k].tobytes() for i in range(len(pictures)) for k in range(3)} - of_bare
    shares = [len(contexts_of & of_bare) for contexts_of in told]
    assert min(shares) >= 1 and any(contexts_of & others for contexts_of in told)


def test_batches_visit_every_picture_once_an_epoch(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "tokenizer").symlink_to(tokenizer_folder)
    append(tmp_path / "world" / "pictures.u8", PICTURE, np.zeros((12, 64, 64, 3), np.uint8))
    pictures = Pictures(tmp_path)
    first = np.concatenate([pictures.indices(step, 4) for step in range(3)])
    second = np.concatenate([pictures.indices(step, 4) for step in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()
