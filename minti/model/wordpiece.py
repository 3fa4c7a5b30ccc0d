"""BERT's tokenizer: greedy WordPiece over lower-case text without accents (arXiv 1810.04805).

A prompt is cut at white space and around punctuation, and every word is split from the left into the longest
pieces that the vocabulary holds; pieces that continue a word begin with "##":

  "Photo of a sks."  ->  "photo" "of" "a" "sk" "##s" "."  ->  [101, 6302, 1997, 1037, 15315, 2015, 1012, 102]

The ids equal those of the Rust package `tokenizers` for BERT, which differs from the original Python code in
a few rare characters. Only marks and punctuation that Unicode has added since version 8 may differ, because
Python knows them and that package does not. The first latent diffusion model (`bert.py`) was trained with
this tokenizer.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from unicodedata import category

import regex

from .placeholders import check_vocabulary
from .tokenizer import Tokenizer, clean

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = regex.compile("(" + "|".join(map(regex.escape, (PAD, UNKNOWN, START, END, MASK))) + ")")
LONGEST_WORD = 100  # characters; a longer one is unknown
# Chinese characters are words by themselves. One range begins later than in the original code.
CHINESE = regex.compile(
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)


def normalize(text: str) -> str:
    """Lower-case text without accents and control characters, with spaces around Chinese characters."""
    kept = (c for c in text if c in "\t\n\r" or (c != "\ufffd" and category(c) not in ("Cc", "Cf", "Co")))
    text = CHINESE.sub(r" \1 ", "".join(" " if c.isspace() else c for c in kept))
    text = "".join(c for c in unicodedata.normalize("NFD", text) if category(c) != "Mn")
    return "".join(c.lower() for c in text)  # one by one: no special sigma at the end of a Greek word


def is_punctuation(character: str) -> bool:
    """ASCII symbols such as "+" count as punctuation as well, although Unicode does not call them that."""
    return category(character).startswith("P") or (character.isascii() and category(character)[0] == "S")


def split_words(text: str) -> list[str]:
    """The words of a normalised text; every punctuation character is a word.

    split_words("a cat's toy.")  ->  ["a", "cat", "'", "s", "toy", "."]
    """
    return "".join(f" {c} " if is_punctuation(c) else c for c in text).split()


def split_word(word: str, vocab: Mapping[str, int]) -> list[str]:
    """The longest pieces of the vocabulary that make up a word, from the left, or [UNK].

    split_word("sks", vocab)  ->  ["sk", "##s"]
    """
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if prefix + word[start:end] in vocab), None)
        if end is None or len(word) > LONGEST_WORD:
            return [UNKNOWN]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


class WordPieceTokenizer(Tokenizer):
    """Text to BERT's token ids, with placeholder words as in `Tokenizer`.

    Args:
        vocab: piece -> id.
        source: where the vocabulary came from, for messages.

    Raises:
        InputError: the vocabulary lacks a special token, so it is not BERT's.
    """

    kind, start, end = "BERT", START, END

    def __init__(self, vocab: dict[str, int], source: str = "tokenizer") -> None:
        super().__init__(vocab, merges=(), pad=PAD, source=source)
        check_vocabulary(vocab, [UNKNOWN], source, self.kind)
        self.unknown_id = vocab[UNKNOWN]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        return tuple(self.vocab[piece] for piece in split_word(word, self.vocab))

    def pieces(self, text: str) -> Iterator[tuple[str, Sequence[int]]]:
        """(word, ids) for each word and placeholder of a prompt.

        Placeholders are looked for in the prompt as it is, since normalising takes it to pieces.
        """
        pattern = regex.compile(self._placeholder_pattern.pattern, regex.IGNORECASE)
        for i, segment in enumerate(pattern.split(text) if self.placeholders else [text]):
            if i % 2:  # splitting by a group gives text and placeholders in turn
                yield segment, self.placeholders[clean(segment)]
                continue
            for j, part in enumerate(SPECIAL.split(segment)):
                if j % 2:
                    yield part, (self.vocab.get(part, self.unknown_id),)
                    continue
                for word in split_words(normalize(part)):
                    yield word, self._word_ids(word)
