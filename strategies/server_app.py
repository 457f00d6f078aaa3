"""The reference ServerApp: a Flower strategy by name under AuditStrategy, evaluated, recorded, resumable."""

import logging
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedaudit.audit.auditor import Auditor
from fedaudit.audit.leakage_signal import LeakageSignal
from fedaudit.config.texts import ints
from fedaudit.defenses.base import adaptive
from fedaudit.errors import ConfigError, RunFailedError
from fedaudit.federation.folders import run_folder
from fedaudit.federation.insight import insight
from fedaudit.federation.run_description import describe
from fedaudit.federation.setup import Setup, setup
from fedaudit.flower.arrays import copy_into, from_state_dict, numpy_arrays
from fedaudit.flower.messages import LEAKAGE
from fedaudit.flower.strategy import AuditStrategy
from fedaudit.progress import announce
from fedaudit.records import load_run
from fedaudit.registry import ACTIVE_MODELS
from fedaudit.simulation.flower_internals import ErrorCode
from fedaudit.simulation.in_process import InProcessGrid
from fedaudit.spec import parse_spec
from fedaudit.training.local import evaluate
from fedaudit.verification import LiveVerifier
from fedaudit.verification.configured import ConfiguredClaims

from . import checkpoint
from .central import inner_fraction, protected
from .flower_strategies import build_strategy
from .rounds import SeededRounds

logger = logging.getLogger(__name__)
ENGINES = {"InProcessGrid": "in-process", "InMemoryGrid": "ray"}  # any other grid is a deployment
WAIT_SECONDS = 600
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation the run-config describes."""
    client_ids = meet(grid, int(context.run_config.get("federation.clients", 2)))
    made = setup(context.run_config, len(client_ids))
    config = made.config
    engine = ENGINES.get(type(grid).__name__, "deployment")
    simulated = engine != "deployment"
    if "oracle" in config.audit.observer_names and not simulated:
        raise ConfigError(
            "the observer 'oracle' exists in simulation only, got a deployment: drop it from audit.observers"
        )
    if made.secure is not None and not simulated:
        raise ConfigError(
            f"defense.name = {config.defense.name!r} is not allowed in a deployment: secure aggregation is "
            "simulated, and this server would receive every single update"
        )
    folder = run_folder(config)
    if engine != "in-process" and not config.output.resume and any((folder / "audit").glob("round-*")):
        raise ConfigError(f"a run keeps a folder of its own, got {folder} which holds one: set output.name")
    if not (folder / "run.toml").exists():  # Flower started the run, and decided how many nodes there are
        describe(config.with_(federation__engine=engine, federation__clients=len(client_ids)), folder)
    federation = config.federation
    auditor = Auditor(
        folder,
        config.audit.measures,
        context=made.context,
        observers=config.audit.observer_names,
        oracle=made if simulated else None,
        attacks=config.attack.names,
        attack_rounds=ints(config.attack.rounds),
        attack_clients=config.attack.clients,
        attack_trigger=config.attack.trigger,
        defense=config.defense.name,
        every=config.audit.every,
        last_round=federation.rounds,
        strict=config.audit.strict,
        save_images=config.attack.save_images,
        save_updates=config.audit.save_updates,
        verify=_verifier(made, simulated),
        lpips=config.attack.lpips,
    )
    inner = build_strategy(
        config.strategy.name,
        clients=len(client_ids),
        fraction_train=inner_fraction(made),
        min_available=len(client_ids),
    )
    inner = protected(inner, made, auditor)
    signal = _signal(made)
    audited = AuditStrategy(
        inner,
        auditor,
        client_ids=client_ids,
        reject_bad_updates=federation.reject_bad_updates,
        announce=partial(_tell, signal, auditor) if signal else None,
        secure=made.secure,
    )
    with auditor.held():
        run(grid, made, auditor, audited, folder, signal)


def run(
    grid: Grid,
    made: Setup,
    auditor: Auditor,
    audited: AuditStrategy,
    folder: Path,
    signal: LeakageSignal | None = None,
) -> None:
    """Start, or continue, and keep the final weights."""
    config, federation = made.config, made.config.federation
    start = _resume(grid, auditor, audited, folder, signal) if config.output.resume else None
    done = start.round if start else 0
    arrays = start.arrays if start else from_state_dict(made.build_model().state_dict())
    active = parse_spec(config.model.name).name in ACTIVE_MODELS
    if active:
        logger.warning("ACTIVE server: model.name = %r breaks the protocol", config.model.name)
    announce("run", done, federation.rounds, done, name=folder.name, clients=made.clients, active=active)
    clock = _Clock()
    nodes: dict[int, RecordDict] = {}

    def after_round(number: int, current: ArrayRecord) -> MetricRecord | None:
        if number == 0 and done:
            return None
        round_number = number + done
        metrics: dict[str, float] = {}
        last = round_number == federation.rounds
        if round_number % federation.evaluate_every == 0 or last or round_number == 0:
            loss, accuracy = _evaluate(made, current)
            metrics = {"loss": loss, "accuracy": accuracy}
            auditor.note(round_number, "accuracy", accuracy, "1")
            auditor.note(round_number, "loss", loss, "nats")
        auditor.note(round_number, "round-seconds", clock.lap(), "s")
        auditor.flush()
        if isinstance(grid, InProcessGrid):
            nodes.update(grid.changed_node_states())
            checkpoint.save(folder / checkpoint.FILE, round_number, current, audited, nodes)
        announce(
            "round", round_number, federation.rounds, round_number, **metrics, records=list(auditor.current)
        )
        return MetricRecord(dict(metrics)) if metrics else None

    result = SeededRounds(audited, config.seed, done).start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=federation.rounds - done,
        timeout=federation.round_timeout,
        evaluate_fn=after_round,
    )
    final = result.arrays if len(result.arrays) else arrays
    checkpoint.write_arrays(folder / "weights.safetensors", numpy_arrays(final))


def meet(grid: Grid, expected: int) -> dict[int, int]:
    """Node id to partition id of every node, once as many are there as they say there are partitions.

    Raises:
        RunFailedError: if nodes do not answer, do not know their partition, or two of them hold one.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    found: dict[int, int] = {}
    while not found:
        nodes = list(grid.get_node_ids())
        if nodes:
            found = _ask(grid, nodes)
            total = found.pop(-1, expected)
            if len(found) < total:
                found = {}
        if not found:
            if time.monotonic() > deadline:
                raise RunFailedError(
                    f"nodes must join within {WAIT_SECONDS} s, got {len(nodes)}: start more of them"
                )
            time.sleep(0.5)
    if sorted(found.values()) != list(range(len(found))):
        raise RunFailedError(
            f"each node holds one partition from 0 to {len(found) - 1}, got {sorted(found.values())}: "
            "set partition-id in each node's --node-config"
        )
    return found


