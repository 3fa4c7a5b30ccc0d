"""Reading the files of a tokenizer, CLIP's or BERT's."""

import gzip
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..model.tokenizer import END, START, Tokenizer, byte_symbols
from ..model.wordpiece import WordPieceTokenizer
from .json_checks import JSON_LIMIT, read_json
from .reading import check_regular, naming, read_bytes

MAX_IDS = 2**20  # no public vocabulary comes near it


def read_tokenizer(path: str | Path, pad: str | None = None) -> Tokenizer:
    """Read a tokenizer folder, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or BERT's `vocab.txt`.

    A folder holds `vocab.json` and `merges.txt`, or BERT's `vocab.txt`, or `tokenizer.json` of either. The
    padding token of a CLIP comes from `special_tokens_map.json` or `tokenizer_config.json` unless `pad` names
    it. Words that were added to the vocabulary later come from `added_tokens.json` or `tokenizer.json`; `w`,
    `w_1`, `w_2`, ... are the vectors of one word w, as diffusers saves them.

    Raises:
        InputError: naming the file that is missing, damaged or of another kind of tokenizer.
    """
    path = Path(path)
    if path.name == "vocab.txt" or ((path / "vocab.txt").is_file() and not (path / "vocab.json").is_file()):
        source = path if path.name == "vocab.txt" else path / "vocab.txt"
        with naming(source, "the vocabulary of BERT"):
            lines = read_bytes(source, JSON_LIMIT).decode("utf-8").split("\n")
            vocab = {line.rstrip("\r"): i for i, line in enumerate(lines) if line}
        return WordPieceTokenizer(vocab, source=str(source))
    if not path.is_dir():
        with naming(check_regular(path), "OpenAI's bpe_simple_vocab_16e6.txt.gz"):
            return Tokenizer(*_read_openai_vocabulary(path), pad=pad or END, source=str(path))
    source = path / "tokenizer.json"
    if (path / "vocab.json").is_file():
        vocab: Any = read_json(path / "vocab.json")
        source = path / "merges.txt"
        with naming(source, "the list of merges of a tokenizer"):
            lines = read_bytes(source, JSON_LIMIT).decode("utf-8").splitlines()
            merges: Any = [line for line in lines if line.strip() and not line.startswith("#version")]
    elif source.is_file():
        model = read_json(source).get("model")
        if isinstance(model, dict) and model.get("type") == "WordPiece":
            with naming(source, "the vocabulary of BERT"):
                return WordPieceTokenizer(_check_ids(model.get("vocab")), source=str(source))
        if not isinstance(model, dict) or "merges" not in model:
            raise InputError(f"{source}: holds no byte-pair vocabulary; give the tokenizer of a CLIP")
        vocab, merges = model.get("vocab"), model["merges"]
    else:
        raise InputError(
            f"{path}: no tokenizer here (vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz)"
        )
    with naming(source, "the vocabulary of a CLIP tokenizer"):
        pairs = _check_vocabulary(vocab, merges)
    with naming(path, "a whole tokenizer"):
        added = {word: id for word, id in _added_words(path).items() if word not in vocab}
        pad = pad or _pad_token(path)
    if pad in added:  # a padding token of its own
        vocab = vocab | {pad: added.pop(pad)}
    tokenizer = Tokenizer(vocab, pairs, pad=pad, source=str(path))
    for word, id in added.items():
        ids = [id]
        while f"{word}_{len(ids)}" in added:
            ids.append(added[f"{word}_{len(ids)}"])
        tokenizer.add_placeholder(word, ids=ids, replace=True)
    return tokenizer


def _check_ids(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < MAX_IDS for i in vocab.values()):
        raise ValueError(f"not every symbol of it has an id from 0 to {MAX_IDS - 1}")
    return vocab


def _check_vocabulary(vocab: Any, merges: Any) -> list[tuple[str, str]]:
    """The merges as pairs; ValueError unless every text can be spelled with ids of the vocabulary."""
    _check_ids(vocab)
    pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]
    if not all(len(pair) == 2 and all(isinstance(half, str) for half in pair) for pair in pairs):
        raise ValueError("a merge is not a pair of symbols")
    bytes_ = byte_symbols().values()
    for symbol in (*bytes_, *(f"{symbol}</w>" for symbol in bytes_), *(a + b for a, b in pairs)):
        if symbol not in vocab:
            raise ValueError(f"the vocabulary has no {symbol!r}")
    return pairs


def _added_words(folder: Path) -> dict[str, int]:
    """The words that were added to a vocabulary -> their ids, by id."""
    added: dict[Any, Any] = {}
    if (folder / "tokenizer.json").is_file():
        entries = read_json(folder / "tokenizer.json").get("added_tokens") or []
        added |= {entry["content"]: entry["id"] for entry in entries}
    if (folder / "added_tokens.json").is_file():
        added |= read_json(folder / "added_tokens.json")
    for word, id in added.items():
        if not isinstance(word, str) or type(id) is not int or not 0 <= id < MAX_IDS:
            raise ValueError(f"the added token {str(word)[:60]!r} has the id {str(id)[:60]}")
    return dict(sorted(added.items(), key=lambda item: item[1]))


def _pad_token(folder: Path) -> str:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (pad := read_json(folder / name).get("pad_token")):
            pad = pad.get("content") if isinstance(pad, dict) else pad
            if not isinstance(pad, str):
                raise ValueError(f"the pad_token of {name} is no text")
            return pad
    return END


def _read_openai_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The merges as OpenAI published them; the vocabulary follows from their order."""
    with gzip.open(path, "rb") as file:
        lines = file.read(JSON_LIMIT).decode("utf-8").split("\n")
    symbols = list(byte_symbols().values())
    count = 49408 - 2 * len(symbols) - len((START, END))  # the file holds more merges than CLIP uses
    merges = [tuple(line.split()) for line in lines[1 : 1 + count]]
    if len(merges) < count or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"it holds fewer than {count} pairs")
    vocab = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    return {symbol: i for i, symbol in enumerate(vocab)}, merges
