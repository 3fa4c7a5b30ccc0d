"""The attention kernels, and the choice between them and SDPA.

What the kernels compute is tested without a GPU in `interpreted_kernels.py`, and here with one.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minti import InputError
from minti.cli.model_options import load_model
from minti.cli.options import Options
from minti.model import kernels
from minti.model.kernels import choice

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; there is one for Linux"
)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA GPU of compute capability 8.0 or more",
)


def inputs(
    N: int, M: int, D: int, dtype: torch.dtype = torch.float32, B: int = 1, H: int = 2, device: str = "cpu"
) -> list[Tensor]:
    """q, k, v and the gradient of the output, as the model has them: heads side by side in memory."""
    generator = torch.Generator().manual_seed(N + M + D)
    tensors = []
    for length in (N, M, M, N):
        x = torch.randn(B, length, H * D, generator=generator).to(device, dtype)
        tensors.append(x.unflatten(-1, (H, D)).transpose(1, 2))  # (B, length, H*D) -> (B, H, length, D)
    return tensors


def with_gradients(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, do: Tensor
) -> list[Tensor]:
    """The output, and what becomes of its gradient."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = function(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def reference(*tensors: Tensor) -> list[Tensor]:
    return with_gradients(F.scaled_dot_product_attention, *(x.double() for x in tensors))


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Output and gradients agree up to a share of the largest value of each."""
    for name, a, b in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        error = (a.double() - b.double()).abs().max() / b.abs().max()
        assert error <= tolerance, f"{name} differs by {error:.2e} of its largest value"  # also if NaN


@pytest.fixture(autouse=True)
def default() -> Iterator[None]:
    yield
    kernels.use("sdpa", CPU)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@needs_triton
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(marks: str) -> None:
    result = run("-m", "pytest", "-m", marks, "tests/interpreted_kernels.py", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-10000:]


COMPILE = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from minti.model.kernels import operator

class Absent:  # GPU
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def compile_only(self, *args, warmup, **kwargs):
    kernel = run(self, *args, warmup=True, **kwargs)
    assert "mma." in kernel.asm["ptx"], "no tensor cores"
    print(self.__name__, kernel.metadata.shared)

driver.set_active(Absent())
run, JITFunction.run = JITFunction.run, compile_only
N, M, D = map(int, sys.argv[2:])
q, k, v = (torch.empty(1, n, 8, D, dtype=torch.bfloat16).transpose(1, 2) for n in (N, M, M))
o, lse = torch.ops.minti.attention(q, k, v)
torch.ops.minti.attention_backward(q, k, v, o, lse, o)
"""


@needs_triton
@pytest.mark.parametrize(
    "capability,shape",
    [
        ("86", ("256", "77", "160")),
        pytest.param("90", ("1024", "1024", "40"), marks=pytest.mark.slow),
    ],
)
def test_compiles_for_a_gpu(capability: str, shape: tuple[str, ...], tmp_path: Path) -> None:
    """Down to machine code, for GPUs that are not there: Ampere as consumers have it, and Hopper."""
    result = run("-c", COMPILE, capability, *shape, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-10000:]
    shared = {name: int(size) for name, size in map(str.split, result.stdout.splitlines())}
    assert set(shared) == {"_forward", "_backward_q", "_backward_kv"}
    assert max(shared.values()) <= 99 * 1024  # what a block may have on all GPUs since Ampere


def test_minti_does_not_need_triton(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('it is broken')")
    code = """
import sys, torch
from minti.cli.command import run_command
from minti.model import kernels
assert "triton" not in sys.modules
kernels.use("sdpa", torch.device("cpu"))
run_command("x", lambda argv: kernels.use("triton", torch.device("cpu")))
"""
    result = run("-c", code, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.stderr == (
        "x: error: attention 'triton' needs the package triton (it is broken): pip install triton; "
        "or use --attention sdpa\n"
    )
    assert result.returncode == 2


def parse(*argv: str) -> argparse.Namespace:
    options = Options("x", "x")
    options.add_model()
    return options.parse(argv, required=[])


@needs_triton
def test_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minti.cli.model_options.load", lambda *args, **kwargs: MagicMock(device=CPU))
    assert parse().attention == "sdpa"
    load_model(parse())
    assert choice._operator is None
    with pytest.raises(InputError, match=r"needs a CUDA GPU .* on 'cpu'; or use --attention sdpa"):
        load_model(parse("--attention", "triton"))
    with pytest.raises(InputError, match="attention"):
        parse("--attention", "flash")
    with pytest.raises(InputError, match="attention 'flash': choose from sdpa, triton"):
        kernels.use("flash", CPU)


# (heads, N, M, d): SD 1.5 at 512 pixels, SDXL at 1024, and an odd size of pictures with a short prompt.
SHAPES = [
    *((8, n, m, d) for n, d in ((4096, 40), (1024, 80), (256, 160), (64, 160)) for m in (n, 77)),
    *((heads, n, m, 64) for heads, n in ((10, 4096), (20, 1024)) for m in (n, 77)),
    *((8, 1767, m, d) for d in (40, 80, 160) for m in (1767, 19)),
]


@needs_gpu
@needs_triton
@pytest.mark.parametrize("H,N,M,D", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_gpu(H: int, N: int, M: int, D: int, dtype: torch.dtype) -> None:
    # The tolerance of `interpreted_kernels.test_half_precision`.
    from minti.model.kernels.operator import flash_attention

    x = inputs(N, M, D, dtype, B=2, H=H, device="cuda")
    actual = with_gradients(flash_attention, *x)
    assert_same(actual, reference(*x), 2 * torch.finfo(dtype).eps)
    assert_same(actual, with_gradients(flash_attention, *x), 0)


@needs_gpu
@needs_triton
@pytest.mark.parametrize("D", [40, 64, 80, 160])
def test_float32_on_the_gpu(D: int) -> None:
    from minti.model.kernels.operator import flash_attention

    for M in (300, 77):
        x = inputs(300, M, D, device="cuda")
        assert_same(with_gradients(flash_attention, *x), reference(*x), 5e-6)


@needs_gpu
@needs_triton
def test_cuda_graphs() -> None:
    x = inputs(1024, 1024, 40, torch.bfloat16, B=2, H=8, device="cuda")
    expected = with_gradients(F.scaled_dot_product_attention, *x)
    kernels.use("triton", x[0].device)
    compiled = torch.compile(kernels.scaled_dot_product_attention, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # compiled, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        assert_same([y.clone() for y in with_gradients(compiled, *x)], expected, 4 * 2**-7)
