"""No single flipped bit of a checkpoint gives other content: the file is refused, or holds what it held."""

import io
import struct
import zipfile

import pytest
import torch

from at_smooth import CheckpointError, checkpoint
from at_smooth.digest import digest_of

CONTENT = {
    "weights": {"conv": torch.arange(24.0).view(2, 3, 2, 2), "count": torch.tensor(7)},
    "half": torch.arange(8, dtype=torch.bfloat16),
    "row": {"epoch": 3, "val_ra": 12.5, "test_ra": None},
}


@pytest.fixture
def ours(tmp_path):
    """A checkpoint of ours."""
    checkpoint.save(tmp_path / "c.pt", CONTENT)
    return tmp_path / "c.pt"


@pytest.fixture
def foreign(tmp_path):
    """What torch.save writes of the same: no digest."""
    torch.save(CONTENT, tmp_path / "c.pt")
    return tmp_path / "c.pt"


def parts(content):
    """The places of an archive: of its entries' content and the padding before it, and of all the rest."""
    headers, padding, data = set(range(len(content))), [], []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            name, extra = struct.unpack_from("<HH", content, entry.header_offset + 26)
            start = entry.header_offset + 30 + name + extra
            padding += range(start - extra + 4, start)
            data += range(start, start + entry.file_size)
    return sorted(headers.difference(padding, data)), padding, data


def changed_by(path, good, places, bits=range(8)):
    """The single-bit flips after which the file loads with other content, and how many were refused."""
    whole, changed, refused = digest_of(checkpoint.read(path)), [], 0
    for place in places:
        for bit in bits:
            broken = bytearray(good)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            try:
                loaded = checkpoint.read(path)
            except CheckpointError:
                refused += 1
                continue
            if digest_of(loaded) != whole:
                changed.append((place, bit))
    return changed, refused


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_an_entry_that_passes_for_a_folder_is_refused(kind, request):
    path = request.getfixturevalue(kind)
    good = path.read_bytes()
    directory = good.index(b"PK\x01\x02")
    attributes = [place + 38 for place in range(directory, len(good)) if good[place : place + 4] == b"PK\x01\x02"]
    changed, refused = changed_by(path, good, attributes, bits=[4])
    assert not changed
    assert refused == len(attributes) > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_every_bit_of_the_headers_and_some_of_the_rest(kind, request):
    path = request.getfixturevalue(kind)
    good = path.read_bytes()
    headers, padding, data = parts(good)
    changed, refused = changed_by(path, good, headers)
    assert not changed
    assert refused > 1000
    changed, refused = changed_by(path, good, [*padding[::7], *data[::3]], bits=[0, 3, 7])
    assert not changed
    assert refused > 100
