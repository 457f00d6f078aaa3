"""Masks hide single vectors and cancel in the sum, whoever drops out; rounding stays within its bound."""

import math

import pytest
import torch
from scipy.stats import chi2
from torch import Generator

from fedaudit.accounting import Ledger
from fedaudit.defenses.chain import chain, secure_part
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.defenses.gaussian import GaussianUpdate
from fedaudit.defenses.secure_aggregation import (
    MaskKeys,
    SecureAggregation,
    TooFewClientsError,
    mask,
    mask_graph,
    masked_vectors,
    unmasked_sum,
)
from fedaudit.defenses.sparsify import TopK
from fedaudit.errors import ConfigError
from fedaudit.registry import DEFENSES, changes_update, shows_sums_only
from fedaudit.spec import parse_spec

RING, SIZE = 20, 4096
CLIENTS = (0, 3, 4, 7, 2**63 + 5)  # node ids have up to 64 bits


def vectors(clients=CLIENTS, size=SIZE):
    generator = Generator().manual_seed(1)
    return {c: torch.randint(0, 1000, (size,), generator=generator) for c in clients}


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("shift", [0, RING - 4], ids=["lowest bits", "highest bits"])
def test_a_single_masked_vector_is_uniform_in_the_ring(shift):
    constant = {client: torch.full((SIZE,), 12345) for client in CLIENTS}  # no other vector is less uniform
    sent = masked_vectors(constant, mask_graph(CLIENTS, 0, 1), MaskKeys(1, 1), RING)
    for vector in sent.values():
        assert int(vector.min()) >= 0 and int(vector.max()) < 2**RING
        counts = torch.bincount((vector >> shift) & 15, minlength=16).double()
        assert chi_square(counts) < chi2.isf(1e-4, 15)


def test_the_same_holds_against_a_server_that_knows_every_mask_but_one():
    keys, graph = MaskKeys(2, 1), mask_graph(CLIENTS, 0, 1)
    sent = masked_vectors({c: torch.full((SIZE,), 9) for c in CLIENTS}, graph, keys, RING)
    seen = sent[3] - mask(keys.own(3), SIZE, RING)
    for other in (0, 4, 7):
        seen += mask(keys.pair(3, other), SIZE, RING) * (1 if other < 3 else -1)
    counts = torch.bincount((seen % 2**RING) >> (RING - 4), minlength=16).double()
    assert chi_square(counts) < chi2.isf(1e-4, 15)  # the mask shared with the fifth client is left
    seen -= mask(keys.pair(3, CLIENTS[-1]), SIZE, RING)
    assert (seen % 2**RING == 9).all()


@pytest.mark.parametrize("neighbours", [0, 2, 4], ids=["everybody", "two", "four"])
def test_masks_cancel_exactly_in_the_sum(neighbours):
    plain, keys, graph = vectors(), MaskKeys(3, 5), mask_graph(CLIENTS, neighbours, 9)
    sent = masked_vectors(plain, graph, keys, RING)
    assert not any(torch.equal(sent[client], plain[client]) for client in CLIENTS)
    total = unmasked_sum(sent, graph, keys, RING, threshold=2)
    assert torch.equal(total, torch.stack(list(plain.values())).sum(0) % 2**RING)


@pytest.mark.parametrize("neighbours", [0, 2], ids=["everybody", "two"])
@pytest.mark.parametrize("gone", [(0,), (3, 2**63 + 5), (0, 4, 7)], ids=len)
def test_the_sum_of_the_survivors_is_recovered_exactly_whoever_drops_out(gone, neighbours):
    keys, graph = MaskKeys(3, 5), mask_graph(CLIENTS, neighbours, 9)
    plain = {client: vector for client, vector in vectors().items() if client not in gone}
    sent = masked_vectors(plain, graph, keys, RING)
    naive = torch.stack(list(sent.values())).sum(0)
    for client in sent:
        naive -= mask(keys.own(client), SIZE, RING)
    expected = torch.stack(list(plain.values())).sum(0) % 2**RING
    assert torch.equal(unmasked_sum(sent, graph, keys, RING, threshold=2), expected)
    assert not torch.equal(naive % 2**RING, expected)  # masks shared with those who are gone remain


def test_below_the_threshold_no_sum_is_released():
    keys, graph = MaskKeys(3, 5), mask_graph(CLIENTS, 0, 9)
    sent = masked_vectors(vectors((0, 3)), graph, keys, RING)
    with pytest.raises(TooFewClientsError, match="no sum of fewer than 3 clients, got 2: the round is given"):
        unmasked_sum(sent, graph, keys, RING, threshold=3)
    assert len(unmasked_sum(sent, graph, keys, RING, threshold=2)) == SIZE


def test_masks_differ_between_rounds_seeds_and_pairs():
    secrets = {MaskKeys(s, r).pair(a, b) for s in (0, 1) for r in (1, 2) for a, b in ((0, 1), (0, 2), (1, 2))}
    secrets |= {MaskKeys(0, 1).own(client) for client in (0, 1, 2)}
    assert len(secrets) == 15 and MaskKeys(0, 1).pair(5, 2) == MaskKeys(0, 1).pair(2, 5)


