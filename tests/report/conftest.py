"""Fabricated runs and one rendered page, shared because drawing takes seconds."""

from pathlib import Path

import pytest

from fedaudit.records import Run
from fedaudit.report.page import render
from tests.report.fabricate import DP, fabricate


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two defenses, two seeds, eight rounds, ten clients."""
    folder: Path = tmp_path_factory.mktemp("runs")
    return [fabricate(folder, defense, seed) for defense in ("none", DP) for seed in (0, 1)]


@pytest.fixture(scope="session")
def page(runs: list[Run]) -> str:
    """The page about these runs."""
    return render(runs)
