"""What reading a file must not do: change the process, or write outside the output folder."""

import logging
import os
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from minti.errors import InputError
from minti.formats import pickles

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What a file may do to the world, as Python's audit events tell (PEP 578), and which arguments are paths.
WRITES = {"os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.symlink": (1,)}
WRITES |= {"os.link": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,)}
RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")


def snapshot() -> dict[str, Any]:
    """What reading a file must not change in the process."""
    named = [
        torch._utils._rebuild_tensor_v2,
        torch._utils._rebuild_parameter,
        OrderedDict,
        torch.Size,
        InputError,
    ]
    named += [value for _, value in sorted(vars(pickles).items()) if callable(value)]
    found = {
        f"{f}": (getattr(f, "__defaults__", None), sorted(vars(f))) for f in named if hasattr(f, "__dict__")
    }
    found |= {"environment": dict(os.environ), "directory": os.getcwd(), "path": list(sys.path)}
    found["limits"] = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    found["torch"] = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    found["signals"] = [signal.getsignal(number) for number in SIGNALS]
    found["logging"] = logging.getLogger().level, list(logging.getLogger().handlers)
    found["recursion"], found["open files"] = sys.getrecursionlimit(), len(os.listdir("/proc/self/fd"))
    return found


class Guard:
    """Notes and prevents what is done outside the folders in which a command may write."""

    def __init__(self) -> None:
        self.allowed: list[str] = []
        self.found: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.allowed:
            return
        if event == "open":
            writing = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            paths = [args[0]] if writing else []
        elif event in RUNS:
            self.found.append(f"{event} {args[:1]}")
            raise PermissionError(f"{event} is not allowed here")
        else:
            paths = [args[i] for i in WRITES.get(event, ())]
        for path in paths:
            real = os.path.realpath(os.fsdecode(path)) if not isinstance(path, int) else os.devnull
            if real != os.devnull and not any(f"{real}/".startswith(f"{a}/") for a in self.allowed):
                self.found.append(f"{event} {real}")
                raise PermissionError(f"{real}: is outside of the output folder")


def work_done(pid: int) -> str:
    """The CPU time of a process that waits for something, "" for one that works or would like to."""
    _, _, text = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    state, *fields = text.split()
    return "" if state == "R" else " ".join(fields[10:12])
