"""A contender's process, as seen by who asks it for rounds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from types import TracebackType
from typing import Any, cast

from at_smooth.bench.workload import Variant, Workload
from at_smooth.exceptions import BenchError, OptionError
from at_smooth.reading import parse_json


class Worker:
    """Starts :mod:`at_smooth.bench.worker`, and ends it when the block does.

    It has a process group of its own: Ctrl-C in a terminal reaches only who asks, who then ends the workers together
    with what they started to compile. A worker whose asker is gone ends by itself, for its questions do.

    Args:
        contender: ``engine``, ``plain``, ``bare`` or ``rate``.
        variant: In which arithmetic.
        workload: On what.
    """

    def __init__(self, contender: str, variant: Variant, workload: Workload) -> None:
        self.name = contender if contender == "plain" else f"{contender} {variant}"
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - close() does
        self._process = subprocess.Popen(
            [sys.executable, "-m", "at_smooth.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # modules of the working directory take no library's place
        )
        self._task = {"contender": contender, "variant": asdict(variant), "workload": workload.to_dict()}

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def begin(self) -> dict[str, Any]:
        """Let it build what it works with; what it says of itself.

        Raises:
            OptionError: It cannot do what it was told, as it says itself.
            BenchError: It ended without a word.
        """
        return self._ask(self._task)

    def round(self, steps: int) -> dict[str, Any]:
        """Let it take so many steps; what it answers.

        Raises:
            BenchError: It ended without a word.
        """
        return self._ask(steps)

    def close(self) -> None:
        """End the process, and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)  # nothing that it holds is to be kept
            else:
                self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a question that nobody read
                    pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, question: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise BenchError(f"the contender '{self.name}' cannot be spoken to.")
        with contextlib.suppress(BrokenPipeError):  # no answer comes then, which says more
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            raise BenchError(f"the contender '{self.name}' ended before it was done ({self._cause()}).")
        try:
            answer = cast(dict[str, Any], parse_json(line))
        except ValueError as error:
            raise BenchError(f"the contender '{self.name}' gave no answer that can be read ({error}).") from None
        if "error" in answer:
            kind = OptionError if answer["exit_code"] == OptionError.exit_code else BenchError
            raise kind(f"{self.name}: {answer['error']}")
        return answer

    def _cause(self) -> str:
        code = self._process.wait()
        if code < 0:
            hint = "; was there too little memory?" if -code == getattr(signal, "SIGKILL", 9) else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1] if lines else f"exit code {code}"
