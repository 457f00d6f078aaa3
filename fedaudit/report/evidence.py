"""What is derived from a set of runs, each piece computed once and shared by tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from fedaudit.claims import VERIFY
from fedaudit.records import Run
from fedaudit.report.guarantees import WorstEpsilon, worst_epsilon
from fedaudit.report.resampling import bootstrap_interval
from fedaudit.report.seeds import (
    GROUP,
    defense_of,
    defenses_in,
    distinct_runs,
    numbers,
    over_seeds,
    per_client,
    per_seed,
    pool,
)
from fedaudit.report.variations import (
    variation_of,
    varied_keys,
    wanted_against,
    wanted_baseline,
)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Runs and their records in the forms that tables and figures need.

    Attributes:
        given: the runs as they were given.
    """

    given: tuple[Run, ...]

    @cached_property
    def runs(self) -> list[Run]:
        """The runs to use: one per variation, defense and seed, in the order of `defenses`."""
        kept = distinct_runs(self.given)[0]
        places = {name: place for place, name in enumerate(defenses_in(kept))}
        return sorted(kept, key=lambda run: places[defense_of(run)])

    @property
    def left_out(self) -> list[Run]:
        """Runs with the variation, defense and seed of another one."""
        return [run for run in self.given if not any(run is kept for kept in self.runs)]

    @cached_property
    def defenses(self) -> list[str]:
        """The defenses, "none" first."""
        return defenses_in(self.runs)

    @cached_property
    def varied(self) -> list[str]:
        """The configuration keys that a comparison varied beside defense and seed."""
        return varied_keys(self.runs)

    @cached_property
    def variations(self) -> "dict[str, Evidence]":
        """The evidence of each combination of varied values, by its label; under "" if nothing was varied."""
        if not self.varied:
            return {"": self}
        found: dict[str, list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: self._place[run.path]):
            found.setdefault(variation_of(run, self.varied), []).append(run)
        return {label: Evidence(tuple(runs)) for label, runs in found.items()}

    @cached_property
    def _place(self) -> dict[Path, int]:
        return {run.path: place for place, run in enumerate(self.given)}

    @cached_property
    def baseline(self) -> str:
        """What others are compared with: `compare.baseline`, else "none", else the first; "" without runs."""
        wanted = wanted_baseline(self.runs)
        return wanted if wanted in self.defenses else next(iter(self.defenses), "")

    @cached_property
    def against(self) -> list[str]:
        """The quantities that `compare.against` wants drawn against accuracy; empty is the usual ones."""
        return wanted_against(self.runs)

    @cached_property
    def by_defense(self) -> dict[str, list[Run]]:
        """The runs of each defense."""
        found: dict[str, list[Run]] = {name: [] for name in self.defenses}
        for run in self.runs:
            found[defense_of(run)].append(run)
        return found

    @cached_property
    def _all(self) -> pd.DataFrame:
        return pool(self.runs)

    @cached_property
    def pooled(self) -> pd.DataFrame:
        """All records in one frame, those of single layers and of tested claims aside: `seeds.pool`."""
        return self._all[self._all["layer"].isna() & ~self._tested]

    @property
    def _tested(self) -> pd.Series:
        return self._all["quantity"].astype(str).str.startswith(VERIFY)

    @cached_property
    def tested(self) -> pd.DataFrame:
        """The records of tested claims."""
        return self._all[self._tested]

    @cached_property
    def layers(self) -> pd.DataFrame:
        """The records of single layers that hold a number."""
        return numbers(self._all[self._all["layer"].notna()])

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The records that hold a number: `seeds.numbers`."""
        return numbers(self.pooled)

    @cached_property
    def values(self) -> pd.DataFrame:
        """One number per variation, defense, seed, quantity and observer: `seeds.per_seed`."""
        return per_seed(self.rows)

    @cached_property
    def by_client(self) -> pd.DataFrame:
        """What is averaged in `values`, by client: `seeds.per_client`."""
        return per_client(self.rows)

    @cached_property
    def means(self) -> pd.DataFrame:
        """Means and intervals over seeds: `seeds.over_seeds`, and "low" and "high" of `resampling`."""
        cells = {
            group: [rows[["sum", "count"]].to_numpy(float) for _, rows in mine.groupby("seed")]
            for group, mine in self.by_client.groupby(GROUP)
        }
        means = over_seeds(self.values)
        ends = [bootstrap_interval(cells[group]) for group in means[GROUP].itertuples(index=False, name=None)]
        return means.assign(low=[low for low, _ in ends], high=[high for _, high in ends])

    @cached_property
    def guarantees(self) -> dict[str, WorstEpsilon]:
        """The worst client's epsilon under each defense."""
        return {name: worst_epsilon(self.pooled[self.pooled["defense"] == name]) for name in self.defenses}


Runs = Sequence[Run] | Evidence


def gather(runs: Runs) -> Evidence:
    """The evidence of these runs; evidence itself is handed back, so that nothing is computed twice."""
    return runs if isinstance(runs, Evidence) else Evidence(tuple(runs))
