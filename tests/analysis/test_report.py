"""The page, in a real browser: what it shows, sorts, filters, links to and reloads; and that it needs nothing but itself."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pytest

from analysis.report import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def store(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    made.store(root / "runs", seeds=(0, 1, 2))
    made.store(root / "runs", seeds=(0,), teachers=(("tiny", 7_000_000),))
    made.bench(root / "results/bench")
    return root


@pytest.fixture(scope="module")
def page(store):
    assert main(["--runs", str(store / "runs"), "--out", str(store / "results")]) == 0
    return store / "results/report.html"


def column(browser, table, index):
    return browser.js(f"[...document.querySelectorAll('.card.table')[{table}].querySelectorAll('tbody tr')].filter((r) => !r.hidden)"
                      f".map((r) => r.children[{index}].textContent)")


def numbers(texts):
    return [float(re.match(r"[-\d.]+", text).group()) for text in texts if text != "–"]


def table_index(browser, name):
    return browser.texts(".card.table h3").index(name)


def test_it_opens_from_disk_without_a_complaint_or_a_request_and_has_all_its_parts(browser, page):
    browser.open(page)
    assert browser.texts("#claims .id") == [f"C{i}" for i in range(1, 9)]
    assert browser.js("document.querySelectorAll('.card.table').length") >= 6
    assert any(name.startswith("speed") for name in browser.texts(".card.table h3"))
    browser.js("document.querySelectorAll('.card.plot').forEach((c) => draw(c))")
    assert browser.js("document.querySelectorAll('.plot .main-svg').length") >= 10
    assert browser.js("scrollTo(0, document.body.scrollHeight); records.length") == len(list(page.parents[1].glob("runs/*/*/record.json")))
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(("data:", "blob:"))] == [page.as_uri()]


def test_the_list_of_records_says_what_else_each_measured(browser, page):
    browser.open(page)
    heads = browser.texts("#record-list thead th")
    cells = browser.texts("#record-list tbody tr:first-child > *")
    assert {"needle", "recall", "winogrande"} < set(cells[heads.index("also measured")].split(", "))


def test_a_click_on_a_header_sorts_by_number_and_a_second_one_turns_it_round(browser, page):
    browser.open(page)
    split = table_index(browser, "split (smollm2)")
    header = f"document.querySelectorAll('.card.table')[{split}].querySelectorAll('thead button')[1]"
    before = numbers(column(browser, split, 1))
    browser.js(f"{header}.click()")
    assert numbers(column(browser, split, 1)) == sorted(before) != before
    browser.js(f"{header}.focus()")
    browser.press("Enter")
    assert numbers(column(browser, split, 1)) == sorted(before, reverse=True)
    assert browser.js(f"{header}.parentNode.getAttribute('aria-sort')") == "descending"


def test_missing_values_stay_last_whichever_way(browser, page):
    browser.open(page)
    main_table = table_index(browser, "main (smollm2)")
    headers = f"[...document.querySelectorAll('.card.table')[{main_table}].querySelectorAll('thead button')]"
    index = browser.js(f"{headers}.findIndex((b) => b.textContent.startsWith('start'))")
    for _ in range(2):
        browser.js(f"{headers}[{index}].click()")
        texts = column(browser, main_table, index)
        assert "–" in texts
        assert texts == [t for t in texts if t != "–"] + ["–"] * texts.count("–")


def choose(browser, name, value):
    browser.js(f"(() => {{ const e = document.getElementById('f-{name}'); e.value = {value!r};"
               "e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input')); })()")


def test_filters_leave_what_fits_and_clear_brings_all_back(browser, page):
    browser.open(page)
    everything = browser.texts(".card.table h3")
    choose(browser, "study", "mixer")
    assert browser.texts(".card.table h3") == ["mixer (smollm2)", "mixer (tiny)"]
    choose(browser, "teacher", "tiny")
    assert browser.texts(".card.table h3") == ["mixer (tiny)"]
    choose(browser, "mixer", "gate")
    assert browser.texts(".card.table tbody th") == ["+gate"]
    choose(browser, "text", "no such thing")
    assert browser.texts(".card.table h3") == []
    assert "No row fits" in "".join(browser.texts("#none"))
    browser.js("document.getElementById('f-clear').click()")
    assert browser.texts(".card.table h3") == everything


def test_every_number_of_ours_opens_its_records_with_file_and_command(browser, page):
    browser.open(page)
    unlinked = browser.js("[...document.querySelectorAll('.card.table tbody td:not(.paper)')].filter((c) => c.textContent !== '–'"
                          " && !c.querySelector('a') && !c.closest('.card').table.name.startsWith('speed')).map((c) => c.textContent)")
    assert unlinked == []
    index = table_index(browser, "main (smollm2)")
    browser.js(f"[...document.querySelectorAll('.card.table')[{index}].querySelectorAll('tbody tr')]"
               ".find((r) => r.textContent.startsWith('hedgemamba')).querySelector('a').click()")
    assert browser.js("document.getElementById('detail').open")
    assert browser.texts("#detail h2") == ["The 3 records behind this number"]
    files = browser.js("[...document.querySelectorAll('#detail a.file')].map((a) => a.href)")
    found = [json.loads(Path(unquote(url.removeprefix("file://"))).read_text()) for url in files]
    assert [(r["row"], r["settings"]["seed"]) for r in found] == [("hedgemamba", s) for s in range(3)]
    commands = browser.texts("#detail code")
    assert commands == [r["provenance"]["command"] for r in found]
    browser.js("document.querySelector('#detail .command button').click(); new Promise((r) => setTimeout(r, 200))")
    assert browser.texts("#detail .command button")[0] == "Copied"
    assert browser.js("navigator.clipboard.readText()") == commands[0]
    browser.press("Escape")
    assert not browser.js("document.getElementById('detail').open")
    assert browser.js("location.hash") == ""


def test_bars_of_several_models_stand_side_by_side_also_of_one_task(browser, page):
    browser.open(page)
    bar = '{kind: "bar", label: "%s", x: ["%s"], y: [1]}'
    for first, second, mode in (("ARC-E", "ARC-E", "group"), ("a", "b", "overlay")):  # one task of two models; two mixers, each named below its bar
        plot = f'{{x_label: "", y_label: "", series: [{bar % ("a", first)}, {bar % ("b", second)}]}}'
        assert browser.js(f"layout({plot}).barmode") == mode


def test_a_verdict_shows_its_rule_evidence_and_the_run_that_would_decide_it(browser, page):
    browser.open(page)
    browser.js("document.querySelector('#C7 details').open = true")
    shown = " ".join(browser.texts("#C7"))
    for part in ("undecided", "Rule, fixed before", "C2 reproduced", "python sweep.py -m +study=main"):
        assert part in shown


def test_the_mouse_over_a_point_shows_its_numbers_and_a_click_its_record(browser, page):
    browser.open(page, height=1400)
    browser.js("document.querySelectorAll('.card.plot')[0].scrollIntoView({behavior: 'instant', block: 'center'});"
               "draw(document.querySelectorAll('.card.plot')[0]); new Promise((r) => setTimeout(r, 300))")
    box = browser.js("(() => { const p = document.querySelector('.card.plot .points path').getBoundingClientRect(); return [p.x + p.width / 2, p.y + p.height / 2]; })()")
    browser.point(*box)
    browser.js("new Promise((r) => setTimeout(r, 300))")
    hover = "".join(browser.texts(".card.plot .hovertext"))
    assert re.search(r"hedgemamba 10/90: ppl \d+\.\d\d.*gap [\d.]+%", hover), hover
    for kind in ("mousePressed", "mouseReleased"):
        browser("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
    browser.js("new Promise((r) => setTimeout(r, 300))")
    assert browser.js("document.getElementById('detail').open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_systems_scheme_and_the_button_turns_it(browser, page, scheme):
    browser.open(page, scheme=scheme)
    browser.js("sessionStorage.clear()")
    browser.open(page, scheme=scheme)
    assert browser.js("document.documentElement.dataset.theme") == scheme
    before = browser.js("getComputedStyle(document.body).backgroundColor")
    browser.js("document.getElementById('theme').click()")
    assert browser.js("getComputedStyle(document.body).backgroundColor") != before
    browser.js("sessionStorage.clear()")


def test_on_a_phone_only_the_tables_scroll_sideways(browser, page):
    browser.open(page, width=390, height=800)
    assert browser.js("document.documentElement.scrollWidth") <= 390
    assert browser.js("[...document.querySelectorAll('.scroll')].some((e) => e.scrollWidth > e.clientWidth)")


def test_hostile_names_are_seen_and_not_obeyed(browser, runs, nasty, tmp_path):
    title = f"</script><img src=x onerror=alert(1)>{nasty}"
    runs.teacher("main")
    runs.add("main", title, data=nasty, cell="<i>", record={"provenance": {"command": title}})
    runs.add(title, "hedgemamba")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/record.json").write_text("<b>{")
    assert main(["--runs", str(runs.root), "--out", str(tmp_path / "out")]) == 0
    browser.open(tmp_path / "out/report.html")
    browser.js("document.querySelectorAll('.card.plot').forEach((c) => draw(c)); document.querySelector('td a').click()")
    assert browser.complaints() == []
    assert browser.js("document.querySelectorAll('img, i, b').length") == 0
    assert any(title in text for text in browser.texts("th[scope=row]"))
    assert "cut/record.json" in "".join(browser.texts("#problems li"))


def test_a_running_sweep_is_shown_and_the_page_loads_itself_again_with_the_filter_kept(browser, made, tmp_path):
    runs = tmp_path / "runs"
    made.store(runs, seeds=(0,), limit=3)
    (runs / "main/hedgemamba-s0-abc").mkdir(parents=True)
    (runs / "main/hedgemamba-s0-abc/config.yaml").write_text("")
    work = runs / "artifacts/student/.abc.work-1"
    work.mkdir(parents=True)
    (work / "metrics.jsonl").write_text('{"step": 9, "tokens": 1000, "loss": 3.25}\n')
    command = [sys.executable, str(ROOT / "analysis/report.py"), "--runs", str(runs), "--out", str(tmp_path / "out"), "--watch", "1"]
    watching = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert "wrote" in watching.stderr.readline()
        browser.open(tmp_path / "out/report.html")
        shown = "".join(browser.texts("#state"))
        for part in ("3 cells done, 1 begun", "student abc", "3.25", "main/hedgemamba-s0-abc"):
            assert part in shown
        choose(browser, "study", "main")
        first = browser.js("performance.timeOrigin")
        made.write(runs, "main", "hedgemamba", "two_stage", "hedgemamba", 10, 20_000_000, 1)
        deadline = time.monotonic() + 15
        while browser.js("document.readyState !== 'complete' || !window.records || records.length < 4"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert browser.js("performance.timeOrigin") > first
        assert browser.js("document.getElementById('f-study').value") == "main"
        made.write(runs, "main", "hedgemamba", "two_stage", "hedgemamba", 10, 20_000_000, 2).rename(runs / "main/kept")
        (runs / "main/hedgemamba-s0-abc/config.yaml").unlink()
        assert watching.wait(15) == 0
    finally:
        watching.kill()
        watching.wait()
        watching.stderr.close()
        browser("Page.navigate", url="about:blank")


def test_the_same_records_give_the_same_page(store, page):
    before = (page.read_bytes(), page.stat().st_mtime_ns)
    assert main(["--runs", str(store / "runs"), "--out", str(store / "results")]) == 0
    assert (page.read_bytes(), page.stat().st_mtime_ns) == before


def test_no_records_are_answered_with_one_sentence(tmp_path, capsys):
    assert main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_thousand_records_take_under_five_seconds_and_ten_megabytes(made, tmp_path):
    made.store(tmp_path / "runs", seeds=tuple(range(12)), budgets=tuple(1_000_000 * n for n in (1, 2, 5, 10, 20, 50, 100)), limit=2000)
    start = time.process_time()
    assert main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert time.process_time() - start < 8  # about 3 on an idle core
    assert (tmp_path / "out/report.html").stat().st_size < 10e6
