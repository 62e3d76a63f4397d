# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The directory of a zip as torch.save writes it: members that are stored, and nothing else.

zipfile reads any zip, makes an object of fifteen fields for each member, and believes what the file says of its size.
Here a member is what a reader of tensors needs, the file may be a part of another one, and whatever such a zip does not
have (compression, encryption, a comment, bytes before the first member) is refused.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

from .bytes import OpenBytes

# A torch.save file with 50,000 tensors stays below both.
MAX_DIRECTORY_BYTES = 8 * 2**20
MAX_MEMBERS = 2**16

_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_WIDE_END = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_32 = 0xFFFFFFFF
_ENCRYPTED, _UTF8_NAMES = 1, 0x800


class Member(NamedTuple):
    """A member of a zip: where its local header is in the zip, its size in bytes, its checksum (0: none)."""

    header: int
    size: int
    crc: int


@dataclass(frozen=True)
class Directory:
    """What a zip holds.

    Args:
        start: position in the file where the zip begins; one it does not say is counted back from its end.
        position: of the directory, in the zip.
        raw: the directory and what follows it, as it lies in the file.
        members: by name, in the order of their positions.
    """

    start: int
    position: int
    raw: bytes
    members: dict[str, Member]


def read_directory(data: OpenBytes, start: int | None, end: int) -> Directory:
    """The directory of a zip in a file.

    Args:
        data: the file.
        start: where the zip begins; unless given, as many bytes before its end as it has.
        end: where it ends.

    Raises:
        ValueError: it is no zip of stored members, or one that no checkpoint needs; the message says what disagrees.
        EOFError, OSError: the file cannot be read.
    """
    floor = start or 0
    tail = min(end - floor, _END.size + _LOCATOR.size + _WIDE_END.size)
    size, position, count, footer = _read_end(data.pread(end - tail, tail) if tail > 0 else b"")
    total = position + size + footer
    if total > end - floor or (start is not None and total != end - start):
        raise ValueError(f"its directory makes it {total} bytes long, it has {end - floor}")
    if size > MAX_DIRECTORY_BYTES:
        raise ValueError(f"the zip directory has {size} bytes, the limit is {MAX_DIRECTORY_BYTES}")
    if count > MAX_MEMBERS:
        raise ValueError(f"the zip directory has {count} members, the limit is {MAX_MEMBERS}")
    start = end - total
    raw = data.pread(start + position, size + footer)
    return Directory(start, position, raw, _parse_entries(raw[:size], count, position))


def _read_end(tail: bytes) -> tuple[int, int, int, int]:
    """Size and position of the directory, number of its entries, bytes after it."""
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
        raise ValueError("it has no zip directory at its end")
    _, disk, _, _, count, size, position, comment = _END.unpack(tail[-_END.size :])
    if disk or comment:
        raise ValueError(f"the end of its zip directory tells of disk {disk} and a comment of {comment} bytes")
    rest = tail[: -_END.size]
    if rest[-_LOCATOR.size :][:4] != b"PK\6\7":
        return size, position, count, _END.size
    wide = rest[: -_LOCATOR.size][-_WIDE_END.size :]
    if len(wide) < _WIDE_END.size or wide[:4] != b"PK\6\6":
        raise ValueError("the wide end of its zip directory is not where it belongs")
    _, _, _, _, _, _, _, count, size, position = _WIDE_END.unpack(wide)
    return size, position, count, _END.size + _LOCATOR.size + _WIDE_END.size


def _parse_entries(raw: bytes, count: int, position: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        if len(raw) - at < _ENTRY.size or raw[at : at + 4] != b"PK\1\2":
            raise ValueError(f"the zip directory has no entry at its byte {at}")
        _, _, _, flags, method, _, _, crc, packed, size, *lengths, _, _, _, header = _ENTRY.unpack_from(raw, at)
        fields = at + _ENTRY.size + lengths[0]
        end = fields + lengths[1] + lengths[2]
        if end > len(raw):
            raise ValueError(f"an entry of the zip directory reaches {end - len(raw)} bytes past it")
        name = _decode(raw[at + _ENTRY.size : fields], flags)
        if flags & _ENCRYPTED or method:
            raise ValueError(f"member {name!r} is compressed or encrypted, torch.save stores")
        size, packed, header = _wide(raw[fields : fields + lengths[1]], size, packed, header, name)
        if size != packed or header + size > position:
            raise ValueError(
                f"member {name!r} has {size} bytes from byte {header} on, stored as {packed}, the directory begins at "
                f"{position}"
            )
        if name in members:
            raise ValueError(f"member {name!r} occurs twice")
        members[name] = Member(header, size, crc)
        at = end
    if at != len(raw):
        raise ValueError(f"the zip directory has {len(raw)} bytes, its {count} entries {at}")
    return dict(sorted(members.items(), key=lambda item: item[1].header))


def _decode(name: bytes, flags: int) -> str:
    if name.isascii():
        return name.decode()
    return name.decode("utf-8" if flags & _UTF8_NAMES else "cp437")  # UnicodeDecodeError is a ValueError


def _wide(extra: bytes, size: int, packed: int, header: int, name: str) -> tuple[int, int, int]:
    """The numbers of an entry, those that are too large for it taken from its extra field."""
    if _MAX_32 not in (size, packed, header):
        return size, packed, header
    at = 0
    while len(extra) - at >= 4:
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1 and at + 4 + length <= len(extra):
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            found = [next(numbers, -1) if number == _MAX_32 else number for number in (size, packed, header)]
            if -1 not in found:
                return found[0], found[1], found[2]
        at += 4 + length
    raise ValueError(f"member {name!r} is larger than its entry in the zip directory says, which lacks a zip64 field")


def content_start(local: bytes, header: int, name: str) -> int:
    """Where a member's content begins in a zip.

    Args:
        local: the first bytes of its local header, `LOCAL_BYTES` of them.
        header: where that is.
        name: of the member, for the message.

    Raises:
        ValueError: it is no header.
    """
    if len(local) < LOCAL_BYTES or local[:4] != b"PK\3\4":
        raise ValueError(f"member {name!r} has no header at byte {header}")
    *_, name_bytes, extra_bytes = _LOCAL.unpack(local)  # the extra field that aligns the content is the header's own
    return header + LOCAL_BYTES + name_bytes + extra_bytes


LOCAL_BYTES = _LOCAL.size
