"""What every defense owes its client, and what each that acts on a finished update does to it."""

import math

import pytest
import torch
from scipy.stats import chi2, norm
from torch import Generator, nn

from fedaudit.accounting import Ledger, epsilon
from fedaudit.claims import GaussianNoise, QuantizationLevels, Sparsity
from fedaudit.defenses.base import BudgetedByRound, Defense
from fedaudit.defenses.censor import Censor
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.defenses.gaussian import GaussianUpdate, clip_update
from fedaudit.defenses.larger_batch import LargerBatch
from fedaudit.defenses.none import NoDefense
from fedaudit.defenses.quantize import Quantize, Sign
from fedaudit.defenses.sparsify import RandomSparsify, TopK
from fedaudit.defenses.withhold_layers import WithholdLayers
from fedaudit.errors import BudgetExhaustedError, ConfigError
from fedaudit.maths.gaussian_mechanism import gaussian_delta, gaussian_epsilon, gaussian_noise_multiplier
from fedaudit.registry import DEFENSES
from fedaudit.spec import parse_spec
from fedaudit.training.local import TrainSettings, weights_to_send
from fedaudit.training.round_release import plan
from fedaudit.types import ClientUpdate, Guarantee, StepRelease

OPTIONS = {"withhold": "(layers=0)"}
NAMES = [name + OPTIONS.get(name, "") for name in DEFENSES]
PLAIN = StepRelease(None, 0.0, 1.0)


def update(seed=0, scale=1.0):
    """An update with a matrix, a vector, a scalar and a buffer."""
    shapes = {"0.weight": (6, 5), "0.bias": (6,), "1.scale": (), "1.running_mean": (7,)}
    generator = Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def flat(delta):
    return torch.cat([change.reshape(-1) for change in delta.values()])


def built(spec):
    defense = DEFENSES.build(parse_spec(spec))
    if isinstance(defense, BudgetedByRound):
        return defense.over_rounds(3)
    return plan(defense, TrainSettings(batch_size=10, local_steps=10), 3)


def draws(defense, delta, count):
    """`count` protected versions of one update (count, P)."""
    generator = Generator().manual_seed(5)
    return torch.stack([flat(defense.protect(delta, generator)) for _ in range(count)])


@pytest.mark.parametrize("spec", NAMES)
def test_a_defense_keeps_names_shapes_and_types_and_changes_nothing_in_place(spec):
    defense, delta = built(spec), update()
    kept = {name: change.clone() for name, change in delta.items()}
    sent = defense.protect(delta, Generator().manual_seed(0))
    assert isinstance(defense, Defense) and list(sent) == list(delta)
    for name, change in delta.items():
        assert (sent[name].shape, sent[name].dtype) == (change.shape, change.dtype)
        assert torch.equal(change, kept[name])
        assert bool(sent[name].isfinite().all())


@pytest.mark.parametrize("spec", NAMES)
def test_what_is_sent_depends_on_the_generators_seed_alone(spec):
    defense, delta = built(spec), update()
    first = defense.protect(delta, Generator().manual_seed(3))
    with torch.random.fork_rng():
        torch.random.manual_seed(1)
        again = defense.protect(delta, Generator().manual_seed(3))
    assert all(torch.equal(first[name], again[name]) for name in delta)


@pytest.mark.parametrize("spec", NAMES)
def test_a_zero_update_survives_every_defense(spec):
    sent = built(spec).protect({n: torch.zeros_like(c) for n, c in update().items()}, Generator())
    assert all(bool(change.isfinite().all()) for change in sent.values())


@pytest.mark.parametrize("spec", NAMES)
def test_a_guarantee_travels_with_delta_unit_and_accountant_or_there_is_none(spec):
    defense = built(spec)
    release = defense.release(num_examples=50, batch_size=10, planned_steps=30)
    ledger = defense.charge(Ledger(), release, 10, 50)
    guarantee = defense.guarantee(ledger, 50)
    if release.noise_std or isinstance(defense, GaussianUpdate):
        assert 0 < guarantee.epsilon <= 8 and 0 < guarantee.delta < 1 and guarantee.accountant
        assert guarantee.unit == ("client" if defense.name == "gaussian" else "example")
    else:
        assert guarantee is None and ledger == Ledger()


