import subprocess
import sys

import pytest
import torch
from torch import nn

from at_smooth import OptionError, Runtime
from at_smooth.runtime import describe, fenced_randomness, generator, seed_global


def test_auto_is_the_best_device_that_is_there():
    assert Runtime.choose().device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x", "cuda:-1", "meta", "hpu", "xla"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(OptionError, match=rf"device '{device}' cannot be used \(.*\)\. Try --device cpu\."):
        Runtime.choose(device)


def test_numpy_does_not_complain_that_denormals_are_gone():
    """As NumPy 1 and 2.2 would; newer ones do not look."""
    script = (
        "import warnings, numpy, at_smooth; at_smooth.Runtime.choose('cpu'); warnings.simplefilter('error'); "
        "[numpy.finfo(kind) for kind in (numpy.float32, numpy.float64)]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_stream_follows_from_seed_moment_and_purpose():
    draws = [torch.rand(1, generator=generator(*key)).item() for key in [
        (0, 0, "a"), (0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")
    ]]  # fmt: skip
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_global_stream_follows_likewise(seed):
    draws = []
    for moment in (3, 3, 4):
        seed_global(seed, moment, "step")
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] != draws[2]


def test_a_fence_keeps_the_stream_outside_untouched():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with fenced_randomness(1, "inside"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with fenced_randomness(1, "inside"):
        assert torch.equal(torch.rand(3), inside)


def test_a_fence_holds_where_the_block_fails():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="seven"), fenced_randomness(1, "inside"):
        raise ValueError(f"seven, and {torch.rand(1)}")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_decides_the_arithmetic(precision, dtype):
    runtime = Runtime.choose("cpu", precision)
    with runtime.autocast():
        assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype == dtype


def test_the_memory_layout_changes_no_value():
    runtime, images = Runtime.choose("cpu"), torch.rand(2, 3, 4, 5)
    model = nn.Conv2d(3, 2, 3)
    expected = model(images)
    torch.testing.assert_close(runtime.place(model)(images), expected)


def test_a_device_has_words():
    assert describe(torch.device("cpu")).startswith("cpu (")


def test_evaluation_wants_full_float32_of_a_gpu_and_puts_its_settings_back(toy_data):
    from at_smooth import AttackSpec, Threat, measuring
    from at_smooth.compilation import Compilation

    new = hasattr(torch.backends.cudnn, "conv")
    places = (torch.backends.cudnn.conv if new else torch.backends.cudnn, torch.backends.cuda.matmul)
    name, short, full = ("fp32_precision", "tf32", "ieee") if new else ("allow_tf32", True, False)

    def settings():
        return [getattr(place, name) for place in places]

    seen = []

    class Look(torch.nn.Linear):
        def forward(self, images):
            seen.append(settings())
            return super().forward(images.flatten(1))

    attack = AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 1})
    before = settings()
    try:
        for place in places:
            setattr(place, name, short)
        measuring.right_answers(Look(16, 3), toy_data().val, attack, Compilation(False), 16)
        assert settings() == [short, short]
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)
    assert seen
    assert all(each == [full, full] for each in seen)
