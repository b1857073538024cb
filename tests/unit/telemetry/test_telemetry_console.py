import io

import pytest
from rich.console import Console

from dbtrain.telemetry.console import LiveView, Row, blocks_table, duration, size


def row(**changes):
    values = {
        "block": 1,
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
    text = rendered(row(), row(block=2, phase="pending", step=0, loss=None, rate=None, memory=None, restarts=0))
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


def test_without_a_terminal_running_blocks_get_a_line_now_and_then():
    console, now = plain(), [0.0]
    with LiveView(console, clock=lambda: now[0]) as view:
        view.show([row(), row(block=2, phase="done")])
        now[0] = 5.0
        view.show([row(step=201), row(block=2, phase="done")])  # too soon
        now[0] = 11.0
        view.show([row(), row(block=2, phase="done")])  # nothing new
        view.show([row(step=240, loss=None), row(block=2, phase="done")])
        view.tell("block 1: [attempt 2] placed")
    assert console.file.getvalue().splitlines() == [
        "block 1: step 200/600 loss 0.1235 4.0 steps/s ETA 1:40",
        "block 1: step 240/600 loss - 4.0 steps/s ETA 1:30",
        "block 1: [attempt 2] placed",
    ]


def test_on_a_terminal_the_table_is_drawn():
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with LiveView(console) as view:
        view.show([row()])
    assert "200/600" in console.file.getvalue()
