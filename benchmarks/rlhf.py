"""Train ppo_rlhf_llm.py on its built-in task with the default options and several seeds.

    python benchmarks/rlhf.py                              all seeds; continues if interrupted
    python benchmarks/plot.py                              draw benchmarks/results/rlhf.csv

Unfinished runs are kept in runs/rlhf. One seed takes about three minutes on two cores.
"""

import csv
from dataclasses import dataclass, field

import tyro
from learning import ROOT, append, finish

RESULTS = ROOT / "benchmarks" / "results" / "rlhf.csv"
COLUMNS = ["seed", "step", "what", "value"]
TAGS = ["reward_model/accuracy", "rlhf/score", "rlhf/gold", "rlhf/kl"]


@dataclass
class Options:
    """Options of this benchmark."""

    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4])


def main(options: Options) -> None:
    """Run what is missing from the results, one run after another."""
    for seed in options.seeds:
        if RESULTS.exists():
            with RESULTS.open() as file:
                if str(seed) in {row["seed"] for row in csv.DictReader(file)}:
                    continue
        events = finish("ppo_rlhf_llm", ROOT / "runs" / "rlhf" / str(seed), ["--seed", str(seed)])
        first = events.Scalars("reward_model/accuracy")[0].step  # stage 3 begins
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
        points = [(tag, event) for tag in TAGS + tags for event in events.Scalars(tag)]
        append(RESULTS, COLUMNS, [[seed, x.step - first, tag, f"{x.value:.4g}"] for tag, x in points])


if __name__ == "__main__":
    main(tyro.cli(Options))
