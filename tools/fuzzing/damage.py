"""Damaging files: of their bytes, of what they contain, or of what kind of file they are."""

import gzip
import io
import json
import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Mutator = Callable[[bytes, random.Random], bytes]

LENGTHS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (0, -1, 1, 2, 3, 77, 2**16, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**18, 10**40)
FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "0", "-1", "nan", "1e999", "true", "null", "{}", "a {} b {}", "<cat>", "*", "a" * 3000, "é")
TEXTS += (
    "../../evil",
    "/",
    "/dev/zero",
    "~",
    "\0",
    "\ud800",
    "\x1b[2J",
    "a\nb",
    "\u202e",
    "%s%n",
    "{0.x}",
    "$(x)",
)
NESTED: tuple[Any, ...] = ([], {}, [None], [[]], {"a": None}, [1, "a"], {"": {}}, [1] * 300, [[[[[[1]]]]]])
HOSTILE: tuple[Any, ...] = (None, True, False, *NUMBERS, *FLOATS, *TEXTS, *NESTED)
RAW = (b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\n", b",", b'"', b"{", b"[" * 5000, b"}", b"NaN", b"9" * 5000)
RAW += (
    b"&a [*a]",
    b"*a",
    b"!!python/object/apply:os.system [id]",
    b"2024-13-45",
    b"<<: 1",
    b"\t- x",
    b"? [a]: b",
)
RAW += (
    b"&a {x: &b [1,1,1], y: &c [*b,*b,*b], z: [*c,*c,*c]}",
    b"!!int x",
    b"!!binary x",
    b"#",
    b"---\n",
    b"%",
)


# Bytes ---


def _place(size: int, rng: random.Random) -> int:
    """A place in a file: anywhere, or near its beginning or end, where most formats have their structure."""
    kind = rng.random()
    if kind < 0.4:
        return rng.randrange(size)
    near = rng.randrange(min(size, 512 if kind < 0.6 else 64))
    return near if kind < 0.85 else size - 1 - near


def _range(size: int, rng: random.Random) -> tuple[int, int]:
    start = _place(size, rng)
    return start, min(size, start + int(2 ** rng.uniform(0, 12)))


def flip(content: bytes, rng: random.Random) -> bytes:
    """Change single bits."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 32))):
        found[_place(len(found), rng)] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Leave out the end."""
    return content[: _place(len(content), rng)]


def delete(content: bytes, rng: random.Random) -> bytes:
    start, end = _range(len(content), rng)
    return content[:start] + content[end:]


def duplicate(content: bytes, rng: random.Random) -> bytes:
    start, end = _range(len(content), rng)
    return content[:end] + content[start:end] * rng.choice((1, 1, 3, 100)) + content[end:]


def splice(content: bytes, rng: random.Random) -> bytes:
    """Write one part of the file over another one."""
    (start, end), place = _range(len(content), rng), _place(len(content), rng)
    return content[:place] + content[start:end] + content[place + end - start :]


def fill(content: bytes, rng: random.Random) -> bytes:
    start, end = _range(len(content), rng)
    return content[:start] + rng.choice((b"\0", b"\xff", b" ", b"9")) * (end - start) + content[end:]


def length(content: bytes, rng: random.Random) -> bytes:
    """Write a number over four or eight bytes, as a length or an offset would stand there."""
    width, place = rng.choice((2, 4, 8)), _place(len(content), rng)
    value = (rng.choice(LENGTHS) % 256**width).to_bytes(width, rng.choice(("little", "big")))
    return content[:place] + value + content[place + width :]


def insert(content: bytes, rng: random.Random) -> bytes:
    place = _place(len(content), rng)
    return content[:place] + rng.choice(RAW) + content[place:]


BYTES: tuple[Mutator, ...] = (flip, flip, cut, delete, duplicate, splice, fill, length, length, insert)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """One of BYTES."""
    return rng.choice(BYTES)(content or b"0", rng)


# What is in a file ---


def swap(tree: Any, rng: random.Random) -> Any:
    """Nested tables and lists with one value replaced, removed, doubled or renamed."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in (
            list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        ):
            places.append((node, key))
            if len(places) < 5000:
                visit(node[key])

    visit(tree)
    if not places or rng.random() < 0.02:
        return rng.choice(HOSTILE)
    node, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.1:
        del node[key]
    elif kind < 0.15 and isinstance(node, dict):
        node[str(rng.choice(HOSTILE))] = node.pop(key)
    elif kind < 0.2 and isinstance(node, dict):
        node[rng.choice(places)[1]] = node[key]
    elif kind < 0.3:
        node[key] = rng.choice((str(node[key]), [node[key]], {"a": node[key]}, [node[key]] * 50))
    elif kind < 0.4 and isinstance(node[key], int | float):
        node[key] = rng.choice((-node[key], node[key] + 1, node[key] * 2, node[key] / 3, node[key] * 1000))
    else:
        node[key] = rng.choice(HOSTILE)
    return tree


def damage_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(swap(json.loads(content), rng)).encode()


def damage_yaml(content: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(swap(yaml.safe_load(content), rng), sort_keys=False).encode()


def damage_lines(content: bytes, rng: random.Random) -> bytes:
    """A hostile text in the place of a cell, a word or a line; lines left out, doubled, exchanged."""
    lines = content.split(b"\n")
    i, text = rng.randrange(len(lines)), str(rng.choice(HOSTILE)).encode(errors="surrogatepass")
    mark = rng.choice((b",", b" "))
    cells = lines[i].split(mark)
    cells[rng.randrange(len(cells))] = text
    j = rng.randrange(len(lines))
    changed = rng.choice(([mark.join(cells)], [text], [], [lines[i]] * 2, [lines[j]], [lines[i], text]))
    return b"\n".join([*lines[:i], *changed, *lines[i + 1 :]])


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """The table of tensors of a safetensors file, whose length is mended."""
    size = int.from_bytes(content[:8], "little")
    header = damage_json(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def damage_zip(content: bytes, rng: random.Random) -> bytes:
    """A member of a zip, whose checksum is mended; most often the pickle of a file of torch."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    pickles = [name for name in members if name.endswith("data.pkl")]
    name = rng.choice(pickles) if pickles and rng.random() < 0.8 else rng.choice(list(members))
    members[name] = damage_bytes(members[name], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for member, data in members.items():
            file.writestr(zipfile.ZipInfo(member), data)
    return buffer.getvalue()


def damage_png(content: bytes, rng: random.Random) -> bytes:
    """A chunk of a PNG, whose length and checksum are mended; the content of a compressed one, too."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    i = rng.randrange(len(chunks))
    name, data = chunks[i]
    unpacked = name == b"IDAT" and rng.random() < 0.5
    data = damage_bytes(zlib.decompress(data) if unpacked else data, rng)
    chunks[i] = name, zlib.compress(data) if unpacked else data
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return content[:8] + b"".join(packed)


def damage_gzip(content: bytes, rng: random.Random) -> bytes:
    kind = rng.choice((damage_bytes, damage_lines))
    return gzip.compress(kind(gzip.decompress(content), rng), 1, mtime=0)


BY_SUFFIX: dict[str, Mutator] = {".json": damage_json, ".yaml": damage_yaml, ".safetensors": damage_header}
BY_SUFFIX |= dict.fromkeys((".txt", ".csv", ".caption"), damage_lines)
BY_SUFFIX |= {".png": damage_png, ".gz": damage_gzip}
BY_SUFFIX |= dict.fromkeys((".bin", ".pt", ".ckpt"), damage_zip)


def damage_content(content: bytes, path: Path, rng: random.Random) -> bytes:
    """Damage the content of a file, as its suffix has it or, if it is none of those, its bytes."""
    inside = BY_SUFFIX.get(path.suffix)
    if inside and rng.random() < 0.6:
        try:
            return inside(content, rng)
        except Exception:  # of any kind: an earlier damage may have left no such file
            pass
    return damage_bytes(content, rng)


def replace(path: Path, others: list[Path], rng: random.Random) -> None:
    """Put something else in the place of a file: nothing, another file, a folder, a link, a pipe."""
    path.unlink()
    kind = rng.choice(("nothing", "empty", "other", "other", "folder", "dangling", "loop", "pipe"))
    if kind == "other":
        shutil.copy(rng.choice(others), path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("dangling", "loop"):
        path.symlink_to("gone" if kind == "dangling" else path.name)
    elif kind == "empty":
        path.write_bytes(b"")


def damage(folder: Path, others: list[Path], rng: random.Random) -> Path:
    """Damage one file of a folder, and return its path.

    Args:
        others: good files of all kinds, any of which may take its place.
    """
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if rng.random() < 0.05:
        replace(path, others, rng)
        return path
    content = path.read_bytes()
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = damage_content(content, path, rng)
    path.write_bytes(content)
    return path
