"""The words of a study, learned in batches, each kept as it is finished."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ..errors import InputError
from ..formats.atomic import write_atomically
from ..formats.concept import Concept
from ..formats.photos import load_photos
from ..inversion.batches import Word
from ..inversion.inversion import Diverged, Inversion
from ..inversion.start import initial_rows
from ..inversion.templates import load_templates
from ..inversion.views import Latents, encode_views, make_views
from ..model.stable_diffusion import StableDiffusion
from .variants import Group, Variant

log = logging.getLogger(__name__)


SAVE_EVERY = 250  # steps between savings of a batch that is not finished


class Learner:
    """Learns groups of words with one model.

    Args:
        folder: for `words/`, the finished words, and `learning/`, batches on the way.
        compiled: see `Inversion`.
    """

    def __init__(self, sd: StableDiffusion, folder: Path, compiled: bool = False) -> None:
        self.sd, self.folder, self.compiled = sd, Path(folder), compiled
        self._latents: dict[tuple, Latents] = {}
        self._count = 0

    def path(self, run: Variant, steps: int) -> Path:
        """The file of a word after so many steps."""
        return self.folder / "words" / run.key / f"step-{steps:06d}.safetensors"

    def is_done(self, group: Group) -> bool:
        """Whether all words of a group are finished."""
        return all(self.path(run, n).exists() for run, steps in group.runs.items() for n in steps)

    def steps_left(self, group: Group) -> int:
        """How many steps there are still to take."""
        if self.is_done(group):
            return 0
        try:
            with safe_open(self._state(group), framework="pt") as file:
                return group.settings.steps - int(file.get_tensor("step"))
        except (OSError, SafetensorError):
            return group.settings.steps

    def _state(self, group: Group) -> Path:
        return self.folder / "learning" / f"{group.key}.safetensors"

    def check(self, run: Variant) -> None:
        """See that a word can be learned, before anything is. Raises InputError."""
        self._word(run, run.target.name)

    def _word(self, run: Variant, placeholder: str) -> Word:
        """Photos to latents, the init word to rows."""
        photos = load_photos(run.target.images)
        if (run.photos or 0) > len(photos):
            raise InputError(
                f"{run.target.images}: has {len(photos)} photos, the study asks for {run.photos}"
            )
        key = (run.target.images, run.photos, run.crop, run.flip, run.seed if run.crop == "random" else None)
        if key not in self._latents:
            views = make_views(
                photos[: run.photos], self.sd.image_size[0], crop=run.crop, flip=run.flip, seed=run.seed
            )
            self._latents[key] = encode_views(self.sd, views)
        return Word(
            placeholder,
            initial_rows(self.sd, run.init, run.init_word, run.num_vectors, run.seed),
            self._latents[key],
            load_templates(run.templates),
            [photo.caption for photo in photos[: run.photos]],
            lr=run.lr,
            seed=run.seed,
        )

    def learn(self, group: Group, tick: Callable[[], None]) -> None:
        """Learn the words of a group, from where they are; `tick` is called after each step.

        A word whose loss becomes infinite does not stop the others: they are learned again without it, and it
        is kept as it last was.
        """
        if self.is_done(group):
            return
        words = []
        for run in group.runs:
            self._count += 1  # a word that diverged has left its name behind
            words.append(self._word(run, f"<{run.target.name}-{self._count}>"))
        inversion = Inversion(self.sd, words, group.settings, compiled=self.compiled)
        state = self._state(group)
        if state.exists():
            try:
                inversion.load_state_dict(load_file(state))
            except (SafetensorError, KeyError) as error:
                raise InputError(f"{state}: is damaged ({error}); remove it") from None
        try:
            while inversion.step_count < group.settings.steps:
                inversion.step()
                wanted = any(inversion.step_count in steps for steps in group.runs.values())
                if wanted or inversion.step_count % SAVE_EVERY == 0:
                    inversion.check()
                    self._keep(inversion, group)
                    tensors = {key: value.contiguous() for key, value in inversion.state_dict().items()}
                    write_atomically(state, save(tensors))
                tick()
        except Diverged as error:
            if len(group.runs) > 1:
                for run, steps in group.runs.items():
                    self.learn(Group(group.settings, {run: steps}), lambda: None)
            else:
                log.warning("%s: %s", *(run.target.name for run in group.runs), error)
                self._keep(inversion, group, last=True)
        state.unlink(missing_ok=True)
        for rows in (*inversion.rows, *(p for words in inversion.photo_rows for p in words)):
            rows.requires_grad_(False)  # they stay in the model's table; later words should not wait for them

    def _keep(self, inversion: Inversion, group: Group, *, last: bool = False) -> None:
        """Save what is wanted of the words after this step; `last`: and in the place of all later ones."""
        now = inversion.step_count
        for i, (run, steps) in enumerate(group.runs.items()):
            for n in steps:
                path = self.path(run, n)
                if (n == now or (last and n > now)) and not path.exists():
                    metadata = {"init_word": run.init_word, "step": str(now), "seed": str(run.seed)}
                    vectors = inversion.concept(i).vectors[: run.after(n).vectors_in_play]
                    Concept(f"<{run.target.name}>", vectors, metadata).save(path)
