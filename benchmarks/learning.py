"""Train with the scripts and with their peers on many tasks and seeds, and record the returns.

    python benchmarks/learning.py --processes 2            everything: a day; continues if interrupted
    python benchmarks/learning.py --campaigns mujoco --tasks Hopper-v5 --seeds 1 2
    python benchmarks/learning.py --quick                  try each campaign for 8,192 steps; record nothing
    python benchmarks/plot.py                              draw the pictures; tables.py writes the tables

Campaigns, each with its variants, tasks, seeds and steps in CAMPAIGNS:

defaults    every script with its default options
mujoco      ppo_continuous.py on ten MuJoCo tasks, ten seeds
penalty     ppo_penalty.py on MuJoCo, five seeds, and ppo_continuous.py with its options, three seeds
table1      the eleven settings of Table 1 of the paper on its seven tasks, and the random policy
ancestors   TRPO of sb3-contrib, the policy gradient and the unclipped surrogate on the same tasks
sb3         PPO of stable-baselines3 on six tasks
atari       Pong and Breakout

The peers have the settings of rl-baselines3-zoo. results/learning.csv has one row for each run: the seconds
of training, the mean of the last 100 training episodes, the mean of 20 deterministic episodes at the end, the
learning curve as "steps:return ...", and for ppo_penalty the controller as "steps:kl:kl_coef ...". Unfinished
runs of the scripts are kept in runs/learning and resumed. Requires requirements-extra.txt.
"""

import csv
import importlib.metadata
import multiprocessing
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, run_peer, thin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

COLUMNS = [
    *("variant", "task", "seed", "steps", "seconds", "last_100_episodes", "evaluation"),
    *("versions", "curve", "controller"),
]
PAPER = (  # Table 3 of the paper; where it is silent, the details of the scripts
    "--num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 --learning-rate 3e-4"
    " --no-anneal-lr --target-kl None --log-std-init 0 "
)
TABLE_1 = {"no clipping or penalty": f"ppo_penalty {PAPER} --kl-coef 0 --kl-target None"}
TABLE_1 |= {f"clipping {x}": f"ppo_continuous {PAPER} --clip-coef {x}" for x in (0.1, 0.2, 0.3)}
TABLE_1 |= {f"adaptive KL {x}": f"ppo_penalty {PAPER} --kl-target {x}" for x in (0.003, 0.01, 0.03)}
TABLE_1 |= {f"fixed KL {x}": f"ppo_penalty {PAPER} --kl-target None --kl-coef {x}" for x in (0.3, 1, 3, 10)}
ATARI = (  # Table 5 of the paper
    "ppo_discrete --num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 3 --learning-rate 2.5e-4"
    " --lr-kl-target None --clip-coef 0.1 --anneal-clip --vf-coef 2 --ent-coef 0.01 --clip-reward"
)
VARIANTS = {  # a script and its options; the peers are in ZOO
    **{script: script for script in ("ppo_continuous", "ppo_discrete", "ppo_penalty")},
    "gamma 0.9999": "ppo_continuous --gamma 0.9999",
    "gamma 0.9999, lambda 0.98": "ppo_continuous --gamma 0.9999 --gae-lambda 0.98",
    "clip, options of ppo_penalty": "ppo_continuous --learning-rate 1e-3 --log-std-init -0.75",
    "policy gradient": "ppo_continuous --update-epochs 1 --num-minibatches 1 --target-kl None",
    "unclipped surrogate": "ppo_penalty --kl-coef 0 --kl-target None --target-kl None",
    "Atari": ATARI,
    # a larger learning rate than the paper's, because the run is 60 times shorter
    "Atari, short": "ppo_discrete --num-steps 128 --num-minibatches 4 --update-epochs 4 --learning-rate 1e-3"
    " --lr-kl-target None --clip-coef 0.1 --clip-reward",
    **TABLE_1,
}


def linear(start: float):
    """Return a schedule of stable-baselines3 that falls from start to zero."""
    return lambda left: left * start


