"""Show what the metrics of a failing run look like: one good run of Pendulum, and four with one fault each.

    python benchmarks/debugging.py                         write debugging.csv and debugging.png, some minutes
    python benchmarks/debugging.py --quick                 try each run for 4,096 steps; record nothing

docs/debugging.md explains the picture. Interrupted runs are resumed; delete runs/debugging to train again.
"""

import csv
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import matplotlib
import tyro
from common import RESULTS, ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = ("charts/episodic_return", "losses/approx_kl", "losses/explained_variance", "losses/entropy")
FAULTS = {  # options of ppo_continuous.py
    "none": "",
    "learning rate too large": "--learning-rate 1e-1 --target-kl None",
    "no normalisation": "--no-norm-obs --no-norm-reward",
    "time limits as terminations": "--env-id debugging:TerminatingPendulum-v1",
    "too little noise": "--log-std-init -4",
}


class Terminating(gym.Wrapper):
    """Report the time limit as a termination, as many environments of other libraries do."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or truncated, False, info


gym.register("TerminatingPendulum-v1", lambda: Terminating(gym.make("Pendulum-v1")))


@dataclass
class Options:
    """Options of this benchmark."""

    faults: list[str] = field(default_factory=lambda: list(FAULTS))
    quick: bool = False
    """stop each run after 4,096 steps, and record nothing"""


def run(fault: str, folder: Path, steps: int) -> list[list]:
    """Train with a fault, or finish that run; return (fault, metric, step, value) of all points."""
    options = [*FAULTS[fault].split(), "--total-timesteps", str(steps), "--run-dir", str(folder)]
    options = ["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else options
    command = [sys.executable, str(ROOT / "ppo_continuous.py"), *options]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = [(metric, point) for metric in METRICS for point in events.Scalars(metric)]
    return [[fault, metric, point.step, f"{point.value:.5g}"] for metric, point in points]


def draw(rows: list[list]) -> None:
    """Draw a panel for each metric and a line for each fault."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(15, 3.2))
    for axis, metric in zip(axes, METRICS, strict=True):
        for fault in FAULTS:
            points = [
                (step, float(value)) for name, what, step, value in rows if (name, what) == (fault, metric)
            ]
            axis.plot(
                *zip(*points, strict=True),
                label="defaults" if fault == "none" else fault,
                linewidth=2 if fault == "none" else 1,
            )
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("steps", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[1].set_yscale("log")
    axes[2].set_ylim(-1.1, 1.1)
    axes[0].legend(fontsize=7, loc="upper right", bbox_to_anchor=(1.0, 0.83))
    figure.tight_layout()
    figure.savefig(RESULTS / "debugging.png", dpi=80)


def main(options: Options) -> None:
    """Train with each fault, write the points and draw them."""
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            for fault in tqdm(options.faults, unit=" runs"):
                run(fault, Path(folder) / fault.replace(" ", "_"), 4096)
        return
    path = RESULTS / "debugging.csv"
    rows = []
    if path.exists():
        with path.open() as file:
            rows = [row for row in list(csv.reader(file))[1:] if row[0] not in options.faults]
    runs = ROOT / "runs" / "debugging"
    for fault in tqdm(options.faults, unit=" runs"):
        rows += run(fault, runs / fault.replace(" ", "_"), 100_000)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["fault", "metric", "step", "value"], *rows])
    draw(rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
