"""Memory that the logits of a large vocabulary cost ppo_rlhf_llm.py: in chunks, and all at once.

    python benchmarks/rlhf_memory.py                       writes benchmarks/results/rlhf_memory.csv

Four models with the vocabulary of Bloom, 250,880 tokens, and 64 numbers in a hidden state. Each row of the
table is the most that tensors took at once, beside weights and gradients that are there before, while
answers are assessed, while a minibatch of them adds its gradients (with the exact KL in the loss), and while
texts of stage 1 do.
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
    """MiB that tensors take at once while the function runs, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    events = sorted(run.events(), key=lambda event: event.time_range.start)
    return round(max(itertools.accumulate(event.self_cpu_memory_usage for event in events)) / 2**20)


def measure(rlhf: ModuleType, models: torch.nn.Module, answers: int, chunk: int) -> dict[str, int]:
    """A row of the table: so many answers, so many logits at once."""
    rlhf.LOGITS_AT_ONCE = chunk
    ids = torch.randint(256, (answers, 16 + LENGTH))
    attention, mask = torch.ones_like(ids), torch.ones(answers, LENGTH, dtype=torch.bool)
    noise, states = torch.randn(answers, LENGTH), torch.randn(answers, LENGTH, WIDTH)
    batch = (ids, attention, mask, states, noise, noise, noise, noise)
    texts = [([1] * 16, [2] * LENGTH)] * answers
    row = {"tokens": answers * LENGTH, "chunk_mib": chunk * 4 // 2**20 if chunk < 2**34 else ""}
    row["assess_mib"] = peak(lambda: rlhf.assess(models, *batch[:3]))
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
    rlhf.flatten_parameters(torch.nn.ModuleList([models.actor, models.critic]))  # gradients, too
    sizes = itertools.product((2, 8, 32), (2**22, 2**24, 2**34))
    table = [measure(rlhf, models, *size) for size in sizes if size != (32, 2**34)]  # that one takes 18 GB
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
