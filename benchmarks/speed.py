"""Measure the speed and memory of the scripts and of their peers on the same work.

    python benchmarks/speed.py                             everything, an hour on an idle machine
    python benchmarks/speed.py --jobs HalfCheetah-v5 CartPole-v1 --turns 3
    python benchmarks/speed.py --quick                     one short run of each job; record nothing
    python benchmarks/plot.py                              draw the picture; tables.py writes the tables

JOBS has the commands. The variants of a job alternate, so that noise on the machine affects all of them;
compare the ratios of the turns. results/speed.csv has one row for each run: steps per second (RLHF: answers
per second), the median over all iterations but the first, and the peak memory of the process. Measurements in
it are not repeated: delete its rows to measure again. Control scripts use one thread, RLHF two. Jobs with
--cuda run only where there is a GPU. Requires requirements-extra.txt; TRL 1.12.0, the last version with PPO,
is installed into its own environment, runs/trl.
"""

import csv
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from common import RESULTS, ROOT, run_peer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

COLUMNS = ["job", "variant", "turn", "rate", "mebibytes", "machine"]
TRL = ROOT / "runs" / "trl"
TORCHRUN = "torchrun --standalone --nproc-per-node=2"
HALF_CHEETAH = (
    "ppo_continuous --env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --num-minibatches 32"
    " --update-epochs 10 --learning-rate 3e-4 --target-kl None --total-timesteps 16_384"
)
CART_POLE = (
    "ppo_discrete --env-id CartPole-v1 --num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4"
    " --no-norm-obs --no-norm-reward --learning-rate 3e-4 --lr-kl-target None --total-timesteps 51_200"
)
PENALTY = HALF_CHEETAH.replace("ppo_continuous", "ppo_penalty")
BREAKOUT = (
    "ppo_discrete --env-id ALE/Breakout-v5 --num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 4"
    " --total-timesteps 8_192"
)
HUMANOID = "ppo_continuous --env-id Humanoid-v5 --total-timesteps 16_384"
# four models of 0.83 million parameters; prompts of 16 tokens (bytes), answers of 32
RLHF = (
    "ppo_rlhf_llm --layers 4 --heads 4 --width 128 --batch-size 64 --num-minibatches 1 --update-epochs 4"
    " --answer-length 32 --context 48 --total-episodes 512 --sft-data DATA --preference-data DATA"
)
MEMORY = (
    "ppo_rlhf_llm --model GPT2 --sft-data FEW --preference-data FEW --batch-size 4 --num-minibatches 1"
    " --micro-batch-size 1 --answer-length 8 --context 64 --total-episodes 8 --eval-prompts 2 --sft-epochs 1"
)
LARGE = (
    "ppo_rlhf_llm --cuda --model MODEL --skip-sft --prompt-data DATA --reward-function speed:length"
    " --batch-size 64 --num-minibatches 4 --update-epochs 2 --answer-length 128 --context 160"
    " --total-episodes 320 --eval-prompts 2"
)
JOBS = {  # job: {variant: command}; the peers have the settings of the script
    "HalfCheetah-v5": {
        "eager": HALF_CHEETAH,
        "--compile": f"{HALF_CHEETAH} --compile",
        "stable-baselines3": "peer",
        "environment alone": "environment",
    },
    "CartPole-v1": {
        "eager": CART_POLE,
        "--compile": f"{CART_POLE} --compile",
        "stable-baselines3": "peer",
        "environment alone": "environment",
    },
    "RLHF": {"eager": RLHF, "TRL": "peer"},
    "HalfCheetah-v5, penalty": {"eager": PENALTY, "--compile": f"{PENALTY} --compile"},
    "Humanoid-v5": {"1 process": HUMANOID, "2 processes": f"{TORCHRUN} {HUMANOID}"},
    "environments": {
        f"{n} {mode}": f"{HALF_CHEETAH} --num-envs {n} --num-steps {2048 // n} {option}"
        for n, mode, option in (
            (1, "sync", ""),
            (8, "sync", ""),
            (64, "sync", ""),
            (8, "async", "--async-envs"),
        )
    },
    "memory": {"imports": "imports", "all weights": MEMORY, "--lora-rank 16": f"{MEMORY} --lora-rank 16"},
}
if torch.cuda.is_available():
    works = {
        "HalfCheetah-v5": HALF_CHEETAH,
        "CartPole-v1": CART_POLE,
        "Breakout": BREAKOUT,
        "penalty": PENALTY,
    }
    JOBS |= {
        f"GPU, {name}": {option: f"{work} {option}" for option in ("", "--cuda", "--cuda --compile")}
        for name, work in works.items()
    }
    JOBS["GPU, RLHF"] = {name: LARGE.replace("MODEL", name) for name in ("GPT2", "LLAMA")}


