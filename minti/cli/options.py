"""The options of a command: declared once, given as flags or in config files, and checked in one way."""

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import InputError
from ..formats.checkpoint import DTYPES
from ..model import kernels
from ..version import __version__
from .work_folder import WorkFolder
from .yaml_files import is_text, read_yaml

PATHS = ("DIR", "PATH", "FILE|RUN", "NAME|FILE")  # the metavars of options that are paths
TINY = ("weights", "tiny")  # the model that comes with the repository
MAX_SIDE = 2**14  # of a picture in pixels
MOST = 10**9  # of any whole number that has no smaller bound


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class Options:
    """Command-line options whose values may also come from a YAML file.

    Flags go before `--set key=value`, which goes before `--config FILE`, which goes before the defaults. The
    keys of a file are the flags with underscores for dashes.
    """

    def __init__(self, command: str, description: str) -> None:
        self._command = command
        self._parser = Parser(
            prog=f"python -m {command}", description=description, argument_default=argparse.SUPPRESS
        )
        self._defaults: dict[str, Any] = {}
        self._lists: set[str] = set()
        self._aliases: dict[str, str] = {}
        self._groups: dict[str, Any] = {}
        self._file_only: set[str] = set()
        self._texts: set[str] = set()
        self.given: set[str] = set()  # the keys of the flags in the command line that was parsed last
        self._parser.add_argument(
            "--config", metavar="FILE", help="YAML file, or recipe, with any of the options"
        )
        self._parser.add_argument("--set", metavar="KEY=VALUE", action="append", help="set any option")
        self._parser.add_argument("--version", action="version", version=f"minti {__version__}")

    def add(
        self,
        group: str,
        flag: str,
        default: Any = None,
        *,
        help: str,
        alias: str | None = None,
        **options: Any,
    ) -> None:
        """Declare an option: the arguments of `ArgumentParser.add_argument`, under a heading.

        Args:
            alias: another name of the flag, which files can use as well.
        """
        if group not in self._groups:
            self._groups[group] = self._parser.add_argument_group(group)
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif default not in (None, [], ""):
            help += f" (default: {default})"
        name = flag.removeprefix("--").replace("-", "_")
        if isinstance(default, list):
            options["action"] = "append"
            self._lists.add(name)
        if options.get("metavar") in PATHS:
            options["type"] = path
        if not isinstance(default, bool) and options.get("type", path) is path and "choices" not in options:
            self._texts.add(name)
        self._defaults[name] = default
        flags = [flag, alias] if alias else [flag]
        if alias:
            self._aliases[alias.removeprefix("--").replace("-", "_")] = name
            options["dest"] = name
        self._groups[group].add_argument(*flags, help=help, **options)

    def add_model(self) -> None:
        """Declare the options that say which model to load, and how; see `load_model`."""
        group, kinds = "the model", ["epsilon", "v_prediction", "sample"]
        text = "diffusers folder, or .safetensors or .ckpt file"
        self.add(group, "--checkpoint", metavar="PATH", help=text)
        text = "tokenizer for a single file, folder or .txt.gz"
        self.add(group, "--tokenizer", metavar="PATH", help=text)
        self.add(group, "--variant", metavar="NAME", help="which weights of a folder, such as fp16")
        self.add(group, "--ema", False, help="the averaged weights of a file that has both")
        self.add(group, "--vae", metavar="PATH", help="autoencoder to use instead: folder or file")
        text = "weights to lay over the UNet, as minti.tune writes them: file, or folder of that run"
        self.add(group, "--unet", metavar="PATH", help=text)
        self.add(group, "--text-encoder", metavar="PATH", help="the same for the text encoder")
        self.add(group, "--prediction-type", choices=kinds, help="overrides what the checkpoint says")
        text = "as-published: the noise schedule of the LDM's folder, which is not that of its training"
        self.add(group, "--schedule", "auto", choices=["auto", "as-published"], help=text)
        text = "text layer that the UNet attends to, counted from the end, as AUTOMATIC1111 does"
        self.add(group, "--clip-skip", type=number(int, 1, 100), metavar="N", help=text)
        self.add(group, "--device", "auto", help="auto, cpu, cuda, cuda:N or mps")
        self.add(group, "--dtype", "auto", choices=["auto", *DTYPES], help="number format of the weights")
        text = "sdpa: PyTorch's; triton: minti's own kernel, for NVIDIA GPUs"
        self.add(group, "--attention", "sdpa", choices=kernels.METHODS, help=text)
        text = "decode pictures larger than this in tiles: less memory, slightly different colours"
        self.add(group, "--vae-tile", type=number(int, 64, 2**16), metavar="PX", help=text)
        self.add(group, "--compile", False, help="compile the model first: minutes now, faster steps later")

    def add_judge(self, group: str) -> None:
        """Declare the options that say which CLIP judges pictures; see `judge.scorer.choose_clip`."""
        text = "CLIP to judge by: transformers folder or OpenAI's .pt; by default the checkpoint's own"
        self.add(group, "--clip", metavar="PATH", help=text)
        text = "tokenizer for a .pt file, folder or .txt.gz"
        self.add(group, "--clip-tokenizer", metavar="PATH", help=text)

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of every option."""
        return dict(self._defaults)

    def folder(
        self,
        path: str | Path,
        args: argparse.Namespace,
        made: Sequence[str] | Callable[[dict[str, Any]], Sequence[str]],
        **how: Any,
    ) -> WorkFolder:
        """The `WorkFolder` at a path, for a command with these options.

        Args:
            made: the names of all files and folders that the command makes, or a function from the values of
                all options to them.
            how: `may_differ`, `signature` and `active`, see there.
        """

        def names(settings: Mapping[str, Any]) -> Sequence[str]:
            return made(self._defaults | settings) if callable(made) else made

        return WorkFolder(path, self._command, vars(args), defaults=self._defaults, made=names, **how)

    def file_only(self, name: str) -> None:
        """Declare a key that only a config file can give; it is passed on as it is."""
        self._file_only.add(name)

    def parse(
        self, argv: Sequence[str] | None, required: Sequence[str], base: dict[str, Any] | None = None
    ) -> argparse.Namespace:
        """All options, resolved.

        Args:
            argv: the command line; None for that of the process.
            required: names of options that must have a value.
            base: what the config file adds to, instead of to nothing.

        Raises:
            InputError: unknown options, bad values, required ones left out.
        """
        flags = self._parse(argv)
        self.given = set(flags)
        config = dict(base or {}) | (read_yaml(flags.pop("config")) if "config" in flags else {})
        for key in ("made_by", "made_of"):  # of the config file of a run
            config.pop(key, None)
        for pair in flags.pop("set", []):
            key, equals, value = pair.partition("=")
            if not equals:
                raise InputError(f"--set {pair}: write KEY=VALUE")
            config[key.strip().replace("-", "_")] = _list_or_text(value)
        config = {self._aliases.get(key, key): value for key, value in config.items()}
        passed_on = {key: config.pop(key, None) for key in self._file_only}
        values = self._defaults | passed_on | self.check(config) | flags
        if missing := [f"--{key.replace('_', '-')}" for key in required if values[key] in (None, [])]:
            raise InputError(f"{' and '.join(missing)} must be given; see --help")
        return argparse.Namespace(**values)

    def refuse_idle(self, args: argparse.Namespace, needs: Mapping[str, str]) -> None:
        """Raises InputError if the command line has an option without the other one that it needs."""
        for key, other in needs.items():
            if key in self.given and not getattr(args, other):
                flag, needed = (f"--{name.replace('_', '-')}" for name in (key, other))
                raise InputError(f"{flag} has no effect without {needed}; leave it out")

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values from a config file, converted and checked as those of flags are."""
        return self._parse(self._as_flags(values))

    def _parse(self, argv: Sequence[str] | None) -> dict[str, Any]:
        argv = [self._with_dashes(argument) for argument in (sys.argv[1:] if argv is None else argv)]
        for argument in argv:
            if not is_text(argument):
                raise InputError(f"{argument!a}: is not text in UTF-8, or holds control characters")
        values, unknown = self._parser.parse_known_args(argv)
        if unknown:
            raise InputError(f"unknown option {unknown[0]!r}{self._suggest(unknown[0])}; see --help")
        return vars(values)

    def _with_dashes(self, argument: str) -> str:
        """`--batch_size=2`, as config files spell it, is `--batch-size=2`."""
        name, equals, value = argument.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        known = argument.startswith("--") and key in self._defaults
        return f"--{key.replace('_', '-')}{equals}{value}" if known else argument

    def _suggest(self, name: str) -> str:
        key = name.partition("=")[0].removeprefix("--").replace("-", "_")
        near = difflib.get_close_matches(key, [*self._defaults, *self._aliases, *self._file_only], n=1)
        if near and name.startswith("--"):
            near = ["--" + near[0].replace("_", "-")]
        return f"; did you mean {near[0]!r}?" if near else ""

    def _as_flags(self, config: dict[str, Any]) -> list[str]:
        """Config values go through the same checks as flags by becoming flags."""
        flags = []
        for key, value in config.items():
            if key not in self._defaults:
                raise InputError(f"unknown option {key!r}{self._suggest(str(key))}")
            flag = "--" + key.replace("_", "-")
            if isinstance(self._defaults[key], bool):
                yes = {"true": True, "false": False}.get(str(value).lower())
                if yes is None:
                    raise InputError(f"{flag}: {value!r} should be true or false")
                flags.append(flag if yes else flag.replace("--", "--no-", 1))
            elif value is not None:
                values = value if key in self._lists and isinstance(value, list) else [value]
                if any(isinstance(v, bool | list | dict) for v in values):
                    raise InputError(f"{flag}: {value!r} is not a single value; put text between quotes")
                if key in self._texts and not all(isinstance(v, str) for v in values):
                    raise InputError(f"{flag}: {value!r} is no text in YAML; put it between quotes")
                flags += [f"{flag}={v}" for v in values]
        return flags


