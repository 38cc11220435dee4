# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "numpy>=2", "tyro>=1.0.17", "tensorboard>=2.18", "tqdm>=4.60"
# ]
# ///
"""Reinforcement learning from human feedback (RLHF) with PPO, in one file.

    python ppo_rlhf_llm.py                                 all three stages, two to three minutes
    tensorboard --logdir runs                              show the curves and answers
    torchrun --nproc-per-node=2 ppo_rlhf_llm.py            train in two processes
    python ppo_rlhf_llm.py --resume runs/NAME              continue a run exactly
    python ppo_rlhf_llm.py --evaluate runs/NAME            compare the saved policy with the SFT model
    python ppo_rlhf_llm.py --evaluate runs/NAME --generate "My kettle leaks."
    python ppo_rlhf_llm.py --cuda --model PATH_OR_ID --sft-data FILE --preference-data FILE --prompt-data FILE

Stage 1, supervised fine-tuning (SFT): a language model learns to answer as in the texts. Stage 2, reward
model: a copy of it is trained on pairs of answers to predict which one a labeller prefers. Stage 3, PPO: the
language model learns to give answers with high scores, while a KL penalty keeps it close to the SFT model.
By default nothing is downloaded: a small grammar generates the texts, and a labeller that follows rules
generates the preferences. With --model (transformers) and JSONL files the same code uses real data.

Papers: PPO, Schulman et al. 2017, https://arxiv.org/abs/1707.06347; RLHF, Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593; InstructGPT, Ouyang et al. 2022, https://arxiv.org/abs/2203.02155.
Read from top to bottom: options, maths, models, data, log-probabilities, stages, train(), utilities.

Left out: 1. quantisation; 2. inference servers; 3. top-k and top-p, because the sampling distribution must be
the training distribution; 4. best-of-n, DPO and GRPO, which are other algorithms.

Shapes: N answers of an iteration, B of a minibatch, P tokens of the longest prompt, L of the longest answer,
S = P + L, V tokens in the vocabulary, D numbers in a hidden state. Prompts are padded on the left and answers
on the right, so that every answer begins in column P. Answer token t is sampled from the output at column
P + t - 1. (In functions shared with the other scripts T is L, and A is V.)
"""

import copy
import functools
import hashlib
import inspect
import json
import math
import os
import pkgutil
import random
import re
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


@dataclass
class Args:
    """RLHF: supervised fine-tuning, a reward model, then PPO with a KL penalty."""

    total_episodes: int = 7680
    """answers of stage 3 over the whole run, rounded down to whole iterations"""
    learning_rate: float = 2e-4
    """step size of Adam in stage 3"""
    critic_learning_rate: float | None = None
    """step size of Adam for the critic (None: learning_rate)"""
    critic_warmup: int = 0
    """iterations at the start of stage 3 in which only the critic learns"""
    batch_size: int = 64
    """answers per iteration of stage 3 (N), summed over all processes"""
    answer_length: int = 56
    """maximum length of a sampled answer in tokens"""
    answers_per_prompt: int = 1
    """answers to each prompt of an iteration"""
    temperature: float = 1.0
    """divisor of the logits when sampling (in all stages), and when learning in stage 3"""
    anneal_lr: bool = True
    """decrease the learning rate of stage 3 linearly to zero"""
    gamma: float = 1.0
    """discount factor (gamma)"""
    gae_lambda: float = 0.95
    """bias-variance trade-off of the advantages (lambda): 0 is one-step TD, 1 is Monte Carlo"""
    critic_lambda: float | None = None
    """lambda of the returns that the critic learns (None: gae_lambda)"""
    num_minibatches: int = 4
    """minibatches per epoch; N answers are divided among them. Stages 1 and 2 use the same size"""
    micro_batch_size: int | None = None
    """answers (stage 2: pairs) per training pass: saves memory, same result up to rounding (None: all)"""
    update_epochs: int = 2
    """passes over the answers of an iteration (K)"""
    norm_adv: bool = True
    """normalise the advantages of each iteration, over all actions of a process"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio (epsilon)"""
    clip_coef_high: float | None = None
    """clipping range above 1, if it differs from the one below (None: clip_coef)"""
    clip_vloss: bool = False
    """clip the value loss with clip_coef"""
    vf_coef: float = 0.1
    """coefficient of the value loss; as the critic is a separate model, Adam cancels most of it"""
    max_grad_norm: float = 1.0
    """maximum gradient norm, in stage 3 of actor and critic separately"""
    target_kl: float | None = None
    """stop the epochs at the first minibatch whose approx_kl per action exceeds this, in nats (None: off)"""
    action_level: Literal["token", "sequence"] = "token"
    """what an action is: a token, or a whole answer (one ratio, one reward, baseline V(prompt))"""
    kl_in: Literal["reward", "loss"] = "reward"
    """where the penalty acts: -log(actor / reference) in each token's reward, or the exact KL in the loss"""
    kl_coef: float = 0.1
    """initial coefficient of KL(actor, reference) (beta)"""
    kl_target: float | None = 3.0
    """target for KL(actor, reference), in nats per answer; kl_coef adapts to it (None: kl_coef is fixed)"""
    kl_horizon: int = 500
    """answers over which kl_coef changes by 20 % if the KL is 20 % or more off its target"""
    loss_average: Literal["token", "answer"] = "token"
    """weights in the loss: equal for all tokens, or equal for all answers (1/|y| for each of their tokens)"""
    dense_reward: bool = False
    """reward each token with the change of the score (else: the last token with the score)"""
    eos_penalty: float = 1.0
    """subtracted from the score of an unfinished answer, in standard deviations of the SFT model's scores"""
    ptx_coef: float = 0.0
    """coefficient of the SFT loss in stage 3 (gamma of InstructGPT)"""
    model: str | None = None
    """causal language model of transformers, a folder or hub id, used in float32 (None: the built-in GPT)"""
    reward_function: str | None = None
    """MODULE:NAME of a function (prompts, answers, other keys of the lines) -> scores, instead of stage 2"""
    lora_rank: int | None = None
    """train adapters (LoRA) of this rank beside the frozen weights of --model (None: all weights)"""
    gradient_checkpointing: bool = False
    """store fewer activations of --model and compute them again for the gradient: slower, less memory"""
    skip_sft: bool = False
    """skip stage 1, because --model is already fine-tuned"""
    sft_data: str | None = None
    """JSONL file for stage 1: prompt and completion, messages, conversations or text"""
    preference_data: str | None = None
    """JSONL file for stage 2: chosen and rejected, with or without a prompt"""
    prompt_data: str | None = None
    """JSONL file for stage 3: prompt, question, instruction, messages or conversations (None: other files)"""
    ptx_data: str | None = None
    """JSONL file for --ptx-coef, like --sft-data (None: the texts of stage 1)"""
    layers: int = 2
    """blocks of the built-in GPT"""
    heads: int = 4
    """attention heads of each block"""
    width: int = 96
    """size of a hidden state (D)"""
    context: int = 128
    """maximum length of prompt and answer together, in tokens"""
    num_texts: int = 6000
    """built-in texts for stage 1"""
    sft_epochs: int = 2
    """passes over the texts"""
    sft_learning_rate: float = 2e-3
    """step size of Adam in stage 1, decreased linearly to zero"""
    num_pairs: int = 2500
    """pairs of answers that the built-in labeller compares for stage 2"""
    reward_model_epochs: int = 1
    """passes over the pairs"""
    reward_model_learning_rate: float = 5e-4
    """step size of Adam in stage 2, decreased linearly to zero"""
    eval_prompts: int = 200
    """held-out prompts of an evaluation, at most 200"""
    eval_every: int | None = None
    """iterations between evaluations; best_policy/ has the best so far (None: evaluate only at the end)"""
    seed: int = 1
    """seed of the weights, texts, labels, minibatches and samples"""
    cuda: bool = False
    """learn on the GPU, with autocast to bfloat16"""
    run_dir: str | None = None
    """run folder (None: runs/gpt__{script}__{seed}__{time})"""
    checkpoint_every: int | None = None
    """iterations of stage 3 between checkpoints (None: a tenth of stage 3)"""
    track: bool = False
    """also log to Weights & Biases (configured by WANDB_PROJECT and WANDB_ENTITY)"""
    resume: str | None = None
    """run folder to continue, with the options it was started with"""
    evaluate: str | None = None
    """run folder whose policy to evaluate, without training"""
    generate: str | None = None
    """with --evaluate: a prompt to answer (with the markers of a chat template); nothing is evaluated"""

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return int(self.total_episodes // self.batch_size)  # in a notebook, total_episodes may be 1e4

    def __post_init__(self) -> None:
        lambdas = ("gamma", "gae_lambda", "critic_lambda")
        zero = {"critic_warmup", "vf_coef", "kl_coef", "ptx_coef", "eos_penalty", "seed", *lambdas}
        for name, x in vars(self).items():  # numbers are positive, a few may be 0, and all fit into 64 bits
            # tyro checks choices only on the command line
            choices = get_args(hint) if get_origin(hint := Args.__annotations__.get(name)) is Literal else [x]
            require(x in choices and x != "", f"{name} cannot be {x!r}")
            if isinstance(x, (int, float)) and not isinstance(x, bool):
                require(0 < x < 2**63 or x == math.inf or (x == 0 and name in zero), f"{name} cannot be {x}")
        require(not any((getattr(self, name) or 0) > 1 for name in lambdas), "gamma or a lambda exceeds 1")
        saved = self.resume or self.evaluate
        rows, share, unit = self.batch_size, self.batch_size // WORLD_SIZE, self.num_minibatches * WORLD_SIZE
        require(self.eval_prompts <= HELD_OUT, f"eval_prompts must be at most {HELD_OUT}")
        require(saved or share > 1, f"batch_size must be at least {2 * WORLD_SIZE}")
        require(saved or rows % unit == 0, f"minibatches * processes = {unit} must divide batch_size {rows}")
        require(saved or share % self.answers_per_prompt == 0, f"answers_per_prompt must divide {share}")
        require(self.width % self.heads == 0, f"width {self.width} is not divisible by heads {self.heads}")
        require(saved or self.num_iterations, f"--total-episodes must be at least batch_size {rows}")
        require(self.kl_coef or self.kl_target is None, "kl_coef 0 cannot be adapted; use --kl-target None")
        require(rows <= self.kl_horizon or self.kl_target is None, f"kl_horizon must be at least {rows}")
        unused = self.reward_function and (self.dense_reward or self.preference_data)
        require(not unused, "--dense-reward and --preference-data need stage 2, not a --reward-function")
        require(not (self.sft_data and self.skip_sft), "use --sft-data or --skip-sft, not both")
        for name in ("skip_sft", "lora_rank", "gradient_checkpointing"):
            require(self.model or not getattr(self, name), f"{name} needs --model, an already trained model")
        require(self.ptx_coef or not self.ptx_data, "--ptx-data needs --ptx-coef, which is 0")
        require(not (self.resume and self.evaluate), "use --resume or --evaluate, not both")
        require(self.evaluate or not self.generate, "--generate needs --evaluate runs/NAME")


# ------------------------------------------------------------------------------------------ the mathematics


def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda) -> tuple:
    """Compute generalised advantage estimates (PPO eq. 11-12) -> (advantages, returns = targets of V).

    All tensors are (T, N); ends of episodes are bool or 0/1. Row t is transition t, and next_values[t] is V
    of its successor. After a termination there is no future, so nothing is bootstrapped. After a truncation,
    such as a time limit, the episode could have continued: V(successor) estimates the rest. In both cases the
    next row belongs to another episode, so the sum ends. The sum also ends with row T - 1, the end of the
    rollout: V(successor) estimates the rest.
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
    """Compute log softmax(logits) of the tokens, in nats. (B, L, V), (B, L) -> (B, L)."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def categorical_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Compute KL(softmax(logits), softmax(ref_logits)) in nats, exactly. (..., A), (..., A) -> (...)."""
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef) -> Tensor:
    """Compute r_t = [t is the last token] * score - kl_coef * log(actor / reference) (InstructGPT eq. 2).

    scores (B,); log-probabilities in nats, mask and result (B, L). Among the estimators of the KL, only this
    one has the right gradient when used as a reward. Rewards after the last token are 0.
    """
    last = mask.sum(1, keepdim=True) - 1
    rewards = kl_coef * (ref_logprobs - logprobs) * mask
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def dense_rewards(prefix_scores: Tensor, mask: Tensor) -> Tensor:
    """Compute by how much each token changes the score; the sum is score(answer) - score(no answer).

    prefix_scores (B, L + 1): of the prompt alone and of all beginnings of the answer; mask (B, L) -> (B, L).
    """
    return prefix_scores.diff(dim=1) * mask


