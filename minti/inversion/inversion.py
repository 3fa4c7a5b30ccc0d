"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): learning the vectors of a word, the model frozen.

    v* = argmin_v  E || eps - eps_theta(x_t, t, c(y_v)) ||^2                              (equation 2)

The rows v of a placeholder word are the only parameters. Because nothing else changes, one batch may serve
several words that know nothing of each other: each has its own samples, its own loss and its own rows, and
learns as if it were alone, but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion, compile_for
from ..model.tokenizer import clean
from .batches import Batch, Settings, Word, longest_prompts, photo_word, sample_batch
from .divergence import DivergenceWatch
from .start import initial_rows


class Diverged(ArithmeticError):
    """The loss is no longer a finite number; the rows are those of the step before."""


class Inversion:
    """Words in the course of being learned.

    Args:
        sd: the model; the words are added to its tokenizer and text encoder.
        words: one or several.
        settings: how.
        replace: allow placeholders that mean something already.
        rank, world: which of how many processes this is; each handles its share of every batch.
        compiled: turn the loss into one compiled graph at the first step, which takes a while.
        templates: of prompts that the words will also be used in, beside those they are learned in.

    Raises:
        InputError: settings and words do not fit together, or a word does not fit into a prompt; the model
            knows none of them then.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        words: Sequence[Word],
        settings: Settings,
        *,
        replace: bool = False,
        rank: int = 0,
        world: int = 1,
        compiled: bool = False,
        templates: Sequence[str] = (),
    ) -> None:
        for word in words:
            if settings.progressive and len(word.init) != 1 + len(settings.progressive):
                raise InputError(
                    f"{word.placeholder!r} has {len(word.init)} vectors, progressive steps are for "
                    f"{1 + len(settings.progressive)}: one to start with and one more at each"
                )
        self.sd, self.words, self.settings = sd, list(words), settings
        self.rank, self.world = rank, world
        self.step_count = 0
        self.vocabulary_norm = sd.vocabulary.float().norm(dim=1).mean().item()
        self._ids_of: dict[str, Tensor] = {}
        known = dict(sd.tokenizer.placeholders)
        try:
            self.rows = [sd.add_concept(Concept(w.placeholder, w.init), replace=replace) for w in self.words]
            self.photo_rows = [self._add_photo_words(word) for word in self.words]
            for word in self.words:
                for template in (*longest_prompts(word, settings), *templates):
                    self._encode(template.replace("{}", word.placeholder))  # complains now rather than later
        except InputError:
            for name in sd.tokenizer.placeholders.keys() - known.keys():
                sd.tokenizer.remove_placeholder(name)
            sd.tokenizer.placeholders.update(known)  # where one was replaced
            raise
        groups = []
        for word, rows, photo_rows in zip(self.words, self.rows, self.photo_rows, strict=True):
            parameters = [p.requires_grad_(True) for p in (rows, *photo_rows)]
            groups.append({"params": parameters, "lr": word.lr})
        self._parameters = [p for group in groups for p in group["params"]]
        self._watch = DivergenceWatch(self._parameters, self.rows)
        self._starts = [word.init.to(sd.device) for word in self.words]
        self.optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay)
        # float16 has so small a range that gradients vanish unless the loss is scaled up.
        self.scaler = torch.amp.GradScaler(sd.device.type, enabled=sd.dtype == torch.float16)
        self._all_ids = [sd.tokenizer.placeholders[clean(word.placeholder)] for word in self.words]
        self._loss = compile_for(sd.device, self._sample_loss) if compiled else self._sample_loss
        self._extra = sd.inpainting_channels(self.words[0].latents.mean[:1])
        self._update_placeholder()

    def _add_photo_words(self, word: Word) -> list[torch.nn.Parameter]:
        """A word for each photo, starting at random, which takes up what is special about that photo."""
        if not self.settings.per_image:
            return []
        count = int(word.latents.photo.max()) + 1
        start = initial_rows(self.sd, "random", "", count, word.seed)
        return [
            self.sd.add_concept(Concept(photo_word(word, photo), start[photo : photo + 1]))
            for photo in range(count)
        ]

    def _draw(self, word: Word, count: int, *key: object) -> Batch:
        return sample_batch(word, self.settings, self.sd.schedule.config.num_train_timesteps, count, *key)

    def _losses(self, samples: Sequence[Batch]) -> Tensor:
        """The loss of each sample: words one after the other, (sum of counts,) float32."""
        x0, weight, sizes = [], [], []
        for word, s in zip(self.words, samples, strict=True):
            view, latents = self._send(s.view), word.latents
            x0.append(latents.mean[view] + latents.std[view] * self._send(s.posterior_noise))
            weight.append(latents.weight[view])
            sizes.append(latents.sizes[view])
        ids = torch.stack([self._encode(prompt) for s in samples for prompt in s.prompts])
        eps, t = torch.cat([s.eps for s in samples]), torch.cat([s.t for s in samples])
        sent = (self._send(eps), self._send(t), self._send(ids))
        return self._loss(torch.cat(x0), torch.cat(weight), *sent, torch.cat(sizes))

    def _send(self, tensor: Tensor) -> Tensor:
        """To the model's device, without waiting for what it is doing."""
        if self.sd.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.sd.device, non_blocking=True)

    def _sample_loss(
        self, x0: Tensor, weight: Tensor, eps: Tensor, t: Tensor, ids: Tensor, sizes: Tensor
    ) -> Tensor:
        """|| target - eps_theta(x_t, t, c(ids)) ||^2: x0, weight, eps (B, ., h, w), t (B,), ids (B, 77)."""
        schedule = self.sd.schedule
        x_t = schedule.q_sample(x0, eps, t).to(self.sd.dtype)
        x_t = torch.cat([x_t, *(extra.expand(len(x_t), -1, -1, -1) for extra in self._extra)], dim=1)
        prediction = self.sd.unet(x_t, t, *self.sd.condition(ids, sizes)).float()
        error = weight * (prediction - schedule.target(x0, eps, t)) ** 2  # (B, C, h, w)
        return error.mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3)).clamp(min=1e-6)

    def _encode(self, prompt: str) -> Tensor:
        """Token ids of a prompt, (77,), found once."""
        if prompt not in self._ids_of:
            self._ids_of[prompt] = self.sd.tokenizer(prompt)[0]
        return self._ids_of[prompt]

    def _update_placeholder(self) -> None:
        """Progressive extension: let prompts use as many vectors of each word as are in play at this step."""
        if not self.settings.progressive:
            return
        for word, ids in zip(self.words, self._all_ids, strict=True):
            used, placeholders = ids[: self._num_active()], self.sd.tokenizer.placeholders
            if placeholders[clean(word.placeholder)] != used:
                placeholders[clean(word.placeholder)] = used
                self._ids_of.clear()

    def _num_active(self) -> int:
        return 1 + sum(self.step_count >= step for step in self.settings.progressive)

    def active_vectors(self, index: int) -> Tensor:
        """The vectors of a word that prompts use at this step, (n, D) float32."""
        return self.rows[index][: self._num_active()] if self.settings.progressive else self.rows[index]

    def step(self, *, check: bool | None = None) -> Tensor:
        """One update. Returns the loss of each word, (words,) float32.

        Args:
            check: whether to wait for the result and `check` it at once; by default on the CPU only, since a
                GPU that is waited for stands idle afterwards. Then it is for the caller to check, some time.

        Raises:
            Diverged: see `check`.
        """
        settings, n = self.settings, self.settings.batch_size
        total = n * settings.accumulate * self.world
        drawn = [self._draw(word, total, self.step_count) for word in self.words]
        losses = torch.zeros(len(self.words), device=self.sd.device)
        self.optimizer.zero_grad(set_to_none=False)
        for i in range(settings.accumulate):
            first = (i * self.world + self.rank) * n
            loss = self._losses([s[first : first + n] for s in drawn]).view(len(self.words), n).sum(1) / total
            self.scaler.scale(loss.sum()).backward()
            losses += loss.detach()
        if self.rank == 0 and settings.regularization:
            pairs = zip(self.rows, self._starts, strict=True)
            drift = [(rows - start).square().sum(1).mean() for rows, start in pairs]
            self.scaler.scale(settings.regularization * sum(drift)).backward()
        if self.world > 1:
            for tensor in (losses, *(p.grad for p in self._parameters)):
                dist.all_reduce(tensor)
        # With a scaled loss, gradients may overflow: the scaler then leaves out the step and scales less.
        scaled = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        self._watch.check_finite([losses] if scaled else [losses, *(p.grad for p in self._parameters)])
        self._watch.remember()
        for group, word in zip(self.optimizer.param_groups, self.words, strict=True):
            group["lr"] = word.lr * settings.lr_factor(self.step_count)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if settings.max_norm is not None:
            for p in self._parameters:
                p.data.renorm_(2, 0, settings.max_norm * self.vocabulary_norm)
        self._watch.check_finite(self._parameters)
        if settings.progressive:
            for start, rows in zip(self._starts, self.rows, strict=True):
                waiting = slice(self._num_active(), None)
                rows.data[waiting] = start[waiting]  # weight decay has been at them
        self._watch.count_step()
        self.step_count += 1
        self._update_placeholder()
        if check or (check is None and self.sd.device.type == "cpu"):
            self.check()
        return losses

    def check(self) -> None:
        """See that all went well in the steps so far.

        Raises:
            Diverged: a loss was not finite; the rows are the last ones for which it was.
        """
        if self._watch.healthy():
            return
        self.step_count = int(self._watch.good_steps)
        longest, index = self._watch.longest.max(0)
        longest = longest.item() / self.vocabulary_norm
        if self.step_count == 0:
            cause = "weights of the checkpoint or pictures hold no finite numbers"
        elif not longest < 20:
            word = self.words[index].placeholder
            cause = f"a vector of {word!r} has become {longest:.0f} times too long: "
            cause += "lower the learning rate, or set max_norm"
        elif self.sd.dtype == torch.float16:
            cause = "the model overflows in float16: use bfloat16 or float32"
        else:
            cause = "the learning rate is too high"
        raise Diverged(f"step {self.step_count + 1}: the loss is not finite; probably {cause}")

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The loss of each word on samples that are always the same, (words,) float32.

        The loss of a training step says little, since it depends mostly on which time steps and noise were
        drawn. With these fixed, it shows how the word gets better (DVAR, arXiv 2302.04841).
        """
        n, size, sums = self.settings.batch_size, self.settings.eval_size, 0
        drawn = [self._draw(word, size, "evaluation", self.settings.eval_seed) for word in self.words]
        for first in range(0, size, n):
            losses = self._losses([s[first : first + n] for s in drawn])
            sums = sums + losses.view(len(self.words), -1).sum(1)
        self._watch.check_finite([sums])
        self.check()
        return sums / size

    def concept(self, index: int, metadata: dict[str, str] | None = None) -> Concept:
        """A word as it is now, with the vectors that are in play."""
        rows = self.active_vectors(index).detach().cpu().clone()
        return Concept(self.words[index].placeholder, rows, metadata or {})

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes in the course of learning."""
        state = {"step": torch.tensor(self.step_count)}
        for i, group in enumerate(self.optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                state[f"{i}.{j}.rows"] = p.detach()
                state |= {f"{i}.{j}.{key}": value for key, value in self.optimizer.state[p].items()}
        scaler = {key: torch.tensor(float(value)) for key, value in self.scaler.state_dict().items()}
        return state | {f"scaler.{key}": value for key, value in scaler.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken."""
        self.step_count = int(state["step"])
        self._watch.good_steps.fill_(self.step_count)
        for i, group in enumerate(self.optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                p.copy_(state[f"{i}.{j}.rows"])
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{i}.{j}.{key}" in state]
                # AdamW keeps its count of steps on the CPU.
                places = {"step": torch.device("cpu")}
                self.optimizer.state[p] = {k: state[f"{i}.{j}.{k}"].to(places.get(k, p.device)) for k in keys}
        scaler = {
            key.removeprefix("scaler."): v.item() for key, v in state.items() if key.startswith("scaler.")
        }
        if scaler:
            scaler |= {key: int(scaler[key]) for key in ("growth_interval", "_growth_tracker")}
            self.scaler.load_state_dict(scaler)
        self._update_placeholder()
