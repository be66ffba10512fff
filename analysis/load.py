"""Records on disk -> one flat table for pandas. A record that can't be used is listed with the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.paper import COLUMNS
from hm.errors import UserError

SCHEMA = 1
_MEASURED = (*COLUMNS, "ppl_start", "bits_per_byte")
_PERPLEXITIES = ("ppl", "ppl_start")


def load_records(path: str | Path) -> pd.DataFrame:
    """Every usable `<path>/**/record.json` as one row, in the order of their paths.

    Columns: study, cell, key, row (None where the record has none), path (of the file, relative to `path`),
    and what lies deeper under dotted names: settings.mixer, settings.stage2.lr, metrics.ppl.value,
    metrics.ppl.stderr, params.total, tokens.stage1, timing.*, provenance.git_commit. Units are the record's:
    accuracies in percent, tokens and parameters as counts, times in seconds. What is missing is NaN or None.
    The column curves, of the losses while training, holds an object: {"stage1", "student"} -> name -> list.

    `frame.attrs["problems"]` lists (file relative to `path`, reason) for each record that was left out:
    unreadable, truncated, of another schema, unfinished, or with a number that isn't finite. If none is
    usable the frame is empty. `frame.attrs["root"]` is `path`: a run's losses.json lies beside its record.

    Raises:
        UserError: if `path` is no folder, or holds no record.json at all.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"runs={path} is no folder; name the one that `python sweep.py` wrote to.")
    rows, problems = [], []
    for file, error in _find(root):
        name = file.relative_to(root).as_posix().encode("utf-8", "replace").decode()
        try:
            if error is not None:
                raise error
            rows.append({**_flat(_checked(file)), "path": name})
        except OSError as failed:
            problems.append((name, f"can't be read: {failed.strerror or failed}"))
        except RecursionError:
            problems.append((name, "is nested too deeply to be a record"))
        except ValueError as failed:
            problems.append((name, str(failed)))
    if not rows and not problems:
        raise UserError(f"runs={path} holds no record.json; run `python sweep.py` or name another folder.")
    frame = pd.DataFrame(rows)
    frame.attrs["problems"] = problems
    frame.attrs["root"] = str(root)
    return frame


def _find(root: Path) -> Iterator[tuple[Path, OSError | None]]:
    """The record files in order, and the folders that can't be read. Below a record there is no other."""
    unreadable: list[OSError] = []
    found: list[tuple[Path, OSError | None]] = []
    for folder, folders, files in os.walk(root, onerror=unreadable.append):
        if "record.json" in files:
            found.append((Path(folder, "record.json"), None))
            folders.clear()
        elif Path(folder) == root and "artifacts" in folders:
            folders.remove("artifacts")
    found += [(Path(error.filename), error) for error in unreadable]
    yield from sorted(found, key=lambda pair: pair[0].as_posix())


def _checked(file: Path) -> dict[str, Any]:
    """The record in `file`. Raises ValueError with what is wrong with it."""
    text = file.read_bytes()
    if not text.strip():
        raise ValueError("is empty")
    try:
        record = json.loads(text.decode(), parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"is truncated or no JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is no text: {error.reason} at byte {error.start}") from None
    if not isinstance(record, dict):
        raise ValueError(f"holds a {type(record).__name__} where a record (an object) was expected")
    schema = record.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise ValueError(f"has schema {schema!r}, and this version reads schema {SCHEMA}")
    if record.get("status", "done") != "done":
        raise ValueError(f"has status {record['status']!r}, not 'done'")
    for name in ("study", "cell", "key"):
        if not isinstance(record.get(name), str) or not record[name]:
            raise ValueError(f"has no {name}")
    for name in ("settings", "metrics", "params", "tokens", "timing", "provenance"):
        if not isinstance(record.get(name, None if name in ("settings", "metrics") else {}), dict):
            raise ValueError(f"has no {name}, or not as an object")
    if not isinstance(record.get("row"), str | None):
        raise ValueError(f"has row {record['row']!r}, which is no text")
    for name in _MEASURED:
        measured = record["metrics"].get(name, {})
        if not isinstance(measured, dict):
            raise ValueError(f"has metrics.{name} = {measured!r} where {{value, stderr}} was expected")
        for part in ("value", "stderr"):
            _check_number(f"metrics.{name}.{part}", measured.get(part))
    for name in _PERPLEXITIES:
        if (value := record["metrics"].get(name, {}).get("value")) is not None and value < 1:
            raise ValueError(f"has metrics.{name}.value = {value}, and no perplexity is below 1")
    for group, names in (("params", ("total", "new", "trainable")), ("tokens", ("stage1", "stage2"))):
        for name in names:
            _check_number(f"{group}.{name}", record.get(group, {}).get(name))
    _check_curves(record.get("curves", {}))
    return record


def _check_curves(curves: Any) -> None:
    if not isinstance(curves, dict):
        raise ValueError("has curves that are no object")
    for step, columns in curves.items():
        if not isinstance(columns, dict) or not all(isinstance(column, list) for column in columns.values()):
            raise ValueError(f"has curves.{step} where columns were expected")
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError(f"has columns of different lengths in curves.{step}")
        for name, column in columns.items():
            if not {type(value) for value in column} <= {int, float} or not all(abs(value) < 1 << 63 for value in column):
                raise ValueError(f"has curves.{step}.{name} with what is no finite number")


def _check_number(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"has {name} = {value!r}, which is no number")


def _refuse(constant: str) -> None:
    raise ValueError(f"holds {constant}, which is no finite number")


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}. Raises ValueError for a number that isn't finite."""
    flat: dict[str, Any] = {"study": None, "cell": None, "key": None, "row": None}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict) and name != "curves":
            for key, inner in value.items():
                add(f"{name}.{_clean(key)}" if name else _clean(key), inner)
        else:
            flat[name] = value if name == "curves" else _value(name, value)

    add("", record)
    return flat


def _value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_value(name, item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _value(f"{name}.{_clean(key)}", inner) for key, inner in value.items()}
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, int | float) and not abs(value) < 1 << 63:
        raise ValueError(f"has {name} = {str(value)[:20]}, which is not finite")
    return value


def _clean(text: str) -> str:
    """`text` without lone surrogates, which JSON can carry and no file can be written with."""
    return text.encode("utf-8", "replace").decode()
