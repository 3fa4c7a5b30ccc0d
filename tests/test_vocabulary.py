"""Tokenizer files: words that were saved with a pipeline, and files that are damaged."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from minti.errors import InputError
from minti.formats.json_checks import JSON_LIMIT
from minti.formats.vocabulary import read_tokenizer

from .oracles import save_folder, write_tokenizer

WORDS = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<dog>"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StableDiffusionPipeline]:
    """A pipeline with learned words, as `--save_as_full_pipeline` of diffusers leaves it."""
    root = tmp_path_factory.mktemp("saved")
    pipe = StableDiffusionPipeline.from_pretrained(save_folder(root / "model", "small"), safety_checker=None)
    pipe.tokenizer.add_tokens(WORDS)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    pipe.save_pretrained(root / "with-words")
    return root / "with-words", pipe


PROMPTS = ["a photo of <cat-toy>", "<dog> and <cat-toy>, on grass", "a <cat-toy>_1 the cat", "the dog"]


@pytest.mark.parametrize("slow", [False, True])
def test_words_of_a_saved_pipeline(slow: bool, saved: tuple, tmp_path: Path) -> None:
    """The ids are those of diffusers, which spells a word of three vectors out before it encodes it."""
    path, pipe = saved
    path = Path(shutil.copytree(path / "tokenizer", tmp_path / "tokenizer"))
    assert (path / "tokenizer.json").exists()
    if slow:
        entries = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
        added = {entry["content"]: entry["id"] for entry in entries}
        (path / "tokenizer.json").unlink()
        write_tokenizer(path)
        (path / "added_tokens.json").write_text(json.dumps({word: added[word] for word in WORDS}))
    ours = read_tokenizer(path)
    for prompt in PROMPTS:
        spelled = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
        theirs = pipe.tokenizer(spelled, padding="max_length", truncation=True, max_length=77).input_ids
        assert ours(prompt)[0].tolist() == theirs, prompt
    assert ours.placeholders["<cat-toy>"] == pipe.tokenizer.convert_tokens_to_ids(WORDS[:3])


def test_special_tokens_among_the_added_ones_are_no_words(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "added_tokens.json").write_text(json.dumps({"!": 0, "<|endoftext|>": vocab["<|endoftext|>"]}))
    assert read_tokenizer(folder).placeholders == {}


def test_a_padding_token_of_its_own(folder: Path) -> None:
    size = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    theirs = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    ours = read_tokenizer(folder)
    assert ours("a cat")[0].tolist() == theirs("a cat", padding="max_length").input_ids
    assert ours("a cat")[0, -1] == size and ours.placeholders == {}


def refused(folder: Path, name: str) -> str:
    with pytest.raises(InputError) as caught:
        read_tokenizer(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and name in message
    return message


BAD: dict[str, list[Any]] = {
    "vocab.json": [{}, [], 3, {"a": "1"}, {"a": [1]}, {"a": 10**18}, {"a": -1}, {"a": True}, {"a": None}],
    "added_tokens.json": [[], {"<x>": "1"}, {"<x>": 10**18}, {"<x>": -1}, {"<x>": [3]}, {"<x>": None}],
    "special_tokens_map.json": [[], {"pad_token": 3}, {"pad_token": [1]}, {"pad_token": {"content": 1}}],
    "tokenizer_config.json": [[], {"pad_token": {"content": [1]}}, {"pad_token": "[NONE]"}],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in BAD for content in BAD[name]])
def test_files_of_other_types(name: str, content: Any, folder: Path) -> None:
    if name == "tokenizer_config.json":
        (folder / "special_tokens_map.json").unlink()
    (folder / name).write_text(json.dumps(content))
    refused(folder, str(folder))


@pytest.mark.parametrize("content", ["a\n", "a b c\n", "xx yy\n", "\udc80", "p h\n" * 3 + "q\n"])
def test_merges_that_are_none(content: str, folder: Path) -> None:
    (folder / "merges.txt").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(folder, "merges.txt")


def fast(folder: Path) -> dict[str, Any]:
    """The same tokenizer in one file, as transformers 5 writes it."""
    CLIPTokenizer.from_pretrained(folder, model_max_length=77).save_pretrained(folder)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink(missing_ok=True)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def test_a_fast_tokenizer_without_parts_or_with_others(folder: Path) -> None:
    good = fast(folder)
    path, prompts = folder / "tokenizer.json", ["a photo of the cat", "é!"]
    expected = read_tokenizer(write_tokenizer(folder / "slow"))(prompts)
    assert torch.equal(read_tokenizer(folder)(prompts), expected)
    model = good["model"]
    for content in (
        {},
        {"model": 3},
        {"model": {}},
        good | {"model": model | {"vocab": None}},
        good | {"model": model | {"merges": None}},
        good | {"model": model | {"merges": 3}},
        good | {"model": model | {"merges": [3]}},
        good | {"model": model | {"merges": [[1, 2]]}},
        good | {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}},
        good | {"added_tokens": 3},
        good | {"added_tokens": [3]},
        good | {"added_tokens": [{"content": "<x>"}]},
        good | {"added_tokens": [{"content": "<x>", "id": "3"}]},
    ):
        path.write_text(json.dumps(content))
        refused(folder, str(folder))


def test_sizes_are_bounded(folder: Path, tmp_path: Path) -> None:
    with (folder / "merges.txt").open("wb") as file:
        file.truncate(JSON_LIMIT + 1)
    refused(folder, "merges.txt")
    (folder / "vocab.json").write_text("[" * 200_000)
    refused(folder, "vocab.json")


def test_damaged_vocabularies_of_openai(tmp_path: Path) -> None:
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    good = gzip.compress("\n".join(["#version"] + [f"a{i} b" for i in range(48894)]).encode())
    for content in (b"", b"text", good[:1000], good[:-20], good[:500] + b"\xff" * 40 + good[540:]):
        path.write_bytes(content)
        refused(path, path.name)
    path.write_bytes(gzip.compress(b"too short"))
    refused(path, "fewer than 48894 pairs")
    path.write_bytes(gzip.compress(bytes(2 * JSON_LIMIT)))  # unpacks to more than is read
    refused(path, path.name)
