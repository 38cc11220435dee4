"""Compare steps per second of one process and of two under torchrun, for slow and fast environments.

    python benchmarks/processes.py                         write benchmarks/results/processes.csv

Humanoid-v5 and HalfCheetah-v5 with ppo_continuous, CartPole-v1 with ppo_discrete: 8 environments x 256 steps,
other options at their defaults.
One thread per process. Rates are the median of charts/SPS after the first iteration; one and two processes
alternate. Requires requirements-extra.txt.
"""

import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "processes.csv"
SCRIPTS = {"Humanoid-v5": "ppo_continuous", "HalfCheetah-v5": "ppo_continuous", "CartPole-v1": "ppo_discrete"}
JOBS = ["Humanoid-v5", "HalfCheetah-v5", "CartPole-v1"]
TURNS, ITERATIONS = 3, 8


def steps_per_second(job: str, processes: int) -> float:
    """Return steps per second of a short run."""
    env_id, *options = job.split()
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(launch if processes > 1 else []), ROOT / f"{SCRIPTS[env_id]}.py"]
        command += ["--env-id", env_id, *options, "--total-timesteps", str(2048 * ITERATIONS)]
        command += [
            "--checkpoint-every",
            str(ITERATIONS),
            "--eval-episodes",
            "1",
            "--run-dir",
            f"{folder}/run",
        ]
        subprocess.run(command, check=True, capture_output=True)
        events = EventAccumulator(f"{folder}/run").Reload().Scalars("charts/SPS")
    return statistics.median(event.value for event in events[1:])


def main() -> None:
    rows = []
    for job in JOBS:
        for turn in range(1, TURNS + 1):
            for processes in (1, 2):
                rows.append([job, processes, turn, round(steps_per_second(job, processes))])
                print(*rows[-1], flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "processes", "turn", "steps_per_second"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