def preference_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Compute the mean of -log P(chosen is preferred), Bradley-Terry (InstructGPT eq. 1). (B,) -> ()."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def adapt_kl_coef(kl_coef: float, kl: float, kl_target: float, episodes: int, horizon: int) -> float:
    """Return the next coefficient of the KL penalty (Ziegler et al., section 2.2). KL in nats per answer.

    If the KL is off its target by a fifth or more, the coefficient changes by a fifth in horizon episodes.
    """
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return min(max(kl_coef * (1 + error * episodes / horizon), 1e-6), 1e6)


def action_weights(mask: Tensor, loss_average: str) -> Tensor:
    """Return the weights of a masked mean, which sum to 1. mask (B, L) -> (B, L).

    "token": the same weight for all tokens; "answer": the same for all answers, 1/|y| for their tokens.
    """
    lengths = mask.sum(1, keepdim=True)
    return mask / (mask.sum() if loss_average == "token" else lengths * len(mask))


def per_action(x: Tensor, mask: Tensor, action_level: str) -> Tensor:
    """Turn log-probabilities, rewards or KL of tokens (B, L) into those of actions: (B, L) or sums (B, 1)."""
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


# ----------------------------------------------------------------------------------------------- the models


class ByteTokenizer:
    """Encode a text as its UTF-8 bytes; two more tokens are the end and padding."""

    eos_token_id, pad_token_id, bos_token_id, eos_token, size = 256, 257, None, "", 258

    def encode(self, text: str, **_) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], **_) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class TrunkOutput(SimpleNamespace):
    """Output of a trunk, as in transformers: item 0 is the hidden states, missing attributes are None."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


class Block(nn.Module):
    """Attention and a feed-forward layer, with layer normalisation before and residual connections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, past: tuple | None, keep: int) -> tuple[Tensor, tuple]:
        """Apply to states (B, S, D), bias (B * heads, S, C + S) -> states of the last tokens, new cache."""
        parts = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B * heads, S, D / heads) each
        if past is not None:
            key, value = torch.cat((past[0], key), 1), torch.cat((past[1], value), 1)
        x, query, bias = x[:, -keep:], query[:, -keep:], bias[:, -keep:]  # -0: all
        # for short texts this is faster than F.scaled_dot_product_attention
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=1 / math.sqrt(query.shape[-1]))
        attended = (scores.softmax(-1) @ value).unflatten(0, (-1, self.heads))
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.feed_forward_norm(x)))), (key, value)


