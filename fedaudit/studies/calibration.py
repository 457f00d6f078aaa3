"""Does a measure predict the attack? Points of measured leakage and attack success, and their correlation.

A federation runs under audit and keeps its updates. Then, at the weights of some rounds, single examples of
some clients are attacked with everything an oracle can arrange:

- reconstruction: a client's chosen examples take one local step together under the run's defense, and the
  attack runs on that update; success is the PSNR in dB of each example's reconstruction.
- membership: local rounds of the client are repeated with and without the example among those it trains on,
  the others drawn anew, and the matched filter tells the two apart; success is 2 AUC - 1. The example is
  certain to be used or not: a defense that samples its batches protects better than this shows.

Beside them stand the measures: those of the run for this client and round, and those that speak of single
examples for the example itself. Both sides are computed from the same weights, so time passes on neither.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fedaudit.attacks.membership import matched_filter, membership_advantage
from fedaudit.attacks.scores import match, psnr
from fedaudit.audit.measuring import is_due
from fedaudit.config import RunConfig
from fedaudit.config.texts import ints
from fedaudit.errors import ConfigError, DataError
from fedaudit.federation.execution import execute
from fedaudit.federation.setup import Setup, setup
from fedaudit.kept_files import load_update, update_file
from fedaudit.measures.ghost_kernels import example_gradients
from fedaudit.progress import announce
from fedaudit.records import Run, load_run
from fedaudit.registry import ATTACKS, MEASURES, shows_sums_only
from fedaudit.spec import parse_specs
from fedaudit.studies.comparison import comparisons
from fedaudit.studies.rank_correlation import rank_correlation
from fedaudit.training.local import client_seed, train_locally, weights_to_send
from fedaudit.types import Attack, ClientUpdate, Measure, PerExample, RoundContext

MEMBERSHIP = "membership-advantage"
_KEYS = ("defense", "seed", "round", "client", "example")


def calibrate(config: RunConfig, folder: Path) -> tuple[list[Run], pd.DataFrame]:
    """Run every defense and seed of `config`, attack its examples, and return the runs and the points.

    The rounds are `attack.rounds`, the clients the first `attack.clients` of each, the attacks
    `attack.names`; `calibrate.examples` examples per client are drawn at random.

    Args:
        config: what `fedaudit compare` takes.
        folder: where the runs go, one folder each.

    Returns:
        The runs, and one row per point: defense, seed, round, client, example, one column per success
        ("membership-advantage", "<attack>.psnr") and one per measure, "<measure> (<observer>)".

    Raises:
        ConfigError: if an attacked round is not audited, the oracle does not measure, a defense shows the
            server no single update, or something else than defense and seed is varied.
        RunFailedError: if a run stopped before its last round.
    """
    if config.compare.vary.strip():
        raise ConfigError(
            f"a calibration varies defense and seed only, got compare.vary = {config.compare.vary!r}: "
            "set it to ''"
        )
    rounds = ints(config.attack.rounds)
    unmeasured = [r for r in rounds if not is_due(r, config.audit.every, config.federation.rounds)]
    if unmeasured:
        raise ConfigError(
            f"a calibrated round is an audited one, got attack.rounds = {config.attack.rounds!r} of which "
            f"{unmeasured} are not: set audit.every to 1, or choose other rounds"
        )
    if config.federation.fraction_train < 1:
        raise ConfigError(
            f"calibration follows the same clients through all rounds, got federation.fraction-train = "
            f"{config.federation.fraction_train}: set it to 1"
        )
    hiding = [str(spec) for spec in config.defense_specs() if shows_sums_only(str(spec))]
    if hiding:
        raise ConfigError(
            f"calibration relates measures of single clients to attacks on them, got compare.defenses with "
            f"{hiding[0]!r}, which hides them: leave it out"
        )
    runs, points = [], []
    for each in comparisons(config.with_(audit__save_updates=True, attack__names=""), folder):
        runs.append(execute(each))
        probe = _Probe(setup(each.flat()), config, runs[-1])
        for round_number in rounds:
            points += list(probe.points(round_number))
    return runs, pd.DataFrame(points)


def correlations(points: pd.DataFrame, replicates: int = 2000) -> pd.DataFrame:
    """Spearman's rho of every measure with every success, over all points and within stages.

    "within stage" ranks points among those of the same defense, seed and round only: whether the measure
    tells clients and examples apart that are at the same stage. "overall" also counts differences between
    defenses and rounds. Intervals resample clients (a client and seed is one cluster).

    Returns:
        One row per measure and success: measure, success, scope, rho, low, high, points, clients.
    """
    success = [column for column in points if column == MEMBERSHIP or str(column).endswith(".psnr")]
    measures = [column for column in points if column not in (*_KEYS, *success)]
    stage = list(points[["defense", "seed", "round"]].itertuples(index=False, name=None))
    clusters = list(points[["seed", "client"]].itertuples(index=False, name=None))
    rows = []
    for outcome in success:
        for measure in measures:
            for scope, strata in (("overall", None), ("within stage", stage)):
                found = rank_correlation(
                    points[measure], points[outcome], strata=strata, clusters=clusters, replicates=replicates
                )
                rows.append(
                    {
                        "measure": measure,
                        "success": outcome,
                        "scope": scope,
                        "rho": found.value,
                        "low": found.low,
                        "high": found.high,
                        "points": found.points,
                        "clients": found.clusters,
                    }
                )
    return pd.DataFrame(rows)


@dataclass
class _Probe:
    """Attacks single examples at the weights of a finished run."""

    made: Setup
    config: RunConfig
    run: Run

    def __post_init__(self) -> None:
        self.attacks: list[Attack] = [ATTACKS.build(spec) for spec in parse_specs(self.config.attack.names)]
        self.measures: list[Measure] = [
            MEASURES.build(spec) for spec in parse_specs(self.config.audit.measures)
        ]

    def points(self, round_number: int) -> Iterator[dict[str, Any]]:
        """The points of one round."""
        clients = min(self.config.attack.clients, self.made.clients)
        for client in range(clients):
            announce("audit", client, clients, round_number, name="calibration")
            path = update_file(self.run.path / "updates", round_number, client)
            if not path.exists():
                continue  # rejected, or out of budget: the records say why
            update = load_update(path)
            yield from self._of_client(update)

    def _of_client(self, update: ClientUpdate) -> Iterator[dict[str, Any]]:
        evidence = self.made.evidence(update)
        generator = torch.Generator().manual_seed(client_seed(self.made.config.seed, update.client_id, 0) ^ 5)
        count = min(self.config.calibrate.examples, len(evidence.y) // 2)
        chosen = torch.randperm(len(evidence.y), generator=generator)[:count].sort().values
        if count < 1:
            raise DataError(
                f"calibration needs clients of two examples or more, got {len(evidence.y)} of client "
                f"{update.client_id}: use fewer clients"
            )
        advantage = self._membership(update, chosen)
        alone = {**self._reconstruction(update, chosen), **self._single(update, chosen)}
        shared = self._of_round(update)
        held = self.made.rows(update.client_id, update.before)[chosen]  # positions among all of the client's
        for position, example in enumerate(held.tolist()):
            yield {
                "defense": self.made.config.defense.name,
                "seed": self.made.config.seed,
                "round": update.round,
                "client": update.client_id,
                "example": example,
                MEMBERSHIP: float(advantage[position]),
                **shared,
                **{name: float(values[position]) for name, values in alone.items()},
            }

    def _of_round(self, update: ClientUpdate) -> dict[str, float]:
        """What the run's measures say of this client and round, whoever computed it."""
        rows = self.run.records
        rows = rows[(rows["round"] == update.round) & (rows["status"] == "ok")]
        rows = rows[rows["quantity"].isin([measure.name for measure in self.measures])]
        rows = rows[rows["client_id"].isna() | (rows["client_id"] == update.client_id)]
        names = rows["quantity"] + " (" + rows["observer"] + ")"
        return dict(zip(names, rows["value"].astype(float), strict=True))

    def _single(self, update: ClientUpdate, chosen: Tensor) -> dict[str, Tensor]:
        """Numbers of single examples, in the order of `chosen`."""
        ctx = self._context(update)
        evidence = self.made.evidence(update)
        model = self._model(update)
        gradients = _gradients(model, ctx, evidence.x[chosen], evidence.y[chosen])
        assert ctx.loss is not None
        with torch.no_grad():
            outputs = model.eval()(evidence.x[chosen].to(self.made.device))
        labels = evidence.y[chosen].to(self.made.device)
        losses = [ctx.loss(outputs[i : i + 1], labels[i : i + 1]) for i in range(len(chosen))]
        found = {"loss (example)": torch.stack(losses), "gradient-norm (example)": gradients.norm(dim=1)}
        for measure in self.measures:
            if isinstance(measure, PerExample):
                found[f"{measure.name} (example)"] = measure.per_example(update, ctx)[chosen]
        return found

    def _reconstruction(self, update: ClientUpdate, chosen: Tensor) -> dict[str, Tensor]:
        """PSNR of each attack for each chosen example, from one step on all of them."""
        evidence, count = self.made.evidence(update), len(chosen)
        x, y = evidence.x[chosen], evidence.y[chosen]
        ctx = replace(
            self.made.context(update.round), local_steps=1, batch_size=count, num_updates=1, observer="server"
        )
        victim = self._trained(update, x, y, [torch.arange(count)], 0)
        found = {}
        for attack in self.attacks:
            guess = attack.reconstruct(victim, ctx).x.clamp(*ctx.value_range)
            _, truth, errors = match(guess, x)
            values = torch.full((count,), torch.nan, dtype=torch.float64)
            values[truth] = psnr(errors, ctx.value_range)
            found[f"{attack.name}.psnr"] = values
        return found

    def _membership(self, update: ClientUpdate, chosen: Tensor) -> Tensor:
        """2 AUC - 1 of the matched filter for each chosen example."""
        evidence, ctx = self.made.evidence(update), self._context(update)
        repetitions, total = self.config.calibrate.repetitions, len(evidence.y)
        settings = self.made.settings(update.round)
        used = min(total, (settings.local_steps or total) * settings.batch_size)
        seed = client_seed(self.made.config.seed, update.client_id, update.round)
        generator = torch.Generator().manual_seed(seed ^ 3)
        # each candidate is in half of the repetitions, in an order of its own
        order = torch.rand(repetitions, len(chosen), generator=generator).argsort(0)
        inside = order < repetitions // 2
        others = torch.ones(total, dtype=torch.bool)
        others[chosen] = False
        pool = others.nonzero().flatten()
        observed = []
        for repetition in range(repetitions):
            mine = chosen[inside[repetition]][:used]
            fill = pool[torch.randperm(len(pool), generator=generator)[: max(0, used - len(mine))]]
            rows = torch.cat([mine, fill])
            rows = rows[torch.randperm(len(rows), generator=generator)]
            batches = list(torch.split(torch.arange(len(rows)), settings.batch_size))
            trained = self._trained(update, evidence.x[rows], evidence.y[rows], batches, repetition + 1)
            observed.append(-trained.flat)
        gradients = _gradients(self._model(update), ctx, evidence.x[chosen], evidence.y[chosen])
        return membership_advantage(matched_filter(gradients.cpu(), torch.stack(observed)), inside)

    def _trained(
        self, update: ClientUpdate, x: Tensor, y: Tensor, batches: Sequence[Tensor], draw: int
    ) -> ClientUpdate:
        """The update of one local round on these examples under the run's defense."""
        model = self._model(update)
        noise = torch.Generator(device=self.made.device)
        seed = client_seed(self.made.config.seed, update.client_id, update.round)
        noise.manual_seed(client_seed(seed, update.client_id, draw))
        train_locally(
            model,
            x,
            y,
            batches,
            self.made.settings(update.round),
            defense=self.made.defense,
            release=self.made.evidence(update).release,
            generator=noise,
            device=self.made.device,
        )
        trained = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        chance = torch.Generator().manual_seed(client_seed(noise.initial_seed(), update.client_id, draw))
        after = weights_to_send(self.made.defense, update.before, trained, chance)
        delta = {name: after[name] - update.before[name] for name in update.delta}
        return ClientUpdate(update.client_id, update.round, update.before, delta, len(y))

    def _model(self, update: ClientUpdate) -> torch.nn.Module:
        model = self.made.worker_model()
        model.load_state_dict(dict(update.before))
        return model

    def _context(self, update: ClientUpdate) -> RoundContext:
        return replace(
            self.made.context(update.round), observer="oracle", evidence=self.made.evidence, num_updates=1
        )


def _gradients(model: torch.nn.Module, ctx: RoundContext, x: Tensor, y: Tensor) -> Tensor:
    assert ctx.loss is not None
    return example_gradients(model.eval(), ctx.loss, x.to(ctx.device), y.to(ctx.device))


def read_points(folder: Path) -> tuple[list[Run], pd.DataFrame]:
    """The runs and points of an earlier calibration."""
    runs = [load_run(path.parent) for path in sorted(folder.glob("*/audit"))]
    return runs, pd.read_csv(folder / "points.csv")
