import os
import signal

import pytest
import torch

from at_smooth import checkpoint
from at_smooth.interruption import uninterrupted


class StopError(BaseException):
    pass


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def number(request):
    """A signal whose handler raises."""

    def stop(number, frame):
        raise StopError

    before = signal.signal(request.param, stop)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_waits_for_the_end_of_the_block(number):
    done = []

    def block():
        with uninterrupted():
            os.kill(os.getpid(), number)
            done.append("the block")

    with pytest.raises(StopError):
        block()
    assert done == ["the block"]


def test_outside_the_block_it_does_not_wait(number):
    with uninterrupted():
        pass
    with pytest.raises(StopError):
        os.kill(os.getpid(), number)


def test_a_checkpoint_is_written_whole_before_the_signal_is_heard(number, tmp_path, monkeypatch):
    save = torch.save

    def signalled(content, file):
        os.kill(os.getpid(), number)
        save(content, file)

    monkeypatch.setattr(torch, "save", signalled)
    tensors = {str(k): torch.full((1000,), float(k)) for k in range(20)}
    with pytest.raises(StopError):
        checkpoint.save(tmp_path / "c.pt", tensors)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
