"""The history as a file of JSON lines, written in blocks and readable at any moment.

The first line is a header {"format", "version", "smoothing", "before"}: `before` holds the averages
over steps that are not in the file, null where there are none. Every further line is an object with
the fields `GIVEN` of one record, "metrics" where there are any, and "layers" where the layers were
measured separately; averages and ratios are worked out when the file is read.
JSON has no NaN and no infinity: NaN is written as null, the infinities as "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from typing import NamedTuple

from adabatch.diagnostics.layers import LayerStatistics
from adabatch.diagnostics.record import FIELDS, GIVEN, Averages, Row
from adabatch.interfaces import State

FORMAT, VERSION, LAYERS, METRICS = "adabatch.diagnostics", 2, "layers", "metrics"
# Records wait so long, and no more of them, before they are written together.
BLOCK_SECONDS, BLOCK_RECORDS = 1.0, 1000
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "int | None": (int, type(None)), "float": (int, float),
    "bool": (bool,), "str": (str,),
}


def to_json(value: object) -> object:
    """Numbers in dicts and lists as JSON knows them.

    Example:
        >>> to_json({"a": [1.5, math.nan, -math.inf]})
        {'a': [1.5, None, '-inf']}
    """
    if isinstance(value, dict):
        return {key: to_json(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(child) for child in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else repr(value)


def from_json(value: object) -> object:
    """The inverse of to_json."""
    if isinstance(value, dict):
        return {key: from_json(child) for key, child in value.items()}
    if isinstance(value, list):
        return [from_json(child) for child in value]
    if value is None:
        return math.nan
    return float(str(value)) if value in ("inf", "-inf") else value


def encode(row: Row, layers: LayerStatistics | None = None) -> str:
    """One record as a line of valid JSON, without the line's end."""
    fields = dict(zip(GIVEN, map(to_json, row.worked_out()[:-1]), strict=True))
    if row.metrics:
        fields[METRICS] = to_json(dict(row.metrics))
    if layers is not None:
        fields[LAYERS] = layers.to_json()
    return json.dumps(fields, allow_nan=False)


def decode(line: bytes) -> tuple[Row, LayerStatistics | None]:
    """The row and the layers of one line.

    Raises:
        ValueError: not a JSON object with exactly the fields of a record, each of its type.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with the fields of a record, got {record!r}")
    layers, metrics = record.pop(LAYERS, None), record.pop(METRICS, {})
    if record.keys() != set(GIVEN):
        missing, unknown = sorted(set(GIVEN) - record.keys()), sorted(record.keys() - set(GIVEN))
        raise ValueError(f"missing fields {missing}, unknown fields {unknown}")
    if not isinstance(metrics, dict):
        raise ValueError(f"metrics is {metrics!r}, but must be an object of numbers")
    values = [_typed(name, FIELDS[name], record[name]) for name in GIVEN]
    row = Row._make(
        [*values, {name: _typed(name, "float", value) for name, value in metrics.items()}])
    return row, None if layers is None else LayerStatistics.from_json(layers, row.batch_size)


def _typed(name: str, kind: str, value: object) -> object:
    if kind == "float":
        value = from_json(value)
    if not isinstance(value, _TYPES[kind]) or (kind != "bool" and isinstance(value, bool)):
        raise ValueError(f"{name} is {value!r}, but must be of type {kind}")
    return float(value) if isinstance(value, (int, float)) and kind == "float" else value


_open: weakref.WeakSet[JsonlWriter] = weakref.WeakSet()


class JsonlWriter:
    """Appends records to a file, in blocks: when one is full, a second after the last one was
    written, at `flush` and `close`, and when this object or the process ends.

    Args:
        path: the file; its folder must exist.
        before: the averages before the first record.
        append: continue an existing file (a torn last line is removed) instead of replacing it.

    Raises:
        ValueError: append, and the file is not a history of this version.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], before: Averages, append: bool = False):
        self.path = os.fspath(path)
        is_new = not append or not os.path.exists(self.path) or os.path.getsize(self.path) == 0
        if not is_new:
            _remove_torn_line(self.path)
        self._file = open(self.path, "wb" if is_new else "ab", buffering=0)  # noqa: SIM115
        self._waiting: list[tuple[Row, LayerStatistics | None]] = []
        self._since = time.monotonic()
        self._finish = weakref.finalize(self, _finish, self._file, self._waiting, os.getpid())
        _open.add(self)
        if is_new:
            header = {"format": FORMAT, "version": VERSION, "smoothing": before.smoothing}
            averages = None if before.is_empty else to_json(before.state_dict())
            _write(self._file, [json.dumps({**header, "before": averages})])

    def write(self, rows: Sequence[Row], layers: LayerStatistics | None = None) -> None:
        """Write the rows, one line each, each with the layers, or let them wait."""
        for row in rows:
            self._waiting.append((row, layers))
        now = time.monotonic()
        if now - self._since >= BLOCK_SECONDS or len(self._waiting) >= BLOCK_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits: it is with the operating system when this returns."""
        self._since = time.monotonic()
        _write(self._file, [encode(*record) for record in self._waiting])
        self._waiting.clear()

    def close(self) -> None:
        """Close the file, without what waits."""
        _open.discard(self)
        self._finish.detach()
        self._file.close()


def _write(file: FileIO, lines: list[str]) -> None:
    data = memoryview("".join(f"{line}\n" for line in lines).encode())
    while data:
        data = data[file.write(data):]


def _finish(
    file: FileIO, waiting: list[tuple[Row, LayerStatistics | None]], process: int
) -> None:
    """Write what waits and close; a forked worker of the loader writes nothing."""
    if os.getpid() == process:
        _write(file, [encode(*record) for record in waiting])
    file.close()


class Content(NamedTuple):
    """What a file holds."""

    before: Averages
    records: list[tuple[Row, LayerStatistics | None]]


def read(path: str | os.PathLike[str]) -> Content:
    """Read a file; a last line that a kill tore is left out. What waits in this process is written
    before.

    A record whose step is not above the one before it comes from a run resumed at an earlier
    checkpoint: it replaces all records from that step on.

    Raises:
        ValueError: not a history of this version, or a malformed line, named by its number.
        OSError: the file cannot be read.
    """
    path = os.fspath(path)
    for writer in list(_open):
        with suppress(OSError):
            writer.flush()
    content = Content(Averages(), [])
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                content = Content(_averages(_header(path, line)), [])
                continue
            try:
                row, layers = decode(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    break
                raise ValueError(f"{path}, line {number}: {error}. Remove the line, or restore the "
                                 "file from a copy.") from None
            while content.records and content.records[-1][0].step >= row.step:
                content.records.pop()
            content.records.append((row, layers))
    return content


def _averages(header: State) -> Averages:
    averages, before = Averages(header["smoothing"]), header["before"]
    if before is not None:
        averages.load_state_dict({key: from_json(value) for key, value in before.items()})
    return averages


def _header(path: str, line: bytes) -> State:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path}, line 1: not a history written by to_jsonl; its first line must "
                         f'be {{"format": "{FORMAT}", …}}, got {line[:80]!r}')
    if header.get("version") != VERSION:
        raise ValueError(f"{path}, line 1: a history of version {header.get('version')!r}; this "
                         f"release of adabatch reads version {VERSION}")
    return header


def _remove_torn_line(path: str) -> None:
    with open(path, "rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        _header(path, content[:end].split(b"\n", 1)[0])
        file.truncate(end)
