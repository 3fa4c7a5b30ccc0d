"""The tokenizer against OpenAI's recorded answers and transformers' implementation."""

import doctest
import gzip
import json
import logging
import random
import unicodedata

import ftfy
import pytest
import torch
from transformers import CLIPTokenizer

from minti.errors import InputError
from minti.formats.vocabulary import read_tokenizer
from minti.model import tokenizer as module
from minti.model.conditioning import encode_parts
from minti.model.tokenizer import Tokenizer, clean, merge

from .oracles import shared, write_tokenizer


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return read_tokenizer(shared("clip-bpe/bpe_simple_vocab_16e6.txt.gz"))


@pytest.fixture
def small(tmp_path) -> Tokenizer:
    return read_tokenizer(write_tokenizer(tmp_path))


@pytest.fixture(scope="module")
def reference(clip, tmp_path_factory) -> CLIPTokenizer:
    """transformers' tokenizer on the same vocabulary, written out in the Hugging Face files."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(clip.vocab), encoding="utf-8")
    merges = sorted(clip.ranks, key=clip.ranks.get)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def test_openai_cases(clip):
    cases = json.loads(shared("tokenizer_cases.json").read_text())["cases"]
    wrong = [case["text"] for case in cases if clip.encode(case["text"]) != case["ids"]]
    assert len(cases) > 200 and wrong == []


def random_texts(count: int) -> list[str]:
    """Strings of words, digits, punctuation, contractions, emoji and scripts of all kinds, up to 300 long."""
    rng = random.Random(0)
    scripts = [
        (0x20, 0x7E),
        (0xA1, 0x24F),
        (0x370, 0x5FF),
        (0x900, 0x97F),
        (0x3040, 0x30FF),
        (0x4E00, 0x9FFF),
    ]
    scripts += [(0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x2000, 0x2BFF)]
    words = [
        "a",
        "photo",
        "of",
        "cat's",
        "they'll",
        "I'M",
        "we've",
        "don't",
        "3",
        "2024",
        "1/2",
        "<toy>",
        "*",
    ]
    words += ["@home", "#tag", "e.g.", "...", "!!!", "co-op", "8K", "naïve", "</w>", "''s"]

    def piece() -> str:
        if rng.random() < 0.5:
            return rng.choice(words)
        low, high = rng.choice(scripts)
        letters = [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))]
        return "".join(c for c in letters if unicodedata.category(c) != "Cn")

    return [
        rng.choice(["", " "]).join(piece() + " " for _ in range(rng.randint(0, 40))) for _ in range(count)
    ]


def test_transformers_on_thousands_of_strings(clip, reference):
    # transformers 5 leaves out how OpenAI's tokenizer cleans a text, so both are given clean ones.
    texts = [text for text in map(clean, random_texts(2000)) if text == ftfy.fix_text(text)]
    assert len(texts) > 1500
    expected = reference(texts, padding="max_length", truncation=True)["input_ids"]
    wrong = [t for t, ids in zip(texts, expected, strict=True) if clip(t)[0].tolist() != ids]
    assert wrong == []


def test_html_mojibake_and_case(clip):
    assert clip.encode("Fish &amp;amp; Chips") == clip.encode("fish & chips")
    assert clip.encode("schÃ¶n") == clip.encode("schön")
    assert clip.encode("  a\n\tCAT ") == clip.encode("a cat")


def test_both_file_formats_agree(clip, reference):
    assert read_tokenizer(reference.name_or_path).vocab == clip.vocab
    assert read_tokenizer(reference.name_or_path).ranks == clip.ranks


def test_tokenizer_json_of_transformers_5(reference, clip, tmp_path):
    reference.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    loaded = read_tokenizer(tmp_path)
    assert loaded.vocab == clip.vocab and loaded.ranks == clip.ranks


def test_shape_and_padding(small, tmp_path):
    rows = small(["the cat", ""])
    assert rows.shape == (2, 77) and rows.dtype == torch.int64
    assert rows[1].tolist() == [small.start_id] + [small.end_id] * 76
    padded_with_zero = read_tokenizer(write_tokenizer(tmp_path / "sd2", pad="!"))(["the cat"])[0]
    assert padded_with_zero[:4].tolist() == rows[0, :4].tolist() and set(padded_with_zero[4:].tolist()) == {0}


def test_exclamation_mark_is_a_word(clip, reference):
    """Padding with "!", as SD 2.x does, transformers takes the mark for padding; open_clip does not."""
    assert clip.encode("hello!") == [3306, 256]
    clip_like_transformers = read_tokenizer(reference.name_or_path, pad="!")
    clip_like_transformers.add_placeholder("!", [0])
    padded = CLIPTokenizer.from_pretrained(reference.name_or_path, model_max_length=77, pad_token="!")
    ids = padded(["hello! you"], padding="max_length")["input_ids"]
    assert clip_like_transformers(["hello! you"]).tolist() == ids


def test_too_long_prompt_keeps_the_end_token_and_says_what_is_lost(clip, reference, caplog):
    text = "cat " * 74 + "zebra crossing at night"
    with caplog.at_level(logging.WARNING):
        row = clip([text])[0].tolist()
    assert row == reference([text], truncation=True)["input_ids"][0]
    assert row[-1] == clip.end_id and "crossing at night" in caplog.text and "zebra" not in caplog.text
    caplog.clear()
    clip([text, "cat " * 75])  # said once, and nothing to be said
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("", [0]),
        ("cat " * 75, [75]),
        ("cat " * 151, [75, 75, 1]),
        ("cat " * 55 + ", " + "dog " * 30, [56, 30]),  # 75 tokens, of which the comma is the 20th from last
        ("cat " * 54 + ", " + "dog " * 30, [75, 10]),
        ("cat " * 60 + ", " + "dog, " * 20, [75, 26]),  # the last of several commas
        ("cat " * 74 + ", dog", [75, 1]),
        ("cat " * 75 + ", dog", [75, 2]),  # a comma itself is not kept with what stands before it
        ("cat " * 66 + "<ten>", [66, 10]),
        ("cat " * 60 + ", " + "cat " * 9 + "<ten>", [70, 10]),  # only a full part is cut at its comma
        ("cat " * 60 + ", <ten> dog dog dog dog dog", [61, 15]),
        ("<all>, <ten>", [75, 11]),
    ],
)
def test_long_prompts_are_cut_where_automatic1111_cuts_them(clip, prompt, lengths):
    """Lengths are those that its rules give: comma_padding_backtrack is 20, embeddings stay whole."""
    clip.placeholders = {"<ten>": range(50000, 50010), "<all>": range(60000, 60075)}
    rows = encode_parts(clip, prompt)
    assert rows.shape == (len(lengths), 77)
    assert [(row == clip.end_id).nonzero()[0].item() - 1 for row in rows] == lengths
    assert rows[:, 0].eq(clip.start_id).all()
    ids = [i for row, n in zip(rows.tolist(), lengths, strict=True) for i in row[1 : 1 + n]]
    assert ids == clip.encode(prompt)
    if len(rows) == 1:
        assert torch.equal(rows, clip([prompt]))


class TestPlaceholders:
    def test_alone_and_next_to_punctuation(self, clip):
        clip.add_placeholder("<toy>", [60000, 60001])
        clip.add_placeholder("*", [60002])
        try:
            around = {word: clip.encode(word) for word in ("photo", ".", "(", ")", "a")}
            assert clip.encode("a photo <toy>.") == [
                *around["a"],
                *around["photo"],
                60000,
                60001,
                *around["."],
            ]
            assert clip.encode("(*)a*.") == [
                *around["("],
                60002,
                *around[")"],
                *around["a"],
                60002,
                *around["."],
            ]
            assert clip.encode("<TOY><toy>") == [60000, 60001] * 2
        finally:
            clip.placeholders = {}
        assert 60000 not in clip.encode("<toy> *") and 60002 not in clip.encode("<toy> *")

    def test_not_inside_other_words(self, small):
        small.add_placeholder("sks", [900])
        assert small.encode("sks, sks! -sks-").count(900) == 3
        assert 900 not in small.encode("tasks risks sks7 7sks skså")

    def test_longest_first(self, small):
        small.add_placeholder("sks", [900])
        small.add_placeholder("sks-7", [901])
        small.add_placeholder("sks-7 max", [902])
        assert [i for i in small.encode("sks-7 max sks-7 sks sks-71") if i >= 900] == [902, 901, 900, 900]

    def test_pattern_characters_are_plain_text(self, small):
        small.add_placeholder(".*(", [900])
        assert small.encode("a.*(b").count(900) == 1 and 900 not in small.encode("a photo")

    @pytest.mark.parametrize("word", ["photo", "the", "", "  ", "<|endoftext|>", "THE"])
    def test_clashes_are_refused(self, small, word):
        with pytest.raises(InputError):
            small.add_placeholder(word, [900])
        assert small.placeholders == {}

    def test_explicit_replacement(self, small):
        small.add_placeholder("photo", [900], replace=True)
        assert small.encode("photo") == [900]
        with pytest.raises(InputError, match="in use"):
            small.add_placeholder("Photo", [901])

    def test_vectors_that_do_not_fit(self, small):
        small.add_placeholder("<toy>", range(900, 908))
        fits = "the " * 67 + "<toy>"
        assert small([fits])[0, 68:76].tolist() == list(range(900, 908))
        with pytest.raises(InputError, match="8 vectors does not fit"):
            small(["the " * 68 + "<toy>"])


class TestBrokenFiles:
    def test_messages(self, tmp_path):
        with pytest.raises(InputError, match="no tokenizer here"):
            read_tokenizer(tmp_path)
        folder = write_tokenizer(tmp_path)
        (folder / "merges.txt").unlink()
        with pytest.raises(InputError, match=r"merges\.txt"):
            read_tokenizer(folder)
        (folder / "vocab.json").write_text("{")
        with pytest.raises(InputError, match="not valid JSON"):
            read_tokenizer(folder)
        (folder / "vocab.json").write_text('{"a": 0}')
        (folder / "merges.txt").write_text("a b\n")
        with pytest.raises(InputError, match=r"merges\.txt: .*not the vocabulary of a CLIP tokenizer"):
            read_tokenizer(folder)

    def test_vocabulary_archives(self, tmp_path):
        for content in (b"not gzip", gzip.compress(b"header\na b\n"), gzip.compress(b"x" * 99)[:-4]):
            (tmp_path / "bpe.txt.gz").write_bytes(content)
            with pytest.raises(InputError, match="not OpenAI's bpe_simple_vocab_16e6"):
                read_tokenizer(tmp_path / "bpe.txt.gz")

    def test_added_tokens(self, tmp_path):
        folder = write_tokenizer(tmp_path)
        count = len(read_tokenizer(folder))
        (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": count, "<cat-toy>_1": count + 1}))
        tokenizer = read_tokenizer(folder)
        assert len(tokenizer) == count + 2
        assert tokenizer.encode("<cat-toy>_1 <cat-toy>") == [count + 1, count, count + 1]


def test_merge():
    """The docstring's example; pairs in the order they were learned, from the left, and everywhere."""
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=1)
    assert merge("abab", {("a", "b"): 1, ("b", "a"): 0}) == ["a", "ba", "b"]
    assert merge("abab", {("a", "b"): 0, ("b", "a"): 1}) == ["ab", "ab"]
    assert merge("aaaaa", {("a", "a"): 0}) == ["aa", "aa", "a"]
    assert merge("a", {}) == ["a"]