@pytest.mark.parametrize("defense", [NoDefense(), DPSGD(), Censor(), LargerBatch()], ids=lambda d: d.name)
def test_a_defense_of_steps_sends_the_weights_it_trained_to_the_last_bit(defense):
    before = {**update(), "1.count": torch.tensor(3)}
    after = {**update(seed=1), "1.count": torch.tensor(5)}
    sent = weights_to_send(defense, before, after, Generator())
    assert all(sent[name] is after[name] for name in after)


def test_an_altered_update_is_added_to_the_broadcast_and_counters_stay():
    before = {**update(), "1.count": torch.tensor(3)}
    after = {**update(seed=1), "1.count": torch.tensor(5)}
    sent = weights_to_send(WithholdLayers("0"), before, after, Generator())
    assert int(sent["1.count"]) == 3
    assert torch.equal(sent["0.weight"], before["0.weight"])
    assert torch.equal(sent["1.running_mean"], after["1.running_mean"])


# --- Gaussian -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_an_update_is_clipped_over_all_its_entries_together(scale):
    delta = update(scale=scale)
    clipped, length = flat(clip_update(delta, 0.5)), float(flat(delta).double().norm())
    assert float(clipped.norm()) == pytest.approx(min(0.5, length), rel=1e-12)
    assert float(torch.cosine_similarity(clipped, flat(delta).double(), dim=0)) == pytest.approx(1, abs=1e-12)


def test_a_scalar_alone_is_clipped():
    assert float(clip_update({"scale": torch.tensor(-7.0)}, 2.0)["scale"]) == -2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_sent_as_noise_alone(bad):
    delta = {**update(), "1.scale": torch.tensor(bad)}
    defense = GaussianUpdate(clip_norm=0.5, noise_multiplier=1.0)
    zero = {name: torch.zeros_like(change) for name, change in delta.items()}
    sent, noise = (defense.protect(d, Generator().manual_seed(1)) for d in (delta, zero))
    assert torch.equal(flat(sent), flat(noise)) and bool(flat(noise).isfinite().all())


def test_every_coordinate_holds_noise_of_the_stated_deviation():
    delta = update(scale=3.0)
    defense = GaussianUpdate(clip_norm=0.5, noise_multiplier=2.0)
    count = 4000
    z = (draws(defense, delta, count).double() - flat(clip_update(delta, 0.5))) / (2.0 * 0.5)
    low, high = chi2.ppf([1e-5, 1 - 1e-5], count)  # one interval for each of the 44 coordinates
    squares = z.square().sum(0)
    assert low < float(squares.min()) and float(squares.max()) < high
    assert float(z.mean(0).abs().max()) < 5 / math.sqrt(count)
    correlation = (z.T @ z / count).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5.5 / math.sqrt(count)


def test_one_release_takes_the_noise_of_the_analytic_gaussian_mechanism():
    assert GaussianUpdate(epsilon=1.0, delta=1e-5, rounds=1).sigma == pytest.approx(3.730632, abs=1e-6)
    mu = 1 / GaussianUpdate(epsilon=5.0, delta=1e-6, rounds=1).sigma
    delta = norm.cdf(mu / 2 - 5 / mu) - math.exp(5) * norm.cdf(-mu / 2 - 5 / mu)
    assert delta == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_noise_for_a_target_reaches_it_from_the_private_side(target, steps):
    sigma = gaussian_noise_multiplier(target, 1e-5, steps)
    assert gaussian_delta(target, math.sqrt(steps) / sigma) <= 1e-5
    assert gaussian_epsilon(sigma, 1e-5, steps) == pytest.approx(target, rel=1e-6)


@pytest.mark.parametrize("accountant", ["analytic", "rdp", "pld"])
def test_a_client_in_every_round_spends_its_budget_and_stops_then(accountant):
    defense = GaussianUpdate(epsilon=4.0, accountant=accountant).over_rounds(5)
    ledger = Ledger()
    for round_number in range(1, 6):  # between rounds the ledger travels as plain lists; steps do not matter
        ledger = Ledger.from_lists(defense.charge(ledger, PLAIN, 17, 10).to_lists())
        assert ledger.steps == round_number
    guarantee = defense.guarantee(ledger, 10)
    assert guarantee == Guarantee(guarantee.epsilon, 1e-5, "client", accountant)
    assert guarantee.epsilon == pytest.approx(4.0, rel=2e-3) and guarantee.epsilon <= 4.0 * (1 + 1e-6)
    with pytest.raises(
        BudgetExhaustedError, match=r"one more update would raise .* to 4\.\d+.*budget of 4 at"
    ):
        defense.charge(ledger, PLAIN, 17, 10)


