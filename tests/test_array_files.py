"""Arrays whose header says other than the file holds are refused before any memory is taken."""

import io
import zipfile

import numpy as np
import pytest

from at_smooth import DataError
from at_smooth_plugins.datasets.npz import Npz


def header(shape, dtype="|u1", version=1):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = len(text) + 1
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2 if version == 1 else 4, "little") + text + b"\n"


def rewritten(path, name, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        entries = {each: archive.read(each) for each in archive.namelist()}
    entries[f"{name}.npy"] = content
    with zipfile.ZipFile(path, "w", method) as archive:
        for each, kept in entries.items():
            archive.writestr(each, kept)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header((10**15, 6, 6)) + bytes(100), r"x_train has a header of shape \(1000000000000000, 6, 6\)"),
        (header((40, 6, 6)) + bytes(100), "and other bytes than that needs"),
        (header((-40, 6, 6)) + bytes(1440), r"\(-40, 6, 6\)"),
        (header((40, 6, 6), "|O") + bytes(100), "no readable"),
        (header("(" * 300), "no readable"),
        (header(((40,), 6)), "no readable"),
        (header((1,), version=3), "format"),
        (header((1,), "<U999999999999"), "no readable"),
        (b"\x93NUMPY\x01\x00\xff\xff", "no readable"),
        (b"", "no readable"),
    ],
)
def test_a_header_that_lies_is_refused(npz, content, words, method):
    path = rewritten(npz(), "x_train", content, method)
    with pytest.raises(DataError, match=words) as caught:
        Npz().load(path)
    assert str(path) in str(caught.value)


def test_damaged_packed_data_are_refused(npz):
    path = npz()
    arrays = dict(np.load(path))
    np.savez_compressed(path, **arrays)
    good, refused = path.read_bytes(), 0
    for place in range(60, len(good), 97):
        broken = bytearray(good)
        broken[place : place + 2] = b"\xff\xff"
        path.write_bytes(broken)
        try:
            images = Npz().load(path)
        except DataError:
            refused += 1
        else:
            assert np.array_equal(np.asarray(images.train).ravel(), arrays["x_train"].ravel())
    assert refused > 10


def test_packed_arrays_may_be_larger_than_the_file(npz):
    path = npz(x_train=np.zeros((40, 64, 64), np.uint8), x_test=np.zeros((10, 64, 64), np.uint8))
    arrays = dict(np.load(path))
    np.savez_compressed(path, **arrays)
    assert path.stat().st_size < 40 * 64 * 64 / 10
    assert Npz().load(path).train.shape[-1] == 64


def test_a_size_that_nothing_packed_can_have_is_refused(npz):
    path = rewritten(npz(), "x_train", header((10**9,)) + bytes(10), zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    size, declared = len(header((10**9,))) + 10, len(header((10**9,))) + 10**9
    entry = content.index(b"PK\x01\x02", content.rindex(b"x_train.npy") - 60)
    assert content[entry + 24 : entry + 28] == size.to_bytes(4, "little")
    content[entry + 24 : entry + 28] = declared.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x_train cannot be 1,000,000,\d+ bytes, packed into"):
        Npz().load(path)


def test_one_bare_array_is_refused_whatever_its_size(tmp_path):
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    for number, content in enumerate((file.getvalue(), header((10**15,)) + bytes(10))):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no readable \.npz file"):
            Npz().load(path)
