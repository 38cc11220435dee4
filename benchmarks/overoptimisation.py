"""How far a learned reward can be trusted: the built-in job of ppo_rlhf_llm.py, whose labeller is known.

    python benchmarks/overoptimisation.py                  what is missing, then tables and picture

After Gao et al. 2022 (https://arxiv.org/abs/2210.10760): gold and learned reward against d, the square root
of the KL to the SFT model, for reward models that learned from few choices and from many. PPO goes there
under several penalties and under none; best-of-n takes of n answers of the SFT model the one that the reward
model likes best. Then variants of PPO that are held at one KL. All runs of a seed have the same SFT model.

A run has one thread, and there are as many at once as there are cores. One that was interrupted goes on from
its checkpoint in runs/overoptimisation; one that is in results/overoptimisation_*.csv is not repeated.
"""

import copy
import csv
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from common import RESULTS, ROOT, load

rlhf = load("ppo_rlhf_llm")

RUNS = ROOT / "runs" / "overoptimisation"
SEEDS, PAIRS = (1, 2, 3), (20, 200, 2500)
ANSWERS = 3200  # of a run
PROMPTS, SAMPLES = 48, 512  # best-of-n: held-out prompts, answers to each
NUMBERS = [2**k for k in range(9)]  # n
SAID = 10  # answers that are shown
PENALTIES = {
    # not the defaults' step size: at 2e-4 without a penalty the KL is beyond 10 nats in five iterations
    f"beta {beta:g}": dict(kl_coef=beta, kl_target=None, learning_rate=1e-4, anneal_lr=False)
    for beta in (0.0, 0.01, 0.03, 0.1)
}
NONE, BEST = "beta 0", "best of n"
SLOW = {"beta 0, a quarter of the step size": PENALTIES[NONE] | {"learning_rate": 2.5e-5}}
HELD = {  # at 3 nats, by the controller
    "as shipped": {},
    "the whole answer is one action": dict(action_level="sequence"),
    "KL in the loss": dict(kl_in="loss"),
    "dense reward": dict(dense_reward=True),
    "texts mixed in (ptx 0.1)": dict(ptx_coef=0.1),
}
VARIANTS = PENALTIES | SLOW | HELD
COLUMNS = {
    "curves": ["variant", "seed", "pairs", "answers", "kl", "score", "gold"],
    "best_of_n": ["seed", "pairs", "agreement", "n", "kl", "score", "gold", "deviation"],
    "says": ["pairs", "prompt", "sft", "ppo", "sft_score", "ppo_score", "sft_gold", "ppo_gold"],
}


# ------------------------------------------------------------------------------------------- the runs