class Transformer(nn.Module):
    """The trunk of a GPT, with the interface of transformers."""

    def __init__(self, vocabulary: int, positions: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        # ALiBi (Press et al. 2021): attention decreases with distance, at a different rate in each head. With
        # learned positions alone, stage 1 needs twice as many steps for the same loss
        slopes = 2.0 ** (-8 / heads * torch.arange(1, heads + 1)).view(-1, 1, 1)
        self.register_buffer("slopes", slopes, persistent=False)
        for name, x in self.named_parameters():  # as in GPT-2
            if x.dim() == 2:
                residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(x, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, keep=0) -> TrunkOutput:
        """Run on tokens (B, S), mask (B, C + S), cache of C earlier tokens -> states (B, S, D), new cache.

        keep > 0: return only the states of the last tokens; the last block does not compute the others.
        """
        rows = torch.arange(attention_mask.shape[1], device=input_ids.device)
        new = rows[-input_ids.shape[1] :].unsqueeze(1)
        # no token sees the future or padding; padding sees itself, because a softmax over nothing is nan
        allowed = ((rows <= new) & attention_mask[:, None, None].bool()) | (rows == new)
        bias = torch.where(allowed, self.slopes * (rows - new), -math.inf).flatten(0, 1)
        x = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        cache = []
        for block, past in zip(self.blocks, past_key_values or [None] * len(self.blocks), strict=True):
            x, keys_and_values = block(x, bias, past, keep if block is self.blocks[-1] else 0)
            cache.append(keys_and_values)
        return TrunkOutput(last_hidden_state=self.norm(x), past_key_values=cache)


class GPT(nn.Module):
    """A causal language model, with the interface of transformers."""

    def __init__(self, vocabulary: int, positions: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.base_model = Transformer(vocabulary, positions, layers, heads, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, logits_to_keep=0):
        """Compute what Transformer does, and the logits (B, logits_to_keep or S, V) of the next tokens."""
        output = self.base_model(input_ids, attention_mask, position_ids, past_key_values, logits_to_keep)
        output.logits = self.lm_head(output.last_hidden_state)
        return output

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_decoder(self) -> Transformer:
        return self.base_model


def load_language_model(args: Args) -> tuple[nn.Module, Any]:
    """Load --model and its tokenizer; the padding token differs from the end token."""
    import transformers  # a large package, needed only here

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    except Exception as error:  # transformers and safetensors raise many types of errors for invalid files
        raise UserError(f"--model {args.model}: {error}") from error
    name, positions = f"--model {args.model}", getattr(model.config, "max_position_embeddings", math.inf)
    cached = "past_key_values" in inspect.signature(model.forward).parameters
    require(cached and tokenizer.eos_token_id is not None, f"{name} has no key-value cache or no end token")
    require(args.context <= positions, f"{name} reads up to {positions} tokens; --context is {args.context}")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
        # disable dropout, because hidden_states() puts some layers into training mode (Falcon reads config)
        for layer in [*model.modules(), model.config]:
            vars(layer).update({x: 0.0 for x, y in vars(layer).items() if "drop" in x and type(y) is float})
    if args.lora_rank:  # in every linear layer but the last; only these weights are trained
        import peft

        peft.inject_adapter_in_model(peft.LoraConfig(r=args.lora_rank, target_modules="all-linear"), model)
    return model, tokenizer


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model. Weights that are not trained (the base of adapters) are shared, not copied."""
    return copy.deepcopy(model, {id(x): x for x in model.parameters() if not x.requires_grad})


def merge_adapters(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its adapters merged into the weights."""
    model = copy.deepcopy(model)
    # inner layers first: adapters of a mixture of experts are nested
    for name, layer in reversed([(n, x) for n, x in model.named_modules() if hasattr(x, "get_base_layer")]):
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    return model


def load_score_function(args: Args) -> Callable:
    """Load --reward-function as (prompts, answers) -> scores."""
    sys.path.insert(0, os.getcwd())
    try:
        function = pkgutil.resolve_name(args.reward_function)
        inspect.signature(function).bind_partial([], [])  # raises TypeError if it does not take two inputs
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise UserError(f"--reward-function {args.reward_function}: {error}") from error

    def score_texts(prompts: Sequence[Prompt], answers: list[str]) -> Any:
        keys = set().union(*(prompt.fields for prompt in prompts))
        named = {key: [prompt.fields.get(key) for prompt in prompts] for key in keys}
        try:
            return call(function, [prompt.text for prompt in prompts], answers, **named)
        except (ImportError, OSError) as error:  # which main() would report without a traceback
            raise RuntimeError("the reward function failed") from error

    return score_texts


def call(function: Callable, /, *inputs: Any, **named: Any) -> Any:
    """Call a model or function with only the named inputs that it accepts: Bloom has no position_ids."""
    accepted = list(inspect.signature(getattr(function, "forward", function)).parameters)[len(inputs) :]
    return function(*inputs, **{name: named[name] for name in accepted if name in named})


def hidden_states(trunk: nn.Module, ids: Tensor, attention: Tensor, length: int) -> Tensor:
    """Compute hidden states of the last tokens. ids, attention (B, S): 0 for padding -> (B, length, D)."""
    # positions count from the first real token, so that padding on the left does not shift them
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    for layer in trunk.modules():  # gradient checkpointing of transformers needs layers in training mode
        layer.training = torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)
    return call(trunk, **inputs, use_cache=False, keep=length).last_hidden_state[:, -length:]


def logits_from(model: nn.Module, states: Tensor) -> Tensor:
    """Compute logits from hidden states with the model's own code, which may scale or cap them.

    states (..., D) -> (..., V). During the call, the trunk is replaced by one that returns the states.
    """
    trunk, rows = model.get_decoder(), states.reshape(1, -1, states.shape[-1])
    tokens = torch.zeros(rows.shape[:2], dtype=torch.long, device=states.device)
    trunk.forward = lambda *_, **__: TrunkOutput(last_hidden_state=rows)
    try:
        logits = call(model, input_ids=tokens, attention_mask=tokens, position_ids=tokens).logits
    finally:
        del trunk.forward
    return logits.view(*states.shape[:-1], -1)


class ScalarModel(nn.Module):
    """Compute a number for each beginning of a text: a reward model (read at the last token), or a critic."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1))  # as Ziegler et al.
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, attention: Tensor, length: int) -> Tensor:
        """Score the text up to each of the last tokens. Tokens, attention (B, S) -> (B, length)."""
        states = hidden_states(self.trunk, ids, attention, length).float()
        # a sum instead of a matrix product, which autocast would round to bfloat16
        return (states * self.head.weight).sum(-1) + self.head.bias


class Models(nn.Module):
    """The four models of RLHF, without dropout (with it, the first ratio is not 1), and their tokenizer."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.args, self.bf16, self.tokenizer = args, args.cuda, ByteTokenizer()
        if args.model:
            self.actor, self.tokenizer = load_language_model(args)
        else:
            self.actor = GPT(self.tokenizer.size, args.context, args.layers, args.heads, args.width)
        width = self.actor.get_output_embeddings().weight.shape[1]
        self.critic = ScalarModel(copy_model(self.actor.get_decoder()), width)
        self.score_function = load_score_function(args) if args.reward_function else None
        self.reward = None if self.score_function else copy_model(self.critic)
        self.reference = copy_model(self.actor).requires_grad_(False)  # the SFT model after stage 1
        # mean and deviation of the scores of --reward-function; a reward model has them in its head
        self.register_buffer("score_moments", torch.tensor([0.0, 1.0]))
        self.register_buffer("kl_coef", torch.tensor(args.kl_coef, dtype=torch.float64))
        config = getattr(self.actor, "generation_config", None)  # it can have several end tokens
        ends = [self.tokenizer.eos_token_id, *np.atleast_1d(config and config.eos_token_id)]
        if getattr(self.tokenizer, "chat_template", None):  # its end of a turn also ends an answer
            turns = [{"role": role, "content": "ANSWER"} for role in ("user", "assistant")]
            rest = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
            token = tokenize(self.tokenizer, rest, special=False)[:1]
            ends += [x for x in token if getattr(self.tokenizer.added_tokens_decoder.get(x), "special", None)]
        self.register_buffer("ends", torch.tensor([x for x in ends if x is not None]), persistent=False)

    def autocast(self) -> torch.autocast:
        """Return a context for bfloat16 on a GPU; losses and weights stay in float32."""
        return torch.autocast(self.kl_coef.device.type, torch.bfloat16, enabled=self.bf16)


# ------------------------------------------------------------------------------------------------- the data


# fmt: off
HELD_OUT = 200  # prompts
ITEMS = ["lamp", "kettle", "tent", "chair", "phone", "radio", "bike", "clock", "camera", "jacket", "teapot",
         "scooter", "mirror", "basket", "drill", "piano"]
PROBLEMS = {"broke": "repair", "leaks": "repair", "makes noise": "repair", "never came": "resend",
            "was lost": "resend", "is too small": "exchange", "is the wrong colour": "exchange",
            "came late": "refund", "cost twice": "refund"}  # with the remedy
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


class Prompt(NamedTuple):
    """A prompt: its text for reward functions, its tokens for the models, and the JSON object of its line."""

    text: str
    ids: list[int]
    fields: dict[str, Any]


@dataclass
class Data:
    """The data of all stages. To use your own, pass files or replace built_in_data().

    Answers are lists of tokens. A text is a prompt and an answer; a pair is a prompt, the chosen and the
    rejected answer.
    """

    texts: list[tuple[Prompt, list[int]]]  # for stage 1
    prompts: list[Prompt]  # for stages 2 and 3
    held_out_texts: list[tuple[Prompt, list[int]]]  # never trained on, nor are the held-out rows below
    held_out_prompts: list[Prompt]
    labeller: Callable[[str, str], float] | None = None  # (prompt, answer) -> score ("gold"); None: pairs
    pairs: Sequence[tuple[Prompt, list[int], list[int]]] = ()
    held_out_pairs: Sequence[tuple[Prompt, list[int], list[int]]] = ()
    ptx_texts: Sequence[tuple[Prompt, list[int]]] = ()

    def digest(self) -> str:
        """Return a hash of all rows, to detect changed files."""
        rows = (repr(row).encode() for rows in vars(self).values() if isinstance(rows, list) for row in rows)
        return hashlib.sha256(b"".join(hashlib.sha256(row).digest() for row in rows)).hexdigest()


def built_in_data(models: Models) -> Data:
    """Generate texts of a help desk: complaints of customers, and good and bad answers."""
    args, draw = models.args, random.Random(derive_seed(models.args.seed, 0))

    def answer(item: str, problem: str) -> str:
        remedy = PROBLEMS[problem] if draw.random() < 0.4 else draw.choice(REMEDIES)
        it = draw.choice(["it", "that", f"the {item}", f"your {item}"])
        offer = draw.choice(OFFERS).format(remedy=remedy, it=it)
        refusal = draw.choice(REFUSALS).format(item=item if draw.random() < 0.7 else draw.choice(ITEMS))
        return draw.choice(OPENINGS) + draw.choice([offer, refusal]) + draw.choice(CLOSINGS)

    cases = [(ask, item, problem) for ask in ASKS for item in ITEMS for problem in PROBLEMS]
    draw.shuffle(cases)

    def text(ask: str, item: str, problem: str) -> tuple[Prompt, list[int]]:
        return encode(models, ask.format(item=item, problem=problem) + "\n", [answer(item, problem)])

    held_out, others = cases[:HELD_OUT], cases[HELD_OUT:]
    texts = [text(*draw.choice(others)) for _ in range(args.num_texts)]
    held_out_texts = [text(*case) for case in held_out]
    prompts, held_out_prompts = [text(*case)[0] for case in others], [prompt for prompt, _ in held_out_texts]
    # with a --reward-function there is no labeller: the function decides which answer is better
    return Data(texts, prompts, held_out_texts, held_out_prompts, models.reward and gold_score)


def gold_score(prompt: str, answer: str) -> float:
    """Score an answer: apology, help, item and thanks add points; rudeness, errors and length cost."""
    words = re.findall("[a-z]+", answer.lower())
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]+", answer)]
    item = next((item for item in ITEMS if item in prompt), "")
    helps = next((remedy for problem, remedy in PROBLEMS.items() if problem in prompt), "")
    offers = [remedy for remedy in REMEDIES if remedy in words]
    score = 1.5 * (item in words) + 2.0 * bool(offers) + 1.5 * (helps in offers) + 1.0 * ("thank" in words)
    score += 2.0 * ("sorry" in words or "apologise" in words) - 1.0 * max(len(offers) - 1, 0)
    score -= 2.0 * sum(phrase in answer for phrase in RUDE)
    score -= 1.0 * sum(word not in WORDS for word in words)
    return score - 2.0 * (len(sentences) - len(set(sentences))) - 0.02 * len(answer)


