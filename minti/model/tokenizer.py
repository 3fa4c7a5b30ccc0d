"""CLIP's tokenizer: byte-pair encoding (Sennrich et al., arXiv 1508.07909) of bytes, and placeholder words.

A prompt is cleaned and cut into words by `PATTERN`. The bytes of every word, in UTF-8, are joined pair by
pair, in the order in which the pairs were learned (`merge`). The last symbol of a word carries the mark
`</w>`:

    "hugging a cat"  ->  "hugging</w>" "a</w>" "cat</w>"  ->  [49406, 27058, 320, 2368, 49407, 49407, ...]

A placeholder word, such as "<toy>", is found in the cleaned prompt before any of that, and stands for ids of
its own.
"""

import html
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

import ftfy
import regex
import torch
from torch import Tensor

from .placeholders import check_cut, check_placeholder, check_text, check_vocabulary, words_pattern

START, END = "<|startoftext|>", "<|endoftext|>"
PROMPT_LENGTH = 77  # tokens, with start and end
PATTERN = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def byte_symbols() -> dict[int, str]:
    """A printable character for each of the 256 bytes, so that merges can be written down as text.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from code 256 on.
    The order is that of CLIP's vocabulary: the printable ones first.
    """
    printable = [b for first, last in ("!~", "¡¬", "®ÿ") for b in range(ord(first), ord(last) + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def clean(text: str) -> str:
    """Mend broken Unicode, unescape HTML (twice, as web captions need), squeeze blanks, lower the case.

    Raises:
        InputError: see `check_text`.
    """
    check_text(text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


def merge(parts: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: join the pair learned earliest, everywhere, until none is left.

    >>> merge(["h", "u", "g", "s</w>"], {("u", "g"): 0, ("h", "ug"): 1, ("g", "s</w>"): 2})
    ['hug', 's</w>']

    The first round joins "u" and "g", the second "h" and "ug"; then "g" and "s</w>" are no neighbours any
    more. The ranks tell of each pair when it was learned.
    """
    parts = list(parts)
    while known := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
        first, joined = min(known, key=ranks.__getitem__), []
        for part in parts:
            # A symbol that was made in this round is longer than first[0], so it is not joined again.
            if joined and (joined[-1], part) == first:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return parts


class Tokenizer:
    """Text to token ids, exactly as OpenAI's CLIP does it.

    Args:
        vocab: symbol -> id.
        merges: the learned pairs, the first learned first.
        pad: the token that fills up short prompts; SD 1.x uses the end token, SD 2.x "!" (id 0).
        source: where the vocabulary came from, for messages.

    Attributes:
        placeholders: cleaned placeholder word -> its ids. Set it as a whole to change it.
        unknown_id: the id of words that the vocabulary cannot spell; None: it spells every word.
    """

    kind, start, end = "CLIP", START, END
    unknown_id: int | None = None

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        pad: str = END,
        source: str = "tokenizer",
    ) -> None:
        check_vocabulary(vocab, (self.start, self.end, pad), source, self.kind)
        self.vocab = vocab
        self.start_id, self.end_id, self.pad_id = vocab[self.start], vocab[self.end], vocab[pad]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.symbols = byte_symbols()
        self._word_ids = lru_cache(maxsize=65536)(self._encode_word)
        self.placeholders = {}

    def __len__(self) -> int:
        """One more than the largest id in use."""
        return 1 + max([*self.vocab.values(), *(i for ids in self.placeholders.values() for i in ids)])

    @property
    def placeholders(self) -> Mapping[str, list[int]]:
        return MappingProxyType(self._placeholders)

    @placeholders.setter
    def placeholders(self, placeholders: Mapping[str, Iterable[int]]) -> None:
        self._placeholders = {word: list(ids) for word, ids in placeholders.items()}
        self._placeholder_pattern = words_pattern(self._placeholders)
        self._prompt_ids = lru_cache(maxsize=10_000)(self._encode_prompt)

    def add_placeholder(self, word: str, ids: Iterable[int], *, replace: bool = False) -> None:
        """Let a word stand for the given ids, one for each of its vectors, wherever it stands alone.

        Args:
            word: any text without line breaks, "<toy>", "*", "sks-7"; see `words_pattern`.
            ids: consecutive ids above the vocabulary, normally.
            replace: allow a word that means something already.

        Raises:
            InputError: an empty word; or, unless `replace` is set, one that is in use, or a word of the
                vocabulary (such as "cat", which would lose its meaning).
        """
        key = clean(word)
        check_placeholder(word, key, self, replace)
        self.placeholders = self.placeholders | {key: ids}

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in (START, END):
            return (self.vocab[word],)
        parts = [self.symbols[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        return tuple(self.vocab[part] for part in merge(parts, self.ranks))

    def pieces(self, text: str) -> Iterator[tuple[str, Sequence[int]]]:
        """(word, ids) for each word and placeholder of a prompt."""
        text = clean(text)
        for i, segment in enumerate(self._placeholder_pattern.split(text) if self.placeholders else [text]):
            if i % 2:  # splitting by a group gives text and placeholders in turn
                yield segment, self.placeholders[segment]
            else:
                for word in PATTERN.findall(segment):
                    yield word, self._word_ids(word)

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start, end and padding."""
        return [i for _, ids in self.pieces(text) for i in ids]

    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """Encode prompts as the text encoder wants them.

        A prompt that is too long is cut, keeping the end token, with one warning that quotes what was lost.

        Returns:
            (B, 77) int64: start token, words, end token, padding.

        Raises:
            InputError: a placeholder word does not fit, since without it the picture would be another.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return torch.stack([self._prompt_ids(prompt) for prompt in prompts])

    def _encode_prompt(self, prompt: str) -> Tensor:
        pieces, room = list(self.pieces(prompt)), PROMPT_LENGTH - 2
        ids = [i for _, ids in pieces for i in ids]
        if len(ids) > room:
            check_cut(prompt, pieces, room, self.placeholders)
        return self.frame(ids[:room])

    def frame(self, ids: Sequence[int]) -> Tensor:
        """The row of 77 ids for up to 75 ids of words."""
        ids = [self.start_id, *ids, self.end_id]
        return torch.tensor(ids + [self.pad_id] * (PROMPT_LENGTH - len(ids)))