@dataclass
class Options:
    """Options of this benchmark."""

    jobs: list[str] = field(default_factory=lambda: list(JOBS))
    turns: int = 5
    quick: bool = False
    """measure the first variant of each job once, and record nothing"""


def length(prompts: list[str], answers: list[str]) -> list[float]:
    """Score answers for RLHF; their quality does not matter here."""
    return [float(len(answer)) for answer in answers]


def write_inputs(folder: Path, words: list[str]) -> list[str]:
    """Write the data and the model that a command names in capitals, and return the command with their paths.

    Prompts have 16 letters. Answers with their end token have the length of the longest sampled answer, so
    that no model learns to end early.
    """
    if "--answer-length" not in words:
        return words
    space = " " if {"GPT2", "LLAMA"} & set(words) else ""  # their tokenizer splits at spaces
    draw, tokens, lines = random.Random(1), int(words[words.index("--answer-length") + 1]), []
    for _ in range(256):
        texts = (space.join(draw.choices("abcdefgh", k=k)) for k in (16, tokens - 1, tokens - 1))
        prompt, chosen, rejected = texts
        lines.append(dict(prompt=prompt, completion=chosen, chosen=chosen, rejected=rejected))
    for name, some in (("DATA", lines), ("FEW", lines[:24])):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in some))
    for name in {"GPT2", "LLAMA"} & set(words):
        write_model(folder / name)
    return [str(folder / word) if word in ("DATA", "FEW", "GPT2", "LLAMA") else word for word in words]


def write_model(folder: Path) -> None:
    """Write a random model of transformers, with a tokenizer for the letters of the data."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    words = Tokenizer(models.WordLevel(letters, unk_token="x"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="y", pad_token="z", unk_token="x")
    tokenizer.save_pretrained(folder)
    if folder.name == "GPT2":  # 97 million weights with this vocabulary
        model = GPT2LMHeadModel(GPT2Config(vocab_size=16_000, n_positions=160, eos_token_id=24))
    else:
        shape = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22)
        shape |= dict(num_attention_heads=32, num_key_value_heads=4, eos_token_id=24)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **shape))
    model.save_pretrained(folder)


LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)
"""


def run_process(command: list, env: dict[str, str] | None = None) -> tuple[list[str], float]:
    """Run a command; return the lines that it prints and its peak memory in MiB.

    A small process starts it, because the peak of a new process is at least the memory of the one it is
    forked from.
    """
    words = [sys.executable, "-c", LAUNCHER, *map(str, command)]
    run = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if run.returncode:
        sys.exit(f"failed: {' '.join(words[3:])}")
    *lines, mebibytes = run.stdout.splitlines()
    return lines, float(mebibytes)


