"""Measure the training time until the task is solved, against tuned stable-baselines3.

    python benchmarks/solve.py                             write benchmarks/results/solve.csv

A task is solved when 20 deterministic episodes average -200 (Pendulum-v1) or 475 (CartPole-v1). Seeds 1 to 5,
one thread each. Every few thousand steps the timer stops and the agent is evaluated. stable-baselines3 uses
the settings of rl-baselines3-zoo; this project uses its defaults and one command for each task, given below.
They alternate, each in a fresh process. Runs already in the table are not repeated. Requires
requirements-extra.txt.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
import torch
from common import in_fresh_process, load, measured

BARS = {"Pendulum-v1": -200.0, "CartPole-v1": 475.0}
SCRIPTS = {"Pendulum-v1": "ppo_continuous", "CartPole-v1": "ppo_discrete"}
EVERY = {"Pendulum-v1": 2048, "CartPole-v1": 1024}  # steps between evaluations
COMMANDS = {  # as on the command line: --num-envs 16 ...
    "Pendulum-v1": dict(
        num_envs=16,
        num_steps=128,
        num_minibatches=16,
        update_epochs=10,
        gamma=0.9,
        learning_rate=2e-3,
        target_kl=None,
        anneal_lr=False,
        log_std_init=0.0,
        total_timesteps=60_000,
    ),
    "CartPole-v1": dict(
        num_envs=8,
        num_steps=32,
        num_minibatches=1,
        update_epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        learning_rate=1e-3,
        lr_kl_target=None,
        ent_coef=0.0,
        total_timesteps=100_000,
    ),
}
ZOO = {
    "Pendulum-v1": dict(
        num_envs=4, n_steps=1024, gamma=0.9, learning_rate=1e-3, use_sde=True, sde_sample_freq=4
    ),
    "CartPole-v1": dict(
        num_envs=8,
        n_steps=32,
        batch_size=256,
        gae_lambda=0.8,
        gamma=0.98,
        n_epochs=20,
        learning_rate=lambda left: left * 1e-3,
        clip_range=lambda left: left * 0.2,
    ),
}


class Solved(Exception):
    """The task is solved."""


@dataclass
class Clock:
    """Count the seconds of training, without those of evaluation."""

    env_id: str
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    next: int = 0

    def look(self, steps: int, act: Callable[[np.ndarray], np.ndarray]) -> None:
        """Evaluate if it is time. Raises Solved if the mean return reaches the threshold."""
        self.steps = steps
        if steps < self.next:
            return
        self.seconds += time.perf_counter() - self.started
        self.next = steps + EVERY[self.env_id]
        if play(self.env_id, act) >= BARS[self.env_id]:
            raise Solved
        self.started = time.perf_counter()


def play(env_id: str, act: Callable[[np.ndarray], np.ndarray]) -> float:
    """Return the mean return of 20 episodes, one in each of 20 environments."""
    envs = gym.make_vec(env_id, 20, vectorization_mode="sync")
    obs, _ = envs.reset(seed=[1000 + i for i in range(20)])
    returns, playing = np.zeros(20), np.ones(20, dtype=bool)
    while playing.any():
        obs, rewards, terminations, truncations, _ = envs.step(act(obs))
        returns += rewards * playing
        playing &= ~(terminations | truncations)
    return returns.mean()


def script(clock: Clock, seed: int, **options: float) -> None:
    """Train with the project's script."""
    ppo = load(SCRIPTS[clock.env_id])
    agents, flatten, explained_variance = [], ppo.flatten_parameters, ppo.explained_variance
    ppo.flatten_parameters = lambda agent: agents.append(agent) or flatten(agent)

    def at_the_end_of_an_iteration(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        clock.look(clock.steps + values.numel(), lambda obs: agents[0].act(obs, deterministic=True))
        return explained_variance(values, returns)

    ppo.explained_variance = at_the_end_of_an_iteration
    ppo.evaluate = lambda *_: [0.0]
    with tempfile.TemporaryDirectory() as folder:
        args = ppo.Args(env_id=clock.env_id, seed=seed, run_dir=f"{folder}/run", **options)
        clock.started = time.perf_counter()
        ppo.train(args)


def defaults(clock: Clock, seed: int) -> None:
    """Train with the default options."""
    script(clock, seed)


def command(clock: Clock, seed: int) -> None:
    """Train with the options in COMMANDS."""
    script(clock, seed, **COMMANDS[clock.env_id])


def stable_baselines3(clock: Clock, seed: int) -> None:
    """Train with stable_baselines3.PPO and the settings of rl-baselines3-zoo."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)

    class Look(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                clock.look(self.num_timesteps, lambda obs: self.model.predict(obs, deterministic=True)[0])

        def _on_step(self) -> bool:
            return True

    options = dict(ZOO[clock.env_id])
    env = make_vec_env(clock.env_id, options.pop("num_envs"), seed=seed)
    agent = PPO("MlpPolicy", env, seed=seed, device="cpu", **options)
    clock.started = time.perf_counter()
    agent.learn(100_000, callback=Look())


SIDES = (defaults, command, stable_baselines3)


def main() -> None:
    """Measure all in turn, and continue where an earlier call was interrupted."""
    if sys.argv[1:]:
        env_id, seed, name = sys.argv[1:]
        clock, side = Clock(env_id), next(side for side in SIDES if side.__name__ == name)
        try:
            side(clock, int(seed))
            print("nan", clock.steps)
        except Solved:
            print(f"{clock.seconds:.2f}", clock.steps)
        return
    turns = [(env_id, seed, side.__name__) for env_id in BARS for seed in range(1, 6) for side in SIDES]
    measured("solve", ["env_id", "seed", "side", "seconds", "steps"], turns, in_fresh_process)


if __name__ == "__main__":
    main()
