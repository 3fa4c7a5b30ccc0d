"""Learned words: the rows below the table of words, and the file they come in."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import minti
from minti import Concept, InputError
from minti.model.embedding import TokenEmbedding

from .oracles import pipeline, save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("concept") / "sd1")


def vectors(n: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def with_words(embedding: TokenEmbedding, *words: torch.Tensor) -> TokenEmbedding:
    embedding.words.extend(nn.Parameter(rows) for rows in words)
    return embedding


def test_ids_of_the_table_and_of_the_rows() -> None:
    embedding = with_words(TokenEmbedding(10, 4), vectors(2, 4), vectors(1, 4, seed=1))
    ids = torch.tensor([[0, 9, 10, 11, 12], [12, 3, 11, 5, 10]])
    everything = torch.cat([embedding.weight, vectors(2, 4), vectors(1, 4, seed=1)])
    assert torch.equal(embedding(ids), everything[ids])
    assert torch.equal(embedding.rows, everything[10:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_stay_float32_below_a_table_of_half_precision(dtype: torch.dtype) -> None:
    embedding = with_words(TokenEmbedding(10, 4).to(dtype), vectors(2, 4))
    assert embedding.rows.dtype == torch.float32
    assert torch.equal(embedding.rows, vectors(2, 4))
    output = embedding(torch.tensor([[3, 11]]))
    assert output.dtype == dtype
    assert torch.equal(output[0, 1], vectors(2, 4)[1].to(dtype))


@pytest.mark.parametrize("name", ["word.safetensors", "word.bin"])
@pytest.mark.parametrize("n", [1, 3])
def test_files_of_diffusers(name: str, n: int, tmp_path: Path) -> None:
    if name.endswith("bin"):
        torch.save({"<toy>": vectors(n)}, tmp_path / name)
    else:
        save_file({"<toy>": vectors(n)}, tmp_path / name)
    concept = Concept.load(tmp_path / name)
    assert concept.placeholder == "<toy>"
    assert torch.equal(concept.vectors, vectors(n))
    assert Concept.load(tmp_path / name, placeholder="<other>").placeholder == "<other>"


def test_old_files_hold_a_single_vector_and_some_half_precision(tmp_path: Path) -> None:
    torch.save({"*": vectors(1)[0].half()}, tmp_path / "learned_embeds.bin")
    concept = Concept.load(tmp_path / "learned_embeds.bin")
    assert concept.vectors.shape == (1, 64)
    assert concept.vectors.dtype == torch.float32
    assert torch.equal(concept.vectors, vectors(1).half().float())


def test_save_and_load_again(tmp_path: Path) -> None:
    concept = Concept("<Toy 1>", vectors(2), {"step": "500", "init_word": "toy"})
    concept.save(tmp_path / "new" / "word.safetensors")
    again = Concept.load(tmp_path / "new" / "word.safetensors")
    assert again.placeholder == "<Toy 1>"
    assert torch.equal(again.vectors, concept.vectors)
    assert dict(again.metadata) == {"step": "500", "init_word": "toy"}
    assert again.digest == concept.digest
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["word.safetensors"]
    # As any other reader sees it.
    assert load_file(tmp_path / "new" / "word.safetensors").keys() == {"<Toy 1>"}
    with safe_open(tmp_path / "new" / "word.safetensors", "pt") as file:
        assert "500" in str(file.metadata())


def test_digest_follows_the_vectors_only() -> None:
    assert Concept("a", vectors(2)).digest == Concept("b", vectors(2), {"x": "y"}).digest
    assert Concept("a", vectors(2)).digest != Concept("a", vectors(2, seed=1)).digest
    assert len(Concept("a", vectors(2)).digest) == 12


@pytest.mark.parametrize("n", [1, 2])
def test_diffusers_reads_our_file_and_sees_the_same_prompt(n: int, folder: Path, tmp_path: Path) -> None:
    """Tolerance: float32 rounding of three small layers, as for the text encoder alone."""
    Concept("<toy>", vectors(n)).save(tmp_path / "word.safetensors")
    pipe: StableDiffusionPipeline = pipeline(tmp_path)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)  # it is going to change
    pipe.load_textual_inversion(str(tmp_path / "word.safetensors"))
    theirs, _ = pipe.encode_prompt("a photo of <toy> on grass", "cpu", 1, False)

    sd = minti.load(folder, device="cpu")
    sd.add_concept(Concept.load(tmp_path / "word.safetensors"))
    ours = sd.encode_prompt(["a photo of <toy> on grass"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_several_words_and_where_their_ids_lie(folder: Path) -> None:
    sd = minti.load(folder, device="cpu")
    table = sd.text_encoder.token_embedding.weight
    rows = len(table)
    before = sd.encode_prompt(["a photo of the cat"])
    sd.add_concept(Concept("<toy>", vectors(2)))
    sd.add_concept(Concept("<toy>2", vectors(1, seed=1)))
    sd.add_concept(Concept("sks", vectors(3, seed=2)))
    ids = sd.tokenizer.encode("<toy>2 sks, <toy>")
    comma = sd.tokenizer.encode(",")
    assert ids == [rows + 2, rows + 3, rows + 4, rows + 5, *comma, rows, rows + 1]
    learned = sd.text_encoder.token_embedding.rows
    assert torch.equal(learned, torch.cat([vectors(2), vectors(1, seed=1), vectors(3, seed=2)]))
    assert sd.text_encoder.token_embedding.weight is table
    # A prompt without the words is what it was.
    assert torch.equal(sd.encode_prompt(["a photo of the cat"]), before)
    assert torch.equal(sd.encode_prompt(["a <toy>", "sks"])[1:], sd.encode_prompt(["sks"]))


def test_rows_are_frozen(folder: Path) -> None:
    sd = minti.load(folder, device="cpu")
    sd.add_concept(Concept("<toy>", vectors(2)))
    assert not any(p.requires_grad for p in sd.text_encoder.parameters())


# What is refused ---


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (768, r"'<toy>' was learned on a 768-wide encoder \(SD 1\.x\).* 64"),
        (1024, r"a 1024-wide encoder \(SD 2\.x\)"),
        (1280, r"a 1280-wide encoder \(LDM"),
        (63, r"a 63-wide encoder.* 64.*use the model it was learned on"),
    ],
)
def test_a_word_of_another_width(width: int, message: str, folder: Path) -> None:
    sd = minti.load(folder, device="cpu")
    with pytest.raises(InputError, match=message):
        sd.add_concept(Concept("<toy>", vectors(1, width)))
    assert sd.tokenizer.placeholders == {}


def test_names_that_are_taken(folder: Path) -> None:
    sd = minti.load(folder, device="cpu")
    sd.add_concept(Concept("<toy>", vectors(2)))
    rows = len(sd.text_encoder.token_embedding.rows)
    with pytest.raises(InputError, match="'<toy>' is in use already"):
        sd.add_concept(Concept("<toy>", vectors(1)))
    with pytest.raises(InputError, match="'<TOY>' is in use already"):
        sd.add_concept(Concept("<TOY>", vectors(1)))
    with pytest.raises(InputError, match=r"'cat' is a word the model knows .* such as <cat>"):
        sd.add_concept(Concept("cat", vectors(1)))
    with pytest.raises(InputError, match="is empty"):
        sd.add_concept(Concept("  ", vectors(1)))
    assert len(sd.text_encoder.token_embedding.rows) == rows == 2
    assert list(sd.tokenizer.placeholders) == ["<toy>"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"<a>": vectors(1), "<b>": vectors(1)},
            r"holds 2 .*<a>.*<b>.* one",
        ),
        ({"<a>": torch.full((1, 64), torch.nan)}, "learned word"),
        ({"<a>": torch.tensor([[1.0, torch.inf]])}, "learned word"),
        ({"<a>": torch.ones(2, 3, 4)}, "learned word"),
        ({"<a>": torch.ones(2, 64, dtype=torch.int64)}, "learned word"),
        ({"<a>": torch.tensor(1.0)}, "learned word"),
        ({"<a>": torch.empty(0, 64)}, "word"),
        ({}, "holds no tensors"),
    ],
)
def test_files_that_hold_no_word(content: dict, message: str, tmp_path: Path) -> None:
    save_file(content, tmp_path / "word.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        Concept.load(tmp_path / "word.safetensors")
    assert "word.safetensors" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.safetensors: cannot be read"):
        Concept.load(tmp_path / "nowhere.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "word.safetensors"
    Concept("<toy>", vectors(2)).save(path)
    old = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Concept("<toy>", vectors(3)).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
