"""Files that lines are added to."""

from pathlib import Path

from secorder.monitor.sinks.lines import append_lines, file_at


def test_folders_are_made_and_a_line_that_was_cut_off_is_ended_first(tmp_path: Path) -> None:
    file = file_at(tmp_path / "new" / "run.txt")
    append_lines(file, "a\n")
    with file.open("a") as cut_off:
        cut_off.write("b")
    append_lines(file, "c\nd\n")
    assert file.read_text() == "a\nb\nc\nd\n"
