"""Training runs in processes of their own, which may be interrupted or killed.

Run as a script this is a server that has imported everything and forks a process for each run it is asked
for, which saves the seconds that importing takes.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Server:
    """One training run at a time, `python -m minti.train` with the given arguments."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def start(
        self, argv: list[str], stderr: Path, crash: int = 0, environment: dict[str, str] | None = None
    ) -> int:
        """Returns the id of the process.

        Args:
            stderr: the file that takes what it says.
            crash: if not 0, the process kills itself as soon as it has written so many files but before the
                last of them has got its name; if negative, right after that.
            environment: variables to set.
        """
        self._process.stdin.write(json.dumps([argv, str(stderr), crash, environment or {}]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """The exit code of the run, negative for the signal that killed it.

        Its id stays taken until this is called, so that nobody else is killed by mistake.
        """
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def run(self, argv: list[str], stderr: Path, crash: int = 0) -> int:
        self.start(argv, stderr, crash)
        return self.wait()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    # The second is what torch.optim would otherwise import in each of the processes.
    for module in ("minti.train", "torch._dynamo"):
        importlib.import_module(module)
    while line := sys.stdin.readline():
        argv, stderr, crash, environment = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ |= environment
            _run(argv, stderr, crash)
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(argv: list[str], stderr: str, crash: int) -> None:
    from minti import train
    from minti.cli.command import run_command

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may have been started with nohup
    handle = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    sys.argv = ["train", *argv]
    replace, count = os.replace, 0

    def crashing(source: str, target: str) -> None:
        nonlocal count
        count += 1
        if count == crash:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if count == -crash:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = crashing
    try:
        run_command("minti.train", train.main)
    except SystemExit as error:
        sys.stderr.flush()
        os._exit(error.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)


if __name__ == "__main__":
    _serve()
