"""Draws results/learning.csv into results/learning.png and prints the table for README.md.

python benchmarks/plot.py
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """One panel for each task, one line for each seed, a dot where the final evaluation came out."""
    curves, evaluations = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    with (RESULTS / "learning.csv").open() as file:
        for row in csv.DictReader(file):
            task, seed, point = row["task"], int(row["seed"]), (int(row["steps"]), float(row["value"]))
            if row["what"] == "charts/episodic_return":
                curves[task][seed].append(point)
            elif row["what"] == "eval/episodic_return":
                evaluations[task][seed] = point
    figure, panels = plt.subplots(2, (len(curves) + 1) // 2, figsize=(14, 6), layout="constrained")
    for panel, task in zip(panels.flat, curves, strict=False):
        for color, seed in enumerate(sorted(curves[task])):
            panel.plot(
                *zip(*curves[task][seed], strict=True), color=f"C{color}", linewidth=1, label=f"seed {seed}"
            )
            panel.plot(*evaluations[task][seed], "o", color=f"C{color}")
        panel.set_title(task, fontsize=10)
        panel.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:.0f}k")
        panel.grid(alpha=0.3)
    panels.flat[0].legend(fontsize=7)
    figure.supxlabel("environment steps")
    figure.supylabel("return (line: training, dot: evaluation)")
    figure.savefig(RESULTS / "learning.png", dpi=80)

    print("| task | steps | evaluation of each seed (mean of 20 deterministic episodes) | worst |\n|-|-|-|-|")
    for task, seeds in evaluations.items():
        values = [value for _, (_, value) in sorted(seeds.items())]
        each = ", ".join(str(round(value)) for value in values)
        print(f"| {task} | {next(iter(seeds.values()))[0]:,} | {each} | {round(min(values))} |")


if __name__ == "__main__":
    main()
