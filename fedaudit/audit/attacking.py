"""Attacks on one round's updates: run, graded by a threat card and scored against the truth, as rows."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedaudit.audit.rows import AuditRows
from fedaudit.kept_files import save_images
from fedaudit.needs import missing
from fedaudit.progress import announce, attacking
from fedaudit.types import Attack, ClientUpdate, Estimate, Oracle, Reconstruction, RoundContext, Skip

logger = logging.getLogger(__name__)


def run_attack(
    attack: Attack,
    updates: Sequence[ClientUpdate],
    ctx: RoundContext,
    rows: AuditRows,
    *,
    oracle: Oracle | None = None,
    images: Path | None = None,
    lpips: bool = False,
) -> None:
    """Attack each update; an attack that lacks what it needs, or fails, becomes a row that says so.

    Args:
        attack: what runs.
        updates: what it runs on.
        ctx: what the server knows.
        rows: takes the objective and, if there is an oracle, the scores.
        oracle: knows the truth; simulation only.
        images: folder that originals and reconstructions are kept in; None keeps none.
        lpips: score by LPIPS too.
    """
    lacking = missing(attack.needs, ctx.known, ctx.summed)
    budget = float(getattr(attack, "seconds", 0.0))
    objective = f"{attack.name}.objective"
    for number, update in enumerate(updates, 1):
        if lacking:
            rows.add(objective, "1", "server", Skip(lacking), 0.0, update)
            continue
        started = time.perf_counter()
        try:
            with attacking(attack.name, update.client_id, update.round, budget) as told:
                found = attack.reconstruct(update, ctx)
                told["objective"] = found.objective
        except Exception as error:
            logger.warning("attack %s failed: %s", attack.name, error)
            rows.add(objective, "1", "server", error, time.perf_counter() - started, update)
            continue
        seconds = time.perf_counter() - started
        found = _with_card(found, update, ctx, rows.defense)
        limit = {"seconds-allowed": budget} if budget else {}
        extra = {**found.conditions, "steps": found.steps, **limit}
        rows.add(
            objective, "1", "server", Estimate(found.objective, "1", "exact", extra=extra), seconds, update
        )
        if oracle is not None:
            _score(attack.name, found, update, ctx, rows, oracle, images, lpips)
        elif images is not None:
            save_images(images, attack.name, found, None, update, ctx, {})
        announce("audit", number, len(updates), update.round, name=attack.name)


def _with_card(
    found: Reconstruction, update: ClientUpdate, ctx: RoundContext, defense: str
) -> Reconstruction:
    """The reconstruction with its threat card among its conditions."""
    from fedaudit.attacks.threat_card import threat_card

    if ctx.build_model is None:
        return found
    with torch.random.fork_rng(devices=[]):
        model = ctx.build_model()
    card = threat_card(model, update, ctx, found.conditions, defense)
    return replace(found, conditions={**found.conditions, **card.as_extra()})


def _score(
    name: str,
    found: Reconstruction,
    update: ClientUpdate,
    ctx: RoundContext,
    rows: AuditRows,
    oracle: Oracle,
    images: Path | None,
    lpips: bool,
) -> None:
    """Scores against the truth: an oracle's rows, apart from the attack that must not see it."""
    from fedaudit.attacks import scores
    from fedaudit.audit.attack_scores import scored

    try:
        truth = oracle.truth(update)
        results = scores.score(found.x, found.y, truth.x, truth.y, ctx.value_range)
        found_scores = list(scored(found, truth, update, ctx, results, perceptual=lpips))
    except Exception as error:
        rows.add(f"{name}.psnr", "dB", "oracle", error, 0.0, update)
        return
    for score, unit, finding in found_scores:
        rows.add(f"{name}.{score}", unit, "oracle", finding, 0.0, update)
    if images is not None:
        save_images(images, name, found, truth.x, update, ctx, results)
