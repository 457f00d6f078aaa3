"""A recorded run against the claims of its own configuration."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from fedaudit.claims import Finding, Watcher
from fedaudit.config import RunConfig
from fedaudit.errors import RecordError
from fedaudit.kept_files import load_update
from fedaudit.records import Run, load_run
from fedaudit.types import ClientUpdate
from fedaudit.verification.configured import ConfiguredClaims, Insight
from fedaudit.verification.live import State, judge
from fedaudit.verification.memory import NoiseMemory
from fedaudit.verification.round import ALPHA
from fedaudit.verification.statements import Statement, Statements


class RecordedRun:
    """The claims of a run and what it kept.

    Args:
        folder: the run's folder.

    Raises:
        RecordError: if the folder holds no run, no configuration or no updates.
    """

    def __init__(self, folder: str | Path) -> None:
        self.run: Run = load_run(folder)
        recorded = dict(self.run.info.get("config", {}))
        if not recorded:
            raise RecordError(f"{self.run.path} has no run.toml to take claims from: start the run anew")
        self.config = RunConfig.from_flat(recorded)
        self.files: dict[int, list[Path]] = defaultdict(list)
        for path in sorted((self.run.path / "updates").glob("round-*-*.safetensors")):
            self.files[int(path.name.split("-")[1])].append(path)
        if not self.files:
            raise RecordError(
                f"verification needs the updates of a run, got none in {self.run.path}: "
                "run it again with --set audit.save-updates=true"
            )

    def rounds(self) -> Iterator[tuple[int, list[ClientUpdate], State | None]]:
        """Each kept round with its updates and the weights after it, None where those are not known."""
        numbers = sorted(self.files)
        updates = self._load(numbers[0])
        for number, following in zip(numbers, [*numbers[1:], None], strict=True):
            ahead = self._load(following) if following is not None else []
            after = ahead[0].before if ahead and following == number + 1 else None
            if number == self.config.federation.rounds:
                after = self._final()
            yield number, updates, after
            updates = ahead

    def _load(self, number: int) -> list[ClientUpdate]:
        return [load_update(path) for path in self.files[number]]

    def _final(self) -> State | None:
        from safetensors.torch import load_file

        path = self.run.path / "weights.safetensors"
        return load_file(path) if path.exists() else None

    def statements(self) -> dict[int, dict[int, Statement]]:
        """What each client had stated by round and client."""
        found: dict[int, dict[int, Statement]] = defaultdict(dict)
        for number, client, statement in Statements().replay(self.run.records):
            found[number][client] = statement
        return found

    def clip_norms(self) -> dict[int, tuple[float, float]]:
        """By round, the clip norm that the server applied and the one it went on with."""
        records = self.run.records
        rows = records[(records["quantity"] == "clip-norm") & records["client_id"].isna()]
        found = {}
        for row in rows.to_dict("records"):
            following = json.loads(row["extra"]).get("next")
            if following is not None:
                found[int(row["round"])] = (float(row["value"]), float(following))
        return found


def verify_run(
    folder: str | Path,
    *,
    observer: Watcher = "server",
    insight: Callable[[ConfiguredClaims], Insight] | None = None,
    alpha: float = ALPHA,
) -> list[Finding]:
    """Every finding of every kept round of a run, against the claims of its own configuration.

    The defense's claims are tested on the updates, the strategy's on the aggregates: the aggregate of a round
    is the broadcast of the next, so the last kept round needs the final weights, and a round whose successor
    was not kept has no aggregate.

    Args:
        folder: the run's folder; updates must have been kept (`audit.save-updates`).
        observer: "server", or "oracle" with `insight`.
        insight: what an oracle adds.
        alpha: probability of a false alarm in an honest round.

    Raises:
        RecordError: if the folder holds no run or no updates.
    """
    recorded = RecordedRun(folder)
    claims = ConfiguredClaims(recorded.config, insight)
    claims.recall(recorded.run.records)
    stated, norms = recorded.statements(), recorded.clip_norms()
    memory, findings = NoiseMemory(), list[Finding]()
    for number, updates, after in recorded.rounds():
        known = norms.get(number)
        made = claims.of_round(number, updates, stated.get(number, {}), known)
        findings += judge(
            made,
            updates,
            None,
            after,
            clip_norms=known,
            observer=observer,
            memory=memory,
            alpha=alpha,
        )
    return findings
