"""The machine in words."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from at_smooth._version import __version__
from at_smooth.processor import processor_name
from at_smooth.recipe import Recipe
from at_smooth.runtime import usable_device
from at_smooth.versions import installed


def machine(recipe: Recipe) -> dict[str, Any]:
    """What times depend on, and what cannot be seen from a recipe."""
    device = usable_device(recipe.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "processor": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": recipe.threads or torch.get_num_threads(),
        "device": str(device),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchattacks": installed("torchattacks"),
        "at_smooth": __version__,
    }


def in_words(described: dict[str, Any]) -> str:
    """One line of it."""
    threads = f"{described['threads']} threads of {described['cores']} cores"
    cores = f"{described['processor']} ({described['capability']}), {threads}"
    where = f"{described['gpu']}, {cores}" if described["gpu"] else cores
    return f"{where}; torch {described['torch']}, torchattacks {described['torchattacks']}"
