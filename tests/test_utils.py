"""Files that are whole or untouched, a bar only in a terminal, and the environment of a run."""

import io
import os
from types import SimpleNamespace

import pytest

import utils


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "rank", "shown"), [(Terminal, 0, True), (Terminal, 1, False), (io.StringIO, 0, False)]
)
def test_a_bar_is_shown_to_rank_0_in_a_terminal_only(stream, rank, shown, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream())
    utils.start_logging(rank)
    assert list(utils.progress(range(3), "epoch 7")) == [0, 1, 2]
    assert ("epoch 7" in utils.sys.stderr.getvalue()) == shown


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    utils.write_atomically(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"half of the n")
        raise OSError(28, os.strerror(28))

    with pytest.raises(utils.RunError, match="No space left on device; an earlier file there is unchanged"):
        utils.write_atomically(path, fails)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    utils.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_a_runs_own_output_is_no_uncommitted_change(monkeypatch):
    answers = {"rev-parse": "beef", "status": "", "ls-files": ""}
    commands = []

    def git(command, **_):
        commands.append(command[3:])
        return SimpleNamespace(returncode=0, stdout=answers[command[3]])

    monkeypatch.setattr(utils.subprocess, "run", git)
    assert not utils.environment()["uncommitted_changes"]
    assert ["status", "--porcelain", "--untracked-files=no"] in commands
    answers["ls-files"] = "models/mine.py"
    assert utils.environment()["uncommitted_changes"]


def test_environment_says_what_a_result_depends_on():
    environment = utils.environment()
    assert environment["cpu"]
    assert {"commit", "uncommitted_changes", "torch", "timm", "gpus", "command", "threads"} <= environment.keys()


def test_a_free_folder_is_beside_the_one_that_is_taken(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert utils.free_folder(folder) == f"{folder}_2"
    (tmp_path / "run_2").mkdir()
    (tmp_path / "run_3").symlink_to("gone")
    assert utils.free_folder(folder) == f"{folder}_4"
    monkeypatch.chdir(tmp_path / "run_2")
    assert utils.free_folder(utils.Path(".")) == f"{tmp_path}/run_2_2"
