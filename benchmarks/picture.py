"""A plotly figure as a small page beside the results and, with a browser, as a picture."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from plotly.offline import offline

FIGURES = Path(__file__).parent / "figures"
_PLAIN = {"displayModeBar": False}


def write_figure(figure: Any, name: str, chromium: str | None, width: int = 1200, height: int = 910) -> None:
    """Write figures/<name>.html, and figures/<name>.png with the browser `chromium`."""
    FIGURES.mkdir(exist_ok=True)
    page = FIGURES / f"{name}.html"
    offline.plot(figure, filename=str(page), auto_open=False, include_plotlyjs="cdn", config=_PLAIN)
    if not chromium:
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "figure.html"  # with the script inside: no network
        offline.plot(figure, filename=str(whole), auto_open=False, include_plotlyjs=True, config=_PLAIN)
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={width},{height}",
            "--virtual-time-budget=5000",
            f"--screenshot={page.with_suffix('.png')}",
            whole.as_uri(),
        ]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
