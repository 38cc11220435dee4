# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "numpy>=2", "safetensors>=0.4", "tyro>=1.0.17", "tensorboard>=2.18", "tqdm>=4.60"
# ]
# ///
"""Reinforcement learning from human feedback (RLHF) with PPO: one file from end to end.

    python ppo_rlhf_llm.py                                 all three stages, on two CPU cores
    tensorboard --logdir runs                              shows them
    torchrun --nproc-per-node=2 ppo_rlhf_llm.py            trains in two processes
    python ppo_rlhf_llm.py --resume runs/NAME              goes on as if it had never stopped
    python ppo_rlhf_llm.py --evaluate runs/NAME            compares the saved policy with the SFT model
    python ppo_rlhf_llm.py --evaluate runs/NAME --generate "My kettle leaks."
    python ppo_rlhf_llm.py --cuda --model PATH_OR_ID --sft-data FILE --preference-data FILE --prompt-data FILE

Stage 1, supervised fine-tuning (SFT): a language model learns to answer as the texts do. Stage 2, reward
model: it learns from pairs of answers which one a labeller prefers. Stage 3, PPO: the language model learns
to give answers that the reward model scores high, without leaving the SFT model far behind.
With nothing downloaded: texts come from a small grammar, preferences from a labeller that follows rules.
With a model of the transformers library (--model) and JSONL files: the same, for real.

Papers: PPO, Schulman et al. 2017, https://arxiv.org/abs/1707.06347; RLHF, Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593; InstructGPT, Ouyang et al. 2022, https://arxiv.org/abs/2203.02155.
Read from top to bottom: options, maths, models, data, stages, train(); plumbing comes last.

Left out: 1. adapters and quantisation; 2. an inference server; 3. sampling filters: what acts is what learns;
4. best-of-n, DPO, GRPO: other algorithms.

Shapes: N answers of an iteration, B of a minibatch, P tokens of the longest prompt, L of the longest answer,
S = P + L, V tokens in the vocabulary, D numbers in a hidden state. Prompts are padded on the left and answers
on the right, so that every answer begins in column P. Answer token t is drawn after column P + t - 1.
(In functions shared with the other scripts T is L, and A is V.)
"""

import copy
import dataclasses
import importlib
import inspect
import io
import json
import math
import os
import random
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """RLHF: supervised fine-tuning, a reward model, then PPO against it under a KL penalty."""

    total_episodes: int = 5120
    """answers of stage 3 over the whole run"""
    learning_rate: float = 2e-4
    """Adam's step size in stage 3"""
    batch_size: int = 64
    """answers in one iteration of stage 3 (N), those of all processes together"""
    answer_length: int = 56
    """tokens after which an answer is cut off"""
    anneal_lr: bool = True
    """let the learning rate of stage 3 fall linearly to zero at its end"""
    gamma: float = 1.0
    """discount factor"""
    gae_lambda: float = 0.95
    """bias against variance of the advantages (lambda): 0 is one-step TD, 1 is Monte Carlo"""
    num_minibatches: int = 4
    """minibatches that each epoch cuts the N answers into; stages 1 and 2 have minibatches of that size"""
    micro_batch_size: int | None = None
    """answers (stage 2: pairs) in one pass that learns: for memory, the result is the same (None: all)"""
    update_epochs: int = 2
    """passes over the answers of an iteration"""
    norm_adv: bool = True
    """normalise the advantages of each iteration, over all its actions"""
    clip_coef: float = 0.2
    """how far the probability ratio may go from one before its gradient stops (epsilon)"""
    clip_vloss: bool = False
    """clip the value loss too, by the same amount"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    max_grad_norm: float = 1.0
    """largest L2 norm of the whole gradient (in stage 3 of actor and critic together)"""
    target_kl: float | None = None
    """stop the epochs at the first minibatch whose approx_kl, in nats per action, exceeds this"""
    action_level: Literal["token", "sequence"] = "token"
    """what an action is: a token, or a whole answer (one ratio, one reward, baseline V(prompt))"""
    kl_in: Literal["reward", "loss"] = "reward"
    """where the penalty goes: log(actor / reference) off each token's reward, or the exact KL to the loss"""
    kl_coef: float = 0.1
    """weight of KL(actor, reference) against the score, at the start (beta)"""
    kl_target: float | None = 3.0
    """KL(actor, reference) in nats per answer that kl_coef adapts to (None: kl_coef stays as it is)"""
    kl_horizon: int = 500
    """answers in which kl_coef can change by a fifth, if the KL is off its target by as much"""
    loss_average: Literal["token", "answer"] = "token"
    """what weighs the same in the loss: every token, or every answer, so that its tokens weigh 1/|y|"""
    dense_reward: bool = False
    """reward each token by what it adds to the score (else: the last one by the whole score)"""
    eos_penalty: float = 1.0
    """taken off the score of an answer that was cut off"""
    ptx_coef: float = 0.0
    """weight of the loss of stage 1, a mean over tokens, in stage 3 (gamma of InstructGPT)"""
    model: str | None = None
    """causal language model of transformers, a folder or a name on the hub (None: the built-in GPT)"""
    reward_model: str | None = None
    """sequence classifier of transformers with one label, instead of stage 2"""
    reward_function: str | None = None
    """MODULE:NAME of a Python function (prompts, answers) -> scores, instead of stage 2"""
    skip_sft: bool = False
    """leave out stage 1: the model is fine-tuned already"""
    sft_data: str | None = None
    """JSONL file for stage 1: prompt and completion in each line, or text"""
    preference_data: str | None = None
    """JSONL file for stage 2: prompt, chosen, rejected"""
    prompt_data: str | None = None
    """JSONL file for stage 3: prompt (None: those of the other files)"""
    ptx_data: str | None = None
    """JSONL file for --ptx-coef: text (None: the texts of stage 1)"""
    layers: int = 2
    """blocks of the built-in language model"""
    heads: int = 4
    """attention heads of each block"""
    width: int = 96
    """numbers in a hidden state (D)"""
    context: int = 128
    """longest text of the language model in tokens, prompt and answer together"""
    num_texts: int = 6000
    """texts of the built-in job for stage 1"""
    sft_epochs: int = 2
    """passes over the texts"""
    sft_learning_rate: float = 2e-3
    """Adam's step size in stage 1; it falls linearly to zero"""
    num_pairs: int = 2500
    """pairs of answers that the built-in labeller compares for stage 2"""
    reward_model_epochs: int = 1
    """passes over the pairs"""
    reward_model_learning_rate: float = 5e-4
    """Adam's step size in stage 2; it falls linearly to zero"""
    eval_prompts: int = 200
    """held-out prompts of the evaluation, at most 200"""
    seed: int = 1
    """seed of weights, texts, labels, shuffles and samples"""
    cuda: bool = False
    """learn on the GPU, in bfloat16 where it serves (autocast)"""
    bf16: bool = False
    """bfloat16 on the CPU, too: faster where the processor has it"""
    run_dir: str | None = None
    """run folder (None: runs/gpt__{script}__{seed}__{time})"""
    checkpoint_every: int | None = None
    """iterations of stage 3 between checkpoints (None: a tenth of it)"""
    track: bool = False
    """also log to Weights & Biases (WANDB_PROJECT and WANDB_ENTITY say where)"""
    resume: str | None = None
    """run folder to continue, with the options it was started with"""
    evaluate: str | None = None
    """run folder whose saved policy answers, without training"""
    generate: str | None = None
    """beside --evaluate: a prompt to answer, instead of the evaluation"""

    @property
    def own_data(self) -> bool:
        return bool(self.sft_data or self.preference_data or self.prompt_data)

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_episodes // self.batch_size

    def __post_init__(self) -> None:
        rows, parts, horizon = self.batch_size, self.num_minibatches, self.kl_horizon
        positive = ("batch_size", "num_minibatches", "answer_length", "update_epochs", "kl_horizon", "layers")
        positive += ("heads", "width", "clip_coef", "max_grad_norm", "sft_epochs", "reward_model_epochs")
        positive += ("learning_rate", "sft_learning_rate", "reward_model_learning_rate")
        for name in positive:
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("kl_target", "micro_batch_size", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be positive or None")
        for name in ("vf_coef", "kl_coef", "ptx_coef", "eos_penalty", "seed"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        require(2 <= self.eval_prompts <= HELD_OUT, f"eval_prompts must lie between 2 and {HELD_OUT}")
        require(self.num_texts >= 20 and self.num_pairs >= 20, "num_texts and num_pairs must be at least 20")
        require(rows > 1, "batch_size is 1: advantages of one answer have no standard deviation")
        require(rows % parts == 0, f"batch_size {rows} is not divisible by num_minibatches {parts}")
        share, rest = divmod(self.minibatch_size, WORLD_SIZE)
        require(share and not rest, f"{WORLD_SIZE} processes do not divide {self.minibatch_size} answers")
        require(self.width % self.heads == 0, f"width {self.width} is not divisible by heads {self.heads}")
        require(self.num_iterations, f"--total-episodes must be at least batch_size {rows}")
        adaptive, scored = self.kl_target is not None, self.reward_model or self.reward_function
        require(self.kl_coef or not adaptive, "kl_coef 0 cannot be adapted; it needs --kl-target None")
        require(rows <= horizon or not adaptive, f"kl_horizon {horizon} must be at least batch_size {rows}")
        both = self.reward_model and self.reward_function
        require(not both, "--reward-model and --reward-function exclude each other")
        require(not (scored and self.dense_reward), "--dense-reward needs the reward model of stage 2")
        require(not (scored and self.preference_data), "--preference-data needs stage 2, a reward model")
        require(not (self.sft_data and self.skip_sft), "--skip-sft leaves out stage 1, so no --sft-data")
        require(self.model or not self.skip_sft, "--skip-sft needs --model: the built-in one is untrained")
        require(self.ptx_coef or not self.ptx_data, "--ptx-data needs --ptx-coef, which is 0")
        require(not (self.resume and self.evaluate), "--resume and --evaluate exclude each other")
        require(self.evaluate or not self.generate, "--generate needs --evaluate runs/NAME")


# ------------------------------------------------------------------------------------------ the maths


def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda) -> tuple:
    """Compute truncated generalised advantage estimates (PPO eq. 11-12) -> (advantages, returns).

    All tensors are (T, N); ends of episodes are bool or 0/1. Row t is transition t, and next_values[t] is V
    of its successor. After a termination there is no future, so nothing is bootstrapped. After a truncation,
    such as a time limit, the episode could have continued: V(successor) estimates the rest. In both cases the
    next row belongs to another episode, so the sum ends.
    """
    terminations, truncations = terminations.bool(), truncations.bool()
    deltas = rewards + gamma * torch.where(terminations, 0.0, next_values) - values  # eq. 12
    decays = gamma * gae_lambda * (~(terminations | truncations)).to(deltas.dtype)
    # a loop over T with N numbers each: NumPy is several times faster than tensors on any device
    deltas, decays = deltas.cpu().numpy(), decays.cpu().numpy()
    advantages, advantage = np.empty_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage  # eq. 11, as a recursion
    advantages = torch.as_tensor(advantages, device=values.device)
    return advantages, advantages + values


def normalize(x: Tensor) -> Tensor:
    """Shift and scale x to mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std() + 1e-8)


def clipped_policy_loss(new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_coef) -> Tensor:
    """Compute -L^CLIP (PPO eq. 7) of each element, to minimise. All (B,); log-probabilities in nats."""
    ratio = torch.exp(new_logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages)


def value_loss(new_values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Compute 0.5 * squared error of each element, to minimise. All (B,); clip_coef None: not clipped.

    Not in the paper: clipping removes the incentive to move further than clip_coef from old_values
    (openai/baselines).
    """
    loss = 0.5 * (new_values - returns) ** 2
    if clip_coef is None:
        return loss
    clipped_values = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
    return torch.max(loss, 0.5 * (clipped_values - returns) ** 2)


def gather_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits) at the tokens, in nats. (B, L, V), (B, L) -> (B, L)."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def categorical_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Compute KL(softmax(logits), softmax(ref_logits)) in nats, exactly. (..., A), (..., A) -> (...)."""
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """r_t = score at the last token - kl_coef * log(actor / reference) (InstructGPT eq. 2). -> (B, L).

    scores (B,), log-probabilities in nats and mask (B, L). Of the ways to estimate a KL from samples only
    this one has the right gradient as a reward. Behind the last token rewards are 0.
    """
    last = mask.sum(1, keepdim=True) - 1
    rewards = kl_coef * (ref_logprobs - logprobs) * mask
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def dense_rewards(prefix_scores: Tensor, mask: Tensor) -> Tensor:
    """What each token adds to the score of the prefix; the sum is the score less that of the bare prompt.

    prefix_scores (B, L + 1): of the prompt and of all beginnings of the answer; mask (B, L) -> (B, L).
    """
    return prefix_scores.diff(dim=1) * mask


