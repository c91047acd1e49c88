"""Files and folders that are whole or not there: written aside, synced, then moved into place.

What is there already is never lost: a new file takes its name only if nothing has it, even where two processes ask for
the same name at once; a symbolic link is written through; a device or a FIFO is written to, not replaced.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from at_smooth.exceptions import InputError, StorageError, TakenError
from at_smooth.interruption import uninterrupted
from at_smooth.lock import take

#: Names of files that are being written, as a pattern; see :func:`aside_of`.
LEFTOVERS = ".*.[0-9]*.part"

_NO_FILE = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket"}


def usable_path(path: Path | str) -> Path:
    """A path that the system can be asked for.

    Raises:
        InputError: It holds a NUL, or characters that no file name can have.
    """
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise InputError(f"{str(path)!r} is no path: a file's name cannot hold such characters.") from None
    if b"\0" in encoded:
        raise InputError(f"{str(path)!r} is no path: it holds a NUL character.")
    return Path(path)


def refuse_taken_file(path: Path | None) -> None:
    """Refuse a file that cannot be written, or that holds something, before anything costs time.

    Raises:
        InputError: It is so.
    """
    if path is None:
        return
    with storing(usable_path(path)):
        target, status = _destination(path)
    if status is not None and _is_plain(status) and status.st_size:
        raise _taken(path)
    if not target.absolute().parent.is_dir():
        raise InputError(f"there is no folder {target.absolute().parent} to write {target.name} into.")


def refuse_taken_folder(path: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        TakenError: It does, or it is no folder.
    """
    if os.path.lexists(usable_path(path)) and (not path.is_dir() or any(path.iterdir())):
        raise TakenError(f"{path} exists and is not an empty folder. Choose another --out.")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in the place of another: a reader, or a crash at any moment, finds the old one or the new.

    The new one has the old one's permissions.

    Raises:
        StorageError: It cannot be written; the old one stands.
    """
    with _writing(path, new=False) as file:
        yield file


@contextmanager
def creating(path: Path) -> Iterator[BinaryIO]:
    """A file to write under a name that nothing has, or an empty file as ``mktemp`` makes one.

    Of two processes that do this at once one takes the name, and its file is whole from the first moment on.

    Raises:
        TakenError: Something has the name by the end of the block.
        StorageError: It cannot be written.
    """
    with _writing(path, new=True) as file:
        yield file


def aside_of(path: Path) -> Path:
    """Where a file or folder is written before it takes its name: a new name beside it.

    It holds the process id for people, and what nobody can foresee: processes in containers, or on several machines,
    share ids, and in a folder for everyone somebody could lay a link there.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(content)


def create(path: Path, content: bytes) -> None:
    """Write a new file whole or not at all; see :func:`creating`."""
    with creating(path) as file:
        file.write(content)


def create_first_free(paths: Iterable[Path], content: bytes) -> Path:
    """Write a new file under the first of some names that nothing has; gives that name."""
    for path in paths:
        if not os.path.lexists(path):
            with suppress(TakenError):
                create(path, content)
                return path
    raise StorageError("no name is free.")


@contextmanager
def creating_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name whole when the block ends, and is gone if that fails.

    Args:
        path: Where; nothing, or an empty folder.

    Raises:
        TakenError: Something is there by the end of the block.
        StorageError: The block failed to write.
    """
    refuse_taken_folder(path)
    target = Path(os.path.realpath(path))
    if target == Path(os.path.realpath(os.curdir)):
        raise InputError(f"{path} is the working directory. Choose another --out, such as a new folder in it.")
    aside = aside_of(target)
    with storing(path):
        try:
            aside.mkdir(parents=True)
            if target.is_dir():
                shutil.copymode(target, aside)
            yield aside
            for file in aside.iterdir():
                _sync(file)
            if sys.platform == "win32" and target.is_dir():
                target.rmdir()
            os.rename(aside, target)  # in the place of an empty folder, too, but of nothing else
            _sync(target.parent)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                refuse_taken_folder(path)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def claimed_folder(paths: Iterable[Path]) -> Iterator[Path]:
    """The first of some folders that is not there, made for this process alone; removed if nothing is left in it.

    Raises:
        StorageError: It cannot be made.
    """
    path = next(path for path in paths if _made(path))
    try:
        yield path
    finally:
        with suppress(OSError):
            path.rmdir()


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a failed write into one message that names the file.

    Raises:
        StorageError: The block failed to write.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save answers a failed write with a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise StorageError(f"cannot write {path} ({cause.strerror or cause}).") from None


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what a killed process was writing in a folder.

    Args:
        folder: The folder.
        names: Files in it that nobody else writes, and folders, where nobody else writes at all.
    """
    for path in map(folder.joinpath, names):
        for aside in (*path.parent.glob(f".{path.name}.[0-9]*.part"), *path.glob(f"**/{LEFTOVERS}")):
            with suppress(OSError):
                aside.unlink()


