"""The user's cache of self-teachers: finished ones, whole, and claims to those that are being trained."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from at_smooth import files
from at_smooth.exceptions import StorageError
from at_smooth.lock import FileLock

#: What the cache keeps of a teacher's run.
_KEPT = ("recipe.yaml", "environment.json", "metrics.csv", "summary.json", "curves.png", "checkpoints/best.pt")


def cache_directory() -> Path:
    """Where teachers are kept between runs: ``AT_SMOOTH_CACHE``, or the user's cache directory."""
    own = os.environ.get("AT_SMOOTH_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(shared) if shared else Path.home() / ".cache") / "at-smooth"


class CachedTeacher:
    """A teacher's place in the cache, and the claim to train it and to put it there.

    Args:
        name: Made of everything that shapes it.

    Attributes:
        path: Its folder, which is there whole or not at all.
    """

    def __init__(self, name: str) -> None:
        self.path = cache_directory() / "teachers" / name
        self._lock = FileLock(self.path.with_name(f".{name}.lock"))
        self._claimed = False

    @property
    def finished(self) -> bool:
        """Whether it is there."""
        return (self.path / "summary.json").is_file()

    def claim(self) -> bool:
        """Be the one process that trains it, unless another is.

        What a process that was killed left half-published is removed then. Where the cache cannot be written, or its
        file system knows no locks, every process gets the claim.

        Returns:
            Whether this process has the claim now.
        """
        if self._claimed:
            return True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except BlockingIOError:
            return False
        except OSError:  # a cache that cannot be written
            pass
        self._claimed = True
        if self._lock.certain:
            for leftover in self.path.parent.glob(f".{self.path.name}.*.part"):
                shutil.rmtree(leftover, ignore_errors=True)
        return True

    def release(self) -> None:
        """Give the claim back, if this process has it."""
        self._claimed = False
        self._lock.release()

    def owner(self) -> str:
        """Who has the claim, in words."""
        return self._lock.owner()

    def copy_to(self, own: Path) -> None:
        """Copy the finished teacher into a run.

        Raises:
            StorageError: It cannot be written there.
        """
        _copy_run(self.path, own)

    def publish(self, own: Path) -> None:
        """Put a finished teacher into the cache whole; it stays without where another process has the claim."""
        if not self.claim():
            return
        aside = files.aside_of(self.path)
        try:
            _copy_run(own, aside)
            os.rename(aside, self.path)
        except (OSError, StorageError):
            pass  # it is there already, or the cache cannot be written; the run has its own copy
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def remove(self) -> None:
        """Remove what is there."""
        shutil.rmtree(self.path, ignore_errors=True)


def remove_leftovers() -> None:
    """Remove what killed processes left half-published, of any teacher that nobody has claimed."""
    for leftover in (cache_directory() / "teachers").glob(".*.part"):
        found = re.fullmatch(r"\.(.+)\.\d+[^.]*\.part", leftover.name)
        if found:
            teacher = CachedTeacher(found.group(1))
            teacher.claim()
            teacher.release()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all. Never a link: a file that is changed in place would change the other too.

    Raises:
        StorageError: It cannot be written.
    """
    with files.storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as file, files.replacing(target) as own:
            shutil.copyfileobj(file, own)


def _copy_run(source: Path, target: Path) -> None:
    for name in _KEPT:  # the summary says that a run is finished, so the weights must be there before it
        if name != "summary.json" and (source / name).is_file():
            copy_file(source / name, target / name)
    copy_file(source / "summary.json", target / "summary.json")
