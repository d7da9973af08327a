"""Files that are whole or not there: atomic writes, tensors, csv tables, the cache."""
import contextlib
import csv
import hashlib
import io
import json
import os
import uuid
from pathlib import Path

import torch

from common import terminal


class NotSaved(RuntimeError):
    """A run could not write to its folder; what was saved before is intact. Exit code 1."""


@contextlib.contextmanager
def writing(what):
    """Turn a full disk or a vanished folder into NotSaved, which names what was being written."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or e
        raise NotSaved(
            f"could not write {what}: {reason}; the last good checkpoint is as it was"
        ) from e


def write_atomic(path, data):
    """Bytes to path by way of a file beside it: a reader sees the old or the new, whole."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def save_tensors(path, values):
    """torch.save, atomic. It goes through memory, so that a failed write is an OSError."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path):
    """torch.load of tensors and plain containers onto the CPU; ValueError names file and reason."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except Exception as e:  # zip, pickle and tensor errors come in many types
        raise ValueError(
            f"{path} cannot be loaded, it may be cut short or damaged: {first_line(e)}"
        ) from None


def first_line(e):
    """What an exception says, or its type where it says nothing: one line, and the next after a :"""
    lines = [line.strip() for line in str(e).strip().splitlines()] or [type(e).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])


# ---- tables ----------------------------------------------------------------------------------


class Table:
    """A csv file that grows by rows; a column that comes later is empty in the rows before."""

    def __init__(self, path, last_step=0, writes=True):
        """Take over the rows up to last_step and cut the file back to them.

        writes: of several processes one writes."""
        self.path, self.writes = Path(path), writes
        self.rows = [r for r in read_csv(self.path) if int(r["step"]) <= last_step]
        if self.path.exists():
            self._write_all()

    def add(self, row):
        self.rows.append({k: str(v) for k, v in row.items()})
        if len(self.rows) == 1 or row.keys() - self.rows[0].keys():
            self._write_all()
        elif self.writes:
            with writing(self.path), open(self.path, "a", newline="", encoding="utf-8") as f:
                csv.DictWriter(f, list(self.rows[0])).writerow(row)

    def _write_all(self):
        names = dict.fromkeys(name for row in self.rows for name in row)
        self.rows = [dict.fromkeys(names, "") | row for row in self.rows]
        if not self.writes:
            return
        with writing(self.path):
            if not self.rows:
                self.path.unlink(missing_ok=True)
                return
            text = io.StringIO(newline="")
            table = csv.DictWriter(text, list(names))
            table.writeheader()
            table.writerows(self.rows)
            write_atomic(self.path, text.getvalue().encode())


def read_csv(path, counter="step"):
    """Rows of a csv file as dicts of strings; half a last row, left by a kill, is dropped.

    counter: a column in which every row has a whole number, or the file is another.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets put a mark before it
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.DictReader(io.StringIO(whole)))
        if any(None in row or int(row[counter]) < 0 for row in rows):
            raise ValueError("more cells than columns, or no steps")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):  # saved by a spreadsheet with ; in place of ,
        raise ValueError(
            f"{path} has another form than it was given: wanted commas and a column {counter} of "
            "whole numbers; put that right or delete the file"
        ) from None
    return rows


def as_number(text):
    """The number in a cell of a table; other text as it is."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


# ---- the cache -------------------------------------------------------------------------------


def cached(cache_dir, kind, key, make, version=1):
    """make(), a dict of tensors, strings and numbers, or what an earlier call with this key kept.

    key: a JSON value of all that determines the result; version: raised when make changes. What
    cannot be read is made again. Where cache_dir cannot be written, this goes on without.
    """
    text = json.dumps([version, key], sort_keys=True)
    path = Path(cache_dir) / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"
    with contextlib.suppress(ValueError):  # absent or damaged
        kept = load_tensors(path)
        if isinstance(kept, dict) and kept.get("key") == text:
            return kept["value"]
    value = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"key": text, "value": value})
    except OSError as e:
        terminal.warn(f"nothing is kept in {cache_dir}: {first_line(e)}")
    return value
