"""Draws results/learning.csv into results/learning_SCRIPT.png and prints the tables for README.md.

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
    """For each script one panel a task, one line a seed, a dot where the final evaluation came out."""
    with (RESULTS / "learning.csv").open() as file:
        rows = list(csv.DictReader(file))
    for script in dict.fromkeys(row["script"] for row in rows):
        draw(script, [row for row in rows if row["script"] == script])


def draw(script: str, rows: list[dict[str, str]]) -> None:
    """Writes the picture of one script and prints its table."""
    curves, evaluations = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    for row in rows:
        task, seed, point = row["task"], int(row["seed"]), (int(row["steps"]), float(row["value"]))
        if row["what"] == "charts/episodic_return":
            curves[task][seed].append(point)
        elif row["what"] == "eval/episodic_return":
            evaluations[task][seed] = point
    columns = (len(curves) + 1) // 2
    figure, panels = plt.subplots(2, columns, figsize=(3.5 * columns, 6), layout="constrained")
    for panel, task in zip(panels.flat, curves, strict=False):
        for color, seed in enumerate(sorted(curves[task])):
            line = dict(color=f"C{color}", linewidth=1, label=f"seed {seed}")
            panel.plot(*zip(*curves[task][seed], strict=True), **line)
            panel.plot(*evaluations[task][seed], "o", color=f"C{color}")
        panel.set_title(task, fontsize=10)
        panel.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:.0f}k")
        panel.grid(alpha=0.3)
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


if __name__ == "__main__":
    main()
