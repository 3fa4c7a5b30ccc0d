"""Reading the files of a CLIP tokenizer."""

from __future__ import annotations

import gzip
from pathlib import Path

from ..errors import InputError
from ..model.tokenizer import END, START, Tokenizer, byte_symbols
from .json_checks import read_json


def read_tokenizer(path: str | Path, pad: str | None = None) -> Tokenizer:
    """Read a tokenizer folder, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`.

    A folder holds `vocab.json` and `merges.txt`, or `tokenizer.json`; the padding token comes from
    `special_tokens_map.json` or `tokenizer_config.json` unless `pad` names it, and words that were added
    to the vocabulary later from `added_tokens.json`.

    Raises:
        InputError: naming the file that is missing or cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return Tokenizer(*_read_openai_vocabulary(path), pad=pad or END, source=str(path))
    if (path / "vocab.json").is_file():
        vocab = read_json(path / "vocab.json")
        lines = _read_text(path / "merges.txt").splitlines()
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    elif (path / "tokenizer.json").is_file():
        model = read_json(path / "tokenizer.json").get("model", {})
        vocab, merges = model.get("vocab"), model.get("merges")
        if not isinstance(vocab, dict) or not merges:
            raise InputError(f"{path / 'tokenizer.json'}: holds no byte-pair vocabulary")
        merges = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]
    else:
        raise InputError(
            f"{path}: no tokenizer here (vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz)"
        )
    tokenizer = Tokenizer(vocab, merges, pad=pad or _pad_token(path), source=str(path))
    if (path / "added_tokens.json").is_file():
        for word, token_id in sorted(read_json(path / "added_tokens.json").items(), key=lambda item: item[1]):
            if word not in vocab:
                tokenizer.add_placeholder(word, ids=[token_id], replace=True)
    return tokenizer


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: missing; copy the whole tokenizer folder") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file; download it again") from None


def _pad_token(folder: Path) -> str:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (pad := read_json(folder / name).get("pad_token")):
            return pad["content"] if isinstance(pad, dict) else pad
    return END


def _read_openai_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The merges as OpenAI published them; the vocabulary follows from their order."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError):
        raise InputError(f"{path}: is not OpenAI's bpe_simple_vocab_16e6.txt.gz; download it again") from None
    symbols = list(byte_symbols().values())
    count = 49408 - 2 * len(symbols) - len((START, END))  # the file holds more merges than CLIP uses
    merges = [tuple(line.split()) for line in lines[1 : 1 + count]]
    if len(merges) < count or any(len(pair) != 2 for pair in merges):
        raise InputError(f"{path}: is not OpenAI's bpe_simple_vocab_16e6.txt.gz; download it again")
    vocab = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    return {symbol: i for i, symbol in enumerate(vocab)}, merges
