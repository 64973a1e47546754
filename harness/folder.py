"""An output folder, or a journal, belongs to one program at a time, and what a program finds there is replaced only if
it was told to.

The lock is the kernel's (flock): it ends with the process, however that ends, so kill -9 leaves no stale one. Over NFS
it holds between machines too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from accelerate import Accelerator

from harness.run import TrainingError, main_does

log = logging.getLogger("zoomgrpo")
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # file systems that cannot lock


@contextlib.contextmanager
def claimed(
    folder: str | Path, accelerator: Accelerator | None, results: Iterable[str] = (), overwrite: bool = False
) -> Iterator[None]:
    """Within, no other program writes into the folder. Raises TrainingError if one does, if it cannot be written to, or
    if it has one of the `results` already, unless they are to be overwritten. No accelerator: one process.
    """

    def check() -> None:
        found = [name for name in results if (Path(folder) / name).exists()]
        if found and not overwrite:
            raise TrainingError(f"{folder} has {found[0]}: write over it with --overwrite, or choose another --out")

    with locked(Path(folder) / ".lock", accelerator):
        main_does(accelerator, check)
        yield


def claimed_file(path: str | Path, accelerator: Accelerator | None) -> contextlib.AbstractContextManager[None]:
    """Within, no other program writes to the file, a journal or a page. Raises TrainingError."""
    path = Path(path)
    return locked(path.with_name(f".{path.name}.lock"), accelerator)


def delete(folder: Path, names: Iterable[str]) -> None:
    """Delete these files and folders, as far as they are there."""
    for name in names:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, accelerator: Accelerator | None) -> Iterator[None]:
    """Within, the main process holds a lock that this file stands for. Raises TrainingError in all processes."""
    made = [folder for folder in path.parents if not folder.exists()]
    file = main_does(accelerator, lambda: lock(path))
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # before others can have the lock
            file.close()
            with contextlib.suppress(OSError):  # of a program that has left nothing
                for folder in made:
                    folder.rmdir()


def lock(path: Path) -> TextIO:
    """The file, locked as long as it is open, and saying by whom. Raises TrainingError naming who holds it."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+", errors="replace")  # noqa: SIM115 (it stays open)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
            file.close()  # whoever had it has deleted it meanwhile
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}: {shlex.join(sys.argv)}")
        file.flush()
    except BlockingIOError:
        file.seek(0)
        holder = file.read(1000).strip() or "another program"
        raise TrainingError(
            f"{folder} is being written to by {holder}; wait for its end or stop it, or choose another --out"
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise TrainingError(f"{folder}: a file is in the way, not a folder; choose another --out") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise TrainingError(f"{folder} cannot be written to: {error.strerror}; choose another --out") from None
        log.warning("%s: no locks on this file system (%s): let no other program write there", folder, error.strerror)
    return file
