"""Run folders as an engine leaves them, with invented but plausible numbers."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from fedaudit.records import AuditLog, AuditRecord, Run, load_run, write_json, write_text
from fedaudit.report.tables import records_summary

DP = "dp-sgd(epsilon=8)"
CONDITIONS = {"local-steps": 1, "batch-size": 4, "labels": "known", "batchnorm": "none", "restarts": 2}


def record(
    run_id: str, defense: str, round_number: int, quantity: str, value: float | None, **more
) -> AuditRecord:
    """A record with the fields a test does not care about filled in."""
    fields = {"client_id": None, "unit": "1", "kind": "exact", "observer": "server"} | more
    return AuditRecord(run_id, round_number, quantity=quantity, value=value, defense=defense, **fields)


def toml(tables: Mapping[str, Mapping[str, object]]) -> str:
    """Flat tables of scalars as TOML with quoted keys."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def run_info(defense: str, seed: int, clients: int, rounds: int) -> dict[str, dict[str, object]]:
    """The contents of run.toml."""
    return {
        "config": {
            "seed": seed,
            "data.name": "digits",
            "data.partitioner": "dirichlet(alpha=0.5)",
            "model.name": "mlp",
            "federation.clients": clients,
            "federation.rounds": rounds,
            "federation.fraction-train": 1.0,
            "federation.engine": "in-process",
            "strategy.name": "FedAvg",
            "train.optimizer": "sgd",
            "train.lr": 0.1,
            "train.batch-size": 16,
            "train.local-epochs": 1,
            "train.local-steps": 0,
            "defense.name": defense,
            "audit.measures": "cohort-gradient-uniqueness, example-gradient-uniqueness, mutual-information",
            "audit.observers": "server, client, oracle",
            "attack.names": "dlg(restarts=2)",
        },
        "versions": {"fedaudit": "0.1.0", "torch": "2.13.0", "flwr": "1.42.0", "opacus": "1.6.0"},
        "run": {
            "name": f"{defense.partition('(')[0]}-seed{seed}",
            "defense": defense,
            "seed": seed,
            "started": f"2026-03-0{1 + seed}T09:30:00+00:00",
            "engine": "in-process",
            "git-revision": "148b1509d1f0aa",
            "device": "cpu",
        },
    }


def fabricate(
    folder: Path, defense: str, seed: int, rounds: int = 8, clients: int = 10, ended: bool = True
) -> Run:
    """Write one run folder and read it back.

    Client 3 is refused in round 2, mutual information is skipped for client 0 in round 1;
    client 7 leaks most.
    """
    private = defense != "none"
    info = run_info(defense, seed, clients, rounds)
    name = str(info["run"]["name"])
    path = folder / name
    log = AuditLog(path)
    write_text(path / "run.toml", toml(info))
    draw = np.random.default_rng([seed, private])
    ceiling = 0.80 if private else 0.93
    image_mse = _images(path, private, draw)
    log.write_round(0, _evaluation(name, defense, 0, 0.1, draw))
    for r in range(1, rounds + 1):
        accuracy = ceiling - 0.7 * np.exp(-r / 2) + draw.normal(0, 0.01)
        rows = _evaluation(name, defense, r, accuracy, draw)
        rows.append(record(name, defense, r, "round-seconds", 1.2 + private + draw.random() / 5, unit="s"))
        for c in range(clients):
            rows += _client(name, defense, r, c, image_mse, draw)
        log.write_round(r, rows)
    run = load_run(path)
    if ended:
        write_json(path / "summary.json", records_summary(run.records))
    return load_run(path)


def _evaluation(
    name: str, defense: str, r: int, accuracy: float, draw: np.random.Generator
) -> list[AuditRecord]:
    loss = 2.3 * (1 - accuracy) ** 1.2 + abs(draw.normal(0, 0.01))
    return [
        record(name, defense, r, "accuracy", float(accuracy), kind="estimate"),
        record(name, defense, r, "loss", float(loss), unit="nats", kind="estimate"),
    ]


