"""The page shows a comparison's numbers, needs no network, and takes no text from a store for code."""

import json
import re
import time
from dataclasses import replace

import pytest

from lenet_sweep.analysis import charts, figures, page
from lenet_sweep.analysis.comparison import compare
from lenet_sweep.analysis.selection import Selection
from lenet_sweep.storage.records import Record

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def runs(n_lr=2, seeds=3, epochs=3, **fields):
    return [
        Record(
            f"run{lr}-{seed}",
            "FINISHED",
            {"lr": str(0.1 * (lr + 1)), "epochs": str(epochs), "seed": str(seed), **fields},
            f"{lr}-{seed}",
            seconds=1.0 + lr,
            history={
                "test/acc": {e: 0.5 + 0.1 * lr + 0.01 * seed + 0.01 * e for e in range(1, epochs + 1)},
                "train/loss": {e: 1 / e + 0.1 * lr for e in range(1, epochs + 1)},
            },
        )
        for lr in range(n_lr)
        for seed in range(seeds)
    ]


def written(records, path, commands=()):
    found = compare(records, "test/acc")
    page.write(found, Selection("a sweep", tuple(records), tuple(commands)), path)
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


def test_curves_are_means_over_seeds_with_a_band_of_one_deviation(tmp_path):
    _, data = written(runs(), tmp_path / "r.html")
    (section,) = [s for s in data["sections"] if s["title"] == "Learning curves"]
    (chart,) = [c for c in section["charts"] if c["title"] == "test/acc"]
    band, line = [t for t in chart["traces"] if t["group"] == 0]
    assert line["y"] == pytest.approx([0.62, 0.63, 0.64])  # of lr=0.2, seeds 0 1 2
    assert line["customdata"] == pytest.approx([0.01] * 3)
    assert band["y"] == pytest.approx([0.63, 0.64, 0.65, 0.63, 0.62, 0.61])


def test_heatmap_is_lr_by_epochs_with_a_panel_for_each_other_choice():
    both = [
        Record(**{**vars(r), "params": {**r.params, "epochs": e, "model.pool": p}, "name": f"{r.name}{e}{p}",
                  "config_hash": f"{r.name}{e}{p}"})
        for r in runs() for e in ("5", "10") for p in ("avg", "max")
    ]  # fmt: skip
    first, second = charts.grids(compare(both, "test/acc"))
    assert (first.x_key, first.y_key, first.x, first.y) == ("lr", "epochs", ("0.1", "0.2"), ("5", "10"))
    assert {first.title, second.title} == {"model.pool=avg", "model.pool=max"}
    assert first.means[0] == pytest.approx((0.54, 0.64))
    assert first.counts == ((3, 3), (3, 3))


def test_text_from_the_store_stays_text(tmp_path):
    records = runs(**{"model.name": EVIL})
    records[0].params["data.name"] = EVIL
    failed = Record(EVIL, "FAILED", {"lr": EVIL, "seed": EVIL}, "x", reason=EVIL, commit=EVIL)
    text, data = written([*records, failed], tmp_path / "r.html", [EVIL])
    own = text.replace(page.get_plotlyjs(), "")
    assert "<img" not in own
    assert "<script>alert" not in own
    assert own.count("<script") == 3  # plotly.js, the data, the page's own
    assert "&lt;script&gt;alert(1)" in own
    for chart in (c for s in data["sections"] for c in s["charts"]):
        labels = json.dumps([chart["traces"], chart["layout"]]).replace("<extra></extra>", "")
        assert "<" not in labels  # plotly's labels know some HTML


def test_text_that_looks_like_a_placeholder_is_not_replaced(tmp_path):
    text, _ = written(runs(), tmp_path / "r.html", ["@@data@@"])
    assert "<pre>@@data@@</pre>" in text


def test_sweep_without_a_single_good_run_has_a_page_that_says_so(tmp_path):
    failed = [Record("a", "FAILED", {"lr": "1", "seed": "0"}, "x", reason="the loss became nan in epoch 1")]
    text, _ = written(failed, tmp_path / "r.html")
    assert "nothing to compare" in text
    assert "the loss became nan in epoch 1" in text


def test_page_of_three_runs_takes_less_than_a_second(tmp_path):
    start = time.perf_counter()
    written(runs(n_lr=1), tmp_path / "r.html")
    assert time.perf_counter() - start < 1


def test_page_of_a_thousand_runs_stays_readable_and_of_bounded_size(tmp_path):
    _, data = written(runs(n_lr=100, seeds=10), tmp_path / "r.html")
    assert sum(setting["on"] for setting in data["groups"]) == page.SHOWN
    assert (tmp_path / "r.html").stat().st_size < 8_000_000


