"""Learn a CLIP-style byte-level BPE vocabulary from captions and write it in CLIP's file format.

The ids follow CLIP's own order: 256 byte symbols, the same 256 at the end of a word (`</w>`), one for each
merge in the order of learning, `<|startoftext|>`, `<|endoftext|>`.
"""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from minti.model.tokenizer import END, PATTERN, START, byte_symbols, clean


def learn(captions: Iterable[str], limit: int) -> list[tuple[str, str]]:
    """The merges, most frequent pair first (Sennrich et al. 2016, arXiv 1508.07909), ties by spelling.

    Stops at `limit` merges, or earlier, when every word that occurs twice is a single symbol.
    """
    symbols = byte_symbols()
    counts: Counter[str] = Counter()
    for text in captions:
        counts.update(PATTERN.findall(clean(text)))
    words = {}
    for word, count in counts.items():
        *front, last = [symbols[b] for b in word.encode("utf-8")]
        words[(*front, last + "</w>")] = count
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        if pairs[best] < 2:
            break
        merges.append(best)
        merged: dict[tuple[str, ...], int] = {}
        for word, count in words.items():
            new: list[str] = []
            for symbol in word:
                if new and (new[-1], symbol) == best:
                    new[-1] += symbol
                else:
                    new.append(symbol)
            merged[tuple(new)] = merged.get(tuple(new), 0) + count
        words = merged
    return merges


def write(folder: Path, merges: list[tuple[str, str]]) -> None:
    """vocab.json, merges.txt and the two small files that transformers' CLIPTokenizer wants beside them."""
    base = list(byte_symbols().values())
    tokens = [*base, *(s + "</w>" for s in base), *("".join(pair) for pair in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
