import os
import pickle

import pytest
import torch

from at_smooth import CheckpointError, checkpoint, load_model
from at_smooth.checkpoint import write_atomically

CONTENT = {"weights": {"a": torch.arange(3.0)}, "epoch": 4, "row": {"val_ra": 12.5, "test_ra": None}, "names": ["x"]}


class Dangerous:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "c.pt", CONTENT)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert torch.equal(loaded["weights"]["a"], CONTENT["weights"]["a"])
    assert {name: loaded[name] for name in ("epoch", "row", "names")} == {
        name: CONTENT[name] for name in ("epoch", "row", "names")
    }


def test_a_checkpoint_is_plain_tensors(tmp_path):
    checkpoint.save(tmp_path / "c.pt", CONTENT)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["epoch"] == 4


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    torch.save({"format": 1, "model": Dangerous(tmp_path / "owned")}, tmp_path / "c.pt")
    for read in (checkpoint.load, load_model):
        with pytest.raises(CheckpointError, match="more than tensors and plain values") as caught:
            read(tmp_path / "c.pt")
        assert "weights_only" not in str(caught.value)  # torch's own advice is to run it
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 broken", b"\x80\x02."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.pt"):
        checkpoint.load(tmp_path / "c.pt")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    checkpoint.save(tmp_path / "c.pt", CONTENT)
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        checkpoint.load(tmp_path / "c.pt")


@pytest.mark.parametrize("content", [{"model": {}}, {"format": 999}, torch.zeros(2)], ids=str)
def test_a_checkpoint_of_others_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="not written by this version"):
        checkpoint.load(tmp_path / "c.pt")


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "c.pt")


def test_the_old_file_stands_where_writing_fails(tmp_path):
    checkpoint.save(tmp_path / "c.pt", CONTENT)
    before = (tmp_path / "c.pt").read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        checkpoint.save(tmp_path / "c.pt", {"model": lambda: None})
    assert (tmp_path / "c.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_file_is_replaced_whole(tmp_path):
    for content in (b"long content", b"short"):
        write_atomically(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
    assert os.listdir(tmp_path) == ["f"]