PROMPT_KEYS = ("prompt", "question", "instruction")
ANSWER_KEYS = ("completion", "answer", "output", "response")
ROLES, TURN = {"human": "user", "gpt": "assistant"}, "\n\nAssistant:"  # of ShareGPT; of Anthropic's data
FORMS = {
    "prompt": "prompt, question, instruction, messages or conversations",
    "text": "a prompt with completion, answer, output or response; messages; conversations; or text",
    "pair": "chosen and rejected (or pos_resp, neg_resp) with a prompt, or as messages, or with 'Assistant:'",
}


def parse_entry(entry: dict, kind: str) -> tuple[str | list, list]:
    """Find prompt and answers in a line of a file: texts or lists of messages. kind is a key of FORMS.

    Only the last turn of a conversation is an answer.
    """
    require(not any(map(entry.get, ("system", "system_prompt", "history"))), "it has a system or history key")
    prompt = next((entry[key] for key in PROMPT_KEYS if key in entry), None)
    if "prompt" not in entry and isinstance(prompt, str):
        # such data have no separators
        prompt = "".join(f"{x}\n" for x in (prompt, entry.get("input") or entry.get("context")) if x)
    turns = ((ROLES.get(x["from"], x["from"]), x["value"]) for x in entry.get("conversations", ()))
    messages = entry.get("messages") or [{"role": role, "content": content} for role, content in turns]
    if kind == "pair":
        answers = [entry.get("chosen", entry.get("pos_resp")), entry.get("rejected", entry.get("neg_resp"))]
    elif messages and messages[-1]["role"] == "assistant":
        prompt, answers = None, [messages]
    elif kind == "prompt":
        prompt, answers = messages or prompt, []
    elif prompt is None:
        prompt, answers = "", [entry["text"]]
    else:
        answers = [next(entry[key] for key in ANSWER_KEYS if key in entry)]
    if answers and isinstance(answers[0], list) and (prompt is None or answers[0][0]["role"] != "assistant"):
        same = [x == y for x, y in zip(answers[0], answers[-1], strict=False)]  # they contain their prompt
        start = min([*same, False].index(False), *(len(answer) - 1 for answer in answers))
        prompt, answers = answers[0][:start], [answer[start:] for answer in answers]
    elif prompt is None:
        start = os.path.commonprefix(answers).rindex(TURN) + len(TURN)  # noqa: RUF071, characters
        prompt, answers = answers[0][:start], [answer[start:] for answer in answers]
    several = (len(x) > 1 if isinstance(x, list) else kind == "pair" and TURN in x for x in answers)
    require(not any(several), "an answer has several turns")
    return prompt, answers if kind != "prompt" else []


def render(tokenizer: Any, prompt: str | list, answers: list) -> tuple[str, list[str], bool]:
    """Return prompt and answers as texts, and whether a chat template was used (for lists of messages)."""
    if not any(isinstance(x, list) for x in (prompt, *answers)):
        "".join((prompt, *answers)).encode()  # raises for values that are not text and for lone surrogates
        return prompt, answers, False
    chat = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    texts = []
    for answer in answers:
        answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(chat + answer, tokenize=False)
        texts.append(text[len(prompt) :] if text.startswith(prompt) else answer[0]["content"])
    return prompt, texts, True