def _client(
    name: str, defense: str, r: int, c: int, image_mse: float, draw: np.random.Generator
) -> list[AuditRecord]:
    if c == 3 and r == 2:
        reason = "the update holds NaN in 'fc1.weight'"
        return [record(name, defense, r, "update", None, client_id=c, status="rejected", reason=reason)]
    private, exposed = defense != "none", 1.6 if c == 7 else 1.0
    rows = []

    def add(quantity: str, value: float | None, **more) -> None:
        rows.append(record(name, defense, r, quantity, value, client_id=c, **more))

    spread = float(np.exp(draw.normal(0, 0.25)))
    add("train-loss", 2.2 * np.exp(-r / 3) * spread, unit="nats", observer="client")
    add(
        "cohort-gradient-uniqueness",
        (0.5 if private else 0.9) * exposed * spread,
        kind="estimate",
        seconds=0.01,
    )
    norm = (2.0 if private else 1.1) * spread / r**0.3
    add("update-norm", norm)
    add("update-cosine", float(np.clip((0.3 if private else 0.8) + draw.normal(0, 0.05), -1, 1)))
    for observer in ("client", "oracle"):
        unique = (1.8 if private else 420.0) * exposed * spread * (1 + draw.normal(0, 0.02))
        extra = {"bound-nats": 0.5 * np.log1p(unique), "ridge": 0.02 * spread, "examples": 48}
        add(
            "example-gradient-uniqueness", unique, kind="estimate", observer=observer, extra=json.dumps(extra)
        )
    if c == 0 and r == 1:
        reason = "needs reference data of the observer's own"
        add("mutual-information", None, unit="nats", observer="oracle", status="skipped", reason=reason)
    else:
        nats = min(3.4, (0.25 if private else 2.1) * exposed * spread)
        extra = {"ceiling-nats": np.log(32), "dv": nats * 1.1, "p-value": 0.3 if private else 0.005, "k": 32}
        where = {"unit": "nats", "kind": "lower", "observer": "oracle"}
        add(
            "mutual-information",
            nats,
            **where,
            low=nats - 0.1,
            high=nats + 0.1,
            extra=json.dumps(extra),
            seconds=0.4,
        )
    if c == 3 and r == 1:
        scores = {"psnr": (-10 * np.log10(image_mse), "dB"), "mse": (image_mse, "1")}
        scores |= {"ssim": (0.05 if private else 0.97, "1"), "label-accuracy": (1.0, "1")}
        for score, (value, unit) in scores.items():
            add(f"dlg.{score}", float(value), unit=unit, observer="oracle", extra=json.dumps(CONDITIONS))
    if private:
        epsilon = 3.0 * r**0.45 + (0.2 if c == 4 else 0.0)
        privacy = {"epsilon": epsilon, "delta": 1e-3, "privacy_unit": "example", "accountant": "rdp"}
        add("epsilon", epsilon, kind="upper", **privacy)
    return rows


def _images(path: Path, private: bool, draw: np.random.Generator) -> float:
    """Record a batch as if it had been attacked; returns its mean squared error."""
    original = (load_digits().images[:4] / 16).astype(np.float32)[:, None]
    noise = draw.normal(0, 0.4 if private else 0.03, original.shape)
    recovered = np.clip(original + noise, 0, 1).astype(np.float32)
    mse = float(np.mean((original - recovered) ** 2))
    meta = {"attack": "dlg", "round": "1", "client": "3", "psnr": f"{-10 * np.log10(mse):.3f}"}
    meta["conditions"] = json.dumps(CONDITIONS)
    (path / "attacks").mkdir()
    tensors = {"original": original, "reconstruction": recovered}
    save_file(tensors, path / "attacks" / "round-00001-client-3-dlg.safetensors", metadata=meta)
    return mse
