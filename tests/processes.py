"""`redrafter` in processes of its own: new ones, as a user starts them, and forks of this one, which start at once.

A new process imports for seconds what a fork has: use one where a user's whole command is tested, else forks.  A fork
receives signals, is killed, and exits as any process; it inherits what a test has changed in this one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from redrafter.cli import main

SECONDS = 120
"""Time limit of a process, and of waiting for one."""

PYTHON = (sys.executable, "-W", "ignore")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Fork:
    """A fork of this process that runs a command line, with as much of `subprocess.Popen` as tests need.

    Its output is written to `log`.  `before` is called first, in its environment.
    """

    def __init__(
        self,
        *words: object,
        log: str | Path = os.devnull,
        before: Callable[[], object] = lambda: None,
        **environment: str,
    ):
        def run() -> None:
            signal.alarm(SECONDS)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.stdout = sys.stderr = output
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.environ.update(environment)
            before()
            main(list(map(str, words)))

        self._process = multiprocessing.get_context("fork").Process(target=run)
        with open(log, "w", buffering=1) as output, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
            self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join(SECONDS)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)


def new_process(*words: object, log: str | Path = os.devnull, before: str = "") -> subprocess.Popen:
    """Starts a command line as a user does, after a program `before`."""
    program = f"{before}\nfrom redrafter.cli import main; main()"
    with open(log, "w") as output:
        return subprocess.Popen(
            [*PYTHON, "-c", program, *map(str, words)], env=ENVIRONMENT, stdout=output, stderr=output
        )


def signalled(process: Fork | subprocess.Popen, number: int, when: Callable[[], object]) -> int | None:
    """The exit status of a process that receives a signal when a condition holds; minus the signal if that killed it.

    A process may also end before.
    """
    end = time.monotonic() + SECONDS
    while process.poll() is None and not when():
        assert time.monotonic() < end
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(number)
    return process.wait()


def two_forks(*words: object, folder: Path, before: Callable[[], object] = lambda: None, **environment: str) -> None:
    """Runs a command line in two processes with the environment that torchrun sets; both must succeed."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}

    def alone() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # of commands that this process ran
        before()

    logs = {rank: folder / f"rank {rank}.log" for rank in "01"}
    forks = [
        Fork(*words, log=log, before=alone, RANK=rank, LOCAL_RANK=rank, **environment) for rank, log in logs.items()
    ]
    assert [fork.wait() for fork in forks] == [0, 0], "\n".join(log.read_text() for log in logs.values())
