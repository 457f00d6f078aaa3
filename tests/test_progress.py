"""Progress from inside attacks: who is told what, how often, and that it changes no result."""

import itertools
from dataclasses import replace

import pytest
import torch

from fedaudit import progress
from fedaudit.attacks.dlg import DLG
from fedaudit.attacks.inverting_gradients import InvertingGradients
from fedaudit.attacks.spear import Spear
from fedaudit.audit.auditor import Auditor
from fedaudit.cli.watch import Watch
from fedaudit.models.build import build_model
from fedaudit.needs import Needs
from fedaudit.progress import attacking, heartbeat, listen
from fedaudit.types import Reconstruction, RoundContext
from tests.attacks.planted import context, examples, trained


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by a quarter of a second whenever progress looks at it."""
    ticks = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.25 * next(ticks))


def test_heartbeats_come_at_most_once_a_second_and_remember_details(clock):
    heard = []
    with listen(heard.append), attacking("dlg", 3, 2, budget=9.0) as detail:
        heartbeat(0, 100, restarts="1 of 2")
        for number in range(1, 41):
            heartbeat(number, 100)
        detail["objective"] = 0.5
    assert [event.stage for event in heard] == ["attack"] * len(heard)
    assert 5 < len(heard) < 20  # 41 beats in 10 seconds and the two ends
    assert all(event.detail["restarts"] == "1 of 2" for event in heard[1:])
    gaps = [b.detail["elapsed"] - a.detail["elapsed"] for a, b in itertools.pairwise(heard[:-1])]
    assert min(gaps) >= progress.HEARTBEAT
    first, last = heard[0], heard[-1]
    assert (first.round, first.detail["client"], first.detail["budget"]) == (2, 3, 9.0)
    assert not first.detail["ended"] and last.detail["ended"] and last.detail["objective"] == 0.5


def test_an_attack_that_raises_has_ended_too():
    heard = []
    with listen(heard.append), pytest.raises(ValueError, match="broken"), attacking("a", 0, 1):
        raise ValueError("broken")
    assert heard[-1].detail["ended"] and "objective" not in heard[-1].detail
    with listen(heard.append):
        heartbeat(1, 2)
    assert len(heard) == 2  # nothing runs any more


SHAPE, CLASSES = (1, 8, 8), 3
ATTACKS = {
    "dlg": (DLG(restarts=2, iterations=120), "mlp(hidden=12, activation=tanh)"),
    "inverting-gradients": (InvertingGradients(restarts=2, iterations=20), "mlp(hidden=12)"),
    "spear": (Spear(), "mlp(hidden=60)"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_long_attacks_say_how_far_they_are_and_find_the_same(name, monkeypatch):
    attack, spec = ATTACKS[name]
    x, y = examples(2, SHAPE, CLASSES, seed=1)

    def build():
        return build_model(spec, SHAPE, CLASSES, seed=0)

    update, ctx = trained(build, x, y), context(build, x, CLASSES)
    alone = attack.reconstruct(update, ctx)
    monkeypatch.setattr(progress, "HEARTBEAT", 0.0)
    heard = []
    with listen(heard.append), attacking(name, 0, 1):
        watched = attack.reconstruct(update, ctx)
    assert torch.equal(alone.x, watched.x) and torch.equal(alone.y, watched.y)
    inside = heard[1:-1]
    assert inside and all(0 <= event.done <= event.total for event in inside)
    assert max(event.done for event in inside) > 0 or name == "spear"


class Instant:
    """An attack that is done at once, or fails."""

    name, needs, seconds = "instant", Needs.NOTHING, 12.0

    def reconstruct(self, update, ctx):
        if update.client_id:
            raise ValueError("no")
        return Reconstruction(torch.zeros(1, *SHAPE), torch.tensor([0]), 0.125, 1)


def test_the_auditor_announces_each_attack_with_its_budget_and_the_watch_shows_it(capfd):
    x, y = examples(1, SHAPE, CLASSES, seed=1)

    def build():
        return build_model("mlp(hidden=4)", SHAPE, CLASSES, seed=0)

    update = trained(build, x, y)
    auditor = Auditor(None, "", context=RoundContext(1), attack_clients=2)
    auditor.attacks = [Instant()]
    with Watch(1):
        records = auditor.audit(1, [update, replace(update, client_id=1)])
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "    instant on client 0 in round 1: objective 0.12 after 0.0 of 12 s",
        "    instant on client 1 in round 1: failed after 0.0 of 12 s",
    ]
    assert '"seconds-allowed": 12.0' in records[0].extra
