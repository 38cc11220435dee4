"""Train with the default options on every task and several seeds, and write learning curves to a CSV file.

    python benchmarks/learning.py                          all tasks; continues if interrupted
    python benchmarks/learning.py --scripts ppo_continuous --tasks Hopper-v5 --seeds 1 2
    python benchmarks/plot.py                              draw benchmarks/results/learning.csv

Requires requirements-extra.txt for MuJoCo, Box2D and Atari. Unfinished runs are kept in runs/learning.
"""

import csv
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "learning.csv"
COLUMNS = ["script", "task", "seed", "steps", "what", "value"]
STEPS = {  # by script or task; a million for MuJoCo, 300,000 for all others
    "ppo_penalty": 120_000,
    "Pendulum-v1": 100_000,
    "CartPole-v1": 60_000,
    "Acrobot-v1": 100_000,
    "FrozenLake-v1": 100_000,
    "ALE/Breakout-v5": 150_000,
}
MUJOCO = [
    *("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5", "Reacher-v5"),
    *("InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Humanoid-v5"),
]
OPTIONS = {  # the defaults for all others
    # Table 5 of the paper with a larger learning rate, because the run is 50 times shorter
    "ALE/Breakout-v5": "--num-steps 128 --num-minibatches 4 --update-epochs 4 --clip-coef 0.1 --clip-reward"
    " --learning-rate 1e-3 --lr-kl-target None"
} | dict.fromkeys(MUJOCO, "--compile")
TASKS = {
    "ppo_continuous": [
        *("Pendulum-v1", "MountainCarContinuous-v0", "LunarLanderContinuous-v3", "BipedalWalker-v3"),
        *MUJOCO,
    ],
    "ppo_discrete": [
        *("CartPole-v1", "Acrobot-v1", "FrozenLake-v1", "LunarLander-v3", "MountainCar-v0", "Taxi-v4"),
        "ALE/Breakout-v5",
    ],
    "ppo_penalty": ["Pendulum-v1", "CartPole-v1"],  # more in penalty.py
}


@dataclass
class Options:
    """Options of this benchmark."""

    scripts: list[str] = field(default_factory=lambda: list(TASKS))
    tasks: list[str] | None = None
    """task ids (None: all tasks of the script)"""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])


def rows_done() -> set[tuple[str, str, str]]:
    """Return (script, task, seed) of the runs whose evaluation is in the results."""
    if not RESULTS.exists():
        return set()
    with RESULTS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["what"] == "eval/episodic_return"]
    return {(row["script"], row["task"], row["seed"]) for row in rows}


def finish(script: str, folder: Path, options: list[str]) -> EventAccumulator:
    """Train, or resume an interrupted run, and return the metrics of the run."""
    start = [sys.executable, str(ROOT / f"{script}.py")]
    resume = (folder / "checkpoint.pt").exists()
    start += ["--resume", str(folder)] if resume else [*options, "--run-dir", str(folder)]
    subprocess.run(start, check=True)
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def run(script: str, task: str, seed: int) -> list[list]:
    """Run one task and return its rows for the results."""
    folder = ROOT / "runs" / "learning" / f"{script}__{task.replace('/', '-')}__{seed}"
    options = [
        "--env-id",
        task,
        "--seed",
        str(seed),
        "--total-timesteps",
        str(STEPS.get(script, STEPS.get(task, 1_000_000 if task in MUJOCO else 300_000))),
    ]
    events = finish(script, folder, [*options, *OPTIONS.get(task, "").split()])
    returns = events.Scalars("charts/episodic_return")
    speed = sorted(event.value for event in events.Scalars("charts/SPS"))
    evaluation = events.Scalars("eval/episodic_return")[0]
    thinned = returns[:: max(1, len(returns) // 50)]
    rows = [[event.step, "charts/episodic_return", event.value] for event in thinned]
    rows += [[evaluation.step, "charts/SPS", speed[len(speed) // 2]]]
    rows += [[evaluation.step, "eval/episodic_return", evaluation.value]]
    return [[script, task, seed, step, what, f"{value:.5g}"] for step, what, value in rows]


def append(path: Path, columns: list[str], rows: list[list]) -> None:
    """Append rows to a CSV file in one write, because other processes may append too."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        header = [] if os.fstat(file.fileno()).st_size else [columns]
        file.write("".join(",".join(map(str, row)) + "\n" for row in header + rows))


def main(options: Options) -> None:
    """Run what is missing from the results, one run after another."""
    jobs = [(seed, script) for seed in options.seeds for script in options.scripts]
    jobs = [(script, task, seed) for seed, script in jobs for task in options.tasks or TASKS[script]]
    for script, task, seed in jobs:
        if (script, task, str(seed)) in rows_done():
            continue
        append(RESULTS, COLUMNS, run(script, task, seed))


if __name__ == "__main__":
    main(tyro.cli(Options))
