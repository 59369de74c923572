"""Slurm on this machine alone: munge, a controller and one node with two CPUs, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster.block import Block

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PACKAGES = "munge slurmctld slurmd slurm-client"
# Two partitions of the same node: a job of "urgent" takes the CPUs of those of "runs", which get the signal that they
# asked for (sbatch --signal), have 10 s to save, and are put into the queue again. Without cgroups, which a container
# may not have, and without accounting, which needs a database: submitit then knows a job by its result alone.
CONFIGURATION = """\
ClusterName=sweep
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=10
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=runs Nodes=node Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 MaxTime=60 State=UP
PartitionName=urgent Nodes=node Default=NO PriorityTier=2 PreemptMode=OFF MaxTime=60 State=UP
"""


class SlurmCluster(Block):
    """Slurm's daemons, while the block lasts; :attr:`environment` makes its commands find them.

    >>> with SlurmCluster() as slurm:
    ...     slurm.call("squeue")

    Leaving the block cancels every job and ends the daemons, whatever happened.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "SLURM_NODE": self.folder.name}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start_all(self) -> None:
        self._configure()
        self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *self._munge())
        _wait(lambda: (self.folder / "munge.socket").exists(), 10, "munged did not open its socket")
        self._start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        self._start("slurmd", "-D", "-N", "node", "-f", str(self.folder / "slurm.conf"))
        _wait(self._idle, 60, "the node did not become idle")

    def call(self, *command: str) -> str:
        """What one of Slurm's commands prints.

        Raises:
            RuntimeError: where it fails, with what it says.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """State of each job in the queue, by its id (``12_3`` of an array)."""
        lines = self.call("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def start_now(self, job: str) -> None:
        """Let a job start that is in the queue again, for which Slurm would wait for two minutes."""
        with contextlib.suppress(RuntimeError):  # it has started, or ended, in the meantime
            self.call("scontrol", "update", f"jobid={job}", "StartTime=now")

    def stop(self) -> None:
        """Cancel all jobs, end the daemons and what they have started."""
        if len(self._daemons) == 3 and all(daemon.poll() is None for daemon in self._daemons):
            for how in (["--full", "--signal=KILL"], []):
                subprocess.run(["scancel", *how, "--user=root"], env=self.environment, timeout=60)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        """The last lines of the daemons' logs."""
        logs = (self.folder / f"{name}.log" for name in ("munged", "slurmctld", "slurmd"))
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs if log.exists())

    def _configure(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        # munged refuses a socket in a folder that others cannot enter, and a key that they can read.
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        ports = _free_ports(2)
        configuration = CONFIGURATION.format(
            folder=self.folder, host=socket.gethostname(), controller_port=ports[0], node_port=ports[1]
        )
        (self.folder / "slurm.conf").write_text(configuration)

    def _munge(self) -> list[str]:
        return [f"--{name}={self.folder}/munge.{end}" for name, end in MUNGE_FILES.items()]

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.log").open("a") as log:
            daemon = subprocess.Popen([program, *arguments], env=self.environment, stdout=log, stderr=log)
        self._daemons.append(daemon)

    def _idle(self) -> bool:
        for daemon in self._daemons:
            if daemon.poll() is not None:
                raise RuntimeError(f"{daemon.args[0]} has ended:\n{self.log()}")  # type: ignore[index]
        try:
            return "idle" in self.call("sinfo", "--noheader", "--format=%T")
        except RuntimeError:  # the controller does not answer yet
            return False


MUNGE_FILES = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def missing_programs() -> list[str]:
    """What of Slurm is not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait(condition: Callable[[], bool], seconds: float, message: str) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise RuntimeError(f"{message} in {seconds:.0f} s")
        time.sleep(0.1)
