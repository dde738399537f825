"""The history as a file of JSON lines, readable at any moment, also after a kill.

The first line is a header {"format", "version", "smoothing"}; every further line is one record, an object keyed by the record's fields, and by "layers"
where the layers were measured apart.
JSON has no NaN and no infinity: NaN is written as null, the infinities as the strings "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable
from typing import Any

from adabatch.diagnostics.layers import LayerStatistics
from adabatch.diagnostics.record import ADDED, FIELDS, INDEX

FORMAT = "adabatch.diagnostics"
VERSION = 1
LAYERS = "layers"
_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str}
_FROM_TEXT = {"inf": math.inf, "-inf": -math.inf}


def encode(row: tuple, layers: LayerStatistics | None = None) -> str:
    """One record as a line of valid JSON, without the line's end."""
    values = (_encode_float(value) if isinstance(value, float) else value for value in row)
    fields = dict(zip(FIELDS, values, strict=True))
    return json.dumps(fields if layers is None else fields | {LAYERS: layers.to_json()}, allow_nan=False)


def _encode_float(value: float) -> float | str | None:
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else repr(value)


def decode(record: Any) -> tuple:
    """The row behind one parsed line.

    Raises:
        ValueError: not an object with exactly the record's fields, each of its type; those of `ADDED` may be missing, as in files of older releases.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with the fields of a record, got {record!r}")
    record = {**ADDED, **record}
    if record.keys() != FIELDS.keys():
        raise ValueError(f"missing fields {sorted(FIELDS.keys() - record.keys())}, unknown fields {sorted(record.keys() - FIELDS.keys())}")
    return tuple(_decode_value(name, kind, record[name]) for name, kind in FIELDS.items())


def _decode_value(name: str, kind: str, value: Any) -> Any:
    if kind == "float":
        if value is None:
            return math.nan
        if isinstance(value, str) and value in _FROM_TEXT:
            return _FROM_TEXT[value]
    if not isinstance(value, _KINDS[kind]) or (kind != "bool" and isinstance(value, bool)):
        raise ValueError(f"{name} is {value!r}, but must be of type {kind}")
    return float(value) if kind == "float" else value


class JsonlWriter:
    """Appends records to a file; each is with the operating system when `write` returns, so that a killed process loses none.

    Args:
        path: the file; its folder must exist.
        smoothing: noted in the header.
        append: continue a file that is there (a torn last line is cut off) instead of replacing it.

    Raises:
        ValueError: append, and the file is no history of this version.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], smoothing: float, append: bool = False):
        self.path = os.fspath(path)
        fresh = not append or not os.path.exists(self.path) or os.path.getsize(self.path) == 0
        if not fresh:
            _cut_torn_line(self.path)
        # Unbuffered: nothing of ours is left to lose at a kill, nor to be written twice by a forked worker of the data loader.
        self._file = open(self.path, "wb" if fresh else "ab", buffering=0)  # noqa: SIM115
        # A run that just ends is not warned of a file left open: nothing is lost in it.
        weakref.finalize(self, self._file.close)
        if fresh:
            self._write([json.dumps({"format": FORMAT, "version": VERSION, "smoothing": smoothing})])

    def write(self, rows: Iterable[tuple], layers: LayerStatistics | None = None) -> None:
        """Writes the rows, one line each, the layers with each of them."""
        self._write([encode(row, layers) for row in rows])

    def _write(self, lines: list[str]) -> None:
        data = memoryview("".join(f"{line}\n" for line in lines).encode())
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _cut_torn_line(path: str) -> None:
    """Leaves the file ending with a whole line, after making sure that it is a history."""
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        _check_header(path, content[:whole].split(b"\n", 1)[0])
        file.truncate(whole)


def _check_header(path: str, line: bytes) -> dict:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f'{path}, line 1: not a history written by to_jsonl (its first line must be {{"format": "{FORMAT}", …}}, got {line[:80]!r}).')
    if header.get("version") != VERSION:
        raise ValueError(f"{path}, line 1: history version {header.get('version')!r}, but this adabatch reads version {VERSION}; update adabatch.")
    return header


def read(path: str | os.PathLike[str]) -> tuple[dict, list[tuple], list[LayerStatistics | None]]:
    """The header, the rows and the layers of each row of a file; a last line without its end that cannot be read was torn by a kill and is left out.

    A record whose step is not above the one before it comes from a run resumed at an earlier checkpoint: it replaces all records from that step on.

    Raises:
        ValueError: no history of this version, or a malformed line, named by its number.
        OSError: the file cannot be read.
    """
    path = os.fspath(path)
    rows: list[tuple] = []
    layers: list[LayerStatistics | None] = []
    header: dict = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                header = _check_header(path, line)
                continue
            try:
                record = json.loads(line)
                apart = record.pop(LAYERS, None) if isinstance(record, dict) else None
                row = decode(record)
                apart = None if apart is None else LayerStatistics.from_json(apart, row[INDEX["batch_size"]])
            except ValueError as error:
                if not line.endswith(b"\n"):
                    break
                raise ValueError(f"{path}, line {number}: {error}. Remove the line, or restore the file from a copy.") from None
            while rows and rows[-1][0] >= row[0]:
                rows.pop(), layers.pop()
            rows.append(row), layers.append(apart)
    return header, rows, layers
