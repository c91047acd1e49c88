"""Archives of ``torch.save``: what torch itself does not look at when it reads one."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_FLAGS = 0x0808  # sizes follow the data; names are UTF-8


def is_archive(path: Path) -> bool:
    """Whether torch reads the file as an archive, not in its format from before 1.6, which has no check sums.

    Raises:
        ValueError: It is an archive whose beginning is damaged.
    """
    with path.open("rb") as file:
        begins = file.read(4) == b"PK\x03\x04"
    if not begins and zipfile.is_zipfile(path):
        raise ValueError("its first bytes are damaged")
    return begins


def check_entries(path: Path) -> None:
    """Refuse an archive that says of its entries what torch never writes.

    Of such an entry (one that passes for a folder, say) torch gives memory as it happens to be.

    Raises:
        ValueError: It does; the message names the entry.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size:
                raise ValueError(f"the entry {entry.filename} lies outside of the file")
            signature, _, flags, method, _, _, crc, packed, size, length, _ = _LOCAL_HEADER.unpack(header)
            name = file.read(length)
            plain = (
                signature == b"PK\x03\x04"
                and name == entry.orig_filename.encode()
                and flags == entry.flag_bits
                and not flags & ~_FLAGS
                and method == entry.compress_type == zipfile.ZIP_STORED
                and entry.compress_size == entry.file_size
                and (crc, packed, size) in ((0, 0, 0), (entry.CRC, entry.compress_size, entry.file_size))
                and not entry.external_attr
                and not entry.internal_attr
                and not entry.is_dir()
            )
            if not plain:
                raise ValueError(
                    f"the entry {entry.filename} is not as torch.save writes it; the file is damaged, or another "
                    f"program packed it"
                )


def compare_check_sums(path: Path) -> None:
    """Compare an archive's check sums, which torch writes and does not look at.

    Raises:
        ValueError: One is wrong; the message names the entry.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the check sum of {damaged} is wrong")
