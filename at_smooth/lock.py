"""One process at a time in a run directory: a lock of the operating system's, which dies with its owner."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from at_smooth.exceptions import RunError

#: The file that carries the lock; it may outlive its owner, the lock does not.
NAME = ".lock"

if sys.platform == "win32":
    import msvcrt

    def _lock(number: int) -> None:
        os.lseek(number, 1 << 20, os.SEEK_SET)  # behind what others read
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take(number: int) -> None:
    """Lock an open file until it is closed. Where the file system knows no locks nothing happens.

    Args:
        number: Its descriptor.

    Raises:
        BlockingIOError: Another process holds it.
    """
    try:
        _lock(number)
    except BlockingIOError:
        raise
    except PermissionError:
        raise BlockingIOError from None  # so Windows has it
    except OSError:
        pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock while the block runs; the folder is made if it is not there.

    Where the file system knows no locks nothing is refused.

    Raises:
        RunError: Another process holds it, or the folder cannot be made.
    """
    path, made = folder / NAME, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = _open_locked(path)
    except BlockingIOError:
        raise RunError(
            f"{folder} is being trained by another process{_owner(path)}. Wait for it, or choose another --out."
        ) from None
    except OSError as error:
        raise RunError(f"cannot create {folder}: {error.strerror or error}. Choose another --out.") from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while it is held, or it might be another's; Windows keeps it
        os.close(number)
        if made:
            with suppress(OSError):
                folder.rmdir()  # if the block left nothing in it


def _open_locked(path: Path) -> int:
    for _ in range(1000):
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            take(number)
        except BlockingIOError:
            os.close(number)
            raise
        if _is_still(path, number):
            with suppress(OSError):  # a full disk cannot say who holds it
                os.ftruncate(number, 0)
                os.write(number, f"{os.getpid()} {socket.gethostname()}".encode())
            return number
        os.close(number)  # its owner removed it meanwhile
    raise BlockingIOError


def _is_still(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        pid, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return ""
    return f" (process {pid} on {host})"
