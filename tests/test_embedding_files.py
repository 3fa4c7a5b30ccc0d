"""Files of learned words: what others write we read, what we write others read, and nothing runs code."""

import base64
import copy
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minti
from minti import Concept, InputError
from minti import concept as concept_cli
from minti.formats.concept import save_concepts

from . import oracles


def vectors(n: int, width: int = 768, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def one(path: Path, **options) -> tuple[str, Tensor]:
    concept = Concept.load(path, **options)
    assert concept.vectors.dtype == torch.float32
    assert concept.vectors.is_contiguous() and not concept.vectors.requires_grad
    return concept.placeholder, concept.vectors


# What others write ---


def write(path: Path, content: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


BOTH = pytest.mark.parametrize("suffix", [".safetensors", ".bin"])


@BOTH
@pytest.mark.parametrize("rows", [vectors(1)[0], vectors(1), vectors(4), vectors(75), vectors(2).half()])
def test_diffusers(suffix: str, rows: Tensor, tmp_path: Path) -> None:
    word, read = one(write(tmp_path / f"learned_embeds{suffix}", {"<my.toy 1>": rows}))
    assert word == "<my.toy 1>"
    assert torch.equal(read, rows.reshape(-1, 768).float())


def test_what_training_loops_pickle(tmp_path: Path) -> None:
    """Parameters, a slice of a larger table, and the protocol before zip files."""
    table = nn.Parameter(vectors(10))
    torch.save({"<toy>": table[3:5].detach().cpu()}, tmp_path / "a.bin")
    torch.save({"<toy>": nn.Parameter(vectors(2))}, tmp_path / "b.bin")
    torch.save({"<toy>": vectors(2)}, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(one(tmp_path / "a.bin")[1], vectors(10)[3:5])
    assert torch.equal(one(tmp_path / "b.bin")[1], vectors(2))
    assert torch.equal(one(tmp_path / "c.bin")[1], vectors(2))


@BOTH
def test_numbered_keys_are_one_word(suffix: str, tmp_path: Path) -> None:
    rows = vectors(12)
    content = {"<toy>" if i == 0 else f"<toy>_{i}": row.clone() for i, row in enumerate(rows)}
    word, read = one(write(tmp_path / f"e{suffix}", dict(reversed(content.items()))))
    assert word == "<toy>"
    assert torch.equal(read, rows)  # 10 and 11 after 9, not after 1


@BOTH
def test_several_words_in_a_file(suffix: str, tmp_path: Path) -> None:
    """A gap in the numbers, or words of several vectors, are not numbered vectors of one word."""
    content = {"<a>": vectors(1), "<a>_2": vectors(1, seed=1), "<b>": vectors(3), "<b>_1": vectors(1, seed=2)}
    path = write(tmp_path / f"e{suffix}", content)
    read = {concept.placeholder: concept.vectors for concept in Concept.load_all(path)}
    assert read.keys() == content.keys()
    assert all(torch.equal(read[word], content[word]) for word in content)
    with pytest.raises(InputError, match=r"4 words \('<a>', '<a>_2', '<b>', '<b>_1'\), where one was"):
        Concept.load(path)


def a1111(rows: Tensor, name: str = "toy-500") -> dict:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": rows},
        "name": name,
        "step": 499,
        "sd_checkpoint": "7460a6fa",
        "sd_checkpoint_name": None,
    }


def test_a1111(tmp_path: Path) -> None:
    concept = Concept.load(write(tmp_path / "my toy.pt", a1111(vectors(3))))
    assert concept.placeholder == "my toy"  # as in that interface, whatever it was called when trained
    assert torch.equal(concept.vectors, vectors(3))
    assert concept.metadata == {"name": "toy-500", "step": "499", "sd_checkpoint": "7460a6fa"}
    parameters = a1111(nn.ParameterDict({"*": vectors(3)})["*"])
    assert one(write(tmp_path / "p.pt", parameters))[0] == "p"
    word, rows = one(write(tmp_path / "toy.safetensors", {"emb_params": vectors(2)}))
    assert word == "toy"
    assert torch.equal(rows, vectors(2))


def official(**rows: Tensor) -> dict:
    """As EmbeddingManager.save has it."""
    return {
        "string_to_token": {word: torch.tensor(265) for word in rows},
        "string_to_param": nn.ParameterDict({word: nn.Parameter(r) for word, r in rows.items()}),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_official_code(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "embeddings_gs-6099.pt"
    torch.save(official(**{"*": vectors(2)}), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    word, rows = one(path)
    assert word == "*"
    assert torch.equal(rows, vectors(2))


@pytest.mark.parametrize(("width", "star"), [(768, 265), (1024, 265), (1280, 1008)])
def test_written_for_the_official_code(width: int, star: int, tmp_path: Path) -> None:
    """Its EmbeddingManager.load puts both entries into attributes, of which one is a registered module."""
    write(tmp_path / "embeddings.pt", official(**{"*": vectors(2, width)}))
    concept = Concept.load(tmp_path / "embeddings.pt")
    concept.save(tmp_path / "again.pt", format="official")
    saved = torch.load(tmp_path / "again.pt", weights_only=False)
    manager = nn.Module()
    manager.string_to_param_dict = nn.ParameterDict()
    manager.string_to_param_dict = saved["string_to_param"]
    assert torch.equal(manager.string_to_param_dict["*"], vectors(2, width))
    ids = torch.tensor([1, star])
    assert (ids == saved["string_to_token"]["*"].to("cpu")).tolist() == [False, True]
    again = Concept.load(tmp_path / "again.pt")
    assert again.placeholder == "*" and torch.equal(again.vectors, concept.vectors)
    with pytest.raises(InputError, match="in a format that has it"):
        Concept("<a>", vectors(1, 96), widths={"clip_l": 64, "clip_g": 32}).save(
            tmp_path / "xl.pt", format="official"
        )


def test_a_foreign_note_called_placeholder(tmp_path: Path) -> None:
    """It is the word only in our own file for SDXL, whose keys are no words; elsewhere it is kept."""
    xl = {"clip_l": vectors(1, 768), "clip_g": vectors(1, 1280)}
    for name, content in (("toy", {"emb_params": vectors(1)}), ("xl", xl), ("<toy>", {"<toy>": vectors(1)})):
        save_file(content, tmp_path / f"{name}.safetensors", {"placeholder": "<other>"})
        (concept,) = Concept.load_all(tmp_path / f"{name}.safetensors")
        assert (concept.placeholder, concept.metadata["placeholder"]) == (name, "<other>")
        concept.save(tmp_path / "again.safetensors")
        assert Concept.load(tmp_path / "again.safetensors").placeholder == name


def test_official_code_with_several_words(tmp_path: Path) -> None:
    path = write(tmp_path / "embeddings.pt", official(**{"*": vectors(1), "@": vectors(2)}))
    assert [(c.placeholder, len(c.vectors)) for c in Concept.load_all(path)] == [("*", 1), ("@", 2)]


def test_parameter_dictionaries_of_old_versions_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 1.11 the state of a ParameterDict had other attributes around the same `_parameters`."""
    new = nn.ParameterDict({"*": vectors(1)})
    old = nn.ParameterDict.__new__(nn.ParameterDict)
    old.__dict__.update(training=True, _parameters=new._parameters, _buffers={}, _modules={})
    path = tmp_path / "embeddings.pt"
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": old}, path)
    assert torch.equal(one(path)[1], vectors(1))


@BOTH
def test_kohya_and_onetrainer(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    word, rows = one(write(tmp_path / f"kohya{suffix}", {"emb_params": vectors(2)}))
    assert word == "kohya"
    assert torch.equal(rows, vectors(2))
    assert not caplog.records
    word, rows = one(write(tmp_path / f"one{suffix}", {"emp_params": vectors(2, seed=3)}))
    assert word == "one"
    assert torch.equal(rows, vectors(2, seed=3))


def test_kohya_metadata(tmp_path: Path) -> None:
    save_file(
        {"emb_params": vectors(1)}, tmp_path / "k.safetensors", {"ss_steps": "1600", "minti": "not JSON"}
    )
    assert Concept.load(tmp_path / "k.safetensors").metadata == {"ss_steps": "1600", "minti": "not JSON"}


@BOTH
def test_sdxl(suffix: str, tmp_path: Path) -> None:
    content = {"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280, seed=1)}
    path = write(tmp_path / f"toy{suffix}", content)
    for width, key in ((768, "clip_l"), (1280, "clip_g")):
        word, rows = one(path, width=width)
        assert word == "toy"
        assert torch.equal(rows, content[key])
    concept = Concept.load(path)
    assert torch.equal(concept.vectors, torch.cat([content["clip_l"], content["clip_g"]], dim=1))
    assert concept.widths == {"clip_l": 768, "clip_g": 1280}
    with pytest.raises(InputError, match=r"on a 2048-wide encoder \(SDXL.*, not on a 1024-wide .*SD 2\.x"):
        Concept.load(path, width=1024)
    assert torch.equal(one(write(tmp_path / f"l{suffix}", {"clip_l": content["clip_l"]}))[1], vectors(2))
    with pytest.raises(InputError, match="several text encoders, of widths 768, 1280, 4096; take one"):
        Concept.load(write(tmp_path / f"sd3{suffix}", content | {"t5xxl": vectors(2, 4096)}))


@BOTH
def test_sdxl_in_two_files_of_diffusers(suffix: str, tmp_path: Path) -> None:
    """learned_embeds and learned_embeds_2, as diffusers' training script writes them."""
    first, second = vectors(2, 768), vectors(2, 1280, seed=1)
    path = write(tmp_path / f"learned_embeds{suffix}", {"<toy>": first})
    write(tmp_path / f"learned_embeds_2{suffix}", {"<toy>": second})
    for where in (path, tmp_path):
        concept = Concept.load(where)
        assert (concept.placeholder, concept.widths) == ("<toy>", {"clip_l": 768, "clip_g": 1280})
        assert torch.equal(concept.vectors, torch.cat([first, second], dim=1))
    assert torch.equal(Concept.load(path, width=768).vectors, first)
    write(tmp_path / f"learned_embeds_2{suffix}", {"<another>": second})
    assert torch.equal(Concept.load(path).vectors, first)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_sdxl_written_and_read_again(suffix: str, tmp_path: Path) -> None:
    concept = Concept("<toy>", vectors(2, 2048), {"step": "5"}, {"clip_l": 768, "clip_g": 1280})
    concept.save(path := tmp_path / f"word{suffix}")
    again = Concept.load(path)
    assert torch.equal(again.vectors, concept.vectors)
    assert again.widths == concept.widths
    if suffix == ".safetensors":
        assert (again.placeholder, again.metadata) == ("<toy>", {"step": "5"})
    with pytest.raises(InputError, match="a file holds one word for SDXL"):
        save_concepts(path, [concept, Concept("<b>", vectors(1))])


@pytest.mark.parametrize("rows", [vectors(1)[0], vectors(3, 1024)])
def test_a_tensor_by_itself(rows: Tensor, tmp_path: Path) -> None:
    word, read = one(write(tmp_path / "toy.pt", rows))
    assert word == "toy"
    assert torch.equal(read, torch.atleast_2d(rows))
    assert one(tmp_path / "toy.pt", placeholder="<toy>")[0] == "<toy>"


def test_pivotal_tuning(tmp_path: Path) -> None:
    """As diffusers' TokenEmbeddingsHandler writes it: a token <s0>, <s1>, ... for each vector."""
    content = {"text_encoders_0": vectors(2)}
    assert one(write(tmp_path / "a.safetensors", content))[0] == "<s0><s1>"
    content["text_encoders_1"] = vectors(2, 1280)
    (tmp_path / "b.pti").write_bytes(write(tmp_path / "b.safetensors", content).read_bytes())
    word, rows = one(tmp_path / "b.pti", width=1280)
    assert word == "<s0><s1>"
    assert torch.equal(rows, content["text_encoders_1"])


def test_a_lightning_module(tmp_path: Path) -> None:
    path = write(tmp_path / "toy.pt", {"state_dict": {"emb_params": vectors(2)}, "epoch": 3})
    assert torch.equal(one(path)[1], vectors(2))
    inside_itself: dict = {}
    inside_itself["state_dict"] = inside_itself
    assert "no vectors in it" in refused(write(path, inside_itself))


LORA = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(4.0),
}


@BOTH
def test_words_bundled_with_a_lora(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As AUTOMATIC1111 and OneTrainer read and write them."""
    content = LORA | {"bundle_emb.toy.string_to_param.*": vectors(2), "bundle_emb.sky.emb_params": vectors(1)}
    content |= {"bundle_emb.<xl>.clip_l": vectors(3), "bundle_emb.<xl>.clip_l_out": vectors(3)}
    found = {c.placeholder: c.vectors for c in Concept.load_all(write(tmp_path / f"l{suffix}", content))}
    assert found.keys() == {"toy", "sky", "<xl>"}
    assert torch.equal(found["toy"], vectors(2))
    assert torch.equal(found["<xl>"], torch.cat([vectors(3), vectors(3)], dim=1))
    assert "left aside the LoRA itself" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        LORA,
        {"unet.down_blocks.0.attentions.0.to_k.lora_A.weight": torch.ones(4, 8)},
        {"text_encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": torch.ones(4, 8)},
        {"unet.mid_block.to_k_lora.down.weight": torch.ones(4, 8)},
        {"lycoris_unet_a.hada_w1_a": torch.ones(4, 8)},
    ],
    ids=lambda content: next(iter(content)),
)
@BOTH
def test_a_lora_is_called_so(suffix: str, content: dict, tmp_path: Path) -> None:
    message = refused(write(tmp_path / f"lora{suffix}", content))
    assert re.search(r"it is a (LoRA|LyCORIS file): small changes, to be added to a model", message)


@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "learned_embeds.bin"])
def test_folders_of_the_concepts_library(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, {"<toy>": vectors(1)})
    (tmp_path / "token_identifier.txt").write_text("<toy>")
    assert one(tmp_path)[0] == "<toy>"


def test_more_vectors_than_a_prompt_has_room_for(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "e.pt", {"emb_params": vectors(76)}))
    assert "'e' is (76, 768) float32; vectors are floats, (D,) or (n, D), n at most 75" in message


# Pictures ---


def as_json(content: dict) -> bytes:
    def encode(value: object) -> object:
        return {"TORCHTENSOR": value.tolist()} if isinstance(value, Tensor) else str(value)

    return json.dumps(content, default=encode).encode()


def photo(h: int = 64, w: int = 48) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (h, w, 3), dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 8])
def test_picture_with_a_word_as_text(n: int, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(as_json(a1111(vectors(n)))).decode())
    Image.fromarray(photo()).save(tmp_path / "p.png", pnginfo=info)
    concept = Concept.load(tmp_path / "p.png")
    assert concept.placeholder == "toy-500"
    assert torch.equal(concept.vectors, vectors(n))  # repr of a float32 as a double is exact
    assert concept.metadata["step"] == "499"


def test_pictures_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    for text in (
        None,
        "###",
        base64.b64encode(b"[1]").decode(),
        base64.b64encode(b'{"TORCHTENSOR": "x"}').decode(),
        base64.b64encode(b"[" * 200_000).decode(),
    ):
        info = PngInfo()
        if text:
            info.add_text("sd-ti-embedding", text)
        Image.fromarray(photo()).save(path, pnginfo=info)
        assert "p.png: is not a learned word" in refused(path)
    content = path.read_bytes()
    for part in (0.3, 0.9):
        path.write_bytes(content[: int(len(content) * part) + 8])
        assert re.search(r"p\.png: (cannot be read as a picture|is a PNG picture)", refused(path))
    for suffix in ("webp", "jpg", "bmp", "tif", "gif"):
        Image.fromarray(photo()).save(tmp_path / f"p.{suffix}")
        assert "it is a picture without one in its text" in refused(tmp_path / f"p.{suffix}")


# What is refused ---


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


class Disguised(nn.ParameterDict):
    """A ParameterDict whose state is the call of a function."""

    def __init__(self, payload: object) -> None:
        self.payload = payload

    def __reduce__(self) -> tuple:
        return nn.ParameterDict, (), {"_parameters": {"*": self.payload}}


@pytest.mark.parametrize("attack", ["os.system", "eval", "open", "Path.touch", "torch.load"])
@pytest.mark.parametrize("where", ["beside", "value", "nested", "parameters", "bare"])
def test_a_pickle_never_runs_code(attack: str, where: str, tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    payload = {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "open": Call(open, str(marker), "w"),
        "Path.touch": Call(Path.touch, marker),
        "torch.load": Call(torch.load, str(marker)),
    }[attack]
    content = {
        "beside": {"<toy>": vectors(1), "x": payload},
        "value": {"<toy>": payload},
        "nested": a1111(payload),
        "parameters": {"string_to_param": Disguised(payload), "x": nn.ParameterDict({"*": vectors(1)})},
        "bare": payload,
    }[where]
    torch.save(content, tmp_path / "evil.pt")
    try:
        assert torch.equal(Concept.load(tmp_path / "evil.pt").vectors, vectors(1))
    except InputError as error:
        assert "evil.pt" in str(error)
    assert not marker.exists()
    if attack != "torch.load":  # the attack does work, so that this test can fail
        pickle.loads(pickle.dumps(payload))
        assert marker.exists()


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        Concept.load_all(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@BOTH
def test_whole_models(suffix: str, tmp_path: Path) -> None:
    for module in (oracles.unet(), oracles.text_encoder(), oracles.vae()):
        message = refused(write(tmp_path / f"model{suffix}", module.state_dict()))
        assert re.search(r"is not a learned word: it is a (UNet|CLIP text encoder)|an autoencoder", message)
    mixed = {"down.a": vectors(4, 320), "up.a": vectors(32, 4)}
    assert "its 2 tensors have widths 4, 320" in refused(write(tmp_path / f"mixed{suffix}", mixed))
    norm = {"ln.weight": vectors(1)[0], "ln.bias": vectors(1)[0]}
    assert "is not a learned word" in refused(write(tmp_path / f"norm{suffix}", norm))
    table = {"<toy>": torch.zeros(49408, 8)}
    assert "(49408, 8)" in refused(write(tmp_path / f"table{suffix}", table))


@pytest.mark.parametrize(
    "content",
    [
        {"<a>": torch.full((1, 64), torch.nan)},
        {"<a>": torch.tensor([[1.0, torch.inf]])},
        {"<a>": torch.tensor([[1e300]], dtype=torch.float64)},  # infinite in float32
        {"<a>": torch.ones(2, 3, 4)},
        {"<a>": torch.ones(2, 64, dtype=torch.int64)},
        {"<a>": torch.tensor(1.0)},
        {"<a>": torch.empty(0, 64)},
        {"<a>": torch.empty(64, 0)},
        {"<a>": torch.ones(76, 64)},
        {"<a>": torch.ones(1, 1).expand(1, 10**12)},  # four bytes in the file, terabytes once copied
        {"<a>": torch.ones(2, 2).to_sparse()},
        {"string_to_param": {"*": [1.0, 2.0]}},
        {"string_to_param": {3: vectors(1)}},
        {"string_to_param": {}},
        {"string_to_param": vectors(1)},
        {"emb_params": None},
        {"emp_params_out": torch.ones(2, 3, 4)},
        {"epoch": 3},
        {3: vectors(1)},
        {},
        [vectors(1)],
        "text",
        None,
    ],
    ids=lambda content: str(content)[:30],
)
def test_files_that_hold_no_word(content: object, tmp_path: Path) -> None:
    message = refused(write(tmp_path / "e.pt", content))
    assert "is not a learned word" in message or "repeats 1 numbers" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("part", [0, 0.01, 0.4, 0.9, 0.999])
def test_truncated_files(suffix: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / f"e{suffix}"
    Concept("<toy>", vectors(2)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert "download it again" in refused(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in refused(tmp_path / "nowhere.pt")
    assert "no learned word in it; give the folder of a run with one, or a file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    assert "it is a pipe or a device" in refused(tmp_path / "pipe.pt")
    hub = refused(Path("sd-concepts-library/cat-toy"))
    assert "on the hub: hf download sd-concepts-library/cat-toy --local-dir cat-toy" in hub
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x93NUMPY", "neither safetensors nor"),
    ):
        (tmp_path / "e.pt").write_bytes(content)
        assert message in refused(tmp_path / "e.pt")


# What we write ---

METADATA = {"step": "500", "init_word": "tüy", "base_model": "sd.safetensors", "seed": "0", "minti": "0.1"}
KINDS = [("a.safetensors", None), ("a.bin", None), ("a.pt", None), ("a.safetensors", "a1111")]
KINDS += [("a.pt", "official")]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("name", "format"), KINDS)
def test_round_trip(name: str, format: str | None, n: int, tmp_path: Path) -> None:
    concept = Concept("<Toy 1>", vectors(n), METADATA)
    concept.save(tmp_path / "new" / name, format=format)
    again = Concept.load(tmp_path / "new" / name)
    by_name = format == "a1111" or name.endswith(".pt")
    assert again.placeholder == ("*" if format == "official" else "a" if by_name else "<Toy 1>")
    assert torch.equal(again.vectors, concept.vectors)
    assert again.metadata == (
        {} if name.endswith(".bin") else METADATA
    )  # there is no room in diffusers' .bin
    assert again.digest == concept.digest
    assert os.listdir(tmp_path / "new") == [name]


def test_files_as_any_other_reader_sees_them(tmp_path: Path) -> None:
    toy = Concept("<toy>", vectors(2), METADATA)
    for name, format in KINDS:
        toy.save(tmp_path / f"{format}-{name}", format=format)
    for content in (
        load_file(tmp_path / "None-a.safetensors"),
        torch.load(tmp_path / "None-a.bin", weights_only=True),
    ):
        assert list(content) == ["<toy>"]
        assert torch.equal(content["<toy>"], vectors(2))
    with safe_open(tmp_path / "None-a.safetensors", "pt") as file:
        assert list(file.metadata()) == ["minti"]
        assert list(json.loads(file.metadata()["minti"]).items()) == sorted(METADATA.items())
    assert load_file(tmp_path / "a1111-a.safetensors").keys() == {"emb_params"}
    content = torch.load(tmp_path / "None-a.pt", weights_only=True)
    assert torch.equal(content.pop("string_to_param")["*"], vectors(2))
    assert json.loads(content.pop("minti")) == METADATA
    assert content == {
        "string_to_token": {"*": 265},
        "name": "<toy>",
        "step": 500,
        "sd_checkpoint": None,
        "sd_checkpoint_name": "sd.safetensors",
    }


REPRODUCE = """
import hashlib, sys, torch
from pathlib import Path
from minti.formats.concept import Concept, encode_concepts as encode
entry = Concept("<toy>", torch.arange(8.0).reshape(2, 4), {key: key * 2 for key in sys.argv[1]})
other = Concept("<b>", torch.ones(1, 4), {"x": "y"})
for name, format, entries in [
    ("a.safetensors", None, [entry]), ("a.safetensors", None, [other, entry]), ("a.bin", None, [entry]),
    ("a.pt", None, [entry]), ("a.safetensors", "a1111", [entry]),
]:
    print(hashlib.sha256(encode(Path(name), entries, format)).hexdigest())
"""


def test_the_same_words_give_the_same_bytes_in_every_process() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", REPRODUCE, letters],
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        for letters in ("abcdefgh", "hgfedcba")
    ]
    first, second = (run.communicate()[0].decode().split() for run in runs)
    assert len(set(first)) == 5
    assert first == second


def test_several_words_keep_their_own_notes(tmp_path: Path) -> None:
    toy, cat = Concept("<toy>", vectors(2), METADATA), Concept("<cat>", vectors(1, seed=1), {"step": "7"})
    sky = Concept("<sky>", vectors(3, seed=2))
    save_concepts(tmp_path / "w.safetensors", [toy, cat, sky])
    read = {concept.placeholder: concept for concept in Concept.load_all(tmp_path / "w.safetensors")}
    assert read.keys() == {"<toy>", "<cat>", "<sky>"}
    for concept in (toy, cat, sky):
        assert torch.equal(read[concept.placeholder].vectors, concept.vectors)
        assert read[concept.placeholder].metadata == concept.metadata


@pytest.mark.parametrize(
    ("words", "name", "format", "message"),
    [
        (["<a>"], "a.ckpt", None, "diffusers format ends in .safetensors or .bin"),
        (["<a>"], "a", None, "ends in"),
        (["<a>"], "a.bin", "a1111", "a1111 format ends in .pt or .safetensors"),
        (["<a>"], "a.pt", "diffusers", "ends in .safetensors or .bin"),
        (["<a>"], "a.bin", "kohya", "choose from diffusers, a1111"),
        (["<a>", "<b>"], "a.pt", None, "holds one word, not 2"),
        (["<a>", "<a>"], "a.bin", None, "there twice"),
        (["<a>", "<a>_1"], "a.bin", None, "'<a>_1' would not be read as a word again"),
        *(
            ([word], f"a{suffix}", None, f"'{word}' would not be read as a word again")
            for word in ("__metadata__", "clip_l", "emp_params_out", "bundle_emb.a.b", "string_to_param")
            for suffix in (".safetensors", ".bin")
        ),
        (["<a>", "toy.bias"], "a.safetensors", None, "'<a>' would not be read"),
        (["toy.weight"], "a.bin", None, "'toy.weight' would not be read"),
        (["<\udc80>"], "a.safetensors", None, "would not be read as a word again"),
        (["lora_te_a"], "a.bin", None, "'lora_te_a' would not be read"),
    ],
)
def test_words_that_cannot_be_written(
    words: list, name: str, format: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(InputError, match=message):
        save_concepts(tmp_path / name, [Concept(word, vectors(1)) for word in words], format=format)
    assert (tmp_path / name).read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]


# diffusers as the judge ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = oracles.save_folder(tmp_path_factory.mktemp("words") / "sd1")
    pipe = oracles.pipeline(folder.parent)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)  # words are going to be added
    return pipe, minti.load(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_diffusers_loads_what_we_write(models: tuple, n: int, suffix: str, tmp_path: Path) -> None:
    """Tolerance: float32 rounding of three small layers, as for the text encoder alone."""
    pipe, sd = models
    word, path = f"<{suffix[1:]}{n}>", tmp_path / f"e{suffix}"
    Concept(word, vectors(n, 64, seed=n), METADATA).save(path)
    pipe.load_textual_inversion(tmp_path, weight_name=path.name)
    sd.add_concept(Concept.load(path, placeholder=word))
    text = f"a photo of {word} on the grass"
    theirs, _ = pipe.encode_prompt(text, "cpu", 1, False)
    ours = sd.encode_prompt([text])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    plain = sd.encode_prompt(["a photo of on the grass"])
    assert (plain - ours).abs().max() > 0.1  # the word does count


def test_the_same_picture_as_diffusers(models: tuple, tmp_path: Path) -> None:
    """Up to the rounding of float32 and to 256 levels: one level at most, seldom."""
    pipe, sd = models
    Concept("<pic>", vectors(4, 64, seed=9)).save(tmp_path / "e.safetensors")
    pipe.load_textual_inversion(tmp_path, weight_name="e.safetensors")
    sd.add_concept(Concept.load(tmp_path / "e.safetensors"))
    generator = torch.Generator().manual_seed(3)
    how = {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": generator}
    theirs = pipe("a photo of <pic>", **how, output_type="np").images[0] * 255
    (image,) = sd.sample("a photo of <pic>", steps=2, guidance_scale=5.0, seed=3)
    assert np.abs(np.asarray(image, float) - theirs).max() <= 1
    (other,) = sd.sample("a photo of", steps=2, guidance_scale=5.0, seed=3)
    assert np.abs(np.asarray(other, float) - theirs).max() > 5


# The command ---


def run(*argv: object) -> None:
    concept_cli.main([str(arg) for arg in argv])


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Concept("<toy>", torch.tensor([[3.0, 4.0]]), METADATA | {"long": "x" * 1000, "lines": "a\nb"})
    toy.save(tmp_path / "a.safetensors")
    write(tmp_path / "xl.safetensors", {"clip_l": vectors(1), "clip_g": vectors(1, 1280)})
    write(tmp_path / "b.pt", official(**{"*": vectors(2, 1024)}))
    run("inspect", *(tmp_path / name for name in ("a.safetensors", "xl.safetensors", "b.pt")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'a.safetensors'}: diffusers"
    assert lines[1] == f"  '<toy>': 1 vector for a 2-wide encoder, norm 5, hash {toy.digest}"
    assert lines[2:7] == [
        "    base_model: sd.safetensors",
        "    init_word: tüy",
        "    lines: a b",
        "    long: " + "x" * 97 + "...",
        "    minti: 0.1",
    ]
    assert "'xl': 1 vector for a 2048-wide encoder (SDXL, 768 + 1280)" in lines[10]
    assert lines[11].endswith("b.pt: official Textual Inversion code")
    assert "'*': 2 vectors for a 1024-wide encoder (SD 2.x)" in lines[12]
    with pytest.raises(InputError, match="nowhere"):
        run("inspect", tmp_path / "nowhere")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_control_characters_do_not_reach_the_terminal(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x07\x9b31m\N{RIGHT-TO-LEFT OVERRIDE}\r\udc80"
    path = tmp_path / "a\x1b[31m.pt"
    torch.save(a1111(vectors(1)) | {"sd_checkpoint": evil, evil: 3}, path)
    run("inspect", path)
    run("convert", path, tmp_path / f"b.{suffix}", "--placeholder", f"<{evil[:-1]}>")
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert r"\x1b[2J\x07\x9b31m\u202e" in printed


def test_leftovers_of_a_killed_conversion_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "a.bin", {"<toy>": vectors(1)}), tmp_path / "out[1].pt"
    kept = tmp_path / ".out[1].pt.mine"
    kept.touch()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: os._exit(9))
        if not (child := os.fork()):
            run("convert", source, out)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(os.listdir(tmp_path)) == 3
    run("convert", source, out)
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in (source, out, kept))


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "embeddings.pt", official(**{"*": vectors(2)}))
    out = tmp_path / "toy.safetensors"
    run("convert", source, out, "--placeholder", "<toy>")
    assert load_file(out).keys() == {"<toy>"}
    assert "'<toy>': 2 vectors" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"exists already.*--overwrite"):
        run("convert", source, out)
    assert load_file(out).keys() == {"<toy>"}
    run("convert", source, out, "--format", "a1111", "--overwrite")
    assert load_file(out).keys() == {"emb_params"}
    with pytest.raises(InputError, match=r"'\*' was learned on a 768-wide .*, not on a 1024-wide"):
        run("convert", source, tmp_path / "x.bin", "--width", 1024)
    with pytest.raises(InputError, match="word is empty"):
        run("convert", source, tmp_path / "x.bin", "--placeholder", " ")
    xl = write(tmp_path / "xl.safetensors", {"clip_l": vectors(1), "clip_g": vectors(1, 1280)})
    run("convert", xl, tmp_path / "l.bin", "--width", 768)
    assert torch.equal(torch.load(tmp_path / "l.bin")["xl"], vectors(1))
    assert not (tmp_path / "x.bin").exists()


def test_merge(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    words = ["<toy>", "<toy>", "<sky>", "<cat>"]
    for i, (path, word) in enumerate(zip(files, words, strict=True)):
        Concept(word, vectors(1 + i, seed=i), {"step": str(i)}).save(path)
    out = tmp_path / "all.safetensors"
    with pytest.raises(
        InputError, match=r"1\.safetensors: '<toy>' is a word of .*0\.safetensors already; .*--re"
    ):
        run("merge", out, *files)
    assert not out.exists()
    run("merge", out, *files, "--rename", "<toy>=<a>", "--rename", "<toy>=<b>", "--rename", "<cat>=<dog>")
    read = {concept.placeholder: concept for concept in Concept.load_all(out)}
    assert read.keys() == {"<a>", "<b>", "<sky>", "<dog>"}
    for i, word in enumerate(["<a>", "<b>", "<sky>", "<dog>"]):
        assert torch.equal(read[word].vectors, vectors(1 + i, seed=i))
        assert read[word].metadata == {"step": str(i)}
    run("merge", tmp_path / "more.bin", out, files[0])  # of a file of several words
    words = {concept.placeholder for concept in Concept.load_all(tmp_path / "more.bin")}
    assert words == {"<a>", "<b>", "<sky>", "<dog>", "<toy>"}


def test_merges_that_fail(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.bin", tmp_path / "b.bin", tmp_path / "out.bin"
    Concept("<toy>", vectors(1)).save(a)
    Concept("<TOY>", vectors(1)).save(b)
    with pytest.raises(InputError, match=r"'<TOY>' is a word of .*already"):  # prompts ignore the case
        run("merge", out, a, b)
    for pair in ("<toy>", "=<b>", "<toy>=", "<toy>= "):
        with pytest.raises(InputError, match="write OLD=NEW"):
            run("merge", out, a, "--rename", pair)
    with pytest.raises(InputError, match="no such word is left; there are '<toy>'"):
        run("merge", out, a, "--rename", "<dog>=<cat>")
    Concept("<sky>", vectors(1, 1024)).save(b)
    with pytest.raises(InputError, match=r"1024-wide encoder \(SD 2\.x\), .* 768-wide encoder \(SD 1\.x\)"):
        run("merge", out, a, b)
    with pytest.raises(InputError, match="exists already"):
        run("merge", a, a)
    Concept("<sky>", vectors(1)).save(b)
    with pytest.raises(InputError, match="holds one word, not 2"):
        run("merge", tmp_path / "out.pt", a, b)
    assert not (tmp_path / "out.pt").exists()
    assert not out.exists()


@pytest.mark.parametrize("argv", [[], ["explode"], ["convert", "a"], ["inspect"], ["merge", "x.bin"]])
def test_bad_arguments(argv: list[str]) -> None:
    with pytest.raises(InputError):
        concept_cli.main(argv)


def test_the_command_itself(tmp_path: Path) -> None:
    """Exit codes, and one line about what is wrong: not even a warning of Python besides."""
    Concept("<toy>", vectors(1)).save(tmp_path / "a.bin")
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "minti.concept", "inspect", str(tmp_path / name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for name in ("a.bin", "b.bin")
    ]
    (out, err), (bad_out, bad_err) = (run.communicate() for run in runs)
    assert [run.returncode for run in runs] == [0, 2]
    assert "'<toy>': 1 vector for a 768-wide encoder (SD 1.x)" in out
    assert err == bad_out == ""
    reason = "cannot be read (No such file or directory); is the path right, the folder complete?"
    assert bad_err == f"minti.concept: error: {tmp_path / 'b.bin'}: {reason}\n"


def test_digest_of_a_file_does_not_depend_on_its_format(tmp_path: Path) -> None:
    for name, format in KINDS:
        Concept("<toy>", vectors(2)).save(tmp_path / name, format=format)
        expected = hashlib.sha256(vectors(2).numpy().tobytes()).hexdigest()[:12]
        assert Concept.load(tmp_path / name).digest == expected