RELU = dict(log_std_init=-2, ortho_init=False, activation_fn=torch.nn.ReLU, net_arch=[256, 256])
TRPO = dict(
    n_envs=2, n_steps=1024, batch_size=128, learning_rate=1e-3, n_critic_updates=20, cg_max_steps=25,
    cg_damping=0.1,
)  # fmt: skip
ZOO = {  # https://github.com/DLR-RM/rl-baselines3-zoo/tree/master/hyperparams, tasks -v4
    "stable-baselines3": {
        "HalfCheetah-v5": dict(
            batch_size=64, n_steps=512, gamma=0.98, learning_rate=2.0633e-05, ent_coef=0.000401762,
            clip_range=0.1, n_epochs=20, gae_lambda=0.92, max_grad_norm=0.8, vf_coef=0.58096,
            policy_kwargs=RELU,
        ),
        "Hopper-v5": dict(
            batch_size=32, n_steps=512, gamma=0.999, learning_rate=9.80828e-05, ent_coef=0.00229519,
            clip_range=0.2, n_epochs=5, gae_lambda=0.99, max_grad_norm=0.7, vf_coef=0.835671,
            policy_kwargs=RELU,
        ),
        "Walker2d-v5": dict(
            batch_size=32, n_steps=512, gamma=0.99, learning_rate=5.05041e-05, ent_coef=0.000585045,
            clip_range=0.1, n_epochs=20, gae_lambda=0.95, max_grad_norm=1, vf_coef=0.871923,
        ),
        "Ant-v5": {},
        "Pendulum-v1": dict(
            n_envs=4, n_steps=1024, gamma=0.9, learning_rate=1e-3, use_sde=True, sde_sample_freq=4,
            normalize=False,
        ),
        "CartPole-v1": dict(
            n_envs=8, n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20, normalize=False,
            learning_rate=linear(1e-3), clip_range=linear(0.2),
        ),
    },
    "TRPO": {"HalfCheetah-v5": TRPO | {"target_kl": 0.04}, "Swimmer-v5": TRPO | {"gamma": 0.9999}},
}  # fmt: skip
PAPER_TASKS = [
    *("HalfCheetah-v5", "Hopper-v5", "InvertedDoublePendulum-v5", "InvertedPendulum-v5"),
    *("Reacher-v5", "Swimmer-v5", "Walker2d-v5"),
]
MUJOCO = [*PAPER_TASKS, "Ant-v5", "Humanoid-v5", "Pusher-v5"]


@dataclass
class Campaign:
    """Every variant is run on every task with every seed."""

    variants: list[str]
    tasks: list[str]
    seeds: int
    steps: int = 1_000_000