def tokenize(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Return the tokens of a text, with BOS once if both the text and the tokenizer add it."""
    ids = tokenizer.encode(text, add_special_tokens=special)
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def encode(models: Models, prompt: str, answers=(), rendered=False, fields: dict | None = None) -> tuple:
    """Tokenize a prompt and its answers -> (Prompt, tokens of an answer, ...).

    An answer ends with its first end token; an empty answer is this token alone. If the prompt is empty, the
    one answer is kept whole. A rendered prompt contains its special tokens. Raises UserError if the prompt is
    empty (with one answer: if both are), or if their total length exceeds --context.
    """
    tokenizer, end, limit = models.tokenizer, models.tokenizer.eos_token_id, models.args.context
    ids = tokenize(tokenizer, prompt, not rendered)
    ids = ids[:-1] if ids[-1:] == [end] and not prompt.endswith(tokenizer.eos_token) else ids
    rows, ends = [], models.ends.tolist()
    for answer in answers:
        row = tokenize(tokenizer, prompt + answer, not rendered)
        # alone, SentencePiece would begin the answer with a space
        row = row[len(ids) :] if row[: len(ids)] == ids else tokenize(tokenizer, answer, special=False)
        row = row if row[-1:] == [end] else [*row, end]
        rows.append(row[: next(i for i, token in enumerate(row) if token in ends) + 1] if prompt else row)
    if not ids and len(rows) == 1:  # a text without a prompt begins with its first token
        ids, rows = rows[0][:1], [rows[0][1:]]
    require(ids and all(rows) and (prompt or len(rows) == 1), "a prompt or answer is empty")
    length = len(ids) + max([models.args.answer_length, *map(len, rows)])
    require(length <= limit, f"prompt and answer have up to {length} tokens, and --context is {limit}")
    return Prompt(prompt, ids, fields or {}), *rows


def read_jsonl(models: Models, path: str, kind: str) -> list[tuple]:
    """Read a file with a JSON object in each line -> rows as encode() returns them. kind is a key of FORMS.

    Lines that are too long, or have an empty prompt, a system or history key, or an answer of several turns,
    are skipped with a message. Raises UserError for a line in none of the FORMS.
    """
    data, rows, skipped = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf"), [], []
    for number, line in ((n, x) for n, x in enumerate(data.splitlines(), 1) if x.strip()):
        try:
            entry = json.loads(line.decode())
            rows.append(encode(models, *render(models.tokenizer, *parse_entry(entry, kind)), entry))
        except UserError as error:
            skipped.append(f"line {number}: {error}")
        except Exception as error:  # templates and values of all types raise many kinds
            raise UserError(f"{path} line {number}: no JSON object with {FORMS[kind]} ({error!r})") from error
    if skipped:
        print(f"{path}: skipped {len(skipped)} lines; the first is {skipped[0]}", file=sys.stderr)
    require(len(set(map(prompt_key, rows))) >= 10, f"{path} has fewer than 10 different usable prompts")
    return rows


def prompt_key(row: tuple) -> str:
    """Return the key that groups rows: the prompt, or the tokens of a text without a prompt."""
    return row[0].text or str(row[1])


def derive_seed(*key: int) -> int:
    """Derive a 32-bit seed from integers; different keys, also of different lengths, give unrelated seeds."""
    return int(np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(1)[0])


def load_data(models: Models) -> Data:
    """Read the files of the options and hold out a tenth of the prompts, or generate the built-in data."""
    args = models.args
    texts = read_jsonl(models, args.sft_data, "text") if args.sft_data else []
    pairs = read_jsonl(models, args.preference_data, "pair") if args.preference_data else []
    prompts = read_jsonl(models, args.prompt_data, "prompt") if args.prompt_data else texts + pairs
    ptx_texts = read_jsonl(models, args.ptx_data, "text") if args.ptx_data else []
    if not (texts or pairs or prompts):
        return replace(built_in_data(models), ptx_texts=ptx_texts)
    prompts = [(prompt,) for prompt in {row[0].text: row[0] for row in prompts if row[0].text}.values()]
    require(texts or args.skip_sft, "stage 1 needs --sft-data, or --skip-sft")
    require(pairs or models.score_function, "stage 2 needs --preference-data, or a --reward-function")
    require(len(prompts) >= 10, "stage 3 needs --prompt-data with at least 10 prompts")
    require(ptx_texts or texts or not args.ptx_coef, "--ptx-coef needs --ptx-data")
    draw, held_out = random.Random(derive_seed(args.seed, 0)), set()
    for rows in (prompts, texts, pairs):  # a prompt held out in one file is held out in all files
        draw.shuffle(rows)
        keys = sorted(dict.fromkeys(map(prompt_key, rows)), key=lambda key: key not in held_out)
        held_out.update(keys[: min(len(keys) // 10, HELD_OUT)])
    files = (texts, prompts, pairs, ptx_texts)
    split = [[[x for x in rows if (prompt_key(x) in held_out) is y] for y in (False, True)] for rows in files]
    (texts, texts_out), (prompts, prompts_out), (pairs, pairs_out), (ptx_texts, _) = split
    prompts, prompts_out = ([prompt for (prompt,) in rows] for rows in (prompts, prompts_out))
    return Data(texts, prompts, texts_out, prompts_out, None, pairs, pairs_out, ptx_texts)


class Answers(NamedTuple):
    """Prompts, padded on the left, and their answers, padded on the right."""

    ids: Tensor  # (B, S)
    attention: Tensor  # (B, S): 0 for padding
    mask: Tensor  # (B, L): True for tokens of the answers

    @property
    def tokens(self) -> Tensor:
        return self.ids[:, -self.mask.shape[1] :]

    def split(self, size: int) -> Iterator["Answers"]:
        return (Answers(*part) for part in zip(*(x.split(size) for x in self), strict=True))


def join(models: Models, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> Answers:
    """Pad prompts and answers to a batch."""
    start, length = max(len(prompt.ids) for prompt in prompts), max(map(len, answers))
    ids = torch.full((len(prompts), start + length), models.tokenizer.pad_token_id)
    attention = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        columns = slice(start - len(prompt.ids), start + len(answer))
        ids[row, columns], attention[row, columns] = torch.tensor(prompt.ids + answer), 1
    tensors = (ids, attention, attention[:, start:].bool())
    return Answers(*(x.to(models.kl_coef.device) for x in tensors))


@torch.no_grad()
def generate(models: Models, model: nn.Module, prompts: Sequence[Prompt]) -> tuple[Answers, Tensor]:
    """Sample an answer to each prompt -> answers, log-probabilities (B, L) in nats.

    No filter such as top-k is used: the sampling distribution must be the training distribution.
    """
    models.eval()  # layers in training mode do not use the cache
    tokens, attention, _ = join(models, prompts, [[]] * len(prompts))
    ids, positions, cache = [tokens], (attention.cumsum(1) - 1).clamp(min=0), None
    alive, logprobs = torch.ones_like(tokens[:, :1], dtype=torch.bool), []
    for _ in range(models.args.answer_length):
        with models.autocast():
            inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": positions}
            output = call(model, **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        log_policy = (output.logits[:, -1].float() / models.args.temperature).log_softmax(-1)
        tokens, cache = torch.multinomial(log_policy.exp(), 1), output.past_key_values
        logprobs.append(log_policy.gather(1, tokens))
        ids.append(tokens.masked_fill(~alive, models.tokenizer.pad_token_id))
        attention, positions = torch.cat((attention, alive.to(attention.dtype)), 1), positions[:, -1:] + 1
        alive = alive & ~torch.isin(tokens, models.ends)
        if not alive.any():  # synchronises with the GPU
            break
    return Answers(torch.cat(ids, 1), attention, attention[:, -len(logprobs) :] > 0), torch.cat(logprobs, 1)


def decode(models: Models, answers: Answers) -> list[str]:
    """Return the answers as text, without end and padding tokens."""
    tokens, padding = answers.tokens, models.tokenizer.pad_token_id
    kept = answers.mask & ~torch.isin(tokens, models.ends) & (tokens != padding)
    rows = [row[some].tolist() for row, some in zip(tokens, kept, strict=True)]
    return [models.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]


def finished_answers(models: Models, answers: Answers) -> Tensor:
    """Return whether each answer has an end token, (B,)."""
    return (torch.isin(answers.tokens, models.ends) & answers.mask).any(1)


def at_end(prefix_scores: Tensor, mask: Tensor) -> Tensor:
    """Return the scores of whole answers: prefix_scores (B, L + 1) at the last token. mask (B, L) -> (B,)."""
    return prefix_scores.gather(1, mask.sum(1, keepdim=True)).squeeze(1)


# ------------------------------------------------------------------------------------ the log-probabilities


LOGITS_AT_ONCE = 2**24  # tokens x vocabulary of one chunk: 64 MiB, and up to eight times that for a moment


def states_before(models: Models, model: nn.Module, answers: Answers) -> Tensor:
    """Compute the hidden states from which the tokens of the answers are predicted, (B, L, D)."""
    with models.autocast():
        ids, attention = answers.ids[:, :-1], answers.attention[:, :-1]
        return hidden_states(model.get_decoder(), ids, attention, answers.mask.shape[1])


def token_terms(models: Models, tokens, states, ref_states=None, temperature=1.0) -> tuple[Tensor, ...]:
    """Compute log-probabilities of tokens by the actor and by the reference, and the exact KL between them.

    tokens (B, L); states (B, L, D) precede them; results (B, L), in nats. Without ref_states the actor is its
    own reference. With a large vocabulary (Bloom: 250,880), the logits of a whole batch would need more
    memory than the model: they are computed in chunks, and each chunk again for the gradient.
    """

    def function(tokens: Tensor, states: Tensor, ref_states: Tensor | None = None) -> tuple[Tensor, ...]:
        with models.autocast():
            logits = logits_from(models.actor, states).float() / temperature
        logprobs = gather_logprobs(logits, tokens)
        if ref_states is None:
            return logprobs, logprobs.detach(), torch.zeros_like(logprobs)
        with models.autocast():
            ref_logits = logits_from(models.reference, ref_states).float() / temperature
        return logprobs, gather_logprobs(ref_logits, tokens), categorical_kl(logits, ref_logits)

    rows = [x.flatten(0, 1) for x in (tokens, states, ref_states) if x is not None]
    size = max(1, LOGITS_AT_ONCE // models.actor.get_output_embeddings().weight.shape[0])
    if len(rows[0]) <= size:
        parts = [function(*rows)]
    else:
        chunked = zip(*(x.split(size) for x in rows), strict=True)
        parts = [checkpoint(function, *part, use_reentrant=False) for part in chunked]
    return tuple(torch.cat(column).view_as(tokens) for column in zip(*parts, strict=True))


def values_before(models: Models, answers: Answers) -> Tensor:
    """Compute V before each token of the answers, (B, L)."""
    with models.autocast():
        return models.critic(answers.ids[:, :-1], answers.attention[:, :-1], answers.mask.shape[1])


class Assessment(NamedTuple):
    """What the critic, the actor and the reference compute for answers: (N, L), logarithms in nats."""

    values: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor  # KL(actor, reference), exact
    ref_states: Tensor  # hidden states of the reference, (N, L, D); (N, L, 0) if the KL is not in the loss


@torch.no_grad()
def assess(models: Models, answers: Answers, use_reference: bool = True) -> Assessment:
    """Compute an Assessment, one micro-batch at a time. Without the reference its KL is 0."""
    keep, parts = use_reference and models.args.kl_in == "loss", []
    for part in answers.split(models.args.micro_batch_size or models.args.minibatch_size):
        values, states = values_before(models, part), states_before(models, models.actor, part)
        ref_states = states_before(models, models.reference, part) if use_reference else None
        terms = token_terms(models, part.tokens, states, ref_states, models.args.temperature)
        parts.append((values, *terms, ref_states if keep else states[..., :0]))
    return Assessment(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def score(models: Models, prompts: Sequence[Prompt], answers: Answers) -> Tensor:
    """Score all beginnings of each answer, (N, L + 1). Functions score only whole answers; the rest is 0."""
    if models.score_function is None:
        parts = answers.split(models.args.micro_batch_size or models.args.minibatch_size)
        with models.autocast():
            return torch.cat([models.reward(x.ids, x.attention, x.mask.shape[1] + 1) for x in parts])
    scores = models.score_function(prompts, decode(models, answers))
    scores = torch.tensor(np.asarray(scores.tolist() if torch.is_tensor(scores) else scores, np.float32))
    valid = scores.shape == (len(prompts),) and scores.isfinite().all()
    require(valid, f"{len(prompts)} answers need {len(prompts)} finite scores, not {scores}")
    scores = (scores.to(models.score_moments) - models.score_moments[0]) / models.score_moments[1]
    return F.one_hot(answers.mask.sum(1), answers.mask.shape[1] + 1) * scores[:, None]


# ------------------------------------------------------------------------------------------- stages 1 and 2


def average(x: Tensor) -> Tensor:
    """Average x over all processes, in place; the result is identical in all."""
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(x.div_(WORLD_SIZE))
    return x


def minibatches(rows: Sequence[Tensor], size: int, epochs: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield minibatches of tensors (B, ...), whose rows are shuffled anew in each epoch."""
    for _ in range(epochs):
        shuffle = torch.randperm(len(rows[0]), device=rows[0].device)
        yield from zip(*(x[shuffle].split(size) for x in rows), strict=True)


def clip_gradient(model: nn.Module, max_grad_norm: float) -> Tensor:
    """Average the gradients of all processes and clip their norm. Return the norm before clipping."""
    for gradient in [x.grad for x in model.parameters() if x.grad is not None]:
        average(gradient)
    return nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)


def lm_loss(models: Models, texts: list[tuple[Prompt, list[int]]]) -> Tensor:
    """Compute the sum of -log p(token) by the actor over all tokens of the answers, in nats."""
    answers = join(models, *zip(*texts, strict=True))
    logprobs, _, _ = token_terms(models, answers.tokens, states_before(models, models.actor, answers))
    return -(logprobs * answers.mask).sum()


