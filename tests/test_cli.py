"""The exit code of a command: what `cli.exit_code` adds to the tests of each program's own errors."""

import os
import subprocess
import sys
from pathlib import Path

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


WINDOWS = """
import importlib, multiprocessing.reduction, os, pathlib, select, signal, subprocess, sys, tempfile, tomllib, tqdm
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGCHLD", "SIGKILL"):
    delattr(signal, name)
del select.poll, os.EX_TEMPFAIL, os.fork, os.getuid, os.sched_getaffinity, os.setpgrp
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.platform = "win32"
import models, utils
for name in ("main", "run_with_submitit", "paper.__main__"):
    try:
        importlib.import_module(name)
    except SystemExit as end:
        assert end.code == 2
    else:
        sys.exit(f"{name} runs")
"""


def test_commands_end_on_windows_with_one_line():
    """In a process of its own, which loses what Windows lacks; models and losses can still be imported."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", WINDOWS], cwd=root, capture_output=True, text=True)
    line = "error: Windows lacks the signals and file locks that runs need; run this command in WSL 2\n"
    assert (done.returncode, done.stderr) == (0, 3 * line)
