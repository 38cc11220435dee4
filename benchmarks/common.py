"""What the benchmarks of speed share: a script as a module, fresh processes, tables that can be continued."""

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
    """A script at the top of the repository, imported anew."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    ppo = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    return ppo


def in_fresh_process(*words: object, python: str = sys.executable) -> list[str]:
    """What the benchmark that is running prints in its last line if it is called with these words."""
    command = [python, sys.argv[0], *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stderr[-3000:]}")
    return run.stdout.splitlines()[-1].split()


def measured(name: str, columns: Sequence[str], turns: Iterable[tuple], measure: Callable) -> list[dict]:
    """The table results/NAME.csv: a row for each turn, its key and what measure(*key) gives.

    Written after every turn. A turn that is in it already is not repeated; to repeat it, delete its row.
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
    """The numbers of a column in the rows that have this key, in the order of the turns."""
    return [
        float(row[column])
        for row in rows
        if all(row[name] == str(word) for name, word in key.items()) and row[column]
    ]


def median(rows: list[dict], column: str, **key: object) -> float:
    """Their median, nan if there are none."""
    found = values(rows, column, **key)
    return statistics.median(found) if found else float("nan")


def peak_mebibytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
