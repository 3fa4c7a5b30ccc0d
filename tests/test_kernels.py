"""The attention kernels, and the choice between them and SDPA.

What the kernels compute is tested without a GPU in `interpreted_kernels.py`, and here with one.
"""

from __future__ import annotations

import argparse
import importlib
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
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from minti import InputError
from minti.cli.model_options import load_model
from minti.cli.options import Options
from minti.model import kernels
from minti.model.attention import attention
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
    choice._is_faster.clear()


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@needs_triton
def test_in_the_interpreter() -> None:
    result = run("-m", "pytest", "tests/interpreted_kernels.py", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-10000:]


COMPILE = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from minti.model.kernels import launch

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
@pytest.mark.parametrize("capability,shape", [("86", ("256", "77", "160")), ("90", ("1024", "1024", "40"))])
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
from minti import cli, kernels
assert "triton" not in sys.modules
kernels.use("auto", torch.device("cpu"))
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
    for argv in ([], ["--attention", "auto"]):  # which on the CPU is sdpa
        load_model(parse(*argv))
        assert choice._method == "sdpa"
    with pytest.raises(InputError, match=r"needs a CUDA GPU .* on 'cpu'; or use --attention sdpa"):
        load_model(parse("--attention", "triton"))
    with pytest.raises(InputError, match="attention"):
        parse("--attention", "flash")
    with pytest.raises(InputError, match="attention 'flash': choose from auto, sdpa, triton"):
        kernels.use("flash", CPU)


class Timer:
    """Stands in for `choice.timings`. The kernel, which adds 1 to be told apart, wins from 10 queries on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cases: list[tuple] = []
        self.error: Exception | None = None
        launch = importlib.import_module("minti.model.kernels.launch")
        monkeypatch.setattr(launch, "runs_on", lambda device: True)
        monkeypatch.setattr(launch, "flash_attention", self.kernel)
        monkeypatch.setattr(choice, "timings", self.timings)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        kernels.use("auto", CPU)

    @staticmethod
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) + 1

    def timings(self, *case: object) -> dict[str, float]:
        self.cases.append(case)
        if self.error:
            raise self.error
        # As real ones do: compute, with gradients, undisturbed by whatever surrounds the first call.
        x = torch.ones(2, requires_grad=True)
        x.exp().sum().backward()
        assert x.grad.tolist() == x.exp().tolist()
        return {"sdpa": 10.0, "triton": 20.0 - case[0][2]}


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    return Timer(monkeypatch)


def chosen(N: int, M: int = 7, D: int = 40, *, gradients: bool = False) -> bool:
    """Whether `attention` takes the kernel."""
    q, k, v, _ = inputs(N, M, D)
    difference = attention(q.requires_grad_(gradients), k, v) - F.scaled_dot_product_attention(q, k, v)
    assert difference.unique().tolist() in ([0], [1]) or torch.allclose(difference, torch.ones(()))
    return bool(difference.mean() > 0.5)


@needs_triton
def test_auto_takes_the_faster_for_each_shape(timer: Timer) -> None:
    assert [chosen(N) for N in (10, 11, 64)] == [False, True, True]
    assert [chosen(N) for N in (10, 11, 64)] == [False, True, True]
    assert [case[0] for case in timer.cases] == [(1, 2, N, 40) for N in (10, 11, 64)]  # once each
    assert chosen(11, M=8) and chosen(11, D=80) and chosen(11, gradients=True)
    with torch.no_grad():
        assert chosen(11, gradients=True)
    assert timer.cases[3:] == [
        ((1, 2, 11, 40), 8, torch.float32, CPU, False),
        ((1, 2, 11, 80), 7, torch.float32, CPU, False),
        ((1, 2, 11, 40), 7, torch.float32, CPU, True),
    ]
    assert not chosen(64, D=48)  # which the kernel does not have
    assert len(timer.cases) == 6


@needs_triton
def test_auto_does_not_measure_during_capture(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not chosen(64) and not timer.cases
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert chosen(64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(64) and len(timer.cases) == 1


@needs_triton
def test_auto_without_memory_to_measure(timer: Timer) -> None:
    timer.error = torch.OutOfMemoryError()
    assert not chosen(64)
    timer.error = None
    assert not chosen(64) and len(timer.cases) == 1


@needs_triton
@pytest.mark.parametrize("dynamic", [None, True])
def test_auto_measures_while_compiling(dynamic: bool | None, timer: Timer) -> None:
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for N in (10, 64, 65, 10, 64):
        q, k, v, _ = inputs(N, 7, 40)
        expected = Timer.kernel(q, k, v) if N > 10 else F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(compiled(q.requires_grad_(), k, v), expected)
    assert [case[0][2] for case in timer.cases] == [10, 64, 65]


@needs_triton
def test_auto_measures_within_checkpoints(timer: Timer) -> None:
    q, k, v, do = inputs(64, 7, 40)
    actual = with_gradients(lambda *qkv: checkpoint(attention, *qkv, use_reentrant=False), q, k, v, do)
    assert_same(actual, with_gradients(Timer.kernel, q, k, v, do), 0)
    assert len(timer.cases) == 1


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
    # The tolerance of `interpreted_kernels.test_half_precision`. With -s, also timings and SDPA's backend.
    from minti.model.kernels.launch import flash_attention

    x = inputs(N, M, D, dtype, B=2, H=H, device="cuda")
    actual = with_gradients(flash_attention, *x)
    assert_same(actual, reference(*x), 2 * torch.finfo(dtype).eps)
    assert_same(actual, with_gradients(flash_attention, *x), 0)
    device = x[0].device
    seconds = [kernels.timings((2, H, N, D), M, dtype, device, gradients) for gradients in (False, True)]
    print((H, N, M, D), dtype, seconds, SDPBackend(torch._fused_sdp_choice(*x[:3])).name)


@needs_gpu
@needs_triton
@pytest.mark.parametrize("D", [40, 64, 80, 160])
def test_float32_on_the_gpu(D: int) -> None:
    from minti.model.kernels.launch import flash_attention

    for M in (300, 77):
        x = inputs(300, M, D, device="cuda")
        assert_same(with_gradients(flash_attention, *x), reference(*x), 5e-6)


@needs_gpu
@needs_triton
@pytest.mark.parametrize("method", ["auto", "triton"])
def test_cuda_graphs(method: str) -> None:
    x = inputs(4096, 4096, 40, torch.bfloat16, B=2, H=8, device="cuda")
    expected = with_gradients(F.scaled_dot_product_attention, *x)
    kernels.use(method, x[0].device)
    compiled = torch.compile(attention, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # compiled, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        assert_same([y.clone() for y in with_gradients(compiled, *x)], expected, 4 * 2**-7)
    assert len(choice._is_faster) == (method == "auto")
