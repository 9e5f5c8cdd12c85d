"""Slurm's clients as shell scripts, for tests of what the launcher would tell and ask them."""

import re
from pathlib import Path


class FakeSlurm:
    """A folder for PATH: sbatch keeps what it is given, squeue prints what it is told to, and so on."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self.script("sbatch", f"n=$(ls {folder} | grep -c submitted); cp $1 {folder}/submitted$n; echo job $((70 + n))")
        self.script("squeue", f"cat {folder}/queue 2>/dev/null; true")
        self.script("srun", "exit 1")
        self.script("scontrol", f'echo "$@" >> {folder}/told; echo "JobState=RUNNING PreemptTime=None"')

    def script(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{text}\n")
        path.chmod(0o755)

    def queue(self, *lines: str) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    @property
    def submitted(self) -> list[str]:
        """The files that sbatch got."""
        return [path.read_text() for path in sorted(self.folder.glob("submitted*"))]

    @property
    def told(self) -> list[str]:
        """What scontrol was called with."""
        path = self.folder / "told"
        return path.read_text().splitlines() if path.exists() else []


def sbatch_options(text: str) -> dict[str, str]:
    """``#SBATCH`` lines by name."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
