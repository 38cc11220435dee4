"""Measure the memory of ppo_rlhf_llm.py: of a whole run, and of the logits of a large vocabulary.

    python benchmarks/rlhf_memory.py                       write rlhf_memory.csv and rlhf_memory_run.csv

rlhf_memory_run.csv: peak memory of a run of all three stages with a random GPT-2 of 97 million weights (one
answer per pass), beside what weights, gradients and Adam's moments need; of all weights and of adapters.
rlhf_memory.csv: four models with the vocabulary of Bloom (250,880 tokens) and a hidden size of 64. A row is
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
from common import in_fresh_process, load, peak_mebibytes
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


def measure_run(lora_rank: int | None) -> None:
    """Run all stages with a random model.

    Print its number of weights, the numbers that the run keeps, the memory before, and the peak, in MiB.
    """
    import json
    import tempfile

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    rlhf, before = load("ppo_rlhf_llm"), peak_mebibytes()
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {word: i for i, word in enumerate("abcdefghijklmnop")}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="o", pad_token="p")
        tokenizer.save_pretrained(folder)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=16_000, n_positions=64, eos_token_id=14))
        weights = model.num_parameters()
        model.save_pretrained(folder)
        del model
        rows = [
            {"prompt": x, "completion": y, "chosen": x, "rejected": y} for x in "abcdefghijk" for y in "cd"
        ]
        (Path(folder) / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = dict.fromkeys(("sft_data", "preference_data"), f"{folder}/data.jsonl")
        work = dict(batch_size=4, num_minibatches=1, micro_batch_size=1, answer_length=8, context=32)
        work |= dict(total_episodes=8, eval_prompts=2, sft_epochs=1)
        rlhf.train(rlhf.Args(model=folder, lora_rank=lora_rank, **data, **work, run_dir=f"{folder}/run"))
        peak = peak_mebibytes()
        kept = rlhf.Models(rlhf.Args(model=folder, lora_rank=lora_rank, context=32, answer_length=8))
        numbers = sum(x.numel() for x in kept.parameters())
        for model in (kept.actor, kept.critic):  # gradient and two moments
            numbers += 3 * sum(x.numel() for x in model.parameters() if x.requires_grad)
        print(weights, numbers, before, peak)


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        measure_run(int(sys.argv[2]) or None)
        return
    with open(RESULTS.with_name("rlhf_memory_run.csv"), "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["lora_rank", "weights", "needed_mib", "imports_mib", "peak_mib", "ratio"])
        for rank in (0, 16):  # 0: all weights are trained
            weights, numbers, before, peak = map(float, in_fresh_process("run", rank))
            needed = numbers * 4 / 2**20
            row = [rank, int(weights), round(needed), round(before), round(peak)]
            table.writerow([*row, round((peak - before) / needed, 3)])
            print(*row, flush=True)
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
