"""One writer per output folder: an advisory lock that the kernel drops when its holder dies, however it dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tunescope.errors import UserError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Holds the folder's lock for the block. Raises UserError if another process has it, or nothing can be written."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot write to {out_dir}: {error.strerror}",
            cause="the folder is read-only, belongs to another user, or its disk is full",
            cure="name another with --out",
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"another launcher (process {holder}) is measuring into {out_dir}",
                cause="two runs on one folder would disturb each other's timings and files",
                cure="wait for it, stop it, or name another folder with --out",
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot lock {out_dir}: {error.strerror}",
                cause="its file system, usually one over the network, knows no locks",
                cure="name a folder on another disk with --out",
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the number is only for the other launcher's message
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
