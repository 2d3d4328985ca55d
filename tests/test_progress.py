"""What a user sees while a point is computed."""

import io

import pytest
from rich.console import Console

from spd.progress import Display


def test_progress_is_lines_but_not_thousands_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    with Display("point 1/2, drop 0.5", Console(file=output)) as display:
        display.step("evaluating")
        for done in range(5000):
            display(done, 5000)
    assert output.getvalue() == "point 1/2, drop 0.5: evaluating\n"


def test_progress_on_a_terminal_says_what_and_how_far() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Display("point 3/7, drop 0.5", terminal) as display:
        display.step("evaluating")
        display(640, 2800)
        display.say("something that stays")
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "point 3/7, drop 0.5: evaluating" in shown
    assert "640/2800" in shown
    assert "something that stays" in shown


def test_lines_say_how_much_time_is_left_by_the_pace_since_the_first_report(monkeypatch: pytest.MonkeyPatch) -> None:
    now, output = [100.0], io.StringIO()
    monkeypatch.setattr("spd.progress.time.monotonic", lambda: now[0])
    with Display("point 1/2", Console(file=output)) as display:
        display.step("evaluating")
        now[0] += 600  # ranks start and compile
        display(200, 1000)
        now[0] += 60
        display(400, 1000)
    assert output.getvalue().splitlines()[1:] == [
        "point 1/2: evaluating 200/1000, time left unknown",
        "point 1/2: evaluating 400/1000, time left 0:03:00",
    ]
