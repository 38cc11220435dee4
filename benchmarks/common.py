"""Helpers of the benchmarks: paths, import of a script, training with a peer."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(script: str) -> ModuleType:
    """Import a script from the top of the repository as a new module."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    ppo = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    return ppo


def thin(points: list[tuple], count: int = 50) -> str:
    """Replace (steps, value) by the means of at most `count` blocks and write them as text."""
    blocks = np.array_split(np.array(points, dtype=float), min(count, len(points)))
    return " ".join(f"{block[-1, 0]:.0f}:{block[:, 1].mean():.5g}" for block in blocks)


def run_peer(algorithm: str, task: str, seed: int, steps: int, settings: dict, eval_episodes: int) -> dict:
    """Train with PPO of stable-baselines3 or TRPO of sb3-contrib, with one thread, and return the results.

    settings are those of the algorithm, and n_envs (1) and normalize (True).
    """
    import torch
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    class Returns(BaseCallback):
        def _on_step(self) -> bool:
            ended = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
            episodes.extend((self.num_timesteps, value) for value in ended)
            return True

    episodes, settings = [], dict(settings)
    n_envs, normalize = settings.pop("n_envs", 1), settings.pop("normalize", True)
    envs, test = make_vec_env(task, n_envs, seed=seed), make_vec_env(task, 1, seed=seed + 1000)
    if normalize:
        envs = VecNormalize(envs, gamma=settings.get("gamma", 0.99))
        test = VecNormalize(test, training=False, norm_reward=False)
        test.obs_rms = envs.obs_rms
    torch.set_num_threads(1)
    model = {"TRPO": TRPO, "PPO": PPO}[algorithm]("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    started = time.perf_counter()
    model.learn(steps, callback=Returns())
    seconds = time.perf_counter() - started
    evaluation, _ = evaluate_policy(model, test, eval_episodes)
    return dict(
        steps=model.num_timesteps,
        seconds=seconds,
        last_100_episodes=np.mean([value for _, value in episodes[-100:]]),
        evaluation=evaluation,
        curve=thin(episodes),
    )
