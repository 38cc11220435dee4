"""Where an iteration of ppo_continuous.py spends its time, eager and with --compile.

    python benchmarks/parts.py                             prints milliseconds, medians over iterations

HalfCheetah-v5, 1 environment x 2048 steps, 10 epochs, 32 minibatches, one thread. Functions of the script are
wrapped with a clock, which itself costs a microsecond a call.
"""

import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ROWS, ITERATIONS = 2048, 10


def main(compile: bool) -> None:
    spec = importlib.util.spec_from_file_location("ppo_continuous", ROOT / "ppo_continuous.py")
    ppo = sys.modules["ppo_continuous"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    spent, snapshots = defaultdict(float), []

    def timed(name: str, function: Callable) -> Callable:
        def call(*inputs, **options):
            start = time.perf_counter()
            result = function(*inputs, **options)
            spent[name] += time.perf_counter() - start
            return result

        return call

    def timed_envs(make_envs: Callable) -> Callable:
        def make(*inputs):
            envs = make_envs(*inputs)
            envs.step = timed("environment", envs.step)
            return envs

        return make

    def end_of_iteration(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        snapshots.append(dict(spent) | {"iteration": time.perf_counter()})
        return explained_variance(values, returns)

    explained_variance, acting_policy = ppo.explained_variance, ppo.Agent.acting_policy
    ppo.explained_variance = end_of_iteration
    ppo.Agent.acting_policy = lambda agent, like: timed("policy", acting_policy(agent, like))
    ppo.make_envs = timed_envs(ppo.make_envs)
    ppo.compute_gae, ppo.running_sums = timed("sums", ppo.compute_gae), timed("sums", ppo.running_sums)
    if compile:
        make_graph = ppo.compiled
        ppo.compiled = lambda *inputs: timed("gradient", make_graph(*inputs))
    else:
        ppo.minibatch_gradient = timed("gradient", ppo.minibatch_gradient)
    step = torch.optim.Adam.step
    torch.optim.Adam.step = timed("adam", step)
    ppo.evaluate = lambda *_: [0.0]
    with tempfile.TemporaryDirectory() as folder:
        job = dict(env_id="HalfCheetah-v5", num_envs=1, num_steps=ROWS, num_minibatches=32)
        job |= dict(total_timesteps=ROWS * ITERATIONS, checkpoint_every=ITERATIONS, run_dir=f"{folder}/run")
        ppo.train(ppo.Args(**job, compile=compile))
    torch.optim.Adam.step = step
    parts = {
        name: 1000 * statistics.median(b[name] - a[name] for a, b in itertools.pairwise(snapshots))
        for name in snapshots[0]
    }
    parts["rest"] = 2 * parts["iteration"] - sum(parts.values())
    print("--compile" if compile else "eager", {name: round(value) for name, value in parts.items()}, "ms")


if __name__ == "__main__":
    for compile in (False, True):
        main(compile)