def preference_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """-log P(chosen is preferred), Bradley-Terry (InstructGPT eq. 1), mean over pairs. (B,), (B,) -> ()."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def adapt_kl_coef(kl_coef: float, kl: float, kl_target: float, episodes: int, horizon: int) -> float:
    """The controller of Ziegler et al., section 2.2 -> the next coefficient. KL in nats per answer.

    A KL that is off its target by a fifth or more changes the coefficient by a fifth in horizon episodes.
    """
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return min(max(kl_coef * (1 + error * episodes / horizon), 1e-6), 1e6)


def action_weights(mask: Tensor, average: str) -> Tensor:
    """What each element weighs in a masked mean; the weights sum to 1. mask (B, L) -> (B, L).

    "token": all tokens the same; "answer": all answers the same, so that their tokens weigh 1/|y|.
    """
    lengths = mask.sum(1, keepdim=True)
    return mask / (mask.sum() if average == "token" else lengths * len(mask))


def per_action(x: Tensor, mask: Tensor, action_level: str) -> Tensor:
    """Log-probabilities, rewards or KL of tokens (B, L) -> of actions: the same, or their sums (B, 1)."""
    return x if action_level == "token" else (x * mask).sum(1, keepdim=True)


def approx_kl(new_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Estimate KL(old, new) in nats from samples of old: the mean of (r - 1) - log r with r = new / old.

    Estimator k3 of http://joschu.net/blog/kl-approx.html, which is never negative.
    """
    logratio = new_logprobs - old_logprobs
    return (torch.expm1(logratio) - logratio).mean()


def clip_fraction(new_logprobs: Tensor, old_logprobs: Tensor, clip_coef: float) -> Tensor:
    """Compute the fraction of ratios outside [1 - clip_coef, 1 + clip_coef]."""
    return ((torch.exp(new_logprobs - old_logprobs) - 1).abs() > clip_coef).float().mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Compute 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 is as good as a constant."""
    return 1 - (returns - values).var() / returns.var()


# ------------------------------------------------------------------------------------------- the models


class ByteTokenizer:
    """UTF-8: every text in every language is a row of bytes; an end and a padding token besides."""

    eos_token_id, pad_token_id, size = 256, 257, 258

    def encode(self, text: str, **_) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], **_) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised first and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, past: tuple | None, keep: int) -> tuple[Tensor, tuple]:
        """Stream (B, S, D), attention's bias (B * heads, S, C + S) -> last of the stream, keys and values."""
        parts = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B * heads, S, D / heads) each
        cache = (key, value)
        if past is not None:
            stop, start = bias.shape[-1], bias.shape[-1] - key.shape[1]
            # a full cache doubles: with a copy at every token a text would cost quadratic time
            cache = past if stop <= past[0].shape[1] else [F.pad(x, (0, 0, 0, stop)) for x in past]
            cache[0][:, start:stop], cache[1][:, start:stop] = key, value
            key, value = cache[0][:, :stop], cache[1][:, :stop]
        x, query, bias = x[:, -keep:], query[:, -keep:], bias[:, -keep:]  # -0: all
        # at these lengths faster than F.scaled_dot_product_attention
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=1 / math.sqrt(query.shape[-1]))
        attended = (scores.softmax(-1) @ value).unflatten(0, (-1, self.heads))
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.feed_forward_norm(x)))), cache


class Transformer(nn.Module):
    """The trunk of a GPT; called as one of the transformers library is."""

    def __init__(self, vocabulary: int, positions: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        # ALiBi (Press et al. 2021): attention falls with distance, in each head at a rate of its own. With
        # learned positions alone stage 1 needed twice the training for the same loss
        slopes = 2.0 ** (-8 / heads * torch.arange(1, heads + 1)).view(-1, 1, 1)
        self.register_buffer("slopes", slopes, persistent=False)
        for name, parameter in self.named_parameters():  # weights as in GPT-2
            if parameter.dim() == 2:
                residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: list | None = None,
        keep: int = 0,
    ) -> SimpleNamespace:
        """Tokens (B, S), mask (B, C + S), cache of the C tokens before -> states (B, S, D), longer cache.

        keep: states of so many last tokens only. The last block spares the others, which serve nobody there.
        """
        rows = torch.arange(attention_mask.shape[1], device=input_ids.device)
        new = rows[-input_ids.shape[1] :].unsqueeze(1)
        # no token sees the future or padding; padding sees itself, for a softmax over nothing is nan
        allowed = ((rows <= new) & attention_mask[:, None, None].bool()) | (rows == new)
        bias = torch.where(allowed, self.slopes * (rows - new), -math.inf).flatten(0, 1)
        x = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        cache = []
        for i, block in enumerate(self.blocks):
            past = past_key_values and past_key_values[i]
            x, keys_and_values = block(x, bias, past, keep if block is self.blocks[-1] else 0)
            cache.append(keys_and_values)
        return SimpleNamespace(last_hidden_state=self.norm(x), past_key_values=cache)


