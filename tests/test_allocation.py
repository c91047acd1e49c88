import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, sys
import torch
from at_smooth import Runtime
from at_smooth.runtime import usable_device

(Runtime.choose if sys.argv[1] == "runtime" else usable_device)("cpu")
torch.ones(1 << 23)  # 32 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROBE, how]
    return int(subprocess.check_output(command, env={**clean, **environment}, text=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back each time")
def test_a_runtime_on_a_cpu_keeps_freed_memory_unless_the_environment_has_its_own_way():
    kept = page_faults("runtime")
    assert 3 * kept < page_faults("device")
    assert 3 * kept < page_faults("runtime", MALLOC_MMAP_THRESHOLD_="1000000")
