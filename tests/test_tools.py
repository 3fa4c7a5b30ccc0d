"""The tools around public checkpoints: what they say, and with which exit code."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import utils
from huggingface_hub.hf_api import ModelInfo
from safetensors.torch import load_file, save_file

import minti
from minti.cli.command import run_command
from minti.errors import InputError
from minti.formats.vocabulary import read_tokenizer
from minti.judge.scorer import Scorer
from tests import oracles
from tools import download, inspect_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracles.save_folder(tmp_path_factory.mktemp("sd1") / "model")


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of `folder` as a single file has them."""
    return oracles.single_file(minti.load(folder, device="cpu", dtype="float32"))


# inspect_checkpoint.py ---


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the tool: (exit code, report)."""

    def run(*argv: str | Path) -> tuple[int, str]:
        code = 0
        try:
            inspect_checkpoint.main([str(arg) for arg in argv])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    return run


def line(report: str, label: str) -> str:
    """What the report says under a label."""
    return next(
        text[len(label) + 2 :].strip() for text in report.splitlines() if text.startswith(f"  {label}")
    )


def test_folder(inspect, folder):
    code, report = inspect(folder)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert code == 0
    assert line(report, "layout") == "diffusers"
    assert line(report, "unet").startswith(
        f"{sum(w.numel() for w in weights.values()):,} parameters, float32"
    )
    assert line(report, "prediction").startswith("epsilon, says scheduler")
    assert line(report, "tokenizer") == f"{len(minti.load(folder, device='cpu').tokenizer)} ids"
    assert line(report, "verdict").startswith("loads;")


def test_number_formats_are_those_of_the_file(inspect, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: w.half() if "attn" in k else w.bfloat16() for k, w in weights.items()}, file)
    _, report = inspect(copy)
    assert "bfloat16 and float16, " in line(report, "unet")
    assert "float32, " in line(report, "vae")


def test_single_file_without_tokenizer(inspect, single, tmp_path):
    file = tmp_path / "model.safetensors"
    averages = {f"model_ema.{i}": torch.ones(1) for i in range(3)}
    save_file(single | averages | {"betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2}, file)
    code, report = inspect(file, "--verify")
    assert code == 0
    assert line(report, "layout") == "single file"
    assert "model_ema.* (3), betas" in line(report, "left aside")
    assert "tools/download.py tokenizer" in line(report, "verdict")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_what_decides_the_prediction_type(inspect, tmp_path, kind):
    sd = minti.load(oracles.save_folder(tmp_path / "model", "sd2", kind), device="cpu", dtype="float32")
    with torch.no_grad():  # a UNet that answers like one of the kind
        sd.unet.conv_out.bias.fill_(-9.0 if kind == "v_prediction" else 0.5)
    file = tmp_path / "model.safetensors"
    save_file(oracles.single_file(sd), file)
    assert "only the output of the UNet tells" in line(inspect(file)[1], "prediction")
    assert line(inspect(file, "--verify")[1], "prediction") == f"{kind}, judging by the output of the UNet"
    file.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    assert line(inspect(file)[1], "prediction") == "v_prediction, says the .yaml beside the file"


def test_missing_unexpected_and_wrong_keys_are_counted_and_capped(inspect, single, tmp_path):
    norms = [key for key in single if key.startswith("model.") and ".norm1." in key]
    bad = {key: value for key, value in single.items() if key not in norms}
    bad |= {f"other.{i}": torch.ones(1) for i in range(8)}
    bad["first_stage_model.quant_conv.bias"] = torch.ones(3)
    save_file(bad, tmp_path / "bad.safetensors")
    code, report = inspect(tmp_path / "bad.safetensors", "--keys", "2")
    assert code == 2
    assert line(report, "missing in unet").startswith(f"({len(norms)}) ")
    assert f"and {len(norms) - 2} more" in line(report, "missing in unet")
    assert "first_stage_model.quant_conv.bias has shape (3,)" in line(report, "wrong in vae")
    assert line(report, "unexpected") == "(8) other.0, other.1, and 6 more"
    verdict = line(report, "verdict")
    assert verdict.startswith("does not load") and "unexpected: 8 keys" in verdict and "README" in verdict


def test_verify_finds_numbers_that_are_none(inspect, single, tmp_path):
    key = "model.diffusion_model.out.2.bias"
    save_file(single | {key: single[key] * float("nan")}, tmp_path / "nan.safetensors")
    assert inspect(tmp_path / "nan.safetensors")[0] == 0
    code, report = inspect(tmp_path / "nan.safetensors", "--verify")
    assert code == 2
    assert line(report, "not finite") == f"(1) {key}"


def test_quantised_weights(inspect, single, tmp_path):
    key = "model.diffusion_model.out.2.bias"
    save_file(single | {key: single[key].to(torch.int8)}, tmp_path / "int8.safetensors")
    code, report = inspect(tmp_path / "int8.safetensors")
    assert code == 2
    assert f"wrong in unet: {key} is torch.int8; quantised" in line(report, "verdict")


def test_verify_finds_a_flipped_bit_in_a_zip(inspect, single, tmp_path):
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": single}, file)
    assert inspect(file, "--verify")[0] == 0
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # amid the numbers, where torch.load does not notice
    file.write_bytes(content)
    assert inspect(file)[0] == 0
    code, report = inspect(file, "--verify")
    assert code == 2
    assert "checksum" in line(report, "verdict")


@pytest.mark.parametrize(
    "keys, seems",
    [
        (["lora_unet_mid.lora_up.weight", "lora_unet_mid.lora_down.weight"], "LoRA"),
        (["unet.mid_block.to_q.lora_A.weight", "unet.mid_block.to_q.lora_B.weight"], "LoRA"),
        (["lora_unet_mid.hada_w1_a", "lora_te_x.hada_w1_b"], "LoRA"),
        (["mid.hada_w1_a", "mid.hada_w1_b"], "LyCORIS"),
        (["conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x"], "SDXL"),
        (["conditioner.embedders.0.model.x", "model.diffusion_model.x"], "Stable Diffusion 2"),
        (["cond_stage_model.transformer.token_emb.weight", "model.diffusion_model.x"], "BERT"),
        (["decoder.mid_block.resnets.0.norm1.weight", "encoder.conv_in.weight"], "VAE"),
        (["first_stage_model.decoder.mid.block_1.norm1.weight", "b"], "VAE"),
        (["text_model.embeddings.token_embedding.weight", "logit_scale"], "text encoder alone"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "UNet alone"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "ControlNet"),
        (["model.diffusion_model.joint_blocks.0.x", "b"], "diffusion transformer"),
        (["layer1.weight", "layer2.weight"], "nothing known"),
    ],
)
def test_what_other_files_seem_to_be(inspect, tmp_path, keys, seems):
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "other.safetensors")
    code, report = inspect(tmp_path / "other.safetensors")
    assert code == 2
    assert seems in line(report, "seems to be")
    assert line(report, "verdict").startswith("does not load")


def test_other_things(inspect, folder, tmp_path):
    save_file({"<toy>": torch.ones(3, 768)}, tmp_path / "toy.safetensors")
    assert "a learned word, '<toy>': 3 vectors, 768 wide" in inspect(tmp_path / "toy.safetensors")[1]
    assert "UNet2DConditionModel" in line(inspect(folder / "unet")[1], "seems to be")
    (tmp_path / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\n")
    code, report = inspect(tmp_path / "pointer.ckpt", "--verify")
    assert code == 2 and "git-LFS pointer" in line(report, "verdict")
    with pytest.raises(InputError, match="does not exist"):
        inspect(tmp_path / "nowhere")


# download.py ---


class FakeHub:
    """The two calls of huggingface_hub that the tool makes, served from a folder."""

    def __init__(self, source: Path) -> None:
        self.source, self.fetched = source, []

    def model_info(self, api, repo_id, *, revision=None, files_metadata=False) -> ModelInfo:
        assert files_metadata
        siblings = []
        for path in sorted(p for p in self.source.rglob("*") if p.is_file()):
            content = path.read_bytes()
            entry = {"rfilename": path.relative_to(self.source).as_posix(), "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.suffix in (".safetensors", ".bin", ".ckpt"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 1}
            siblings.append(entry)
        return ModelInfo(id=repo_id, sha=COMMIT, siblings=siblings)

    def hf_hub_download(self, repo_id, filename, *, revision, local_dir, force_download) -> str:
        assert revision == COMMIT
        self.fetched.append(filename)
        target = Path(local_dir) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.source / filename, target)
        return str(target)


CLIP_TOKENIZER = [name for name in download.TOKENIZER if name != "vocab.txt"]  # which is BERT's
SD_WEIGHTS = {part: download.WEIGHTS[part] for part in ("text_encoder", "unet", "vae")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> FakeHub:
    """A hub with one repository: the folder, and much that nobody needs."""
    source = shutil.copytree(folder, tmp_path / "hub")
    for part, stem in SD_WEIGHTS.items():
        shutil.copyfile(source / part / f"{stem}.safetensors", source / part / f"{stem}.bin")
        weights = load_file(source / part / f"{stem}.safetensors")
        halved = {key: w.half() for key, w in weights.items()}
        save_file(halved, source / part / f"{stem}.fp16.safetensors")
        save_file(halved, source / part / f"{stem}.non_ema.safetensors")
    (source / "safety_checker").mkdir()
    (source / "safety_checker" / "model.safetensors").write_bytes(b"large")
    (source / "model-ema.ckpt").write_bytes(b"larger")
    fake = FakeHub(source)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda api, *args, **kwargs: fake.model_info(api, *args, **kwargs),
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def weights_of(files: list[str]) -> set[str]:
    return {file for file in files if file.endswith((".safetensors", ".bin", ".ckpt"))}


def test_only_what_is_needed_and_it_loads(hub, folder, tmp_path, capsys):
    target = tmp_path / "sd"
    download.main(["sd-1.4", str(target)])
    assert weights_of(hub.fetched) == {f"{p}/{stem}.safetensors" for p, stem in SD_WEIGHTS.items()}
    assert "are as the hub has them" in capsys.readouterr().out
    ids = torch.randint(500, (1, 77))
    ours, theirs = (minti.load(path, device="cpu").text_encoder(ids).context for path in (target, folder))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # the same bytes, so the same numbers


def test_half_precision(hub, tmp_path):
    download.main(["owner/repo", str(tmp_path / "sd"), "--variant", "fp16"])
    stems = {f"{part}/{stem}.fp16.safetensors" for part, stem in SD_WEIGHTS.items()}
    assert weights_of(hub.fetched) == stems
    minti.load(tmp_path / "sd", device="cpu")


def test_what_is_there_is_not_fetched_again(hub, tmp_path):
    target = tmp_path / "sd"
    download.main(["owner/repo", str(target)])
    (target / "unet" / "config.json").unlink()
    hub.fetched.clear()
    download.main(["owner/repo", str(target)])
    assert hub.fetched == ["unet/config.json"]


def test_a_file_that_differs_is_kept_unless_told(hub, tmp_path):
    target = tmp_path / "sd"
    (target / "unet").mkdir(parents=True)
    mine = target / "unet" / "config.json"
    mine.write_text("mine")
    with pytest.raises(InputError, match=r"unet/config\.json: exists and is not the hub's.*--overwrite"):
        download.main(["owner/repo", str(target)])
    assert mine.read_text() == "mine" and hub.fetched == []
    download.main(["owner/repo", str(target), "--overwrite"])
    assert mine.read_bytes() == (hub.source / "unet" / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_flipped_bit_on_the_way_is_noticed(hub, tmp_path, monkeypatch, name):
    def flip(repo_id, filename, **kwargs):
        path = Path(hub.hf_hub_download(repo_id, filename, **kwargs))
        if filename == name:
            content = bytearray(path.read_bytes())
            content[-2] ^= 1
            path.write_bytes(content)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", flip)
    with pytest.raises(InputError, match="differs from the hub's checksum"):
        download.main(["owner/repo", str(tmp_path / "sd")])


def test_published_checksums(hub, tmp_path, capsys, monkeypatch):
    weights = hub.source / download.UNET
    download.main(["sd-1.5", str(tmp_path / "a")])
    assert f"warning: {download.UNET} is not the file that sd-1.5 was known" in capsys.readouterr().err
    right = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setitem(download.PUBLISHED, "sd-1.5", {download.UNET: right})
    download.main(["sd-1.5", str(tmp_path / "b")])
    captured = capsys.readouterr()
    assert "warning" not in captured.err and "1 of them" in captured.out
    hashes = [sha for files in download.PUBLISHED.values() for sha in files.values()]
    assert all(len(sha) == 64 and int(sha, 16) for sha in hashes)
    assert set(download.PUBLISHED) <= set(download.REPOSITORIES)


def test_tokenizer_and_single_files(hub, tmp_path):
    for name in CLIP_TOKENIZER:
        shutil.copyfile(hub.source / "tokenizer" / name, hub.source / name)
    download.main(["tokenizer", str(tmp_path / "words")])
    assert hub.fetched == CLIP_TOKENIZER
    assert len(read_tokenizer(tmp_path / "words")) == 536
    download.main(["owner/repo", str(tmp_path), "--file", "model-ema.ckpt"])
    assert (tmp_path / "model-ema.ckpt").read_bytes() == b"larger"
    with pytest.raises(InputError, match=r"no file x\.ckpt; there are model-ema\.ckpt"):
        download.main(["owner/repo", str(tmp_path), "--file", "x.ckpt"])


def test_clip(hub, tmp_path):
    shutil.rmtree(hub.source)
    oracles.save_clip(hub.source)
    (hub.source / "pytorch_model.bin").write_bytes(b"the same once more")
    download.main(["clip-b32", str(tmp_path / "clip")])
    assert set(hub.fetched) == {"config.json", "model.safetensors", *CLIP_TOKENIZER}
    text = Scorer.load(tmp_path / "clip").embed_texts(["a photo of the cat"])
    assert torch.equal(text, Scorer.load(hub.source).embed_texts(["a photo of the cat"]))


def test_list(hub, tmp_path, capsys):
    download.main(["--list"])
    assert all(name in capsys.readouterr().out for name in ["sd-1.5"])
    download.main(["owner/repo", "--list"])
    report = capsys.readouterr().out
    assert download.UNET in report and "safety_checker" not in report and hub.fetched == []


@pytest.mark.parametrize(
    "paths, variant, expected",
    [
        (["m.safetensors", "m.bin"], None, ["m.safetensors"]),
        (["pytorch_m.bin", "flax_m.msgpack"], None, ["pytorch_m.bin"]),
        (["m.fp16.safetensors", "m.bin"], None, ["m.bin"]),
        (["m.fp16.safetensors", "m.bin"], "fp16", ["m.fp16.safetensors"]),
        (["m.fp16.bin", "m.safetensors"], "fp16", ["m.fp16.bin"]),
        (["m.safetensors"], "fp16", ["m.safetensors"]),
        (["m.fp16.safetensors", "m.non_ema.safetensors"], None, ["m.fp16.safetensors"]),
        (
            [
                "m-00001-of-00002.safetensors",
                "m-00002-of-00002.safetensors",
                "m.safetensors.index.json",
                "m.bin",
            ],
            None,
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"],
        ),
        (["m.non_ema.safetensors", "m.safetensors.txt"], None, []),
    ],
)
def test_choice_of_weights(paths, variant, expected):
    got = download.choose_weights([f"unet/{p}" for p in paths], "unet", "m", variant)
    assert got == [f"unet/{p}" for p in expected]


def response(status: int) -> object:
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    "error, message",
    [
        (lambda: utils.GatedRepoError("x", response=response(403)), "asks for consent"),
        (lambda: utils.RepositoryNotFoundError("x", response=response(401)), "is not on the hub, or private"),
        (lambda: utils.RevisionNotFoundError("x", response=response(404)), "no such --revision"),
        (lambda: utils.HfHubHTTPError("500 Server Error\nmore", response=response(500)), "500 Server Error"),
        (lambda: utils.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (lambda: ConnectionError("Name or service not known"), "check the network"),
        (lambda: TimeoutError(), r"cannot be reached \(TimeoutError\)"),
    ],
)
def test_trouble_on_the_way_is_one_line(hub, monkeypatch, tmp_path, capsys, error, message):
    def fail(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(InputError, match=message):
        download.main(["owner/repo", str(tmp_path / "sd")])
    assert not (tmp_path / "sd").exists()


def test_a_full_disk_is_seen_before(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(InputError, match=r"0\.00 GB free; make room"):
        download.main(["owner/repo", str(tmp_path / "a" / "b")])
    assert hub.fetched == [] and not (tmp_path / "a").exists()


def test_without_the_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    monkeypatch.setattr("sys.argv", ["download.py", "sd-1.5", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        run_command("download", download.main)
    assert end.value.code == 2
    assert "pip install 'minti[hub]'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["sd-1.5"], ["sd-9", "x"], ["a/b/c", "x"]])
def test_bad_names(hub, argv):
    with pytest.raises(InputError, match=r"sd-1\.5"):
        download.main(argv)


def test_a_repository_that_is_no_stable_diffusion_folder(hub, tmp_path):
    shutil.rmtree(hub.source / "unet")
    with pytest.raises(InputError, match=r"no weights in unet/.*--file model-ema\.ckpt"):
        download.main(["owner/repo", str(tmp_path / "sd")])


@pytest.mark.parametrize("family", ["sdxl", "ldm", "unclip"])
def test_what_is_chosen_of_other_families(family: str) -> None:
    parts = {
        "sdxl": ["text_encoder", "text_encoder_2", "unet", "vae"],
        "ldm": ["bert", "unet", "vqvae"],
        "unclip": ["text_encoder", "unet", "vae", "image_encoder", "image_normalizer"],
    }[family]
    suffix = "bin" if family == "ldm" else "safetensors"
    weights = {
        part: f"{part}/{'pytorch_' if suffix == 'bin' and part == 'bert' else ''}{download.WEIGHTS[part]}"
        for part in parts
    }
    wanted = {f"{path}.{suffix}" for path in weights.values()} | {f"{part}/config.json" for part in parts}
    wanted |= {"model_index.json", "scheduler/scheduler_config.json"}
    if family == "unclip":
        wanted |= {"image_noising_scheduler/scheduler_config.json"}
        wanted |= {"feature_extractor/preprocessor_config.json"}
    tokenizers = ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",)
    names = ("vocab.txt",) if family == "ldm" else ("vocab.json", "merges.txt")
    wanted |= {f"{tokenizer}/{name}" for tokenizer in tokenizers for name in names}
    others = {
        "vae_1_0/config.json",
        "unet/model.onnx",
        "sd_xl_base_1.0.safetensors",
        "sd_xl_offset_lora.safetensors",
    }
    files = [download.RemoteFile(path, 1, None, None) for path in sorted(wanted | others)]
    assert {file.path for file in download.choose(files, family, None, None)} == wanted
