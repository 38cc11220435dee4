"""Steps per second of the scripts, eager and with --compile, against stable-baselines3 on the same work.

    python benchmarks/speed.py                             writes benchmarks/results/speed.csv
    python benchmarks/speed.py --jobs ppo_discrete

ppo_continuous: HalfCheetah-v5, 1 environment x 2048 steps, 10 epochs, 32 minibatches, both normalisations;
also the environment alone, with random actions. ppo_discrete: CartPole-v1, 4 environments x 128 steps,
4 epochs, 4 minibatches, no normalisations of the task. learning_step: gradient and Adam's update for 64 rows
of HalfCheetah. One thread each; training only, the first rollout (and what is compiled in it) is warm-up.
The sides take turns, each in a fresh process, so that a noisy machine disturbs all alike; what counts is the
ratio of the medians. Steps per second are told by the clock on the wall and by the processor time that the
process got, which other programs on the machine disturb less. Needs requirements-extra.txt.
"""

import csv
import importlib.util
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

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

    jobs: list[str] = field(default_factory=lambda: list(SIDES))
    """which of the jobs"""
    repetitions: int = 5
    """turns of each side"""
    total_timesteps: int | None = None
    """environment steps of a turn; the first rollout is warm-up and not counted (None: 6 or 60 rollouts)"""
    turn: str | None = None
    """used by the benchmark itself: measure one side now and print its steps per second"""


Moment = tuple[float, float]  # wall clock, processor time


def now() -> Moment:
    return time.perf_counter(), time.process_time()


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    ppo = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    return ppo


def ours(script: str, total_timesteps: int, **options: bool) -> list[Moment]:
    """The moments at which iterations of the script end."""
    ppo = load(script)
    moments, explained_variance = [], ppo.explained_variance  # called once, at the end of an iteration
    ppo.explained_variance = lambda *x: moments.append(now()) or explained_variance(*x)
    ppo.evaluate = lambda *_: [0.0]
    with tempfile.TemporaryDirectory() as folder:
        options |= JOBS[script] | dict(learning_rate=3e-4, total_timesteps=total_timesteps)
        ppo.train(ppo.Args(**options, run_dir=f"{folder}/run"))
    return moments


def compiled(script: str, total_timesteps: int) -> list[Moment]:
    """The same with --compile."""
    return ours(script, total_timesteps, compile=True)


def environment(script: str, total_timesteps: int) -> list[Moment]:
    """The environment alone, with random actions, a moment for each rollout."""
    import gymnasium as gym

    env, moments = gym.make(JOBS[script]["env_id"]), []
    env.action_space.seed(1)
    env.reset(seed=1)
    for step in range(total_timesteps):
        if step % JOBS[script]["num_steps"] == 0:
            moments.append(now())
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return moments


def learning_steps(_: str, steps: int, compile: bool = False) -> list[Moment]:
    """Moments before and after these learning steps of ppo_continuous: a gradient and Adam's update each."""
    ppo = load("ppo_continuous")
    torch.set_num_threads(1)
    args, size = ppo.Args(), 17
    agent = ppo.Agent(size, -torch.ones(6), torch.ones(6), args)
    weights = ppo.flatten_parameters(agent)
    optimizer = torch.optim.Adam([weights], lr=1e-5, eps=1e-5, fused=True)
    shapes = ((64, size), (64, 6), (64,), (64,), (64,), (64,))
    minibatches = [tuple(map(torch.randn, shapes)) for _ in range(32)]
    gradient_of = ppo.compiled(ppo.minibatch_gradient, args) if compile else ppo.minibatch_gradient
    moments = []
    for step in range(100 + steps):
        if step == 100:  # warm
            moments.append(now())
        weights.grad, *_ = gradient_of(agent, minibatches[step % 32], args)
        optimizer.step()
    return [*moments, now()]


def compiled_learning_steps(job: str, steps: int) -> list[Moment]:
    """The same as one graph."""
    return learning_steps(job, steps, compile=True)


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


SIDES = {
    "ppo_continuous": (ours, compiled, stable_baselines3, environment),
    "ppo_discrete": (ours, compiled, stable_baselines3),
    "learning_step": (learning_steps, compiled_learning_steps),
}


def turn(job: str, side: Callable, total_timesteps: int | None) -> tuple[float, float]:
    """Steps per second on the wall and of processor time."""
    if job == "learning_step":
        steps, moments = 3000, side(job, 3000)
    else:
        rows = JOBS[job]["num_envs"] * JOBS[job]["num_steps"]
        moments = side(job, total_timesteps or rows * (6 if rows > 1000 else 60))
        steps = rows * (len(moments) - 1)
    return tuple(steps / (last - first) for first, last in zip(moments[0], moments[-1], strict=True))


def measure(job: str, options: Options) -> list[list]:
    """Rows of the table: all sides of a job in turns, each in a process of its own."""
    rows = []
    for repetition in range(1, options.repetitions + 1):
        for side in SIDES[job]:
            command = [sys.executable, __file__, "--jobs", job, "--turn", side.__name__]
            if options.total_timesteps:
                command += ["--total-timesteps", str(options.total_timesteps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rates = [float(word) for word in output.split()[-2:]]
            rows.append([job, side.__name__, repetition, *map(round, rates)])
            print(*rows[-1], flush=True)
    for column, clock in ((3, "wall"), (4, "processor")):
        medians = {
            side.__name__: statistics.median(row[column] for row in rows if row[1] == side.__name__)
            for side in SIDES[job]
        }
        print(f"{job}, {clock}, medians of steps per second:", medians, flush=True)
    return rows


def main(options: Options) -> None:
    """Measures all sides in turns and writes the results, those of other jobs kept."""
    if options.turn:
        (job,) = options.jobs
        side = next(side for side in SIDES[job] if side.__name__ == options.turn)
        print(*turn(job, side, options.total_timesteps))
        return
    rows = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            rows = [row for row in list(csv.reader(file))[1:] if row[0] not in options.jobs]
    for job in options.jobs:
        rows += measure(job, options)
    print(f"torch {torch.__version__}, {platform.machine()}")
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "side", "repetition", "steps_per_second", "steps_per_processor_second"])
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
