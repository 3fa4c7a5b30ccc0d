"""Where the vectors of a new word start: at a word that describes the concept coarsely, or elsewhere."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..formats.concept import Concept, read_concepts
from ..model.checks import is_per_layer, is_plain
from ..model.fitting import SPECIAL, fit_word, plain_widths
from ..model.output_embedding import TextEncoderWithOutputs
from ..model.stable_diffusion import StableDiffusion
from ..model.tokenizer import Tokenizer
from .batches import generator

log = logging.getLogger(__name__)


@torch.no_grad()
def word_rows(sd: StableDiffusion, word: str, num_vectors: int = 1) -> Tensor:
    """The vectors of a word or phrase, (num_vectors, D) float32 on the CPU.

    Args:
        word: a coarse description of the concept, such as "toy", or a word that was learned before.

    Raises:
        InputError: `word` is empty, or too long.
    """
    ids = init_tokens(sd.tokenizer, word, num_vectors)
    return spread(sd.look_up(torch.tensor([ids], device=sd.device))[0], num_vectors)


def spread(vectors: Tensor, n: int) -> Tensor:
    """Spread k vectors, (k, D), over n: repeated if too few, averaged if too many. Returns (n, D) float32."""
    k = len(vectors)
    parts = [vectors[i * k // n : max((i + 1) * k // n, i * k // n + 1)] for i in range(n)]
    return torch.stack([part.float().mean(0) for part in parts]).cpu()


def initial_rows(sd: StableDiffusion, kind: str, word: str, num_vectors: int = 1, seed: int = 0) -> Tensor:
    """Where the rows of a new word start, (num_vectors, D) float32.

    Args:
        kind: "word": see `word_rows`.
            "output": the text encoder's output for `word`, spread over the vectors in the same way (Cross
            Initialization, arXiv 2312.15905). An output embedding starts there with "word", too.
            "random": drawn from the normal distribution of the vocabulary's vectors.
            "file": the vectors of a concept file at the path `word`, however many there are. With those of a
            plain word all layers of a word per layer start; an output embedding starts at the text encoder's
            output for the word.

    Raises:
        InputError: `word` is empty or of no use for that kind; a file has another number of vectors than the
            one, more than 1, that was asked for.
    """
    outputs = isinstance(sd.text_encoder, TextEncoderWithOutputs)
    if kind == "word" and not outputs:
        return word_rows(sd, word, num_vectors)
    if kind in ("word", "output"):
        ids = sd.tokenizer.encode(word)
        check_tokens(word, ids)
        rows = spread(sd.encode_prompt([word])[0, 1 : 1 + len(ids)], num_vectors)  # behind the start token
        return F.pad(rows, (rows.shape[1], 0)) if outputs else rows
    if kind == "random":
        tables = vocabulary(sd)
        mean, std = (torch.cat([f(table, dim=0) for table in tables]).cpu() for f in (torch.mean, torch.std))
        return mean + std * torch.randn(num_vectors, len(mean), generator=generator(seed, "init"))
    if kind == "file":
        rows = file_rows(sd, Path(word))
        if num_vectors not in (1, len(rows)):
            raise InputError(f"{word}: has {len(rows)} vectors, num_vectors is {num_vectors}; leave it out")
        return rows
    raise InputError(f"init {kind!r}: choose from word, output, random, file")


def file_rows(sd: StableDiffusion, path: Path) -> Tensor:
    """Where a word starts that starts from one in a file, see `initial_rows`: (num_vectors, D) float32."""
    plain = is_plain(read_concepts(path)[1][0].widths)
    concept = Concept.load(path, width=sum(plain_widths(sd.text_encoder).values()) if plain else None)
    if not plain and not isinstance(sd.text_encoder, SPECIAL):
        option = "--per-layer" if is_per_layer(concept.widths) else "--output-embedding"
        raise InputError(f"{path}: holds a word that was learned with {option}; give that option")
    if not isinstance(sd.text_encoder, TextEncoderWithOutputs):
        return fit_word(concept, sd.text_encoder, sd.unet)[1]
    known = sd.tokenizer.placeholders
    try:
        sd.add_concept(concept, replace=True)
        rows = sd.encode_prompt([concept.placeholder])[0, 1 : 1 + len(concept.vectors)].float().cpu()
    finally:
        sd.tokenizer.placeholders = known
    return F.pad(rows, (rows.shape[1], 0))


@torch.no_grad()
def vocabulary(sd: StableDiffusion) -> list[Tensor]:
    """What the vectors of learned words are compared with: vectors of the model's own words.

    Returns:
        (n, D) float32 for each of `sd.tables`: all its vectors. Where the output is replaced: what the text
        encoder gives out for about 500 words by themselves, and zeros for its input.
    """
    weights = [table.weight.float() for table in sd.tables]
    if not isinstance(sd.text_encoder, TextEncoderWithOutputs):
        return weights
    words = torch.arange(0, len(weights[0]), 1 + len(weights[0]) // 512)
    start, end = sd.tokenizer([""])[:, :2].expand(len(words), 2).T  # each (n,)
    context = sd.text_encoder(torch.stack([start, words, end], dim=1).to(sd.device)).context  # (n, 3, D)
    outputs = context[:, 1].float().split([*plain_widths(sd.text_encoder).values()], dim=1)
    return [*map(torch.zeros_like, outputs), *outputs]


def init_tokens(tokenizer: Tokenizer, phrase: str, num_vectors: int) -> list[int]:
    """The ids whose vectors a new word starts from.

    A word that the vocabulary lacks is cut into pieces, whose mean means little. Where there are too few
    vectors for one each, such a word is left out if others remain. Either way a notice says so.

    Raises:
        InputError: the phrase is empty, or too long.
    """
    words, names = list(tokenizer.pieces(phrase)), {i: name for name, i in tokenizer.vocab.items()}
    cut = {word: ids for word, ids in words if len(ids) > 1 and word not in tokenizer.placeholders}
    ids = [i for _, ids in words for i in ids]
    whole = [i for word, ids in words if word not in cut for i in ids]
    for word, pieces in cut.items() if num_vectors < len(ids) else ():
        text = ", ".join(repr(names[i].removesuffix("</w>")) for i in pieces)
        taken = "it is left out" if whole else "their mean is taken; better choose a word that it has"
        log.warning("init word %r: the vocabulary has no %r, only %s; %s", phrase, word, text, taken)
    ids = whole if whole and num_vectors < len(ids) else ids
    check_tokens(phrase, ids)
    return ids


def check_tokens(word: str, ids: list[int]) -> None:
    """Raise InputError unless these can be the tokens of an init word."""
    if not ids:
        raise InputError(f"init word {word!r} is empty; give a coarse description such as toy")
    if len(ids) > 75:
        raise InputError(f"init word {word[:60]!r} has {len(ids)} tokens; give a shorter description")
