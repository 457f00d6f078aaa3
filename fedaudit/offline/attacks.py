"""Attacks on recorded updates: those of a run, and those of any federation, as weights before and after.

What comes out is a run folder of its own: records of the attack's objective and, where the truth is known,
its scores; images; and a report. The attacked run is left as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from fedaudit.attacks.diagnosis import Advice, diagnose
from fedaudit.attacks.threat_card import ThreatCard, threat_card
from fedaudit.audit.auditor import Auditor
from fedaudit.audit.secure_sum import SUM, context_of_sum
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError, RecordError
from fedaudit.federation.run_description import describe
from fedaudit.federation.setup import Setup, setup, summed_cross_entropy
from fedaudit.kept_files import load_update
from fedaudit.records import Run, load_run, write_json, write_text
from fedaudit.registry import ATTACKS
from fedaudit.report.tables import records_summary
from fedaudit.spec import Spec, parse_spec
from fedaudit.types import ClientUpdate, Guarantee, RoundContext


@dataclass(frozen=True)
class ForeignUpdate:
    """An update of a federation that fedaudit did not run, and what is known about it.

    Attributes:
        model: import path of a function without arguments that returns the model, "package.module:function".
        before: safetensors file of the weights that were broadcast.
        after: safetensors file of the weights that came back.
        input_shape: shape of one example.
        num_classes: number of classes.
        lr: local learning rate of plain SGD.
        local_steps: optimiser steps.
        batch_size: examples per step.
        value_range: smallest and largest input value.
        defense: what protects the update, in words.
    """

    model: str
    before: Path
    after: Path
    input_shape: tuple[int, ...]
    num_classes: int
    lr: float
    local_steps: int = 1
    batch_size: int = 1
    value_range: tuple[float, float] = (0.0, 1.0)
    defense: str = "unknown"


def with_limits(attack: str, restarts: int | None, seconds: float | None) -> str:
    """The attack's spec with these two options set.

    >>> with_limits("dlg(labels=idlg)", 4, None)
    'dlg(labels=idlg, restarts=4)'
    """
    spec = parse_spec(attack)
    given = {
        name: value for name, value in (("restarts", restarts), ("seconds", seconds)) if value is not None
    }
    return str(Spec(spec.name, {**spec.options, **given}))


def recorded_updates(run: Run, clients: Sequence[int] = (), rounds: Sequence[int] = ()) -> list[ClientUpdate]:
    """The kept updates of a run, in order of round and client; all where nothing is chosen.

    Raises:
        RecordError: if the run kept none of these.
    """
    found = [load_update(path) for path in sorted((run.path / "updates").glob("round-*.safetensors"))]
    chosen = [
        update
        for update in found
        if (not clients or update.client_id in clients) and (not rounds or update.round in rounds)
    ]
    if not chosen:
        kept = sorted({(update.round, update.client_id) for update in found})
        shown = ", ".join(f"{r}/{c}" for r, c in kept[:12]) + (", ..." if len(kept) > 12 else "")
        raise RecordError(
            f"an attack needs recorded updates, got none of these in {run.path} (round/client kept: "
            f"{shown or 'none'}): choose one of them, or run with --set audit.save-updates=true"
        )
    return sorted(chosen, key=lambda update: (update.round, update.client_id))


def setup_of(run: Run) -> Setup:
    """The federation a run recorded: data, model and clients as they were.

    Raises:
        RecordError: if the run has no configuration.
    """
    config = dict(run.info.get("config", {}))
    if not config:
        raise RecordError(
            f"{run.path} has no run.toml that says what was trained: attack with --before, --after"
        )
    return setup(RunConfig.from_flat(config).flat())


def attack_run(
    run: Run,
    attack: str,
    output: Path,
    clients: Sequence[int] = (),
    rounds: Sequence[int] = (),
    lpips: bool = False,
) -> Run:
    """Attack a run's kept updates and score the results against its data.

    Args:
        run: a simulation run with audit.save-updates.
        attack: spec of a registered attack.
        output: folder of the new run.
        clients: whose updates; empty is all.
        rounds: of which rounds; empty is all that were kept.
        lpips: score by LPIPS too, if its weights are on this machine.

    Raises:
        RecordError: if there is nothing to attack.
        ConfigError: if the attack does not exist or its options do not fit.
    """
    updates, made = recorded_updates(run, clients, rounds), setup_of(run)
    describe(made.config.with_(attack__names=attack, output__directory=str(output.parent)), output)
    auditor = Auditor(
        output,
        "",
        context=made.context,
        oracle=made,
        attacks=attack,
        attack_rounds=sorted({update.round for update in updates}),
        attack_clients=len(updates),
        defense=made.config.defense.name,
        save_images=True,
        lpips=lpips,
    )
    return _attacked(auditor, updates, output, stated_guarantees(run))


def stated_guarantees(run: Run) -> dict[int, dict[int, Guarantee]]:
    """What each client of a run stated after each round: round to client to guarantee."""
    rows = run.records
    rows = rows[(rows["quantity"] == "epsilon") & (rows["status"] == "ok")]
    found: dict[int, dict[int, Guarantee]] = {}
    for number, client, epsilon, delta, unit, accountant in rows[
        ["round", "client_id", "value", "delta", "privacy_unit", "accountant"]
    ].itertuples(index=False, name=None):
        found.setdefault(int(number), {})[int(client)] = Guarantee(epsilon, delta, unit, accountant)
    return found


def diagnose_run(run: Run, client: int, round_number: int) -> tuple[ThreatCard, list[Advice]]:
    """Under which conditions an update of a run was made, and which attacks apply to it.

    The update itself need not have been kept: settings and model decide. Under secure aggregation it is the
    sum over all clients of the run that is judged: a server sees no other.

    Raises:
        RecordError: if the run has no configuration, or no such update.
    """
    made = setup_of(run)
    rows = run.records
    whose = rows["client_id"] == client if made.secure is None else rows["client_id"].isna()
    rows = rows[(rows["round"] == round_number) & whose & (rows["status"] == "ok")]
    if not len(rows):
        raise RecordError(
            f"a diagnosis needs a round in which the client's update was used, got round {round_number} and "
            f"client {client} of {run.path}: look into its records"
        )
    with torch.random.fork_rng(devices=[]):
        model = made.build_model()
    examples = made.num_examples(client)
    update = ClientUpdate(client, round_number, model.state_dict(), {}, examples)
    ctx = replace(made.context(round_number), num_updates=made.clients)
    if made.secure is not None:  # all that a server can attack is the sum of everybody's updates
        everybody = tuple(range(made.clients))
        total = sum(len(rows) for rows in made.partitions)
        update = replace(update, client_id=SUM, num_examples=total, summed=everybody)
        ctx = context_of_sum(ctx, update)
    card = threat_card(model, update, ctx, {}, made.config.defense.name)
    attacks = [entry.load()() for entry in map(ATTACKS.__getitem__, ATTACKS)]
    return card, diagnose(attacks, update, ctx, card)


def attack_foreign(update: ForeignUpdate, attack: str, output: Path) -> Run:
    """Attack one update from anywhere; there is no truth, so what comes out are images and the objective.

    Raises:
        ConfigError: if the model cannot be built, or the attack does not exist.
        RecordError: if a file cannot be read or does not fit the model.
    """
    build, (before, after) = (
        _builder(update.model),
        (_weights(path) for path in (update.before, update.after)),
    )
    expected = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    for path, state in ((update.before, before), (update.after, after)):
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if shapes != expected:
            wrong = sorted(name for name in expected | shapes if expected.get(name) != shapes.get(name))
            raise RecordError(
                f"weights must fit the model {update.model}, got others for {wrong[:5]} in {path}: "
                "save model.state_dict()"
            )
    delta = {name: after[name] - tensor for name, tensor in before.items() if tensor.is_floating_point()}
    context = RoundContext(
        round=1,
        build_model=build,
        loss=summed_cross_entropy,
        lr=update.lr,
        optimizer="sgd",
        local_steps=update.local_steps,
        batch_size=update.batch_size,
        input_shape=update.input_shape,
        num_classes=update.num_classes,
        value_range=update.value_range,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "run.toml", f'schema = 1\n\n[run]\n"defense" = "{update.defense}"\n"seed" = 0\n')
    auditor = Auditor(
        output,
        "",
        context=context,
        attacks=attack,
        attack_rounds=(1,),
        defense=update.defense,
        save_images=True,
    )
    examples = update.batch_size * update.local_steps
    return _attacked(auditor, [ClientUpdate(0, 1, before, delta, examples)], output)


def _attacked(
    auditor: Auditor,
    updates: Sequence[ClientUpdate],
    output: Path,
    guarantees: Mapping[int, Mapping[int, Guarantee]] | None = None,
) -> Run:
    for number in sorted({update.round for update in updates}):
        chosen = [update for update in updates if update.round == number]
        auditor.audit(number, chosen, guarantees=(guarantees or {}).get(number))
    write_json(output / "summary.json", records_summary(load_run(output).records))
    return load_run(output)


def _builder(path: str) -> Callable[[], nn.Module]:
    module, _, name = path.partition(":")
    try:
        build: Callable[[], nn.Module] = getattr(import_module(module), name)
        model = build()
    except Exception as error:  # whatever the user's code raises is about the user's code
        raise ConfigError(
            f"a model is named by an importable function without arguments, package.module:function, got "
            f"{path!r}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"a model's function returns a torch module, got {type(model).__name__} from {path!r}"
        )
    return build


def _weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"weights are a safetensors file, got {path}: {error}") from error
