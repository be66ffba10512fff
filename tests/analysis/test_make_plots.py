"""The plots' data against the records, and the files that are drawn from them."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from analysis import paper
from analysis.bench import load_bench
from analysis.load import load_records
from analysis.make_plots import COLOURS, draw, main
from analysis.plots import all_plots, speed_plots
from analysis.rows import records_of


@pytest.fixture(scope="module")
def store(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("plots")
    made.store(root / "runs", seeds=(0, 1))
    made.bench(root / "results/bench")
    return root


@pytest.fixture(scope="module")
def plots(store):
    return all_plots(records_of(load_records(store / "runs")))[0]


def named(plots, name):
    return next(p for p in plots if p.name == name)


def line(plot, label):
    return next(s for s in plot.series if s.label.startswith(label))


def test_every_plot_of_the_study_is_made_from_a_full_store(plots, store):
    assert {p.name for p in plots} == {"budget", "split", "mixer", "loss", "stage1_cosine", "downstream", "position", "recall", "needle", "decay"}
    speed, missing = speed_plots(load_bench(store / "results/bench")[0])
    assert ({p.name for p in speed}, missing) == ({"decoding", "decoding_memory", "prefill"}, [])
    assert "batch 256, 131.1k: out of memory" in speed[0].note


def test_the_gap_is_to_the_teacher_with_the_spread_of_the_seeds(plots, store):
    records = [json.loads(f.read_text()) for f in store.glob("runs/budget/*/record.json")]
    curve = line(named(plots, "budget"), "hedgemamba 10/90")
    assert curve.x == [2e6, 4e6, 6e6, 2e7]
    teacher = next(r["metrics"]["ppl"]["value"] for r in records if r["row"] == "teacher")
    ours = [r["metrics"]["ppl"]["value"] for r in records if r["row"] == "2B"]
    assert len(ours) == 2
    assert curve.y[1] == pytest.approx(100 * (np.mean(ours) / teacher - 1))
    assert curve.error[1] == pytest.approx(100 * np.std(ours, ddof=1) / teacher)


def test_the_papers_curve_is_its_own_gap_and_is_drawn_in_its_own_style(plots):
    published = line(named(plots, "budget"), "paper")
    assert published.y == pytest.approx([100 * (row["ppl"] / 13.86 - 1) for row in paper.TABLES["budget"].rows.values()])
    assert (published.x[0], published.colour, published.dash) == (1e9, "paper", "dash")


def test_a_power_law_is_found_again_with_an_interval_around_it(runs):
    runs.teacher("budget", 20.0)
    for i, (budget, noise) in enumerate(((100, 0.01), (200, -0.01), (400, 0.01), (800, -0.01))):
        gap = 3.0 * budget**-0.5 * (1 + noise)
        runs.add("budget", str(i), 20.0 * (1 + gap), one=budget // 10, two=budget - budget // 10)
    plot = named(all_plots(records_of(load_records(runs.root)))[0], "budget")
    exponent = float(line(plot, "fit").label.split()[-1])
    assert exponent == pytest.approx(-0.5, abs=0.02)
    band, fit = line(plot, "95%"), line(plot, "fit")
    assert all(low < y < high for low, y, high in zip(band.y, fit.y, band.top, strict=True))
    x, y = np.log([100, 200, 400, 800]), np.log(line(plot, "hedgemamba").y)
    slope, start = np.polyfit(x, y, 1)
    assert fit.y[0] == pytest.approx(math.exp(start + slope * x[0]))


def test_two_budgets_have_a_line_but_no_fit(runs):
    runs.teacher("budget", 20.0)
    for budget in (100, 200):
        runs.add("budget", str(budget), 30.0 - budget / 100, one=budget // 10, two=budget - budget // 10)
    assert not any("fit" in s.label for s in named(all_plots(records_of(load_records(runs.root)))[0], "budget").series)


def test_a_mixer_has_one_colour_in_all_plots_and_no_two_share_one(plots):
    for plot in plots:
        for series in plot.series:
            mixer = series.label.split()[0].split(",")[0]
            if mixer in COLOURS:
                assert series.colour == mixer
    mixers = [COLOURS[m] for m in ("teacher", "hedgehog", "ssm", "ssm_conv", "hedgemamba", "gate", "one_step")]
    assert len(set(mixers)) == len(mixers)


def test_stage_1s_cosine_is_one_minus_the_logged_loss_of_each_layer(plots, store):
    x, y, z = named(plots, "stage1_cosine").heat
    record = next(f for f in store.glob("runs/main/hedgemamba*/record.json"))
    curve = json.loads(record.read_text())["curves"]["stage1"]
    assert (x, y) == (curve["tokens"], list(range(12)))
    assert [row[0] for row in z] == pytest.approx([1 - curve[f"layer.{i}"][0] for i in range(12)])


def test_the_decay_is_the_median_and_the_range_over_heads(plots):
    plot = named(plots, "decay")
    band = next(s for s in plot.series if s.kind == "band")
    median = next(s for s in plot.series if s.kind == "line")
    assert (band.y[2], median.y[2], band.top[2]) == pytest.approx((0.003, 0.03, 0.3))


def test_recall_is_at_the_longest_length_beside_chance(plots):
    plot = named(plots, "recall")
    assert (line(plot, "teacher").x, line(plot, "teacher").y) == ([4, 16, 64], [pytest.approx(90.0 - 10.24)] * 3)
    assert line(plot, "by chance").y == [25.0, 6.25, 1.5625]
    assert line(named(plots, "needle"), "hedgemamba").y == [50.0, 50.0]  # at 1024 and 4096, the mean over depths


def test_what_can_not_be_drawn_is_said_in_a_line_each_and_the_rest_is_drawn(runs, tmp_path, capsys):
    runs.teacher("lab")
    runs.add("lab", one=10)
    runs.add("lab", one=50, two=50)
    assert main(["--runs", str(runs.root), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    for name in ("budget", "mixer", "loss", "stage1_cosine", "downstream", "position", "recall", "decay"):
        assert re.search(rf"^lab: {name}: not drawn, needs .+$", said, re.M)
    assert "decoding: not drawn, needs" in said
    assert sorted(p.name for p in (tmp_path / "out/lab/plots").iterdir()) == ["split.pdf", "split.png", "split.svg"]


def test_the_same_records_give_the_same_bytes_in_all_formats_with_fonts_embedded(runs, tmp_path):
    runs.teacher("split")
    for one in (10, 50, 90):
        runs.add("split", one=one, two=100 - one)
    arguments = ["--runs", str(runs.root), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    files = sorted((tmp_path / "out/split/plots").iterdir())
    first = [f.read_bytes() for f in files]
    shutil.rmtree(tmp_path / "out")
    assert main(arguments) == 0
    assert [f.read_bytes() for f in files] == first
    pdf, _, svg = first
    assert b"/FontFile2" in pdf
    assert b"<text" not in svg


@pytest.mark.filterwarnings("error")
def test_a_single_point_is_drawn(runs, tmp_path):
    runs.add("lab", metrics={"ppl_by_position": {"positions": [256], "ppl": [91.8], "stderr": [2.0]},
                             "recall": [{"pairs": 4, "length": 64, "accuracy": 0.0}], "needle": [{"length": 64, "depth": 0.5, "accuracy": 0.0}]})
    plots = {p.name: p for p in all_plots(records_of(load_records(runs.root)))[0]}
    assert draw(plots["position"]).axes[0].get_xlim() == (128, 512)
    assert draw(plots["needle"]).axes[0].get_ylim() == (0, 1)
    draw(plots["recall"])


def test_names_with_mathematics_are_drawn_as_they_are(runs, nasty):
    runs.teacher("lab", teacher=nasty, scale=nasty)
    runs.add("lab", one=10, teacher=nasty, scale=nasty)
    runs.add("lab", one=50, two=50, teacher=nasty, scale=nasty)
    [plot] = all_plots(records_of(load_records(runs.root)))[0]
    draw(plot).savefig("/dev/null", format="svg")


def test_long_labels_and_titles_stay_within_the_figure(plots):
    long = "hedgemamba 50/50 (feature_map.per_head=False, stage2.kl_weight=0.5, stage2.loss=ce+kl, stage2.lr=0.0003, ssm_init=decay)"
    for plot in (named(plots, "loss"), named(plots, "downstream"), named(plots, "stage1_cosine")):
        changed = replace(plot, place=f"smollm2, 20M tokens, {long}", series=[replace(s, label=f"{i} {long}") for i, s in enumerate(plot.series)])
        figure = draw(changed)
        drawn = figure.get_tightbbox(figure.canvas.get_renderer())
        width, height = figure.get_size_inches()
        assert -0.02 <= drawn.x0 <= drawn.x1 <= width + 0.02
        assert -0.02 <= drawn.y0 <= drawn.y1 <= height + 0.02
        assert figure.axes[0].get_position().width > 0.5


def test_another_loss_of_stage_1_is_not_drawn_as_a_cosine(runs):
    runs.teacher("recipes")
    curves = {"stage1": {"step": [0, 1], "tokens": [0, 10], "loss": [0.5, 0.4], "layer.0": [0.5, 0.4]}}
    runs.add("recipes", "aligned", 30.0, stage1={"loss": "mse"}, record={"curves": curves})
    assert "stage1_cosine" not in {p.name for p in all_plots(records_of(load_records(runs.root)))[0]}
    runs.add("recipes", "paper", 40.0, record={"curves": curves})
    assert named(all_plots(records_of(load_records(runs.root)))[0], "stage1_cosine").heat[2] == [[0.5, 0.6]]


def test_recipes_are_drawn_against_the_adapted_teacher_of_another_study(runs, tmp_path):
    runs.add("main", "adapted_teacher", 16.0, recipe="adapted_teacher")
    runs.add("recipes", "paper", 40.0)
    runs.add("recipes", "aligned", 24.0, stage1={"loss": "mse"})
    assert main(["--runs", str(runs.root), "--out", str(tmp_path), "--study", "recipes"]) == 0
    assert (tmp_path / "recipes/plots/recipes.pdf").is_file()
    (series,) = named(all_plots(records_of(load_records(runs.root)))[0], "recipes").series
    assert series.y == pytest.approx([math.log(40 / 16), math.log(24 / 16)])


def test_a_line_joins_cells_of_the_same_settings_though_others_are_better(runs):
    runs.teacher("split")
    for one, tuned, ours in ((10, 30.0, None), (50, 32.0, 25.0), (90, 40.0, None), (75, None, 26.0)):
        for ppl, stage1 in ((tuned, {"loss": "cosine"}), (ours, {"loss": "mse"})):
            if ppl:
                runs.add("split", one=one, two=100 - one, ppl=ppl, stage1=stage1)
    runs.add("mixer", mixer="hedgehog", one=50, two=50, ppl=35.0, stage1={"loss": "cosine"})
    made = all_plots(records_of(load_records(runs.root)))[0]
    curve = line(named(made, "split"), "hedgemamba")
    assert curve.x == [10, 50, 90]
    assert curve.y == pytest.approx([50, 60, 100])
    assert [s.y[0] for s in named(made, "mixer").series[:2]] == pytest.approx([75, 60])


def test_a_mixer_that_the_paper_does_not_have_is_drawn_too(runs):
    runs.teacher("mixer")
    for mixer, ppl in (("hedgehog", 30.0), ("retention", 26.0)):
        for one in (10, 50):
            runs.add("mixer", f"{mixer} {one}", ppl, mixer=mixer, one=one, two=100 - one)
    made = all_plots(records_of(load_records(runs.root)))[0]
    assert [s.label for s in named(made, "mixer").series[:2]] == ["hedgehog", "retention"]
    assert line(named(made, "split"), "retention").x == [10, 50]