CAMPAIGNS = {
    "defaults": [
        Campaign(["ppo_continuous"], ["Pendulum-v1"], 5, 100_000),
        Campaign(["ppo_penalty"], ["Pendulum-v1", "CartPole-v1"], 5, 120_000),
        Campaign(["ppo_discrete"], ["CartPole-v1"], 5, 60_000),
        Campaign(["ppo_discrete"], ["Acrobot-v1", "FrozenLake-v1"], 5, 100_000),
        Campaign(["ppo_discrete"], ["LunarLander-v3", "MountainCar-v0", "Taxi-v4"], 5, 300_000),
        Campaign(["ppo_continuous"], ["BipedalWalker-v3", "MountainCarContinuous-v0"], 5, 300_000),
        Campaign(["ppo_continuous"], ["LunarLanderContinuous-v3"], 10, 300_000),
        Campaign(["Atari, short"], ["ALE/Breakout-v5"], 1, 150_000),
    ],
    "mujoco": [
        Campaign(["ppo_continuous"], MUJOCO, 10),
        Campaign(["gamma 0.9999", "gamma 0.9999, lambda 0.98"], ["Swimmer-v5"], 10),
    ],
    "penalty": [
        Campaign(["ppo_penalty"], [*PAPER_TASKS, "Ant-v5"], 5),
        Campaign(["clip, options of ppo_penalty"], [*PAPER_TASKS, "Ant-v5"], 3),
    ],
    "table1": [Campaign(["random", *TABLE_1], PAPER_TASKS, 3)],
    "ancestors": [Campaign(["policy gradient", "unclipped surrogate", "TRPO"], PAPER_TASKS, 3)],
    "sb3": [
        Campaign(["stable-baselines3"], ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5"], 3),
        Campaign(["stable-baselines3"], ["Pendulum-v1", "CartPole-v1"], 5, 100_000),
    ],
    "atari": [Campaign(["Atari"], ["ALE/Pong-v5", "ALE/Breakout-v5"], 2)],
}


@dataclass
class Options:
    """Options of this benchmark."""

    campaigns: list[str] = field(default_factory=lambda: list(CAMPAIGNS))
    variants: list[str] | None = None
    """of those, the variants (None: all)"""
    tasks: list[str] | None = None
    """of those, the tasks (None: all)"""
    seeds: list[int] | None = None
    """of those, the seeds (None: all)"""
    processes: int = 1
    """runs at the same time"""
    quick: bool = False
    """run the first 8,192 steps of a variant and task of each campaign; record nothing"""


def read_runs(path: Path = RESULTS / "learning.csv") -> dict[tuple[str, str, int], dict[str, str]]:
    """Read the rows of the results by (variant, task, seed)."""
    csv.field_size_limit(10**6)
    if not path.exists():
        return {}
    with path.open() as file:
        return {(row["variant"], row["task"], int(row["seed"])): row for row in csv.DictReader(file)}


def run_script(variant: str, task: str, seed: int, steps: int, folder: Path, quick: bool) -> dict:
    """Train with a script, or resume an interrupted run, and return the results."""
    script, *options = VARIANTS[variant].split()
    options += ["--env-id", task, "--seed", str(seed), "--total-timesteps", str(steps)]
    options += ["--compile"] if task in MUJOCO and not quick else []
    options += ["--checkpoint-every", "100", "--eval-episodes", "1"] if quick else []
    resume = (folder / "checkpoint.pt").exists()
    options = ["--resume", str(folder)] if resume else [*options, "--run-dir", str(folder)]
    with (folder.parent / f"{folder.name}.txt").open("a") as log:
        subprocess.run(
            [sys.executable, str(ROOT / f"{script}.py"), *options], check=True, stdout=log, stderr=log
        )
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    rows = checkpoint["args"]["num_envs"] * checkpoint["args"]["num_steps"]  # of an iteration
    controller = ""
    if "losses/kl" in events.Tags()["scalars"]:
        kls, coefs = (events.Scalars(tag) for tag in ("losses/kl", "charts/kl_coef"))
        points = [f"{x.step}:{x.value:.3g}:{y.value:.3g}" for x, y in zip(kls, coefs, strict=True)]
        controller = " ".join(points[:: max(1, len(points) // 50)])
    return dict(
        steps=checkpoint["iteration"] * rows,
        seconds=sum(rows / event.value for event in events.Scalars("charts/SPS")),
        last_100_episodes=np.mean(checkpoint["episode_returns"][-100:]),
        evaluation=events.Scalars("eval/episodic_return")[0].value,
        curve=thin([(event.step, event.value) for event in events.Scalars("charts/episodic_return")]),
        controller=controller,
    )


def run_random(task: str, seed: int) -> dict:
    """Return the results of random actions, uniform in the action space, over 100 episodes."""
    env, returns, steps = gym.make(task), [], 0
    env.action_space.seed(seed)
    env.reset(seed=seed)
    for _ in range(100):
        env.reset()
        total, ended = 0.0, False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, steps, ended = total + reward, steps + 1, terminated or truncated
        returns.append(total)
    return dict(steps=steps, seconds=0, last_100_episodes=np.mean(returns), evaluation=np.mean(returns))


def run(variant: str, task: str, seed: int, steps: int, folder: Path, quick: bool = False) -> dict:
    """Run a variant on a task and return its row of the results."""
    if variant == "random":
        results = run_random(task, seed)
    elif variant in ZOO:
        settings = (TRPO if variant == "TRPO" else {}) | ZOO[variant].get(task, {})
        algorithm = "TRPO" if variant == "TRPO" else "PPO"
        results = run_peer(algorithm, task, seed, steps, settings, eval_episodes=1 if quick else 20)
    else:
        results = run_script(variant, task, seed, steps, folder, quick)
    packages = ["torch", "gymnasium", *(["mujoco"] if task in MUJOCO else [])]
    packages += {"stable-baselines3": ["stable-baselines3"], "TRPO": ["sb3-contrib"]}.get(variant, [])
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    row = (
        dict.fromkeys(COLUMNS, "") | dict(variant=variant, task=task, seed=seed, versions=versions) | results
    )
    return row | {key: f"{row[key]:.5g}" for key in ("seconds", "last_100_episodes", "evaluation")}


def append(row: dict, path: Path = RESULTS / "learning.csv") -> None:
    """Append a row to the results."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main(options: Options) -> None:
    """Run what is missing from the results, the first seed of all tasks first."""
    if options.quick:
        for part in tqdm([CAMPAIGNS[name][0] for name in options.campaigns], unit=" runs"):
            with tempfile.TemporaryDirectory() as folder:
                row = run(part.variants[-1], part.tasks[0], 1, 8_192, Path(folder) / "run", quick=True)
            tqdm.write(f"{row['variant']}, {row['task']}: {row['seconds']} s, return {row['evaluation']}")
        return
    folder = ROOT / "runs" / "learning"
    folder.mkdir(parents=True, exist_ok=True)
    parts, done = [part for name in options.campaigns for part in CAMPAIGNS[name]], read_runs()
    jobs = [
        (variant, task, seed, part.steps)
        for seed in options.seeds or range(1, 11)
        for part in parts
        for task in part.tasks
        for variant in part.variants
        if seed <= part.seeds and (variant, task, seed) not in done
        if (options.tasks is None or task in options.tasks)
        if (options.variants is None or variant in options.variants)
    ]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        names = ["__".join(map(str, job[:3])).replace("/", "-").replace(" ", "-") for job in jobs]
        runs = [pool.submit(run, *job, folder / name) for job, name in zip(jobs, names, strict=True)]
        try:
            for future in tqdm(as_completed(runs), total=len(runs), unit=" runs"):
                append(future.result())
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, start no more runs


if __name__ == "__main__":
    main(tyro.cli(Options))