def run_script(command: str, folder: Path) -> tuple[float, float]:
    """Run a command; return its rate and the peak memory of the process in MiB."""
    words, launcher = write_inputs(folder, command.split()), [sys.executable]
    if words[0] == "torchrun":
        launcher, words = [sys.executable, "-m", "torch.distributed.run", *words[1:3]], words[3:]
    control = words[0] != "ppo_rlhf_llm"
    words = [
        str(ROOT / f"{words[0]}.py"),
        *words[1:],
        "--run-dir",
        str(folder / "run"),
        "--checkpoint-every",
        "1_000",
    ]
    words += ["--eval-episodes", "1"] if control else []
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks"), "OMP_NUM_THREADS": "1" if control else "2"}
    _, mebibytes = run_process([*launcher, *words], env)
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0}).Reload()
    if control:
        rate = statistics.median(event.value for event in events.Scalars("charts/SPS")[1:])
    else:
        rows = events.Scalars("losses/policy_loss")
        rate = statistics.median(
            (b.step - a.step) / (b.wall_time - a.wall_time) for a, b in itertools.pairwise(rows)
        )
    return rate, mebibytes


def run_environment(task: str) -> float:
    """Return steps per second of the environment alone, with random actions."""
    import gymnasium as gym

    env = gym.make(task)
    env.action_space.seed(1)
    env.reset(seed=1)
    started = time.perf_counter()
    for _ in range(20_000):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return 20_000 / (time.perf_counter() - started)


def run_trl() -> tuple[float, float]:
    """Return answers per second of TRL on the work of RLHF, and its peak memory in MiB."""
    if not TRL.exists():
        venv.create(TRL, with_pip=True)
        pip = [TRL / "bin" / "python", "-m", "pip", "install", "torch==2.13.0", "trl==1.12.0"]
        subprocess.run(pip, check=True)
    lines, mebibytes = run_process([TRL / "bin" / "python", ROOT / "benchmarks" / "trl_ppo.py"])
    return float(lines[-1]), mebibytes


def measure(job: str, variant: str) -> tuple[float, float]:
    """Return the rate of a variant of a job, and its peak memory in MiB."""
    command = JOBS[job][variant]
    if command == "imports":
        imports = "import ppo_rlhf_llm, transformers, peft; transformers.GPT2LMHeadModel"
        command = [sys.executable, "-c", imports]
        return 0.0, run_process(command, os.environ | {"PYTHONPATH": str(ROOT)})[1]
    if command == "environment":
        return run_environment(job), 0.0
    if variant == "TRL":
        return run_trl()
    if command == "peer":
        rows, envs, parts, epochs = (2048, 1, 32, 10) if job == "HalfCheetah-v5" else (512, 4, 4, 4)
        settings = dict(n_envs=envs, n_steps=rows // envs, batch_size=rows // parts, n_epochs=epochs)
        steps = 16_384 if job == "HalfCheetah-v5" else 51_200
        results = run_peer("PPO", job, 1, steps, settings | dict(normalize=job == "HalfCheetah-v5"), 1)
        return steps / results["seconds"], 0.0
    with tempfile.TemporaryDirectory() as folder:
        return run_script(command, Path(folder))


def machine() -> str:
    """Describe the machine and the versions of the libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    libraries = " ".join(f"{name} {version(name)}" for name in ("torch", "gymnasium", "stable-baselines3"))
    return f"{processor}, {os.cpu_count()} cores{card}, Python {platform.python_version()}, {libraries}"


def main(options: Options) -> None:
    """Measure what is missing from the results."""
    path = RESULTS / "speed.csv"
    done = set()
    if path.exists():
        with path.open() as file:
            done = {(row["job"], row["variant"], int(row["turn"])) for row in csv.DictReader(file)}
    keys = [
        (job, variant, k + 1) for job in options.jobs for k in range(options.turns) for variant in JOBS[job]
    ]
    if options.quick:
        keys, done = [(job, next(iter(JOBS[job])), 1) for job in options.jobs], set()
    for key in tqdm([key for key in keys if key not in done], unit=" runs"):
        rate, mebibytes = measure(*key[:2])
        tqdm.write(f"{key}: {rate:,.4g} per second, {mebibytes:,.0f} MiB")
        if not options.quick:
            new = not path.exists()
            with path.open("a", newline="") as file:
                row = [*key, f"{rate:.4g}", f"{mebibytes:.0f}", machine()]
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, row] if new else [row])


if __name__ == "__main__":
    main(tyro.cli(Options))
