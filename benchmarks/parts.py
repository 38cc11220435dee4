"""Measure where an iteration of ppo_continuous.py spends its time, eager and with --compile.

    python benchmarks/parts.py                             write benchmarks/results/parts.csv

HalfCheetah-v5, 1 environment x 2048 steps, 10 epochs, 32 minibatches, one thread. Functions of the script are
wrapped with a timer, which costs about a microsecond per call. Values are milliseconds, medians over
iterations.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from common import in_fresh_process, load, measured

ROWS, ITERATIONS = 2048, 10
PARTS = ("environment", "policy", "sums", "gradient", "adam")


def milliseconds(compile: bool) -> list[float]:
    """Return milliseconds of each part, of the rest, and of the whole iteration."""
    ppo = load("ppo_continuous")
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
    torch.optim.Adam.step = timed("adam", torch.optim.Adam.step)
    ppo.evaluate = lambda *_: [0.0]
    with tempfile.TemporaryDirectory() as folder:
        job = dict(env_id="HalfCheetah-v5", num_envs=1, num_steps=ROWS, num_minibatches=32, update_epochs=10)
        job |= dict(
            target_kl=None,
            total_timesteps=ROWS * ITERATIONS,
            checkpoint_every=ITERATIONS,
            run_dir=f"{folder}/run",
        )
        ppo.train(ppo.Args(**job, compile=compile))
    *parts, whole = (
        1000 * statistics.median(b[name] - a[name] for a, b in itertools.pairwise(snapshots))
        for name in (*PARTS, "iteration")
    )
    return [*parts, whole - sum(parts), whole]


def main() -> None:
    if sys.argv[1:]:
        print(*map(round, milliseconds(compile=sys.argv[1] == "compiled")))
        return
    columns = ["mode", *PARTS, "rest", "iteration"]
    measured("parts", columns, [("eager",), ("compiled",)], in_fresh_process)


if __name__ == "__main__":
    main()
