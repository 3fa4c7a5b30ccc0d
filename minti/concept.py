"""python -m minti.concept: look into files of learned words, convert and merge them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .cli.command import run_command
from .cli.options import Parser, number
from .errors import InputError
from .formats import embedding_files
from .formats.concept import Concept, save_concepts
from .model.embedding import encoder_of
from .model.tokenizer import clean


def parser() -> Parser:
    """The command line."""
    main = Parser(prog="python -m minti.concept", description="Look into, convert, merge learned words.")
    commands = main.add_subparsers(dest="command", required=True, metavar="inspect|convert|merge")
    width = {"type": number(int, 1), "metavar": "D", "help": "of an SDXL word, the vectors of this width"}
    overwrite = {"action": "store_true", "help": "replace OUT if it exists"}

    inspect = commands.add_parser("inspect", help="say what files hold")
    inspect.add_argument("files", metavar="FILE", nargs="+")

    convert = commands.add_parser(
        "convert", help="write a file in another format: OUT ends in .safetensors, .bin or .pt"
    )
    convert.add_argument("source", metavar="IN")
    convert.add_argument("out", metavar="OUT")
    convert.add_argument("--placeholder", metavar="WORD", help="call the word WORD")
    convert.add_argument(
        "--format", choices=list(embedding_files.SUFFIXES), help="by default a1111 for .pt, else diffusers"
    )
    convert.add_argument("--width", **width)
    convert.add_argument("--overwrite", **overwrite)

    merge = commands.add_parser(
        "merge", help="put the words of several files into one; diffusers and A1111 want one word a file"
    )
    merge.add_argument("out", metavar="OUT")
    merge.add_argument("sources", metavar="IN", nargs="+")
    merge.add_argument(
        "--rename",
        metavar="OLD=NEW",
        action="append",
        default=[],
        help="call the word OLD NEW; where several files have an OLD, the first --rename is for the first of "
        "them, the second for the next",
    )
    merge.add_argument("--width", **width)
    merge.add_argument("--overwrite", **overwrite)
    return main


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do what it says."""
    args = parser().parse_args(argv)
    if args.command == "inspect":
        for file in args.files:
            print(describe(Path(file)))
        return
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise InputError(f"{out}: exists already; choose another name, or --overwrite")
    concepts = _converted(args) if args.command == "convert" else _merged(args)
    save_concepts(out, concepts, format=getattr(args, "format", None))
    print(describe(out))


def describe(path: Path) -> str:
    """A file in a few lines: its format, then for each word its vectors, the model it is for, and notes."""
    kind, entries = embedding_files.read(path)
    lines = [f"{path}: {kind}"]
    for entry in entries:
        concept = Concept(entry.word, entry.vectors, entry.metadata)
        count, width = concept.vectors.shape
        norms = ", ".join(f"{norm:.3g}" for norm in concept.vectors.norm(dim=1).tolist())
        lines.append(
            f"  {concept.placeholder!r}: {count} vector{'s'[: count > 1]} for a {encoder_of(width)}, "
            f"norm {norms}, hash {concept.digest}"
        )
        for key, value in sorted(concept.metadata.items()):
            text = " ".join(value.split())
            lines.append(f"    {key}: {text if len(text) <= 100 else text[:97] + '...'}")
    return "\n".join(lines)


def _converted(args: argparse.Namespace) -> list[Concept]:
    if args.placeholder is None:
        return Concept.load_all(args.source, width=args.width)
    if not clean(args.placeholder):
        raise InputError("--placeholder: the word is empty; choose something like <toy>")
    return [Concept.load(args.source, args.placeholder, width=args.width)]


def _merged(args: argparse.Namespace) -> list[Concept]:
    """The words of all files under their new names. Raises InputError if two are called the same."""
    renames: dict[str, list[str]] = {}
    for pair in args.rename:
        old, equals, new = pair.partition("=")
        if not (clean(old) and equals and clean(new)):
            raise InputError(f"--rename {pair}: write OLD=NEW")
        renames.setdefault(old, []).append(new)
    merged, origins = [], {}
    for file in args.sources:
        for concept in Concept.load_all(file, width=args.width):
            old = concept.placeholder
            new = renames[old].pop(0) if renames.get(old) else old
            if clean(new) in origins:  # prompts ignore the case
                raise InputError(
                    f"{file}: {new!r} is a word of {origins[clean(new)]} already; "
                    f"rename one of them: --rename '{old}=<another>'"
                )
            origins[clean(new)] = file
            merged.append(Concept(new, concept.vectors, concept.metadata))
            if merged[0].vectors.shape[1] != concept.vectors.shape[1]:
                widths = [encoder_of(c.vectors.shape[1]) for c in (concept, merged[0])]
                raise InputError(
                    f"{file}: {old!r} was learned on a {widths[0]}, the words before it on a {widths[1]}; "
                    "words for different models cannot be in one file"
                )
    if unused := [old for old, news in renames.items() if news]:
        words = ", ".join(repr(c.placeholder) for c in merged)
        raise InputError(f"--rename {unused[0]}=...: no such word is left; there are {words}")
    return merged


if __name__ == "__main__":
    run_command("minti.concept", main)
