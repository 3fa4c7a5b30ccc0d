"""python -m minti.concept: look into files of learned words, convert and merge them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from .cli.command import run_command
from .cli.options import Parser, number
from .errors import InputError
from .formats.atomic import remove_temporaries
from .formats.concept import SUFFIXES, Concept, read_concepts, save_concepts
from .model.checks import has_outputs
from .model.tokenizer import clean
from .version import __version__


def parser() -> Parser:
    """The command line."""
    main = Parser(prog="python -m minti.concept", description="Look into, convert, merge learned words.")
    main.add_argument("--version", action="version", version=f"minti {__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="inspect|convert|merge")

    inspect = commands.add_parser("inspect", help="say what files hold")
    inspect.add_argument("files", metavar="FILE", nargs="+")

    text = "write a file in another format: OUT ends in .safetensors, .bin or .pt"
    convert = commands.add_parser("convert", help=text)
    convert.add_argument("source", metavar="IN")
    convert.add_argument("out", metavar="OUT")
    convert.add_argument("--placeholder", metavar="WORD", help="call the word WORD")
    text = "by default a1111 for .pt, else diffusers"
    convert.add_argument("--format", choices=list(SUFFIXES), help=text)

    text = "put the words of several files into one; diffusers and A1111 want one word a file"
    merge = commands.add_parser("merge", help=text)
    merge.add_argument("out", metavar="OUT")
    merge.add_argument("sources", metavar="IN", nargs="+")
    text = "call the word OLD NEW; of several --rename OLD=..., each is for the next file that has an OLD"
    merge.add_argument("--rename", metavar="OLD=NEW", action="append", default=[], help=text)
    for command in (convert, merge):
        text = "of a word for several text encoders, as SDXL has them, the vectors of this width"
        command.add_argument("--width", type=number(int, 1), metavar="D", help=text)
        command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
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
    if args.command == "merge":
        concepts, format = merged(args.sources, args.rename, args.width), None
    elif args.placeholder is None:
        concepts, format = Concept.load_all(args.source, width=args.width), args.format
    elif clean(args.placeholder):
        concepts, format = [Concept.load(args.source, args.placeholder, width=args.width)], args.format
    else:
        raise InputError("--placeholder: the word is empty; choose something like <toy>")
    remove_temporaries(out)
    save_concepts(out, concepts, format=format)
    print(describe(out))


def describe(path: Path) -> str:
    """A file in a few lines: its format, then for each word its vectors, the model it is for, and notes."""
    kind, concepts = read_concepts(path)
    lines = [f"{printable(str(path))}: {kind}"]
    for concept in concepts:
        count = len(concept.vectors)
        noun = "vector" if count == 1 else "vectors"
        norms = ", ".join(f"{norm:.3g}" for norm in concept.vectors.norm(dim=1).tolist())
        at = "the output of " if has_outputs(concept.widths) else ""
        word = printable(concept.placeholder)
        lines.append(
            f"  '{word}': {count} {noun} for {at}a {concept.encoder}, norm {norms}, hash {concept.digest}"
        )
        for key, value in sorted(concept.metadata.items()):
            text = printable(" ".join(value.split()))
            lines.append(f"    {printable(key)}: {text if len(text) <= 100 else text[:97] + '...'}")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Text with the control characters, which a terminal would obey, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def merged(files: Sequence[str], renames: Sequence[str], width: int | None) -> list[Concept]:
    """The words of all files, renamed by OLD=NEW. Raises InputError if two have the same name."""
    new_names: dict[str, list[str]] = {}
    for pair in renames:
        old, equals, new = pair.partition("=")
        if not (clean(old) and equals and clean(new)):
            raise InputError(f"--rename {pair}: write OLD=NEW")
        new_names.setdefault(old, []).append(new)
    concepts: list[Concept] = []
    origins: dict[str, str] = {}
    for file in files:
        for concept in Concept.load_all(file, width=width):
            old = concept.placeholder
            new = new_names[old].pop(0) if new_names.get(old) else old
            if clean(new) in origins:  # prompts ignore the case
                raise InputError(
                    f"{file}: {new!r} is a word of {origins[clean(new)]} already; "
                    f"rename one of them: --rename '{old}=<another>'"
                )
            origins[clean(new)] = file
            concepts.append(replace(concept, placeholder=new))
            ours, first = (c.encoder for c in (concept, concepts[0]))
            if ours != first:
                raise InputError(
                    f"{file}: {old!r} was learned on a {ours}, the words before it on a {first}; words for "
                    "different models cannot be in one file"
                )
    if unused := [old for old, news in new_names.items() if news]:
        words = ", ".join(repr(c.placeholder) for c in concepts)
        raise InputError(f"--rename {unused[0]}=...: no such word is left; there are {words}")
    return concepts


command = partial(run_command, "minti.concept", main)

if __name__ == "__main__":
    command()
