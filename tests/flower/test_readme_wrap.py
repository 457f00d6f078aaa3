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
