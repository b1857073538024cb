import io

import pytest
from rich.console import Console
from rich.table import Table

from dbtrain.telemetry.console import LiveView, Row, blocks_table, duration, size
from dbtrain.telemetry.counting import counted
from dbtrain.telemetry.layout import say, show_table


def row(**changes):
    values = {
        "name": "block 1",
        "layers": (2, 4),
        "levels": (0.17958, 0.505),
        "phase": "running",
        "step": 200,
        "steps": 600,
        "loss": 0.123456,
        "rate": 4.0,
        "seconds": 3725.0,
        "memory": 3 * 2**29,
        "restarts": 2,
    }
    return Row(**{**values, **changes})


def plain():
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def rendered(*rows):
    console = plain()
    console.print(blocks_table(rows, "toy"))
    return console.file.getvalue()


def test_the_table_tells_what_a_block_does():
    text = rendered(row(), row(name="block 2", phase="pending", step=0, loss=None, rate=None, memory=None, restarts=0))
    first, second = (line.split() for line in text.splitlines() if line.strip(" │").startswith(("1", "2")))
    for word in ("2-3", "0.18-0.505", "running", "200/600", "0.1235", "4.0", "1:02:05", "1:40", "1.50G"):
        assert word in first, word
    assert "pending" in second and "0/600" in second and second.count("-") >= 3


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits_the_terminal_and_cuts_no_value(width):
    console = Console(file=io.StringIO(), width=width)
    console.print(blocks_table([row(step=123456, steps=200000)], width=width))
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert all(word in text for word in ("running", "123456/200000", "0.1235"))
    assert ("steps/s" in text) == (width == 200)


@pytest.mark.parametrize("phase", ["pending", "placed", "running", "lost", "done", "stopped", "failed"])
def test_every_phase_renders(phase):
    assert phase in rendered(row(phase=phase))


def test_what_is_left_is_told_of_running_blocks_with_a_rate():
    assert row().eta == 100
    assert row(rate=None).eta is None and row(rate=0.0).eta is None and row(phase="done").eta is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (61, "1:01"), (3599.7, "1:00:00"), (90061, "25:01:01")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_sizes():
    assert [size(n) for n in (None, 2**20, 2**29, 2**30, 11.75 * 2**30)] == ["-", "1.0M", "512.0M", "1.00G", "11.75G"]


def test_without_a_terminal_a_running_block_gets_a_line_a_minute_and_what_happens_is_told_at_once():
    console, now = plain(), [0.0]
    with LiveView(console, clock=lambda: now[0]) as view:
        view.show([row(step=0, loss=None), row(name="block 2", phase="done")])  # says nothing yet
        for second in range(151):
            now[0] = float(second)
            view.show(
                [
                    row(step=200 + second, loss=0.5),
                    row(name="block 2", phase="done"),
                    row(name="block 3", step=1, loss=0.25),
                ]
            )
        view.tell("block 1: [attempt 2] placed")
    told = console.file.getvalue().splitlines()
    assert told == [
        "block 1: step 200/600 loss 0.5000 4.0 steps/s ETA 1:40",
        "block 3: step 1/600 loss 0.2500 4.0 steps/s ETA 2:30",
        "block 1: step 260/600 loss 0.5000 4.0 steps/s ETA 1:25",
        "block 1: step 320/600 loss 0.5000 4.0 steps/s ETA 1:10",
        "block 1: [attempt 2] placed",
    ]


def test_without_a_terminal_what_takes_a_while_gets_a_line_now_and_then():
    console, now = plain(), [0.0]
    with LiveView(console, clock=lambda: now[0]) as view:
        for second in range(100):
            now[0] = float(second)
            for step in counted(view.count, "steps of the pilot", range(2)):
                view.count("steps of the pilot", 10 * second + step, 1000)
    assert [line.split(" of ")[0] for line in console.file.getvalue().splitlines()] == ["0", "0", "0"]
    console = plain()
    with LiveView(console, clock=lambda: now[0]) as view:
        for what in ("one", "another"):  # neither takes long
            view.count(what, 0, 2)
            now[0] += 20
            view.count(what, 1, 2)
    assert console.file.getvalue() == ""


def test_on_a_terminal_what_takes_a_while_is_counted_in_place_and_leaves_nothing_behind():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with LiveView(console) as view:
        assert list(counted(view.count, "steps of the pilot", [5, 6, 7])) == [5, 6, 7]
    text = console.file.getvalue()
    assert "3 of 3 steps of the pilot" in text
    assert text.rstrip().endswith("\x1b[2K"), "the line is wiped at the end"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_prose_breaks_between_words_and_never_in_a_path(width):
    path = "/a/very/long/path/to-some/run-directory/with-dashes/of/a/cluster/engineer/blocks/00/attempts/1/log.txt"
    prose = f"block 1 failed: {path} has the traceback, and all other blocks go on as if nothing had happened to it"
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    say(console, prose)
    lines = console.file.getvalue().splitlines()
    assert " ".join(lines).split() == prose.split()
    assert all(len(line) <= width for line in lines if path not in line)
    console = plain()
    say(console, prose)
    assert console.file.getvalue() == prose + "\n", "in a log a message is one line"


@pytest.mark.parametrize("width", [80, 140])
def test_a_table_breaks_no_word_however_narrow_the_terminal_is(width):
    table = Table("when", "setting", *(f"column{i}" for i in range(6)), title="time-outs")
    words = ["a worker makes no step", "RAY_gcs_rpc_server_reconnect_timeout_s", *(f"value{i}.25" for i in range(6))]
    table.add_row(*words)
    console = Console(file=io.StringIO(), width=width)
    show_table(console, table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width or width == 80
    assert all(word in text for word in ("RAY_gcs_rpc_server_reconnect_timeout_s", "column5", "value5.25", "time-outs"))
    assert ("┃" in text) == (width == 140)


def test_on_a_terminal_the_table_is_drawn():
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with LiveView(console) as view:
        view.show([row()])
    assert "200/600" in console.file.getvalue()


def test_a_loss_on_validation_samples_has_a_column_once_there_is_one():
    assert "validation" not in rendered(row())
    text = rendered(row(validation=0.4567891), row(name="block 2"))
    assert "validation" in text and "0.4568" in text
    console = plain()
    LiveView(console).show([row(validation=0.5)])
    assert "loss 0.1235 (validation 0.5000)" in console.file.getvalue()
