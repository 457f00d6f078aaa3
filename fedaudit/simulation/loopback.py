"""A real deployment on this machine: one SuperLink and several SuperNodes that talk over 127.0.0.1.

    python -m fedaudit.simulation.loopback quickstart --output runs --set audit.observers=server

It is what a deployment over several machines is, processes and protocol included, without encryption and
with every node on one machine: for tests and rehearsals, not for private data. A round takes about six
seconds whatever the model, for Flower polls and starts a process per message.
"""

import argparse
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedaudit.config import RunConfig, load_config
from fedaudit.config.overrides import parse_override
from fedaudit.errors import ConfigError, FedauditError, RunFailedError
from fedaudit.progress import announce
from fedaudit.records import Run, load_run, write_json
from fedaudit.report.page import write_report
from fedaudit.report.tables import records_summary
from fedaudit.simulation.flower_app import flat_toml, write_app
from fedaudit.simulation.processes import Processes, answer_of

logger = logging.getLogger(__name__)
HOST = "127.0.0.1"
COMMANDS = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr")
_START_SECONDS, _COMMAND_SECONDS, _LOG_LINES = 120.0, 120.0, 40
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_CONNECTION = '[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "{}"\ninsecure = true\n'


def run_on_loopback(
    config: RunConfig, folder: Path, nodes: int = 2, port: int = 0, timeout: float | None = None
) -> Run:
    """Deploy the reference app on this machine, run it to its end, and write records, summary and report.

    The logs of SuperLink and SuperNodes are kept in ``folder/logs``. Every process that was started has ended
    when this returns or raises, Ctrl-C included; only a kill that cannot be caught leaves them behind.

    Args:
        config: what to run; its federation.engine, federation.clients and output are set from the arguments.
        folder: the run's folder, which must not hold a run yet.
        nodes: number of SuperNodes, one partition each.
        port: the SuperLink's port; SuperNode i takes ``port + 1 + i``. 0 takes free ones.
        timeout: seconds after which the run is stopped; None allows each round federation.round-timeout.

    Raises:
        ConfigError: if the configuration cannot be deployed (an oracle, a resumed run), the folder holds a
            run, or Flower's commands are not installed.
        RunFailedError: if the deployment did not start, failed, or took too long; with the end of the log.
    """
    folder, started = folder.resolve(), time.perf_counter()
    config = deployed(config, folder, nodes)
    if timeout is None:
        timeout = _START_SECONDS + config.federation.rounds * config.federation.round_timeout
    with tempfile.TemporaryDirectory(prefix="fedaudit-", ignore_cleanup_errors=True) as temporary:
        home = Path(temporary)
        environment = flower_environment(home)
        ports = [port + i for i in range(nodes + 1)] if port else free_ports(nodes + 1)
        address = f"{HOST}:{ports[0]}"
        (home / "config.toml").write_text(_CONNECTION.format(address), encoding="utf-8")
        (home / "run.toml").write_text(flat_toml(config.flat()), encoding="utf-8")
        app = write_app(home / "fedaudit")
        with Processes(folder / "logs", environment) as processes:
            _start(processes, ports)
            run_id = _submit(app, environment)
            _watch(run_id, config, folder, processes, started + timeout)
        logger.info("the deployment has ended and left no process")
    run = load_run(folder)
    seconds = time.perf_counter() - started
    write_json(folder / "summary.json", {**records_summary(run.records), "total-seconds": seconds})
    run = load_run(folder)
    write_report([run], folder / "report.html")
    return run


def deployed(config: RunConfig, folder: Path, nodes: int) -> RunConfig:
    """The configuration every process of the deployment reads; its paths do not depend on where it runs."""
    if config.output.resume:
        raise ConfigError(
            "a run is resumed by the in-process engine only, got federation.engine='deployment': "
            "set output.resume=false or federation.engine='in-process'"
        )
    if any((folder / "audit").glob("round-*.parquet")):
        raise ConfigError(f"a run keeps a folder of its own, got {folder} which holds one: choose another")
    places = {
        "federation.engine": "deployment",
        "federation.clients": nodes,
        "output.directory": str(folder.parent),
        "output.name": folder.name,
        "data.root": str(Path(config.data.root).expanduser().resolve()),
    }
    return RunConfig.from_flat({**config.flat(), **places})


def flower_environment(home: Path) -> dict[str, str]:
    """Environment of Flower's commands: its files in `home`, nothing outbound, nothing through a proxy.

    Raises:
        ConfigError: if one of the commands is not found.
    """
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, **_ENVIRONMENT, "FLWR_HOME": str(home)}
    environment["PATH"] = os.pathsep.join(filter(None, (scripts, os.environ.get("PATH"))))
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, (HOST, os.environ.get(name))))
    for command in COMMANDS:
        if shutil.which(command, path=environment["PATH"]) is None:
            raise ConfigError(
                f"a deployment needs Flower's commands, got no {command!r} in {scripts} or on the PATH: "
                "pip install 'flwr[simulation]'"
            )
    return environment


