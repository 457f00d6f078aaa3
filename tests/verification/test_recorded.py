"""`fedaudit verify RUN`: honest runs pass, tampered ones do not, and what is missing is said."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from fedaudit.claims import AdaptiveClipping, GaussianNoise, PoissonSampling, Sparsity
from fedaudit.cli import main
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.defenses.none import NoDefense
from fedaudit.federation.insight import insight
from fedaudit.records import load_run
from fedaudit.registry import DEFENSES, Entry
from fedaudit.verification.recorded import verify_run

SMALL = """\
[data]
max-examples = 400
[model]
name = "mlp(hidden=16)"
[federation]
clients = 3
rounds = 3
evaluate-every = 3
[train]
batch-size = 8
local-steps = 1
[audit]
measures = ""
save-updates = true
"""
PRIVATE = "defense.name=dp-sgd(noise-multiplier=1, epsilon=0)"
WRAPPER = "DifferentialPrivacyServerSideFixedClipping(noise-multiplier=0.05, clipping-norm=0.1)"


def execute(folder, name, *pairs):
    (folder / "small.toml").write_text(SMALL)
    given = (f"output.name={name}", f"output.directory={folder / 'runs'}", *pairs)
    assert main(["run", str(folder / "small.toml"), "--json", *(w for p in given for w in ("--set", p))]) == 0
    return folder / "runs" / name


@pytest.fixture
def made(tmp_path, capfd):
    def run(name, *pairs):
        folder = execute(tmp_path, name, *pairs)
        capfd.readouterr()
        return folder

    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return execute(tmp_path_factory.mktemp("original"), "private", PRIVATE)


@pytest.fixture
def private(original, tmp_path):
    """A DP-SGD run of its own, to verify or to tamper with."""
    return Path(shutil.copytree(original, tmp_path / "private"))


def verify(folder, capfd, *options):
    code = main(["verify", str(folder), "--json", *options])
    return code, json.loads(capfd.readouterr().out)


def verdicts(answer, words):
    return {row["verdict"] for row in answer["findings"] if words in row["claim"]}


def test_an_honest_private_run_passes_and_its_noise_and_epsilon_are_affirmed(private, capfd):
    code, answer = verify(private, capfd)
    assert code == 0 and answer["violated"] == 0
    assert verdicts(answer, "Gaussian noise") == verdicts(answer, "-DP per example [rdp]") == {"holds"}
    assert verdicts(answer, "Poisson") == {"cannot be checked by this observer"}
    frame = pd.read_csv(private / "verification.csv")
    assert len(frame) == len(answer["findings"]) and set(frame["round"]) == {1, 2, 3}


def test_an_oracle_sees_the_clipping_that_a_server_cannot(private, capfd):
    words = "norm of an example's gradient"
    assert verdicts(verify(private, capfd)[1], words) == {"cannot be checked by this observer"}
    code, answer = verify(private, capfd, "--observer", "oracle")
    assert code == 0 and verdicts(answer, words) == {"holds"}
    noise = [row for row in answer["findings"] if "Gaussian" in row["claim"] and row["client"] is not None]
    assert all(row["high"] / row["low"] < 1.3 for row in noise)  # the whole noise, not a bound on it


@pytest.mark.parametrize("observer", ["server", "oracle"])
def test_a_run_that_claims_more_noise_than_it_has_is_exit_code_1(private, capfd, observer):
    description = private / "run.toml"
    description.write_text(description.read_text().replace("noise-multiplier=1,", "noise-multiplier=1.6,"))
    code, answer = verify(private, capfd, "--observer", observer)
    assert code == 1 and verdicts(answer, "Gaussian noise") >= {"violated"}


def test_an_epsilon_of_one_round_stated_for_all_is_found(private):
    _, first, *later = sorted((private / "audit").glob("*.parquet"))  # round 0 is before training
    rows = pq.read_table(first).to_pandas()
    epsilon = float(rows.loc[rows["quantity"] == "epsilon", "value"].iloc[0])
    for path in later:
        table = pq.read_table(path)
        rows = table.to_pandas()
        rows.loc[rows["quantity"] == "epsilon", "value"] = epsilon
        pq.write_table(pa.Table.from_pandas(rows, table.schema, preserve_index=False), path)
    bad = [x for x in verify_run(private) if x.verdict == "violated"]
    assert {x.round for x in bad} == {2, 3} and all("-DP per example" in str(x.claim) for x in bad)
    assert all("the mechanism as described has epsilon" in x.reason for x in bad)


def test_a_plain_average_is_what_it_says_and_tampering_with_it_is_found(made, capfd):
    folder = made("plain", "data.partitioner=dirichlet(alpha=1)")
    code, answer = verify(folder, capfd)
    assert code == 0 and verdicts(answer, "aggregation weights: num-examples") == {"holds"}
    weights = load_file(folder / "weights.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "weights.safetensors")
    code, answer = verify(folder, capfd)
    assert code == 1 and [r["round"] for r in answer["findings"] if r["verdict"] == "violated"] == [3]


def test_flowers_wrapper_with_unequal_clients_is_found_from_the_records(made, capfd):
    folder = made("central", f"strategy.name={WRAPPER}", "data.partitioner=dirichlet(alpha=0.5)")
    code, answer = verify(folder, capfd)
    assert code == 1
    assert "violated" in verdicts(answer, "aggregation weights: uniform")
    assert "violated" in verdicts(answer, "nothing computed from data")  # the training loss
    assert verdicts(answer, "Gaussian noise") == {"holds"}


class Sparse(NoDefense):
    """Says that it sends a tenth of the coordinates, and sends all."""

    def claims(self, update, settings):
        return [Sparsity(0.1)]


def test_a_defense_that_states_its_own_claims_is_held_to_them(made, monkeypatch):
    monkeypatch.setitem(DEFENSES._entries, "sparse", Entry("says so", Sparse))
    bad = [x for x in verify_run(made("sparse", "defense.name=sparse")) if x.verdict == "violated"]
    assert len(bad) == 9 and all(x.measured > 0.1 and isinstance(x.claim, Sparsity) for x in bad)


def test_rounds_whose_successor_was_not_kept_have_no_aggregate(made, capfd):
    folder = made("gaps", "audit.every=3", "federation.rounds=4")
    _, answer = verify(folder, capfd)
    rounds = {row["round"]: row["reason"] for row in answer["findings"]}
    assert set(rounds) == {1, 3, 4} and "next broadcast could check it" in rounds[1]
    assert "no other weighting" in rounds[3] and "no other weighting" in rounds[4]


ADAPTIVE = (
    "strategy.name=DifferentialPrivacyServerSideAdaptiveClipping("
    "noise-multiplier=0.3, clipped-count-stddev=0.2, clip-norm-lr=0.7)"
)
LOUD = ("train.lr=0.5", "train.local-steps=4")  # every update is longer than the clip norm


def test_adaptive_clipping_is_judged_in_every_round_by_the_norm_that_was_applied(made):
    """Flower's wrapper moves the norm the wrong way, and adds the next norm's noise."""
    findings = verify_run(made("adaptive", ADAPTIVE, *LOUD))
    moved = [x for x in findings if isinstance(x.claim, AdaptiveClipping)]
    assert [x.round for x in moved] == [1, 2, 3] and {x.verdict for x in moved} == {"violated"}
    assert all("the norm moves the wrong way" in x.reason for x in moved)
    noise = [x for x in findings if isinstance(x.claim, GaussianNoise)]
    assert [x.round for x in noise] == [1, 2, 3] and {x.verdict for x in noise} == {"violated"}
    assert len({x.claim.std for x in noise}) == 3 and all(x.high < x.claim.std for x in noise)


def test_an_adaptive_norm_that_was_not_recorded_is_known_in_the_first_round_only(made):
    folder = made("adaptive", ADAPTIVE, *LOUD)
    change(folder, lambda rows: rows[rows["quantity"] != "clip-norm"])
    findings = verify_run(folder)
    later = [x for x in findings if x.round > 1 and "Gaussian" in str(x.claim)]
    assert later and all("clip norm of this round is not recorded" in x.reason for x in later)
    assert any(x.round == 1 and x.verdict == "violated" for x in findings)


FILTERED = "defense.name=leakage-adaptive(driver=decay, epsilon=4, ratio=0.5)"


def change(folder, edit):
    """Rewrite a run's records."""
    for path in sorted((folder / "audit").glob("*.parquet")):
        table = pq.read_table(path)
        rows = edit(table.to_pandas())
        pq.write_table(pa.Table.from_pandas(rows, table.schema, preserve_index=False), path)


