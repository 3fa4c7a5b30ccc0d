"""python -m minti.report RUN: write `report.html` for a training run anew, from the files it has left."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .cli.command import run_command
from .cli.options import Parser
from .cli.yaml_files import read_yaml
from .errors import InputError
from .runs.folder import SIGNATURE, made
from .runs.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write a report for each word of the run; also of one that was killed."""
    parser = Parser(prog="python -m minti.report", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of minti.train")
    folder = parser.parse_args(argv).run
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    if not config.keys() >= set(SIGNATURE):
        raise InputError(f"{folder}: is not the folder of a run of minti.train")
    for path in (folder / name for name in made(config)):
        if path.name == "report.html" and path.parent.is_dir():
            write_report(path.parent)
            print(path)


command = partial(run_command, "minti.report", main)

if __name__ == "__main__":
    command()
