"""A command in two processes over gloo, as torchrun starts them; what tells that they reduce."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def run_two(folder: Path, command: list[str], program: str) -> list[tuple[int, str]]:
    """Exit code and output of both processes.

    ``program`` is run before the command; process r may leave its files as ``sys.argv[1]``,
    ``folder/r``, and calls ``main`` with the rest.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ending = "\nsys.exit(main(sys.argv[2:]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program + ending, str(folder / str(rank)), *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(p.returncode, text) for p, text in zip(processes, printed, strict=True)]


def tripled(gradients: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """In place of a sum over processes, for one process: what was not reduced is not tripled."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(3 * gradients)
    return done
