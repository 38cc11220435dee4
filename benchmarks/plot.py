"""Draw learning.csv, penalty.csv, rlhf.csv and rlhf_real.csv of results/ as PNG files and print their tables.

python benchmarks/plot.py
"""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Draw one panel per task and one line per seed; dots show the final evaluations."""
    with (RESULTS / "learning.csv").open() as file:
        learning = list(csv.DictReader(file))
    for script in dict.fromkeys(row["script"] for row in learning):
        draw(script, [row for row in learning if row["script"] == script])
    with (RESULTS / "penalty.csv").open() as file:
        rows = list(csv.DictReader(file))
    draw_controller([row for row in rows if row["variant"].startswith("target")])
    clip = [row | {"variant": "clip"} for row in learning if row["script"] == "ppo_continuous"]
    compare([row for row in rows if row["variant"] == "adaptive"], clip)
    with (RESULTS / "rlhf.csv").open() as file:
        draw_rlhf(list(csv.DictReader(file)))
    with (RESULTS / "rlhf_real.csv").open() as file:
        draw_real(list(csv.DictReader(file)))


def draw(script: str, rows: list[dict[str, str]]) -> None:
    """Write the picture of one script and print its table."""
    curves, evaluations = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    for row in rows:
        task, seed, point = row["task"], int(row["seed"]), (int(row["steps"]), float(row["value"]))
        if row["what"] == "charts/episodic_return":
            curves[task][seed].append(point)
        elif row["what"] == "eval/episodic_return":
            evaluations[task][seed] = point
    lines = 1 if len(curves) <= 2 else 2 if len(curves) <= 8 else 3
    columns = (len(curves) + lines - 1) // lines
    size = (3.5 * columns, 3 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, task in zip(panels.flat, curves, strict=False):
        for color, seed in enumerate(sorted(curves[task])):
            line = dict(color=f"C{color}", linewidth=1, label=f"seed {seed}")
            panel.plot(*zip(*curves[task][seed], strict=True), **line)
            panel.plot(*evaluations[task][seed], "o", color=f"C{color}")
        panel.set_title(task, fontsize=10)
        panel.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:.0f}k")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(curves) :]:
        panel.remove()
    panels.flat[0].legend(fontsize=7)
    figure.supxlabel("environment steps")
    figure.supylabel("return (line: training, dot: evaluation)")
    figure.savefig(RESULTS / f"learning_{script}.png", dpi=80)

    print(f"{script}\n| task | steps | evaluation of each seed (mean of 20 deterministic episodes) | worst |")
    print("|-|-|-|-|")
    for task, seeds in evaluations.items():
        values = [value for _, (_, value) in sorted(seeds.items())]
        small = 0 < max(map(abs, values)) < 10
        each = ", ".join(f"{value:.2f}" if small else str(round(value)) for value in values)
        worst = f"{min(values):.2f}" if small else round(min(values))
        print(f"| {task} | {next(iter(seeds.values()))[0]:,} | {each} | {worst} |")


def draw_controller(rows: list[dict[str, str]]) -> None:
    """Draw KL and coefficient over time for each target, and print how close the KL came to it."""
    curves = defaultdict(list)
    for row in rows:
        curves[row["variant"].split()[1], row["what"]].append((int(row["steps"]), float(row["value"])))
    figure, panels = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    print("| target | median KL after 20 iterations | ratio |\n|-|-|-|")
    for color, target in enumerate(dict.fromkeys(target for target, _ in curves)):
        line = dict(color=f"C{color}", linewidth=1, label=f"target {target}")
        panels[0].plot(*zip(*curves[target, "losses/kl"], strict=True), **line)
        panels[0].axhline(float(target), color=f"C{color}", linewidth=1, linestyle="dotted")
        panels[1].step(*zip(*curves[target, "charts/kl_coef"], strict=True), **line)
        median = statistics.median(kl for _, kl in curves[target, "losses/kl"][20:])
        print(f"| {target} | {median:.4f} | {median / float(target):.2f} |")
    for panel, label in zip(panels, ("KL(old, new), nats", "kl_coef"), strict=True):
        panel.set_yscale("log")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[1].xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:.0f}k")
    panels[1].set_xlabel("environment steps")
    panels[0].legend(fontsize=8)
    figure.savefig(RESULTS / "penalty_controller.png", dpi=80)


def compare(adaptive: list[dict[str, str]], clip: list[dict[str, str]]) -> None:
    """Print a table of tasks and variants: evaluations of all seeds, and the median."""
    runs = {(row["task"], row["steps"]) for row in adaptive}
    evaluations = defaultdict(lambda: defaultdict(list))
    for row in sorted(adaptive + clip, key=lambda row: int(row["seed"])):
        if row["what"] == "eval/episodic_return" and (row["task"], row["steps"]) in runs:  # of equal length
            evaluations[row["task"]][row["variant"]].append(float(row["value"]))
    variants = ("clip", "adaptive")
    print("| task | " + " | ".join(variants) + " |\n|-|" + "-|" * len(variants))
    for task, values in sorted(evaluations.items()):
        cells = []
        for returns in (values[variant] for variant in variants):
            each = ", ".join(f"{x:.0f}" for x in returns)
            cells.append(f"**{statistics.median(returns):.0f}** ({each})" if returns else "-")
        print(f"| {task} | " + " | ".join(cells) + " |")


def draw_rlhf(rows: list[dict[str, str]]) -> None:
    """Draw score, true reward and KL of each seed, and print a table of the evaluations."""
    curves, evaluations = defaultdict(list), defaultdict(dict)
    for row in rows:
        point = (int(row["step"]), float(row["value"]))
        if row["what"].startswith("rlhf/"):
            curves[row["what"], row["seed"]].append(point)
        else:
            evaluations[row["seed"]][row["what"].split("/")[1]] = point[1]
    labels = {"rlhf/score": "reward model's score", "rlhf/gold": "labeller's score", "rlhf/kl": "KL, nats"}
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
    for panel, (tag, label) in zip(panels, labels.items(), strict=True):
        for color, seed in enumerate(evaluations):
            line = dict(color=f"C{color}", linewidth=1, label=f"seed {seed}")
            panel.plot(*zip(*curves[tag, seed], strict=True), **line)
        panel.set_title(label, fontsize=10)
        panel.grid(alpha=0.3)
    panels[2].axhline(3, color="black", linewidth=1, linestyle="dotted")  # the target
    panels[0].legend(fontsize=7)
    figure.supxlabel("answers")
    figure.savefig(RESULTS / "rlhf.png", dpi=80)
    names = ("accuracy", "win_rate", "gold", "kl", "finished", "distinct")
    print("| seed | " + " | ".join(names) + " |\n|-|" + "-|" * len(names))
    for seed, values in evaluations.items():
        print(f"| {seed} | " + " | ".join(f"{values[name]:.3g}" for name in names) + " |")


def draw_real(rows: list[dict[str, str]]) -> None:
    """Draw reward and KL of each seed and job, and print the first and last tenth of each run."""
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    figure, panels = plt.subplots(
        len(jobs), 2, figsize=(7, 3 * len(jobs)), squeeze=False, layout="constrained"
    )
    print("| job | seed | reward, first tenth | reward, last tenth | KL |\n|-|-|-|-|-|")
    for line, job in zip(panels, jobs, strict=True):
        for seed in dict.fromkeys(row["seed"] for row in rows if row["job"] == job):
            run = [row for row in rows if (row["job"], row["seed"]) == (job, seed)]
            for panel, name in zip(line, ("reward", "kl"), strict=True):
                points = [(int(row["answers"]), float(row[name])) for row in run]
                panel.plot(*zip(*points, strict=True), linewidth=1, label=f"seed {seed}")
                panel.set_title(f"{job}: {name}", fontsize=10)
                panel.grid(alpha=0.3)
            tenth = max(1, len(run) // 10)
            means = [
                statistics.mean(float(row["reward"]) for row in part) for part in (run[:tenth], run[-tenth:])
            ]
            print(f"| {job} | {seed} | {means[0]:.2f} | {means[1]:.2f} | {float(run[-1]['kl']):.1f} |")
    panels[0][0].legend(fontsize=7)
    figure.supxlabel("answers")
    figure.savefig(RESULTS / "rlhf_real.png", dpi=80)


if __name__ == "__main__":
    main()
