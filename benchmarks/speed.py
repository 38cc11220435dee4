"""Steps per second of ppo_continuous.py against stable-baselines3 on the same work, training only.

    python benchmarks/speed.py                             writes benchmarks/results/speed.csv

HalfCheetah-v5, 1 environment x 2048 steps, 10 epochs, 32 minibatches, one thread each. The two take turns,
each in a fresh process, so that a noisy machine disturbs both alike; what counts is the ratio of the medians.
Steps per second are told by the clock on the wall and by the processor time that the process got, which
other programs on the machine disturb less.
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


Moment = tuple[float, float]  # wall clock, processor time


def now() -> Moment:
    return time.perf_counter(), time.process_time()


def ours(total_timesteps: int) -> list[Moment]:
    """The moments at which iterations of ppo_continuous.py end."""
    spec = importlib.util.spec_from_file_location("ppo_continuous", ROOT / "ppo_continuous.py")
    ppo = sys.modules["ppo_continuous"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    moments, explained_variance = [], ppo.explained_variance  # called once, at the end of an iteration
    ppo.explained_variance = lambda *x: moments.append(now()) or explained_variance(*x)
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
    return moments


def stable_baselines3(total_timesteps: int) -> list[Moment]:
    """The same for stable_baselines3.PPO, whose defaults these are, with both normalisations."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    moments = []

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            moments.append(now())

        def _on_step(self) -> bool:
            return True

    env = VecNormalize(make_vec_env("HalfCheetah-v5", 1))
    PPO("MlpPolicy", env, seed=1, device="cpu").learn(total_timesteps, callback=Clock())
    return [*moments[1:], now()]  # the first rollout begins where no iteration has ended


def main(options: Options) -> None:
    """Measures both sides in turns and writes the results."""
    sides = {"ppo_continuous": ours, "stable_baselines3": stable_baselines3}
    if options.turn:
        moments = sides[options.turn](options.total_timesteps)
        steps = 2048 * (len(moments) - 1)
        print(*(steps / (last - first) for first, last in zip(moments[0], moments[-1], strict=True)))
        return
    rows = []
    for repetition in range(1, options.repetitions + 1):
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
            wall, processor = (float(word) for word in output.split()[-2:])
            rows.append([side, repetition, round(wall), round(processor)])
            print(
                f"{side:20s} {wall:6.0f} steps/s on the wall, {processor:6.0f} of processor time", flush=True
            )
    for column, clock in ((2, "wall"), (3, "processor")):
        ours_, theirs = (statistics.median(row[column] for row in rows if row[0] == side) for side in sides)
        print(f"ratio of medians, {clock}: {ours_ / theirs:.2f}")
    print(f"torch {torch.__version__}, {platform.machine()}")
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["side", "repetition", "steps_per_second", "steps_per_processor_second"])
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
