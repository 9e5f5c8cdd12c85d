"""The exit code of a command: what `cli.exit_code` adds to the tests of each program's own errors."""

import os
import sys

import pytest

from cli import exit_code


@pytest.mark.parametrize("length", [1, 300_000], ids=["told at the end", "told while it works"])
def test_a_reader_that_leaves_ends_a_command_quietly(length, monkeypatch, capsys):
    """As ``| head`` does; short texts are only written when the command is done, long ones at once."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert exit_code(lambda: print("x" * length) or 0) == 141
    assert capsys.readouterr() == ("", "")


def test_another_broken_pipe_is_an_error(tmp_path, monkeypatch, capsys):
    def fail() -> int:
        raise BrokenPipeError(32, "Broken pipe")

    with (tmp_path / "text").open("w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        assert exit_code(fail) == 1
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"
