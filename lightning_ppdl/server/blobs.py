"""Numpy arrays in rows of a database, with check sums: SQLite notices damage to its pages, not to values."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

CHUNK_BYTES = 64 * 2**20
"""Of an array in one row: SQLite's rows end at a gigabyte, and vectors do not."""

TABLE = """
CREATE TABLE arrays (
    name TEXT NOT NULL, part INTEGER NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL,
    data BLOB NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (name, part)
);
"""


def replace_arrays(database: sqlite3.Connection, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Let ``arrays`` take the place of those there are."""
    database.execute("DELETE FROM arrays")
    for name, given in arrays.items():
        array = np.asarray(given, order="C")
        raw = array.reshape(-1).view(np.uint8).data  # a copy of nothing, 0-d or not
        for part, start in enumerate(range(0, max(1, len(raw)), CHUNK_BYTES)):
            chunk = raw[start : start + CHUNK_BYTES]
            row = (name, part, array.dtype.str, json.dumps(array.shape), chunk, zlib.crc32(chunk))
            database.execute("INSERT INTO arrays VALUES (?, ?, ?, ?, ?, ?)", row)


def read_arrays(database: sqlite3.Connection) -> dict[str, npt.NDArray[Any]]:
    """The arrays that :func:`replace_arrays` wrote, in memory of their own.

    Raises:
        sqlite3.DatabaseError: if they are not the same any more.
    """
    arrays = {}
    first_parts = database.execute("SELECT name, dtype, shape FROM arrays WHERE part = 0").fetchall()
    for name, dtype, shape in first_parts:
        array = np.empty(tuple(json.loads(shape)), np.dtype(dtype))
        flat, at = array.reshape(-1).view(np.uint8), 0
        rows = database.execute("SELECT data, checksum FROM arrays WHERE name = ? ORDER BY part", (name,))
        for data, checksum in rows:
            require_checksum(data, checksum, f"a part of {name!r}")
            flat[at : at + len(data)] = np.frombuffer(data, np.uint8)
            at += len(data)
        if at != len(flat):
            raise sqlite3.DatabaseError(f"a part of {name!r} is missing")
        arrays[name] = array
    return arrays


def require_checksum(data: bytes, checksum: int, what: str) -> None:
    """Raise sqlite3.DatabaseError if ``data`` is not what was written."""
    if zlib.crc32(data) != checksum:
        raise sqlite3.DatabaseError(f"{what} has another check sum than when it was written")