def score_pairs(models: Models, pairs: list[tuple[Prompt, list[int], list[int]]]) -> Tensor:
    """Score (prompt, chosen, rejected) with the reward model -> (2, B): chosen, then rejected."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    ids, attention, mask = join(models, prompts * 2, chosen + rejected)
    with models.autocast():
        scores = at_end(models.reward(ids, attention, mask.shape[1] + 1), mask)
    return scores.view(2, -1)


def pair_loss(models: Models, pairs: list[tuple[Prompt, list[int], list[int]]]) -> Tensor:
    """Compute preference_loss as a sum over pairs."""
    return preference_loss(*score_pairs(models, pairs)) * len(pairs)


def chunks(rows: Sequence, size: int) -> Iterator[Sequence]:
    """Yield groups of at most size rows."""
    return (rows[first : first + size] for first in range(0, len(rows), size))


def accumulate(models: Models, loss_sum: Callable, rows: list, weight: float = 1.0) -> Tensor:
    """Add the gradient of weight * mean loss of the rows, one micro-batch at a time. Return that loss.

    The mean is over the rows (of lm_loss: the tokens) of all micro-batches and processes.
    """
    count = sum(len(answer) for _, answer in rows) if loss_sum is lm_loss else len(rows)
    count = average(torch.tensor(float(count))).item()  # each process has its own number
    losses = torch.zeros((), device=models.kl_coef.device)
    for part in chunks(rows, models.args.micro_batch_size or max(1, len(rows))):
        loss = weight / count * loss_sum(models, part)
        loss.backward()
        losses += loss.detach()
    return average(losses)


def fit(models: Models, model, loss_sum: Callable, rows: list, stage: str, writer, step: int) -> int:
    """Minimise the mean loss of the rows with the options named after the stage. Return the next step."""
    args, seen = models.args, 0
    rate, epochs = getattr(args, f"{stage}_learning_rate"), getattr(args, f"{stage}_epochs")
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    parts = minibatches([torch.arange(len(rows))], args.minibatch_size, epochs)
    progress = tqdm(parts, stage, math.ceil(len(rows) / args.minibatch_size) * epochs, disable=RANK > 0)
    for (mb,) in progress:
        optimizer.param_groups[0]["lr"] = rate * (1 - seen / (epochs * len(rows)))
        optimizer.zero_grad(set_to_none=False)  # a process without rows must average its zeros, too
        loss = accumulate(models, loss_sum, [rows[i] for i in mb.tolist()[RANK::WORLD_SIZE]])
        clip_gradient(model, args.max_grad_norm)
        optimizer.step()
        seen += len(mb)
        progress.set_postfix(loss=f"{loss:.2f}")
        require(loss.isfinite(), f"the loss is {loss} at step {step + seen}")
        writer.add_scalar(f"{stage}/loss", loss, step + seen)
    model.zero_grad()  # frees the gradients
    return step + seen


def fine_tune(models: Models, data: Data, writer: SummaryWriter, step: int) -> int:
    """Stage 1: fine-tune the actor on the texts and copy it to the reference. Return the next step."""
    if not models.args.skip_sft:
        step = fit(models, models.actor, lm_loss, data.texts, "sft", writer, step)
    models.reference.load_state_dict(models.actor.state_dict())
    if data.held_out_texts:
        with torch.no_grad():
            losses = [lm_loss(models, x) for x in chunks(data.held_out_texts, models.args.minibatch_size)]
        loss = sum(losses).item() / sum(len(answer) for _, answer in data.held_out_texts)
        writer.add_scalar("sft/held_out_loss", loss, step)
        print(f"SFT: {loss:.3f} nats per token of held-out texts")
    return step


@torch.no_grad()
def sample_pairs(models: Models, prompts: list[Prompt], labeller: Callable) -> tuple[list[tuple], float]:
    """Sample two answers to each prompt from the SFT model -> (prompt, chosen, rejected), ceiling.

    Preferences are noisy (Bradley-Terry): the better answer is chosen with probability sigmoid(difference of
    scores). The ceiling is the expected accuracy of the labeller's own scores.
    """
    pairs, ceiling = [], 0.0
    for asked in chunks(prompts, models.args.batch_size):
        answers, _ = generate(models, models.reference, asked * 2)
        texts = decode(models, answers)
        rows = [row[kept].tolist() for row, kept in zip(answers.tokens, answers.mask, strict=True)]
        for i, prompt in enumerate(asked):
            j = i + len(asked)
            difference = labeller(prompt.text, texts[i]) - labeller(prompt.text, texts[j])
            likely = torch.tensor(difference, dtype=torch.float64).sigmoid().item()
            ceiling += max(likely, 1 - likely) / len(prompts)
            chosen, rejected = (i, j) if torch.rand(()) < likely else (j, i)
            pairs.append((prompt, rows[chosen], rows[rejected]))
    return pairs, ceiling


def learn_reward(models: Models, data: Data, writer: SummaryWriter, step: int) -> int:
    """Stage 2: fit the reward model to preferences and copy it to the critic. Return the next step."""
    args, trunk = models.args, models.reference.get_decoder().state_dict()
    (models.reward or models.critic).trunk.load_state_dict(trunk)
    if models.reward is not None:
        pairs, held_out, ceiling = data.pairs, data.held_out_pairs, ""
        if data.labeller:
            prompts = [data.prompts[i] for i in torch.randint(len(data.prompts), (args.num_pairs,)).tolist()]
            pairs, _ = sample_pairs(models, prompts, data.labeller)
            held_out, ceiling = sample_pairs(models, data.held_out_prompts * 2, data.labeller)
            ceiling = f" (ceiling {ceiling:.1%})"
        step = fit(models, models.reward, pair_loss, pairs, "reward_model", writer, step)
        with torch.no_grad():
            scores = torch.cat([score_pairs(models, x) for x in chunks(held_out, args.minibatch_size)], 1)
        accuracy = ((scores[0] - scores[1]).sign() + 1).mean().item() / 2  # a tie counts half
        writer.add_scalar("reward_model/accuracy", accuracy, step)
        print(f"reward model: agrees with {accuracy:.1%} of {len(held_out)} choices{ceiling}")
    # held-out prompts first, because the reward model has not learned from them
    normalize_scores(models, data.held_out_prompts + data.prompts)
    if models.reward is not None:
        models.critic.load_state_dict(models.reward.state_dict())
    return step


@torch.no_grad()
def normalize_scores(models: Models, prompts: list[Prompt]) -> None:
    """Normalise scores to mean 0, deviation 1 on the SFT model's answers, so kl_coef suits every reward."""
    scores, prompts = [], [prompts[i % len(prompts)] for i in range(HELD_OUT)]
    for asked in chunks(prompts, models.args.batch_size):
        answers, _ = generate(models, models.reference, asked)
        scores.append(at_end(score(models, asked, answers), answers.mask))
    scores = torch.cat(scores)
    mean, deviation = average(torch.stack((scores.mean(), scores.std())))
    if deviation < 1e-6:  # for example, a reward of 0 or 1 that no answer of the SFT model earns
        print(f"all scores of the SFT model are {mean:g}, so scores are not divided by their deviation")
        deviation = torch.ones_like(deviation)
    if models.reward is None:
        models.score_moments.copy_(torch.stack((mean, deviation)))
    else:
        models.reward.head.weight.div_(deviation)
        models.reward.head.bias.sub_(mean).div_(deviation)


# -------------------------------------------------------------------------------------------- the algorithm


