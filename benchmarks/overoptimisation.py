"""Measure reward over-optimisation on the built-in task of ppo_rlhf_llm.py, whose true reward is known.

    python benchmarks/overoptimisation.py                  run what is missing, then write tables and picture
    python benchmarks/overoptimisation.py --seeds 1 --variants "beta 0" "beta 0.1"
    python benchmarks/overoptimisation.py --quick          only write tables and picture

After Gao et al. 2022 (https://arxiv.org/abs/2210.10760): true ("gold") and learned reward against d, the
square root of the KL to the SFT model, for reward models trained on few and on many comparisons. PPO runs
with several KL penalties and with none. Best-of-n selects, among n responses of the SFT model, the one with
the highest learned reward. Then variants of PPO are compared at the same KL. All runs of a seed share one SFT
model.

Each run uses one thread, with one run per core. Interrupted runs resume from runs/overoptimisation; runs in
results/overoptimisation_*.csv are not repeated. After changing this file delete both.
"""

import copy
import csv
import itertools
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, load
from tqdm import tqdm

rlhf = load("ppo_rlhf_llm")

RUNS = ROOT / "runs" / "overoptimisation"
SEEDS, PAIRS = (1, 2, 3), (20, 200, 2500)
ANSWERS = 3200  # responses per run
SFT_ANSWERS = 2048  # responses of the SFT model: the baseline of PPO's gains
PROMPTS, SAMPLES = 48, 512  # best-of-n: number of prompts, responses per prompt
NUMBERS = [2**k for k in range(9)]  # n
SAID = 10  # number of example responses
PENALTIES = {
    # smaller than the default 2e-4, which without a penalty exceeds 10 nats in five iterations
    f"beta {beta:g}": dict(kl_coef=max(beta, 1e-9), kl_target=None, learning_rate=1e-4, anneal_lr=False)
    for beta in (0.0, 0.01, 0.03, 0.1)  # 1e-9: with 0 the KL is not computed
}
NO_PENALTY, BEST = "beta 0", "best of n"
SLOW = {"beta 0, a quarter of the step size": PENALTIES[NO_PENALTY] | {"learning_rate": 2.5e-5}}
HELD = {  # held at 3 nats by the controller
    "defaults": {},
    "the whole answer is one action": dict(action_level="sequence"),
    "KL in the loss": dict(kl_in="loss"),
    "dense reward": dict(dense_reward=True),
    "texts mixed in (ptx 0.1)": dict(ptx_coef=0.1),
}
VARIANTS = PENALTIES | SLOW | HELD
COLUMNS = {
    "sft": ["seed", "pairs", "agreement", "score", "gold", "gold_deviation"],
    "best_of_n": ["seed", "pairs", "n", "kl", "score", "gold"],
    "curves": ["variant", "seed", "pairs", "iteration", "kl", "score", "gold"],
    "says": ["pairs", "prompt", "sft", "ppo", "sft_score", "ppo_score", "sft_gold", "ppo_gold"],
}


# ------------------------------------------------------------------------------------------- the runs


