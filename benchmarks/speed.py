"""Steps per second of ppo_continuous.py against stable-baselines3 on the same work, training only.

    python benchmarks/speed.py                             writes benchmarks/results/speed.csv

HalfCheetah-v5, 1 environment x 2048 steps, 10 epochs, 32 minibatches, one thread each. The two take turns,
each in a fresh process, so that a noisy machine disturbs both alike; what counts is the ratio of the medians.
Needs requirements-extra.txt.
"""

import csv
import importlib.util
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.csv"


@dataclass
class Options:
    """What to measure."""

    repetitions: int = 5
    """turns of each side"""
    total_timesteps: int = 10_240
    """environment steps of a turn; the first rollout is warm-up and not counted"""
    turn: str | None = None
    """used by the benchmark itself: measure one side now and print its steps per second"""


def ours(total_timesteps: int) -> float:
    """Steps per second between the end of the first iteration and the end of the last."""
    spec = importlib.util.spec_from_file_location("ppo_continuous", ROOT / "ppo_continuous.py")
    ppo = sys.modules["ppo_continuous"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    ends, explained_variance = [], ppo.explained_variance
    ppo.explained_variance = lambda *x: (
        ends.append(time.perf_counter()) or explained_variance(*x)
    )  # once an iteration
    ppo.evaluate = lambda *_: [0.0]
    with tempfile.TemporaryDirectory() as folder:
        ppo.train(
            ppo.Args(
                env_id="HalfCheetah-v5",
                num_envs=1,
                num_steps=2048,
                num_minibatches=32,
                update_epochs=10,
                learning_rate=3e-4,
                total_timesteps=total_timesteps,
                run_dir=f"{folder}/run",
            )
        )
    return 2048 * (len(ends) - 1) / (ends[-1] - ends[0])


def stable_baselines3(total_timesteps: int) -> float:
    """The same with stable_baselines3.PPO, whose defaults these are, and both normalisations."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    starts = []

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            starts.append(time.perf_counter())

        def _on_step(self) -> bool:
            return True

    env = VecNormalize(make_vec_env("HalfCheetah-v5", 1))
    PPO("MlpPolicy", env, seed=1, device="cpu").learn(total_timesteps, callback=Clock())
    starts.append(time.perf_counter())  # the end of the last iteration
    return 2048 * (len(starts) - 2) / (starts[-1] - starts[1])


def main(options: Options) -> None:
    """Measures both sides in turns and writes the results."""
    sides = {"ppo_continuous": ours, "stable_baselines3": stable_baselines3}
    if options.turn:
        print(sides[options.turn](options.total_timesteps))
        return
    speeds = {side: [] for side in sides}
    for _ in range(options.repetitions):
        for side in sides:
            command = [
                sys.executable,
                __file__,
                "--turn",
                side,
                "--total-timesteps",
                str(options.total_timesteps),
            ]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            speeds[side].append(float(output.split()[-1]))
            print(f"{side:20s} {speeds[side][-1]:8.0f} steps/s", flush=True)
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    ratio = medians["ppo_continuous"] / medians["stable_baselines3"]
    print(f"ratio of medians: {ratio:.2f} (torch {torch.__version__}, {platform.machine()})")
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["side", "repetition", "steps_per_second"])
        writer.writerows(
            [side, i, f"{v:.0f}"] for side, values in speeds.items() for i, v in enumerate(values, 1)
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
