import os
import signal
import threading

import pytest

# one thread, because pytest -n auto uses all cores; set before torch is imported, inherited by subprocesses
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too, as CI does")
    parser.addoption("--campaign", action="store_true", help="run what takes hours too")
    parser.addoption(
        "--trials", type=int, default=0, help="of each fault in test_faults.py (0: its own number)"
    )
    parser.addoption("--trial-seed", type=int, default=1, help="which faults, of those drawn at random")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in ("slow", "campaign"):
            if item.get_closest_marker(mark) and not config.getoption(f"--{mark}"):
                item.add_marker(pytest.mark.skip(reason=f"--{mark} runs it"))


@pytest.fixture(autouse=True)
def what_main_sets_for_its_process():
    """Restore the SIGTERM handler and threading.excepthook after every test."""
    handler, hook = signal.getsignal(signal.SIGTERM), threading.excepthook
    yield
    signal.signal(signal.SIGTERM, handler)
    threading.excepthook = hook


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"
