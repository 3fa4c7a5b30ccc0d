"""Learning the words of a study in batches, and keeping each as soon as it is finished."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import save

from ..errors import InputError
from ..formats.atomic import write_atomically
from ..formats.concept import Concept
from ..formats.photos import load_photos
from ..formats.views import make_views
from ..inversion.batches import Word
from ..inversion.clip_objective import ClipInversion, ClipTarget, check_same_encoder
from ..inversion.divergence import Diverged
from ..inversion.inversion import Inversion
from ..inversion.latents import Latents, encode_views
from ..inversion.start import initial_rows
from ..inversion.templates import load_templates
from ..judge.scorer import Scorer
from ..model.stable_diffusion import StableDiffusion
from ..runs.folder import read_state
from .variants import Group, Variant

log = logging.getLogger(__name__)


SAVE_EVERY = 250  # steps between savings of a batch that is not finished


class Learner:
    """Learns groups of words with one model.

    Args:
        folder: the folder for `words/`, the finished words, and `learning/`, the state of unfinished batches.
        compiled: see `Inversion`.
        scorer: the CLIP of words that are learned with the objective clip.
    """

    def __init__(
        self, sd: StableDiffusion, folder: Path, compiled: bool = False, scorer: Scorer | None = None
    ) -> None:
        self.sd, self.folder, self.compiled, self.scorer = sd, Path(folder), compiled, scorer
        self._latents: dict[tuple, Latents] = {}
        self._count = 0

    def path(self, variant: Variant) -> Path:
        """The file of a word."""
        name = f"step-{variant.settings.steps:06d}.safetensors"
        return self.folder / "words" / variant.trajectory.key / name

    def is_done(self, group: Group) -> bool:
        """Whether all words of a group are finished."""
        return all(self.path(word.after(n)).exists() for word, steps in group.words.items() for n in steps)

    def steps_left(self, group: Group) -> int:
        """How many steps are still to be taken."""
        if self.is_done(group):
            return 0
        return group.settings.steps - int(read_state(self._state(group)).get("step", 0))

    def _state(self, group: Group) -> Path:
        return self.folder / "learning" / f"{group.key}.safetensors"

    def check(self, variant: Variant) -> None:
        """Raises InputError if the photos, init word, templates or CLIP of a word cannot be used."""
        self._word(variant, variant.concept.name)
        if variant.settings.objective == "clip":
            check_same_encoder(self.sd, self.scorer.text_encoder)

    def _word(self, variant: Variant, placeholder: str) -> Word:
        """What a word is learned from: latents of its photos, rows of its init word, templates, captions."""
        v, photos = variant, load_photos(variant.concept.images)
        if (v.photos or 0) > len(photos):
            raise InputError(f"{v.concept.images}: has {len(photos)} photos, the study asks for {v.photos}")
        photos = photos[: v.photos]
        key = (v.concept.images, v.photos, v.crop, v.flip, v.seed if v.crop == "random" else None)
        if key not in self._latents:
            views = make_views(photos, self.sd.image_size[0], crop=v.crop, flip=v.flip, seed=v.seed)
            self._latents[key] = encode_views(self.sd, views)
        rows = initial_rows(self.sd, v.init, v.init_word, v.num_vectors, v.seed)
        templates, captions = load_templates(v.templates), [photo.caption for photo in photos]
        return Word(placeholder, rows, self._latents[key], templates, captions, v.lr, v.seed)

    def _inversion(self, words: Sequence[Word], group: Group) -> Inversion:
        if group.settings.objective == "diffusion":
            return Inversion(self.sd, words, group.settings, compiled=self.compiled)
        targets = []
        for variant in group.words:
            photos = load_photos(variant.concept.images)[: variant.photos]
            image = self.scorer.mean_embedding(photo.open() for photo in photos)
            targets.append(ClipTarget(image, "" if variant.init == "file" else variant.init_word))
        how = {"text_encoder": self.scorer.text_encoder, "targets": targets}
        return ClipInversion(self.sd, words, group.settings, **how)

    def learn(self, group: Group, on_step: Callable[[], None]) -> None:
        """Learn the words of a group, from where an earlier process has left them.

        A word whose loss becomes infinite does not stop the others: they are learned again without it, and it
        is kept as it last was.

        Args:
            on_step: called after each step.

        Raises:
            InputError: the saved state is damaged.
        """
        if self.is_done(group):
            return
        words = []
        for word in group.words:
            self._count += 1  # a word that diverged has left its name behind
            words.append(self._word(word, f"<{word.concept.name}-{self._count}>"))
        inversion = self._inversion(words, group)
        state = self._state(group)
        if saved := read_state(state):
            try:
                inversion.load_state_dict(saved)
            except InputError as error:
                raise InputError(f"{state}: {error}; remove it") from None
        try:
            while inversion.step_count < group.settings.steps:
                inversion.step()
                wanted = any(inversion.step_count in steps for steps in group.words.values())
                if wanted or inversion.step_count % SAVE_EVERY == 0:
                    inversion.check()
                    self._keep(inversion, group)
                    tensors = {key: value.contiguous() for key, value in inversion.state_dict().items()}
                    write_atomically(state, save(tensors))
                on_step()
        except Diverged as error:
            if len(group.words) > 1:
                for word, steps in group.words.items():
                    self.learn(Group(group.settings, {word: steps}), lambda: None)
            else:
                log.warning("%s: %s", *(word.concept.name for word in group.words), error)
                self._keep(inversion, group, last=True)
        state.unlink(missing_ok=True)
        inversion.freeze()  # the rows stay in the model's table; later words should not wait for them

    def _keep(self, inversion: Inversion, group: Group, *, last: bool = False) -> None:
        """Save the words that are to be kept after this step; `last`: also in the place of all later ones."""
        now = inversion.step_count
        for i, (word, steps) in enumerate(group.words.items()):
            for n in steps:
                variant = word.after(n)
                path = self.path(variant)
                if (n == now or (last and n > now)) and not path.exists():
                    metadata = {"init_word": word.init_word, "step": str(now), "seed": str(word.seed)}
                    vectors = inversion.concept(i).vectors[: variant.active_vectors]
                    Concept(f"<{word.concept.name}>", vectors, metadata, inversion.sd.widths).save(path)
