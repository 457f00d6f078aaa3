"""What is derived from a set of runs, each piece computed once and shared by tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from fedaudit.claims import VERIFY
from fedaudit.records import Run
from fedaudit.report.guarantees import WorstEpsilon, worst_epsilon
from fedaudit.report.seeds import defense_of, defenses_in, distinct_runs, numbers, per_seed, pool


@dataclass(frozen=True, eq=False)
class Evidence:
    """Runs and their records in the forms that tables and figures need.

    Attributes:
        given: the runs as they were given.
    """

    given: tuple[Run, ...]

    @cached_property
    def runs(self) -> list[Run]:
        """The runs to use: one per defense and seed, in the order of `defenses`."""
        kept = distinct_runs(self.given)[0]
        places = {name: place for place, name in enumerate(defenses_in(kept))}
        return sorted(kept, key=lambda run: places[defense_of(run)])

    @property
    def left_out(self) -> list[Run]:
        """Runs with the defense and seed of another one."""
        return [run for run in self.given if not any(run is kept for kept in self.runs)]

    @cached_property
    def defenses(self) -> list[str]:
        """The defenses, "none" first."""
        return defenses_in(self.runs)

    @property
    def baseline(self) -> str:
        """The defense others are compared with: "none" if it is there, else the first; "" without runs."""
        return next(iter(self.defenses), "")

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
        """One number per defense, seed, quantity and observer: `seeds.per_seed`."""
        return per_seed(self.rows)

    @cached_property
    def guarantees(self) -> dict[str, WorstEpsilon]:
        """The worst client's epsilon under each defense."""
        return {name: worst_epsilon(self.pooled[self.pooled["defense"] == name]) for name in self.defenses}


Runs = Sequence[Run] | Evidence


def gather(runs: Runs) -> Evidence:
    """The evidence of these runs; evidence itself is handed back, so that nothing is computed twice."""
    return runs if isinstance(runs, Evidence) else Evidence(tuple(runs))
