"""The records of a study as one flat file for pandas users (Parquet, CSV), and kept beside its tables."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd

from analysis.command import folder_name, write_file
from analysis.formats import csv_text


def write_flat(frame: pd.DataFrame, study: str, out: str | Path) -> list[Path]:
    """<out>/<study>/records.{parquet,csv}: a row for each cell, with every setting and metric under its dotted name.

    Without the curves, and without the path, so that the bytes don't depend on where the records lie. Lists are JSON text, as are
    columns whose values are of several kinds. In CSV, a text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    own = frame[frame["study"] == study].drop(columns=["path", "curves"], errors="ignore").dropna(axis="columns", how="all")
    flat = pd.DataFrame({name: _plain(own[name]) for name in sorted(own.columns)}).reset_index(drop=True)
    flat.attrs = {}
    columns = [c for c in ("study", "cell", "row", "key") if c in flat]
    flat = flat[[*columns, *[c for c in flat.columns if c not in columns]]]
    parquet = io.BytesIO()
    flat.to_parquet(parquet, index=False)
    text = flat.apply(lambda column: column.map(lambda v: csv_text(v) if isinstance(v, str) else v))
    text.columns = [csv_text(c) for c in text.columns]
    folder = Path(out) / folder_name(study)
    return [write_file(folder / "records.parquet", parquet.getvalue(), out),
            write_file(folder / "records.csv", text.to_csv(index=False, lineterminator="\n").encode(), out)]


def _plain(column: pd.Series) -> pd.Series:
    """The column with one type: as it is, or as text where lists or several types are in it."""
    values = column.dropna()
    kinds = {type(v) for v in values}
    if len(kinds) <= 1 and not kinds & {list, dict}:
        return column.convert_dtypes()
    if kinds <= {int, float}:
        return column.astype(float)
    return column.map(lambda v: v if isinstance(v, str) else json.dumps(v), na_action="ignore").astype("string")


def keep_records(runs: str | Path, frame: pd.DataFrame, study: str, out: str | Path) -> None:
    """Copy a study's records to <out>/<study>/records/, so that its numbers stay with its tables.

    With each goes its losses.json (per validation sequence), where there is one. Records that already lie below `out` are
    left where they are.
    """
    for name in frame.loc[frame["study"] == study, "path"]:
        source = (Path(runs) / name).parent
        if source.resolve().is_relative_to(Path(out).resolve()):
            continue
        folder = Path(out) / folder_name(study) / "records" / source.name
        write_file(folder / "record.json", (source / "record.json").read_bytes(), out)
        if (source / "losses.json").is_file():
            write_file(folder / "losses.json", (source / "losses.json").read_bytes(), out)
