"""Starting and stopping process trees."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedaudit.errors import RunFailedError
from fedaudit.simulation import processes as module
from fedaudit.simulation.processes import Processes, answer_of, process_table
from tests.simulation.leftovers import MARK, leftovers

CHILD = "import time; time.sleep(60)"
DETACHED = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {CHILD!r}], start_new_session=True)
print("started", flush=True)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("started", flush=True)
time.sleep(60)
"""


@pytest.fixture
def marked(tmp_path: Path) -> Processes:
    return Processes(tmp_path, {**os.environ, MARK: str(tmp_path)})


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while "started" not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_in_a_session_of_its_own_is_stopped_even_after_its_parent_has_ended(marked, tmp_path):
    with marked:
        marked.start("parent", sys.executable, "-c", DETACHED + "time.sleep(60)")
        wait_for(marked.log("parent"))
        child_and_parent = marked.look()
        assert len(child_and_parent) == 2
        os.kill(
            next(e.parent for e in process_table() if e.pid in child_and_parent and e.parent != os.getpid()),
            9,
        )
        while not marked.ended():
            time.sleep(0.01)
        assert len(leftovers(str(tmp_path))) == 1
    assert leftovers(str(tmp_path)) == []
    assert marked.look() == set()


def test_processes_are_stopped_when_the_block_fails(marked, tmp_path):
    with pytest.raises(ZeroDivisionError), marked:
        marked.start("sleeper", sys.executable, "-c", f"print('started', flush=True); {CHILD}")
        wait_for(marked.log("sleeper"))  # a process that is just being replaced shows no environment
        assert len(leftovers(str(tmp_path))) == 1
        1 / 0  # noqa: B018
    assert leftovers(str(tmp_path)) == []


@pytest.fixture
def interruptible():
    """Python's own answer to Ctrl-C, which a process started in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_while_a_process_starts_still_stops_it(marked, tmp_path, monkeypatch):
    start = subprocess.Popen

    def interrupted(*command, **options):
        process = start(*command, **options)
        signal.raise_signal(signal.SIGINT)  # between the start and the moment it is remembered
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt), marked:
        marked.start("sleeper", sys.executable, "-c", CHILD)
    assert marked.ended().keys() == {"sleeper"}
    assert leftovers(str(tmp_path)) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_the_request_is_killed(marked, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", ((15, 0.3), (9, 5.0)))
    marked.start("stubborn", sys.executable, "-c", STUBBORN)
    wait_for(marked.log("stubborn"))
    marked.stop()
    assert leftovers(str(tmp_path)) == []
    assert marked.ended() == {"stubborn": -9}


def test_a_process_that_cannot_be_stopped_is_named(marked):
    marked.start("stubborn", sys.executable, "-c", STUBBORN)
    wait_for(marked.log("stubborn"))
    (pid,) = marked.look()
    with pytest.raises(RunFailedError, match=rf"must end, got \[{pid}\] still running"):
        marked.stop(patience=((15, 0.0),))
    marked.stop(patience=((9, 5.0),))


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_while_a_question_is_asked_leaves_no_process(tmp_path, monkeypatch):
    start = subprocess.Popen

    def interrupted(*command, **options):
        process = start(*command, **options)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer_of([sys.executable, "-c", CHILD], {**os.environ, MARK: str(tmp_path)}, 30)
    assert leftovers(str(tmp_path)) == []


def test_an_answer_that_does_not_come_is_not_waited_for(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        answer_of([sys.executable, "-c", CHILD], {**os.environ, MARK: str(tmp_path)}, 0.5)
    assert leftovers(str(tmp_path)) == []


def test_an_answer_is_what_a_command_prints_and_returns():
    command = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert answer_of([sys.executable, "-c", command], os.environ, 30) == (3, "out\n", "err\n")


def test_processes_of_others_are_left_alone(marked):
    other = subprocess.Popen([sys.executable, "-c", CHILD])
    try:
        with marked:
            marked.start("sleeper", sys.executable, "-c", CHILD)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.skipif(shutil.which("ps") is None, reason="compares with ps")
def test_ps_and_the_proc_files_tell_the_same(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True)
    try:
        by_proc = {e for e in process_table() if e.pid in (child.pid, os.getpid())}
        by_ps = {e for e in process_table(tmp_path / "no proc") if e.pid in (child.pid, os.getpid())}
        assert by_proc == by_ps
        assert module.Entry(child.pid, os.getpid(), child.pid) in by_proc
    finally:
        child.kill()
        child.wait()
