"""How each attack's success falls with batch size, local steps, training progress and defense.

    python -m benchmarks.attack_conditions [--chromium chromium]

One client of a federation on handwritten digits. From the usual case (two examples, one step, untrained, no
defense) one condition changes at a time; the defenses are all that are registered, and so are the attacks.
Most attack a ReLU perceptron; an attack that needs another network has its own, with its own usual case.
Every number is the mean PSNR over `--repeats` updates of different examples, images matched to the truth. An
attack that refuses an update is counted as refused, not as 0 dB.

Attacks are used as they are and know nothing of the defense, with two exceptions: a layer that is zero
throughout is taken as withheld, and labels that cannot be derived are optimised. So a small number says that
this attack failed. Batches have the expected size also under
DP-SGD, whose noise is planned for Poisson sampling: favourable to the attacker. Beside the defenses stands
what they do in a federation: membership by one score, and test accuracy.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.attack_conditions_figure import draw
from benchmarks.defended_federations import federations
from benchmarks.measurement import keep
from fedaudit.accounting import Ledger
from fedaudit.attacks.scores import match, psnr, score
from fedaudit.audit.attack_scores import RECOVERED_DB
from fedaudit.audit.secure_sum import SUM, context_of_sum
from fedaudit.config import RunConfig
from fedaudit.defenses.chain import central
from fedaudit.federation.setup import Setup
from fedaudit.registry import ATTACKS, DEFENSES, parts_of
from fedaudit.spec import parse_spec
from fedaudit.training.local import TrainSettings, train_locally, weights_to_send
from fedaudit.training.round_release import stated_release
from fedaudit.types import ClientUpdate, Reconstruction, RoundContext

CLIENTS, ROUNDS, LR = 4, 40, 0.1
TRAINED_STEPS = (0, 50, 200, 800)
RELEASED = "released model only: "  # begins the defense of a case in which nobody sees an update


@dataclass(frozen=True)
class Case:
    """Conditions of an update; `defense` may name the network's {first} and {head} layer."""

    batch_size: int
    local_steps: int = 1
    trained: int = 0
    defense: str = "none"


@dataclass(frozen=True)
class Network:
    """What is attacked: a model, the layers that defenses name, and the usual batch size."""

    model: str
    first: str
    head: str
    batch_size: int = 2

    def case(self, changed: Mapping[str, Any]) -> Case:
        """The usual case with what is changed in it."""
        return replace(Case(self.batch_size), **changed)


PERCEPTRON = Network("mlp(hidden=128, activation=relu)", "fc1", "fc2")
LENET = Network("lenet", "conv1", "fc1", batch_size=1)
IMPRINTED = Network("imprinted(base=mlp, bins=64, mean=0.305, std=0.034)", "imprint", "model.fc2")
NETWORKS = {"r-gap": LENET, "imprint": IMPRINTED}
DEFENDED = {
    "none": "none",
    "dp-sgd, ε = 100": "dp-sgd(epsilon=100, clip-norm=1)",
    "dp-sgd, ε = 8": "dp-sgd(epsilon=8, clip-norm=1)",
    "leakage-adaptive, ε = 8, decay, last round": "leakage-adaptive(epsilon=8, clip-norm=1, driver=decay)",
    "gaussian, ε = 8": "gaussian(epsilon=8, clip-norm=1)",
    "gaussian, noise 0.001 (no ε)": "gaussian(epsilon=0, noise-multiplier=0.001, clip-norm=1)",
    "central-dp, ε = 8: server's view, unprotected": "central-dp(epsilon=8, clip=1)",
    "central-dp, ε = 8: released model only": f"{RELEASED}central-dp(epsilon=8, clip=1)",
    "top-k, 10 % of each layer": "top-k(fraction=0.1, over=layer)",
    "random-sparsify, 10 %": "random-sparsify(fraction=0.1)",
    "sign": "sign",
    "quantize, 4 bits": "quantize(bits=4)",
    "withhold the first layer": "withhold(layers={first})",
    "withhold the head": "withhold(layers={head})",
    "secure-aggregation: only the sum is seen": "secure-aggregation",
    "censor, 10 % of examples": "censor(fraction=0.1)",
    "larger-batch, 4 times": "larger-batch(factor=4)",
}
"""Every registered defense, by how the figure names it."""
PANELS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch size": ("batch_size", {str(n): n for n in (1, 2, 4, 8, 16)}),
    "local steps": ("local_steps", {str(n): n for n in (1, 2, 4)}),
    "steps of training before": ("trained", {str(n): n for n in TRAINED_STEPS}),
    "defense": ("defense", DEFENDED),
}


def attack_specs(iterations: int) -> dict[str, str]:
    """Every registered attack with its options."""
    descent = f"restarts=4, iterations={iterations}"
    return {
        "dlg": f"dlg(restarts=1, iterations={iterations})",
        "inverting-gradients": f"inverting-gradients({descent})",
        "see-through-gradients": f"see-through-gradients({descent})",
        "local-steps": f"local-steps({descent})",
        "linear-layer": "linear-layer",
        "spear": "spear(submatrices=10000)",
        "r-gap": "r-gap",
        "imprint": "imprint",
    }


