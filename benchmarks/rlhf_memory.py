"""Measure the memory of the logits of a large vocabulary in ppo_rlhf_llm.py, in chunks and all at once.

    python benchmarks/rlhf_memory.py                       write benchmarks/results/rlhf_memory.csv

Four models with the vocabulary of Bloom (250,880 tokens) and a hidden size of 64. Each row of the table is
the peak memory of tensors, without the weights and gradients that exist before, while responses are assessed,
while a minibatch computes its gradients (with the exact KL in the loss), and while stage 1 computes its
gradients.
"""

import csv
import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "rlhf_memory.csv"
VOCABULARY, WIDTH, LENGTH = 250_880, 64, 64


def peak(function: Callable) -> int:
    """Return the peak MiB of tensors while the function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    events = sorted(run.events(), key=lambda event: event.time_range.start)
    return round(max(itertools.accumulate(event.self_cpu_memory_usage for event in events)) / 2**20)


def measure(rlhf: ModuleType, models: torch.nn.Module, answers: int, chunk: int) -> dict[str, int]:
    """Return a row of the table for a number of responses and of logits per chunk."""
    rlhf.LOGITS_AT_ONCE = chunk
    ids = torch.randint(256, (answers, 16 + LENGTH))
    responses = rlhf.Answers(ids, torch.ones_like(ids), torch.ones(answers, LENGTH, dtype=torch.bool))
    noise, states = torch.randn(answers, LENGTH), torch.randn(answers, LENGTH, WIDTH)
    batch = rlhf.Batch(*responses, states, noise, noise, noise, noise)
    texts = [(rlhf.Prompt("", [1] * 16, {}), [2] * LENGTH)] * answers
    row = {"tokens": answers * LENGTH, "chunk_mib": chunk * 4 // 2**20 if chunk < 2**34 else ""}
    row["assess_mib"] = peak(lambda: rlhf.assess(models, responses))
    row["update_mib"] = peak(lambda: rlhf.add_gradients(models, batch, 0.1))
    row["sft_mib"] = peak(lambda: rlhf.accumulate(models, rlhf.lm_loss, texts))
    print(row, flush=True)
    return row


def main() -> None:
    spec = importlib.util.spec_from_file_location("ppo_rlhf_llm", ROOT / "ppo_rlhf_llm.py")
    rlhf = sys.modules["ppo_rlhf_llm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rlhf)
    rlhf.ByteTokenizer.size = VOCABULARY
    models = rlhf.Models(rlhf.Args(width=WIDTH, num_minibatches=1, kl_in="loss"))
    for parameter in (*models.actor.parameters(), *models.critic.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    sizes = itertools.product((2, 8, 32), (2**22, 2**24, 2**34))
    table = [measure(rlhf, models, *size) for size in sizes if size != (32, 2**34)]  # would take 18 GB
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