def learn_rewards(seed: int) -> dict[str, list]:
    """Stage 1, then stage 2 from each number of pairs -> no rows, but a checkpoint for each."""
    if all((RUNS / f"reward-{seed}-{pairs}" / "checkpoint.pt").exists() for pairs in PAIRS):
        return {}
    found = {}
    writer = SimpleNamespace(log_dir=RUNS, add_scalar=lambda tag, value, step: found.update({tag: value}))
    args = rlhf.Args(seed=seed, total_episodes=ANSWERS)
    torch.manual_seed(rlhf.derive_seed(seed))
    models = rlhf.Models(args)
    data = rlhf.load_data(models)
    torch.manual_seed(rlhf.derive_seed(seed, 1))
    step = rlhf.fine_tune(models, data, writer)
    sft = copy.deepcopy(models.state_dict())
    for pairs in PAIRS:
        folder = RUNS / f"reward-{seed}-{pairs}"
        folder.mkdir(parents=True, exist_ok=True)
        models.load_state_dict(sft)
        # what is rare is seen more often; eight times are enough for it
        models.args = replace(args, num_pairs=pairs, reward_model_epochs=min(8, max(PAIRS) // pairs))
        torch.manual_seed(rlhf.derive_seed(seed, 2))
        end = rlhf.learn_reward(models, data, writer, step)
        (folder / "agreement").write_text(f"{found['reward_model/accuracy']:.4f}")
        rlhf.save_checkpoint(folder, models.args, models, None, [], stage=2, iteration=0, step=end)
    return {}


def load_run(folder, **options) -> tuple[rlhf.Args, rlhf.Models, dict]:
    """Arguments (with other options), models and checkpoint of a run."""
    args, checkpoint = replace(rlhf.load_args(folder), **options), rlhf.load_checkpoint(folder)
    models = rlhf.Models(args)
    models.load_state_dict(checkpoint["models"])
    return args, models, checkpoint


def optimise(variant: str, seed: int, pairs: int) -> dict[str, list]:
    """Stage 3 -> a row for each iteration, and what the policy says in the end."""
    folder = RUNS / f"{variant}-{seed}-{pairs}".replace(" ", "-")
    if not (folder / "checkpoint.pt").exists():
        options = VARIANTS[variant] | {"run_dir": str(folder)}
        args, models, checkpoint = load_run(RUNS / f"reward-{seed}-{pairs}", **options)
        models.kl_coef.fill_(args.kl_coef)
        folder.mkdir(exist_ok=True)
        rlhf.save_checkpoint(folder, args, models, None, [], 2, 0, checkpoint["step"])
    history = rlhf.train(replace(rlhf.load_args(folder), resume=str(folder)))
    curve = []
    for k, metrics in enumerate(history):
        numbers = [f"{metrics[f'rlhf/{name}']:.4g}" for name in ("kl", "score", "gold")]
        curve.append([variant, seed, pairs, (k + 1) * rlhf.Args.batch_size, *numbers])
    if (variant, seed) != (NONE, SEEDS[0]):
        return {"curves": curve}
    _, models, _ = load_run(folder)
    _, rows = rlhf.evaluate(models, rlhf.load_data(models))
    says = [[pairs, *row[:3], *(f"{x:.2f}" for x in row[3:])] for row in rows[:SAID]]
    return {"says": says, "curves": curve}


def best_of_n(seed: int) -> dict[str, list]:
    """Answers of the SFT model, and what each reward model would have chosen among n of them."""
    rows, answers, gold = [], [], []
    for pairs in PAIRS:
        folder = RUNS / f"reward-{seed}-{pairs}"
        _, models, _ = load_run(folder)
        if not answers:
            data = rlhf.load_data(models)
            torch.manual_seed(rlhf.derive_seed(seed, 4))
            for prompt in data.held_out_prompts[:PROMPTS]:
                for asked in rlhf.chunks([prompt] * SAMPLES, 128):
                    ids, attention, mask, _ = rlhf.generate(models, models.reference, asked)
                    answers.append((ids, attention, mask))
                    gold += [data.labeller(prompt, text) for text in rlhf.decode(models, ids, mask)]
        with torch.no_grad():
            scores = [rlhf.at_end(models.prefix_scores(i, a, m.shape[1]), m) for i, a, m in answers]
        scores, gold = (np.reshape(x, (-1, SAMPLES)) for x in (torch.cat(scores).numpy(), gold))
        agreement = (folder / "agreement").read_text()
        for n in NUMBERS:
            numbers = (best_of_n_kl(n), *expected_best(scores, gold, n), gold.std())
            rows.append([seed, pairs, agreement, n, *(f"{x:.4g}" for x in numbers)])
    return {"best_of_n": rows}


def best_of_n_kl(n: int) -> float:
    """KL(best of n, what is sampled) in nats, if no answer comes twice; else it is less."""
    return math.log(n) - (n - 1) / n


def expected_best(scores: np.ndarray, gold: np.ndarray, n: int) -> tuple[float, float]:
    """Expected score and gold of the answer with the highest score among n, without bias.

    scores, gold (prompts, M): the mean over all choices of n among the M answers to a prompt. The one with
    the k-th lowest score (from 0) is the best in C(k, n - 1) of these C(M, n).
    """
    size = scores.shape[1]
    chance = [math.comb(k, n - 1) / math.comb(size, n) for k in range(size)]
    order = scores.argsort(1)
    return tuple((np.take_along_axis(x, order, 1) * chance).sum(1).mean() for x in (scores, gold))


# ---------------------------------------------------------------------------------------- their results


def read(name: str) -> list[dict[str, str]]:
    """The rows of a table that are there."""
    path = RESULTS / f"overoptimisation_{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: list[list]) -> None:
    """Adds rows to a table."""
    path = RESULTS / f"overoptimisation_{name}.csv"
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows if file.tell() else [COLUMNS[name], *rows])


def missing() -> Iterator[list[tuple]]:
    """What is not in the tables, (function, *its arguments): first what the rest needs, then that."""
    done = {(row["variant"], int(row["seed"]), int(row["pairs"])) for row in read("curves")}
    wanted = [*itertools.product(PENALTIES, SEEDS, PAIRS), *itertools.product(SLOW | HELD, SEEDS, PAIRS[-1:])]
    jobs = [
        (best_of_n, seed) for seed in SEEDS if str(seed) not in {row["seed"] for row in read("best_of_n")}
    ]
    jobs += [(optimise, *key) for key in wanted if key not in done]
    if jobs:
        yield [(learn_rewards, seed) for seed in SEEDS]
        yield jobs


def quietly(function: Callable, *inputs) -> tuple[dict[str, list], str]:
    """Calls a function in a process of the pool -> what it gives, and how long it took."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        tables = function(*inputs)
    return tables, f"{function.__name__} {inputs}: {time.perf_counter() - started:.0f} s"


# ------------------------------------------------------------------------------------------ the report


FORMS = {"PPO": np.log, BEST: np.asarray}  # d (alpha - beta log d), d (alpha - beta d)


def points(way: str, pairs: int) -> list[np.ndarray]:
    """Of each seed KL, learned and gold, (rows, 3): a row for an iteration of PPO, or for a number n.

    Both rewards as gains over the SFT model, in its standard deviations (the reward models' own unit).
    """
    best, found = [row for row in read("best_of_n") if row["pairs"] == str(pairs)], []
    rows = best
    if way != BEST:
        rows = [row for row in read("curves") if (row["variant"], row["pairs"]) == (way, str(pairs))]
    for seed in map(str, SEEDS):
        sft = next(row for row in best if (row["seed"], row["n"]) == (seed, "1"))
        numbers = [[float(row[x]) for x in ("kl", "score", "gold")] for row in rows if row["seed"] == seed]
        gains = np.array(numbers) - (0.0, float(sft["score"]), float(sft["gold"]))
        found.append(gains / (1.0, 1.0, float(sft["deviation"])))
    return found


def fit(d: np.ndarray, gain: np.ndarray, form: Callable) -> tuple[float, float, float]:
    """Least squares of gain = d (alpha - beta form(d)) -> alpha, beta, root mean square of what is left."""
    columns = np.stack((d, -d * form(d)), 1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, gain)
    return alpha, beta, np.sqrt(np.mean((columns @ (alpha, beta) - gain) ** 2))


def fits(rows: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Both forms, fitted to the gold of points."""
    kl, _, gold = rows[rows[:, 0] > 0].T
    return {way: fit(np.sqrt(kl), gold, form) for way, form in FORMS.items()}


def smooth(x: np.ndarray, size: int = 5) -> np.ndarray:
    """Means of so many neighbouring rows."""
    return np.lib.stride_tricks.sliding_window_view(x, size, axis=0).mean(-1)


def ends(way: str, pairs: int) -> np.ndarray:
    """KL, learned and gold of each seed, means of the last ten iterations, (seeds, 3)."""
    return np.array([rows[-10:].mean(0) for rows in points(way, pairs)])


def highest(way: str, pairs: int) -> np.ndarray:
    """KL, learned and gold of each seed where its gold is highest, means of five iterations, (seeds, 3)."""
    return np.array([rows[rows[:, 2].argmax()] for rows in map(smooth, points(way, pairs))])


def table(title: str, columns: str, rows: list[list]) -> list[str]:
    """Lines of Markdown; of an array the numbers of its seeds are joined."""
    lines = ["", title, "", f"| {columns} |", "|-" * len(columns.split("|")) + "|"]
    for row in rows:
        cells = [
            ", ".join(f"{x:.2f}" for x in cell) if isinstance(cell, np.ndarray) else cell for cell in row
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report() -> list[str]:
    """The tables."""
    lines = [
        f"Gold and learned reward are gains over the SFT model, in its standard deviations. Seeds {SEEDS}."
    ]
    rows, best = [], read("best_of_n")
    for pairs in PAIRS:
        found = {row["seed"]: float(row["agreement"]) for row in best if row["pairs"] == str(pairs)}
        rows.append([f"{pairs:,}", ", ".join(f"{found[str(seed)]:.1%}" for seed in SEEDS)])
    lines += table("Reward models", "choices | agree with the labeller on 400 new ones", rows)

    rows = []
    for pairs, way in itertools.product(PAIRS, (BEST, *PENALTIES)):
        form, other = (BEST, "PPO") if way == BEST else ("PPO", BEST)
        alpha, beta, left = fits(np.concatenate(points(way, pairs)))[form]
        alone = [(found[form][2], found[other][2]) for found in map(fits, points(way, pairs))]
        rows.append([f"{pairs:,}", way, f"{alpha:.2f}", f"{beta:.2f}", f"{left:.2f}", *np.transpose(alone)])
    title = "Gold as d (alpha - beta d) for best of n, as d (alpha - beta log d) for PPO; what is left over "
    title += "(rms) of all seeds, of each seed fitted by itself, and of each seed by the other form"
    lines += table(title, "choices | way | alpha | beta | left over | each seed | other form", rows)

    rows = []
    for pairs, way in [*itertools.product(PAIRS, PENALTIES), *itertools.product(PAIRS[-1:], SLOW)]:
        kl, _, gold = highest(way, pairs).T
        rows.append([f"{pairs:,}", way, *ends(way, pairs).T, gold, kl])
    title = "PPO: the last ten iterations, and where gold was highest (mean of five iterations)"
    lines += table(title, "choices | way | KL | learned | gold | highest gold | at a KL of", rows)

    rows = [[way, *ends(way, PAIRS[-1]).T, f"{ends(way, PAIRS[-1])[:, 2].mean():.2f}"] for way in HELD]
    title = f"PPO held at 3 nats, {PAIRS[-1]:,} choices: the last ten iterations"
    lines += table(title, "way | KL | learned | gold | mean gold", rows)

    for pairs in PAIRS:
        said = [row for row in read("says") if row["pairs"] == str(pairs)][:SAID]
        names = ("prompt", "sft", "sft_score", "sft_gold", "ppo", "ppo_score", "ppo_gold")
        rows = [[" ".join(row[name].replace("|", "/").split()) for name in names] for row in said]
        title = (
            f"{NONE}, {pairs:,} choices, seed {SEEDS[0]}: first {SAID} held-out prompts; rewards, not gains"
        )
        lines += table(title, "prompt | SFT model | learned | gold | PPO | learned | gold", rows)
    return lines


def draw() -> None:
    """overoptimisation.png: a column for each reward model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        3, len(PAIRS), figsize=(11, 10), sharex="row", sharey="row", layout="constrained"
    )
    colors = {way: f"C{k}" for k, way in enumerate([*PENALTIES, BEST])}
    for (above, middle, below), pairs in zip(panels.T, PAIRS, strict=True):
        above.set_title(f"reward model from {pairs:,} choices", fontsize=10)
        for way, color in colors.items():
            for rows in points(way, pairs):
                kl, learned, gold = (rows if way == BEST else smooth(rows)).T
                wide = middle if way == BEST else above
                wide.plot(np.sqrt(kl), learned, ":", color=color, linewidth=1)
                wide.plot(np.sqrt(kl), gold, color=color, linewidth=1)
                below.plot(np.sqrt(kl), gold, color=color, linewidth=1)
        for panel, way, form in ((above, NONE, "PPO"), (middle, BEST, BEST)):
            alpha, beta, _ = fits(np.concatenate(points(way, pairs)))[form]
            d = np.linspace(0.01, math.sqrt(np.concatenate(points(way, pairs))[:, 0].max()), 200)
            panel.plot(d, d * (alpha - beta * FORMS[form](d)), color="black", linewidth=1, zorder=0)
        for panel in (above, middle, below):
            panel.grid(alpha=0.3)
    below.set(xlim=(0, 4), ylim=(-1, 1.8))
    names = [way if way == BEST else f"PPO, {way}" for way in colors]
    handles = [
        plt.Line2D([], [], color=colors[way], label=name) for way, name in zip(colors, names, strict=True)
    ]
    looks = {"gold": "-", "learned reward": ":"}
    handles += [plt.Line2D([], [], color="grey", linestyle=x, label=name) for name, x in looks.items()]
    handles.append(plt.Line2D([], [], color="black", label="fitted form"))
    figure.legend(handles=handles, loc="outside upper center", ncols=8, fontsize=8)
    for panel, label in zip(panels[:, 0], ("PPO", BEST, "gold of all, nearer"), strict=True):
        panel.set_ylabel(label)
    figure.supylabel("gain over the SFT model, in its standard deviations", fontsize=10)
    figure.supxlabel("d, the square root of the KL to the SFT model in nats", fontsize=10)
    figure.savefig(RESULTS / "overoptimisation.png", dpi=80)


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for jobs in missing():
            for future in as_completed([pool.submit(quietly, *job) for job in jobs]):
                tables, told = future.result()
                for name, rows in tables.items():
                    write(name, rows)
                print(told, flush=True)
    shutil.rmtree(RUNS)
    (RESULTS / "overoptimisation.md").write_text("\n".join(report()) + "\n")
    draw()


if __name__ == "__main__":
    main()
