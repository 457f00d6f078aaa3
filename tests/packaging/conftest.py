"""A copy of the project, and virtual environments that borrow this interpreter's dependencies."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LITTER = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.fab", ".*_cache", ".git", ".venv", "venv")


@dataclass(frozen=True)
class Environment:
    """A virtual environment that can import the dependencies of fedaudit, but not fedaudit."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def install(self, *arguments: str) -> None:
        """Install a project with pip, as a user does, but without looking for its dependencies."""
        run([sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "--no-deps",
             "--no-index", "--no-build-isolation", *arguments])  # fmt: skip

    def run(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """Output of a command of this environment, with nothing else on the path."""
        return run([str(self.folder / "bin" / arguments[0]), *arguments[1:]], cwd=cwd, **variables)


def run(command: list[str], cwd: Path | None = None, **variables: str) -> str:
    """What a command prints; its errors are the test's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env={**kept, **variables}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without what tools leave behind; Flower wants letters, digits and hyphens."""
    folder = tmp_path_factory.mktemp("copy") / "fedaudit"
    shutil.copytree(ROOT, folder, ignore=LITTER)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A new environment; a path file, unlike system-site-packages, also reaches into another environment."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)), encoding="utf-8")
    return Environment(folder)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution that is built from the project."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)], cwd=project)
    (path,) = folder.glob("*.whl")
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return path
