"""BERT's tokenizer against the package `tokenizers`, which transformers uses, and its placeholder words."""

import json
import random

import pytest
from transformers import BertTokenizer

from minti.errors import InputError
from minti.model.wordpiece import WordPieceTokenizer

from .oracles import shared

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789\u03b1\u03b2\u03b3\u03c3\u03c2\u4e2d\u6587"
SMALL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«»…", *LETTERS]
SMALL += [f"##{letter}" for letter in LETTERS]
SMALL += ["a", "photo", "of", "the", "cat", "un", "##aff", "##able", "sk", "##s", "##at"]
SMALL = list(dict.fromkeys(SMALL))
# Where characters of the random strings come from: Latin, combining marks, Greek, Cyrillic, spaces of all
# kinds, Chinese, Hangul, private use and emoji.
RANGES = [(32, 127), (0, 0x250), (0x300, 0x370), (0x370, 0x500), (0x2000, 0x2070), (0x3000, 0x3100)]
RANGES += [(0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xF900, 0xFB00), (0xFE00, 0xFFFE), (0x1F300, 0x1F600)]
RANGES += [(0x20000, 0x20100), (0x2B810, 0x2B930), (0xE000, 0xE100)]
WORDS = [
    "a",
    "photo",
    "the",
    "cat",
    "unaffable",
    "sks",
    "CAT",
    "Ünaffáble",
    "##s",
    "don't",
    "x.y",
    "\u03a3\u0391\u03a3",
]
WORDS += ["[PAD]", "[CLS]", "[cls]", "[MASK]"]


def vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def random_text(rng: random.Random) -> str:
    text = ""
    for _ in range(rng.randint(0, 25)):
        if rng.random() < 0.4:
            text += rng.choice(WORDS) + rng.choice(["", " ", "\t"])
        else:
            text += chr(rng.randrange(*rng.choice(RANGES)))
    return text


def assert_same(tokenizer: WordPieceTokenizer, oracle: BertTokenizer, texts: list[str]) -> None:
    expected = oracle(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer(text)[0].tolist() == ids, repr(text)


@pytest.mark.filterwarnings("ignore")
def test_random_strings(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(SMALL), encoding="utf-8")
    oracle = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    tokenizer, rng = WordPieceTokenizer(vocabulary(SMALL)), random.Random(0)
    texts = ["", " ", "x" * 100, "x" * 101, "cat " * 100, *(random_text(rng) for _ in range(500))]
    assert_same(tokenizer, oracle, texts)
    assert sum(tokenizer.unknown_id in tokenizer.encode(text) for text in texts) > 20


def test_random_strings_over_the_published_vocabulary():
    path = shared("bert/vocab.txt")
    tokens = path.read_text(encoding="utf-8").splitlines()
    rng = random.Random(1)
    assert_same(
        WordPieceTokenizer(vocabulary(tokens)),
        BertTokenizer(vocab=str(path)),
        [random_text(rng) for _ in range(500)],
    )


def test_recorded_cases():
    tokens = shared("bert/vocab.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = WordPieceTokenizer(vocabulary(tokens))
    cases = json.loads(shared("bert/tokenizer_cases.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 352
    for case in cases:
        padded = case["ids"] + [0] * (77 - len(case["ids"]))
        assert tokenizer(case["text"])[0].tolist() == padded, case["text"]


# Placeholder words ---


@pytest.fixture
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer(vocabulary(SMALL))


def test_placeholders_stand_for_their_ids(tokenizer):
    new = len(SMALL)
    tokenizer.add_placeholder("<Toy>", [new, new + 1])
    tokenizer.add_placeholder("*", [new + 2])
    a, of = (tokenizer.vocab[word] for word in ("a", "of"))
    dot = tokenizer.vocab["."]
    assert tokenizer.encode("a <toy>.") == tokenizer.encode("A<TOY>.") == [a, new, new + 1, dot]
    # The star is a word by itself in BERT, so it is one inside other text as well.
    assert tokenizer.encode("of *.") == [of, new + 2, dot]
    assert tokenizer.encode("a*of") == [a, new + 2, of]
    assert len(tokenizer) == new + 3
    tokenizer.placeholders = {"*": [new + 2]}
    assert new not in tokenizer.encode("a <toy>")


def test_text_around_a_placeholder_is_encoded_as_ever(tokenizer):
    text = "Ünaffáble &amp; ﬁ [MASK] 中"
    plain = tokenizer.encode(text)
    tokenizer.add_placeholder("sks", [999])
    assert tokenizer.encode(f"{text} sks {text}") == [*plain, 999, *plain]
    assert 999 not in tokenizer.encode("asks sksa")


def test_words_of_the_vocabulary_are_refused(tokenizer):
    with pytest.raises(InputError, match="is a word the model knows"):
        tokenizer.add_placeholder("cat", [999])
    tokenizer.add_placeholder("\u0e01", [999])  # which the vocabulary cannot spell
    assert tokenizer.encode("a \u0e01")[1:] == [999]


def test_a_placeholder_that_does_not_fit(tokenizer):
    tokenizer.add_placeholder("<toy>", [998, 999])
    assert tokenizer("cat " * 73 + "<toy>")[0, 74:].tolist() == [998, 999, tokenizer.end_id]
    with pytest.raises(InputError, match="does not fit into the 75 tokens"):
        tokenizer("cat " * 74 + "<toy>")


def test_a_vocabulary_of_another_tokenizer():
    for missing in ("[CLS]", "[PAD]", "[UNK]"):
        with pytest.raises(InputError, match=r"is it BERT's tokenizer\?"):
            WordPieceTokenizer(vocabulary([token for token in SMALL if token != missing]))
