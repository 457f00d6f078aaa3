"""README's three lines wrap a strategy of one's own."""

import re
from pathlib import Path

from fedaudit import load_run
from fedaudit.simulation.in_process import InProcessGrid
from tests.flower.test_strategy import N, initial, make_app

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_lines_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").split("## Wrap your own strategy")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    with InProcessGrid(make_app(), N, seed=1) as grid:
        names = {"grid": grid, "arrays": initial()}
        for line in code.splitlines():  # as a user would type them
            exec(line, names)
    records = load_run("runs/mine").records
    assert set(records["round"]) == set(range(1, 11))
    assert (records.loc[records["quantity"] == "update-norm", "status"] == "ok").sum() == 10 * N


def test_the_readme_lines_for_central_privacy_run_and_their_claims_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").split("## Wrap your own strategy")[1]
    first, second = re.findall(r"```python\n(.*?)```", section, re.S)[:2]
    with InProcessGrid(make_app(), N, seed=1) as grid:
        names = {"grid": grid, "arrays": initial()}
        imports = "\n".join(line for line in first.splitlines() if line.startswith("from"))
        exec(imports + "\n" + second, names)
        names["strategy"].start(grid, initial(), num_rounds=3)
    records = load_run("runs/mine").records
    tested = records[records["quantity"].str.startswith("verify.")]
    assert set(tested["round"]) == {1, 2, 3}
    assert (tested.loc[tested["quantity"] == "verify.weights", "status"] == "ok").all()
    violated = tested[tested["status"] == "violated"]
    assert set(violated["quantity"]) == {"verify.nothing-beside"}  # these clients send their training loss
    assert violated["reason"].str.contains("train-loss").all()
