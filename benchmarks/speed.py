"""Steps per second of the scripts against stable-baselines3 on the same work, training only.

    python benchmarks/speed.py                             writes benchmarks/results/speed.csv
    python benchmarks/speed.py --scripts ppo_discrete

ppo_continuous: HalfCheetah-v5, 1 environment x 2048 steps, 10 epochs, 32 minibatches, both normalisations.
ppo_discrete: CartPole-v1, 4 environments x 128 steps, 4 epochs, 4 minibatches, no normalisations of the task.
One thread each. The two sides take turns, each in a fresh process, so that a noisy machine disturbs both
alike; what counts is the ratio of the medians. Steps per second are told by the clock on the wall and by the
processor time that the process got, which other programs on the machine disturb less.
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
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.csv"


JOBS = {  # options of the scripts; normalisation is a wrapper on the other side
    "ppo_continuous": dict(
        env_id="HalfCheetah-v5", num_envs=1, num_steps=2048, num_minibatches=32, update_epochs=10
    ),
    "ppo_discrete": dict(
        env_id="CartPole-v1",
        num_envs=4,
        num_steps=128,
        num_minibatches=4,
        update_epochs=4,
        norm_obs=False,
        norm_reward=False,
    ),
}


@dataclass
class Options:
    """What to measure."""

    scripts: list[str] = field(default_factory=lambda: list(JOBS))
    """which of the jobs"""
    repetitions: int = 5
    """turns of each side"""
    total_timesteps: int | None = None
    """environment steps of a turn; the first rollout is warm-up and not counted (None: 5 or 60 rollouts)"""
    turn: str | None = None
    """used by the benchmark itself: measure one side now and print its steps per second"""


Moment = tuple[float, float]  # wall clock, processor time


def now() -> Moment:
    return time.perf_counter(), time.process_time()


def ours(script: str, total_timesteps: int) -> list[Moment]:
    """The moments at which iterations of the script end."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    ppo = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    moments, explained_variance = [], ppo.explained_variance  # called once, at the end of an iteration
    ppo.explained_variance = lambda *x: moments.append(now()) or explained_variance(*x)
    ppo.evaluate = lambda *_: [0.0]
    with tempfile.TemporaryDirectory() as folder:
        options = JOBS[script] | dict(learning_rate=3e-4, total_timesteps=total_timesteps)
        ppo.train(ppo.Args(**options, run_dir=f"{folder}/run"))
    return moments


def stable_baselines3(script: str, total_timesteps: int) -> list[Moment]:
    """The same for stable_baselines3.PPO."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    job, moments = JOBS[script], []

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            moments.append(now())

        def _on_step(self) -> bool:
            return True

    env = make_vec_env(job["env_id"], job["num_envs"])
    env = VecNormalize(env) if job.get("norm_obs", True) else env
    rows = job["num_envs"] * job["num_steps"]
    agent = PPO(
        "MlpPolicy",
        env,
        n_steps=job["num_steps"],
        batch_size=rows // job["num_minibatches"],
        n_epochs=job["update_epochs"],
        seed=1,
        device="cpu",
    )
    agent.learn(total_timesteps, callback=Clock())
    return [*moments[1:], now()]  # the first rollout begins where no iteration has ended


def main(options: Options) -> None:
    """Measures both sides in turns and writes the results, those of other scripts kept."""
    sides = {"ours": ours, "stable_baselines3": stable_baselines3}
    if options.turn:
        (script,) = options.scripts
        rows = JOBS[script]["num_envs"] * JOBS[script]["num_steps"]
        moments = sides[options.turn](script, options.total_timesteps or rows * (5 if rows > 1000 else 60))
        steps = rows * (len(moments) - 1)
        print(*(steps / (last - first) for first, last in zip(moments[0], moments[-1], strict=True)))
        return
    rows = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            rows = [row for row in list(csv.reader(file))[1:] if row[0] not in options.scripts]
    for script in options.scripts:
        new = []
        for repetition in range(1, options.repetitions + 1):
            for side in sides:
                command = [sys.executable, __file__, "--scripts", script, "--turn", side]
                if options.total_timesteps:
                    command += ["--total-timesteps", str(options.total_timesteps)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                wall, processor = (float(word) for word in output.split()[-2:])
                new.append([script, side, repetition, round(wall), round(processor)])
                print(
                    f"{script} {side:18s} {wall:6.0f} steps/s on the wall, {processor:6.0f} of processor time"
                )
        for column, clock in ((3, "wall"), (4, "processor")):
            mine, theirs = (statistics.median(row[column] for row in new if row[1] == side) for side in sides)
            print(f"{script}: ratio of medians, {clock}: {mine / theirs:.2f}", flush=True)
        rows += new
    print(f"torch {torch.__version__}, {platform.machine()}")
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["script", "side", "repetition", "steps_per_second", "steps_per_processor_second"])
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