class GPT(nn.Module):
    """A causal language model; called as one of the transformers library is."""

    def __init__(self, vocabulary: int, positions: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.base_model = Transformer(vocabulary, positions, layers, heads, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, logits_to_keep=0):
        """As Transformer, and the logits (B, logits_to_keep or S, V) of the next tokens."""
        output = self.base_model(input_ids, attention_mask, position_ids, past_key_values, logits_to_keep)
        output.logits = self.lm_head(output.last_hidden_state)
        return output

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


def load_pretrained(option: str, path: str, kind: str) -> tuple[nn.Module, Any]:
    """A model of the transformers library and its tokenizer, from a folder or the hub."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{option} needs transformers: pip install transformers") from error
    try:
        model = getattr(transformers, "AutoModelFor" + kind).from_pretrained(path, dtype=torch.float32)
        return model, transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{option} {path}: {error}") from error


def load_language_model(path: str, context: int) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, which has an end, and padding that is not the end."""
    model, tokenizer = load_pretrained("--model", path, "CausalLM")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {path}: its tokenizer has no end token, so answers cannot end")
    if context > (positions := getattr(model.config, "max_position_embeddings", math.inf)):
        raise UserError(f"--model {path} reads up to {positions} tokens, and --context is {context}")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def load_score_function(args: Args) -> Callable | None:
    """(prompts, answers) -> scores, by a function or a classifier; None: stage 2 learns a reward model."""
    if args.reward_function:
        module, _, name = args.reward_function.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--reward-function {args.reward_function}: {error}") from error
    if not args.reward_model:
        return None
    classifier, tokenizer = load_pretrained("--reward-model", args.reward_model, "SequenceClassification")
    if (labels := classifier.config.num_labels) != 1:
        raise UserError(f"--reward-model {args.reward_model} has {labels} labels, not one")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.to("cuda" if args.cuda else "cpu").eval()

    def score(prompts: list[str], answers: list[str]) -> Tensor:
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        batch = tokenizer(texts, padding=True, return_tensors="pt").to(classifier.device)
        return classifier(**batch).logits[:, 0].float()

    return score


def call(model: nn.Module, **inputs: Any) -> Any:
    """Calls a model with those of the inputs that it takes: Bloom, for one, takes no positions."""
    taken = inspect.signature(model.forward).parameters
    return model(**{name: value for name, value in inputs.items() if name in taken})


def hidden_states(trunk: nn.Module, ids: Tensor, attention: Tensor, length: int) -> Tensor:
    """Tokens (B, S), attention (B, S): 0 for padding -> hidden states of the last tokens (B, length, D)."""
    # positions count from the first real token: padding on the left must not shift what comes after
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    return call(trunk, **inputs, use_cache=False, keep=length).last_hidden_state[:, -length:]


class ScalarModel(nn.Module):
    """A number for each beginning of a text: a reward model (read at the last token), or a critic."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1))  # as Ziegler et al.
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, attention: Tensor, length: int) -> Tensor:
        """Tokens (B, S), attention (B, S) -> (B, length): for the text up to each of the last tokens."""
        states = hidden_states(self.trunk, ids, attention, length).float()
        # a sum instead of a matrix product, which autocast would round to bfloat16
        return (states * self.head.weight).sum(-1) + self.head.bias


LOGITS_AT_ONCE = 2**24  # tokens x vocabulary in one chunk: 64 MiB, and up to eight of these for a moment


class Models(nn.Module):
    """The four models of RLHF, without dropout (it would make another ratio than one), and beta."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.args, self.bf16, self.tokenizer = args, args.bf16 or args.cuda, ByteTokenizer()
        if args.model:
            self.actor, self.tokenizer = load_language_model(args.model, args.context)
        else:
            self.actor = GPT(self.tokenizer.size, args.context, args.layers, args.heads, args.width)
        width = self.actor.get_output_embeddings().weight.shape[1]
        self.reference = copy.deepcopy(self.actor).requires_grad_(False)  # the SFT model, once there is one
        critic = ScalarModel(copy.deepcopy(self.actor.base_model), width)
        self.score_function = load_score_function(args)
        self.reward = None if self.score_function else copy.deepcopy(critic)
        self.critic = critic
        for name, value in (("score_mean", 0.0), ("score_deviation", 1.0)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("kl_coef", torch.tensor(args.kl_coef, dtype=torch.float64))
        config = getattr(self.actor, "generation_config", None)  # which can have several tokens that end
        ends = [self.tokenizer.eos_token_id, *np.atleast_1d(config and config.eos_token_id)]
        self.register_buffer("ends", torch.tensor([x for x in ends if x is not None]), persistent=False)
        self.eval()

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 if the user asked for it; losses and weights stay in float32."""
        return torch.autocast(self.kl_coef.device.type, torch.bfloat16, enabled=self.bf16)

    def states_before(self, model: nn.Module, ids: Tensor, attention: Tensor, length: int) -> Tensor:
        """Hidden states of the actor or the reference before each of the last L tokens, (B, L, D)."""
        return hidden_states(model.base_model, ids[:, :-1], attention[:, :-1], length)

    def over_vocabulary(self, tokens: Tensor, states: Tensor, ref_states: Tensor | None = None) -> tuple:
        """Log-probabilities of tokens (B, L) by the actor, whose states (B, L, D) precede them; (B, L).

        With the reference's states also: its log-probabilities, the exact KL(actor, reference), the entropy.
        Logits exist for a chunk at a time and are computed again for the backward pass: of a large vocabulary
        (Bloom: 250,880) those of a whole batch would need more memory than the model.
        """

        def function(tokens: Tensor, states: Tensor, ref_states: Tensor | None = None) -> tuple[Tensor, ...]:
            with self.autocast():
                logits = self.actor.get_output_embeddings()(states).float()
            if ref_states is None:
                return (gather_logprobs(logits, tokens),)
            with self.autocast():
                ref_logits = self.reference.get_output_embeddings()(ref_states).float()
            log_policy = logits.detach().log_softmax(-1)  # entropy is only logged
            logprobs, ref_logprobs = gather_logprobs(logits, tokens), gather_logprobs(ref_logits, tokens)
            entropy = -(log_policy.exp() * log_policy).sum(-1)
            return logprobs, ref_logprobs, categorical_kl(logits, ref_logits), entropy

        rows = [x.flatten(0, 1) for x in (tokens, states, ref_states) if x is not None]
        size = max(1, LOGITS_AT_ONCE // self.actor.get_output_embeddings().weight.shape[0])
        if len(rows[0]) <= size:
            parts = [function(*rows)]
        else:
            chunked = zip(*(x.split(size) for x in rows), strict=True)
            parts = [checkpoint(function, *part, use_reentrant=False) for part in chunked]
        return tuple(torch.cat(column).view_as(tokens) for column in zip(*parts, strict=True))

    def prefix_scores(self, ids: Tensor, attention: Tensor, length: int) -> Tensor:
        """Scores of all beginnings of the answer, (B, L + 1); a function scores the whole answer only."""
        if self.score_function is None:
            return self.reward(ids, attention, length + 1)
        mask = attention.bool()
        prompts = decode(self, ids[:, :-length], mask[:, :-length])
        scores = self.score_function(prompts, decode(self, ids, mask[:, -length:]))
        scores = np.asarray(scores.tolist() if torch.is_tensor(scores) else scores, np.float32)
        valid = scores.shape == (len(ids),) and np.isfinite(scores).all()
        require(valid, f"the scores of {len(ids)} answers must be {len(ids)} finite numbers, not {scores}")
        scores = (torch.as_tensor(scores, device=ids.device) - self.score_mean) / self.score_deviation
        ends = mask[:, -length:].sum(1, keepdim=True)
        return torch.zeros_like(ids[:, -length - 1 :], dtype=torch.float32).scatter(1, ends, scores[:, None])

    def value(self, ids: Tensor, attention: Tensor, length: int) -> Tensor:
        """Compute V before each of the last tokens, (B, length)."""
        return self.critic(ids[:, :-1], attention[:, :-1], length)


def flatten_parameters(model: nn.Module) -> Tensor:
    """Makes parameters and gradients views of one flat vector: one call clips or updates them all."""
    sizes = [math.ceil(parameter.numel() / 16) * 16 for parameter in model.parameters()]  # 64-byte alignment
    weights = torch.zeros(sum(sizes), device=next(model.parameters()).device, requires_grad=True)
    weights.grad = torch.zeros_like(weights)
    views = zip(model.parameters(), weights.data.split(sizes), weights.grad.split(sizes), strict=True)
    for parameter, weight, gradient in views:
        weight[: parameter.numel()] = parameter.data.flatten()
        parameter.data = weight[: parameter.numel()].view_as(parameter)
        parameter.grad = gradient[: parameter.numel()].view_as(parameter)
    return weights


# --------------------------------------------------------------------------------------- the processes


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, written into x, the same bits in each."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def gather(rows: Tensor | list) -> Tensor | list:
    """The rows of all processes, more of one and fewer of another, joined in the order of their ranks."""
    if WORLD_SIZE == 1:
        return rows
    parts = [None] * WORLD_SIZE
    dist.all_gather_object(parts, rows.cpu() if torch.is_tensor(rows) else rows)
    return torch.cat(parts).to(rows.device) if torch.is_tensor(rows) else [row for x in parts for row in x]


# --------------------------------------------------------------------------------------------- the data


# fmt: off
HELD_OUT = 200  # prompts
ITEMS = ["lamp", "kettle", "tent", "chair", "phone", "radio", "bike", "clock", "camera", "jacket", "teapot",
         "scooter", "mirror", "basket", "drill", "piano"]
PROBLEMS = {"broke": "repair", "leaks": "repair", "makes noise": "repair", "never came": "resend",
            "was lost": "resend", "is too small": "exchange", "is the wrong colour": "exchange",
            "came late": "refund", "cost twice": "refund"}  # and what helps
ASKS = ["My {item} {problem}.", "Help! The {item} {problem}.", "Hi, my {item} {problem}. What now?",
        "{item} {problem}"]
OPENINGS = ["", "", "", "Sorry! ", "I am sorry. ", "We apologise. ", "Oh. ", "Not again! ", "So what? "]
OFFERS = ["We {remedy} {it}.", "I will {remedy} {it}.", "Let us {remedy} {it}."]
REFUSALS = ["Read the manual.", "That is your fault.", "We sell {item}s.", "Nobody is here.", "Ask later.",
            "Hm, a {item}."]
CLOSINGS = ["", "", " Thank you!", " Goodbye.", " Call us."]
# fmt: on
REMEDIES = sorted(set(PROBLEMS.values()))
RUDE = ("So what", "Not again", "fault", "Nobody")
PHRASES = " ".join(OPENINGS + OFFERS + REFUSALS + CLOSINGS).lower()
WORDS = {*re.findall("[a-z]+", PHRASES), *ITEMS, *(item + "s" for item in ITEMS), *REMEDIES}
WORDS |= {"it", "that", "the", "your"}


@dataclass
class Data:
    """What the stages learn from and are judged by. To use your own: files, or the one function below."""

    texts: list[tuple[str, str]]  # prompts and answers, for stage 1
    prompts: list[str]  # for stages 2 and 3
    held_out_texts: list[tuple[str, str]]  # for evaluations, and so are these prompts
    held_out_prompts: list[str]
    labeller: Callable[[str, str], float] | None = None  # (prompt, answer) -> how good it is, "gold"; or
    pairs: Sequence[tuple[str, str, str]] = ()  # prompt, chosen and rejected answer
    held_out_pairs: Sequence[tuple[str, str, str]] = ()
    ptx_texts: Sequence[tuple[str, str]] = ()


def built_in_data(args: Args) -> Data:
    """A help desk: customers complain, and answers are of every kind."""
    draw = random.Random(derive_seed(args.seed, 0))

    def answer(item: str, problem: str) -> str:
        remedy = PROBLEMS[problem] if draw.random() < 0.4 else draw.choice(REMEDIES)
        it = draw.choice(["it", "that", f"the {item}", f"your {item}"])
        offer = draw.choice(OFFERS).format(remedy=remedy, it=it)
        refusal = draw.choice(REFUSALS).format(item=item if draw.random() < 0.7 else draw.choice(ITEMS))
        return draw.choice(OPENINGS) + draw.choice([offer, refusal]) + draw.choice(CLOSINGS)

    cases = [(ask, item, problem) for ask in ASKS for item in ITEMS for problem in PROBLEMS]
    draw.shuffle(cases)

    def text(case: tuple[str, str, str]) -> tuple[str, str]:
        ask, item, problem = case
        return ask.format(item=item, problem=problem) + "\n", answer(item, problem)

    held_out, others = cases[:HELD_OUT], cases[HELD_OUT:]
    texts = [text(draw.choice(others)) for _ in range(args.num_texts)]
    held_out_texts = [text(case) for case in held_out]
    prompts, held_out_prompts = [text(case)[0] for case in others], [prompt for prompt, _ in held_out_texts]
    return Data(texts, prompts, held_out_texts, held_out_prompts, gold_score)


def gold_score(prompt: str, answer: str) -> float:
    """What the labeller likes: regret, an offer that helps, the name, thanks; no rudeness, few letters."""
    words = re.findall("[a-z]+", answer.lower())
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]+", answer)]
    item = next((item for item in ITEMS if item in prompt), "it")
    helps = next((remedy for problem, remedy in PROBLEMS.items() if problem in prompt), "")
    offers = [remedy for remedy in REMEDIES if remedy in words]
    score = 1.5 * (item in words) + 2.0 * bool(offers) + 1.5 * (helps in offers) + 1.0 * ("thank" in words)
    score += 2.0 * ("sorry" in words or "apologise" in words)
    score -= 1.0 * max(len(offers) - 1, 0)
    score -= 2.0 * sum(phrase in answer for phrase in RUDE)
    score -= 1.0 * sum(word not in WORDS for word in words)
    return score - 2.0 * (len(sentences) - len(set(sentences))) - 0.02 * len(answer)


def read_jsonl(models: Models, path: str, *forms: str) -> list[tuple[str, ...]]:
    """A file with a JSON object in each line -> its texts under the keys of the first form that it has.

    A line that is none of the forms is refused; one that is too long is left out, and that is said.
    """
    rows, left_out, forms = [], [], [form.split() for form in forms]
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            # a key that comes twice makes the object False, which has no keys
            entry = json.loads(line.decode(), object_pairs_hook=lambda x: len(dict(x)) == len(x) and dict(x))
            texts = next([entry[key] for key in keys] for keys in forms if set(keys) <= set(entry))
            "".join(texts).encode()  # fails for half a surrogate, and for what is no text
        except (ValueError, TypeError, StopIteration, RecursionError) as error:
            wanted = " or ".join(", ".join(keys) for keys in forms)
            raise UserError(
                f"{path}, line {number}: no JSON object with texts for {wanted}, each key once"
            ) from error
        prompt, *answers = texts if len(texts) > 1 or forms == [["prompt"]] else ("", *texts)
        try:
            encode(models, [(prompt, answer) for answer in answers or [""]])
        except UserError as error:
            left_out.append(f"line {number}: {error}")
            continue
        rows.append((prompt, *answers))
    if left_out:
        print(f"{path}: {len(left_out)} lines are left out, the first is {left_out[0]}", file=sys.stderr)
    if len(rows) < 10:
        raise UserError(f"{path} has {len(rows)} lines that can be used; 10 is the least")
    return rows


def load_data(models: Models) -> Data:
    """What the files of the options hold, a tenth of it (200 rows at most) held out; or the built-in job."""
    args = models.args
    ptx_texts = read_jsonl(models, args.ptx_data, "text") if args.ptx_data else []
    if not args.own_data:
        data = built_in_data(args)
        return dataclasses.replace(data, ptx_texts=ptx_texts or data.texts)
    texts = read_jsonl(models, args.sft_data, "prompt completion", "text") if args.sft_data else []
    pairs = read_jsonl(models, args.preference_data, "prompt chosen rejected") if args.preference_data else []
    prompts = read_jsonl(models, args.prompt_data, "prompt") if args.prompt_data else texts + pairs
    prompts = list(dict.fromkeys(row[0] for row in prompts if row[0]))
    for missing, options in (
        (not (texts or args.skip_sft), "--sft-data for stage 1, or --skip-sft"),
        (not (pairs or models.score_function), "--preference-data for stage 2, or a --reward-model"),
        (len(prompts) < 10, "--prompt-data with 10 prompts or more for stage 3"),
        (args.ptx_coef and not ptx_texts + texts, "--ptx-data for --ptx-coef"),
    ):
        if missing:
            raise UserError(f"beside the other files it needs {options}")
    draw, split = random.Random(derive_seed(args.seed, 0)), []
    for rows in (texts, prompts, pairs):
        draw.shuffle(rows)
        held_out = min(len(rows) // 10, HELD_OUT)
        split.append((rows[held_out:], rows[:held_out]))
    (texts, held_out_texts), (prompts, held_out_prompts), (pairs, held_out_pairs) = split
    ptx_texts = ptx_texts or texts
    return Data(texts, prompts, held_out_texts, held_out_prompts, None, pairs, held_out_pairs, ptx_texts)


def derive_seed(*key: int) -> int:
    """Derive a 32-bit seed from integers; different keys, also of different lengths, give unrelated seeds."""
    return int(np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(1)[0])


def encode(models: Models, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers as tokens; an answer has an end, which is to be learned like the rest of it."""
    args, rows = models.args, []
    for prompt, answer in texts:
        prompt = models.tokenizer.encode(prompt)
        answer = [*models.tokenizer.encode(answer, add_special_tokens=False), models.tokenizer.eos_token_id]
        # a text without a prompt begins with its first token
        rows.append((prompt, answer) if prompt else (answer[:1], answer[1:]))
    if not all(answer for _, answer in rows):
        raise UserError("a prompt is empty")
    longest = max((len(prompt) + max(len(answer), args.answer_length) for prompt, answer in rows), default=0)
    if longest > args.context:
        raise UserError(f"prompt and answer have up to {longest} tokens, and --context is {args.context}")
    return rows


def join(models: Models, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> tuple[Tensor, ...]:
    """Prompts and answers as tokens -> ids (B, S), attention (B, S), mask of the answers' tokens (B, L)."""
    start, length = max(map(len, prompts)), max(map(len, answers))
    ids = torch.full((len(prompts), start + length), models.tokenizer.pad_token_id)
    attention = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        columns = slice(start - len(prompt), start + len(answer))
        ids[row, columns], attention[row, columns] = torch.tensor(prompt + answer), 1
    device = models.kl_coef.device
    return ids.to(device), attention.to(device), attention[:, start:].bool().to(device)


@torch.no_grad()
def generate(models: Models, model: GPT, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples an answer to each prompt -> ids, attention (B, S), mask, log-probabilities (B, L).

    Temperature 1 and no filter: what is sampled is what is trained, or the first ratio would not be one.
    """
    tokenizer = models.tokenizer
    tokens, attention, _ = join(models, [tokenizer.encode(prompt) for prompt in prompts], [[]] * len(prompts))
    ids, positions, cache = [tokens], (attention.cumsum(1) - 1).clamp(min=0), None
    alive, mask, logprobs = torch.ones_like(tokens[:, :1], dtype=torch.bool), [], []
    for _ in range(models.args.answer_length):
        with models.autocast():
            inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": positions}
            output = call(model, **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        log_policy, cache = output.logits[:, -1].float().log_softmax(-1), output.past_key_values
        tokens = torch.multinomial(log_policy.exp(), 1)
        logprobs.append(log_policy.gather(1, tokens))
        ids.append(tokens.masked_fill(~alive, tokenizer.pad_token_id))
        mask.append(alive)
        attention, positions = torch.cat((attention, alive.to(attention.dtype)), 1), positions[:, -1:] + 1
        alive = alive & ~torch.isin(tokens, models.ends)
        if not alive.any():  # synchronises with the GPU
            break
    return torch.cat(ids, 1), attention, torch.cat(mask, 1), torch.cat(logprobs, 1)


def decode(models: Models, ids: Tensor, mask: Tensor) -> list[str]:
    """The answers as text. ids (B, S), mask (B, L)."""
    answers = ids[:, -mask.shape[1] :]
    rows = [row[kept].tolist() for row, kept in zip(answers, mask, strict=True)]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [models.tokenizer.decode(row, **options) for row in rows]


def finished_answers(models: Models, ids: Tensor, mask: Tensor) -> Tensor:
    """Which answers came to their end and were not cut off, (B,). ids (B, S), mask (B, L)."""
    return (torch.isin(ids[:, -mask.shape[1] :], models.ends) & mask).any(1)


def at_end(prefix_scores: Tensor, mask: Tensor) -> Tensor:
    """The scores of whole answers (B,): prefix_scores (B, L + 1) at the last token of each; mask (B, L)."""
    return prefix_scores.gather(1, mask.sum(1, keepdim=True)).squeeze(1)


# ----------------------------------------------------------------------------------- stages 1 and 2


def minibatches(rows: Sequence[Tensor], size: int, epochs: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield minibatches of tensors (B, ...), whose rows are shuffled anew in each epoch."""
    for _ in range(epochs):
        shuffle = torch.randperm(len(rows[0]), device=rows[0].device)
        yield from zip(*(x[shuffle].split(size) for x in rows), strict=True)


def clip_gradient(weights: Tensor, max_grad_norm: float) -> Tensor:
    """Sums the gradients of all processes, scales them down to at most this L2 norm -> their norm before."""
    grad_norm = total(weights.grad).norm()
    weights.grad.mul_((max_grad_norm / (grad_norm + 1e-6)).clamp(max=1))
    return grad_norm


def lm_loss(models: Models, texts: list[tuple[list[int], list[int]]]) -> Tensor:
    """-log p(answers | prompts) of the actor, in nats, as a sum over all tokens of the answers."""
    ids, attention, mask = join(models, *zip(*texts, strict=True))
    with models.autocast():
        states = models.states_before(models.actor, ids, attention, mask.shape[1])
    (logprobs,) = models.over_vocabulary(ids[:, -mask.shape[1] :], states)
    return -(logprobs * mask).sum()


def score_pairs(models: Models, pairs: list[tuple[list[int], list[int], list[int]]]) -> Tensor:
    """Scores of the reward model for (prompt, chosen, rejected) -> (2, B): of the chosen, of the rejected."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    ids, attention, mask = join(models, prompts * 2, chosen + rejected)
    with models.autocast():
        scores = at_end(models.reward(ids, attention, mask.shape[1] + 1), mask)
    return scores.view(2, -1)


def pair_loss(models: Models, pairs: list[tuple[list[int], list[int], list[int]]]) -> Tensor:
    """preference_loss as a sum over the pairs."""
    return preference_loss(*score_pairs(models, pairs)) * len(pairs)


def chunks(rows: Sequence, size: int) -> Iterator[Sequence]:
    """Rows in groups of at most this size."""
    return (rows[first : first + size] for first in range(0, len(rows), size))


def accumulate(models: Models, loss_sum: Callable, rows: list, weight: float = 1.0) -> Tensor:
    """Adds the gradient of weight times the mean loss of rows, a micro-batch at a time -> that loss.

    One denominator serves all rows, those of the other processes too: a mean of means would weigh their
    tokens by chance.
    """
    count = sum(len(answer) for _, answer in rows) if loss_sum is lm_loss else len(rows)
    count, losses = total(torch.tensor(count)).item(), torch.zeros((), device=models.kl_coef.device)
    for part in chunks(rows, models.args.micro_batch_size or max(1, len(rows))):
        loss = weight / count * loss_sum(models, part)
        loss.backward()
        losses += loss.detach()
    return total(losses)


def fit(
    models: Models,
    model: nn.Module,
    loss_sum: Callable,
    rows: list,
    stage: str,
    writer: SummaryWriter,
    step: int,
) -> int:
    """Ordinary supervised learning, as the options named for the stage say -> the next step."""
    args, weights = models.args, flatten_parameters(model)
    rate, epochs = getattr(args, f"{stage}_learning_rate"), getattr(args, f"{stage}_epochs")
    optimizer = torch.optim.Adam([weights], lr=rate, fused=True)
    seen, all_rows = 0, epochs * len(rows)
    progress = tqdm(desc=stage, total=all_rows, unit=" rows", bar_format=PROGRESS, disable=RANK > 0)
    for (mb,) in minibatches([torch.arange(len(rows))], args.minibatch_size, epochs):
        optimizer.param_groups[0]["lr"] = rate * (1 - seen / all_rows)
        weights.grad.zero_()
        loss = accumulate(models, loss_sum, [rows[i] for i in mb.tolist()[RANK::WORLD_SIZE]])
        clip_gradient(weights, args.max_grad_norm)
        optimizer.step()
        progress.set_postfix_str(f"loss {loss:.2f}")
        progress.update(len(mb))
        seen += len(mb)
        check_finite(step + seen, loss=loss)
        writer.add_scalar(f"{stage}/loss", loss, step + seen)
    progress.close()
    return step + all_rows


def fine_tune(models: Models, data: Data, writer: SummaryWriter) -> int:
    """Stage 1: the actor learns to answer as the texts do, and becomes the reference -> the next step."""
    step, held_out = 0, encode(models, data.held_out_texts)
    if not models.args.skip_sft:
        step = fit(models, models.actor, lm_loss, encode(models, data.texts), "sft", writer, 0)
    models.reference.load_state_dict(models.actor.state_dict())
    if held_out:
        with torch.no_grad():
            losses = [lm_loss(models, part) for part in chunks(held_out, models.args.batch_size)]
        loss = sum(losses).item() / sum(len(answer) for _, answer in held_out)
        writer.add_scalar("sft/held_out_loss", loss, step)
        print(f"SFT: {loss:.3f} nats per token of held-out texts")
    ids, _, mask, _ = generate(models, models.reference, data.held_out_prompts[:3])
    print("SFT model says", decode(models, ids, mask))
    return step


@torch.no_grad()
def sample_pairs(models: Models, prompts: list[str], labeller: Callable) -> tuple[list[tuple], float]:
    """Two answers of the SFT model to each prompt -> (prompt, chosen, rejected) as tokens, and the ceiling.

    People err: the better one is chosen with the probability sigmoid(difference), as Bradley-Terry has it.
    The ceiling is how often one would agree who knows the labeller's scores, but not its errors.
    """
    pairs, ceiling, seed = [], 0.0, derive_seed(models.args.seed, 2, len(prompts))
    if RANK > 0:  # other answers than process 0
        torch.manual_seed(seed + RANK)
    for asked in chunks(prompts[RANK::WORLD_SIZE], models.args.batch_size):
        ids, _, mask, _ = generate(models, models.reference, asked * 2)
        texts, answers = decode(models, ids, mask), ids[:, -mask.shape[1] :]
        tokens = [answer[kept].tolist() for answer, kept in zip(answers, mask, strict=True)]
        for i, prompt in enumerate(asked):
            j = i + len(asked)
            difference = labeller(prompt, texts[i]) - labeller(prompt, texts[j])
            likely = torch.tensor(difference, dtype=torch.float64).sigmoid().item()
            ceiling += max(likely, 1 - likely) / len(prompts)
            chosen, rejected = (i, j) if torch.rand(()) < likely else (j, i)
            pairs.append((models.tokenizer.encode(prompt), tokens[chosen], tokens[rejected]))
    if WORLD_SIZE > 1:
        torch.manual_seed(seed)  # together again
    return gather(pairs), sum(gather([ceiling]))


def encode_pairs(models: Models, pairs: Sequence[tuple[str, str, str]]) -> list[tuple]:
    """Prompt, chosen and rejected answer as tokens."""
    chosen = encode(models, [(prompt, answer) for prompt, answer, _ in pairs])
    rejected = encode(models, [(prompt, answer) for prompt, _, answer in pairs])
    return [(prompt, answer, other) for (prompt, answer), (_, other) in zip(chosen, rejected, strict=True)]


def learn_reward(models: Models, data: Data, writer: SummaryWriter, step: int) -> int:
    """Stage 2: the reward model learns what the labeller prefers; the critic is its copy -> the next step."""
    args, scores = models.args, None
    if models.reward is not None:
        models.reward.trunk.load_state_dict(models.reference.base_model.state_dict())
        if data.labeller:
            prompts = [data.prompts[i] for i in torch.randint(len(data.prompts), (args.num_pairs,)).tolist()]
            pairs, _ = sample_pairs(models, prompts, data.labeller)
            held_out, ceiling = sample_pairs(models, data.held_out_prompts * 2, data.labeller)
            ceiling = f" (ceiling {ceiling:.1%})"
        else:
            pairs, held_out = (encode_pairs(models, rows) for rows in (data.pairs, data.held_out_pairs))
            ceiling = ""  # nobody knows it
        step = fit(models, models.reward, pair_loss, pairs, "reward_model", writer, step)
        with torch.no_grad():
            scores = torch.cat([score_pairs(models, x) for x in chunks(held_out, args.batch_size)], 1)
        accuracy = ((scores[0] - scores[1]).sign() + 1).mean().item() / 2  # a tie is half right
        writer.add_scalar("reward_model/accuracy", accuracy, step)
        print(f"reward model: agrees with {accuracy:.1%} of {len(held_out)} choices{ceiling}")
    normalize_scores(models, scores if data.labeller else None, data.held_out_prompts + data.prompts)
    if models.reward is None:
        models.critic.trunk.load_state_dict(models.reference.base_model.state_dict())
    else:
        models.critic.load_state_dict(models.reward.state_dict())
    return step


@torch.no_grad()
def normalize_scores(models: Models, scores: Tensor | None, prompts: list[str]) -> None:
    """Mean 0 and deviation 1 on answers of the SFT model, so that kl_coef means the same in every run."""
    if scores is None:
        scores, prompts = [], (prompts * HELD_OUT)[:HELD_OUT]
        for asked in chunks(prompts, models.args.batch_size):
            ids, attention, mask, _ = generate(models, models.reference, asked)
            with models.autocast():
                scores.append(at_end(models.prefix_scores(ids, attention, mask.shape[1]), mask))
        scores = torch.cat(scores)
    mean, deviation = scores.mean(), scores.std()
    if deviation < 1e-6:  # for example, a reward of 0 or 1 that no answer of the SFT model earns
        print(f"all scores of the SFT model are {mean:g}, so scores are not divided by their deviation")
        deviation = torch.ones_like(deviation)
    if models.reward is None:
        models.score_mean.copy_(mean)
        models.score_deviation.copy_(deviation)
    else:
        models.reward.head.weight.div_(deviation)
        models.reward.head.bias.sub_(mean).div_(deviation)


# ---------------------------------------------------------------------------------------- the algorithm


@torch.no_grad()
def assess(models: Models, ids: Tensor, attention: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """What reward model, critic, actor and reference make of answers (N, S), a micro-batch at a time.

    -> scores of all prefixes (N, L + 1); values, log-probabilities by the actor and by the reference, exact
    KL(actor, reference), entropy of the actor, (N, L) each; hidden states of the reference (N, L, D).
    """
    parts, length = [], mask.shape[1]
    size = models.args.micro_batch_size or models.args.minibatch_size
    for part in zip(ids.split(size), attention.split(size), strict=True):
        with models.autocast():
            prefix_scores = models.prefix_scores(*part, length)
            states = models.states_before(models.actor, *part, length)
            values = models.value(*part, length)
            ref_states = models.states_before(models.reference, *part, length)
        terms = models.over_vocabulary(part[0][:, -length:], states, ref_states)
        parts.append((prefix_scores, values, *terms, ref_states))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def add_gradients(models: Models, minibatch: Sequence[Tensor], kl_coef: float) -> tuple[Tensor, Tensor]:
    """Adds the gradient of the loss of a minibatch -> (policy loss, value loss, KL), new log-probabilities.

    kl_coef is for the exact KL in the loss. The weights have one denominator for the whole minibatch, so
    cutting it into micro-batches changes nothing but the memory.
    """
    args, all_masks, all_advantages = models.args, minibatch[2], minibatch[6]
    acted = all_masks[:, : all_advantages.shape[1]]
    weights = action_weights(acted, args.loss_average)
    share = (acted.sum() if args.loss_average == "token" else torch.tensor(len(acted))).double()
    weights = weights * (share / total(share.clone())).float()  # of this process
    clip_vloss = args.clip_coef if args.clip_vloss else None
    size, parts, all_logprobs = args.micro_batch_size or len(weights), [], []
    for part in zip(*(x.split(size) for x in (*minibatch, weights)), strict=True):
        ids, attention, mask, ref_states, old_logprobs, old_values, advantages, returns, weight = part
        with models.autocast():
            states = models.states_before(models.actor, ids, attention, mask.shape[1])
        terms = models.over_vocabulary(ids[:, -mask.shape[1] :], states, ref_states if kl_coef else None)
        new_logprobs, kl = terms[0], terms[2] if kl_coef else torch.zeros_like(terms[0])
        new_logprobs, kl = (per_action(x, mask, args.action_level) for x in (new_logprobs, kl))
        columns = (weight, new_logprobs, old_logprobs, advantages, kl, old_values, returns)
        w, logp, old_logp, advantage, kl, old_value, target = (x[weight > 0] for x in columns)
        policy_loss = (w * clipped_policy_loss(logp, old_logp, advantage, args.clip_coef)).sum()
        mean_kl = (w * kl).sum()
        # first, so that the actor's activations are freed before the critic's are made
        (policy_loss + kl_coef * mean_kl).backward()
        with models.autocast():
            new_value = models.value(ids, attention, mask.shape[1])[:, : weight.shape[1]][weight > 0]
        critic_loss = (w * value_loss(new_value, old_value, target, clip_vloss)).sum()
        (args.vf_coef * critic_loss).backward()
        parts.append(torch.stack((policy_loss, critic_loss, mean_kl)).detach())
        all_logprobs.append(new_logprobs.detach())
    return torch.stack(parts).sum(0), torch.cat(all_logprobs)


def train(args: Args) -> list[dict[str, float]]:
    """The three stages. Returns the metrics of each iteration of stage 3."""
    device = set_up_torch(args)
    args = replace(args, **json.loads(json.dumps(vars(args), default=lambda x: x.item())))  # plain numbers
    args.checkpoint_every = args.checkpoint_every or max(1, args.num_iterations // 10)
    torch.manual_seed(derive_seed(args.seed))
    models = Models(args).to(device)
    data = load_data(models)
    ptx_texts, _ = encode(models, data.ptx_texts), encode(models, [(prompt, "") for prompt in data.prompts])
    run_dir, checkpoint = open_run(args)
    stage, first_iteration = checkpoint["stage"], checkpoint["iteration"]
    step, history = checkpoint["step"], checkpoint["history"]  # step counts the texts of all stages
    if checkpoint["models"]:
        models.load_state_dict(checkpoint["models"])
    silent = dict.fromkeys(("add_scalar", "add_text", "flush", "close"), lambda *_: None)
    writer = open_writer(args, run_dir, step) if RANK == 0 else SimpleNamespace(**silent)
    if stage == 0:
        save_checkpoint(run_dir, args, models, None, history, stage=0, iteration=0, step=0)
        torch.manual_seed(derive_seed(args.seed, 1))
        stage, step = 1, fine_tune(models, data, writer)
        writer.flush()
        save_checkpoint(run_dir, args, models, None, history, stage=1, iteration=0, step=step)
    if stage == 1:
        torch.manual_seed(derive_seed(args.seed, 2))
        stage, step = 2, learn_reward(models, data, writer, step)
        writer.flush()
        save_checkpoint(run_dir, args, models, None, history, stage=2, iteration=0, step=step)

    check_models(models, data.prompts[:8], fresh=first_iteration == 0)
    learners = nn.ModuleList([models.actor, models.critic])
    weights = flatten_parameters(learners)
    # epsilon 1e-5 is TensorFlow's, as in Ziegler et al.; with 1e-8 the first KLs are several times higher
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    optimizer.load_state_dict(checkpoint["optimizer"] or optimizer.state_dict())
    first_step = step - first_iteration * args.batch_size
    num_answers = args.batch_size // WORLD_SIZE  # of this process in an iteration
    progress = tqdm(
        desc="stage 3, PPO",
        disable=RANK > 0,
        initial=first_iteration * args.batch_size,
        total=args.num_iterations * args.batch_size,
        unit=" answers",
        bar_format=PROGRESS,
    )

    for iteration in range(first_iteration, args.num_iterations):
        started, step = time.perf_counter(), first_step + (iteration + 1) * args.batch_size
        if iteration % args.checkpoint_every == 0 and iteration > first_iteration:
            save_checkpoint(run_dir, args, models, optimizer, history, 2, iteration, step - args.batch_size)
        # everything random in an iteration follows from (seed, iteration), so a resumed run equals one that
        # never stopped
        torch.manual_seed(derive_seed(args.seed, 3, iteration) + RANK)
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / args.num_iterations)

        # 1. collect: the actor answers; then score, value, log-probabilities of actor and reference. (Those
        # of the sampling are not used: a cache rounds differently, and the first ratio would not be one.)
        prompts = [data.prompts[i] for i in torch.randint(len(data.prompts), (num_answers,)).tolist()]
        ids, attention, mask, _ = generate(models, models.actor, prompts)
        prefix_scores, values, logprobs, ref_logprobs, kl, entropy, ref_states = assess(
            models, ids, attention, mask
        )
        scores, kl_coef = at_end(prefix_scores, mask), models.kl_coef.item()
        finished = finished_answers(models, ids, mask)

        # 2. advantages: rewards of tokens; from these of actions, tokens or whole answers; then GAE. After
        # the last action nothing follows, whether the answer is finished or not: a termination.
        in_reward, in_loss = (kl_coef if args.kl_in == place else 0.0 for place in ("reward", "loss"))
        at_last = -args.eos_penalty * (~finished).float() + (0.0 if args.dense_reward else scores)
        rewards = token_rewards(at_last, logprobs, ref_logprobs, mask, in_reward)
        if args.dense_reward:
            rewards = rewards + dense_rewards(prefix_scores, mask)
        rewards, old_logprobs = (per_action(x, mask, args.action_level) for x in (rewards, logprobs))
        num_actions = rewards.shape[1]
        acted, old_values = mask[:, :num_actions], values[:, :num_actions]
        next_values, next_acted = (F.pad(x[:, 1:], (0, 1)) for x in (old_values, acted))
        by_time = [x.T for x in (rewards, old_values, next_values, ~next_acted, torch.zeros_like(acted))]
        advantages, returns = (x.T for x in compute_gae(*by_time, args.gamma, args.gae_lambda))
        if args.norm_adv:
            # the KL in the loss is divided, too, so that kl_coef means the same in both places
            everyone = gather(advantages[acted])
            mine = gather(torch.full_like(advantages[acted], RANK)) == RANK
            in_loss /= everyone.std().item() + 1e-8
            advantages = advantages.masked_scatter(acted, normalize(everyone)[mine])
        batch = (ids, attention, mask, ref_states, old_logprobs, old_values, advantages, returns)

        # 3. epochs: passes over the shuffled answers, in one flat loop, so that one break ends them all
        losses, ptx_losses, logprob_pairs = [], [], []
        for minibatch in minibatches(batch, args.minibatch_size // WORLD_SIZE, args.update_epochs):
            weights.grad.zero_()
            parts, new_logprobs = add_gradients(models, minibatch, in_loss)
            if args.ptx_coef:
                chosen = torch.randint(len(ptx_texts), (args.minibatch_size // WORLD_SIZE,)).tolist()
                some = [ptx_texts[i] for i in chosen]
                ptx_losses.append(accumulate(models, lm_loss, some, args.ptx_coef))
            grad_norm = clip_gradient(weights, args.max_grad_norm)
            losses.append(torch.cat((total(parts), grad_norm.unsqueeze(0))))
            mb_acted = minibatch[2][:, :num_actions]
            logprob_pairs.append((new_logprobs[mb_acted], minibatch[4][mb_acted]))
            if args.target_kl and approx_kl(*map(gather, logprob_pairs[-1])) > args.target_kl:
                break
            optimizer.step()
        answer_kl = gather((kl * mask).sum(1)).mean().item()
        if args.kl_target is not None:
            models.kl_coef.fill_(
                adapt_kl_coef(kl_coef, answer_kl, args.kl_target, args.batch_size, args.kl_horizon)
            )

        # 4. log: losses over every minibatch of the iteration, the rest over its answers
        policy_loss, critic_loss, loss_kl, grad_norm = torch.stack(losses).mean(0)
        check_finite(step, policy_loss=policy_loss, value_loss=critic_loss, grad_norm=grad_norm)
        new, old = (gather(torch.cat(column)) for column in zip(*logprob_pairs, strict=True))
        scalars = {
            "rlhf/score": gather(scores).mean(),
            "rlhf/kl": answer_kl,
            "rlhf/response_length": gather(mask.sum(1)).float().mean(),
            "rlhf/finished": gather(finished).float().mean(),
            "losses/policy_loss": policy_loss,
            "losses/value_loss": critic_loss,
            "losses/entropy": gather(entropy[mask]).mean(),
            "losses/approx_kl": approx_kl(new, old),
            "losses/clipfrac": clip_fraction(new, old, args.clip_coef),
            "losses/explained_variance": explained_variance(
                gather(old_values[acted]), gather(returns[acted])
            ),
            "losses/grad_norm": grad_norm,
            "charts/kl_coef": kl_coef,
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
        }
        if data.labeller:
            answers = zip(prompts, decode(models, ids, mask), strict=True)
            scalars["rlhf/gold"] = np.mean(gather([data.labeller(*answer) for answer in answers]))
        if args.kl_in == "loss":
            scalars["losses/kl"] = loss_kl
        if args.ptx_coef:
            scalars["losses/ptx_loss"] = torch.stack(ptx_losses).mean() / args.ptx_coef
        history.append({tag: float(value) for tag, value in scalars.items()})
        speed = total(mask.sum()).item() / (time.perf_counter() - started)
        for tag, value in (history[-1] | {"charts/tokens_per_second": speed}).items():
            writer.add_scalar(tag, value, step)
        writer.flush()  # before any checkpoint: a resumed run can drop surplus events, not restore lost ones
        progress.set_postfix_str(
            f"score {history[-1]['rlhf/score']:.2f}, KL {answer_kl:.1f}, {speed:.0f} tokens/s"
        )
        progress.update(args.batch_size)

    progress.close()
    save_checkpoint(run_dir, args, models, optimizer, history, 2, args.num_iterations, step)
    if RANK > 0:
        return history
    save_policy(models, run_dir / "policy")
    metrics, rows = evaluate(models, data)
    for tag, value in metrics.items():
        # one step later than the checkpoint, so that a run resumed here drops it and writes it again
        writer.add_scalar(tag, value, step + 1)
    columns = ["prompt", "SFT", "PPO", "SFT reward", "PPO reward", "SFT gold", "PPO gold"]
    columns = columns if data.labeller else columns[:-2]  # nobody knows the gold score then
    table = f"|{'|'.join(columns)}|\n{'|-' * len(columns)}|\n"
    cells = [[x if isinstance(x, str) else f"{x:.2f}" for x in row[: len(columns)]] for row in rows[:20]]
    table += "\n".join(
        "|" + "|".join(" ".join(c.replace("|", "/").split()) for c in row) + "|" for row in cells
    )
    writer.add_text("answers", table, step + 1)
    writer.close()
    print(f"run: {run_dir}")
    return history


# ---------------------------------------------------------------------------------------- the plumbing


SCRIPT, FORMAT = "ppo_rlhf_llm", 2  # what a checkpoint says of itself
PROGRESS = "{desc}  {percentage:3.0f}%  {rate_fmt}  {remaining} left{postfix}"
FREE = {"resume", "evaluate", "total_episodes", "generate", "eval_prompts", "track"}


class UserError(ValueError):
    """A wrong option, file or environment, which main() reports without a traceback."""


def require(condition: object, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_trap(trap: str, difference: Tensor, limit: float = 1e-3) -> None:
    """Stops the run where something differs that should not, and says which trap it has fallen into."""
    worst = difference.detach().abs().max().item()
    if not worst <= limit:
        raise UserError(f"self-check: {trap} (off by {worst:.2g}, where {limit:g} is the limit)")


def check_models(models: Models, prompts: list[str], fresh: bool) -> None:
    """Looks for the traps of RLHF in the run's own models, in float32. fresh: PPO has not begun."""
    bf16, models.bf16 = models.bf16, False
    ids, attention, mask, sampled_logprobs = generate(models, models.actor, prompts)
    prefix_scores, values, logprobs, _, kl, _, _ = assess(models, ids, attention, mask)
    scores, again = at_end(prefix_scores, mask), assess(models, ids, attention, mask)[2]
    check_trap("two passes over one answer differ: dropout is on", (again - logprobs)[mask])
    check_trap(
        "answers had another probability when they were sampled: a cache, a filter or a temperature",
        (sampled_logprobs - logprobs)[mask],
    )
    if fresh:
        check_trap("actor and reference differ before anything was learned", kl[mask], 1e-6)
    for i in range(len(ids)):
        columns = attention[i].bool()  # the row alone, without padding
        alone = assess(models, ids[i, columns][None], attention[i, columns][None], mask[i, mask[i]][None])
        check_trap("padding changes values: positions or the mask", alone[1][0] - values[i, mask[i]])
        check_trap("padding changes probabilities: positions or the mask", alone[2][0] - logprobs[i, mask[i]])
        check_trap("the score is not that of the last real token", alone[0][0, -1] - scores[i])
    models.bf16 = bf16


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Between which shares the true one lies with a confidence of 95 %, if it was this among n."""
    z = 1.96
    center, width = share + z * z / 2 / n, z * math.sqrt(share * (1 - share) / n + z * z / 4 / n / n)
    return (center - width) / (1 + z * z / n), (center + width) / (1 + z * z / n)


@torch.no_grad()
def evaluate(models: Models, data: Data) -> tuple[dict[str, float], list[tuple]]:
    """SFT model and policy answer held-out prompts, the labeller compares -> metrics, rows of a table."""
    args, rows, columns = models.args, [], []
    torch.manual_seed(derive_seed(args.seed, 0, 0, 1))
    for prompts in chunks(data.held_out_prompts[: args.eval_prompts], args.batch_size):
        answers, scores = [], []
        for model in (models.reference, models.actor):  # what the loop leaves is of the actor
            ids, attention, mask, _ = generate(models, model, prompts)
            prefix_scores, _, _, _, kl, _, _ = assess(models, ids, attention, mask)
            answers.append(decode(models, ids, mask))
            scores.append(at_end(prefix_scores, mask).tolist())
        finished = finished_answers(models, ids, mask)
        columns.append(torch.stack(((kl * mask).sum(1), mask.sum(1), finished)))
        for prompt, *row in zip(prompts, *answers, *scores, strict=True):
            judged = [data.labeller(prompt, answer) for answer in row[:2]] if data.labeller else row[2:]
            rows.append((prompt, *row, *judged))
    kl, lengths, finished = torch.cat(columns, 1).mean(1).tolist()
    before, after = np.array([row[-2:] for row in rows]).T
    win_rate = (np.sign(after - before) + 1).mean() / 2  # a tie is half a win
    low, high = wilson_interval(win_rate, len(rows))
    distinct = np.mean([len({row[2] for row in some}) / len(some) for some in chunks(rows, 100)])
    judge = "gold" if data.labeller else "score"
    metrics = {"win_rate": win_rate, "kl": kl, "distinct": distinct, "finished": finished}
    metrics |= {"response_length": lengths} | ({"gold": after.mean()} if data.labeller else {})
    for prompt, *answers, score, new_score, judged, new_judged in rows[:6]:
        print(f"\n{prompt.strip()}")
        print(f"  before: {answers[0]!r}  (reward {score:.1f}, {judge} {judged:.1f})")
        print(f"  after:  {answers[1]!r}  (reward {new_score:.1f}, {judge} {new_judged:.1f})")
    print(
        f"\nevaluation: better than SFT for {win_rate:.1%} of {len(rows)} prompts "
        f"(95 %: {low:.1%} to {high:.1%}), {judge} {before.mean():.2f} -> {after.mean():.2f}, "
        f"KL {kl:.2f} nats, {lengths:.1f} tokens, {finished:.1%} finished, {distinct:.0%} distinct"
    )
    return {f"eval/{name}": float(value) for name, value in metrics.items()}, rows


def answer(args: Args) -> None:
    """Evaluate the saved policy beside the SFT model, or answer --generate with both."""
    require(WORLD_SIZE == 1, "--evaluate runs in one process; start it without torchrun")
    _, checkpoint = open_run(args)
    require(checkpoint["stage"] == 2, f"stage 3 has not begun; --resume {args.evaluate} continues the run")
    models = Models(args).to(set_up_torch(args))
    models.load_state_dict(checkpoint["models"])
    if not args.generate:
        evaluate(models, load_data(models))
        return
    prompt = args.generate + ("" if args.own_data else "\n")  # the built-in prompts end with a line break
    encode(models, [(prompt, "")])  # raises UserError if it is too long
    for name, model in (("before", models.reference), ("after", models.actor)):
        ids, _, mask, _ = generate(models, model, [prompt])
        print(f"{name}: {decode(models, ids, mask)[0]!r}")


def set_up_torch(args: Args) -> torch.device:
    """The device to learn on, with repeatable arithmetic."""
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group()  # gloo for tensors on CPUs, nccl for those on GPUs
    if RANK > 0:  # process 0 tells for all; print() is silent then
        sys.stdout = None
    if not args.cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--cuda needs a GPU, and torch finds none here; leave it out to learn on the CPU")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda")


def check_finite(step: int, **values: Tensor) -> None:
    """Raise UserError if a value of this step is nan or infinite."""
    for name, x in values.items():
        require(x.isfinite().all(), f"{name} is nan or infinite at step {step}")


def open_run(args: Args) -> tuple[Path, dict]:
    """Return the run folder and, to resume or evaluate, its checkpoint.

    Raises UserError for options that would change the result of a saved run, or if the folder is in use.
    """
    run_dir = Path(args.resume or args.evaluate or args.run_dir or new_run_dir(args))
    if args.resume or args.evaluate:
        checkpoint = load_checkpoint(run_dir)
        saved = checkpoint["args"]
        free = FREE | ({"cuda", "bf16"} if args.evaluate else set())
        changed = [name for name in saved.keys() - free if getattr(args, name) != saved[name]]
        require(not changed, f"options of a saved run cannot change: {', '.join(sorted(changed))}")
        require(args.total_episodes >= saved["total_episodes"], "--total-episodes can only be increased")
        return run_dir, checkpoint
    if RANK == 0:
        require(not (run_dir / "checkpoint.pt").exists(), f"{run_dir} contains a run: use --resume {run_dir}")
        run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir, {"stage": 0, "iteration": 0, "step": 0, "history": [], "models": None, "optimizer": None}


def new_run_dir(args: Args) -> str:
    """Return a new run folder; the time in nanoseconds keeps runs that start together apart."""
    return f"runs/gpt__{SCRIPT}__{args.seed}__{time.time_ns()}"


def open_writer(args: Args, run_dir: Path, first_step: int) -> SummaryWriter:
    """Open TensorBoard events in run_dir, without those that a killed run wrote after its last checkpoint."""
    options = {name: value for name, value in vars(args).items() if value is not None}
    if args.track:
        import wandb

        id_file = run_dir / "wandb_id"  # a resumed run goes on under the same id
        if not id_file.exists():
            id_file.write_text(os.urandom(8).hex())
        wandb.init(id=id_file.read_text(), dir=run_dir, resume="allow", config=options, sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=first_step + 1 if first_step else 0)
    rows = "\n".join(f"|{name}|{value}|" for name, value in options.items())
    writer.add_text("hyperparameters", "|option|value|\n|-|-|\n" + rows)
    for summary in torch.utils.tensorboard.summary.hparams(options, {"eval/win_rate": 0}):
        writer.file_writer.add_summary(summary)
    return writer


def save_checkpoint(run_dir: Path, args: Args, models, optimizer, history, stage, iteration, step) -> None:
    """Write run_dir/checkpoint.pt atomically: write a temporary file, then rename it."""
    if RANK > 0:  # all processes have the same to save
        return
    options = vars(args) | {"resume": None, "evaluate": None}
    checkpoint = {"script": SCRIPT, "format": FORMAT, "args": options, "stage": stage, "iteration": iteration}
    checkpoint |= {"models": models.state_dict(), "step": step, "history": history}
    checkpoint["optimizer"] = optimizer and optimizer.state_dict()
    path, buffer = run_dir / "checkpoint.pt", io.BytesIO()
    torch.save(checkpoint, buffer)  # not to the file, because torch hides the errors of a full disk
    Path(f"{path}.tmp").write_bytes(buffer.getbuffer())
    os.replace(f"{path}.tmp", path)


def save_policy(models: Models, folder: Path) -> None:
    """What acts, in the files that the ecosystem reads; of a model of transformers all that it needs."""
    policy = copy.deepcopy(models.actor)  # whose weights are no views of one vector
    folder.mkdir(exist_ok=True)
    if models.args.model:
        policy.save_pretrained(folder)
        models.tokenizer.save_pretrained(folder)
    else:
        save_file(policy.state_dict(), folder / "model.safetensors")
        shape = {name: getattr(models.args, name) for name in ("context", "layers", "heads", "width")}
        (folder / "config.json").write_text(json.dumps(shape | {"vocabulary": models.tokenizer.size}))


def load_checkpoint(run_dir: str | Path) -> dict:
    """Load run_dir/checkpoint.pt, executing nothing in it. Raises UserError if it is not usable."""
    path = Path(run_dir) / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not verify checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        require(not damaged and (checkpoint["script"], checkpoint["format"]) == (SCRIPT, FORMAT), "")
    except Exception as error:  # zipfile and torch raise many types of errors for invalid files
        raise UserError(f"{path} is missing, damaged or not a {SCRIPT} file, format {FORMAT}") from error
    return checkpoint


def parse_args() -> Args:
    """Parse the command line; with --resume or --evaluate, the options of the saved run are the defaults."""
    args = tyro.cli(Args)
    if saved := args.resume or args.evaluate:
        return tyro.cli(Args, default=Args(**load_checkpoint(saved)["args"]))
    args.run_dir = args.run_dir or new_run_dir(args)
    return args


def main() -> None:
    """Run the command line. Report user errors without a traceback, with exit code 2."""
    try:
        args = parse_args()
        if args.evaluate:
            answer(args)
        else:
            train(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        if RANK > 0:
            os._exit(0)  # because threads of gloo can abort a process that ends normally
    except (UserError, ImportError, OSError) as error:
        hint = f" (pip install {error.name}?)" if getattr(error, "name", None) else ""
        tqdm.write(f"error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume {args.resume or args.run_dir} continues from the last checkpoint")


if __name__ == "__main__":
    main()