@pytest.mark.parametrize("rounds", [1, 3, 40])
def test_the_exact_epsilon_of_rounds_is_that_of_composed_privacy_losses(rounds):
    defense = GaussianUpdate(epsilon=0.0, noise_multiplier=4.0)
    ledger = Ledger()
    for _ in range(rounds):
        ledger = defense.charge(ledger, PLAIN, 1, 10)
    exact = defense.guarantee(ledger, 10).epsilon
    assert epsilon(ledger, 1e-5, "pld") == pytest.approx(exact, rel=1e-3)
    assert exact <= epsilon(ledger, 1e-5, "rdp")


def test_rounds_of_the_run_are_used_unless_the_option_says_otherwise():
    assert GaussianUpdate().over_rounds(4).sigma == pytest.approx(2 * GaussianUpdate(rounds=1).sigma)
    assert GaussianUpdate(rounds=1).over_rounds(4).rounds == 1
    with pytest.raises(ValueError, match="divides epsilon over rounds, got none"):
        GaussianUpdate().protect(update(), Generator())


# --- sparsity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 5), (0.25, 11), (0.5, 22), (1.0, 44), (1e-9, 1)])
@pytest.mark.parametrize("kind", [TopK, RandomSparsify])
def test_exactly_the_stated_share_of_coordinates_is_sent(kind, fraction, count):
    sent = kind(fraction).protect(update(), Generator().manual_seed(0))
    assert int(flat(sent).count_nonzero()) == count


def test_the_largest_coordinates_are_sent_as_they_are():
    delta = flat(update())
    sent = flat(TopK(0.25).protect(update(), Generator()))
    order = delta.abs().argsort(descending=True)
    assert torch.equal(sent[order[:11]], delta[order[:11]])
    assert not bool(sent[order[11:]].any())


def test_equal_magnitudes_do_not_add_coordinates():
    assert int(TopK(0.3).protect({"w": torch.ones(10)}, Generator())["w"].count_nonzero()) == 3


def test_pruning_per_layer_keeps_the_share_in_every_tensor():
    delta = {**update(), "0.bias": 100 * update()["0.bias"]}
    sent = TopK(0.5, over="layer").protect(delta, Generator())
    assert {name: int(c.count_nonzero()) for name, c in sent.items()} == {
        "0.weight": 15,
        "0.bias": 3,
        "1.scale": 1,
        "1.running_mean": 4,
    }


def test_random_sparsification_is_unbiased_unless_it_is_told_not_to_be():
    delta, count = update(), 4000
    for unbiased, expected in ((True, flat(delta)), (False, flat(delta) * 11 / 44)):
        sent = draws(RandomSparsify(0.25, unbiased=unbiased), delta, count).double()
        error = (sent.mean(0) - expected) / (sent.std(0) / math.sqrt(count))
        assert float(error.abs().max()) < 4
    assert float((sent != 0).double().mean(0).sub(0.25).abs().max()) < 4 * math.sqrt(0.25 * 0.75 / count)


# --- levels -------------------------------------------------------------------------------------------


def test_signs_are_sent_times_the_mean_magnitude_of_their_tensor():
    delta = update()
    for name, sent in Sign().protect(delta, Generator()).items():
        torch.testing.assert_close(sent, delta[name].sign() * delta[name].abs().mean())
    fixed = Sign(scale="fixed", step=0.25).protect(delta, Generator())
    assert set(flat(fixed).tolist()) == {-0.25, 0.25}


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_quantised_coordinates_are_neighbours_on_the_grid(bits):
    delta = update()
    for name, sent in Quantize(bits).protect(delta, Generator().manual_seed(1)).items():
        unit = float(delta[name].abs().max()) / (2 ** (bits - 1) - 1)
        steps = sent.double() / unit
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert float(steps.abs().max()) <= 2 ** (bits - 1) - 1 + 1e-4
        assert float((sent - delta[name]).abs().max()) <= unit * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_stochastic_quantisation_is_unbiased(bits):
    delta, count = update(), 4000
    sent = draws(Quantize(bits), delta, count).double()
    spread = sent.std(0) / math.sqrt(count)
    error = (sent.mean(0) - flat(delta)).abs()
    assert bool((error <= 4 * spread + 1e-5).all())
    assert int((spread > 0).sum()) == 44 - 4  # each tensor's largest coordinate lies on the grid


