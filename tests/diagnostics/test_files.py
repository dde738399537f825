"""The history as CSV and as JSON lines: round trips, torn files, a killed process, a resume."""

import csv
import json
import math
import os
import subprocess
import sys
import time

import pytest

from adabatch.diagnostics import Diagnostics
from adabatch.diagnostics.record import FIELDS, GIVEN
from tests.diagnostics.synthetic import fill, same_records, steps


def test_csv(tmp_path):
    history = fill(Diagnostics(), steps(20))
    history.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(FIELDS)
    for row, record in zip(rows, history, strict=True):
        for name, kind in FIELDS.items():
            value = {
                "int": int,
                "int | None": int,
                "float": float,
                "bool": lambda text: text == "True",
                "str": str,
            }[kind](row[name])
            assert repr(value) == repr(getattr(record, name))


def test_jsonl_round_trip_while_it_grows(tmp_path):
    path, rows = tmp_path / "run.jsonl", steps(30, every=2)
    history = fill(Diagnostics(smoothing=0.8), rows[:10])
    history.to_jsonl(path)
    assert len(Diagnostics.from_jsonl(path)) == 10
    for count, row in enumerate(rows[10:], start=11):
        history.append(**row)
        assert len(Diagnostics.from_jsonl(path)) == count
    read = Diagnostics.from_jsonl(path)
    assert same_records(read, history)
    assert str(read.state_dict()) == str(history.state_dict())
    history.close()
    history.append(**{**rows[-1], "step": 99})
    assert len(Diagnostics.from_jsonl(path)) == 30


def test_every_line_is_strict_json(tmp_path):
    history = fill(Diagnostics(), steps(20))
    history.append(
        step=21,
        samples_seen=999,
        batch_size=8,
        next_batch_size=8,
        lr=0.1,
        loss=-math.inf,
        proposed_batch_size=math.inf,
        dropped='say "no"\n',
    )
    history.to_jsonl(tmp_path / "run.jsonl")

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    header, *lines = [
        json.loads(line, parse_constant=refuse)
        for line in (tmp_path / "run.jsonl").read_text().splitlines()
    ]
    assert header == {
        "format": "adabatch.diagnostics",
        "version": 2,
        "smoothing": 0.95,
        "before": None,
    }
    assert tuple(lines[0]) == GIVEN
    assert (lines[-1]["loss"], lines[-1]["proposed_batch_size"], lines[-1]["variance_trace"]) == (
        "-inf",
        "inf",
        None,
    )
    assert same_records(Diagnostics.from_jsonl(tmp_path / "run.jsonl"), history)


def test_torn_last_line_at_every_length(tmp_path):
    path = tmp_path / "run.jsonl"
    fill(Diagnostics(), steps(3)).to_jsonl(path)
    content = path.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    for length in range(start, len(content) - 1):
        path.write_bytes(content[:length])
        assert [record.step for record in Diagnostics.from_jsonl(path)] == [1, 2]
    path.write_bytes(content[:-1])
    assert len(Diagnostics.from_jsonl(path)) == 3


def test_empty_file_is_an_empty_history(tmp_path):
    (tmp_path / "run.jsonl").touch()
    assert len(Diagnostics.from_jsonl(tmp_path / "run.jsonl")) == 0


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        (
            1,
            b'{"format": "adabatch.diagnostics", "version": 7}',
            "line 1: a history of version 7; this release of adabatch reads version 2",
        ),
        (1, b'{"loss": 1}', "line 1: not a history"),
        (1, b"step,loss", "line 1: not a history"),
        (3, b'{"step": 2, "samp', "line 3: "),
        (3, b"[1, 2]", r"line 3: expected an object with the fields of a record, got \[1, 2\]"),
        (3, b'{"step": 2}', "line 3: missing fields"),
        (3, ("loss", '"high"'), "line 3: loss is 'high', but must be of type float"),
        (3, ("batch_size", "16.5"), "line 3: batch_size is 16.5, but must be of type int"),
        (3, ("batch_size", "true"), "line 3: batch_size is True, but must be of type int"),
        (3, ("measured", "1"), "line 3: measured is 1, but must be of type bool"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, replacement, message):
    path = tmp_path / "run.jsonl"
    fill(Diagnostics(), steps(4)).to_jsonl(path)
    lines = path.read_bytes().splitlines()
    if isinstance(replacement, tuple):
        name, value = replacement
        replacement = json.dumps({**json.loads(lines[line - 1]), name: json.loads(value)}).encode()
    lines[line - 1] = replacement
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=message):
        Diagnostics.from_jsonl(path)


WRITING = """
import os, sys, time
from itertools import count
from adabatch.diagnostics import Diagnostics
history = Diagnostics()
history.to_jsonl(sys.argv[1])
for step in count(1):
    history.append(step=step, samples_seen=16 * step, batch_size=16, lr=0.1, loss=1 / step,
                   measured=True, variance_trace=step)
    {}
"""


