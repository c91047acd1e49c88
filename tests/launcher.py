"""torchrun, as tests start it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent


def hear_ctrl_c():
    """Who starts tests in the background lets them ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Torchrun:
    """Processes that torchrun starts on this machine."""

    def __init__(self, count, *arguments, cache, log):
        self._log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "AT_SMOOTH_CACHE": str(cache), "PYTHONPATH": str(HERE)}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [*launcher, *map(str, arguments)]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                preexec_fn=hear_ctrl_c,
            )

    def ranks(self):
        """Process ids, in the order of the ranks."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                of_ours = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == self._process.pid
                names = (folder / "environ").read_bytes().decode().split("\0") if of_ours else []
            except OSError:
                continue
            found.update({int(name[5:]): int(folder.name) for name in names if name.startswith("RANK=")})
        return [found[rank] for rank in sorted(found)]

    def end(self):
        """The exit status, and what was printed before torchrun's own account."""
        try:
            status = self._process.wait(120)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        text = self._log.read_text()
        ours = [
            line
            for line in text.splitlines()
            if line.startswith(("Error", "SIG", "rank", "at:", "at +", "Usage", "student"))
        ]
        return status, ours, text

    def wait_for(self, path):
        patience = time.monotonic() + 100
        while not path.exists() and time.monotonic() < patience:
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.05)

    def wait_for_words(self, words):
        patience = time.monotonic() + 100
        while words not in self._log.read_text() and time.monotonic() < patience:
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.05)

    def kill_launcher(self):
        """End torchrun itself by SIGKILL, which leaves its ranks alone."""
        self._process.kill()
        self._process.wait()

    def interrupt(self):
        """As Ctrl-C does, which the terminal sends to all."""
        for each in (self._process.pid, *self.ranks()):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGINT)

    def kill(self):
        for each in self.ranks():
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self._process.kill()