# --- withheld layers ----------------------------------------------------------------------------------


def test_withheld_layers_send_zeros_and_the_others_are_sent_as_they_are():
    delta = update()
    sent = WithholdLayers("0.bias+1").protect(delta, Generator())
    assert not any(bool(sent[name].any()) for name in ("0.bias", "1.scale", "1.running_mean"))
    assert sent["0.weight"] is delta["0.weight"]


def test_a_layer_the_model_does_not_have_is_refused_with_those_it_has():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"withhold names layers of the model, got '1': choose from 0, 2"):
        WithholdLayers("1").prepare(model, optimizer, PLAIN, 4, None)
    with pytest.raises(ValueError, match=r"withholding '0\+2' leaves nothing to send"):
        WithholdLayers("0+2").prepare(model, optimizer, PLAIN, 4, None)
    assert WithholdLayers("0").prepare(model, optimizer, PLAIN, 4, None) == (model, optimizer)


# --- claims and options -------------------------------------------------------------------------------


def test_each_defense_claims_what_it_does():
    seen = ClientUpdate(0, 1, update(), update(), 10)
    settings = TrainSettings()
    assert TopK(0.2).claims(seen, settings) == RandomSparsify(0.2).claims(seen, settings) == [Sparsity(0.2)]
    assert Quantize(3).claims(seen, settings) == [QuantizationLevels(7)]
    assert Sign().claims(seen, settings) == [QuantizationLevels(3)]
    assert WithholdLayers("0").claims(seen, settings) == [Sparsity(8 / 44)]
    claims = GaussianUpdate(clip_norm=0.5, noise_multiplier=2.0).claims(seen, settings)
    assert GaussianNoise(1.0, signal=0.5) in claims and len(claims) == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gaussian(epsilon=0)", "epsilon > 0 or noise-multiplier > 0, got 0 for both"),
        ("gaussian(epsilon=-1)", "epsilon must be a number >= 0, got -1.0"),
        ("gaussian(clip-norm=0)", "clip-norm must be a number > 0, got 0.0"),
        ("gaussian(delta=1)", r"delta must lie in \(0, 1\), got 1.0"),
        ("gaussian(rounds=-1)", "rounds must be >= 0, got -1"),
        ("gaussian(accountant=classic)", "'analytic', 'rdp', 'prv' or 'pld'"),
        ("top-k(fraction=0)", r"fraction must lie in \(0, 1\], got 0.0"),
        ("top-k(over=tensor)", "'all' or 'layer'"),
        ("random-sparsify(fraction=1.5)", r"fraction must lie in \(0, 1\], got 1.5"),
        ("sign(scale=max)", "'mean-abs' or 'fixed'"),
        ("sign(step=0)", "step must be a number > 0, got 0.0"),
        ("quantize(bits=1)", "bits must lie between 2 and 16, got 1: for one bit use sign"),
        ("withhold", r"withhold needs layers: write withhold\(layers=...\)"),
        ("withhold(layers=0++1)", r"names joined by '\+', got '0\+\+1'"),
    ],
)
def test_impossible_options_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        DEFENSES.build(parse_spec(spec))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_noise_multiplier(0.0, 1e-5), "epsilon must be a number > 0, got 0.0"),
        (lambda: gaussian_noise_multiplier(1.0, 0.0), r"delta must lie in \(0, 1\), got 0.0"),
        (lambda: gaussian_noise_multiplier(1.0, 1e-5, 0), "steps must be >= 1, got 0"),
        (lambda: TopK(over="tensor"), "over must be all or layer, got 'tensor'"),
        (lambda: Sign(scale="max"), "scale must be mean-abs or fixed, got 'max'"),
        (lambda: GaussianUpdate(accountant="gdp"), "accountant must be analytic, rdp, prv, pld, got 'gdp'"),
    ],
)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
