"""A learned word: the vectors that Textual Inversion adds to the embedding table, and the file they come in.

`python -m minti.concept` looks into such files, converts and merges them; see `minti/concept.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import InputError
from ..model.checks import encoder_of, has_outputs, is_plain
from .atomic import write_atomically
from .embedding_files import SDXL, find_words, is_picture, read_picture, refusal
from .reading import check_regular, naming
from .weightfile import read_metadata, read_nested

log = logging.getLogger(__name__)

IN_FOLDERS = ("learned_embeds.safetensors", "learned_embeds.bin")
ENCODERS = ("clip_l", "clip_g")  # of SDXL
SUFFIXES = {"diffusers": (".safetensors", ".bin"), "a1111": (".pt", ".safetensors"), "official": (".pt",)}


@dataclass(frozen=True)
class Concept:
    """A word and its vectors.

    Attributes:
        placeholder: the word as it is written in prompts.
        vectors: (num_vectors, D) float32; D is 768 for SD 1.x, 1024 for SD 2.x, 768 + 1280 for SDXL. A word
            per layer, see `model.per_layer`, has D columns for each of the layers, and an output embedding,
            see `model.output_embedding`, may have D more for the input.
        metadata: notes for people on where it comes from: base model, init word, step, ...
        widths: the parts of the columns and their widths, by their keys in a file: clip_l and clip_g where
            there are two text encoders, IN01 and so on in a word per layer, emp_params_out or clip_l_out
            and so on in an output embedding, otherwise none.
    """

    placeholder: str
    vectors: Tensor
    metadata: Mapping[str, str] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, placeholder: str | None = None, *, width: int | None = None) -> Concept:
        """Read the one word of a file in any of the formats of `embedding_files`.

        Args:
            path: a file; or a folder of the concepts library or of a run, with a `learned_embeds` in it.
            placeholder: use this word instead of the one in the file.
            width: take the vectors of this width, where a word has some for several text encoders.

        Raises:
            InputError: the file is missing, damaged, dangerous, or holds something else; the line names it.
        """
        concepts = cls.load_all(path, width=width)
        if len(concepts) > 1:
            words = ", ".join(repr(concept.placeholder) for concept in concepts)
            raise InputError(
                f"{path}: holds {len(concepts)} words ({words}), where one was expected; minti.sample "
                "--concept without a name in front, or Concept.load_all, reads them all"
            )
        return replace(concepts[0], placeholder=placeholder or concepts[0].placeholder)

    @classmethod
    def load_all(cls, path: str | Path, *, width: int | None = None) -> list[Concept]:
        """Read all words of a file; otherwise like `load`."""
        _, concepts = read_concepts(Path(path))
        if width is not None:
            both = [c for concept in concepts if is_plain(concept.widths) for c in concept.parts()]
            concepts = [*concepts, *both]
        widths = sorted({c.vectors.shape[1] for c in concepts if width is not None or is_plain(c.widths)})
        if width is None and len(widths) > 1:
            several = ", ".join(map(str, widths))
            raise InputError(
                f"{path}: is a word for several text encoders, of widths {several}; "
                f"take one: python -m minti.concept convert '{path}' OUT --width {widths[0]}"
            )
        if width is not None and width not in widths:
            at = "the output of " if has_outputs(concepts[0].widths) else ""
            raise InputError(
                f"{path}: {concepts[0].placeholder!r} was learned on {at}a {concepts[0].encoder}, "
                f"not on a {encoder_of({'': width})}; use the model it was learned on"
            )
        return [concept for concept in concepts if width in (None, concept.vectors.shape[1])]

    def parts(self) -> list[Concept]:
        """The word for each text encoder, or each layer, by itself, where there are several."""
        vectors = self.vectors.split([*self.widths.values()], dim=1) if self.widths else []
        return [Concept(self.placeholder, part.contiguous(), self.metadata) for part in vectors]

    def save(self, path: str | Path, *, format: str | None = None) -> None:
        """Write a file that other programs read, too, in one piece or not at all; see `save_concepts`."""
        save_concepts(path, [self], format=format)

    @property
    def encoder(self) -> str:
        """What kind of text encoder the word was learned on."""
        return encoder_of(self.widths or {"": self.vectors.shape[1]})

    @property
    def digest(self) -> str:
        """A short hash of the vectors, to tell versions of a word apart."""
        return hashlib.sha256(self.vectors.contiguous().numpy().tobytes()).hexdigest()[:12]


def read_concepts(path: Path) -> tuple[str, list[Concept]]:
    """Read a file: the name of its format, and its words.

    A word for SDXL has the vectors for its two text encoders side by side, whether one file holds them or, as
    diffusers' training script writes them, two: `learned_embeds` and `learned_embeds_2`.

    Raises:
        InputError: see `Concept.load`.
    """
    if path.is_dir():
        found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
        path = found[0] if found else refuse_folder(path)
    elif not path.parent.exists() and re.fullmatch(r"[\w.-]+/[\w-]+", str(path)):
        remedy = f"if it is on the hub: hf download {path} --local-dir {path.name}"
        raise InputError(f"{path}: does not exist here; {remedy}")
    kind, concepts = _read_file(path)
    second = path.with_name(f"{path.stem}_2{path.suffix}")
    if kind == "diffusers" and len(concepts) == 1 and second.is_file():
        joined = _join(concepts + _read_file(second)[1])
        return ("diffusers, two files for SDXL", joined) if len(joined) == 1 else (kind, concepts)
    return kind, _join(concepts)


def refuse_folder(folder: Path) -> NoReturn:
    """Raises InputError, since there is no learned word in a folder."""
    several = sorted(folder.glob("*/learned_embeds.safetensors"))
    remedy = f"of its words, such as {several[0].parent}" if several else "of a run with one, or a file"
    raise InputError(f"{folder}: no learned word in it; give the folder {remedy}")


def _join(concepts: Sequence[Concept]) -> list[Concept]:
    """Make one word of two of the same name, for two text encoders, that have as many vectors."""
    by_word: dict[str, list[Concept]] = {}
    for concept in concepts:
        by_word.setdefault(concept.placeholder, []).append(concept)
    joined = []
    for parts in by_word.values():
        widths = tuple(part.vectors.shape[1] for part in parts)
        if len(parts) == 2 and len(set(widths)) == 2 and len({len(part.vectors) for part in parts}) == 1:
            vectors = torch.cat([part.vectors for part in parts], dim=1)
            names = dict(zip(ENCODERS, widths, strict=True))
            parts = [replace(parts[0], vectors=vectors, widths=names)]
        joined += parts
    return joined


def _read_file(path: Path) -> tuple[str, list[Concept]]:
    """Read one file; a plain word for several text encoders comes several times, in several widths."""
    with naming(check_regular(path), "a learned word"):
        in_picture = is_picture(path)
        content = read_picture(path) if in_picture else read_nested(path)
        texts = {} if in_picture else read_metadata(path)
        if isinstance(content, dict):
            texts |= {str(k): str(v) for k, v in content.items() if isinstance(v, str | int | float)}
        # A picture is passed on under any name, so its word is called as it says itself.
        name = texts.get("name", path.stem) if in_picture else path.stem
        kind, words, widths, aside = find_words(content, name)
        notes, concepts = _parse_notes(texts), []
        for word, vectors in words:
            vectors = torch.atleast_2d(vectors.detach()).float().clone()
            if not vectors.isfinite().all():
                raise refusal(f"{word!r} has vectors that are not finite")
            about, parts = dict(notes.get(word, notes[None])), widths.get(word, {})
            if (parts or kind == SDXL.name) and "minti" in texts:  # of the keys of which none is the word
                word = about.pop("placeholder", word)
            concepts.append(Concept(word, vectors, about, parts))
    if aside:
        log.warning("%s: left aside %s", path, aside)
    return kind, concepts


def _parse_notes(texts: Mapping[str, str]) -> dict[str | None, dict[str, str]]:
    """Sort what a file says of its words: notes for each word, and under None those for all others."""
    try:
        notes = json.loads(texts["minti"])
        by_word = {word: values for word, values in notes.items() if isinstance(values, dict)}
        notes = {None: {}, **by_word} if by_word else {None: notes}
        return {word: {key: str(value) for key, value in some.items()} for word, some in notes.items()}
    except (KeyError, ValueError, AttributeError, RecursionError):
        return {None: dict(texts)}


def save_concepts(path: str | Path, concepts: Sequence[Concept], *, format: str | None = None) -> None:
    """Write words into one file, see `encode_concepts`.

    Raises:
        OSError: the file cannot be written; what was there is still there.
    """
    write_atomically(Path(path), encode_concepts(Path(path), concepts, format))


def encode_concepts(path: Path, concepts: Sequence[Concept], format: str | None = None) -> bytes:
    """Encode words as the content of a file that is to be called `path`; the same words give the same bytes.

    Args:
        path: `.safetensors`, `.bin` or `.pt`. Only safetensors keep the metadata of a diffusers file, and the
            name of a word for SDXL, which is otherwise called as its file.
        format: "diffusers"; "a1111" for AUTOMATIC1111's interface, where the word is the name of the file; or
            "official" for the paper's code, where it is "*". By default a1111 for `.pt`, else diffusers.

    Raises:
        InputError: the suffix does not belong to the format, or the words do not fit into one file.
    """
    suffix = path.suffix.lower()
    format = format or ("a1111" if suffix == ".pt" else "diffusers")
    if format not in SUFFIXES:
        raise InputError(f"format {format!r}: choose from {', '.join(SUFFIXES)}")
    if suffix not in SUFFIXES[format]:
        raise InputError(f"{path}: a file in {format} format ends in {' or '.join(SUFFIXES[format])}")
    words = {c.placeholder: c.vectors.detach().cpu().float().contiguous() for c in concepts}
    if len(words) < len(concepts):
        raise InputError(f"{path}: one word is there twice; rename one of the two")
    # All notes in one value, since safetensors stores several in random order.
    notes = {c.placeholder: dict(c.metadata) for c in concepts if c.metadata}
    if len(concepts) == 1:
        notes = dict(concepts[0].metadata)
    if any(concept.widths for concept in concepts):
        special = not is_plain(concepts[0].widths)
        if len(concepts) > 1 or format == "official" or (format == "a1111" and special and suffix != ".pt"):
            raise InputError(
                f"{path}: a file holds one word for SDXL, for single layers or for the output, in a format "
                "that has it; write another"
            )
        parts = (part.vectors.cpu().contiguous() for part in concepts[0].parts())
        words, notes = dict(zip(concepts[0].widths, parts, strict=True)), dict(concepts[0].metadata)
        texts = {"minti": json.dumps(notes | {"placeholder": concepts[0].placeholder}, sort_keys=True)}
        return save(words, texts) if suffix == ".safetensors" else _torch_bytes(words)
    texts = {"minti": json.dumps(notes, sort_keys=True)} if notes else {}
    if format == "diffusers":
        try:
            found = {word for word, _ in find_words(words, "")[1] if word != "__metadata__" and word.encode()}
        except ValueError:  # UnicodeEncodeError is one, too
            found = set()
        if lost := sorted(words.keys() - found):
            raise InputError(f"{path}: {lost[0]!r} would not be read as a word again; rename it")
        return save(words, texts or None) if suffix == ".safetensors" else _torch_bytes(words)

    if len(words) != 1:
        raise InputError(
            f"{path}: an {format} file holds one word, not {len(words)}; write one file for each"
        )
    ((word, vectors),) = words.items()
    star = 1008 if vectors.shape[1] == 1280 else 265  # the id of "*" in BERT's vocabulary, and in CLIP's
    if format == "official":  # its loader wants these very types
        parameters = nn.ParameterDict({"*": nn.Parameter(vectors)})
        tokens = {"*": torch.tensor(star)}
        return _torch_bytes({"string_to_token": tokens, "string_to_param": parameters} | texts)
    if suffix == ".safetensors":
        return save({"emb_params": vectors}, texts or None)
    step, base = notes.get("step", ""), notes.get("base_model")
    content = {
        "string_to_token": {"*": star},
        "string_to_param": {"*": vectors},
        "name": word,
        "step": int(step) if re.fullmatch(r"\d{1,18}", step, re.ASCII) else None,
        "sd_checkpoint": notes.get("sd_checkpoint"),
        "sd_checkpoint_name": notes.get("sd_checkpoint_name", base),
    }
    return _torch_bytes(content | texts)


def _torch_bytes(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
