"""Draw the pictures of the documentation from the CSV files of benchmarks/results.

    python benchmarks/plot.py

Requires requirements-extra.txt.
"""

import csv
import statistics
from collections import defaultdict

import matplotlib
import numpy as np
from common import RESULTS
from learning import PAPER_TASKS, read_runs
from tables import PEERS, SB3, rates, tasks_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Draw all pictures whose results are there."""
    runs = read_runs()
    names = {variant for variant, _, _ in runs}
    for script in ("ppo_continuous", "ppo_discrete", "ppo_penalty"):
        draw(runs, {script: script}, tasks_of(script), f"learning_{script}")
    if "TRPO" in names:
        draw(runs, PEERS, PAPER_TASKS, "ancestors")
        draw(runs, PEERS, PAPER_TASKS, "ancestors_seconds", seconds=True)
    if "stable-baselines3" in names:
        tasks = [task for task in tasks_of("stable-baselines3") if task in tasks_of("ppo_continuous")]
        draw(runs, SB3, tasks, "stable_baselines3", seconds=True)
    if all((f"adaptive KL {x}", "HalfCheetah-v5", 1) in runs for x in (0.003, 0.01, 0.03)):
        draw_controller(runs)
    if (RESULTS / "speed.csv").exists():
        draw_speed()
    with (RESULTS / "rlhf.csv").open() as file:
        draw_rlhf(list(csv.DictReader(file)))
    with (RESULTS / "rlhf_real.csv").open() as file:
        draw_real(list(csv.DictReader(file)))


def of(runs: dict, variant: str, task: str) -> dict[int, dict[str, str]]:
    """Return the runs of a variant on a task by seed."""
    return {seed: row for (v, t, seed), row in sorted(runs.items()) if (v, t) == (variant, task)}


def draw(runs: dict, variants: dict[str, str], tasks: list[str], name: str, seconds: bool = False) -> None:
    """Draw one panel per task: training returns of each seed, thin, and their mean over the seeds."""
    present = {variant for variant, task, _ in runs if task in tasks}
    variants = {variant: label for variant, label in variants.items() if variant in present}
    lines = 1 if len(tasks) <= 2 else 2 if len(tasks) <= 8 else 3
    columns = (len(tasks) + lines - 1) // lines
    size = (3.3 * columns, 2.8 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, task in zip(panels.flat, tasks, strict=False):
        for color, (variant, label) in enumerate(variants.items()):
            curves = []
            for row in of(runs, variant, task).values():
                steps, returns = np.array([x.split(":") for x in row["curve"].split()], dtype=float).T
                scale = float(row["seconds"]) / float(row["steps"]) if seconds else 1
                curves.append((steps * scale, returns))
                panel.plot(*curves[-1], color=f"C{color}", linewidth=0.6, alpha=0.35)
            if curves:
                end = min(x[-1] for x, _ in curves)
                grid = np.linspace(max(x[0] for x, _ in curves), end, 60)
                mean = np.mean([np.interp(grid, *curve) for curve in curves], 0)
                panel.plot(grid, mean, color=f"C{color}", linewidth=1.8, label=label)
        panel.set_title(f"{task}", fontsize=10)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}" if seconds else f"{x / 1000:.0f}k")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(tasks) :]:
        panel.remove()
    if len(variants) > 1:
        panels.flat[0].legend(fontsize=7)
    figure.supxlabel("seconds of training" if seconds else "environment steps")
    figure.supylabel("return of training episodes")
    figure.savefig(RESULTS / f"{name}.png", dpi=80)
    plt.close(figure)


def draw_controller(runs: dict) -> None:
    """Draw KL and coefficient over time for each target, on HalfCheetah, seed 1."""
    figure, panels = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for color, target in enumerate((0.003, 0.01, 0.03)):
        run = runs[f"adaptive KL {target}", "HalfCheetah-v5", 1]
        points = np.array([x.split(":") for x in run["controller"].split()], dtype=float)
        line = dict(color=f"C{color}", linewidth=1, label=f"target {target}")
        panels[0].plot(points[:, 0], points[:, 1], **line)
        panels[0].axhline(target, color=f"C{color}", linewidth=1, linestyle="dotted")
        panels[1].step(points[:, 0], points[:, 2], **line)
    for panel, label in zip(panels, ("KL(old, new), nats", "kl_coef"), strict=True):
        panel.set_yscale("log")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[1].xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:.0f}k")
    panels[1].set_xlabel("environment steps")
    panels[0].legend(fontsize=8)
    figure.savefig(RESULTS / "penalty_controller.png", dpi=80)


def draw_speed() -> None:
    """Draw the rates of the scripts and their peers: a bar for the median, a dot for each turn."""
    jobs = {
        "HalfCheetah-v5": ("eager", "--compile", "stable-baselines3"),
        "CartPole-v1": ("eager", "--compile", "stable-baselines3"),
        "RLHF": ("eager", "TRL"),
    }
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for panel, (job, variants) in zip(panels, jobs.items(), strict=True):
        for place, variant in enumerate(variants):
            each, label = rates(job, variant), variant.replace("-b", "-\nb")
            panel.bar(label, statistics.median(each), color=f"C{place}", alpha=0.4)
            panel.plot([label] * len(each), each, "o", color=f"C{place}", markersize=4)
        panel.set_title(f"{job}, {'answers' if job == 'RLHF' else 'steps'} per second", fontsize=10)
    figure.savefig(RESULTS / "speed.png", dpi=80)


def draw_rlhf(rows: list[dict[str, str]]) -> None:
    """Draw score, true reward and KL of each seed, of the built-in job."""
    curves = defaultdict(list)
    for row in rows:
        point = (int(row["step"]), float(row["value"]))
        if row["what"].startswith("rlhf/"):
            curves[row["what"], row["seed"]].append(point)
    labels = {"rlhf/score": "reward model's score", "rlhf/gold": "labeller's score", "rlhf/kl": "KL, nats"}
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
    for panel, (tag, label) in zip(panels, labels.items(), strict=True):
        for color, seed in enumerate(dict.fromkeys(seed for _, seed in curves)):
            line = dict(color=f"C{color}", linewidth=1, label=f"seed {seed}")
            panel.plot(*zip(*curves[tag, seed], strict=True), **line)
        panel.set_title(label, fontsize=10)
        panel.grid(alpha=0.3)
    panels[2].axhline(3, color="black", linewidth=1, linestyle="dotted")  # the target
    panels[0].legend(fontsize=7)
    figure.supxlabel("answers")
    figure.savefig(RESULTS / "rlhf.png", dpi=80)


def draw_real(rows: list[dict[str, str]]) -> None:
    """Draw reward and KL of each seed and job."""
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    figure, panels = plt.subplots(
        len(jobs), 2, figsize=(7, 3 * len(jobs)), squeeze=False, layout="constrained"
    )
    for line, job in zip(panels, jobs, strict=True):
        for seed in dict.fromkeys(row["seed"] for row in rows if row["job"] == job):
            run = [row for row in rows if (row["job"], row["seed"]) == (job, seed)]
            for panel, name in zip(line, ("reward", "kl"), strict=True):
                points = [(int(row["answers"]), float(row[name])) for row in run]
                panel.plot(*zip(*points, strict=True), linewidth=1, label=f"seed {seed}")
                panel.set_title(f"{job}: {name}", fontsize=10)
                panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    figure.supxlabel("answers")
    figure.savefig(RESULTS / "rlhf_real.png", dpi=80)


if __name__ == "__main__":
    main()
