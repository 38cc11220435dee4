"""Measure how time and memory grow with environments, width, response length and batch size.

    python benchmarks/growth.py                            write benchmarks/results/growth.csv

envs: ppo_continuous on HalfCheetah-v5, iterations of 2048 rows from 1 to 256 environments, in one process
(sync) or in one process each (async), 10 epochs of 32 minibatches.
width: the same with one environment and two hidden layers of 16 to 1024 units, eager and with --compile.
answer_length: the default model of ppo_rlhf_llm with 64 prompts of 16 tokens; no response ends early.
batch: the same with responses of 32 tokens.
The control script uses one thread, RLHF two. Seconds are medians over the iterations after the first;
speed.py shows the shorter of two measurements. Memory is the peak of the process plus, with --async-envs, the
memory of its workers at the end (Linux). Every measurement runs in a fresh process. Requires
requirements-extra.txt.
"""

import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from common import in_fresh_process, load, measured, peak_mebibytes

TURNS, ITERATIONS, ROWS = 2, 4, 2048
PROMPT = 16
SIZES = {  # dimension: (sizes, variants)
    "envs": ((1, 2, 4, 8, 16, 32, 64, 128, 256), ("sync", "async")),
    "width": ((16, 32, 64, 128, 256, 512, 1024), ("eager", "compiled")),
    "answer_length": ((16, 32, 64, 128, 256, 512), ("",)),
    "batch": ((16, 32, 64, 128, 256), ("",)),
}


def workers_mebibytes() -> float:
    """Return the proportional memory (PSS) of the child processes in MiB."""
    total = 0
    for child in multiprocessing.active_children():
        with open(f"/proc/{child.pid}/smaps_rollup") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total / 1024


def train(script: str, prepare: Callable = lambda ppo: None, **options: object) -> tuple[float, float]:
    """Return the median seconds of an iteration and the peak MiB."""
    ppo = load(script)
    prepare(ppo)
    moments, workers, explained_variance = [], [], ppo.explained_variance

    def at_the_end_of_an_iteration(*x: torch.Tensor) -> torch.Tensor:
        moments.append(time.perf_counter())
        workers.append(workers_mebibytes())
        return explained_variance(*x)

    ppo.explained_variance = at_the_end_of_an_iteration
    with tempfile.TemporaryDirectory() as folder:
        ppo.train(ppo.Args(**options, checkpoint_every=ITERATIONS, run_dir=f"{folder}/run"))
    return statistics.median(b - a for a, b in itertools.pairwise(moments)), peak_mebibytes() + workers[-1]


def control(hidden: tuple[int, int], **options: object) -> tuple[float, float]:
    """Measure ppo_continuous."""

    def prepare(ppo) -> None:
        ppo.mlp_parameters.__defaults__ = (hidden,)
        ppo.evaluate = lambda *_: [0.0]

    work = dict(env_id="HalfCheetah-v5", num_minibatches=32, update_epochs=10, target_kl=None)
    work |= dict(total_timesteps=ROWS * ITERATIONS)
    return train("ppo_continuous", prepare, **work, **options)


def rlhf(batch_size: int, answer_length: int) -> tuple[float, float]:
    """Measure stage 3 of ppo_rlhf_llm."""

    def prepare(ppo) -> None:
        torch.set_num_threads(2)
        ppo.ByteTokenizer.eos_token_id = -1  # no response ends early
        ppo.encode = lambda models, texts: [(list(p.encode()), list(a.encode())) for p, a in texts]
        ppo.fine_tune = ppo.learn_reward = lambda *_: 0
        ppo.evaluate = lambda *_: ({}, [])
        ppo.built_in_data = lambda _: ppo.Data([], ["x" * PROMPT] * batch_size, [], [], lambda *_: 0.0)

    work = dict(total_episodes=batch_size * ITERATIONS, kl_horizon=max(500, batch_size))
    work |= dict(context=PROMPT + answer_length, answer_length=answer_length, batch_size=batch_size)
    return train("ppo_rlhf_llm", prepare, **work)


def turn(grows: str, size: int, variant: str) -> tuple[float, float]:
    """Measure one size in this process and return seconds per iteration and MiB."""
    if grows == "envs":
        steps = dict(num_envs=size, num_steps=ROWS // size, async_envs=variant == "async")
        return control((64, 64), **steps)
    if grows == "width":
        return control((size, size), num_envs=1, num_steps=ROWS, compile=variant == "compiled")
    return rlhf(*((64, size) if grows == "answer_length" else (size, 32)))


def measure(grows: str, variant: str, size: int, _: int) -> tuple[float, int]:
    """Measure one size in a fresh process."""
    seconds, mebibytes = (float(word) for word in in_fresh_process(grows, size, variant))
    return round(seconds, 4), round(mebibytes)


def main() -> None:
    if sys.argv[1:]:
        grows, size, variant = sys.argv[1:]
        print(*turn(grows, int(size), variant))
        return
    turns = [
        (grows, variant, size, k + 1)
        for grows, (sizes, variants) in SIZES.items()
        for k in range(TURNS)
        for size in sizes
        for variant in variants
    ]
    measured("growth", ["grows", "variant", "size", "turn", "seconds", "mebibytes"], turns, measure)


if __name__ == "__main__":
    main()
