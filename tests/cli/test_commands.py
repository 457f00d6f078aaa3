"""The command line: exit codes, one sentence for bad input, and nothing on the terminal but progress."""

import json
import logging
import re
import subprocess
import sys

import pandas as pd
import pytest

from fedaudit import __version__
from fedaudit.cli import main
from fedaudit.cli.watch import Watch, line
from fedaudit.progress import listen
from fedaudit.records import AuditRecord, load_run
from fedaudit.registry import ATTACKS, DATASETS, DEFENSES, MEASURES, MODELS, PARTITIONERS

SMALL = """\
[data]
max-examples = 300
[model]
name = "mlp(hidden=8)"
[federation]
clients = 3
rounds = 2
[train]
batch-size = 8
local-steps = 1
[audit]
measures = "update-norm"
[compare]
defenses = "none, dp-sgd(noise-multiplier=1)"
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path


def sets(*pairs):
    return [argument for pair in pairs for argument in ("--set", pair)]


def stop_after(number):
    """A listener that presses Ctrl-C when a round has ended."""

    def hear(event):
        if event.stage == "round" and event.round == number:
            raise KeyboardInterrupt

    return listen(hear)


BAD = {
    "unknown key": (
        ["federation.round=3"],
        "no configuration key 'federation.round': did you mean federation.rounds",
    ),
    "wrong type": (
        ["federation.rounds=ten"],
        "federation.rounds = 'ten' is not allowed: it must be a valid integer",
    ),
    "out of range": (["train.lr=0"], "train.lr = 0 is not allowed: it must be greater than 0"),
    "list": (
        ["attack.rounds=[1]"],
        "the value of attack.rounds must be a scalar, got '[1]': write lists as 'a,b'",
    ),
    "no equals sign": (["seed"], "an override is written key=value, got 'seed'"),
    "unknown part": (
        ["defense.name=dp"],
        "defense.name = 'dp' is not allowed: no defense is named 'dp': choose one of none",
    ),
    "unknown option": (
        ["defense.name=dp-sgd(epsilom=8)"],
        "defense.name = 'dp-sgd(epsilom=8)' is not allowed: dp-sgd has no option 'epsilom': its options are ",
    ),
    "option of wrong type": (
        ["model.name=mlp(dropout=big)"],
        "model.name = 'mlp(dropout=big)' is not allowed",
    ),
    "option out of range": (
        ["defense.name=dp-sgd(clip-norm=-1)"],
        "defense.name = 'dp-sgd(clip-norm=-1)' is not allowed: dp-sgd(clip-norm=-1) cannot be used: "
        "clip-norm must be a number > 0, got -1",
    ),
    "option that does not suit the data": (
        ["defense.name=dp-sgd(delta=0.5)"],
        "defense.name = 'dp-sgd(delta=0.5)' is not allowed: delta must be under 1 / examples",
    ),
    "measure's option": (
        ["audit.measures=mutual-information(stps=3)"],
        "audit.measures = 'mutual-information(stps=3)' is not allowed: mutual-information has no",
    ),
    "attack's option": (
        ["attack.names=dlg(restart=3)"],
        "attack.names = 'dlg(restart=3)' is not allowed: dlg has no",
    ),
    "unknown strategy": (
        ["strategy.name=FedSum"],
        "strategy.name = 'FedSum' is not allowed: no strategy is named 'FedSum': choose one of Bulyan",
    ),
    "strategy without its option": (["strategy.name=QFedAvg"], "QFedAvg needs client-learning-rate"),
    "strategy that needs what the defense hides": (
        ["strategy.name=QFedAvg(client-learning-rate=0.1)", "defense.name=dp-sgd"],
        "it weights clients by their training loss, which the defense keeps private",
    ),
    "missing file": (
        ["data.name=npz", "data.root=nowhere.npz"],
        "npz reads one .npz file, got data.root='nowhere.npz', which is none",
    ),
    "too few examples": (
        ["federation.clients=200"],
        "every client needs at least 2 examples, got 184 of 200 clients with fewer",
    ),
    "layer that mixes examples": (
        ["model.name=batch-norm", "defense.name=dp-sgd"],
        "defense.name = 'dp-sgd' is not allowed: dp-sgd needs layers that treat every example by itself",
    ),
    "no such device": (
        ["federation.device=cuda:99"],
        "federation.device = 'cuda:99' is not allowed: this machine has",
    ),
    "deployment": (["federation.engine=deployment"], "federation.engine = 'deployment' is not allowed here"),
    "resume on another engine": (
        ["federation.engine=ray", "output.resume=true"],
        "federation.engine = 'ray' is not allowed with output.resume",
    ),
}


@pytest.fixture
def batch_norm(monkeypatch):
    from torch import nn

    from fedaudit.registry import Entry

    def build(input_shape, num_classes):
        features = input_shape[0] * input_shape[1] * input_shape[2]
        return nn.Sequential(
            nn.Flatten(), nn.Linear(features, 4), nn.BatchNorm1d(4), nn.Linear(4, num_classes)
        )

    monkeypatch.setitem(MODELS._entries, "batch-norm", Entry("mixes examples", build))


@pytest.mark.usefixtures("batch_norm")
@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2_before_anything_runs(fault, small, capfd):
    pairs, sentence = BAD[fault]
    in_comparison = [pair.replace("defense.name", "compare.defenses") for pair in pairs]
    for command, given in (("run", pairs), ("compare", in_comparison)):
        assert main([command, "small.toml", *sets(*given)]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("fedaudit: ") and err.count("\n") == 1 and "Traceback" not in err
        assert sentence in err or sentence.replace("defense.name", "compare.defenses") in err
    assert [path.name for path in small.iterdir()] == ["small.toml"]


COMMANDS = {
    "no such preset": (
        ["run", "quickest"],
        "a configuration is a TOML file or a preset's name, got 'quickest': the presets are ",
    ),
    "not TOML": (["run", "broken.toml"], "a configuration is TOML in UTF-8, got 'broken.toml'"),
    "neither": (["run"], "run takes either a CONFIG or --resume RUN: give exactly one"),
    "both": (["run", "small.toml", "--resume", "runs/a"], "give exactly one"),
    "resume elsewhere": (
        ["run", "--resume", "runs/a", "--output", "b"],
        "a resumed run stays in its folder, got --output b",
    ),
    "resume nothing": (["run", "--resume", "runs/a"], "a run is a folder that holds 'audit/', got 'runs/a'"),
    "report nothing": (["report", "runs/a"], "a run is a folder that holds 'audit/', got 'runs/a'"),
    "no such kind": (["list", "colours"], "'colours' is not one of 'measures', 'attacks', 'defenses'"),
    "no such command": (["audit"], "No such command 'audit'. See 'fedaudit --help'."),
    "no such option": (["run", "small.toml", "--fast"], "No such option '--fast'"),
    "no such engine": (["run", "small.toml", "--engine", "mpi"], "'mpi' is not one of 'in-process', 'ray'"),
    "missing argument": (["compare"], "Missing argument 'CONFIG'"),
    "output is a file": (["run", "small.toml", "--output", "broken.toml"], "a file or folder cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("fault", COMMANDS)
def test_a_bad_command_is_one_sentence_and_exit_code_2(fault, small, capfd):
    arguments, sentence = COMMANDS[fault]
    (small / "broken.toml").write_text("seed = ")
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fedaudit: ") and err.count("\n") == 1
    assert sentence in err
    assert not (small / "runs").exists()


def test_a_run_shows_its_rounds_and_a_table_and_keeps_records_and_a_report(small, capfd):
    assert main(["run", "small.toml", "--output", "out"]) == 0
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert lines[0] == "run 1 of 1: none-seed0"
    assert [re.match(r"  round (\d)/2  accuracy 0\.\d{3}$", text)[1] for text in lines[1:]] == ["0", "1", "2"]
    assert "Comparison of defenses" in out and out.splitlines()[-1] == "report: out/none-seed0/report.html"
    run = load_run(small / "out/none-seed0")
    assert set(run.records["round"]) == {0, 1, 2} and run.summary
    assert (run.path / "report.html").stat().st_size > 10_000


def test_json_is_all_there_is_on_standard_output(small, capfd):
    assert main(["run", "small.toml", "--json", *sets("defense.name=dp-sgd")]) == 0
    out, err = capfd.readouterr()
    answer = json.loads(out)
    assert err == ""
    assert answer["runs"] == ["runs/dp-sgd-seed0"] and answer["report"] == "runs/dp-sgd-seed0/report.html"
    assert answer["table"][0]["defense"] == "dp-sgd"


def test_an_existing_run_is_not_overwritten(small, capfd):
    assert main(["run", "small.toml", "--json"]) == 0
    before = {path: path.read_bytes() for path in (small / "runs").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert main(["run", "small.toml"]) == 2
    _, err = capfd.readouterr()
    assert "a run keeps a folder of its own, got runs/none-seed0 which holds one" in err
    assert "--resume runs/none-seed0" in err and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in (small / "runs").rglob("*") if path.is_file()}


def test_ctrl_c_keeps_completed_rounds_and_the_hint_continues_the_run(small, capfd):
    assert main(["run", "small.toml", "--json", *sets("output.name=whole")]) == 0
    capfd.readouterr()
    with stop_after(1):
        assert main(["run", "small.toml", "--json", *sets("output.name=cut")]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert set(load_run("runs/cut").records["round"]) == {0, 1}
    hint = re.search(r"continue with 'fedaudit (run --resume runs/cut)'", err)
    assert main([*hint[1].split(), "--json"]) == 0
    resumed, whole = (
        load_run(f"runs/{name}")
        .records.query("quantity != 'round-seconds'")
        .drop(columns=["run_id", "seconds"])
        for name in ("cut", "whole")
    )
    pd.testing.assert_frame_equal(resumed, whole)


def test_ctrl_c_outside_a_run_is_no_traceback(small, capfd, monkeypatch):
    import fedaudit.federation.checks

    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(fedaudit.federation.checks, "check", interrupted)
    assert main(["run", "small.toml"]) == 1
    assert capfd.readouterr().err.strip() == "fedaudit: interrupted"


def test_a_failed_run_is_exit_code_1_and_keeps_completed_rounds(small, capfd):
    strict = sets("audit.measures=example-gradient-uniqueness", "audit.strict=true", "audit.every=2")
    mean = sets(
        "federation.rounds=3", "audit.observers=server, client", "attack.names=dlg", "attack.rounds=2"
    )
    momentum = sets("train.momentum=0.9")  # the attack cannot know the gradient: skipped, in round 2
    assert main(["run", "small.toml", *strict, *mean, *momentum]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert (
        "fedaudit: a strict audit stops on what it cannot measure, got dlg.objective skipped in round 2"
        in err
    )
    assert "Traceback" not in err
    assert {0, 1} <= set(load_run("runs/none-seed0").records["round"])


def test_an_exception_of_the_engine_is_exit_code_1_in_one_sentence(small, capfd, monkeypatch):
    import fedaudit.simulation.run as engine

    def broken(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(engine, "run_federation", broken)
    assert main(["run", "small.toml", "--json"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "fedaudit: the run in runs/none-seed0 stopped: OSError: no space left\n"


def test_failing_clients_are_told_once_and_without_a_traceback(small, capfd):
    spent = "defense.name=dp-sgd(epsilon=1, noise-multiplier=0.3)"
    assert main(["run", "small.toml", *sets(spent)]) == 0
    _, err = capfd.readouterr()
    assert err.count("update of client") == 1 and "must not train again" in err
    assert "3 rejected" in err and "Traceback" not in err and "WARNING" not in err and "<class" not in err


def test_compare_runs_every_defense_and_sets_them_side_by_side(small, capfd):
    for number in ("", "-2"):  # a second comparison gets a folder of its own
        assert main(["compare", "small.toml", "--json"]) == 0
        answer = json.loads(capfd.readouterr().out)
        folder = f"runs/compare-small{number}"
        assert answer["report"] == f"{folder}/report.html"
        assert answer["runs"] == [f"{folder}/none-seed0", f"{folder}/dp-sgd-noise-multiplier=1-seed0"]
    assert {"comparison.csv", "differences.csv", "report.html"} <= {
        path.name for path in (small / folder).iterdir()
    }
    assert main(["report", folder, f"{folder}/none-seed0", "--output", "again.html", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert len(answer["runs"]) == 3 and (small / "again.html").stat().st_size > 10_000


def test_compare_varies_keys_and_its_files_hold_what_json_says(small, capfd):
    vary = sets("compare.vary=train.batch-size: 4 | 8", "compare.baseline=dp-sgd(noise-multiplier=1)")
    assert main(["compare", "small.toml", *vary, "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    folder = small / "runs" / "compare-small"
    assert len(answer["runs"]) == len(answer["table"]) == 4
    sizes = {load_run(small / path).info["config"]["train.batch-size"] for path in answer["runs"]}
    assert sizes == {4, 8}
    assert {row["defense"] for row in answer["differences"]} == {"none"}  # minus the chosen baseline
    for name, rows in (("comparison", answer["table"]), ("differences", answer["differences"])):
        read = pd.read_csv(folder / f"{name}.csv", dtype={"train.batch-size": str}, keep_default_na=False)
        assert list(read.columns) == list(rows[0])
        assert read["train.batch-size"].tolist() == [row["train.batch-size"] for row in rows]
    assert (folder / "comparison.md").exists() and (folder / "comparison.tex").exists()
    assert main(["report", "runs/compare-small"]) == 0
    out = capfd.readouterr().out
    assert out.count("Comparison of defenses, train.batch-size = ") == 2


def test_defenses_without_an_undefended_one_are_compared_with_the_first(small, capfd):
    assert main(["compare", "small.toml", *sets("compare.defenses=sign, quantize"), "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert {(row["defense"], row["baseline"]) for row in answer["differences"]} == {("quantize", "sign")}


def test_report_reads_an_interrupted_run(small, capfd):
    with stop_after(1):
        assert main(["run", "small.toml", "--json"]) == 1
    assert main(["report", "runs/none-seed0"]) == 0
    assert "Comparison of defenses" in capfd.readouterr().out
    assert (small / "report.html").stat().st_size > 10_000


def test_each_kind_is_listed_with_every_part(capsys):
    from strategies.flower_strategies import strategy_names

    parts = {
        "measures": MEASURES,
        "attacks": ATTACKS,
        "defenses": DEFENSES,
        "datasets": DATASETS,
        "partitioners": PARTITIONERS,
        "models": MODELS,
        "strategies": strategy_names(),
        "presets": ["digits", "quickstart"],
    }
    for kind, names in parts.items():
        assert main(["list", kind, "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert list(listed) == [kind] and set(names) <= set(listed[kind])
        assert all(listed[kind].values())
    assert main(["list", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(parts)


def test_a_listed_summary_keeps_its_brackets(capsys):
    assert main(["list", "datasets"]) == 0
    assert "fedaudit[datasets]" in " ".join(capsys.readouterr().out.split())


def test_version_and_help_are_exit_code_0(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedaudit {__version__}\n"
    for arguments in (["--help"], [], ["run", "--help"]):
        assert main(arguments) == 0
        assert "Usage" in capsys.readouterr().out


def test_the_module_runs_and_its_exit_code_is_the_commands(tmp_path):
    command = [sys.executable, "-m", "fedaudit", "run", "nowhere.toml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fedaudit: a configuration is a TOML file")


def row(quantity, value=None, status="ok", reason="", client=0):
    return AuditRecord(
        "r", 1, client, quantity, value, "1", "exact", "server", "none", status=status, reason=reason
    )


FULL = [
    row("mutual-information", 4.08),
    row("example-gradient-uniqueness", 1.71),
    row("cohort-gradient-uniqueness", 14.52),
    row("dlg.psnr", 53.7),
    row("epsilon", 7.5),
    row("epsilon", 7.9),
    row("update", status="rejected", reason="late"),
    row("m", status="skipped", reason="needs [more]"),
    row("m", status="failed", reason="division"),
]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_long_round_line_breaks_between_its_pieces(width):
    rows = line(10, 30, {"accuracy": 0.5, "records": FULL}, width).split("\n")
    assert max(map(len, rows)) <= width
    indent = len("  round 10/30")
    assert all(text[:indent].isspace() and text[indent + 2] != " " for text in rows[1:])
    pieces = [piece for text in rows for piece in re.split(r" {2,}", text.strip())]
    assert pieces == [
        "round 10/30", "accuracy 0.500", "MI 4.08 nats", "GNQ 1.71", "cohort 14.52", "DLG 53.7 dB",
        "worst epsilon 7.90", "1 rejected", "1 failed", "1 skipped",
    ]  # fmt: skip


def test_the_watch_holds_log_lines_back_and_gives_levels_back(capfd):
    loggers = [logging.getLogger(name) for name in ("flwr", "fedaudit.simulation.in_process")]
    before = [logger.getEffectiveLevel() for logger in loggers]
    with Watch(1, quiet=True):
        for logger in loggers:
            logger.error("noise")
    assert capfd.readouterr() == ("", "")
    assert [logger.getEffectiveLevel() for logger in loggers] == before
