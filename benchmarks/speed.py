"""Run all speed benchmarks and report them with the machine, the versions and the commands.

    python benchmarks/speed.py                             write benchmarks/results/speed.md and speed.png

Runs steps.py, parts.py, rlhf_speed.py, growth.py, solve.py and gpu.py one after another, about an hour on an
idle machine. Continues if interrupted. Measurements in benchmarks/results are not repeated: delete the CSV
files of these scripts to measure again. docs/performance.md quotes the tables.

Requires requirements-extra.txt.
"""

import csv
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import RESULTS, ROOT, median, values

BENCHMARKS = ("steps", "parts", "rlhf_speed", "growth", "solve", "gpu")
LIBRARIES = ("torch", "gymnasium", "numpy", "mujoco", "ale-py", "stable-baselines3")
SIDES = {"ours": "eager", "compiled": "--compile", "stable_baselines3": "stable-baselines3"}


def read(name: str) -> list[dict[str, str]]:
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["-"] * len(header), *rows]
    return "\n".join(
        "|" + "|".join(line if line[0] == "-" else (f" {cell} " for cell in line)) + "|" for line in lines
    )


def machine() -> str:
    """Describe the machine and the versions of the libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}, {libraries}, trl 1.12.0"
    )


def ratio(rows: list[dict], column: str, above: dict, below: dict) -> str:
    """Format the ratio of the medians and the range of the ratios of single turns."""
    each = [a / b for a, b in zip(values(rows, column, **above), values(rows, column, **below), strict=True)]
    medians = median(rows, column, **above) / median(rows, column, **below)
    return f"{medians:.2f} ({min(each):.2f} to {max(each):.2f})"


def steps_table(rows: list[dict]) -> str:
    lines = []
    for job, label in (("half_cheetah", "HalfCheetah-v5"), ("cart_pole", "CartPole-v1")):
        for clock in ("processor", "wall"):
            cells = [f"{median(rows, clock, job=job, side=side):,.0f}" for side in SIDES]
            peer = dict(job=job, side="stable_baselines3")
            ratios = [ratio(rows, clock, dict(job=job, side=side), peer) for side in ("ours", "compiled")]
            lines.append([label, clock, *cells, *ratios])
    header = ["steps per second", "clock", *SIDES.values(), "eager, ratio", "--compile, ratio"]
    return table(header, lines)


def single_numbers(rows: list[dict]) -> str:
    """Return the rows that do not compare steps per second."""
    alone = dict(job="half_cheetah", side="environment")
    shares = [
        ratio(rows, "processor", dict(job="half_cheetah", side=side), alone) for side in ("ours", "compiled")
    ]
    learning = [
        1000 / median(rows, "processor", job="learning_step", side=side) for side in ("ours", "compiled")
    ]
    start = [median(rows, "wall", job="start", side=side) for side in ("ours", "stable_baselines3")]
    steps = median(rows, "processor", **alone)
    return table(
        ["", "eager", "--compile", "stable-baselines3"],
        [
            [f"HalfCheetah-v5 as a share of the environment alone ({steps:,.0f} steps/s)", *shares, ""],
            ["one learning step, ms", *(f"{x:.2f}" for x in learning), ""],
            ["shell to first gradient, s", f"{start[0]:.1f}", "", f"{start[1]:.1f}"],
        ],
    )


def solve_table(rows: list[dict]) -> str:
    lines = []
    for env_id in dict.fromkeys(row["env_id"] for row in rows):
        times = [
            values(rows, "seconds", env_id=env_id, side=s)
            for s in ("defaults", "command", "stable_baselines3")
        ]
        times = [[math.inf if math.isnan(x) else x for x in run] for run in times]  # nan: not solved
        medians = [statistics.median(x) for x in times]
        worst = [
            f"{max(x):.1f}" if max(x) < math.inf else f"{x.count(math.inf)} of {len(x)} never" for x in times
        ]
        cells = [f"{middle:.1f} ({x})" for middle, x in zip(medians, worst, strict=True)]
        lines.append([env_id, *cells, *(f"{x / medians[2]:.2f}" for x in medians[:2])])
    peer = "stable-baselines3, settings of its zoo"
    return table(["seconds to solve", "shipped defaults", "one command", peer, "ratios", ""], lines)


def rlhf_table(rows: list[dict]) -> str:
    lines = []
    for side in dict.fromkeys(row["side"] for row in rows):
        seconds = values(rows, "seconds_per_iteration", side=side)
        memory = max(values(rows, "peak_mebibytes", side=side))
        speed = ratio(rows, "seconds_per_iteration", dict(side="trl"), dict(side=side))
        span = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        lines.append([side, span, f"{memory:,.0f}", speed if side != "trl" else ""])
    return table(["RLHF", "seconds an iteration", "peak, MiB", "times as fast as TRL"], lines)


def least(rows: list[dict], column: str, **key: object) -> float:
    """Return the minimum over the turns, because other programs can only add to it."""
    return min(values(rows, column, **key))


def growth_table(rows: list[dict]) -> str:
    """Return the minimum seconds and MiB over the turns, for each size."""
    lines = []
    for key in dict.fromkeys((row["grows"], row["variant"]) for row in rows):
        some = dict(zip(("grows", "variant"), key, strict=True))
        sizes = dict.fromkeys(int(row["size"]) for row in rows if (row["grows"], row["variant"]) == key)
        for column, form in (("seconds", ".2f"), ("mebibytes", ",.0f")):
            cells = (f"{size}: {least(rows, column, **some, size=size):{form}}" for size in sizes)
            lines.append([" ".join(key), column, ", ".join(cells)])
    return table(["what grows", "", "size: least of two turns"], lines)


def draw(steps: list[dict], rlhf: list[dict], solve: list[dict], growth: list[dict]) -> None:
    """Draw three rows of panels: speed against peers, time by size, memory by size."""
    figure, panels = plt.subplots(3, 4, figsize=(15, 10), layout="constrained")
    compared = (
        ("HalfCheetah-v5, steps per second", steps, "processor", dict(job="half_cheetah"), SIDES),
        ("CartPole-v1, steps per second", steps, "processor", dict(job="cart_pole"), SIDES),
        ("Pendulum-v1, seconds to solve", solve, "seconds", dict(env_id="Pendulum-v1"), None),
        ("RLHF, seconds an iteration", rlhf, "seconds_per_iteration", {}, None),
    )
    for panel, (title, rows, column, key, sides) in zip(panels[0], compared, strict=True):
        sides = sides or {row["side"]: row["side"].replace("_baselines", "-baselines") for row in rows}
        for place, (side, label) in enumerate(sides.items()):
            each = values(rows, column, **key, side=side)
            label = label.replace("stable-baselines3", "stable-\nbaselines3")
            panel.bar(label, statistics.median(each), color=f"C{place}", alpha=0.4)
            panel.plot([label] * len(each), each, "o", color=f"C{place}", markersize=4)
        panel.set_title(title, fontsize=10)
    titles = (
        "environments",
        "units in a hidden layer",
        "tokens of an answer, 64 answers",
        "answers of 32 tokens",
    )
    for column, (grows, title) in enumerate(
        zip(dict.fromkeys(row["grows"] for row in growth), titles, strict=True)
    ):
        for variant in dict.fromkeys(row["variant"] for row in growth if row["grows"] == grows):
            key = dict(grows=grows, variant=variant)
            sizes = sorted(
                {int(row["size"]) for row in growth if (row["grows"], row["variant"]) == tuple(key.values())}
            )
            seconds, memory = (
                [least(growth, name, **key, size=size) for size in sizes] for name in ("seconds", "mebibytes")
            )
            work = {"envs": [2048] * len(sizes), "width": [2048] * len(sizes)}
            work |= {"answer_length": [64 * n for n in sizes], "batch": [32 * n for n in sizes]}
            rates = [done / s for done, s in zip(work[grows], seconds, strict=True)]
            panels[1, column].plot(sizes, rates, "o-", markersize=3, label=variant)
            panels[2, column].plot(sizes, memory, "o-", markersize=3, label=variant)
        for panel in panels[1:, column]:
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            if grows in ("envs", "width"):
                panel.legend(fontsize=8)
        panels[1, column].set_title(
            "steps per second" if column < 2 else "answer tokens per second", fontsize=10
        )
        panels[2, column].set_title("memory, MiB", fontsize=10)
        panels[2, column].set_xlabel(title)
    figure.savefig(RESULTS / "speed.png", dpi=70)


def main() -> None:
    for name in BENCHMARKS:
        subprocess.run([sys.executable, ROOT / "benchmarks" / f"{name}.py"], check=True)
    steps, rlhf, solve, growth = (read(name) for name in ("steps", "rlhf_speed", "solve", "growth"))
    draw(steps, rlhf, solve, growth)
    parts, gpu = read("parts"), read("gpu")
    sections = [
        f"# Speed\n\n{machine()}. Commands: "
        + ", ".join(f"`python benchmarks/{name}.py`" for name in BENCHMARKS),
        steps_table(steps),
        single_numbers(steps),
        table([*parts[0]], [list(row.values()) for row in parts]),
        solve_table(solve),
        rlhf_table(rlhf),
        growth_table(growth),
        table([*gpu[0]], [list(row.values()) for row in gpu]) if gpu else "No GPU was at hand.",
        "![speed and growth](speed.png)",
    ]
    (RESULTS / "speed.md").write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
