"""The house itself: how large it may be, and which room may know of which."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "minti"

ROOMS = (
    {"errors", "version"},
    {"model"},
    {"formats"},
    {"inversion", "cli"},
    {"runs"},
    {"judge"},
    {"edit", "tune"},
    {"train", "sample", "evaluate", "concept", "study", "report"},
)
"""Rooms and single modules by floor. Each may import from its own room and from lower floors only."""

BESIDE = {
    "model/image_encoder.py": "scores pictures",
    "model/checks.py": "refuses impossible input",
    "model/config_checks.py": "refuses impossible configs",
    "model/model_hash.py": "recognises a model",
    "model/placeholders.py": "refuses impossible placeholders, and prompts that are too long",
    "model/tiles.py": "decodes large pictures",
    "model/per_layer.py": "words with vectors of their own for each layer",
    "model/output_embedding.py": "words whose vectors stand in the text encoder's output",
    "model/fitting.py": "brings words and text encoders of these kinds together",
    "model/bert.py": "another text encoder",
    "model/wordpiece.py": "its tokenizer",
    "model/canvas.py": "what inpainting models also see",
    "model/conditioning.py": "negative and long prompts",
    "model/schedules.py": "settings of the noise schedule that checkpoints differ in",
    "model/sdxl.py": "the text encoders and sizes of SDXL",
    "model/unclip.py": "the pictures that unCLIP is shown",
    "inversion/from_photos.py": "`minti.learn`, which calls the others in order",
    "inversion/divergence.py": "notices that training has gone wrong",
    "inversion/state.py": "saves and restores a run",
    "inversion/prompt_variants.py": "prompts of the bare word or with a word for the photo",
    "inversion/shares.py": "several processes, batches that are added up",
    "inversion/settings.py": "the options of a run, with their checks",
    "inversion/clip_objective.py": "a rival: the objective of CLIP",
    "inversion/new_words.py": "refuses words that do not fit into their prompts",
    "inversion/start.py": "where the rows of a word start",
    "inversion/extensions.py": "options that are off by default",
    "inversion/optimizers.py": "chooses the optimizer, and has one of its own",
    "inversion/templates.py": "reads lists of prompts",
}
"""Files of model/ and inversion/ that are no part of the method, besides the kernels, with the reason."""

READING_PATH = 2000
LINES = 16_860
FILE_LINES = 300
TOO_LONG: dict[str, int] = {}
"""Files that are still longer than FILE_LINES, with the most they may have. This list only ever shrinks."""

PACKAGES = {"torch", "safetensors", "PIL", "numpy", "ftfy", "regex", "yaml"}
OPTIONAL = {"tqdm", "triton", "pillow_heif", "tensorboard", "transformers"}


def files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def lines(name: str) -> int:
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def module(name: str) -> tuple[str, ...]:
    """model/unet.py -> (model, unet); model/__init__.py -> (model,)."""
    parts = Path(name).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(name: str) -> set[tuple[str, ...]]:
    """What a file imports anywhere in it, relative imports in full: (minti, model, unet, UNet)."""
    package = ("minti", *(module(name) if name.endswith("__init__.py") else module(name)[:-1]))
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
    return found


def graph() -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Module of minti -> the modules of minti that it imports."""
    modules = {module(name) for name in files()}
    edges = {}
    for name in files():
        inside = [target[1:] for target in imports(name) if target[0] == "minti"]
        # `from .unet import UNet` names an attribute, `from . import unet` a module.
        edges[module(name)] = {t if t in modules else t[:-1] for t in inside} - {module(name)}
    return edges


def test_the_reading_path_is_short() -> None:
    path = [name for name in files() if name.startswith(("model/", "inversion/")) and name not in BESIDE]
    counts = {name: lines(name) for name in path if not name.startswith("model/kernels/")}
    assert sum(counts.values()) <= READING_PATH, counts
    readme = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    told = re.search(r"are ([\d,]+) lines in (\d+) files", readme)
    assert abs(int(told[1].replace(",", "")) - sum(counts.values())) <= 20 and int(told[2]) == len(counts)


def test_no_file_is_long() -> None:
    too_long = {name: lines(name) for name in files() if lines(name) > TOO_LONG.get(name, FILE_LINES)}
    assert not too_long


def test_all_together_is_not_much() -> None:
    assert sum(map(lines, files())) < LINES


def test_imports_go_one_way() -> None:
    floor = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    assert {source[0] for source in graph() if source} - {"recipes"} <= floor.keys()
    wrong = []
    for source, targets in graph().items():
        for target in targets if source else ():  # minti/__init__.py shows what the rooms offer
            ours, theirs = source[0], target[0] if target else "minti/__init__.py"
            if ours != theirs and floor.get(theirs, len(ROOMS)) >= floor[ours]:
                wrong.append(f"{'.'.join(source)} imports {'.'.join(target) or theirs}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges, done = graph(), set()

    def visit(node: tuple[str, ...], path: tuple[tuple[str, ...], ...]) -> None:
        assert node not in path, " -> ".join(".".join(m) for m in (*path[path.index(node) :], node))
        if node not in done:
            for target in sorted(edges[node]):
                visit(target, (*path, node))
            done.add(node)

    for node in edges:
        visit(node, ())


@pytest.mark.parametrize("room", ["model", "formats", "inversion"])
def test_the_inner_rooms_do_not_print_parse_arguments_or_exit(room: str) -> None:
    for name in files():
        if name.startswith(f"{room}/"):
            tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
            calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            assert not calls & {"print", "exit", "quit", "sys.exit", "os._exit"}, name
            assert ("argparse",) not in imports(name), name


def test_few_packages_are_needed() -> None:
    used = {target[0] for name in files() for target in imports(name)} - {"minti", "__future__"}
    assert used - set(sys.stdlib_module_names) - OPTIONAL == PACKAGES