def free_ports(count: int) -> list[int]:
    """Distinct ports of the loopback interface that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def ask_flower(environment: Mapping[str, str], *arguments: str) -> str:
    """What ``flwr`` prints.

    Raises:
        RunFailedError: if it fails or hangs.
    """
    # with the whole path, for Popen looks a command up in this process's PATH
    command = [shutil.which("flwr", path=environment["PATH"]) or "flwr", *arguments]
    try:
        code, output, errors = answer_of(command, environment, _COMMAND_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RunFailedError(
            f"'flwr {arguments[0]}' must answer within {_COMMAND_SECONDS:.0f} s, it did not: try again"
        ) from error
    if code:
        raise RunFailedError(f"'flwr {arguments[0]}' failed: {_tail(output + errors)}")
    return output


def run_status(environment: Mapping[str, str], run_id: str) -> tuple[str, str]:
    """Status of a run, such as "running" or "finished:failed", and its details."""
    answer = json.loads(ask_flower(environment, "list", "--run-id", run_id, "--format", "json"))
    (row,) = answer.get("runs") or [{"status": "unknown"}]
    return row["status"], row.get("status-details", "")


def _start(processes: Processes, ports: Sequence[int]) -> None:
    where = processes.environment["PATH"]
    superlink, supernode = (str(shutil.which(command, path=where)) for command in COMMANDS[:2])
    link, *nodes = ports
    processes.start("superlink", superlink, "--insecure", "--host", HOST, "--port", str(link))
    deadline = time.monotonic() + _START_SECONDS
    while not _is_healthy(link):
        _complain_if_ended(processes)
        if time.monotonic() > deadline:
            raise RunFailedError(
                f"the SuperLink must be up within {_START_SECONDS:.0f} s, it was not: "
                f"{_tail(_text(processes.log('superlink')))}"
            )
        time.sleep(0.1)
    for i, node in enumerate(nodes):
        place = f"partition-id={i} num-partitions={len(nodes)}"
        link_options = ("--insecure", "--superlink", f"{HOST}:{link}")
        own_options = ("--host", HOST, "--port", str(node), "--node-config", place)
        processes.start(f"supernode-{i}", supernode, *link_options, *own_options)
    processes.look()


def _submit(app: Path, environment: Mapping[str, str]) -> str:
    config = str(Path(environment["FLWR_HOME"]) / "run.toml")
    printed = ask_flower(environment, "run", str(app), "loopback", "--run-config", config, "--format", "json")
    answer = json.loads(printed)
    if not answer.get("success"):
        raise RunFailedError(f"the SuperLink must take the app, it did not: {_tail(printed)}")
    return str(answer["run-id"])


def _watch(run_id: str, config: RunConfig, folder: Path, processes: Processes, deadline: float) -> None:
    """Wait for the end; a status costs a process, so it is asked for seldom until the weights are there."""
    rounds, heard = config.federation.rounds, 0
    announce("run", 0, rounds, 0, name=folder.name, clients=config.federation.clients)
    asked = time.perf_counter()
    while True:
        processes.look()
        _complain_if_ended(processes)
        written = len(list((folder / "audit").glob("round-*.parquet"))) - 1  # one is of round 0
        for number in range(heard + 1, written + 1):
            announce("round", number, rounds, number)
        heard = max(heard, written)
        if time.perf_counter() - asked > (1.0 if (folder / "weights.safetensors").exists() else 10.0):
            if _has_completed(run_id, folder, processes):
                return
            asked = time.perf_counter()
        if time.perf_counter() > deadline:
            raise RunFailedError(
                f"the run in {folder} must end within the timeout, it did {heard} of {rounds} rounds: "
                f"raise the timeout; the logs are in {processes.logs}"
            )
        time.sleep(0.5)


def _has_completed(run_id: str, folder: Path, processes: Processes) -> bool:
    status, details = run_status(processes.environment, run_id)
    if status.startswith("finished") and status != "finished:completed":
        log = _tail(ask_flower(processes.environment, "log", run_id, "--show"))
        raise RunFailedError(
            f"the run in {folder} must end as 'finished:completed', got {status!r}, {details}: read the end "
            f"of its log below, and the nodes' logs in {processes.logs}\n{log}"
        )
    return status == "finished:completed"


def _complain_if_ended(processes: Processes) -> None:
    for name, code in processes.ended().items():
        raise RunFailedError(
            f"the {name} must run until it is stopped, it ended with code {code}:\n"
            f"{_tail(_text(processes.log(name)))}"
        )


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_LOG_LINES:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a deployment from the command line; 0 done, 1 the run failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m fedaudit.simulation.loopback",
        description="Run a federation as a real deployment on 127.0.0.1, and stop all of it afterwards.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or a preset's name")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the run's folder")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one key")
    parser.add_argument("--nodes", type=int, default=2, help="number of SuperNodes")
    parser.add_argument("--port", type=int, default=0, help="port of the SuperLink; 0 takes a free one")
    parser.add_argument("--timeout", type=float, help="seconds until the run is stopped")
    options = parser.parse_args(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it stops what it started
    try:
        overrides = dict(parse_override(pair) for pair in options.set)
        overrides["federation.engine"] = "deployment"
        config = load_config(options.config, overrides)
        run = run_on_loopback(config, options.output, options.nodes, options.port, options.timeout)
    except RunFailedError as error:
        print(f"fedaudit: {error}", file=sys.stderr)
        return 1
    except FedauditError as error:
        print(f"fedaudit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedaudit: interrupted; every process that was started has been stopped", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    rounds, seconds = run.records["round"].max(), run.summary["total-seconds"]
    print(f"{rounds} rounds on {options.nodes} nodes in {seconds:.1f} s")
    print(f"report: {run.path / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