def _list_or_text(text: str) -> Any:
    """`[a, b]` and `null` as YAML has them; anything else is what it looks like, also `no` and `cat: red`."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, list) else text


def number(
    kind: type, low: float, high: float | None = None, *, below: float | None = None
) -> Callable[[str], Any]:
    """A type of option: a finite int or float from `low` to `high`, and less than `below`.

    Whole numbers without `high` go up to MOST.
    """
    high = MOST if high is None and below is None and kind is int else high

    def convert(text: str) -> Any:
        value = kind(text)
        inside = low <= value < float("inf") and (high is None or value <= high)
        if inside and (below is None or value < below):
            return value
        upper = f" and at most {high}" if high is not None else " and finite"
        upper = f" and below {below}" if below is not None else upper
        raise argparse.ArgumentTypeError(f"{text} should be at least {low}{upper}")

    convert.__name__ = kind.__name__
    return convert


def path(text: str) -> str:
    """A type of option: a path. `~` is the home of the user; `weights/tiny` is found from any folder."""
    if text.startswith("~"):
        return str(Path(text).expanduser())
    if Path(text).parts[:2] != TINY or Path(text).exists():
        return text
    shipped = Path(__file__).resolve().parents[2] / text
    if not shipped.exists() and not Path(*TINY).exists():
        remedy = "run this in a clone of it, or give a checkpoint and photos of your own"
        raise argparse.ArgumentTypeError(f"{text} comes with the repository, not with the package; {remedy}")
    return str(shipped) if shipped.exists() else text


def side(text: str) -> int:
    """A type of option: the side of a square in pixels."""
    if "x" in text.lower():
        raise argparse.ArgumentTypeError(f"{text}: photos are trained as squares; give one number")
    return number(int, 1, MAX_SIDE)(text)


def size(text: str) -> int | tuple[int, int]:
    """A type of option: `512`, or `768x512`, width first."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError
    if not 0 < min(sides) <= max(sides) <= MAX_SIDE:
        raise argparse.ArgumentTypeError(f"{text}: each side should have 1 to {MAX_SIDE} pixels")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