def test_setting_without_a_time_has_no_point_among_the_costs(tmp_path):
    timed, untimed = runs(seeds=1)
    _, data = written([timed, replace(untimed, seconds=None)], tmp_path / "r.html")
    charts_by_title = {c["title"]: c for s in data["sections"] for c in s["charts"]}
    (trace,) = charts_by_title["test/acc and seconds"]["traces"]
    assert trace["x"] == [timed.seconds]


def test_figure_of_runs_without_metrics_is_empty(tmp_path):
    found = compare([replace(run, history={}, status="FAILED") for run in runs(seeds=1)], "test/acc")
    assert charts.curve_metrics(found) == []
    assert [path.name for path in figures.write(found, tmp_path)][:2] == ["curves.png", "curves.svg"]


def test_figures_are_the_same_bytes_for_the_same_numbers(tmp_path):
    found = compare(runs(**{"model.name": "$x$"}), "test/acc")
    first = [path.read_bytes() for path in figures.write(found, tmp_path / "a")]
    second = [path.read_bytes() for path in figures.write(found, tmp_path / "b")]
    assert first == second
    assert len(first) == 4


@pytest.mark.slow
@pytest.mark.browser
def test_page_asks_for_nothing_and_logs_nothing_in_a_browser(tmp_path, browser_page):
    evil = runs(**{"model.name": EVIL})
    evil[0].params["lr"] = EVIL
    written(evil, tmp_path / "r.html", [EVIL])
    asked, tab = browser_page
    heard = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("dialog", lambda dialog: heard.append(dialog.message))
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        tab.goto((tmp_path / "r.html").as_uri())
        for button in tab.query_selector_all("button:not(#print):not(.modebar-btn)"):
            button.click()
        assert not tab.query_selector_all("[data-title*=hare], [data-attr*=Cloud]")  # no upload
        assert len(tab.query_selector_all(".main-svg")) >= 6
    assert heard == []
    assert set(asked) == {(tmp_path / "r.html").as_uri()}


@pytest.mark.slow
@pytest.mark.browser
def test_hovering_tells_a_number_and_the_legend_takes_a_group_away(tmp_path, browser_page):
    written(runs(n_lr=3), tmp_path / "r.html")
    _, tab = browser_page
    tab.goto((tmp_path / "r.html").as_uri())
    chart = tab.locator(".chart[aria-label^='test/acc.']").first
    lines = chart.locator(".scatterlayer .trace path.js-line")
    drawn = lines.count()
    chart.locator(".scatterlayer .trace path.point").last.hover(force=True)
    hover = chart.locator(".hoverlayer .hovertext")
    hover.first.wait_for()
    assert re.search(r"epoch \d: 0\.\d{4} ± 0\.0\d+", hover.first.text_content())

    tab.locator("#legend input").first.uncheck()
    assert lines.count() == drawn - 2  # its line and its band
    tab.get_by_role("button", name="all", exact=True).click()
    assert lines.count() == drawn


def test_points_of_a_choice_stand_on_their_level_or_beside_each_other_around_it():
    alone = compare(runs(n_lr=3, seeds=1), "test/acc")
    lrs = [setting.key[0] for setting in alone.settings]
    assert charts.positions(alone, "lr") == [sorted(lrs).index(lr) for lr in lrs]

    longer = [
        replace(
            run, name=f"{run.name}l", config_hash=f"{run.config_hash}l", params=run.params | {"epochs": "9"}
        )
        for run in runs(seeds=1)
    ]
    both = compare([*runs(seeds=1), *longer], "test/acc")
    by_lr: dict[str, list[float]] = {}
    for setting, place in zip(both.settings, charts.positions(both, "lr"), strict=True):
        by_lr.setdefault(setting.key[both.by.index("lr")], []).append(place)
    assert by_lr == {"0.1": [-0.125, 0.125], "0.2": [0.875, 1.125]}


@pytest.mark.parametrize(("failed", "more"), [(200, None), (203, "and 3 more")])
def test_page_lists_two_hundred_failures_and_counts_the_others(tmp_path, failed, more):
    broken = [
        Record(f"run {i}", "FAILED", {"lr": "1", "seed": str(i)}, str(i), reason="x") for i in range(failed)
    ]
    text, _ = written(broken, tmp_path / "r.html")
    assert text.count("FAILED, x") == 200
    assert ("and 3 more" in text) == (more is not None)


@pytest.mark.parametrize(("epochs", "mode"), [(29, "lines+markers"), (30, "lines"), (31, "lines")])
def test_long_curves_have_no_markers(tmp_path, epochs, mode):
    _, data = written(runs(n_lr=1, seeds=1, epochs=epochs), tmp_path / "r.html")
    (section,) = [s for s in data["sections"] if s["title"] == "Learning curves"]
    assert {trace["mode"] for chart in section["charts"] for trace in chart["traces"]} == {mode}
