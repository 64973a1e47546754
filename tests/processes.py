"""Processes that tests start: where they meet, how they end, and where they stood if they do not."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

PATIENCE = 600  # seconds in which one of those that are left must end


@contextlib.contextmanager
def meeting_place() -> Iterator[dict[str, str]]:
    """What tells processes where their store is; within, nobody else is given its port."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does, and it alone listens
        held.bind(("", 0))
        yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}


def tell_when_stopped() -> None:
    """In a process: SIGUSR1 ends it, and first it writes where its threads stand on its standard error."""
    faulthandler.register(signal.SIGUSR1, 2, chain=True)


def exit_codes_of(processes: Sequence[BaseProcess], errors: Path | None = None) -> list[int]:
    """How they end, negative for a signal. When one has failed, the others, which would wait for it, are killed; when
    none has ended for `PATIENCE`, those that are left are stopped by SIGUSR1. `errors`: where they write.
    """
    going = {process.sentinel: process for process in processes}
    while going and all(process.exitcode in (None, 0) for process in processes):
        ended = connection.wait(going, timeout=PATIENCE)
        if not ended:
            have_told({processes.index(process): process for process in going.values()}, errors)
            break
        for sentinel in ended:
            going.pop(sentinel).join()
    for process in going.values():
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def have_told(processes: Mapping[int, BaseProcess], errors: Path | None) -> None:
    """Stop processes by their numbers, one after the other, by the signal at which they write where they stand."""
    for process in processes.values():  # all at once: an end that one comes to by another's would hide where it stood
        os.kill(process.pid, signal.SIGSTOP)
    for number, process in processes.items():
        if errors is not None:
            with errors.open("a") as file:
                file.write(f"\nprocess {number}, after {PATIENCE} s in which none has ended:\n")
        os.kill(process.pid, signal.SIGUSR1)
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
