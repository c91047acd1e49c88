"""Locks of the operating system's, which die with their owner: on a file, and on a run directory."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from at_smooth.exceptions import FileError, RunDirectoryGoneError, RunError
from at_smooth.reading import text_of

#: The file in a run directory that carries its lock; it may outlive its owner, the lock does not.
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


def take(number: int) -> bool:
    """Lock an open file until it is closed. Where the file system knows no locks nothing happens.

    Args:
        number: Its descriptor.

    Returns:
        Whether it is locked.

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
        return False
    return True


class FileLock:
    """One process at a time: a lock on a file, which holds its owner's process id and host while it is locked.

    Where the file system knows no locks nothing is refused.

    Args:
        path: The file; it is made where it is not there, and removed when the lock is released.

    Attributes:
        certain: Whether the lock is held and keeps others out, which it does not where there are no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.certain = False
        self._number: int | None = None

    def acquire(self) -> None:
        """Take the lock, or fail at once.

        Raises:
            BlockingIOError: Another process holds it.
            OSError: The file cannot be made.
        """
        for _ in range(1000):
            number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                certain = take(number)
            except BlockingIOError:
                os.close(number)
                raise
            if not certain:  # no locks here
                self._number = number
                return
            if _same(self.path, os.fstat(number)):
                with suppress(OSError):  # a full disk cannot say who holds it
                    os.ftruncate(number, 0)
                    os.write(number, f"{os.getpid()} {socket.gethostname()}".encode())
                self._number, self.certain = number, True
                return
            os.close(number)  # its owner removed it meanwhile
        raise BlockingIOError

    def release(self) -> None:
        """Let others take it; does nothing where it is not held."""
        number, self._number, self.certain = self._number, None, False
        if number is None:
            return
        if _same(self.path, os.fstat(number)):  # while it is held, or it might be another's
            with suppress(OSError):  # Windows keeps it
                self.path.unlink(missing_ok=True)
        os.close(number)

    def owner(self) -> str:
        """Who holds it, in words, as far as its file says."""
        try:
            pid, host = text_of(self.path, most=1000).split()
        except (FileError, ValueError):
            return "another process"
        return f"process {pid} on {host}"

    def remove_leftover(self) -> None:
        """Remove the file of an owner that was killed; one that is held stays."""
        if not self.path.is_file():
            return
        with suppress(OSError):
            self.acquire()
            if self.certain:
                self.release()
            elif self._number is not None:  # nobody can tell here whether it is held
                os.close(self._number)
                self._number = None


class FolderLock:
    """One process at a time in a run directory, as a context; the folder is made if it is not there.

    Args:
        folder: The run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / NAME)
        self._made = False
        self._identity: os.stat_result | None = None
        self._pin: int | None = None

    def __enter__(self) -> FolderLock:
        """Take the lock.

        Raises:
            RunError: Another process holds it, or the folder cannot be made.
        """
        self._made = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._identity = self._folder.stat()
        except BlockingIOError:
            owner = self._lock.owner()
            raise RunError(
                f"{self._folder} is being trained by another process"
                f"{f' ({owner})' if owner.startswith('process') else ''}. Wait for it, or choose another --out."
            ) from None
        except OSError as error:
            raise RunError(f"cannot create {self._folder}: {error.strerror or error}. Choose another --out.") from None
        with suppress(OSError):  # Windows opens no folders; elsewhere no other folder gets this one's number so
            self._pin = os.open(self._folder, os.O_RDONLY)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Release it; a folder that was made for it, and in which nothing is left, goes too."""
        self._lock.release()
        if self._made and self._identity is not None and _same(self._folder, self._identity):
            with suppress(OSError):
                self._folder.rmdir()
        if self._pin is not None:
            os.close(self._pin)
            self._pin = None

    def check(self) -> None:
        """Refuse to go on where the folder is no longer what was locked.

        Raises:
            RunDirectoryGoneError: It was moved or deleted; what is there now, if anything, is another.
        """
        if self._identity is not None and not _same(self._folder, self._identity):
            raise RunDirectoryGoneError(
                f"the run directory {self._folder} is gone: it was moved, renamed or deleted while the run was "
                f"trained, and nothing more is written to its old place. If you moved it, go on from its last save "
                f"with: at-smooth train --out NEW_PLACE --resume. If you deleted it, start again."
            )


def _same(path: Path, known: os.stat_result) -> bool:
    try:
        return os.path.samestat(known, path.stat())
    except OSError:
        return False