def _ask(grid: Grid, nodes: Iterable[int]) -> dict[int, int]:
    messages = [Message(RecordDict(), node, "query.whoami") for node in nodes]
    found: dict[int, int] = {}
    for message in grid.send_and_receive(messages, timeout=60):
        if message.has_error():
            node, reason = message.metadata.src_node_id, message.error.reason
            if message.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:  # waiting does not mend it
                raise RunFailedError(
                    f"each node must say which partition it holds, node {node} failed: {reason}"
                )
            logger.warning("node %d did not say which partition it holds: %s", node, reason)
            continue
        place = message.content["whoami"]
        found[message.metadata.src_node_id] = int(place["partition-id"])  # type: ignore[arg-type]
        found[-1] = int(place["num-partitions"])  # type: ignore[arg-type]
    return found


def _resume(
    grid: Grid, auditor: Auditor, audited: AuditStrategy, folder: Path, signal: LeakageSignal | None
) -> checkpoint.Checkpoint | None:
    if not isinstance(grid, InProcessGrid):
        raise ConfigError(
            "a run is resumed by the in-process engine only: set federation.engine='in-process'"
        )
    start = checkpoint.load(folder / checkpoint.FILE)
    if start is None:
        return None
    checkpoint.restore(audited, start.strategy)
    grid.restore_node_states(start.nodes)
    if auditor.log:
        auditor.log.drop_rounds_after(start.round)
    records = load_run(folder).records
    if signal is not None:
        signal.recall(records)
    if auditor.verifier is not None:
        auditor.verifier.recall(records)
    return start


def _verifier(made: Setup, simulated: bool) -> LiveVerifier | None:
    """What tests the claims of the run's defense and strategy, by the observer that sees most."""
    if not made.config.audit.verify:
        return None
    oracle = simulated and "oracle" in made.config.audit.observer_names
    config = made.config.with_(federation__clients=made.clients)
    claims = ConfiguredClaims(config, insight if oracle else None)
    return LiveVerifier(claims, observer="oracle" if oracle else "server")


def _signal(made: Setup) -> LeakageSignal | None:
    """What clients are told of the last round's leakage, if their defense asks for it."""
    changing = adaptive(made.defense)
    if changing is None or not changing.signal:
        return None
    return LeakageSignal(changing.signal, changing.target)


def _tell(signal: LeakageSignal, auditor: Auditor, _round: int) -> dict[str, float]:
    """What the train configuration says of the round before, whose rows are the auditor's current ones."""
    signal.hear(auditor.current)
    return {} if signal.value is None else {LEAKAGE: signal.value}


def _evaluate(made: Setup, arrays: ArrayRecord) -> tuple[float, float]:
    model = made.worker_model()
    copy_into(model.state_dict(), arrays)
    test = made.data.test
    return evaluate(model, test.x.to(made.device), test.y.to(made.device))


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed
