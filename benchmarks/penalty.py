"""Train with the adaptive KL penalty on MuJoCo tasks, and record the KL controller.

    python benchmarks/penalty.py                           everything (an hour); continues if interrupted
    python benchmarks/penalty.py --variants adaptive --tasks Ant-v5
    python benchmarks/plot.py                              draw benchmarks/results/penalty.csv

The same tasks with the clip are in learning.csv. Requires requirements-extra.txt. Unfinished runs are kept in
runs/penalty.
"""

import csv
from dataclasses import dataclass, field

import torch
import tyro
from learning import ROOT, append, finish

RESULTS = ROOT / "benchmarks" / "results" / "penalty.csv"
COLUMNS = ["variant", "task", "seed", "steps", "what", "value"]
TARGETS = ["0.003", "0.01", "0.03"]
VARIANTS = {"adaptive": ""}  # the defaults; for the others the controller alone limits the KL
VARIANTS |= {f"target {target}": f"--kl-target {target} --target-kl None" for target in TARGETS}
VARIANTS["no penalty"] = "--kl-coef 0 --kl-target None --target-kl None"
TASKS = ["Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"]
JOBS = [(f"target {target}", "HalfCheetah-v5", 1, 300_000) for target in TARGETS]
JOBS += [("no penalty", "Pendulum-v1", seed, 120_000) for seed in (1, 2, 3)]
JOBS += [("adaptive", task, seed, 1_000_000) for task in TASKS for seed in (1, 2, 3)]


@dataclass
class Options:
    """Options of this benchmark."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    tasks: list[str] = field(default_factory=lambda: ["Pendulum-v1", *TASKS])
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])


def rows_done() -> set[tuple[str, str, str]]:
    """Return (variant, task, seed) of the runs whose evaluation is in the results."""
    if not RESULTS.exists():
        return set()
    with RESULTS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["what"] == "eval/episodic_return"]
    return {(row["variant"], row["task"], row["seed"]) for row in rows}


def run(variant: str, task: str, seed: int, steps: int) -> list[list]:
    """Run one variant on one task and return its rows for the results."""
    folder = ROOT / "runs" / "penalty" / f"{variant.replace(' ', '-')}__{task}__{seed}"
    options = ["--env-id", task, "--seed", str(seed), "--total-timesteps", str(steps), "--compile"]
    events = finish("ppo_penalty", folder, options + VARIANTS[variant].split())
    rows = []
    if variant.startswith("target"):
        for what in ("losses/kl", "charts/kl_coef"):
            rows += [[event.step, what, event.value] for event in events.Scalars(what)]
    returns = events.Scalars("charts/episodic_return")
    thinned = returns[:: max(1, len(returns) // 50)]
    rows += [[event.step, "charts/episodic_return", event.value] for event in thinned]
    evaluation = events.Scalars("eval/episodic_return")[0]
    last = torch.load(folder / "checkpoint.pt", weights_only=True)["episode_returns"][-100:]
    rows += [[evaluation.step, "last 100 training episodes", sum(last) / len(last)]]
    rows += [[evaluation.step, "eval/episodic_return", evaluation.value]]
    return [[variant, task, seed, step, what, f"{value:.4g}"] for step, what, value in rows]


def main(options: Options) -> None:
    """Run what is missing from the results, one run after another."""
    for variant, task, seed, steps in JOBS:
        wanted = variant in options.variants and task in options.tasks and seed in options.seeds
        if wanted and (variant, task, str(seed)) not in rows_done():
            append(RESULTS, COLUMNS, run(variant, task, seed, steps))


if __name__ == "__main__":
    main(tyro.cli(Options))