@pytest.mark.parametrize(("clients", "neighbours", "degree"), [(9, 4, 4), (5, 4, 4), (5, 6, 4), (2, 2, 1)])
def test_being_neighbours_is_mutual_and_everybody_has_as_many(clients, neighbours, degree):
    graph = mask_graph(range(clients), neighbours, seed=3)
    assert {len(set(near)) for near in graph.values()} == {degree}
    assert all(me in graph[other] and other != me for me, near in graph.items() for other in near)


def test_rounding_is_unbiased_and_moves_a_mean_by_less_than_its_bound():
    part, generator = SecureAggregation(bits=4, clip_range=1.0), Generator().manual_seed(0)
    weights = {0: 3, 1: 5}
    updates = {client: torch.rand(200, generator=generator) * 2 - 1 for client in weights}
    exact = sum(n * updates[c].double() for c, n in weights.items()) / 8
    unit = 2 * part.clip_range / (2**4 - 1) / 8  # one whole number of the sum, in units of the mean
    repeated = []
    for _ in range(400):
        total = sum(part.quantized(updates[c], n, generator) for c, n in weights.items())
        repeated.append(part.mean(total, 8))
        assert (repeated[-1] - exact).abs().max() < 2 * unit
    error = torch.stack(repeated).mean(0) - exact
    deviation = unit * math.sqrt(2 * 0.25 / 400)  # a rounded number has a variance of 1/4 at most
    assert error.abs().max() < 5 * deviation


def test_what_exceeds_the_clip_range_is_clipped_and_its_ends_are_in_the_ring():
    part = SecureAggregation(bits=8, clip_range=0.5)
    update = torch.tensor([-9.0, -0.5, 0.5, 9.0])
    levels = part.quantized(update, 7, Generator().manual_seed(0))
    assert levels.tolist() == [0, 0, 7 * 255, 7 * 255]
    assert part.mean(levels, 7).tolist() == [-0.5, -0.5, 0.5, 0.5]


def test_the_largest_sum_fits_the_ring():
    part = SecureAggregation(bits=28)
    most = part.most_examples(3)
    top = part.quantized(torch.tensor([part.clip_range]), most, Generator().manual_seed(0))
    assert 0 < 3 * int(top) < 2**part.ring_bits


def test_quantisation_refuses_what_it_cannot_hold():
    part = SecureAggregation()
    with pytest.raises(ValueError, match=r"a weight lies between 1 and 2\^24, got 16777217"):
        part.quantized(torch.zeros(1), 2**24 + 1, Generator())
    with pytest.raises(ValueError, match="an update is finite, got NaN"):
        part.quantized(torch.tensor([math.nan]), 1, Generator())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("secure-aggregation(bits=1)", "bits must lie between 2 and 28, got 1"),
        ("secure-aggregation(clip-range=0)", "clip-range must be a number > 0, got 0"),
        (
            "secure-aggregation(threshold=1)",
            "threshold must be at least 2, got 1: the sum of one client is its",
        ),
        ("secure-aggregation(neighbours=3)", "neighbours must be an even number or 0 for everybody, got 3"),
        (
            "secure-aggregation(shares=3)",
            "has no option 'shares': its options are bits, clip-range, neighbours",
        ),
        ("secure-aggregation then top-k", "sums what clients send, got top-k after it: write it last"),
        ("secure-aggregation then dp-sgd", "dp-sgd protects local steps, got it after secure-aggregation"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(spec, message):
    with pytest.raises(ConfigError, match=message):
        DEFENSES.build(parse_spec(spec))


def test_a_client_sends_what_it_would_send_anyway():
    delta = {"w": torch.ones(2), "b": torch.zeros(())}
    sent = SecureAggregation().protect(delta, Generator())
    assert sent is not delta and all(sent[name] is delta[name] for name in delta)


def test_it_guarantees_nothing_itself_and_keeps_what_the_defense_before_it_guarantees():
    alone, ledger = SecureAggregation(), Ledger(((1.5, 0.1, 10),))
    assert alone.guarantee(ledger, 100) is None
    first = DPSGD(noise_multiplier=1.5)
    assert chain([first, alone]).guarantee(ledger, 100) == first.guarantee(ledger, 100) is not None
    once = Ledger(((2.0, 1.0, 1),))
    noised = GaussianUpdate(noise_multiplier=2.0, epsilon=0.0)
    assert chain([noised, alone]).guarantee(once, 100) == noised.guarantee(once, 100) is not None


def test_it_is_found_at_the_end_of_a_chain():
    part = SecureAggregation(threshold=3)
    assert secure_part(part) is part and secure_part(chain([TopK(), part])) is part
    assert secure_part(TopK()) is None and secure_part(chain([DPSGD(), TopK()])) is None
    assert shows_sums_only("top-k then secure-aggregation(bits=8)") and not shows_sums_only("top-k")
    assert changes_update("top-k then secure-aggregation(bits=8)") == ["top-k"]
