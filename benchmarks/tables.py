"""Compute the tables of the documentation from benchmarks/results and write them into README.md and docs/.

    python benchmarks/tables.py

A table stands below a comment `<!-- table: NAME -->`; a test compares the pages with the results. Requires
requirements-extra.txt.
"""

import csv
import re
from statistics import mean, median

import numpy as np
import scipy.stats
from common import RESULTS, ROOT
from learning import MUJOCO, PAPER_TASKS, TABLE_1, read_runs

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLISHED = {  # scores of PPO in three libraries after a million steps; docs/results.md has the sources
    "HalfCheetah-v5": ("1,443", "5,819", "5,784"),
    "Hopper-v5": ("2,383", "2,410", "2,609"),
    "Walker2d-v5": ("2,288", "3,479", "3,589"),
    "Ant-v5": ("", "1,327", "3,258"),
    "Swimmer-v5": ("", "", "67"),
    "Reacher-v5": ("", "", "-4.1"),
    "InvertedPendulum-v5": ("963", "", "1,000"),
    "InvertedDoublePendulum-v5": ("", "", "9,231"),
    "Humanoid-v5": ("716", "", "787"),
    "Pusher-v5": ("-40", "", ""),
}
LONG = "gamma 0.9999, lambda 0.98"  # for Swimmer, beside the zoo, which also has a gamma of 0.9999
PAPER_SCORES = {  # Table 1 of the paper
    "no clipping or penalty": -0.39, "clipping 0.1": 0.76, "clipping 0.2": 0.82, "clipping 0.3": 0.70,
    "adaptive KL 0.003": 0.68, "adaptive KL 0.01": 0.74, "adaptive KL 0.03": 0.71, "fixed KL 0.3": 0.62,
    "fixed KL 1": 0.71, "fixed KL 3": 0.72, "fixed KL 10": 0.69,
}  # fmt: skip
RUNS = read_runs()


def table(header: str, rows: list[list]) -> str:
    """Format a table in Markdown."""
    columns = header.count("|") + 1
    lines = [
        f"| {header} |",
        "|" + "-|" * columns,
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def shown(value: float) -> str:
    """Format a return: a whole number, or two digits after the point if it is small."""
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:,.0f}"
    return "0" if float(text.replace(",", "")) == 0 else text


def column(variant: str, task: str, name: str) -> list[float]:
    """Return a column of learning.csv for the runs of a variant on a task, in the order of the seeds."""
    rows = [row for (v, t, _), row in sorted(RUNS.items()) if (v, t) == (variant, task)]
    return [float(row[name]) for row in rows if row[name]]


def tasks_of(*variants: str) -> list[str]:
    """Return the tasks that variants have runs of: small ones first, then MuJoCo."""
    found = {task for variant, task, _ in RUNS if variant in variants}
    return sorted(found, key=lambda task: (1 + MUJOCO.index(task) if task in MUJOCO else 0, task))


def evaluations(*variants: str) -> str:
    """Return the evaluation of each seed on each task."""
    rows = []
    for task in tasks_of(*variants):
        for variant in variants:
            if values := column(variant, task, "evaluation"):
                steps = column(variant, task, "steps")[0]
                rows.append([task, f"{steps:,.0f}", "; ".join(map(shown, values)), shown(min(values))])
    return table("task | steps | evaluation of each seed (mean of 20 deterministic episodes) | worst", rows)


