"""What a file or folder of weights is, and whether minti loads it: python tools/inspect_checkpoint.py PATH

Nothing is read but names, shapes and configs, unless `--verify` asks for every weight. The report ends with a
verdict; the exit code is 0 if the checkpoint loads and 2 if it does not.
"""

import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run in a clone that is not installed

import torch

from minti.cli.command import run_command
from minti.cli.options import Parser
from minti.errors import InputError
from minti.formats.checkpoint import load_tokenizer, make_plan, probe_prediction_type
from minti.formats.concept import Concept
from minti.formats.json_checks import read_json
from minti.formats.kinds import kind_of_keys
from minti.formats.load_plan import CheckpointPlan, PartPlan
from minti.formats.weightfile import WeightFile


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report; leave with exit code 2 where the checkpoint does not load."""
    parser = Parser("inspect_checkpoint.py", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("path", metavar="PATH", type=Path, help="folder, .safetensors, .ckpt, .bin or .pt")
    parser.add_argument(
        "--verify", action="store_true", help="read every weight: damage, NaN, prediction type"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer for a single file")
    parser.add_argument("--variant", metavar="NAME", help="which weights of a folder, such as fp16")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a file that has both")
    parser.add_argument(
        "--keys", type=int, default=5, metavar="N", help="keys shown of each group (default: 5)"
    )
    args = parser.parse_args(argv)

    try:
        plan = make_plan(args.path, variant=args.variant, ema=args.ema)
    except InputError as error:
        if not args.path.exists():
            raise
        print(args.path)
        files = describe_other(args.path)
        conclude([str(error), *(verify(files, args.keys) if args.verify else [])])
    print(plan.path)
    faults = describe(plan, args.keys)
    if args.verify:
        damage = verify(files_of(plan), args.keys)
        faults += damage or ([] if faults else trial_load(plan))
    say("prediction", describe_prediction(plan, probe=args.verify and not faults))
    without = ""
    try:
        say("tokenizer", f"{len(load_tokenizer(plan, args.tokenizer)):,} ids")
    except InputError as error:
        say("tokenizer", "none")
        if args.tokenizer:
            faults.append(str(error))
        without = f", once it has a tokenizer ({error})"
    if faults:
        conclude(faults)
    say("verdict", f"loads{without}" + ("" if args.verify else "; --verify looks at the numbers, too"))


def say(label: str, text: str) -> None:
    print(f"  {label:<13} {text}")


def conclude(faults: Sequence[str]) -> NoReturn:
    say("verdict", f"does not load: {'; '.join(faults)}")
    sys.exit(2)


def size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def some(keys: Sequence[str], limit: int) -> str:
    """The first few of many."""
    more = f", and {len(keys) - limit:,} more" if len(keys) > limit else ""
    return f"{', '.join(keys[:limit])}{more}"


def describe(plan: CheckpointPlan, limit: int) -> list[str]:
    """Say what a plan found. Returns what keeps it from being loaded."""
    say("layout", plan.layout)
    say("family", plan.family)
    for name, part in plan.parts.items():
        say(name, describe_part(part))
        if unusual := differences(part.module.config):
            say("", f"unlike SD 1.x: {unusual}")
    if unusual := differences(plan.schedule):
        say("schedule", f"unlike SD 1.x: {unusual}")
    for note in plan.notes:
        say("note", note)

    claimed = {origin.key for part in plan.parts.values() for origin in part.origins.values()}
    unexpected = {key.rpartition("/")[2] for key in plan.unexpected}
    aside = Counter(
        "model_ema.*" if key.startswith("model_ema.") else re.sub(r"(\.resblocks\.\d+\.).*", r"\1*", key)
        for file in files_of(plan)
        for key in file.shapes
        if key not in claimed and key not in unexpected
    )
    if aside:
        kinds = [f"{kind} ({n:,})" if n > 1 else kind for kind, n in aside.most_common()]
        say("left aside", f"{aside.total():,} keys that are no part of the model: {some(kinds, limit)}")

    groups: dict[str, list[str]] = {}
    for problem in plan.problems():
        part, _, rest = problem.partition(": ")
        if problem.startswith("unexpected key "):
            groups.setdefault("unexpected", []).append(problem.removeprefix("unexpected key "))
        elif rest.startswith("missing key "):
            groups.setdefault(f"missing in {part}", []).append(rest.removeprefix("missing key "))
        else:
            groups.setdefault(f"wrong in {part}", []).append(rest)
    for group, keys in groups.items():
        say(group, f"({len(keys):,}) {some(keys, limit)}")
    faults = [
        f"{group}: {keys[0] if len(keys) == 1 else f'{len(keys):,} keys'}" for group, keys in groups.items()
    ]
    if faults:
        faults.append(
            "download it again or, if it is a new kind of model, see 'Porting' in minti/formats/README.md"
        )
    return faults


def files_of(plan: CheckpointPlan) -> list[WeightFile]:
    """Every file of a checkpoint, once."""
    return list({file.path: file for part in plan.parts.values() for file in part.files}.values())


def describe_part(part: PartPlan) -> str:
    keys = {origin.key for origin in part.origins.values()}
    found = [(file, key) for file in part.files for key in file.shapes if key in keys]
    parameters = sum(tensor.numel() for tensor in part.module.state_dict().values())
    nbytes = sum(file.nbytes[key] for file, key in found)
    stored = dtypes(file.dtypes[key] for file, key in found)
    names = ", ".join(file.path.name for file in part.files)
    return f"{parameters:,} parameters, {stored}, {size(nbytes)}, {names}"


def dtypes(kinds: Iterable[torch.dtype]) -> str:
    """The number formats of some tensors, the most common first."""
    return " and ".join(str(kind).removeprefix("torch.") for kind, _ in Counter(kinds).most_common())


def differences(config: Any) -> str:
    """The fields of a config that are not those of SD 1.x, which are the defaults."""
    usual = asdict(type(config)())
    return ", ".join(f"{key} = {value}" for key, value in asdict(config).items() if value != usual[key])


def describe_prediction(plan: CheckpointPlan, probe: bool) -> str:
    """What the UNet predicts, and what told."""
    kind = plan.schedule.prediction_type
    if plan.layout == "diffusers":
        return f"{kind}, says scheduler/scheduler_config.json"
    if not plan.ask_prediction_type:
        from_yaml = plan.path.with_suffix(".yaml").is_file()
        return f"{kind}, " + (
            "says the .yaml beside the file" if from_yaml else "as all public models with this text encoder"
        )
    if not probe:
        return "epsilon or v_prediction: only the output of the UNet tells, at loading or with --verify"
    return f"{probe_prediction_type(plan.parts['unet'].module)}, judging by the output of the UNet"


def describe_other(path: Path) -> list[WeightFile]:
    """Say what something that is no checkpoint of ours seems to be. Returns the files of weights it has."""
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        for name in {"model_index.json", "config.json"}.intersection(names):
            raw = read_json(path / name)
            say("seems to be", f"a {raw.get('_class_name') or ', '.join(raw.get('architectures') or ['?'])}")
        say("holds", some(names, 10) or "nothing")
        return []
    try:
        concept = Concept.load(path)
        n, width = concept.vectors.shape
        say("seems to be", f"a learned word, {concept.placeholder!r}: {n} vectors, {width} wide (--concept)")
        return [WeightFile(path)]
    except InputError:
        pass
    try:
        file = WeightFile(path)
    except InputError:
        return []  # the verdict says what it is
    say("seems to be", kind_of_keys(file.shapes) or "nothing known here")
    say(
        "holds",
        f"{len(file.shapes):,} tensors, {dtypes(file.dtypes.values())}, {size(sum(file.nbytes.values()))}",
    )
    roots = Counter(".".join(key.split(".")[:2]) for key in file.shapes)
    say("keys", some([f"{root} ({n:,})" for root, n in roots.most_common()], 8))
    return [file]


def verify(files: Iterable[WeightFile], limit: int) -> list[str]:
    """Read everything. Returns what is wrong with it."""
    faults = []
    for file in files:
        if zipfile.is_zipfile(file.path):
            try:
                damaged = zipfile.ZipFile(file.path).testzip()
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                damaged = str(error)
            if damaged:
                faults.append(f"{file.path.name}: checksum of {damaged} is wrong; download it again")
                continue
        broken = []
        for key, tensor in file.read(list(file.shapes), copied=True):
            if tensor.is_floating_point() and not tensor.float().sum().isfinite():
                broken.append(key)
        if broken:
            say("not finite", f"({len(broken):,}) {some(broken, limit)}")
            faults.append(
                f"{file.path.name}: NaN or infinity in {len(broken):,} of its tensors; download it again"
            )
    if not faults:
        say("verified", "every number is finite; checksums, where there are any, are right")
    return faults


def trial_load(plan: CheckpointPlan) -> list[str]:
    """Load every part as a run would. Returns what was wrong with the first that does not."""
    try:
        for part in plan.parts.values():
            part.load(torch.float32, torch.device("cpu"))
    except InputError as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    run_command("inspect_checkpoint", main)