def main() -> None:
    """Attack under every condition and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=300, help="of attacks by gradient descent")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--chromium", help="a browser that turns the figure into a PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    specs = attack_specs(options.iterations)
    check_complete(specs)
    rows = [row for name, spec in specs.items() for row in conditions_of(name, spec, options.repeats)]
    results = {
        "settings": {
            "attacks": specs,
            "networks": {name: asdict(NETWORKS.get(name, PERCEPTRON)) for name in specs},
            "data": "digits, 1x8x8, values 0 to 1",
            "clients": CLIENTS,
            "rounds-that-budgets-are-divided-over": ROUNDS,
            "lr": LR,
            "optimizer": "sgd",
            "repeats": options.repeats,
            "batchnorm": "no network has BatchNorm or dropout; attacks assume train mode",
            "labels": "never known to an attack; `labels` of a row says how it came by them",
            "recovered-above-db": RECOVERED_DB,
            "guess-psnr": guess(options.repeats),
        },
        "rows": rows,
        "federations": federations(DEFENDED, RELEASED, PERCEPTRON.model, vars(PERCEPTRON)),
        "cpu-seconds": 0.0,
    }
    results["cpu-seconds"] = round(time.process_time() - started, 1)
    keep("attack_conditions", results, options.output)
    draw(results, options.chromium)


def check_complete(specs: Mapping[str, str]) -> None:
    """Raise unless every registered attack and defense has its place."""
    used = {part for spec in DEFENDED.values() for part in parts_of(spec.removeprefix(RELEASED))}
    missing = sorted({*ATTACKS, *DEFENSES} - {*specs, *used})
    if missing:
        raise SystemExit(f"every attack and defense belongs into the figure, missing: {', '.join(missing)}")


def conditions_of(attack: str, spec: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for every value of every condition; equal cases are attacked once."""
    network = NETWORKS.get(attack, PERCEPTRON)
    stages = weights_over_training(network)
    found: dict[Case, dict[str, Any]] = {}
    for panel, (field, values) in PANELS.items():
        for shown, value in values.items():
            case = network.case({field: value})
            if case not in found:
                found[case] = attacked(network, stages[case.trained], spec, case, repeats)
            yield {"condition": panel, "value": shown, "attack": attack, **found[case]}


def federation(network: Network, case: Case) -> Setup:
    """The federation a case is about."""
    defense = case.defense.removeprefix(RELEASED).format(first=network.first, head=network.head)
    config = {
        "model.name": network.model,
        "federation.clients": CLIENTS,
        "federation.rounds": ROUNDS,
        "federation.device": "cpu",
        "train.lr": LR,
        "train.batch-size": case.batch_size,
        "train.local-steps": case.local_steps,
        "defense.name": defense,
    }
    return Setup(RunConfig.from_flat(config), CLIENTS)


def weights_over_training(network: Network) -> dict[int, dict[str, Tensor]]:
    """Weights after so many plain steps on the training data."""
    made = federation(network, network.case({}))
    model, data = made.build_model(), made.data.train
    generator = torch.Generator().manual_seed(1)
    found = {}
    for step in range(max(TRAINED_STEPS) + 1):
        if step in TRAINED_STEPS:
            found[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rows = torch.randint(len(data.y), (32,), generator=generator)
        settings = TrainSettings(lr=LR, batch_size=32, local_steps=1)
        train_locally(model, data.x[rows], data.y[rows], [torch.arange(32)], settings)
    return found


def attacked(
    network: Network, weights: dict[str, Tensor], spec: str, case: Case, repeats: int
) -> dict[str, Any]:
    """PSNR of one attack over several updates made under one case, and under what it was reached."""
    made, attack = federation(network, case), ATTACKS.build(parse_spec(spec))
    values, labels, seconds, recovered, truth, batch = [], [], 0.0, 0, 0, 0
    reasons: Counter[str] = Counter()
    conditions: Mapping[str, Any] = {}
    for repeat in range(repeats):
        x, y, update, ctx = victim(made, weights, case, repeat)
        truth, batch = truth + len(y), ctx.batch_size or 0
        begin = time.process_time()
        try:
            found = reconstruction(attack, update, ctx)
        except ValueError as error:
            reasons[str(error)] += 1
            continue
        finally:
            seconds += time.process_time() - begin
        conditions = found.conditions
        scores = score(found.x, found.y, x, y, ctx.value_range)
        values.append(scores["psnr"])
        labels.append(scores["label_accuracy"])
        errors = match(found.x.clamp(*ctx.value_range), x)[2]
        recovered += int((psnr(errors, ctx.value_range) > RECOVERED_DB).sum())
    spread = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)} if values else {}
    said = {key: conditions[key] for key in ("labels", "batchnorm-mode", "active") if key in conditions}
    return {
        **{name: round(value, 2) for name, value in spread.items()},
        **({"label-accuracy": round(statistics.fmean(labels), 3)} if labels else {}),
        "recovered": recovered,
        "examples": truth,
        "updates": repeats,
        "refused": sum(reasons.values()),
        **({"refusals": dict(reasons)} if reasons else {}),
        "defense": made.config.defense.name,
        "examples-in-a-step": batch,
        "local-steps": case.local_steps,
        "steps-of-training-before": case.trained,
        **said,
        "cpu-seconds": round(seconds, 2),
    }


