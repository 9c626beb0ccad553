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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
        name: unlike the other nodes' names; letters, digits, ``-`` and ``_``; not ``link``, ``run`` or ``command``, the
            names of the federation's own processes.
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
            taken = ", ".join(map(repr, _OWN))
            raise ValueError(f"name must not be one of {taken}, got {self.name!r}: choose another one")
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
        accuracy: of the averaged model on MNIST's 10,000 test images; None if the app does not measure it.
        seconds: since the run began.
    """

    round: int
    rounds: int
    epsilons: dict[str, float]
    epsilons_by_state: dict[str, float]
    steps: dict[str, int]
    accuracy: float | None
    seconds: float


class _Local:
    """Processes of Flower on this machine, none of which outlives the ``with`` block; a subclass has ``_start``.

    A keeper process ends them all when this one closes its pipe, or dies.
    """

    def __init__(self, start_timeout: float):
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
        keeper = [sys.executable, "-m", "dpteach.flower.keeper", self._mark, str(self._home)]
        self._keeper = subprocess.Popen(keeper, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    start = __enter__  # for a notebook, whose cells share one federation: end it with close()

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End every process and remove the temporary folder. To close twice does no harm."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        keeper.communicate(timeout=30)  # closes the pipe
        if keeper.returncode:  # somebody killed the keeper
            end(self._mark)
            shutil.rmtree(self._home, ignore_errors=True)
        for process in self._processes.values():  # so that none stays as a zombie
            process.wait(30)

    def _start_link(self, option: str) -> None:
        door.make(self._home)
        self._port = _free_port()
        serve = [*self._at(self._port), "--disable-runtime-dependency-installation", option]
        self._spawn("link", "flower-superlink", *serve)
        certificate = json.dumps(str(self._home / door.CERTIFICATE))
        here = f'address = "127.0.0.1:{self._port}"\nroot-certificates = {certificate}\n'
        config = f'[superlink]\ndefault = "here"\n[superlink.here]\n{here}'
        (self._home / "config.toml").write_text(config, encoding="utf8")
        self._wait_for(lambda: _answers(self._port), "the SuperLink did not start")
        self._check_doors()

    def _at(self, port: int) -> list[str]:
        """Options of a command that listens at ``port``: on loopback, with TLS."""
        certificate, key = self._home / door.CERTIFICATE, self._home / door.KEY
        tls = [f"--ssl-ca-certfile={certificate}", f"--ssl-certfile={certificate}", f"--ssl-keyfile={key}"]
        return ["--host=127.0.0.1", f"--port={port}", *tls]

    def _check_doors(self) -> None:
        for port in {port for process in marked(self._mark) for port in _listening(process)}:
            if door.answers_strangers(port):
                raise RuntimeError(
                    f"The federation was ended: its port {port} answers people who have no certificate, so whoever has "
                    f"an account on this machine could run programs as you. Flower {version('flwr')} is unlike 1.41 "
                    "and 1.42, which can be closed."
                )

    def _spawn(self, name: str, *command: str) -> None:
        with (self._home / f"{name}.log").open("wb") as log:
            how = {**self._how(name, *command), "stdout": log, "stderr": log}
            self._processes[name] = subprocess.Popen(**how, start_new_session=True)

    def _flwr(self, *arguments: str) -> dict | None:
        """The JSON answer of a ``flwr`` command; None where it fails."""
        how = self._how("command", "flwr", *arguments, "--format", "json")
        try:
            return json.loads(subprocess.run(**how, capture_output=True, timeout=30, check=True).stdout)
        except (subprocess.SubprocessError, ValueError):
            return None

    def _how(self, name: str, command: str, *arguments: str) -> dict:
        """What ``subprocess`` needs to start one of Flower's commands."""
        environment = self._environment(name)
        path = shutil.which(command, path=environment["PATH"])
        if path is None:
            raise RuntimeError(f"{command} was not found. {MISSING}")
        return {"args": [path, *arguments], "env": environment, "cwd": self._home, "stdin": subprocess.DEVNULL}

    def _environment(self, name: str) -> dict[str, str]:
        # A SuperLink starts its helpers by name.
        folders = (str(self._home / door.COMMANDS), sysconfig.get_path("scripts"), os.environ.get("PATH", ""))
        return {key: value for key, value in os.environ.items() if key not in _COLOURS} | {
            "PATH": os.pathsep.join(folders),
            "FLWR_HOME": str(self._home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            door.VARIABLE: str(self._home),
            VARIABLE: f"{self._mark}/{name}",
        }

    def _wait_for(self, condition: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + self._start_timeout
        while not condition():
            self._check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{otherwise} within {self._start_timeout:g} s. {self._last_words('link')}")
            time.sleep(_POLL)

    def _check_open(self) -> None:
        if self._keeper is None:
            raise RuntimeError("The federation is closed: use it inside its with block.")
        self._check_alive()

    def _check_alive(self) -> None:
        for name, process in self._processes.items():
            if name == "run" or process.poll() is None:
                continue
            if name == "link":
                raise RuntimeError(f"The SuperLink has ended. {self._last_words(name)}")
            raise RuntimeError(
                f"The node {name!r} has ended in the middle of the work. Its ledger has what it was charged, also for "
                f"a round that did not finish. Start it again with restart({name!r})."
            )

    def _log(self, name: str) -> str:
        """What the process has printed so far."""
        file = self._home / f"{name}.log"
        return file.read_text(encoding="utf8", errors="replace") if file.exists() else ""

    def _last_words(self, name: str) -> str:
        stripped = (line.strip(" │╭╮╰╯─") for line in self._log(name).splitlines())  # Flower boxes its errors
        lines = [line for line in stripped if line]
        errors = [line for line in lines if "Error: " in line or "Exception: " in line]
        return f"Its last words: {errors[-1] if errors else ' '.join(lines[-3:])}" if lines else "It said nothing."

    def _lines(self, app: Path, config: dict, timeout: float, *options: str) -> Iterator[dict]:
        """The report of one run, line by line, as the server writes it."""
        self._check_open()
        self._runs += 1
        report = self._home / f"report-{self._runs}.jsonl"
        report.touch()
        settings = [f"--run-config={k}={json.dumps(v)}" for k, v in {"report": str(report), **config}.items()]
        self._spawn("run", "flwr", "run", str(app), "--stream", *options, *settings)
        read, to_stop = 0, None
        deadline = time.monotonic() + timeout + self._start_timeout
        try:
            while True:
                over = self._processes["run"].poll() is not None
                lines = report.read_text(encoding="utf8").split("\n")[:-1]  # whole lines only
                for line in map(json.loads, lines[read:]):
                    if "run" in line:
                        to_stop = str(line["run"])
                    elif "end" in line or "error" in line:
                        to_stop = None
                        if "error" in line:
                            raise RuntimeError(f"The run has stopped: {line['error']}")
                        return
                    else:
                        yield line
                    deadline = time.monotonic() + timeout
                read = len(lines)
                self._check_alive()
                if over:
                    raise RuntimeError(f"The run has ended early. {self._last_words('run')}")
                if time.monotonic() > deadline:
                    advice = "raise timeout, or look whether every node has enough memory."
                    raise TimeoutError(f"No round was finished within {timeout:g} s: {advice}")
                time.sleep(_POLL)
        finally:
            process = self._processes.pop("run")
            if to_stop is not None and self._processes["link"].poll() is None:
                self._flwr("stop", to_stop)
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
        super().__init__(start_timeout)
        self.nodes = {node.name: node for node in nodes}
        #: What has happened, in order: time (s since 1970), the node's name or "server", and "online", "charged" (its
        #: ledger's file says when), "averaged", "killed".
        self.events: list[tuple[float, str, str]] = []
        self._killing = threading.Lock()  # a node is not started again while the last one is still being killed
        if len(self.nodes) < max(2, len(nodes)):
            names = [node.name for node in nodes]
            raise ValueError(f"nodes must be at least two, each with a name of its own, got {names!r}")
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

    def rounds(
        self, rounds: int = 3, *, timeout: float = 120, app: str | os.PathLike = APP, **config
    ) -> Iterator[FederatedRound]:
        """Run some rounds of federated averaging from a new model, one :class:`FederatedRound` at a time.

        Args:
            rounds: >= 1.
            timeout: seconds for one round, >= 1.
            app: a folder with an app of your own, which is started as you, on each node. What it does is yours to
                answer for: that it charges the ledgers, and that it adds noise. Its server says what happens by
                :func:`dpteach.flower.server_app.reporting`.
            config: other keys of the app's ``pyproject.toml``, with ``_`` for ``-``: ``batch_size=64``,
                ``method="opacus"``.

        Raises:
            ValueError: if the app has no such key: what protects a node's records is its :class:`Node`'s to say.
            RuntimeError: if a node has ended, or refused; says which one and what to do. The ledgers stay as they are.
            TimeoutError: if a round takes longer than ``timeout``.
        """
        # The generator is another method, so that these errors come at the call.
        return self._rounds(Path(app).resolve(), *_run_config(app, rounds, timeout, len(self.nodes), config))

    def kill(self, name: str, *, in_next_round: bool = False) -> None:
        """SIGKILL the node ``name``, all of it, as a power cut would.

        Args:
            in_next_round: wait, in the background, until the node has charged its ledger once more, and kill it in the
                middle of that round.
        """
        name = self._known(name)
        if in_next_round:
            ledger = self.ledger(name)
            threading.Thread(target=self._kill_after_charge, args=(name, ledger, ledger.count), daemon=True).start()
        else:
            self._kill(name)

    def restart(self, name: str) -> None:
        """Start the node ``name`` again and wait until it is online.

        Raises:
            RuntimeError: if it is running.
            TimeoutError: if it is not online in time.
        """
        with self._killing:
            if self._processes[self._known(name)].poll() is None:
                raise RuntimeError(f"{name} is running: kill it first.")
            self._start_node(name)
        self._wait_online()
        self._note(name, "online")

    def _start(self) -> None:
        self._start_link("--enable-supernode-auth")
        if self._folder is None:
            self._make_ledgers()
        with ThreadPoolExecutor() as pool:  # Flower's commands take seconds to start
            list(pool.map(self._start_node, self.nodes))
        self._wait_online()

    def _start_node(self, name: str) -> None:
        own = {key: value for key, value in asdict(self.nodes[name]).items() if value is not None}
        config = {key: value if key == "name" else float(value) for key, value in _hyphenated(own).items()}
        config |= {"partition-id": list(self.nodes).index(name), "num-partitions": len(self.nodes)}
        config["ledger"] = str(self._ledger_file(name))
        # A key for each start: for about a minute the last one would still count as online.
        key = self._home / f"{uuid.uuid4().hex}.key"
        if self._flwr("supernode", "register", str(door.make_node_key(key))) is None:
            raise RuntimeError(f"The SuperLink did not register {name}'s key. {self._last_words('link')}")
        self._spawn(
            name,
            "flower-supernode",
            *self._at(_free_port()),
            f"--superlink=127.0.0.1:{self._port}",
            f"--root-certificates={self._home / door.CERTIFICATE}",
            f"--auth-supernode-private-key={key}",
            "--node-config=" + " ".join(f"{k}={json.dumps(v)}" for k, v in config.items()),
        )

    def _wait_online(self) -> None:
        self._wait_for(lambda: all(map(self._id, self.nodes)), f"the nodes {', '.join(self.nodes)} were not online")
        self._check_doors()

    def _id(self, name: str) -> str | None:
        """The number under which the SuperLink knows the node: a new one after each start. None before it is online.

        The SuperLink believes for about a minute that a killed node is alive; so the run gets these numbers.
        """
        found = re.search(r"SuperNode ID: (\d+)", self._log(name))
        return found and found.group(1)

    def _rounds(self, app: Path, config: dict, timeout: float) -> Iterator[FederatedRound]:
        self._check_open()
        if "nodes" in config:
            config["nodes"] = ",".join(map(self._id, self.nodes))
        made = 0
        for line in self._lines(app, config, timeout):
            made += 1
            self._note("server", "averaged")
            kept = (
                {name: line[f"{key}/{name}"] for name in self.nodes if f"{key}/{name}" in line}
                for key in ("epsilon", "epsilon-by-state", "steps")
            )
            yield FederatedRound(line["round"], line["rounds"], *kept, line.get("accuracy"), line["seconds"])
        if made < config["num-server-rounds"]:  # Flower's own strategy goes on where clients fail
            told = "; ".join(f"{name}: {self._last_words(name)}" for name in self.nodes)
            raise RuntimeError(f"The run ended after {made} of {config['num-server-rounds']} rounds. {told}")

    def _note(self, who: str, what: str) -> None:
        """Write down an event, and before it the charges that no event has told yet."""
        for name in self.nodes:
            with contextlib.suppress(OSError, ValueError):  # gone, or damaged
                charged = (self._ledger_file(name).stat().st_mtime, name, "charged")
                if charged not in self.events and self.ledger(name).count:
                    self.events.append(charged)
        self.events = sorted([*self.events, (time.time(), who, what)])

    def _kill(self, name: str) -> None:
        with self._killing:
            self._processes[name].kill()  # first the one through which every answer goes
            end(f"{self._mark}/{name}", patience=0)
            self._processes[name].wait(10)
            self._note(name, "killed")

    def _kill_after_charge(self, name: str, ledger: Ledger, charges: int) -> None:
        while self._keeper is not None and ledger.count <= charges:
            time.sleep(0.005)
        if self._keeper is not None:
            self._kill(name)

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
        super().__init__(start_timeout)
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

        config = _hyphenated({"privacy": "sample", **config})
        theirs = {key: config.pop(key) for key in ONLY_THE_NODES & config.keys()}
        config, timeout = _run_config(APP, rounds, timeout, self.clients, config)
        theirs |= {"ledgers": str(self._home), "privacy": config["privacy"]}
        (self._home / "nodes.json").write_text(json.dumps(theirs), encoding="utf8")
        engine = f"num-supernodes={self.clients} client-resources-num-cpus=1"
        return self._lines(APP, config, timeout, "--federation-config", engine)

    def _environment(self, name: str) -> dict[str, str]:
        from dpteach.flower.client_app import VARIABLE as NODES

        # Ray's ports are open to the whole network: whoever reaches them runs programs as you, but for a token.
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        return {**super()._environment(name), **ray, NODES: str(self._home / "nodes.json")}

    def _start(self) -> None:
        for client in range(self.clients):
            Ledger(self._home / f"client-{client:02d}.json", new=True)
        self._start_link("--simulation")


def _hyphenated(config: dict) -> dict:
    return {key.replace("_", "-"): value for key, value in config.items()}


def _run_config(app: str | os.PathLike, rounds: int, timeout: float, nodes: int, config: dict) -> tuple[dict, float]:
    """What a run is told, and the limit of a round: the standard keys that the app has, and ``config``."""
    import tomllib  # since Python 3.11, as Flower

    keys = tomllib.loads(Path(app, "pyproject.toml").read_text(encoding="utf8"))["tool"]["flwr"]["app"]["config"]
    config, timeout = _hyphenated(config), number("timeout", timeout, low=1)
    needed = {"num-server-rounds": whole("rounds", rounds, low=1), "report": ""}
    for key in config | needed:
        if key not in keys:
            known = ", ".join(keys)
            raise ValueError(f"config must name keys of the app's pyproject.toml, got {key!r}: these are {known}")
    standard = {
        "num-server-rounds": needed["num-server-rounds"],
        "round-timeout": timeout,
        "num-nodes": nodes,
        "nodes": "",
    }
    return {key: value for key, value in standard.items() if key in keys} | config, timeout


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
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
