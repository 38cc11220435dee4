"""Helpers of the speed benchmarks: import a script, run a fresh process, continue an interrupted table."""

import csv
import importlib.util
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(script: str) -> ModuleType:
    """Import a script from the top of the repository as a new module."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    ppo = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    return ppo


def in_fresh_process(*words: object, python: str = sys.executable) -> list[str]:
    """Run this benchmark with the given arguments in a fresh process and return the last line it prints."""
    command = [python, sys.argv[0], *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stderr[-3000:]}")
    return run.stdout.splitlines()[-1].split()


def measured(name: str, columns: Sequence[str], turns: Iterable[tuple], measure: Callable) -> list[dict]:
    """Measure all turns and return the rows of results/NAME.csv: the key of a turn and measure(*key).

    The file is written after every turn. Turns that are in it already are not repeated.
    """
    path, rows = RESULTS / f"{name}.csv", [list(columns)]
    if path.exists():
        with path.open() as file:
            rows = list(csv.reader(file))
    for turn in turns:
        key = [str(word) for word in turn]
        if key in (row[: len(key)] for row in rows):
            continue
        rows.append([*key, *map(str, measure(*turn))])
        print(*rows[-1], flush=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return [dict(zip(columns, row, strict=True)) for row in rows[1:]]


def values(rows: list[dict], column: str, **key: object) -> list[float]:
    """Return the numbers of a column in the rows with this key, in the order of measurement."""
    return [
        float(row[column])
        for row in rows
        if all(row[name] == str(word) for name, word in key.items()) and row[column]
    ]


def median(rows: list[dict], column: str, **key: object) -> float:
    """Return the median of a column, or nan if there are no rows with this key."""
    found = values(rows, column, **key)
    return statistics.median(found) if found else float("nan")


def peak_mebibytes() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