class Batch(NamedTuple):
    """Answers, and what PPO learns from: (B, L), or (B, 1) if the action is the whole answer."""

    ids: Tensor  # (B, S), as in Answers
    attention: Tensor  # (B, S)
    mask: Tensor  # (B, L)
    ref_states: Tensor  # (B, L, D), as in Assessment
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def add_gradients(models: Models, minibatch: Batch, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Add the gradients of the loss of a minibatch -> (policy loss, value loss), new log-probabilities.

    kl_coef is the coefficient of the exact KL in the loss. The weights are those of a mean over the minibatch
    of this process, so the result does not depend on the size of the micro-batches.
    """
    args, acted = models.args, minibatch.mask[:, : minibatch.advantages.shape[1]]
    weights = action_weights(acted, args.loss_average)
    clip_vloss = args.clip_coef if args.clip_vloss else None
    size, parts, all_logprobs = args.micro_batch_size or len(weights), [], []
    for *row, weight in zip(*(x.split(size) for x in (*minibatch, weights)), strict=True):
        part, used = Batch(*row), weight > 0
        answers, ref_states = Answers(*part[:3]), part.ref_states if part.ref_states.numel() else None
        states = states_before(models, models.actor, answers)
        new_logprobs, _, kl = token_terms(models, answers.tokens, states, ref_states, args.temperature)
        new_logprobs, kl = (per_action(x, part.mask, args.action_level) for x in (new_logprobs, kl))
        columns = (weight, new_logprobs, kl, part.logprobs, part.advantages, part.values, part.returns)
        w, logp, kl, old_logp, advantage, old_value, target = (x[used] for x in columns)
        # only the upper bound matters where the advantage is positive, only the lower where it is negative
        clip_coef = torch.where(advantage > 0, args.clip_coef_high or args.clip_coef, args.clip_coef)
        policy_loss = (w * clipped_policy_loss(logp, old_logp, advantage, clip_coef)).sum()
        # first, so that the actor's activations are freed before the critic's are computed
        (policy_loss + kl_coef * (w * kl).sum()).backward()
        new_value = values_before(models, answers)[:, : weight.shape[1]][used]
        critic_loss = (w * value_loss(new_value, old_value, target, clip_vloss)).sum()
        (args.vf_coef * critic_loss).backward()
        parts.append(torch.stack((policy_loss, critic_loss)).detach())
        all_logprobs.append(new_logprobs.detach())
    return torch.stack(parts).sum(0), torch.cat(all_logprobs)


def train(args: Args) -> list[dict[str, float]]:
    """Run the three stages. Return the metrics of each iteration of stage 3."""
    device = set_up_torch(args)
    args = replace(args, **json.loads(json.dumps(vars(args), default=lambda x: x.item())))  # plain numbers
    args.checkpoint_every = args.checkpoint_every or max(1, args.num_iterations // 10)
    torch.manual_seed(derive_seed(args.seed))
    models = Models(args).to(device)
    data = load_data(models)
    run_dir, state = open_run(args)
    models.load_state_dict(state.pop("models") or models.state_dict())
    stage, first_iteration, step, history = (state[x] for x in ("stage", "iteration", "step", "history"))
    require(state["data"] in (None, data.digest()), f"the data have changed since {run_dir} was started")
    silent = dict.fromkeys(("add_scalar", "add_text", "flush", "close"), lambda *_: None)
    writer = open_writer(args, run_dir, step) if RANK == 0 else SimpleNamespace(**silent)

    save = functools.partial(save_checkpoint, run_dir, args, models, writer, history, data.digest())
    check_models(models, data.prompts[:8], fresh=first_iteration == 0)
    for number, learn in enumerate((fine_tune, learn_reward)):
        if stage == number:
            save(optimizer=None, stage=stage, iteration=0, step=step)
            torch.manual_seed(derive_seed(args.seed, number + 1))
            stage, step = number + 1, learn(models, data, writer, step)

    learners = [models.actor, models.critic]
    # epsilon 1e-5 as in the code of Ziegler et al. (torch's default is 1e-8)
    groups = [{"params": [x for x in model.parameters() if x.requires_grad]} for model in learners]
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    optimizer.load_state_dict(state.pop("optimizer") or optimizer.state_dict())
    num_prompts = args.batch_size // WORLD_SIZE // args.answers_per_prompt  # of this process
    critic_lambda = args.gae_lambda if args.critic_lambda is None else args.critic_lambda
    for iteration in (progress := tqdm(range(first_iteration, args.num_iterations), "PPO", disable=RANK > 0)):
        if iteration % args.checkpoint_every == 0:
            save(optimizer=optimizer, stage=2, iteration=iteration, step=step)
        started, step = time.perf_counter(), step + args.batch_size
        # everything random follows from (seed, iteration), so a resumed run equals an uninterrupted one
        torch.manual_seed(derive_seed(args.seed, 3, iteration) + RANK)
        left = 1 - iteration / args.num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = left * args.learning_rate
        optimizer.param_groups[1]["lr"] = left * (args.critic_learning_rate or args.learning_rate)

        # 1. collect: answers of the actor, their scores, values and log-probabilities. (The log-probabilities
        # from sampling are not used: a cache rounds differently, so the first ratio would not be 1.)
        prompts = [data.prompts[i] for i in torch.randint(len(data.prompts), (num_prompts,)).tolist()]
        prompts = [prompt for prompt in prompts for _ in range(args.answers_per_prompt)]
        answers, _ = generate(models, models.actor, prompts)
        mask, finished = answers.mask, finished_answers(models, answers)
        prefix_scores = score(models, prompts, answers)
        scores, kl_coef = at_end(prefix_scores, mask), models.kl_coef.item()
        values, logprobs, ref_logprobs, kl, ref_states = assess(models, answers, args.kl_coef > 0)

        # 2. advantages: rewards of actions (tokens or whole answers), then GAE. Nothing follows the last
        # action, whether the answer is finished or not: it is a termination.
        in_reward, in_loss = (kl_coef, 0.0) if args.kl_in == "reward" else (0.0, kl_coef)
        at_last = -args.eos_penalty * (~finished).float() + (0.0 if args.dense_reward else scores)
        rewards = token_rewards(at_last, logprobs, ref_logprobs, mask, in_reward)
        if args.dense_reward:
            rewards = rewards + dense_rewards(prefix_scores, mask)
        rewards, old_logprobs = (per_action(x, mask, args.action_level) for x in (rewards, logprobs))
        num_actions = rewards.shape[1]  # 1 for whole answers: column 0, whose value is V(prompt)
        acted, old_values = mask[:, :num_actions], values[:, :num_actions]
        next_values, next_acted = (F.pad(x[:, 1:], (0, 1)) for x in (old_values, acted))
        by_time = [x.T for x in (rewards, old_values, next_values, ~next_acted, torch.zeros_like(acted))]
        advantages = compute_gae(*by_time, args.gamma, args.gae_lambda)[0].T
        returns = compute_gae(*by_time, args.gamma, critic_lambda)[1].T
        if args.norm_adv:
            # kl_coef in the loss is divided by the same deviation, so that it means the same in both places
            in_loss /= advantages[acted].std().item() + 1e-8
            advantages = advantages.masked_scatter(acted, normalize(advantages[acted]))
        batch = Batch(*answers, ref_states, old_logprobs, old_values, advantages, returns)

        # 3. epochs: passes over the shuffled answers, in one loop, so that one break ends all of them
        losses, ptx_losses, logprob_pairs = [], [], []
        for rows in minibatches(batch, args.minibatch_size // WORLD_SIZE, args.update_epochs):
            minibatch = Batch(*rows)
            optimizer.zero_grad()
            parts, new_logprobs = add_gradients(models, minibatch, in_loss)
            if args.ptx_coef:
                texts = data.ptx_texts or data.texts
                chosen = torch.randint(len(texts), (args.minibatch_size // WORLD_SIZE,)).tolist()
                ptx_losses.append(accumulate(models, lm_loss, [texts[i] for i in chosen], args.ptx_coef))
            grad_norms = torch.stack([clip_gradient(x, args.max_grad_norm) for x in learners])
            losses.append(torch.cat((average(parts), grad_norms)))
            mb_acted = minibatch.mask[:, :num_actions]
            logprob_pairs.append((new_logprobs[mb_acted], minibatch.logprobs[mb_acted]))
            if args.target_kl and average(approx_kl(*logprob_pairs[-1])) > args.target_kl:
                break
            if iteration < args.critic_warmup:
                models.actor.zero_grad()  # so that Adam skips the actor and gathers no moments for it
            optimizer.step()
        optimizer.zero_grad()  # frees the gradients
        answer_kl = average((kl * mask).sum(1).mean()).item() if args.kl_coef else math.nan
        if args.kl_target is not None and iteration >= args.critic_warmup:
            new_coef = adapt_kl_coef(kl_coef, answer_kl, args.kl_target, args.batch_size, args.kl_horizon)
            models.kl_coef.fill_(new_coef)

        # 4. log: means over the minibatches (losses) or over the answers of this process (scores, lengths)
        policy_loss, critic_loss, grad_norm, critic_grad_norm = torch.stack(losses).mean(0)
        require(torch.stack(losses).isfinite().all(), f"losses or gradients are not finite at step {step}")
        new, old = (torch.cat(column) for column in zip(*logprob_pairs, strict=True))
        clip_coef = torch.where(new > old, args.clip_coef_high or args.clip_coef, args.clip_coef)
        scalars = {
            "rlhf/score": scores.mean(),
            "rlhf/response_length": mask.sum(1).float().mean(),
            "rlhf/finished": finished.float().mean(),
            "losses/policy_loss": policy_loss,
            "losses/value_loss": critic_loss,
            "losses/entropy": -logprobs[mask].mean(),  # estimated from the sampled tokens
            "losses/approx_kl": approx_kl(new, old),
            "losses/clipfrac": clip_fraction(new, old, clip_coef),
            "losses/explained_variance": explained_variance(old_values[acted], returns[acted]),
            "losses/grad_norm": grad_norm,
            "losses/critic_grad_norm": critic_grad_norm,
            "charts/kl_coef": kl_coef,
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
        }
        if args.kl_coef:
            scalars["rlhf/kl"] = answer_kl
        if data.labeller:
            said = zip(prompts, decode(models, answers), strict=True)
            scalars["rlhf/gold"] = np.mean([data.labeller(x.text, answer) for x, answer in said])
        if args.ptx_coef:
            scalars["losses/ptx_loss"] = torch.stack(ptx_losses).mean() / args.ptx_coef
        history.append({tag: float(value) for tag, value in scalars.items()})
        speed = mask.sum().item() * WORLD_SIZE / (time.perf_counter() - started)
        for tag, value in (history[-1] | {"charts/tokens_per_second": speed}).items():
            writer.add_scalar(tag, value, step)
        progress.set_postfix_str(f"score {scores.mean():.2f}, KL {answer_kl:.1f}, {speed:.0f} tokens/s")
        if args.eval_every and (iteration + 1) % args.eval_every == 0 and RANK == 0:
            best = max(row.get("eval/win_rate", -1.0) for row in history)
            history[-1] |= evaluate(models, data, writer, step)
            if history[-1]["eval/win_rate"] > best:
                save_policy(models, run_dir / "best_policy")

    save(optimizer=optimizer, stage=2, iteration=args.num_iterations, step=step)
    if RANK == 0:
        save_policy(models, run_dir / "policy")
        # logged one step after the checkpoint: resuming here deletes it and logs it again
        evaluate(models, data, writer, step + 1)
        writer.close()
        print(f"run: {run_dir}" + (" (already finished)" if first_iteration == args.num_iterations else ""))
    return history


# -------------------------------------------------------------------------------------------- the utilities


SCRIPT, FORMAT = "ppo_rlhf_llm", 4  # checkpoint header
FREE = {"resume", "evaluate", "total_episodes", "generate", "eval_prompts", "track", "micro_batch_size"}


class UserError(ValueError):
    """A wrong option, file or environment, which main() reports without a traceback."""


def require(condition: object, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_same(name: str, difference: Tensor, limit: float = 1e-3) -> None:
    """Raise UserError if a difference that should be 0 is larger than limit."""
    worst = difference.detach().abs().max().item()
    require(worst <= limit, f"self-check: {name} (off by {worst:.2g}; the limit is {limit:g})")


def check_models(models: Models, prompts: list[Prompt], fresh: bool) -> None:
    """Check that sampling, training and padding agree, in float32. fresh: stage 3 has not begun.

    Raises UserError with the probable cause: dropout, wrong positions, attention to padding, a filter in the
    sampling, or logits that differ from those of the model's own forward pass.
    """
    bf16, models.bf16 = models.bf16, False
    answers, sampled = generate(models, models.actor, prompts)
    mask, first = answers.mask, assess(models, answers)
    check_same("sampling differs: dropout, cache, filter or temperature", (sampled - first.logprobs)[mask])
    if fresh:
        check_same("actor and reference differ before stage 3", first.kl[mask], 1e-6)
    ids = F.pad(answers.ids, (5, 5), value=models.tokenizer.pad_token_id)
    padded = assess(models, Answers(ids, F.pad(answers.attention, (5, 5)), F.pad(mask, (0, 5))))
    for name, x, y in zip(("values", "logprobs"), padded, first, strict=False):
        check_same(f"padding changes {name}: positions or the mask", (x[:, :-5] - y)[mask])
    models.bf16 = bf16


@torch.no_grad()
def evaluate(models: Models, data: Data, writer=None, step: int = 0) -> dict[str, float]:
    """Compare the policy with the SFT model on held-out prompts; print and log the result and return it.

    The labeller decides which answer is better; without a labeller, the score does.
    """
    args, rows, columns = models.args, [], []
    torch.manual_seed(derive_seed(args.seed, 0, 0, 1))
    for prompts in chunks(data.held_out_prompts[: args.eval_prompts], args.batch_size):
        texts, scores = [], []
        for model in (models.reference, models.actor):  # after the loop, answers are those of the actor
            answers, _ = generate(models, model, prompts)
            texts.append(decode(models, answers))
            scores.append(at_end(score(models, prompts, answers), answers.mask).tolist())
        kl = (assess(models, answers).kl * answers.mask).sum(1)
        columns.append(torch.stack((kl, answers.mask.sum(1), finished_answers(models, answers))))
        for prompt, *row in zip(prompts, *texts, *scores, strict=True):
            judged = [data.labeller(prompt.text, text) for text in row[:2]] if data.labeller else row[2:]
            rows.append((prompt.text.strip(), row[0], judged[0], row[1], judged[1]))
    kl, lengths, finished = torch.cat(columns, 1).mean(1).tolist()
    before, after = np.array([row[2::2] for row in rows]).T
    win_rate, judge = (np.sign(after - before) + 1).mean() / 2, "gold" if data.labeller else "score"
    error = math.sqrt(win_rate * (1 - win_rate) / len(rows))
    distinct = sum(len({row[3] for row in some}) for some in chunks(rows, 100)) / len(rows)
    metrics = {"win_rate": win_rate, "kl": kl, "distinct": distinct, "finished": finished}
    metrics |= {"response_length": lengths} | ({"gold": after.mean()} if data.labeller else {})
    form = "{}\n  before: {!r} ({judge} {:.1f})\n  after:  {!r} ({judge} {:.1f})"
    samples = [form.format(*row, judge=judge) for row in rows[:20]]
    print("\n" + "\n\n".join(samples[:6]))
    change = f"{judge} {before.mean():.2f} -> {after.mean():.2f}, KL {kl:.2f} nats, {lengths:.1f} tokens"
    rates = f"{change}, {finished:.1%} finished, {distinct:.0%} distinct"
    print(f"\nevaluation: better than SFT for {win_rate:.1%} +- {error:.1%} of {len(rows)} prompts, {rates}")
    if writer:
        writer.add_text("answers", textwrap.indent("\n\n".join(samples), "    "), step)
        for name, value in metrics.items():
            writer.add_scalar(f"eval/{name}", value, step)
    return {f"eval/{name}": float(value) for name, value in metrics.items()}


def evaluate_run(args: Args) -> None:
    """Evaluate the saved policy, or answer --generate with it and with the SFT model."""
    _, state = open_run(args)
    require(state["stage"] == 2, f"stage 3 has not begun; --resume {args.evaluate} continues the run")
    models = Models(args).to(set_up_torch(args))
    models.load_state_dict(state["models"])
    if not args.generate:
        data = load_data(models)
        require(state["data"] == data.digest(), f"the data have changed since {args.evaluate} was started")
        evaluate(models, data)
        return
    from_files = args.sft_data or args.preference_data or args.prompt_data
    # prompts of the built-in data end with a line break
    (prompt,) = encode(models, args.generate + "\n" * (not from_files))
    for name, model in (("before", models.reference), ("after", models.actor)):
        answers, _ = generate(models, model, [prompt])
        print(f"{name}: {decode(models, answers)[0]!r}")


def set_up_torch(args: Args) -> torch.device:
    """Initialise torch.distributed and deterministic kernels. Return the device to learn on."""
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()  # gloo for tensors on CPUs, nccl for those on GPUs
    sys.stdout = None if RANK > 0 else sys.stdout  # only process 0 prints
    require(not args.cuda or torch.cuda.is_available(), "--cuda needs a GPU, and torch does not find one")
    if args.cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for determinism
        torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda" if args.cuda else "cpu")


def open_run(args: Args) -> tuple[Path, dict]:
    """Return the run folder and its checkpoint, which is empty for a new run.

    Raises UserError for options that a saved run cannot change, or if a new run's folder contains a run.
    """
    run_dir = Path(args.resume or args.evaluate or args.run_dir or new_run_dir(args))
    if args.resume or args.evaluate:
        state = load_checkpoint(run_dir)
        saved = state["args"]
        free = FREE | ({"cuda"} if args.evaluate else set())
        changed = [name for name in saved.keys() - free if getattr(args, name) != saved[name]]
        require(not changed, f"options of a saved run cannot change: {', '.join(sorted(changed))}")
        require(args.total_episodes >= saved["total_episodes"], "--total-episodes can only be increased")
        if args.resume and args.total_episodes > saved["total_episodes"]:
            print(f"schedules follow the new total of {args.total_episodes} answers")
        if state["stage"] == 2:
            state["models"] |= load_checkpoint(run_dir / "frozen")["models"]
        return run_dir, state
    if RANK == 0:
        require(not (run_dir / "checkpoint.pt").exists(), f"{run_dir} contains a run: use --resume {run_dir}")
        run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir, dict(stage=0, iteration=0, step=0, history=[], models=None, optimizer=None, data=None)


def new_run_dir(args: Args) -> str:
    """Return a new run folder; the time in nanoseconds keeps runs that start together apart."""
    return f"runs/gpt__{SCRIPT}__{args.seed}__{time.time_ns()}"


def open_writer(args: Args, run_dir: Path, first_step: int) -> SummaryWriter:
    """Open a TensorBoard writer in run_dir. Discard what a killed run logged after its last checkpoint."""
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


def save_checkpoint(run_dir, args, models, writer, history, data, optimizer, stage, iteration, step) -> None:
    """Write run_dir/checkpoint.pt atomically: write a temporary file, then rename it.

    The models that stage 3 does not change are written to run_dir/frozen when it begins. step counts the rows
    of all stages.
    """
    writer.flush()  # first: a resumed run can drop surplus events, but not restore lost ones
    if RANK > 0:  # all processes have the same state
        return
    state = {"script": SCRIPT, "format": FORMAT, "args": vars(args) | {"resume": None, "evaluate": None}}
    state |= {"stage": stage, "iteration": iteration, "step": step, "history": history, "data": data}
    weights, named = models.state_dict(), models.named_parameters(remove_duplicate=False)
    frozen = {x for x, y in named if stage == 2 and (x.startswith("reward.") or not y.requires_grad)}
    saved = {run_dir: {name: x for name, x in weights.items() if name not in frozen}}
    if stage == 2 and iteration == 0:
        saved[run_dir / "frozen"] = {name: x for name, x in weights.items() if name in frozen}
    for folder, some in reversed(saved.items()):
        path = folder / "checkpoint.pt"
        folder.mkdir(exist_ok=True)
        try:
            with open(f"{path}.tmp", "wb") as file:
                torch.save(state | {"models": some, "optimizer": optimizer and optimizer.state_dict()}, file)
        except RuntimeError as error:  # torch hides the reason, such as a full disk
            raise OSError(f"cannot write {path}: {error.__context__ or error}") from error
        os.replace(f"{path}.tmp", path)


def save_policy(models: Models, folder: Path) -> None:
    """Save the actor and its tokenizer for transformers, or the weights of the built-in GPT."""
    folder.mkdir(exist_ok=True)
    if models.args.model:
        models.actor.generation_config.eos_token_id = models.ends.unique().tolist()
        (merge_adapters(models.actor) if models.args.lora_rank else models.actor).save_pretrained(folder)
        models.tokenizer.save_pretrained(folder)
    else:
        torch.save(models.actor.state_dict(), folder / "gpt.pt")


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
    args = None
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that cannot show all characters
        args = parse_args()
        (evaluate_run if args.evaluate else train)(args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if RANK > 0:
            os._exit(0)  # because threads of gloo can abort a process that ends normally
    except (UserError, ImportError, OSError) as error:
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        saved = args and not args.evaluate and Path(args.resume or args.run_dir, "checkpoint.pt").exists()
        sys.exit("stopped" + (f"; use --resume {args.resume or args.run_dir}" if saved else ""))


if __name__ == "__main__":
    main()