def interquartile_mean(values: list[float]) -> str:
    """Format the interquartile mean with its 95 % bootstrap confidence interval (Agarwal et al. 2021)."""

    def middle_half(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return scipy.stats.trim_mean(values, 0.25, axis=axis)

    low, high = min(values), max(values)  # equal values have no interval
    if low < high:
        bootstrap = scipy.stats.bootstrap((values,), middle_half, rng=1, method="percentile")
        low, high = bootstrap.confidence_interval
    return f"{shown(middle_half(np.array(values)))} ({shown(low)} to {shown(high)})"


def beside_published() -> str:
    """Return median and worst seed of ppo_continuous on MuJoCo beside the scores of others."""
    rows = []
    for task, scores in PUBLISHED.items():
        if values := column("ppo_continuous", task, "evaluation"):
            name = task.removesuffix("-v5")
            rows.append([name, len(values), shown(median(values)), shown(min(values)), *scores])
    if values := column(LONG, "Swimmer-v5", "evaluation"):
        name = "Swimmer, `--gamma 0.9999 --gae-lambda 0.98`"
        cells = (len(values), shown(median(values)), shown(min(values)))
        rows.append([name, *cells, "", "282 (gamma 0.9999)", ""])
    return table("task | seeds | median | worst | CleanRL | stable-baselines3 | Tianshou", rows)


def mujoco() -> str:
    """Return all statistics of ppo_continuous on MuJoCo, and of Swimmer with other discounts."""
    keys = [("ppo_continuous", task) for task in tasks_of("ppo_continuous") if task in MUJOCO]
    longer = [(variant, "Swimmer-v5") for variant in ("gamma 0.9999", LONG)]
    rows = []
    for variant, task in keys + [key for key in longer if column(*key, "evaluation")]:
        values, training = (column(variant, task, x) for x in ("evaluation", "last_100_episodes"))
        cells = [shown(median(values)), interquartile_mean(values), shown(min(values)), shown(max(values))]
        name = task if variant == "ppo_continuous" else f"{task}, {variant}"
        rows.append([name, len(values), shown(mean(training)), *cells])
    header = (
        "task | seeds | last 100 episodes of training | median | interquartile mean (95 %) | worst | best"
    )
    return table(header, rows)


def side_by_side(variants: dict[str, str], tasks: list[str], name: str) -> str:
    """Return the mean of a column for several variants, and the worst seed in brackets."""
    rows = []
    for task in tasks:
        runs = [column(variant, task, name) for variant in variants]
        if sum(map(bool, runs)) > 1:
            cells = [f"{shown(mean(x))} ({shown(min(x))}, {len(x)})" if x else "" for x in runs]
            rows.append([task, *cells])
    return table(" | ".join(["task", *variants.values()]), rows)


def beside_sb3() -> str:
    """Return evaluations and seconds of training on MuJoCo beside stable-baselines3: mean (worst, seeds)."""
    rows = []
    for task in tasks_of("stable-baselines3"):
        if task in MUJOCO:
            runs = [(column(x, task, "evaluation"), column(x, task, "seconds")) for x in SB3]
            returns = [f"{shown(mean(x))} ({shown(min(x))}, {len(x)})" for x, _ in runs]
            rows.append([task, *returns, *(f"{mean(x):,.0f} ({max(x):,.0f})" for _, x in runs)])
    names = ("ppo_continuous", "stable-baselines3", "ppo_continuous, seconds", "stable-baselines3, seconds")
    return table(" | ".join(["task", *names]), rows)


def limits() -> str:
    """Return the evaluations of ppo_continuous beside those of an earlier version, for the same seeds."""
    rows = []
    for task in dict.fromkeys(row["task"] for row in read("same_limit")):
        keys = [key for key in RUNS if key[:2] == ("ppo_continuous", task)]
        before = {int(row["seed"]): row for row in read("same_limit") if row["task"] == task}
        pairs = [(RUNS[key], before[key[2]]) for key in sorted(keys) if key[2] in before]
        now, then = ([shown(float(pair[i]["evaluation"])) for pair in pairs] for i in (0, 1))
        rows.append([task, "; ".join(now), "; ".join(then)])
    return table("task | staggered time limits, seeds 1, 2, ... | the same time limit", rows)


def table_1() -> str:
    """Return our Table 1 beside the paper's: 0 is the random policy, 1 the best run of the task."""
    scores = {variant: {} for variant in TABLE_1}
    for task in PAPER_TASKS:
        returns = {variant: column(variant, task, "last_100_episodes") for variant in TABLE_1}
        zero = column("random", task, "last_100_episodes")
        if zero and all(returns.values()):
            best = max(max(values) for values in returns.values())
            for variant, values in returns.items():
                scores[variant][task] = [(x - mean(zero)) / (best - mean(zero)) for x in values]
    rows = []
    for variant, by_task in scores.items():
        means = [mean(values) for values in by_task.values()]
        ours = f"{mean(means):z.2f} ({min(min(values) for values in by_task.values()):z.2f})"
        rows.append([variant, f"{PAPER_SCORES[variant]:.2f}", ours, *(f"{x:z.2f}" for x in means)])
    seeds = {task: min(len(x[task]) for x in scores.values()) for task in scores["clipping 0.2"]}
    names = [f"{task.removesuffix('-v5')} ({count})" for task, count in seeds.items()]
    return table(" | ".join(["setting", "paper", "ours (worst run)", *names]), rows)


def controller() -> str:
    """Return how close the median KL of ppo_penalty comes to its target on HalfCheetah."""
    rows = []
    for target in (0.003, 0.01, 0.03):
        for (variant, task, seed), run in sorted(RUNS.items()):
            if (variant, task) == (f"adaptive KL {target}", "HalfCheetah-v5"):
                kls = [float(point.split(":")[1]) for point in run["controller"].split()]
                kl = median(kls[len(kls) // 10 :])
                rows.append([target, seed, f"{kl:.4f}", f"{kl / target:.2f}"])
    return table("target | seed | median KL after a tenth of the run | ratio", rows)


def seconds_to_solve(variant: str, task: str, bar: float) -> list[float]:
    """Return the seconds of training until the returns of training reach a bar, for each seed; inf: never.

    The curve has 50 blocks. The bar is reached where the mean of two neighbouring blocks reaches it.
    """
    seconds = []
    for (v, t, _), run in sorted(RUNS.items()):
        if (v, t) == (variant, task) and run["seconds"]:
            steps, returns = np.array([x.split(":") for x in run["curve"].split()], dtype=float).T
            reached = np.flatnonzero((returns[:-1] + returns[1:]) / 2 >= bar)
            solved = steps[reached[0] + 1] if len(reached) else np.inf
            seconds.append(float(run["seconds"]) * solved / float(run["steps"]))
    return seconds


def solve() -> str:
    """Return the seconds of training until a task is solved, for the scripts and stable-baselines3."""
    rows = []
    for task, script, bar in (("Pendulum-v1", "ppo_continuous", -200), ("CartPole-v1", "ppo_discrete", 475)):
        times = [seconds_to_solve(variant, task, bar) for variant in (script, "stable-baselines3")]
        if all(times):
            rows.append([f"{task}, {bar}", *(f"{median(x):.1f} ({max(x):.1f}, {len(x)})" for x in times)])
    return table("task and return | default options | stable-baselines3, settings of its zoo", rows)


def files() -> str:
    """Return the four scripts with their results on the default task."""
    rows = []
    for script, variant, task, bar in (
        ("ppo_continuous", "clip, Box actions", "Pendulum-v1", -200),
        ("ppo_discrete", "clip, discrete actions", "CartPole-v1", 475),
        ("ppo_penalty", "adaptive KL penalty", "Pendulum-v1", -200),
    ):
        values = column(script, task, "evaluation")
        result = f"{task}: {shown(median(values))}, worst {shown(min(values))} ({len(values)})"
        times = [seconds_to_solve(name, task, bar) for name in (script, "stable-baselines3")]
        rows.append([script, variant, result, *(f"{median(x):.1f} s" if x else "" for x in times)])
    wins = [100 * float(row["value"]) for row in read("rlhf") if row["what"] == "eval/win_rate"]
    result = f"beats SFT: {median(wins):.0f} %, worst {min(wins):.0f} % ({len(wins)})"
    rows.append(["ppo_rlhf_llm", "RLHF", result, "", ""])
    rows = [[f"[{script}.py]({script}.py)", *cells] for script, *cells in rows]
    return table("file | variant | default task: median (seeds) | solved in | stable-baselines3", rows)


def read(name: str) -> list[dict[str, str]]:
    """Read the rows of results/NAME.csv."""
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def rates(job: str, variant: str, name: str = "rate") -> list[float]:
    """Return a column of speed.csv, one number for each turn."""
    return [float(row[name]) for row in read("speed") if (row["job"], row["variant"]) == (job, variant)]


def ratio(job: str, above: str, below: str) -> str:
    """Format the ratio of the rates of two variants: the median over the turns, and the range."""
    each = [a / b for a, b in zip(rates(job, above), rates(job, below), strict=True)]
    return f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def speed() -> str:
    """Return the steps per second of the control scripts beside stable-baselines3."""
    variants, rows = ("eager", "--compile", "stable-baselines3", "environment alone"), []
    for job in ("HalfCheetah-v5", "CartPole-v1"):
        cells = [f"{median(rates(job, variant)):,.0f}" for variant in variants]
        rows.append([job, *cells, *(ratio(job, x, "stable-baselines3") for x in variants[:2])])
    return table(" | ".join(["steps per second", *variants, "eager, ratio", "--compile, ratio"]), rows)


def rlhf_speed() -> str:
    """Return answers per second and memory of RLHF beside TRL."""
    rows = []
    for variant, name in (("eager", "ppo_rlhf_llm.py"), ("TRL", "TRL 1.12.0")):
        memory = max(rates("RLHF", variant, "mebibytes"))
        compared = ratio("RLHF", variant, "TRL") if variant != "TRL" else ""
        rows.append([name, f"{median(rates('RLHF', variant)):.1f}", f"{memory:,.0f}", compared])
    return table(" | answers per second | peak memory, MiB | times as fast as TRL", rows)


def growth() -> str:
    """Return the median rates of the jobs that grow in one dimension."""
    rows = []
    jobs = ("environments", "Humanoid-v5")
    for job in jobs:
        variants = dict.fromkeys(row["variant"] for row in read("speed") if row["job"] == job)
        cells = (f"{variant}: {median(rates(job, variant)):,.4g}" for variant in variants)
        rows.append([job, ", ".join(cells)])
    return table("what changes | steps per second", rows)


def memory() -> str:
    """Return the peak memory of a run of RLHF with a model of transformers."""
    imports, rows = median(rates("memory", "imports", "mebibytes")), []
    for variant in ("all weights", "--lora-rank 16"):
        peak = median(rates("memory", variant, "mebibytes"))
        rows.append([variant, f"{peak:,.0f}", f"{peak - imports:,.0f}"])
    return table("what is trained | peak memory, MiB | above the imports, MiB", rows)


def built_in() -> str:
    """Return the evaluation of each seed of the built-in job of RLHF."""
    values = {}
    for row in read("rlhf"):
        if not row["what"].startswith("rlhf/"):
            values.setdefault(row["seed"], {})[row["what"].split("/")[1]] = float(row["value"])
    names = ("accuracy", "win_rate", "gold", "kl", "finished", "distinct")
    rows = [[seed, *(f"{found[name]:.3g}" for name in names)] for seed, found in values.items()]
    return table("seed | reward model's accuracy | win rate | gold | KL, nats | finished | distinct", rows)


def reward_functions() -> str:
    """Return the first and the last tenth of the rewards of each run with a reward function."""
    runs = {}
    for row in read("rlhf_real"):
        runs.setdefault((row["job"], row["seed"]), []).append((float(row["reward"]), float(row["kl"])))
    rows = []
    for (job, seed), points in runs.items():
        tenth = max(1, len(points) // 10)
        first, last = (mean(reward for reward, _ in part) for part in (points[:tenth], points[-tenth:]))
        held_out = [
            mean(
                float(row[name])
                for row in read("rlhf_real_answers")
                if (row["job"], row["seed"]) == (job, seed)
            )
            for name in ("reward", "new_reward")
        ]
        cells = [f"{x:.2f} to {y:.2f}" for x, y in ((first, last), held_out)]
        rows.append([job, seed, *cells, f"{points[-1][1]:.1f}"])
    return table("job | seed | reward, first to last tenth | held-out prompts | KL, nats per answer", rows)


def answers() -> str:
    """Return the first ten held-out requests of sentiment in alphabetical order, seed 1, before and after."""
    rows = []
    for row in read("rlhf_real_answers"):
        if (row["job"], row["seed"]) == ("sentiment", "1"):
            request = row["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            cells = (request, row["before"], row["reward"], row["after"], row["new_reward"])
            rows.append([" ".join(cell.split()) for cell in cells])
    rows = [[*row[:2], f"{float(row[2]):.2f}", row[3], f"{float(row[4]):.2f}"] for row in sorted(rows)[:10]]
    return table("request | before PPO | reward | after PPO | reward", rows)


def faults() -> str:
    """Return how often each script survived each fault."""
    scripts = ("ppo_discrete", "ppo_continuous", "ppo_penalty", "ppo_rlhf_llm")
    survived = {(row["fault"], row["script"]): row["survived"] for row in read("faults")}
    rows = [
        [fault, *(survived.get((fault, x), "") for x in scripts)]
        for fault in dict.fromkeys(f for f, _ in survived)
    ]
    return table("fault | " + " | ".join(scripts), rows)


PEERS = {"ppo_continuous": "ppo_continuous", "ppo_penalty": "ppo_penalty", "TRPO": "TRPO"}
PEERS |= {name: name for name in ("policy gradient", "unclipped surrogate")}
CLIP = {"ppo_penalty": "ppo_penalty", "ppo_continuous": "ppo_continuous"}
CLIP |= {"clip, options of ppo_penalty": "ppo_continuous, options of ppo_penalty"}
SB3 = {name: name for name in ("ppo_continuous", "stable-baselines3")}
TABLES = {
    "files": files,
    "continuous": lambda: evaluations("ppo_continuous"),
    "discrete": lambda: evaluations("ppo_discrete", "Atari, short"),
    "penalty": lambda: evaluations("ppo_penalty"),
    "beside published": beside_published,
    "mujoco": mujoco,
    "limits": limits,
    "penalty and clip": lambda: side_by_side(CLIP, MUJOCO, "evaluation"),
    "table 1": table_1,
    "ancestors": lambda: side_by_side(PEERS, PAPER_TASKS, "last_100_episodes"),
    "stable-baselines3": beside_sb3,
    "controller": controller,
    "solve": solve,
    "speed": speed,
    "rlhf speed": rlhf_speed,
    "growth": growth,
    "memory": memory,
    "built-in": built_in,
    "reward functions": reward_functions,
    "answers": answers,
    "faults": faults,
}
MARK = re.compile(r"(<!-- table: (.*?) -->\n)((?:\|.*\n)*)")


def main() -> None:
    """Write the tables into the pages."""
    for page in PAGES:
        page.write_text(MARK.sub(lambda match: match[1] + TABLES[match[2]](), page.read_text()))


if __name__ == "__main__":
    main()
