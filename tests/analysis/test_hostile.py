"""A store full of damaged and odd records: every command lists what it can't use and makes the rest."""

import json

import pytest

from analysis import claims, make_tables, report
from analysis.load import load_records
from analysis.make_plots import draw
from analysis.plots import all_plots
from analysis.rows import records_of

ODD = ["x", "", [1, "a", None], {"a": 1}, None, True, -1, 0, 1e308, 0.5, "=1+1", "<b>", "$x$\\end{table}"]
PLACES = ["settings.budget", "settings.seed", "settings.stage1_tokens", "settings.teacher", "settings.eval", "settings.recipe", "settings.mixer",
          "settings.keep_attention", "metrics.ppl_by_position", "metrics.diagnostics", "metrics.recall", "metrics.ppl_at_length", "metrics.ppl_at_length.ppl", "metrics.diagnostics.without", "metrics.needle", "metrics.agreement", "metrics.agreement.top1.value", "params.by_part", "timing.stage1_seconds", "timing.student_tokens_per_second",
          "peak_memory.student", "provenance.command", "provenance.device", "provenance.device_type", "provenance.processes", "provenance.processes.student", "provenance.artifacts", "provenance.started", "row", "curves", "curves.stage1", "curves.student.tokens", "curves.stage1.loss"]


def change(record, place, value):
    *groups, last = place.split(".")
    inner = record
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[last] = value
    return record


@pytest.fixture(scope="module")
def store(made, tmp_path_factory):
    """A good store with, in every study, a record for each odd value at each place."""
    runs = tmp_path_factory.mktemp("hostile") / "runs"
    made.store(runs, seeds=(0, 1))
    for i, place in enumerate(PLACES):
        for j, value in enumerate(ODD):
            study, row, mixer, percent = (("main", "hedgemamba", "hedgemamba", 10), ("budget", "1B", "hedgemamba", 10), ("split", "25/75", "hedgemamba", 25),
                                          ("mixer", "+ssm", "ssm", 50))[(i + j) % 4]
            folder = made.write(runs, study, row, "two_stage", mixer, percent, 20_000_000, 100 * i + j)
            record = json.loads((folder / "record.json").read_text())
            (folder / "record.json").write_text(json.dumps(change(record, place, value)))
            folder.rename(folder.with_name(f"odd-{i}-{j}"))
    for name, text in (("empty", ""), ("cut", '{"schema": 1, "st'), ("future", '{"schema": 99}'), ("nan", '{"schema": NaN}'), ("list", "[]")):
        (runs / "bad" / name).mkdir(parents=True)
        (runs / "bad" / name / "record.json").write_text(text)
    for i, text in enumerate(('{"loss": "x"}', "[", '{"loss": null}\n3\n{cut')):
        for folder in list((runs / "main").glob("hedge*"))[i :: 3]:
            (folder / "losses.json").write_text(text)
    return runs


@pytest.mark.parametrize("command", [make_tables, claims, report], ids=lambda module: module.__name__)
def test_the_commands_list_what_is_broken_and_make_the_rest(store, tmp_path, capsys, command):
    assert command.main(["--runs", str(store), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    for name, reason in (("empty", "is empty"), ("cut", "truncated"), ("future", "schema 99"), ("nan", "NaN"), ("list", "holds a list")):
        assert f"skipped bad/{name}/record.json: " in said
        assert reason in said


def test_plots_are_drawn_from_what_is_usable(store):
    plots, _ = all_plots(records_of(load_records(store)))
    first = {plot.name: plot for plot in plots}
    assert set(first) == {"budget", "split", "mixer", "loss", "stage1_cosine", "downstream", "position", "recall", "needle", "decay"}
    for plot in first.values():
        draw(plot)