def filtered(findings):
    return [x for x in findings if getattr(x.claim, "accountant", "") == "rdp-filter"]


def test_the_epsilon_of_noise_that_changes_is_recomputed_from_the_stated_noise(made):
    folder = made("filtered", FILTERED)
    rows = load_run(folder).records
    noise = rows[rows["quantity"] == "noise-multiplier"].pivot(
        index="round", columns="client_id", values="value"
    )
    assert (noise.loc[3] / noise.loc[1]).tolist() == pytest.approx([0.5] * 3)  # the schedule can be plotted
    found = filtered(verify_run(folder))
    assert len(found) == 9 and all(x.measured == pytest.approx(x.claim.epsilon, rel=1e-6) for x in found)
    assert "violated" not in {x.verdict for x in found} and max(x.measured for x in found) <= 4
    assert {x.verdict for x in found if x.round == 1} == {"holds"}  # later noise may be hidden by the signal


def test_an_epsilon_of_a_filter_that_leaves_rounds_out_is_found(made):
    folder = made("filtered", FILTERED)

    def understate(rows):
        rows.loc[rows["quantity"] == "epsilon", "value"] *= 0.6
        return rows

    change(folder, understate)
    found = filtered(verify_run(folder))
    assert len(found) == 9 and {x.verdict for x in found} == {"violated"}
    assert all("the mechanism as described has epsilon" in x.reason for x in found)


