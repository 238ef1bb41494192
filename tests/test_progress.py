"""What a user sees while runs train: lines where there is no terminal, live lines where there is one."""

import io
import re

import pytest
from rich.console import Console

from lenet_sweep.runs import progress
from lenet_sweep.runs.progress import RunProgress, Screen, SweepScreen
from lenet_sweep.training.metrics import CurvePoint, EpochMetrics


def metrics(epoch=1, **fields):
    given = {"train_loss": 1.25, "train_acc": 0.5, "test_loss": 1.0, "test_acc": 0.625, "val_loss": None,
             "val_acc": None, "examples_per_s": 12_345.6, "epoch_s": 1.0, "curve": ()}  # fmt: skip
    return EpochMetrics(epoch, **(given | fields))


@pytest.fixture
def terminal(monkeypatch):
    """Standard output as a terminal of 120 columns, whose text is kept."""
    kept = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None, highlight=False)
    monkeypatch.setattr(progress, "console", lambda: kept)
    return kept


class Recorder:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.fixture
def recorder():
    kept = Recorder()
    with progress.reporting_to(kept):
        yield kept


def test_run_reports_where_it_is_from_start_to_end(recorder):
    shown = RunProgress(10, "[2/3] lr=0.5", done=4)
    assert recorder.calls == []
    shown.start()
    shown.point(CurvePoint(4.2, 2.0, 0.25))
    shown.epoch(metrics(5))
    shown.point(CurvePoint(5.2, 1.5, 0.75))
    shown.close()
    line = "epoch  5/10  train loss 1.250  train acc 0.500  test acc 0.625  12,346 examples/s"
    after = "test acc 0.625  12,346 examples/s"
    assert recorder.calls == [
        ("progress", "[2/3] lr=0.5", 4, 10, ""),
        ("progress", "[2/3] lr=0.5", 4.2, 10, "loss 2.000  acc 0.250  "),
        ("detail", f"[2/3] lr=0.5  {line}"),
        ("progress", "[2/3] lr=0.5", 5, 10, f"loss 1.250  acc 0.500  {after}"),
        ("progress", "[2/3] lr=0.5", 5.2, 10, f"loss 1.500  acc 0.750  {after}"),
        ("stopped", "[2/3] lr=0.5"),
    ]


def test_reporter_is_put_back_after_the_block(recorder):
    other = Recorder()
    with progress.reporting_to(other):
        progress.say("inside", "run 1")
        progress.job_done("run 1", True)
    progress.say("outside")
    assert other.calls == [("line", "run 1: inside"), ("job_done", "run 1", True)]
    assert recorder.calls == [("line", "outside")]
    assert progress.current() is recorder


def test_epoch_line_has_validation_only_where_there_is_one():
    assert "val acc" not in progress.epoch_line(metrics(), 3)
    assert "val acc 0.400  test acc" in progress.epoch_line(metrics(val_loss=1.0, val_acc=0.4), 3)
    assert progress.epoch_line(metrics(), 3).startswith("epoch 1/3  train loss")


def test_screen_without_a_terminal_prints_every_detail(capsys):
    screen = Screen()
    screen.progress("run", 0.2, 3, "loss 1.000")
    screen.detail("epoch 1/3")
    screen.line("a line")
    screen.stopped("run")
    assert capsys.readouterr().out == "epoch 1/3\na line\n"


def test_screen_on_a_terminal_has_a_live_line_for_each_run_and_no_details(terminal):
    screen = Screen()
    screen.progress("run a", 0.4, 3, "loss 1.000")
    screen.progress("run b", 2.0, 2, "loss 0.500")
    first, second = screen._live.tasks
    assert (first.description, first.completed, first.total) == ("run a", 0.4, 3)
    assert (first.fields["about"], first.fields["numbers"]) == ("epoch 1/3", "loss 1.000")
    assert second.fields["about"] == "epoch 2/2"  # not 3/2 when the last epoch is done
    screen.detail("a detail")
    screen.line("a line")
    screen.stopped("unknown")
    screen.stopped("run a")
    assert [task.description for task in screen._live.tasks] == ["run b"]
    screen.stopped("run b")
    assert screen._live is None
    text = terminal.file.getvalue()
    assert "a line" in text
    assert "a detail" not in text


def test_sweep_without_a_terminal_counts_its_jobs_and_tells_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with SweepScreen({"a": 4, "b": 4, "c": 2}) as screen:
        screen.progress("a", 0, 4, "")
        now[0] = 84.0
        screen.job_done("a", False)  # 4 of 10 epochs in 84 s: 126 s are left
        screen.progress("b", 2, 6, "")  # resumes after epoch 2 of 6
        screen.progress("b", 4, 6, "")
        screen.job_done("c", True)
        now[0] = 100.0
        screen.job_done("b", True)
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3 runs, about 2:06 left",
        "2 of 3 runs, 1 failed, about 0:21 left",
    ]


def test_sweep_on_a_terminal_has_a_line_of_totals(terminal):
    with SweepScreen({"a": 4, "b": 6}) as screen:
        (totals,) = screen._live.tasks
        assert (totals.description, totals.total, totals.completed) == ("sweep", 10, 0)
        screen.progress("a", 0, 4, "")
        screen.progress("a", 1, 4, "loss 2.000")
        assert screen._live.tasks[0].completed == 1
        screen.stopped("never started")
        screen.stopped("a")
        screen.job_done("a", False)
        (totals,) = screen._live.tasks  # the totals stay when no run trains
        assert (totals.completed, totals.fields["about"]) == (4, "1 of 2 runs")
        screen.progress("b", 6, 6, "")  # nothing is left to train
        screen.job_done("b", True)
        assert screen._live.tasks[0].fields["about"] == "2 of 2 runs, 1 failed"
        assert screen._live.tasks[0].completed == 10
    assert screen._live is None
    assert not re.search(r"\d of 2 runs, about", terminal.file.getvalue())


def test_layers_are_a_table_with_a_line_each(make_config):
    from lenet_sweep import shapes

    layers = shapes.layers(make_config().model, shapes.IMAGE_SHAPE, shapes.CLASSES)
    lines = progress.layer_table(layers).splitlines()
    assert len(lines) == 1 + len(layers)
    assert lines[1] == "conv1     conv        (6, 28, 28)"
    assert lines[-1] == "linear3   linear      (10,)"