def written(path, then):
    """The history of a process that does `then` after each step, and the last number it printed."""
    process = subprocess.run([sys.executable, "-c", WRITING.format(then), str(path)],
                             capture_output=True, text=True, check=False)
    history = Diagnostics.from_jsonl(path)
    assert history.column("step").tolist() == list(range(1, len(history) + 1))
    assert history.column("loss").tolist() == [1 / step for step in history.column("step").tolist()]
    return history, int(process.stdout.split()[-1])


KILL = "os.kill(os.getpid(), 9)"


@pytest.mark.parametrize("then", [
    f"if step == 300: history.state_dict(); print(step, flush=True); {KILL}",
    f"if step == 300: history.flush(); print(step, flush=True); {KILL}",
    # Half a second more than a record may wait.
    f"""time.sleep(.005)
    print(step, flush=True) if step == 50 else {KILL} if step == 350 else None""",
    "if step == 300: print(step, flush=True); 1 / 0",
    "if step == 300: print(step, flush=True); sys.exit()",
    "if step == 300: print(step, flush=True); del history; " + KILL,
], ids=["checkpoint", "flush", "a second ago", "error", "exit", "freed"])
def test_what_is_in_the_file_after_the_process(tmp_path, then):
    history, step = written(tmp_path / "run.jsonl", then)
    assert history.latest.step >= step


def test_a_forked_worker_writes_nothing(tmp_path):
    then = "if step == 300 and not os.fork(): del history; os._exit(0)\n" \
           "    if step == 400: os.wait(); print(step, flush=True); break"
    assert len(written(tmp_path / "run.jsonl", then)[0]) == 400


def test_resumed_run_continues_the_file(tmp_path):
    path, rows = tmp_path / "run.jsonl", steps(30)
    lost = fill(Diagnostics(), rows[:15])
    state = lost.state_dict()
    lost.to_jsonl(path)
    fill(lost, rows[15:22])
    with open(path, "ab") as file:
        file.write(b'{"step": 23, "sam')
    resumed = Diagnostics()
    resumed.load_state_dict(state)
    resumed.to_jsonl(path, append=True)
    fill(resumed, rows[15:])
    assert same_records(Diagnostics.from_jsonl(path), fill(Diagnostics(), rows))


def test_append_to_a_missing_or_foreign_file(tmp_path):
    history = fill(Diagnostics(), steps(3))
    history.to_jsonl(tmp_path / "new.jsonl", append=True)
    assert len(Diagnostics.from_jsonl(tmp_path / "new.jsonl")) == 3
    foreign = tmp_path / "notes.txt"
    foreign.write_text("do not touch\nplease")
    with pytest.raises(ValueError, match="not a history"):
        history.to_jsonl(foreign, append=True)
    assert foreign.read_text() == "do not touch\nplease"


def test_a_file_begun_after_a_resume_holds_the_averages_before_it(tmp_path):
    rows = steps(30, every=2)
    first = fill(Diagnostics(smoothing=0.8), rows[:11])
    resumed = Diagnostics()
    resumed.load_state_dict(first.state_dict())
    resumed.to_jsonl(tmp_path / "run.jsonl")
    fill(resumed, rows[11:])
    whole = fill(Diagnostics(smoothing=0.8), rows)
    assert same_records(Diagnostics.from_jsonl(tmp_path / "run.jsonl"), whole[11:])
    short = fill(Diagnostics(smoothing=0.8, max_records=7), rows)
    short.to_jsonl(tmp_path / "short.jsonl")
    assert same_records(Diagnostics.from_jsonl(tmp_path / "short.jsonl"), whole[-7:])


def test_second_file_ends_the_first(tmp_path):
    rows = steps(6)
    history = fill(Diagnostics(), rows[:2])
    history.to_jsonl(tmp_path / "a.jsonl")
    history.to_jsonl(tmp_path / "b.jsonl")
    fill(history, rows[2:])
    assert len(Diagnostics.from_jsonl(tmp_path / "a.jsonl")) == 2
    assert len(Diagnostics.from_jsonl(tmp_path / "b.jsonl")) == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_does_not_end_the_run():
    history = Diagnostics()
    with pytest.raises(OSError, match="No space"):
        history.to_jsonl("/dev/full")
    history = Diagnostics()
    history.to_jsonl(os.devnull)
    history._writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    history.append(**steps(1)[0])
    with pytest.warns(RuntimeWarning, match="no longer written to .*No space"):
        history.flush()
    fill(history, steps(3)[1:])
    assert len(history) == 3


@pytest.mark.parametrize("to_file", [False, True])
def test_append_is_cheap(tmp_path, to_file):
    history, row = Diagnostics(), steps(1)[0]
    if to_file:
        history.to_jsonl(tmp_path / "run.jsonl")
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            history.append(**row)
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < (150e-6 if to_file else 15e-6)