def test_a_client_that_hides_one_rounds_noise_cannot_be_checked_from_then_on(made):
    folder = made("filtered", FILTERED)
    hides = "quantity == 'noise-multiplier' and round == 2 and client_id == 1"
    change(folder, lambda rows: rows.drop(rows.query(hides).index))
    left_open = [x for x in filtered(verify_run(folder)) if "did not state it in each" in x.reason]
    assert {(x.round, x.client_id) for x in left_open} == {(2, 1), (3, 1)}


class Shuffled(DPSGD):
    """Cuts a shuffled order into batches and accounts for them as Poisson samples."""

    poisson: ClassVar[bool] = False


def test_shuffling_declared_as_poisson_sampling_is_found_by_an_oracle(made, monkeypatch):
    monkeypatch.setitem(DEFENSES._entries, "shuffled", Entry("says Poisson", Shuffled))
    name = "defense.name=shuffled(noise-multiplier=1, epsilon=0)"
    folder = made("shuffled", name, "train.local-steps=8")
    bad = [x for x in verify_run(folder, observer="oracle", insight=insight) if x.verdict == "violated"]
    assert bad and all(isinstance(x.claim, PoissonSampling) for x in bad)
    assert {x.client_id for x in bad} == {0, 1, 2} and all("shuffled, not sampled" in x.reason for x in bad)


def test_a_run_without_updates_says_how_to_keep_them(made, capfd):
    folder = made("bare", "audit.save-updates=false")
    assert main(["verify", str(folder)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "verification needs the updates of a run" in err and "--set audit.save-updates=true" in err


def test_the_table_names_claim_evidence_and_verdict(private, capfd):
    assert main(["verify", str(private)]) == 0
    out, _ = capfd.readouterr()
    words = " ".join(out.split())
    assert "0 violated" in out and "Gaussian noise" in words and "holds" in out and "server" in out
    assert out.splitlines()[-1].startswith("findings: ") and out.splitlines()[-1].endswith("verification.csv")


def test_more_steps_leave_the_oracle_where_the_server_is(made):
    folder = made("steps", PRIVATE, "train.local-steps=3")
    findings = verify_run(folder, observer="oracle", insight=insight)
    assert all(x.verdict != "violated" for x in findings), [
        str(x) for x in findings if x.verdict == "violated"
    ]
    sampling = [x for x in findings if "Poisson" in str(x.claim) and x.round == 3]
    assert sampling and all(x.verdict == "holds" for x in sampling)