def reconstruction(attack: Any, update: ClientUpdate, ctx: RoundContext) -> Reconstruction:
    """What an attack makes of an update; where it cannot derive labels it optimises them.

    Raises:
        ValueError: if it refuses the update.
    """
    found: Reconstruction
    try:
        found = attack.reconstruct(update, ctx)
    except ValueError:
        if getattr(attack, "labels", "") != "counts":
            raise
        found = replace(attack, labels="joint").reconstruct(update, ctx)
    if not bool(found.x.isfinite().all()):
        raise ValueError("the reconstruction is not finite")
    return found


def victim(
    made: Setup, weights: dict[str, Tensor], case: Case, repeat: int
) -> tuple[Tensor, Tensor, ClientUpdate, RoundContext]:
    """Examples, what the attacker sees of the round that was trained on them, and what it knows."""
    ctx = replace(made.context(1), num_updates=1)
    released, summed = case.defense.startswith(RELEASED), made.secure is not None
    sent = [client_round(made, weights, c, repeat) for c in range(CLIENTS if released or summed else 1)]
    x, y = torch.cat([x for x, _, _ in sent]), torch.cat([y for _, y, _ in sent])
    updates = [update for _, _, update in sent]
    if made.secure is not None:
        seen = made.secure(updates, range(CLIENTS))
    elif released:
        seen = release(made, updates, repeat)
    else:
        seen = updates[0]
    ctx = context_of_sum(ctx, seen) if seen.summed else ctx
    present = {name: change for name, change in seen.delta.items() if bool(change.any())}
    return x, y, replace(seen, delta=present), ctx


def client_round(
    made: Setup, weights: dict[str, Tensor], client: int, repeat: int
) -> tuple[Tensor, Tensor, ClientUpdate]:
    """One local round of a client, by the recipe: consecutive ones of the examples it trains on.

    The last round's release where a defense changes it from round to round.
    """
    own_x, own_y = made.training_data(client, weights)
    settings = made.settings(1)
    used = settings.batch_size * settings.local_steps
    rows = torch.arange(repeat * used, (repeat + 1) * used) % len(own_y)
    x, y = own_x[rows], own_y[rows]
    model = made.build_model()
    model.load_state_dict(weights)
    released = made.release_in_round(len(own_y), ROUNDS, Ledger(), None)
    noise = torch.Generator().manual_seed(2 * (CLIENTS * repeat + client))
    chance = torch.Generator().manual_seed(2 * (CLIENTS * repeat + client) + 1)
    batches = list(torch.arange(used).split(settings.batch_size))
    train_locally(model, x, y, batches, settings, defense=made.defense, release=released, generator=noise)
    trained = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    after = weights_to_send(made.defense, weights, trained, chance)
    delta = {name: after[name] - tensor for name, tensor in weights.items()}
    stated = stated_release(made.defense, released)
    return x, y, ClientUpdate(client, 1, weights, delta, len(own_y), stated)


def release(made: Setup, updates: Sequence[ClientUpdate], repeat: int) -> ClientUpdate:
    """The change of the global model that a central mechanism releases, seen as a sum."""
    defense = central(made.defense)
    assert defense is not None
    first, mechanism = updates[0], defense.central_plan(CLIENTS, CLIENTS).mechanism
    made_public = mechanism.release(
        [update.delta for update in updates],
        [update.num_examples for update in updates],
        first.before,
        mechanism.clip_norm,
        np.random.default_rng(repeat),
    )
    change = {name: value.to(first.before[name].dtype) for name, value in made_public.change.items()}
    total = sum(update.num_examples for update in updates)
    return ClientUpdate(SUM, 1, first.before, change, total, summed=tuple(range(CLIENTS)))


def guess(repeats: int) -> float:
    """PSNR of the mean reference image, guessed for every example of the usual case."""
    made = federation(PERCEPTRON, PERCEPTRON.case({}))
    assert made.data.reference is not None
    x, y = made.client_data(0)
    count = PERCEPTRON.batch_size * repeats
    images = made.data.reference.x.mean(0).expand(count, *made.input_shape)
    return round(score(images, y[:count], x[:count], y[:count])["psnr"], 2)


if __name__ == "__main__":
    main()
