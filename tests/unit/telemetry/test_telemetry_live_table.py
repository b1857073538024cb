"""The live table is one screen: at any size, for any number of blocks, in any encoding."""

import io
import math

import pytest
from rich.console import Console

from dbtrain.telemetry.console import LiveView
from dbtrain.telemetry.live_table import ASCII, DRAWN, MOST_POINTS, Trace, bar, live_table
from dbtrain.telemetry.rows import Row

PHASES = ("running", "done", "pending", "failed", "lost", "placed", "stopped")


def row(block, phase="running", step=1200, **changes):
    values = {"loss": 0.5, "rate": 4.0, "seconds": 3725.0, "memory": 3 << 29, "restarts": block % 3, "validation": 0.75}
    return Row(f"block {block}", (block, block + 1), (0.1, 0.2), phase, step, 123456, **{**values, **changes})


def trace(count=50):
    made = Trace()
    for step in range(count):
        made.take(step, 2 - step / count)
    return made


def drawn(rows, width=80, height=24, glyphs=DRAWN, colour=None):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=colour)
    console.print(live_table(rows, {r.name: trace() for r in rows}, width, height, glyphs))
    return console.file.getvalue()


@pytest.mark.parametrize("count", [1, 3, 20, 64, 1000])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 10)])
def test_one_screen_is_enough(count, width, height):
    rows = [row(block, PHASES[block % len(PHASES)]) for block in range(count)]
    lines = drawn(rows, width, height).splitlines()
    assert len(lines) < height and max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_at_80_columns_there_are_bar_step_loss_curve_and_time_left():
    text = drawn([row(0), row(1, "done", step=123456, rate=None)])
    assert "━" in text and "1200/123456" in text and "0.5000" in text and "█" in text and "8:29:24" in text
    assert "● running" in text and "✓ done" in text and "50 %" in text


def test_a_strip_has_every_block_and_what_failed_has_a_line():
    rows = [row(block, "done", step=123456) for block in range(64)]
    rows[50] = row(50, "failed", step=0)
    first, strip, *rest = drawn(rows).splitlines()
    assert "1 failed" in first and "63 done" in first
    assert strip.strip() == "█" * 50 + "▁" + "█" * 13
    assert any(line.split()[0] == "50" for line in rest[1:] if line.strip())


def test_states_are_in_colour():
    text = drawn([row(0, "failed"), row(1, "done")], colour="standard")
    assert "\x1b[1;31m" in text and "\x1b[1;32m" in text


def test_a_terminal_without_unicode_gets_ascii():
    assert drawn([row(block, PHASES[block % len(PHASES)]) for block in range(64)], glyphs=ASCII).isascii()


def test_a_curve_follows_the_loss_and_steps_that_come_again_replace_those_before():
    falling = trace().drawn(8, DRAWN.heights)
    assert falling[0] == "█" and falling[-1] == "▁" and list(falling) == sorted(falling, reverse=True)
    again = Trace()
    for step, loss in [(10, 3.0), (20, 2.0), (30, 1.0), (20, 2.5), (30, math.nan), (30, None)]:
        again.take(step, loss)
    assert again.points == [(10, 3.0), (20, 2.5)]
    assert Trace().drawn(8, DRAWN.heights) == ""


def test_a_long_run_keeps_few_losses_and_the_newest_of_them():
    long = trace(100_000)
    assert len(long.points) <= MOST_POINTS and long.points[-1][0] == 99_999


@pytest.mark.parametrize(("share", "full"), [(0.0, 0), (0.5, 5), (0.999, 9), (1.0, 10), (1.5, 10)])
def test_a_bar_is_full_only_at_the_end(share, full):
    assert bar(share, 10, ASCII) == "#" * full + "-" * (10 - full)


def test_the_view_draws_the_curve_of_what_it_was_shown():
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    with LiveView(console) as view:
        for step in range(1, 5):
            view.show([row(0, step=step, loss=5.0 - step)])
    assert "█▅▃▁" in console.file.getvalue() or "█▆▃▁" in console.file.getvalue()
