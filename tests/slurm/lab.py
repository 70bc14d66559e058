"""A real Slurm cluster on this machine for one test session: a controller and nodes on loopback, in one directory.

Every node is a process, mount and host name namespace of its own, so ``n1`` resolves and killing a node takes all that
runs on it along. Nothing of the machine is used but its Slurm packages: no systemd, cgroups, munge or database. The
daemons run in the foreground as children of the tests.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template

CONFIGURATION = Template("""\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/none
CredType=cred/none
# A requeued job may start again after this many seconds, at the least 5.
AuthInfo=cred_expire=5
# Nobody is authenticated, so only loopback may be heard.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd-%n.pid
SlurmctldLogFile=$root/slurmctld.log
SlurmdLogFile=$root/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=3600
FirstJobId=$first_job
KillWait=$kill_wait
GresTypes=gpu
NodeName=n[1-$nodes] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$first_port-$last_port] CPUs=16 RealMemory=65536 \
Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
""")
NODE = """
hostname "$1"
mount --bind "$2" /etc/hosts
slurmd -D -N "$1" &
wait
exec sleep infinity
"""
GPUS = 8
FIRST_PORT, BLOCK, BLOCKS = 31000, 20, 80
"""Above the ports of jobs (20000 to 29999), below those that Linux hands out by itself (from 32768)."""
JOBS = 100
"""Of a session; their numbers decide the ports of the ranks, so two sessions must not share any."""


class Lab:
    """A running cluster; leave it through ``stop``.

    Args:
        root: an empty directory.
        nodes: how many.
        kill_wait_s: between SIGTERM and SIGKILL when a job is ended.
        grace_s: that a preempted job has.
    """

    def __init__(self, root: Path, nodes: int = 2, kill_wait_s: int = 20, grace_s: int = 40) -> None:
        self.root, self.configuration = root, root / "slurm.conf"
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "gpu", *(f"spool/{node}" for node in self.nodes)):
            (root / name).mkdir(parents=True)
        port = _free_ports(nodes + 1)
        values = {"root": root, "nodes": nodes, "kill_wait": kill_wait_s, "grace": grace_s, "controller_port": port}
        values |= {
            "first_port": port + 1,
            "last_port": port + nodes,
            "first_job": (port - FIRST_PORT) // BLOCK * JOBS + 1,
        }
        values |= {"user": self.call("id", "-un")}
        self.configuration.write_text(CONFIGURATION.substitute(values))
        # Without cgroups a GPU's file is looked at only; the number at its end is the index.
        for index in range(GPUS):
            (root / f"gpu/nvidia{index}").symlink_to("/dev/null")
        (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu/nvidia[0-{GPUS - 1}]\n")
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (root / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """Start all daemons and wait until the nodes are idle."""
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)

    def stop(self) -> None:
        """End everything that runs on the cluster, and the cluster."""
        for node in self.nodes:
            self.crash(node)
        self.stop_controller()

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers; it knows what it knew before."""
        self._daemons["slurmctld"] = self._daemon(["slurmctld", "-D"])
        self.wait_until(lambda: "UP" in self.call("scontrol", "ping", check=False), 30, "a controller")

    def stop_controller(self) -> None:
        """End slurmctld, which saves its state. (Killed, it may forget its newest jobs, and then kills them.)"""
        self._end("slurmctld", signal.SIGTERM)

    def start_node(self, node: str) -> None:
        """Boot a node and wait until it is idle."""
        user = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        space = ["unshare", *user, "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--mount"]
        self._daemons[node] = self._daemon([*space, "bash", "-c", NODE, "node", node, str(self.root / "hosts")])
        idle = ["sinfo", "--noheader", "--partition=main", f"--nodes={node}", "--format=%t"]
        self.wait_until(lambda: self.call(*idle, check=False) in ("idle", "mix", "alloc"), 60, f"node {node}")

    def crash(self, node: str) -> None:
        """The node loses power: its namespace ends with the process that made it, and so does all that runs in it."""
        self._end(node, signal.SIGKILL)

    def call(self, *command: str | Path, check: bool = True) -> str:
        """Standard output of a command on the login node."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"{words} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """``scontrol show job`` as a dictionary."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def jobs(self) -> list[str]:
        """Numbers of all jobs since the start, oldest first."""
        found = self.call("squeue", "--noheader", "--states=all", "--format=%i").split()
        return sorted(found, key=int)

    def wait_for(self, number: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states; returns ``job(number)``."""
        self.wait_until(lambda: self.job(number)["JobState"] in states, timeout_s, f"job {number} in {states}")
        return self.job(number)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for ``condition``.

        Raises:
            AssertionError: it did not come true in time; what it waited for, and the queue.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"no {what} after {timeout_s} s\n{self.call('squeue', '--states=all', check=False)}"
                )
            time.sleep(0.1)

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """Inside, slurmctld is gone."""
        self.stop_controller()
        try:
            yield
        finally:
            self.start_controller()

    def _daemon(self, command: list[str]) -> subprocess.Popen[bytes]:
        log = (self.root / f"daemon-{len(self._daemons)}.log").open("ab")
        with log:
            return subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _end(self, name: str, number: signal.Signals) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is not None:
            daemon.send_signal(number)
            daemon.wait(timeout=60)


def _free_ports(count: int) -> int:
    """The first of consecutive free ports, below those that the system hands out by itself."""
    # Sessions that start at the same moment look in different places first.
    for first in (FIRST_PORT + (os.getpid() + attempt) % BLOCKS * BLOCK for attempt in range(BLOCKS)):
        probes = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in probes:
                probe.close()
    raise RuntimeError("no free ports")
