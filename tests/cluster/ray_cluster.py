"""A Ray cluster of several nodes on one machine, which can lose them.

Each node is in a network namespace of its own, with its own address on a bridge, where the process may make them
(root); otherwise the nodes are raylets that share the address of the machine, and cannot be cut off from each other.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.block import Block

PORT = 6379
# A node that does not answer for 5 s counts as dead; one that does not hear of the head ends itself some 10 s later,
# with what runs on it: in between its job may have started elsewhere already. With Ray's own times that takes minutes.
FAST_DETECTION = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3",
    "RAY_grpc_client_keepalive_time_ms": "2000",
    "RAY_grpc_client_keepalive_timeout_ms": "2000",
}


class RayCluster(Block):
    """A head without CPUs, on which the sweep itself runs, and ``workers`` nodes with one CPU each.

    >>> with RayCluster(workers=2) as cluster:
    ...     sweep = cluster.start([sys.executable, "sweep.py", cluster.address])
    ...     cluster.kill(0)
    ...     cluster.cut_off(1)

    Whatever happened, leaving the block ends every process of the cluster and takes the network down.

    Args:
        workers: number of worker nodes.
        namespaces: ``None``: where the process may make them.
    """

    def __init__(self, workers: int, *, namespaces: bool | None = None) -> None:
        self.namespaces = can_make_namespaces() if namespaces is None else namespaces
        name = f"iql{secrets.token_hex(3)}"
        self._nodes = [f"{name}-{number}" for number in range(workers + 1)]
        self._port = PORT if self.namespaces else _free_port()
        # Ray's sockets are below it, and the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir="/tmp"))

    @property
    def address(self) -> str:
        return f"{self._address(0)}:{self._port}"

    def start_all(self) -> None:
        if self.namespaces:
            self._make_network()
        for number in range(len(self._nodes)):
            self._start_node(number)
        self._wait_for_nodes()

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a command on the head; ``options`` are those of :class:`subprocess.Popen`."""
        options.setdefault("text", True)
        environment = {**self._environment(0), **dict(options.pop("env", None) or {})}  # type: ignore[call-overload]
        return subprocess.Popen([*self._inside(0), *command], env=environment, **options)  # type: ignore[call-overload]

    def kill(self, worker: int) -> list[int]:
        """End all processes of a worker node by SIGKILL, at once: raylet, agents and jobs. Returns their ids."""
        return self._kill(self._nodes[worker + 1])

    def restart(self, worker: int) -> None:
        """Start a worker node again whose processes have ended."""
        self._start_node(worker + 1)

    def cut_off(self, worker: int) -> None:
        """Take a worker node's network down; its processes go on, and are not told."""
        assert self.namespaces, "nodes that share an address cannot be cut off"
        _ip("-n", self._nodes[worker + 1], "link", "set", "eth0", "down")

    def reconnect(self, worker: int) -> None:
        """Bring the network of a worker node that was cut off up again."""
        _ip("-n", self._nodes[worker + 1], "link", "set", "eth0", "up")

    def processes(self, worker: int) -> dict[int, str]:
        """Processes of a worker node that are alive: id and command line."""
        return _processes_of(self._nodes[worker + 1])

    def stop(self) -> None:
        """End every process of the cluster, what was started on its head included, and take its network down."""
        for node in reversed(self._nodes):
            self._kill(node)
        if self.namespaces:
            for node in self._nodes:  # with the namespace go its interfaces, the bridge of the head's too
                subprocess.run(["ip", "netns", "delete", node], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _address(self, number: int) -> str:
        return f"10.213.77.{number + 1}" if self.namespaces else "127.0.0.1"

    def _inside(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", self._nodes[number]] if self.namespaces else []

    def _environment(self, number: int) -> dict[str, str]:
        token = self.folder / "token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
        ours = {
            # By which a node's processes are found; what Ray starts inherits it.
            "CLUSTER_NODE": self._nodes[number],
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": "",
            "RAY_DEDUP_LOGS": "0",
        }
        return {**os.environ, **FAST_DETECTION, **ours}

    def _make_network(self) -> None:
        """A bridge in the head's namespace, and a pair of interfaces from it to each worker's."""
        for node in self._nodes:
            _ip("netns", "add", node)
            _ip("-n", node, "link", "set", "lo", "up")
        head = self._nodes[0]
        _ip("-n", head, "link", "add", "bridge", "type", "bridge")
        _ip("-n", head, "address", "add", f"{self._address(0)}/24", "dev", "bridge")
        _ip("-n", head, "link", "set", "bridge", "up")
        for number, node in enumerate(self._nodes[1:], 1):
            port = f"port{number}"
            _ip("-n", head, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", node)
            _ip("-n", head, "link", "set", port, "master", "bridge", "up")
            _ip("-n", node, "address", "add", f"{self._address(number)}/24", "dev", "eth0")
            _ip("-n", node, "link", "set", "eth0", "up")

    def _start_node(self, number: int) -> None:
        of_head = ["--head", f"--port={self._port}", "--include-dashboard=false"]
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start"),
            *(of_head if number == 0 else [f"--address={self.address}"]),
            f"--node-ip-address={self._address(number)}",
            f"--num-cpus={int(number > 0)}",
            "--num-gpus=0",
            f"--object-store-memory={80 * 2**20}",
            "--disable-usage-stats",
            f"--temp-dir={self.folder / str(number)}",
        ]
        log = self.folder / f"start-{number}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*self._inside(number), *command], env=self._environment(number), stdout=file, stderr=file
            )
            if process.wait(120):
                raise RuntimeError(f"node {number} did not start:\n{log.read_text()}")

    def _wait_for_nodes(self, seconds: float = 60) -> None:
        program = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(len(ray.nodes()))"
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            asking = self.start(
                [sys.executable, "-c", program, self.address], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            out, _ = asking.communicate(timeout=60)
            if out.strip() == str(len(self._nodes)):
                return
        raise RuntimeError(f"not all {len(self._nodes)} nodes came up in {seconds:.0f} s")

    def _kill(self, node: str) -> list[int]:
        ended: list[int] = []
        # Again until none is left: a process may start another one while it is looked for.
        while processes := _processes_of(node):
            for process in processes:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            ended += processes
            time.sleep(0.05)
        return sorted(set(ended))


def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces, and the program ``ip`` is there."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"iql{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return made


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _processes_of(node: str) -> dict[int, str]:
    mark, found = f"CLUSTER_NODE={node}\0".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark not in (folder / "environ").read_bytes() + b"\0":
                continue
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found