def learn_rewards(seed: int) -> dict[str, list]:
    """Run stage 1, then stage 2 for each number of pairs; write a checkpoint for each and return no rows."""
    if all((RUNS / f"reward-{seed}-{pairs}" / "checkpoint.pt").exists() for pairs in PAIRS):
        return {}
    found = {}
    writer = SimpleNamespace(add_scalar=lambda tag, value, step: found.update({tag: value}))
    args = rlhf.Args(seed=seed, total_episodes=ANSWERS, eval_prompts=SAID, checkpoint_every=10)
    torch.manual_seed(rlhf.derive_seed(seed))
    models = rlhf.Models(args)
    data = rlhf.load_data(models)
    torch.manual_seed(rlhf.derive_seed(seed, 1))
    step = rlhf.fine_tune(models, data, writer, 0)
    sft = copy.deepcopy(models.state_dict())
    for pairs in PAIRS:
        folder = RUNS / f"reward-{seed}-{pairs}"
        folder.mkdir(parents=True, exist_ok=True)
        models.load_state_dict(sft)
        # more epochs for fewer pairs, so that all reward models see about the same number in total
        models.args = replace(args, num_pairs=pairs, reward_model_epochs=max(PAIRS) // pairs)
        torch.manual_seed(rlhf.derive_seed(seed, 2))
        end = rlhf.learn_reward(models, data, writer, step)
        (folder / "agreement").write_text(f"{found['reward_model/accuracy']:.4f}")
        save(folder, models.args, models, end)
    return {}


def load_run(folder, **options) -> tuple[rlhf.Args, rlhf.Models, dict]:
    """Return arguments (with some options replaced), models and checkpoint of a run."""
    checkpoint = rlhf.load_checkpoint(folder)
    args = rlhf.Args(**checkpoint["args"] | options)
    models = rlhf.Models(args)
    models.load_state_dict(checkpoint["models"] | rlhf.load_checkpoint(folder / "frozen")["models"])
    return args, models, checkpoint


def save(folder, args, models, step) -> None:
    """Write a checkpoint at the beginning of stage 3."""
    writer = SimpleNamespace(flush=lambda: None)
    rlhf.save_checkpoint(folder, args, models, writer, [], None, None, 2, 0, step)


def optimise(variant: str, seed: int, pairs: int) -> dict[str, list]:
    """Run stage 3 and return a row for each iteration, and final example responses."""
    folder = RUNS / f"{variant}-{seed}-{pairs}".replace(" ", "-")
    if not (folder / "checkpoint.pt").exists():
        options = VARIANTS[variant] | {"run_dir": str(folder)}
        args, models, checkpoint = load_run(RUNS / f"reward-{seed}-{pairs}", **options)
        models.kl_coef.fill_(args.kl_coef)
        folder.mkdir(exist_ok=True)
        save(folder, args, models, checkpoint["step"])
    history = rlhf.train(replace(rlhf.Args(**rlhf.load_checkpoint(folder)["args"]), resume=str(folder)))
    curve = []
    for k, metrics in enumerate(history):
        numbers = [f"{metrics[f'rlhf/{name}']:.4g}" for name in ("kl", "score", "gold")]
        curve.append([variant, seed, pairs, k, *numbers])
    if (variant, seed) != (NO_PENALTY, SEEDS[0]):  # example responses of one run are enough
        return {"curves": curve}
    _, models, _ = load_run(folder)
    data = rlhf.load_data(models)
    prompts, columns = data.held_out_prompts[:SAID], []
    torch.manual_seed(rlhf.derive_seed(seed, 5))
    for model in (models.reference, models.actor):
        answers, _ = rlhf.generate(models, model, prompts)
        texts, scores = rlhf.decode(models, answers), rlhf.score(models, prompts, answers)
        gold = [data.labeller(prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]
        columns.append((texts, rlhf.at_end(scores, answers.mask).tolist(), gold))
    says = []
    for i, prompt in enumerate(prompts):
        texts = [column[0][i] for column in columns]
        says.append(
            [pairs, prompt.text, *texts, *(f"{column[k][i]:.2f}" for k in (1, 2) for column in columns)]
        )
    return {"says": says, "curves": curve}


def best_of_n(seed: int) -> dict[str, list]:
    """Sample responses of the SFT model and compute best-of-n for each reward model.

    Also score one response to each training prompt: the baseline of PPO's gains.
    """
    rows, sft_rows, answers, gold = [], [], [], []
    for pairs in PAIRS:
        folder = RUNS / f"reward-{seed}-{pairs}"
        _, models, _ = load_run(folder)
        if not answers:
            data = rlhf.load_data(models)
            torch.manual_seed(rlhf.derive_seed(seed, 4))
            prompts = [data.prompts[i] for i in torch.randint(len(data.prompts), (SFT_ANSWERS,)).tolist()]
            prompts += [prompt for prompt in data.held_out_prompts[:PROMPTS] for _ in range(SAMPLES)]
            for asked in rlhf.chunks(prompts, 128):
                said, _ = rlhf.generate(models, models.reference, asked)
                answers.append((asked, said))
                texts = rlhf.decode(models, said)
                gold += [data.labeller(x.text, text) for x, text in zip(asked, texts, strict=True)]
            gold = np.array(gold)
        with torch.no_grad():
            scores = [rlhf.at_end(rlhf.score(models, *part), part[1].mask) for part in answers]
        sft, many = np.split(np.stack((torch.cat(scores).numpy(), gold)), [SFT_ANSWERS], axis=1)
        numbers = (*sft.mean(1), sft[1].std())
        agreement = (folder / "agreement").read_text()
        sft_rows.append([seed, pairs, agreement, *(f"{x:.4g}" for x in numbers)])
        for n in NUMBERS:
            numbers = (best_of_n_kl(n), *expected_best(*many.reshape(2, PROMPTS, SAMPLES), n))
            rows.append([seed, pairs, n, *(f"{x:.4g}" for x in numbers)])
    return {"sft": sft_rows, "best_of_n": rows}


def best_of_n_kl(n: int) -> float:
    """Return KL(best of n, SFT model) in nats, an upper bound if responses repeat."""
    return math.log(n) - (n - 1) / n


def expected_best(scores: np.ndarray, gold: np.ndarray, n: int) -> tuple[float, float]:
    """Return unbiased estimates of learned and gold reward of the response with the highest score among n.

    scores and gold (prompts, M): the mean over all subsets of n among the M responses to a prompt. The
    response with the k-th lowest score (from 0) is the best in C(k, n - 1) of the C(M, n) subsets.
    """
    size = scores.shape[1]
    chance = [math.comb(k, n - 1) / math.comb(size, n) for k in range(size)]
    order = scores.argsort(1)
    return tuple((np.take_along_axis(x, order, 1) * chance).sum(1).mean() for x in (scores, gold))


# ---------------------------------------------------------------------------------------- their results


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a table."""
    path = RESULTS / f"overoptimisation_{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: list[list]) -> None:
    """Append rows to a table."""
    path = RESULTS / f"overoptimisation_{name}.csv"
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows if file.tell() else [COLUMNS[name], *rows])


@dataclass
class Options:
    """Options of this benchmark."""

    seeds: list[int] = field(default_factory=lambda: list(SEEDS))
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    quick: bool = False
    """train nothing; write tables and picture from the results"""


def missing(options: Options) -> Iterator[list[tuple]]:
    """Yield (function, *arguments) of the runs missing from the tables; runs come after those they need."""
    done = {(row["variant"], int(row["seed"]), int(row["pairs"])) for row in read("curves")}
    wanted = [*itertools.product(PENALTIES, SEEDS, PAIRS), *itertools.product(SLOW | HELD, SEEDS, PAIRS[-1:])]
    sampled = {int(row["seed"]) for row in read("best_of_n")}
    jobs = [(best_of_n, seed) for seed in options.seeds if seed not in sampled]
    wanted = [key for key in wanted if key[0] in options.variants and key[1] in options.seeds]
    jobs += [(optimise, *key) for key in wanted if key not in done]
    if jobs:
        yield [(learn_rewards, seed) for seed in options.seeds]
        yield jobs


def quietly(job: tuple) -> tuple[dict[str, list], str]:
    """Call a function in a process of the pool and return its result and its seconds."""
    function, *inputs = job
    started = time.perf_counter()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        tables = function(*inputs)
    return tables, f"{function.__name__} {inputs}: {time.perf_counter() - started:.0f} s"


def set_up_worker() -> None:
    """Set one thread, and let the process end when its parent ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


# ------------------------------------------------------------------------------------------ the report


FORMS = {"PPO": np.log, BEST: lambda d: d}  # d (a - b log d), d (a - b d)
BANDS = (1, 2, 4, 8, 16, 32, 64, math.inf)  # nats


def points(way: str, pairs: int) -> list[np.ndarray]:
    """Return KL, learned and gold reward of each seed, (rows, 3); one row per iteration of PPO or per n.

    Both rewards are gains over one response of the SFT model to the same kind of prompt, in standard
    deviations of the SFT model's rewards.
    """
    rows, found = read("best_of_n"), []
    if way != BEST:
        rows = [row for row in read("curves") if row["variant"] == way]
    sft = {(row["seed"], row["pairs"]): row for row in read("sft")}
    for seed in SEEDS:
        key = str(seed), str(pairs)
        mine = [row for row in rows if (row["seed"], row["pairs"]) == key]
        start = mine[0] if way == BEST else sft[key]
        numbers = np.array([[float(row[x]) for x in ("kl", "score", "gold")] for row in mine])
        gains = numbers - (0.0, float(start["score"]), float(start["gold"]))
        found.append(gains / (1.0, 1.0, float(sft[key]["gold_deviation"])))
    return found


def fit_form(d: np.ndarray, gain: np.ndarray, form: Callable) -> tuple[float, float, float]:
    """Fit gain = d (a - b form(d)) by least squares; return a, b and the residual deviation."""
    columns = np.stack((d, -d * form(d)), 1)
    (a, b), *_ = np.linalg.lstsq(columns, gain)
    rest = gain - columns @ (a, b)
    return a, b, np.sqrt((rest**2).sum() / (len(d) - 2))


def fit_gold(rows: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Fit both forms to the gold reward of points."""
    kl, _, gold = rows[rows[:, 0] > 0].T
    return {way: fit_form(np.sqrt(kl), gold, form) for way, form in FORMS.items()}


def ends(way: str, pairs: int) -> np.ndarray:
    """Return KL, learned and gold reward of each seed, means of the last ten iterations, (seeds, 3)."""
    return np.array([rows[-10:].mean(0) for rows in points(way, pairs)])


def in_bands(way: str, pairs: int) -> list[str]:
    """Return mean learned and gold reward of the iterations whose KL lies in each band, and their number."""
    rows, cells = np.concatenate(points(way, pairs)), []
    for low, high in itertools.pairwise(BANDS):
        _, learned, gold = rows[(rows[:, 0] >= low) & (rows[:, 0] < high)].T
        cells.append(f"{learned.mean():.2f}, **{gold.mean():.2f}** ({len(gold)})" if len(gold) > 2 else "")
    return cells


def table(title: str, columns: list[str], rows: list[list]) -> list[str]:
    """Format a Markdown table; arrays become the numbers of their seeds."""
    lines = ["", title, "", f"| {' | '.join(columns)} |", "|-" * len(columns) + "|"]
    for row in rows:
        cells = [
            ", ".join(f"{x:.2f}" for x in cell) if isinstance(cell, np.ndarray) else cell for cell in row
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report() -> list[str]:
    """Return the report as Markdown."""
    lines = ["Learned reward and gold are gains over the SFT model, in its standard deviations. Three seeds."]
    sft = {(row["seed"], row["pairs"]): float(row["agreement"]) for row in read("sft")}
    rows = [[f"{n:,}", ", ".join(f"{sft[str(seed), str(n)]:.1%}" for seed in SEEDS)] for n in PAIRS]
    lines += table("Reward models", ["choices", "agreement with the labeller on 400 new ones"], rows)

    rows = []
    for pairs, way in itertools.product(PAIRS, (BEST, *PENALTIES)):
        form, other = (BEST, "PPO") if way == BEST else ("PPO", BEST)
        together = fit_gold(np.concatenate(points(way, pairs)))[form]
        alone = [(found[form][2], found[other][2]) for found in map(fit_gold, points(way, pairs))]
        rows.append([f"{pairs:,}", way, *(f"{x:.2f}" for x in together), *np.transpose(alone)])
    title = "Gold as d (a - b d) for best of n and as d (a - b log d) for PPO; deviations from it"
    columns = ["choices", "way", "a", "b", "deviation, one fit", "a fit for each seed", "by the other form"]
    lines += table(title, columns, rows)

    wanted = [*itertools.product(PAIRS, PENALTIES), *itertools.product(PAIRS[-1:], SLOW)]
    rows = [[f"{pairs:,}", way, *in_bands(way, pairs)] for pairs, way in wanted]
    title = "PPO: learned reward, **gold** and (number of iterations) where the KL is so many nats"
    columns = [f"{low} to {high}" for low, high in itertools.pairwise(BANDS)]
    lines += table(title, ["choices", "way", *columns[:-1], f"above {BANDS[-2]}"], rows)

    rows = [[f"{pairs:,}", way, *ends(way, pairs).T] for pairs, way in wanted]
    lines += table("PPO: the last ten iterations", ["choices", "way", "KL", "learned", "gold"], rows)

    rows = [[way, *ends(way, PAIRS[-1]).T, f"{ends(way, PAIRS[-1])[:, 2].mean():.2f}"] for way in HELD]
    title = f"PPO held at 3 nats, {PAIRS[-1]:,} choices: the last ten iterations"
    lines += table(title, ["way", "KL", "learned", "gold", "mean gold"], rows)

    for pairs in PAIRS:
        said = [row for row in read("says") if row["pairs"] == str(pairs)][:SAID]
        names = ("prompt", "sft", "sft_score", "sft_gold", "ppo", "ppo_score", "ppo_gold")
        rows = [[" ".join(row[name].replace("|", "/").split()) for name in names] for row in said]
        title = (
            f"{NO_PENALTY}, {pairs:,} choices, seed {SEEDS[0]}: {SAID} held-out prompts, rewards themselves"
        )
        lines += table(title, ["prompt", "SFT model", "learned", "gold", "PPO", "learned", "gold"], rows)
    return lines


def smooth(rows: np.ndarray, reach: int = 2) -> np.ndarray:
    """Smooth with a moving average over the given number of rows on either side."""
    return np.array([rows[max(0, k - reach) : k + reach + 1].mean(0) for k in range(len(rows))])


def draw() -> None:
    """Draw overoptimisation.png, one column per reward model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = dict(figsize=(11, 10), sharex="row", sharey="row", layout="constrained")
    figure, panels = plt.subplots(3, len(PAIRS), **size)
    colors = {way: f"C{k}" for k, way in enumerate([*PENALTIES, BEST])}
    for (far, best, near), pairs in zip(panels.T, PAIRS, strict=True):
        far.set_title(f"reward model from {pairs:,} choices", fontsize=10)
        for way, color in colors.items():
            for rows in points(way, pairs):
                kl, learned, gold = (rows if way == BEST else smooth(rows)).T
                for panel in (best if way == BEST else far, near):
                    panel.plot(np.sqrt(kl), learned, ":", color=color, linewidth=1)
                    panel.plot(np.sqrt(kl), gold, color=color, linewidth=1)
        for panel, way, form in ((far, NO_PENALTY, "PPO"), (best, BEST, BEST)):
            rows = np.concatenate(points(way, pairs))
            a, b, _ = fit_gold(rows)[form]
            d = np.linspace(0.01, np.sqrt(rows[:, 0].max()), 200)
            panel.plot(d, d * (a - b * FORMS[form](d)), color="black", linewidth=1, zorder=0)
        for panel in (far, best, near):
            panel.grid(alpha=0.3)
    near.set(xlim=(0, 4), ylim=(-1, 2))
    for panel, label in zip(panels[:, 0], ("PPO", BEST, "all, up to d = 4"), strict=True):
        panel.set_ylabel(label)
    names = [way if way == BEST else f"PPO, {way}" for way in colors]
    looks = [dict(color=color, label=name) for color, name in zip(colors.values(), names, strict=True)]
    looks += [dict(color="grey", label="gold"), dict(color="grey", label="learned reward", linestyle=":")]
    handles = [plt.Line2D([], [], **look) for look in (*looks, dict(color="black", label="fitted form"))]
    figure.legend(handles=handles, loc="outside upper center", ncols=8, fontsize=8)
    figure.supylabel("gain over the SFT model, in its standard deviations", fontsize=10)
    figure.supxlabel("d, the square root of the KL to the SFT model in nats", fontsize=10)
    figure.savefig(RESULTS / "overoptimisation.png", dpi=80)


def main(options: Options) -> None:
    """Run what is missing from the results and report all results."""
    if not options.quick:
        RUNS.mkdir(parents=True, exist_ok=True)
        with multiprocessing.Pool(os.cpu_count(), set_up_worker) as pool:
            for jobs in missing(options):
                for tables, told in tqdm(pool.imap_unordered(quietly, jobs), total=len(jobs), unit=" runs"):
                    for name, rows in tables.items():
                        write(name, rows)
                    tqdm.write(told)
        shutil.rmtree(RUNS)
    (RESULTS / "overoptimisation.md").write_text("\n".join(report()) + "\n")
    draw()


if __name__ == "__main__":
    main(tyro.cli(Options))
