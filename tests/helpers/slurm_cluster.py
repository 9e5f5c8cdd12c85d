"""A real Slurm on this machine for the tests: munge, slurmctld and two slurmd, each with eight fake GPUs.

``python tests/slurm_cluster.py FOLDER`` starts the daemons as its children, with all that they write in FOLDER, prints
a line when both nodes are idle, and ends them when its standard input is closed. So they end with the process that
holds the other end of that pipe, whatever becomes of it.

Two partitions share the nodes: a job in ``high`` preempts those in ``main``, which get GRACE seconds and are requeued.
The nodes are called 127.1 and 127.2, short for 127.0.0.1 and 127.0.0.2: names that resolve to this machine anywhere.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

NODES = ("127.1", "127.2")
GPUS = 8
GRACE = 8
DAEMONS = ("munged", "slurmctld", "slurmd")

# Short waits and no limits; the machine claims more cores than it has, so that real requests are granted.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=10
MinJobAge=3600
FirstJobId={ports[0]}
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Boards=1 SocketsPerBoard=2 "
    "CoresPerSocket=128 ThreadsPerCore=1 RealMemory=512000 Gres=gpu:{gpus} State=UNKNOWN"
)


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} here: apt-get install slurm-wlm munge"
    return "" if os.getuid() == 0 else "slurmd starts jobs only if it runs as root"


@contextmanager
def running(folder: Path):
    """The cluster while the context lasts, or this process; yields the path for SLURM_CONF."""
    command = [sys.executable, __file__, str(folder)]
    # a session of its own: Ctrl-C in the terminal is for pytest, which then closes the pipe
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as keeper:
        try:
            if not keeper.stdout.readline():
                logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in folder.glob("*.log"))
                raise RuntimeError(f"Slurm did not start\n{logs}")
            yield folder / "slurm.conf"
        finally:
            keeper.stdin.close()
            keeper.wait(60)


def client(*command: str, seconds: float = 20) -> str:
    """What a client of Slurm prints; it gets so many seconds, so that no dead daemon holds up the tests."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def wait_until(condition, seconds: float, what: str):
    """The first true value of ``condition()``, asked again and again.

    Raises:
        TimeoutError: there was none within so many seconds; it says ``what`` was waited for.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} within {seconds} s")
        time.sleep(0.1)
    return value


def configure(root: Path) -> None:
    """Write the configuration: free ports, and devices that look like GPUs to Slurm."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(NODES))]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    host = socket.gethostname().partition(".")[0]
    nodes = [
        NODE.format(name=name, host=host, port=port, gpus=GPUS) for name, port in zip(NODES, ports[1:], strict=True)
    ]
    text = CONFIGURATION.format(root=root, host=host, ports=ports, grace=GRACE, nodes="\n".join(nodes))
    (root / "slurm.conf").write_text(text)
    for folder in ("state", "devices", *(f"spool/{name}" for name in NODES)):
        (root / folder).mkdir(parents=True)
    for index in range(GPUS):
        (root / f"devices/nvidia{index}").symlink_to("/dev/null")
    (root / "gres.conf").write_text(
        f"AutoDetect=off\nName=gpu Flags=nvidia_gpu_env File={root}/devices/nvidia[0-{GPUS - 1}]\n"
    )
    key = root / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))


def start(root: Path) -> list[subprocess.Popen]:
    """Start the daemons in the foreground and wait until both nodes are idle."""
    configuration = f"{root}/slurm.conf"
    munge = {name: f"{root}/munge.{name}" for name in ("key", "socket", "pid", "seed")}
    commands = {
        # --force: the test folder is closed to other users, which munged would have open; nobody else is to come in
        "munged": ["munged", "--foreground", "--force"]
        + [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in munge.items()],
        "slurmctld": ["slurmctld", "-D", "-c", "-f", configuration],
    } | {f"slurmd.{name}": ["slurmd", "-D", "-f", configuration, "-N", name] for name in NODES}
    daemons = []
    for name, command in commands.items():
        with open(root / f"{name}.log", "w") as log:
            daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        if name == "munged":
            wait_until(Path(munge["socket"]).exists, 10, "socket of munged")
    return daemons


def idle() -> bool:
    """Whether both nodes wait for jobs."""
    try:
        return client("sinfo", "-h", "-N", "-p", "main", "-o", "%t", seconds=5).split() == ["idle"] * len(NODES)
    except (RuntimeError, subprocess.TimeoutExpired):
        return False  # slurmctld does not listen yet


def stop(daemons: list[subprocess.Popen]) -> None:
    """Cancel all jobs, wait until they are gone, and end the daemons."""
    try:
        client("scancel", "--user=root", "--signal=KILL", "--full")
        client("scancel", "--user=root")
        wait_until(lambda: not client("squeue", "-h"), 20, "empty queue")
    except (RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
    for daemon in reversed(daemons):  # munged last: the others speak through it
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def keep(root: Path) -> None:
    """Start the cluster, say so, and end it at the end of standard input."""
    configure(root)
    os.environ["SLURM_CONF"] = f"{root}/slurm.conf"
    daemons = start(root)
    try:
        wait_until(idle, 30, "two idle nodes")
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        stop(daemons)


if __name__ == "__main__":
    keep(Path(sys.argv[1]).resolve())
