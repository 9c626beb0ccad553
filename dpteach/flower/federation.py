"""A federation on this machine: SuperLink and SuperNodes on loopback ports, started, watched and ended."""

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from dpteach._checks import number, whole
from dpteach.accounting import Ledger
from dpteach.flower import APP, MISSING, door, installed
from dpteach.flower.keeper import VARIABLE, end, marked

_POLL = 0.1  # seconds between two looks at the processes
_COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE")  # a Jupyter kernel sets them: then Flower colours its JSON too
_OWN = ("link", "run", "command")  # names of processes that are no nodes
_WINDOWS = os.name == "nt"


@dataclass(frozen=True)
class Node:
    """A client with records of its own.

    Args:
        name: unlike the other nodes' names; letters, digits, ``-`` and ``_``; not ``link``, ``run`` or ``command``,
            which the federation's own processes are called.
        noise_multiplier: σ >= 0.
        max_grad_norm: C > 0.
        target_delta: δ in (0, 1).
        max_epsilon: the node refuses a round after which its ε would be larger; None for no limit.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name: str
    noise_multiplier: float = 1.3
    max_grad_norm: float = 1.0
    target_delta: float = 1e-5
    max_epsilon: float | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"name must be letters, digits, '-' and '_', got {self.name!r}")
        if self.name in _OWN:
            raise ValueError(
                f"name must not be one of {', '.join(map(repr, _OWN))}, got {self.name!r}: choose another one"
            )
        number("noise_multiplier", self.noise_multiplier, low=0)
        number("max_grad_norm", self.max_grad_norm, low=0, above=True)
        number("target_delta", self.target_delta, low=0, above=True, high=1)
        if self.max_epsilon is not None:
            number("max_epsilon", self.max_epsilon, low=0)


@dataclass(frozen=True)
class FederatedRound:
    """What the server knows after a round.

    Attributes:
        round: 1, 2, … ``rounds``.
        rounds: how many the run has.
        epsilons: by node's name: ε of everything in its ledger, by RDP, as the node reported it. Not to be summed or
            averaged.
        epsilons_by_state: the same from the memory that Flower keeps for a run (``Context.state``): too small after a
            restart or in a second run.
        steps: by node's name: all steps that its ledger has.
        accuracy: of the averaged model on MNIST's 10,000 test images.
        seconds: since the run began.
    """

    round: int
    rounds: int
    epsilons: dict[str, float]
    epsilons_by_state: dict[str, float]
    steps: dict[str, int]
    accuracy: float
    seconds: float


class _Local:
    """Processes of Flower on this machine, and the promise that none of them outlives the ``with`` block.

    A keeper process ends them all when this one closes its pipe, or dies.
    """

    def __init__(self, *, start_timeout: float):
        if not installed():
            raise RuntimeError(MISSING)
        if _WINDOWS:  # it starts NAME.exe there, and never the scripts that door.make writes
            raise RuntimeError(
                "A federation on one machine runs on Linux and macOS, got Windows: there Flower starts its helpers "
                "past the door that keeps other accounts out. Use Linux, for example in WSL."
            )
        self._start_timeout = number("start_timeout", start_timeout, low=0, above=True)
        self._keeper: subprocess.Popen | None = None
        self._processes: dict[str, subprocess.Popen] = {}
        self._runs = 0

    def __enter__(self):
        self._mark = uuid.uuid4().hex
        self._home = Path(tempfile.mkdtemp(prefix="dpteach-federation-"))  # for the owner's eyes only (0700)
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "dpteach.flower.keeper", self._mark, str(self._home)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End every process and remove the temporary folder. To close twice does no harm."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        keeper.stdin.close()
        keeper.wait(30)
        if keeper.returncode:  # somebody killed the keeper
            end(self._mark)
            shutil.rmtree(self._home, ignore_errors=True)
        for process in self._processes.values():  # so that none stays as a zombie
            process.wait(30)

    def _start(self) -> None:
        raise NotImplementedError

    def _start_link(self, *options: str) -> None:
        door.make(self._home)
        self._port = _free_port()
        self._spawn(
            "link",
            "flower-superlink",
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            *self._tls(),
            "--disable-runtime-dependency-installation",
            *options,
        )
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self._port}"\n'
            f"root-certificates = {json.dumps(str(self._home / door.CERTIFICATE))}\n",
            encoding="utf8",
        )
        self._wait_for(lambda: _answers(self._port), "the SuperLink did not start")
        self._check_doors()

    def _tls(self) -> list[str]:
        certificate, key = (str(self._home / name) for name in (door.CERTIFICATE, door.KEY))
        return ["--ssl-ca-certfile", certificate, "--ssl-certfile", certificate, "--ssl-keyfile", key]

    def _check_doors(self) -> None:
        for process in marked(self._mark):
            for port in _listening(process):
                if door.answers_strangers(port):
                    raise RuntimeError(
                        f"The federation was ended: its port {port} answers people who have no certificate, so whoever "
                        f"has an account on this machine could run programs as you. Flower {version('flwr')} is unlike "
                        "1.41 and 1.42, which can be closed."
                    )

    def _spawn(self, name: str, command: str, *options: str) -> None:
        with (self._home / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [self._command(command), *options],
                env=self._environment(name),
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _environment(self, name: str) -> dict[str, str]:
        # A SuperLink starts its helpers by name.
        scripts = f"{self._home / door.COMMANDS}{os.pathsep}{sysconfig.get_path('scripts')}"
        inherited = {key: value for key, value in os.environ.items() if key not in _COLOURS}
        return {
            **inherited,
            "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self._home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            door.VARIABLE: str(self._home),
            VARIABLE: f"{self._mark}/{name}",
        }

    def _command(self, name: str) -> str:
        found = shutil.which(name, path=self._environment(name)["PATH"])
        if found is None:
            raise RuntimeError(f"{name} was not found. {MISSING}")
        return found

    def _flwr(self, *arguments: str) -> dict | None:
        """The JSON answer of a ``flwr`` command; None where it fails."""
        try:
            made = subprocess.run(
                [self._command("flwr"), *arguments],
                env=self._environment("command"),
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf8",
                timeout=30,
            )
            return json.loads(made.stdout) if made.returncode == 0 else None
        except (subprocess.TimeoutExpired, ValueError):
            return None

    def _wait_for(self, condition, otherwise: str) -> None:
        deadline = time.monotonic() + self._start_timeout
        while not condition():
            self._raise_if_one_ended()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{otherwise} within {self._start_timeout:g} s. {self._last_words()}")
            time.sleep(_POLL)

    def _check_open(self) -> None:
        if self._keeper is None:
            raise RuntimeError("The federation is closed: use it inside its with block.")
        self._raise_if_one_ended()

    def _raise_if_one_ended(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None and name != "run":
                raise RuntimeError(self._epitaph(name))

    def _epitaph(self, name: str) -> str:
        return f"The SuperLink has ended. {self._last_words(name)}"

    def _last_words(self, name: str = "link") -> str:
        log = self._home / f"{name}.log"
        lines = (
            [line for line in log.read_text(encoding="utf8", errors="replace").splitlines() if line.strip()]
            if log.exists()
            else []
        )
        telling = [line for line in lines if "Error: " in line or "Exception: " in line] or lines
        return f"Its last words: {telling[-1].strip()}" if telling else "It said nothing."

    def _lines(self, rounds: int, timeout: float, config: dict, *options: str) -> Iterator[dict]:
        """The report of one run, line by line, as the server writes it."""
        self._check_open()
        self._runs += 1
        report = self._home / f"report-{self._runs}.jsonl"
        changed = {"num-server-rounds": rounds, "round-timeout": timeout, "report": str(report), **config}
        self._spawn(
            "run",
            "flwr",
            "run",
            str(APP),
            "--stream",
            *options,
            *(f"--run-config={key}={json.dumps(value)}" for key, value in changed.items()),
        )
        read, run_id, ended = 0, None, False
        deadline = time.monotonic() + timeout + self._start_timeout
        try:
            while True:
                over = self._processes["run"].poll() is not None
                lines = (
                    report.read_text(encoding="utf8").split("\n")[:-1] if report.exists() else []
                )  # whole lines only
                for line in map(json.loads, lines[read:]):
                    deadline = time.monotonic() + timeout
                    if "run" in line:
                        run_id = str(line["run"])
                    elif "error" in line:
                        raise RuntimeError(f"The run has stopped: {line['error']}")
                    elif "end" in line:
                        ended = True
                        return
                    else:
                        yield line
                        deadline = time.monotonic() + timeout
                read = len(lines)
                self._raise_if_one_ended()
                if over:
                    raise RuntimeError(f"The run has ended early. {self._last_words('run')}")
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"No round was finished within {timeout:g} s: raise timeout, or look whether every node has "
                        "enough memory."
                    )
                time.sleep(_POLL)
        finally:
            self._end_run(run_id, ended)

    def _end_run(self, run_id: str | None, ended: bool) -> None:
        process = self._processes.pop("run")
        if ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        elif run_id is not None and self._processes["link"].poll() is None:
            self._flwr("stop", run_id, "--format", "json")
        end(f"{self._mark}/run", 1)
        process.wait(10)


class Federation(_Local):
    """Nodes on this machine, each with processes, a port and a ledger of its own: a context manager.

    The nodes have registered keys, and each port wants the certificate of this federation: it is closed to other
    accounts of the machine.

    Args:
        nodes: two or more, with different names; each gets its part of MNIST.
        folder: where the ledgers are, ``NAME.json`` each; they are kept. A new node's is made now; one that is gone
            later is an error, not a new one. Without ``folder`` they are in a temporary folder that is removed at the
            end: right for a lesson only.
        start_timeout: seconds within which all nodes must be online.

    Raises:
        ValueError: if the names are not different, or ``folder`` does not exist, or a ledger in it is damaged.
        RuntimeError: at ``with``, if Flower is not installed, or a process does not start.
        TimeoutError: at ``with``, if the nodes are not online in time.
    """

    def __init__(self, nodes: Sequence[Node], folder: str | os.PathLike | None = None, *, start_timeout: float = 90):
        super().__init__(start_timeout=start_timeout)
        self.nodes = {node.name: node for node in nodes}
        self._killing = threading.Lock()  # a node is not started again while the last one is still being killed
        if len(self.nodes) < 2 or len(self.nodes) < len(nodes):
            raise ValueError(
                f"nodes must be at least two, each with a name of its own, got {[n.name for n in nodes]!r}"
            )
        self._folder = None if folder is None else Path(folder).resolve()
        if self._folder is not None:
            if not self._folder.is_dir():
                raise ValueError(f"folder must be a folder that exists, got {str(folder)!r}")
            self._make_ledgers()

    def ledger(self, name: str) -> Ledger:
        """The ledger of the node ``name``, as it is now.

        Raises:
            RuntimeError: without a ``folder``, outside the ``with`` block: then there is none. It is not an empty one.
        """
        if self._folder is None and self._keeper is None:
            raise RuntimeError(
                "Without a folder the ledgers end with the federation: give Federation a folder to keep them."
            )
        return Ledger(self._ledger_file(name))

    def _ledger_file(self, name: str) -> Path:
        return (self._folder or self._home) / f"{self._known(name)}.json"

    def _make_ledgers(self) -> None:
        for name in self.nodes:
            file = self._ledger_file(name)
            before = file.with_suffix(".started")  # it stays: a ledger that is gone is not one that was never there
            Ledger(file, new=not file.exists() and not before.exists())  # a damaged one is an error now
            before.touch()

    def rounds(self, rounds: int = 3, *, timeout: float = 120, **config) -> Iterator[FederatedRound]:
        """Run some rounds of federated averaging from a new model, one :class:`FederatedRound` at a time.

        Args:
            rounds: >= 1.
            timeout: seconds for one round, >= 1.
            config: other keys of the app's ``pyproject.toml``, with ``_`` for ``-``: ``batch_size=64``,
                ``method="opacus"``.

        Raises:
            ValueError: if the app has no such key: what protects a node's records is its :class:`Node`'s to say.
            RuntimeError: if a node has ended, or refused; says which one and what to do. The ledgers stay as they are.
            TimeoutError: if a round takes longer than ``timeout``.
        """
        rounds, timeout = whole("rounds", rounds, low=1), number("timeout", timeout, low=1)
        return self._rounds(
            rounds, timeout, _run_config({"num_nodes": len(self.nodes), **config})
        )  # so errors come at the call

    def kill(self, name: str, *, in_next_round: bool = False) -> None:
        """SIGKILL the node ``name``, all of it, as a power cut would.

        Args:
            name: of a node.
            in_next_round: wait, in the background, until the node has charged its ledger once more, and kill it in the
                middle of that round.
        """
        known = self._known(name)
        if in_next_round:
            ledger = self.ledger(known)
            threading.Thread(
                target=self._kill_after_charge, args=(known, ledger, len(ledger.charges)), daemon=True
            ).start()
        else:
            self._kill(known)

    def restart(self, name: str) -> None:
        """Start the node ``name`` again and wait until it is online.

        Raises:
            RuntimeError: if it is running.
            TimeoutError: if it is not online in time.
        """
        node = self._known(name)
        with self._killing:
            if self._processes[node].poll() is None:
                raise RuntimeError(f"{node} is running: kill it first.")
            self._start_node(node)
        self._wait_online()

    def _start(self) -> None:
        self._start_link("--enable-supernode-auth")
        if self._folder is None:
            self._make_ledgers()
        for name in self.nodes:
            self._start_node(name)
        self._wait_online()

    def _start_node(self, name: str) -> None:
        node = self.nodes[name]
        config = {
            "name": name,
            "partition-id": list(self.nodes).index(name),
            "num-partitions": len(self.nodes),
            "noise-multiplier": float(node.noise_multiplier),
            "max-grad-norm": float(node.max_grad_norm),
            "target-delta": float(node.target_delta),
            "ledger": str(self._ledger_file(name)),
        }
        if node.max_epsilon is not None:
            config["max-epsilon"] = float(node.max_epsilon)
        key = (
            self._home / f"{uuid.uuid4().hex}.key"
        )  # one a start: for about a minute the old one would count as online
        if self._flwr("supernode", "register", str(door.make_node_key(key)), "--format", "json") is None:
            raise RuntimeError(f"The SuperLink did not register {name}'s key. {self._last_words()}")
        self._spawn(
            name,
            "flower-supernode",
            "--superlink",
            f"127.0.0.1:{self._port}",
            "--host",
            "127.0.0.1",
            "--port",
            str(_free_port()),
            "--root-certificates",
            str(self._home / door.CERTIFICATE),
            *self._tls(),
            "--auth-supernode-private-key",
            str(key),
            "--node-config",
            " ".join(f"{k}={json.dumps(v)}" for k, v in config.items()),
        )

    def _wait_online(self) -> None:
        self._wait_for(lambda: all(map(self._id, self.nodes)), f"the nodes {', '.join(self.nodes)} were not online")
        self._check_doors()

    def _id(self, name: str) -> str | None:
        """The number under which the SuperLink knows the node: a new one after each start. None before it is online.

        The SuperLink believes for about a minute that a killed node is alive; so the run is told which ones are.
        """
        told = re.search(
            r"SuperNode ID: (\d+)", (self._home / f"{name}.log").read_text(encoding="utf8", errors="replace")
        )
        return told and told.group(1)

    def _rounds(self, rounds: int, timeout: float, config: dict) -> Iterator[FederatedRound]:
        self._check_open()
        config = {**config, "nodes": ",".join(map(self._id, self.nodes))}
        for line in self._lines(rounds, timeout, config):

            def of_each(key: str, line=line) -> dict:
                return {name: line[f"{key}/{name}"] for name in self.nodes}

            yield FederatedRound(
                line["round"],
                line["rounds"],
                of_each("epsilon"),
                of_each("epsilon-by-state"),
                of_each("steps"),
                line["accuracy"],
                line["seconds"],
            )

    def _kill(self, name: str) -> None:
        with self._killing:
            self._processes[name].kill()  # first the one through which every answer goes
            end(f"{self._mark}/{name}", patience=0)
            self._processes[name].wait(10)

    def _kill_after_charge(self, name: str, ledger: Ledger, charges: int) -> None:
        while self._keeper is not None and len(ledger.charges) <= charges:
            time.sleep(0.005)
        if self._keeper is not None:
            self._kill(name)

    def _epitaph(self, name: str) -> str:
        if name == "link":
            return super()._epitaph(name)
        return (
            f"The node {name!r} has ended in the middle of the work. Its ledger has what it was charged, also for a "
            f"round that did not finish. Start it again with restart({name!r})."
        )

    def _known(self, name: str) -> str:
        if name not in self.nodes:
            raise ValueError(f"name must be one of {', '.join(map(repr, self.nodes))}, got {name!r}")
        return name


class Simulation(_Local):
    """Many virtual clients in a few processes, on Flower's Ray engine: a context manager.

    Flower's port wants a certificate, as in :class:`Federation`. Ray's ports are open to the network and want a token;
    we have not tried each of them: not on a host that you share.

    Args:
        clients: how many, >= 2; each has its part of MNIST, its name ``client-00``, ``client-01``, … and its ledger.
        start_timeout: seconds within which Flower must be up.

    Raises:
        ValueError: if ``clients`` is not a whole number >= 2.
        RuntimeError: if Flower or Ray is not installed, or a process does not start.
    """

    def __init__(self, clients: int, *, start_timeout: float = 90):
        super().__init__(start_timeout=start_timeout)
        self.clients = whole("clients", clients, low=2)
        self._token = secrets.token_hex(32)
        if importlib.util.find_spec("ray") is None:
            raise RuntimeError("Flower's simulation is not installed: pip install 'flwr[simulation]>=1.41'.")

    def rounds(self, rounds: int = 3, *, timeout: float = 600, **config) -> Iterator[dict]:
        """As :meth:`Federation.rounds`; each round is the dict that the server reports.

        Args:
            config: also what each client decides for itself: ``noise_multiplier``, ``max_grad_norm``, ``target_delta``,
                ``max_epsilon``. With ``privacy="client"`` all of them agree to it, and their ledgers' ε is infinite
                from then on.
        """
        from dpteach.flower.client_app import ONLY_THE_NODES

        rounds, timeout = whole("rounds", rounds, low=1), number("timeout", timeout, low=1)
        theirs = {
            key.replace("_", "-"): config.pop(key) for key in list(config) if key.replace("_", "-") in ONLY_THE_NODES
        }
        config = _run_config({"num_nodes": self.clients, "privacy": "sample", **config})
        theirs |= {"ledgers": str(self._home), "privacy": config["privacy"]}
        (self._home / "nodes.json").write_text(json.dumps(theirs), encoding="utf8")
        return self._lines(
            rounds, timeout, config, "--federation-config", f"num-supernodes={self.clients} client-resources-num-cpus=1"
        )

    def _environment(self, name: str) -> dict[str, str]:
        from dpteach.flower.client_app import VARIABLE as NODES

        # Ray's ports are open to the whole network, and whoever reaches them runs programs as you, unless a token is
        # asked for.
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        return {**super()._environment(name), **ray, NODES: str(self._home / "nodes.json")}

    def _start(self) -> None:
        for client in range(self.clients):
            Ledger(self._home / f"client-{client:02d}.json", new=True)
        self._start_link("--simulation")


def _run_config(config: dict) -> dict:
    import tomllib  # since Python 3.11, as Flower

    allowed = tomllib.loads((APP / "pyproject.toml").read_text(encoding="utf8"))["tool"]["flwr"]["app"]["config"]
    asked = {key.replace("_", "-"): value for key, value in config.items()}
    for key in asked.keys() - allowed.keys():
        raise ValueError(
            f"config must name keys of the app's pyproject.toml, got {key!r}: these are {', '.join(allowed)}"
        )
    return asked


def _listening(process: psutil.Process) -> list[int]:
    try:
        connections = getattr(process, "net_connections", None) or process.connections  # psutil 6, 5
        return [c.laddr.port for c in connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:  # it has just ended
        return []


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