@contextmanager
def _writing(path: Path, new: bool) -> Iterator[BinaryIO]:
    with storing(usable_path(path)):
        target, status = _destination(path)
        if status is not None and not _is_plain(status):
            with _stream(path, status) as file:
                yield file
            return
        aside = aside_of(target)
        with uninterrupted():
            try:
                with aside.open("xb") as file:
                    if status is not None:
                        with suppress(OSError):  # some file systems have no permissions
                            aside.chmod(stat.S_IMODE(status.st_mode))
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                if not new:
                    os.replace(aside, target)
                elif not _take_name(aside, target):
                    raise _taken(path)
            finally:
                with suppress(OSError):
                    aside.unlink(missing_ok=True)
            _sync(target.parent)


def _destination(path: Path) -> tuple[Path, os.stat_result | None]:
    """The file that a path means, behind symbolic links, and what is there.

    Raises:
        InputError: Nothing can be written there.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(
                f"{path} is a symbolic link to {os.readlink(path)}, which is not there. Choose another file, or "
                f"remove the link."
            ) from None
        return path, None
    kind = _NO_FILE.get(stat.S_IFMT(status.st_mode))
    if kind:
        raise InputError(f"{path} is {kind}. Choose another file.")
    return Path(os.path.realpath(path)) if path.is_symlink() else path, status


def _is_plain(status: os.stat_result) -> bool:
    """Whether it is a regular file, which can be replaced, and not what this process prints into."""
    return stat.S_ISREG(status.st_mode) and _printed_into(status) is None


def is_standard_output(path: Path | None) -> bool:
    """Whether a file is the standard output, as ``/dev/stdout`` is; nothing else should be printed there then."""
    with suppress(OSError):
        return path is not None and _printed_into(path.stat()) == 1
    return False


def _printed_into(status: os.stat_result) -> int | None:
    """The descriptor of the standard output or error that is this file, as in ``--json /dev/stdout >FILE``."""
    for number in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(number), status):
                return number
    return None


@contextmanager
def _stream(path: Path, status: os.stat_result) -> Iterator[BinaryIO]:
    """A device or a FIFO to write to; of what this process prints into, the end."""
    number = _printed_into(status)
    sys.stdout.flush()
    with open(path if number is None else os.dup(number), "wb") as file:
        yield file


def _take_name(aside: Path, target: Path) -> bool:
    """Give a whole file its name, unless something that is not empty has it; says whether."""
    try:
        number = os.open(target, os.O_RDWR)
    except FileNotFoundError:
        return _link(aside, target)
    try:
        take(number)  # of several processes that found the same empty file, one
        status = os.fstat(number)
        if status.st_size or not os.path.samestat(status, target.stat()):
            return False
        os.replace(aside, target)
    except BlockingIOError:
        return False
    finally:
        os.close(number)
    return True


def _link(aside: Path, target: Path) -> bool:
    try:
        os.link(aside, target)
    except FileExistsError:
        return False
    except OSError:  # no hard links here: an empty file holds the name for a moment
        try:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(aside, target)
    return True


def _made(path: Path) -> bool:
    """Make a folder; says whether nothing was there."""
    with storing(path):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            return False
    return True


def _taken(path: Path) -> TakenError:
    return TakenError(f"{path} exists already. Choose another file, or remove it.")


def _sync(path: Path) -> None:
    """Make a file, or what a folder lists, last through a power cut, where the system can."""
    with suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
