import copy
import os

import pytest
import torch

from at_smooth import CheckpointError, checkpoint, load_model
from at_smooth.digest import digest_of
from at_smooth.files import write_atomically

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


def test_content_that_is_not_what_was_saved_is_refused(tmp_path):
    checkpoint.save(tmp_path / "c.pt", CONTENT)
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    content["weights"]["a"][1] = 5.0
    torch.save(content, tmp_path / "c.pt")  # its archive is whole
    for read in (checkpoint.load, checkpoint.read):
        with pytest.raises(CheckpointError, match="check sum of its content"):
            read(tmp_path / "c.pt")


def test_a_checkpoint_of_an_older_format_is_refused_and_says_so(tmp_path):
    torch.save({"format": 1, **CONTENT}, tmp_path / "c.pt")
    with pytest.raises(
        CheckpointError, match=r"older version of at-smooth, as a checkpoint of format 1 .* Train it again"
    ):
        checkpoint.load(tmp_path / "c.pt")


LAYER = torch.nn.Flatten().state_dict()  # an OrderedDict without a tensor, so that its text is always the same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 1.0}), ({"a": 1}, {"a": True}), ({"a": "1"}, {"a": 1}), ({"a": None}, {}), ([1, 2], (1, 2)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (["ab", "c"], ["a", "bc"]), ([[1], 2], [[1, 2]]), (0.0, -0.0),
        (torch.zeros(2, 3), torch.zeros(3, 2)), (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.bfloat16)), (torch.ones(2), torch.ones(1, 2)),
        (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0000001])), (torch.zeros(0), torch.zeros(0, 1)),
        (LAYER, dict(LAYER)),
    ],
    ids=str,
)  # fmt: skip
def test_a_digest_tells_apart(one, other):
    assert digest_of(one) != digest_of(other)
    assert digest_of(one) == digest_of(copy.deepcopy(one))


def test_a_digest_is_of_the_numbers_and_not_of_where_they_lie():
    images = torch.rand(2, 3, 4, 4)
    assert digest_of(images) == digest_of(images.contiguous(memory_format=torch.channels_last))
    assert digest_of(images[:, 1]) == digest_of(images[:, 1].clone())


@pytest.mark.parametrize("tensor", [torch.ones(2).to_sparse(), torch.ones(2, device="meta")], ids=["sparse", "meta"])
def test_a_tensor_without_plain_numbers_is_not_saved(tmp_path, tensor):
    with pytest.raises(CheckpointError, match=r"state\.average is a sparse, quantized or meta tensor"):
        checkpoint.save(tmp_path / "c.pt", {"state": {"average": tensor}})
    assert not list(tmp_path.iterdir())


def test_a_conjugate_view_is_its_numbers(tmp_path):
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    assert digest_of(numbers.conj()) == digest_of(numbers.conj().resolve_conj()) != digest_of(numbers)
    checkpoint.save(tmp_path / "c.pt", {"numbers": numbers.conj()})
    assert torch.equal(checkpoint.load(tmp_path / "c.pt")["numbers"], numbers.conj())


def test_a_digest_survives_being_saved(tmp_path):
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).to(
        memory_format=torch.channels_last
    )
    content = {
        "weights": layers.state_dict(), "name": "run\udcff", "set": {1, "a"}, "shape": torch.zeros(2, 3).shape,
        "bytes": b"\0", "nan": float("nan"), "dtype": torch.bfloat16, "device": torch.device("cpu"),
    }  # fmt: skip
    checkpoint.save(tmp_path / "c.pt", content)
    assert checkpoint.load(tmp_path / "c.pt")["name"] == "run\udcff"


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
    with pytest.raises(CheckpointError, match=r"state\.model is of type function, no tensor and no plain value"):
        checkpoint.save(tmp_path / "c.pt", {"state": {"model": lambda: None}})
    assert (tmp_path / "c.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_file_is_replaced_whole(tmp_path):
    for content in (b"long content", b"short"):
        write_atomically(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
    assert os.listdir(tmp_path) == ["f"]
