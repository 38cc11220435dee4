# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6", "gymnasium>=1.1", "numpy>=2", "tyro>=1.0.17", "tensorboard>=2.18", "tqdm>=4.60",
# ]
# ///
"""Proximal Policy Optimization (PPO), clipped surrogate, continuous actions: one file from end to end.

    python ppo_continuous.py --env-id Pendulum-v1          trains, evaluates, saves
    tensorboard --logdir runs                              shows it
    torchrun --nproc-per-node=2 ppo_continuous.py          trains in two processes
    python ppo_continuous.py --resume runs/NAME            goes on as if it had never stopped
    python ppo_continuous.py --evaluate runs/NAME          plays the saved agent

Paper: Schulman et al. 2017, https://arxiv.org/abs/1707.06347 (equation numbers below are its own).
Read from top to bottom: options, maths, model, environments, train(); plumbing comes last.

Left out: 1. images (ppo_discrete.py has the network for them); 2. recurrent policies; 3. actions that
are not a Box (ppo_discrete.py); 4. off-policy corrections, curiosity, self-play: other algorithms.

Shapes: T steps of a rollout, N environments, B rows of a minibatch, O observation and A action dimensions.
"""

import argparse
import copy
import dataclasses
import io
import math
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm


@dataclass
class Args:
    """PPO with a clipped surrogate for continuous actions."""

    env_id: str = "Pendulum-v1"
    """Gymnasium id; `module:Name-v0` imports the module first"""
    total_timesteps: int = 100_000
    """environment steps of the whole run, over all environments"""
    learning_rate: float = 7e-4
    """Adam's step size (alpha)"""
    num_envs: int = 8
    """parallel environments (N), those of all processes together"""
    num_steps: int = 256
    """steps of each environment in one rollout (T)"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero at the end of the run"""
    gamma: float = 0.99
    """discount factor (gamma)"""
    gae_lambda: float = 0.95
    """bias against variance of the advantages (lambda): 0 is one-step TD, 1 is Monte Carlo"""
    num_minibatches: int = 16
    """minibatches that each epoch cuts the N * T rows into"""
    update_epochs: int = 10
    """passes over each rollout (K)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """how far the probability ratio may go from one before its gradient stops (epsilon)"""
    clip_vloss: bool = False
    """clip the value loss too, by the same amount"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (c2)"""
    vf_coef: float = 0.5
    """weight of the value loss (2 c1: the loss has a 0.5 of its own)"""
    max_grad_norm: float = 0.5
    """largest L2 norm of the whole gradient"""
    target_kl: float | None = None
    """stop the epochs at the first minibatch whose approx_kl exceeds this, in nats (None: never)"""
    log_std_init: float = -0.5
    """log standard deviation of the actions at the start, in units of half the action range"""
    norm_obs: bool = True
    """normalise observations by running mean and deviation"""
    norm_reward: bool = True
    """divide rewards by the running deviation of the discounted return"""
    seed: int = 1
    """seed of weights, noise, shuffles and environments"""
    cuda: bool = False
    """learn on the GPU (small networks are faster on the CPU)"""
    compile: bool = False
    """make one compiled graph of the learning step: a slower start, then faster"""
    async_envs: bool = False
    """one process per environment: same results, faster if a step is slow"""
    run_dir: str | None = None
    """folder of the run (None: runs/{env_id}__{script}__{seed}__{time})"""
    checkpoint_every: int | None = None
    """iterations between checkpoints; episodes in progress are cut off there (None: a tenth of the run)"""
    eval_episodes: int = 20
    """episodes played with the mean action at the end"""
    capture_video: bool = False
    """film the evaluation's first environment into videos/ in the run folder"""
    track: bool = False
    """also log to Weights & Biases (WANDB_PROJECT and WANDB_ENTITY say where)"""
    resume: str | None = None
    """run folder to continue, with the options it was started with"""
    evaluate: str | None = None
    """run folder whose saved agent plays, without training"""

    @property
    def run_name(self) -> str:
        return self.env_id.replace("/", "-").replace(":", "-")

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    @property
    def checkpoint_interval(self) -> int:
        return self.checkpoint_every or max(1, self.num_iterations // 10)

    def __post_init__(self) -> None:
        limits = {"seed": (0, 9e18), "gamma": (0, 1), "gae_lambda": (0, 1), "log_std_init": (-10, 10)}
        limits |= {"learning_rate": (1e-12, 1), "ent_coef": (0, 1e6), "vf_coef": (0, 1e6)}
        for field in dataclasses.fields(self):
            option, value = "--" + field.name.replace("_", "-"), getattr(self, field.name)
            types, kind = get_args(field.type) or (field.type,), type(value)
            if value == "" or (kind not in types and not (kind is int and float in types)):
                names = " or ".join(t.__name__ for t in types)
                raise ValueError(f"{option} is {value!r}; it must be {names}")
            low, high = limits.get(field.name, (1, 9e18) if kind is int else (1e-12, math.inf))
            if kind in (int, float) and not low <= value <= high:
                raise ValueError(f"{option} is {value}; it must lie between {low} and {high}")
        rows, parts = self.batch_size, self.num_minibatches
        if rows % parts or rows == parts:  # one row alone has no deviation to normalise by
            middle = min(parts, rows // 2)
            divisors = [d for d in range(middle // 4 + 1, 4 * middle + 1) if rows % d == 0 and d < rows]
            nearest = sorted(sorted(divisors, key=lambda d: abs(math.log(d / parts)))[:2])
            raise ValueError(
                f"num_envs * num_steps = {rows} does not divide into --num-minibatches {parts} of two "
                f"rows or more; {' or '.join(map(str, nearest)) or 'other sizes'} would do"
            )
        if self.num_envs % WORLD_SIZE or self.minibatch_size % WORLD_SIZE:
            raise ValueError(
                f"--num-envs {self.num_envs} and minibatches of {self.minibatch_size} rows must be divisible "
                f"by the {WORLD_SIZE} processes of torchrun"
            )
        if self.num_iterations == 0:
            raise ValueError(f"--total-timesteps is less than one rollout, num_envs * num_steps = {rows}")
        if self.resume and self.evaluate:
            raise ValueError("--resume goes on training and --evaluate only plays: give one of them")


# ------------------------------------------------------------------------------------------ the maths


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    truncations: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Truncated generalised advantage estimation (PPO eq. 11-12) -> (advantages, returns), all (T, N).

    Row t is transition t, next_values[t] is V of its true successor. A termination is death: no future, so
    no gamma * V(successor). A truncation (a time limit) is not: there is a future, only it was not played,
    so V(successor) stands for it. After either another episode begins, from which no credit flows back.
    """
    terminations, truncations = terminations.bool(), truncations.bool()
    deltas = rewards + gamma * next_values * ~terminations - values  # eq. 12
    decays = gamma * gae_lambda * (~(terminations | truncations)).to(deltas.dtype)
    # T steps over N numbers each: numpy is several times faster here than tensors are on any device
    deltas, decays = deltas.cpu().numpy(), decays.cpu().numpy()
    advantages, advantage = np.empty_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage  # eq. 11, as a recursion
    advantages = torch.as_tensor(advantages, device=values.device)
    return advantages, advantages + values


def normalize(x: Tensor) -> Tensor:
    """x shifted and scaled to mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std() + 1e-8)


def clipped_policy_loss(
    new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_coef: float
) -> Tensor:
    """Per-element -L^CLIP (PPO eq. 7), to minimise. All (B,); log-probabilities in nats."""
    ratio = torch.exp(new_logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages)


def value_loss(new_values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Per-element 0.5 * squared error, to minimise. All (B,); clip_coef None: not clipped.

    not in the paper: moving farther than clip_coef from old_values gains nothing (openai/baselines).
    """
    loss = 0.5 * (new_values - returns) ** 2
    if clip_coef is None:
        return loss
    clipped_values = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
    return torch.max(loss, 0.5 * (clipped_values - returns) ** 2)


def gaussian_logprobs(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(actions; mean, exp(log_std)) in nats, summed over A. (..., A), log_std also (A,) -> (...)."""
    z = (actions - mean) * torch.exp(-log_std)
    return -0.5 * (z * z).sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * log_std.shape[-1]


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy of a diagonal Gaussian in nats, summed over A; it has no mean in it. (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def approx_kl(new_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """KL(old, new) in nats from samples of old: mean of (r - 1) - log r, r = new / old; never negative.

    Estimator k3 of http://joschu.net/blog/kl-approx.html.
    """
    logratio = new_logprobs - old_logprobs
    return (torch.expm1(logratio) - logratio).mean()


def clip_fraction(new_logprobs: Tensor, old_logprobs: Tensor, clip_coef: float) -> Tensor:
    """Share of the ratios that lie outside 1 - clip_coef to 1 + clip_coef."""
    return ((torch.exp(new_logprobs - old_logprobs) - 1).abs() > clip_coef).float().mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 as good as a constant. (B,), (B,) -> ()."""
    return 1 - (returns - values).var() / returns.var()


def running_sums(rewards: np.ndarray, dones: np.ndarray, gamma: float, start: np.ndarray) -> np.ndarray:
    """Sums over the episode so far, after each row. (T, N), (T, N), start (N, 3) -> (T, N, 3).

    The three are c = r + gamma * c, whose deviation scales rewards; the return; the length. The row after
    a done begins from zero, the first row from start.
    """
    per_step = np.stack([rewards, rewards, np.ones_like(rewards)], axis=-1).astype(np.float64)
    decays = np.array([gamma, 1.0, 1.0])
    sums, carry = np.empty_like(per_step), start
    for t in range(len(rewards)):
        sums[t] = per_step[t] + decays * carry
        carry = sums[t] * ~dones[t, :, None]
    return sums


# ------------------------------------------------------------------------------------------ the model


class RunningMoments(nn.Module):
    """Mean and variance of all the rows that update() has seen; saved and loaded with the weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Adds rows (B, size): the moments of two samples made one, Chan et al. 1979."""
        rows = rows.double()
        mean, var, count = rows.mean(0), rows.var(0, correction=0), len(rows)
        total = self.count + count
        delta = mean - self.mean
        moment2 = self.var * self.count + var * count + delta**2 * self.count * count / total
        self.mean.add_(delta * count / total)
        self.var.copy_(moment2 / total)
        self.count.copy_(total)


def mlp(x, parameters, tanh=torch.tanh):
    """Layers of tanh units and a linear last one, (..., inputs) -> (..., outputs). For tensors or arrays."""
    *hidden, last_weight, last_bias = parameters
    for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
        x = tanh(x @ weight + bias)
    return x @ last_weight + last_bias


def mlp_parameters(inputs: int, outputs: int, last_gain: float, hidden=(64, 64)) -> nn.ParameterList:
    """Weights and biases for mlp(). Not in the paper: orthogonal weights, zero biases."""
    parameters, sizes = nn.ParameterList(), [inputs, *hidden, outputs]
    gains = [math.sqrt(2)] * len(hidden) + [last_gain]
    for rows, columns, gain in zip(sizes[:-1], sizes[1:], gains, strict=True):
        parameters.append(nn.init.orthogonal_(torch.empty(columns, rows), gain).T.contiguous())
        parameters.append(torch.zeros(columns))
    return parameters


def standardize(obs, mean, var):
    """Observations in deviations from their mean, at most 10 (not in the paper). For tensors or arrays."""
    return ((obs - mean) / (var + 1e-8) ** 0.5).clip(-10, 10)


class Agent(nn.Module):
    """Gaussian policy, value function, and the running statistics that normalise what they see."""

    def __init__(self, obs_size: int, action_low: Tensor, action_high: Tensor, args: Args) -> None:
        super().__init__()
        action_size = action_low.numel()
        self.actor = mlp_parameters(obs_size, action_size, last_gain=0.01)  # at first it hardly acts
        self.critic = mlp_parameters(obs_size, 1, last_gain=1.0)
        self.log_std = nn.Parameter(args.log_std_init * torch.ones(action_size))  # the same in every state
        self.norm_obs = args.norm_obs
        self.obs_moments = RunningMoments(obs_size)
        self.return_moments = RunningMoments(1)
        # [-1, 1] becomes [low, high]; where a bound is infinite, actions pass as they are
        finite = torch.isfinite(action_low) & torch.isfinite(action_high)
        self.register_buffer("action_low", action_low)
        self.register_buffer("action_high", action_high)
        center = torch.where(finite, (action_low + action_high) / 2, 0.0)
        self.register_buffer("action_center", center.float())
        self.register_buffer("action_scale", torch.where(finite, (action_high - action_low) / 2, 1.0).float())

    def normalize_obs(self, obs: Tensor) -> Tensor:
        """Raw observations (..., O) -> what the networks take."""
        return standardize(obs, self.obs_moments.mean, self.obs_moments.var) if self.norm_obs else obs

    def normalize_rewards(self, rewards: Tensor) -> Tensor:
        """Rewards divided by the deviation of the discounted return; centring would change the task."""
        var = self.return_moments.var
        return (rewards / torch.where(var > 0, var.sqrt(), 1.0)).clip(-10, 10)

    def action_mean(self, obs: Tensor) -> Tensor:
        """Normalised observations (..., O) -> mean of the actions (..., A)."""
        return mlp(obs, self.actor)

    def value(self, obs: Tensor) -> Tensor:
        """Normalised observations (..., O) -> V(obs) (...), in normalised reward."""
        return mlp(obs, self.critic).squeeze(-1)

    def acting_policy(self, like: np.ndarray | Tensor) -> Callable:
        """(raw obs (..., O), noise (..., A)) -> (actions as sampled (..., A), actions for the environment).

        For use until weights or statistics change. It works on arrays or on tensors, like what it is given
        here. For one small step arrays take a fifth of the time, and no GPU has to be waited for.
        """
        tensors = torch.is_tensor(like)
        parts = [*self.actor, self.log_std.exp(), self.obs_moments.mean, self.obs_moments.var]
        parts += [self.action_center, self.action_scale, self.action_low, self.action_high]
        parts = [x.detach() if tensors else x.detach().cpu().numpy() for x in parts]
        *parameters, std, obs_mean, obs_var, center, scale, low, high = parts

        def policy(obs, noise):
            obs = obs.float() if tensors else obs.astype(np.float32)
            obs = standardize(obs, obs_mean, obs_var) if self.norm_obs else obs
            actions = mlp(obs, parameters, torch.tanh if tensors else np.tanh) + std * noise
            # clipped and mapped for the environment alone: log-probabilities belong to the action as sampled
            mapped = center + scale * actions.reshape(*actions.shape[:-1], *low.shape)
            return actions, mapped.clip(low, high)

        return policy

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray | Tensor:
        """Raw observations, one (O,) or a batch (N, O) -> actions for env.step(), of the same kind."""
        check_observation(obs, tuple(self.obs_moments.mean.shape))
        noise = torch.zeros(*obs.shape[:-1], len(self.log_std))
        noise = noise if deterministic else noise.normal_()
        noise = noise.to(obs.device) if torch.is_tensor(obs) else noise.numpy()
        return self.acting_policy(like=obs)(obs, noise)[1]


def flatten_parameters(model: nn.Module) -> Tensor:
    """Makes all parameters views of one flat vector: one call clips their gradient, one updates them."""
    parameters = list(model.parameters())
    weights = torch.cat([parameter.detach().flatten() for parameter in parameters]).requires_grad_()
    parts = weights.detach().split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view_as(parameter)
    return weights


# --------------------------------------------------------------------------------------- the processes


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, written into x, the same bits in each."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """x of all processes, which have equal shapes, joined in the order of their ranks."""
    if WORLD_SIZE == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


# ------------------------------------------------------------------------------------ the environments


def make_envs(args: Args, num_envs: int, video_folder: Path | None = None) -> gym.vector.VectorEnv:
    """The one place to replace for environments of your own.

    Called once with num_envs 1 for the spaces, then at every checkpoint and for the evaluation; the one
    before is closed first. What it returns has num_envs, single_observation_space, single_action_space,
    reset(seed=[one for each]), step and close; it resets in the step that ends an episode (SAME_STEP), with
    the last observation in info["final_obs"], and gives new arrays at every step. If these are tensors (of
    the device that learns), its actions are, too.
    """

    def make(index: int) -> gym.Env:
        if video_folder is not None and index == 0:
            env = gym.make(args.env_id, render_mode="rgb_array")
            played = args.eval_episodes // num_envs  # by each environment of an evaluation
            env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda k: k < played)
        else:
            env = gym.make(args.env_id)
        env, space = Watched(env, RANK * num_envs + index), env.observation_space
        if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3:
            raise UserError(f"{args.env_id} shows images; only ppo_discrete.py has a network for them")
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            env = gym.wrappers.FlattenObservation(env)  # Dict, Tuple, Discrete (one-hot), Box of other shapes
        return env

    vector_env = Workers if args.async_envs else gym.vector.SyncVectorEnv
    env_fns = [lambda index=index: make(index) for index in range(num_envs)]
    return vector_env(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def derive_seed(*key: int) -> int:
    """A 32-bit seed from a tuple of numbers; other tuples, of other lengths too, give unrelated seeds."""
    return int(np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(1)[0])


# ---------------------------------------------------------------------------------------- the algorithm


def minibatches(rows: Sequence[Tensor], size: int, epochs: int) -> Iterator[tuple[Tensor, ...]]:
    """Rows (B, ...), shuffled anew for each of the epochs and cut into minibatches of this size."""
    for _ in range(epochs):
        shuffle = torch.randperm(len(rows[0]), device=rows[0].device)
        yield from zip(*(x[shuffle].split(size) for x in rows), strict=True)


def minibatch_gradient(
    agent: Agent, minibatch: tuple[Tensor, ...], args: Args
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (minus eq. 9) at B rows of the rollout -> its gradient, means, new log-probabilities.

    The gradient is one vector for all weights, averaged over processes and clipped; the means (4,) are of
    policy loss, value loss and entropy, and the gradient's norm before clipping; log-probabilities (B,).
    """
    obs, actions, old_logprobs, old_values, advantages, returns = minibatch
    new_logprobs = gaussian_logprobs(actions, agent.action_mean(obs), agent.log_std)
    new_values = agent.value(obs)
    if args.norm_adv:  # not in the paper: clip_coef and the learning rate then fit all reward scales
        advantages = normalize(advantages)  # those of all processes
    advantages = advantages[:, RANK]  # those of this one
    value_clip_coef = args.clip_coef if args.clip_vloss else None
    policy_loss = clipped_policy_loss(new_logprobs, old_logprobs, advantages, args.clip_coef).mean()
    critic_loss = value_loss(new_values, old_values, returns, value_clip_coef).mean()
    entropy = gaussian_entropy(agent.log_std)
    loss = policy_loss + args.vf_coef * critic_loss - args.ent_coef * entropy  # minus eq. 9

    gradients = torch.autograd.grad(loss, list(agent.parameters()), materialize_grads=True)
    gradient = total(torch.cat([x.flatten() for x in gradients])) / WORLD_SIZE
    grad_norm = gradient.norm()
    gradient = gradient * (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)  # not in the paper
    means = torch.stack((policy_loss, critic_loss, entropy, grad_norm)).detach()
    return gradient, means, new_logprobs.detach()


def train(args: Args) -> list[float]:
    """Algorithm 1 of the paper. Returns the returns of all training episodes, in the order they ended."""
    device = set_up_torch(args)
    gradient_of = compiled(minibatch_gradient, args) if args.compile else minibatch_gradient
    envs = look_at_envs(args)
    run_dir, checkpoint = open_run(args)
    torch.manual_seed(derive_seed(args.seed))
    obs_size, actions = envs.single_observation_space.shape[0], envs.single_action_space
    agent = Agent(obs_size, torch.as_tensor(actions.low), torch.as_tensor(actions.high), args).to(device)
    weights = flatten_parameters(agent)
    # not in the paper: epsilon 1e-5, TensorFlow's at the time
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    first_iteration, episode_returns = 0, []
    if checkpoint:
        first_iteration, episode_returns = checkpoint["iteration"], checkpoint["episode_returns"].tolist()
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    first_step, last_step = first_iteration * args.batch_size, args.num_iterations * args.batch_size
    writer = open_writer(args, run_dir, resumed_at=first_step if checkpoint else None)
    line = "{desc}  {percentage:3.0f}%  {rate_fmt}  {remaining} left{postfix}"
    steps = dict(initial=first_step, total=last_step, unit=" steps")
    progress = tqdm(desc=str(run_dir), **steps, bar_format=line, disable=RANK > 0)
    num_envs = args.num_envs // WORLD_SIZE  # of this process, and which of all N these are:
    mine = slice(RANK * num_envs, (RANK + 1) * num_envs)

    for iteration in range(first_iteration, args.num_iterations):
        started, step = time.perf_counter(), (iteration + 1) * args.batch_size
        if iteration == first_iteration or iteration % args.checkpoint_interval == 0:
            # Everything random from here on follows from (seed, iteration), so a resumed run equals one that
            # never stopped. The environments are made anew because a used one, given reset(seed), need not
            # repeat a fresh one (BipedalWalker does not).
            save_checkpoint(run_dir, args, iteration, agent, optimizer, episode_returns)
            torch.manual_seed(derive_seed(args.seed, iteration))
            envs.close()
            envs = make_envs(args, num_envs)
            seeds = [derive_seed(args.seed, iteration, i) for i in range(args.num_envs)]
            obs_now, _ = envs.reset(seed=seeds[mine])
            sums = np.zeros((args.num_envs, 3))  # of the episodes in progress, see running_sums
        if args.anneal_lr:  # not in the paper for control; its Atari runs do it
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / args.num_iterations)

        # 1. collect: T steps of N environments. The loop only acts; what can be batched comes later.
        rows, policy = [], agent.acting_policy(like=obs_now)
        noise = torch.randn(args.num_steps, args.num_envs, len(agent.log_std))[:, mine]
        noise = noise.to(device) if torch.is_tensor(obs_now) else noise.numpy()
        for t in range(args.num_steps):
            action, env_action = policy(obs_now, noise[t])
            reset_obs, reward, termination, truncation, info = envs.step(env_action)
            successor, done = reset_obs, termination | truncation
            if done.any():  # an episode's last action leads to its last observation, not to the reset
                successor = copy.deepcopy(reset_obs)  # an array or a tensor
                for i in torch.as_tensor(done).nonzero().flatten().tolist():
                    successor[i] = info["final_obs"][i]
            rows.append((obs_now, action, successor, reward, termination, truncation))
            obs_now = reset_obs
        raw_obs, actions, raw_next_obs, rewards, terminations, truncations = (
            torch.stack(x) if torch.is_tensor(x[0]) else torch.as_tensor(np.stack(x)).to(device)
            for x in zip(*rows, strict=True)
        )
        raw_obs, raw_next_obs, rewards = raw_obs.float(), raw_next_obs.float(), rewards.float()
        check_finite(run_dir, step - args.batch_size, next_obs=raw_next_obs, obs=raw_obs, reward=rewards)
        all_rewards, dones = (gather(x, 1).cpu().numpy() for x in (rewards, terminations | truncations))
        all_sums = running_sums(all_rewards, dones, args.gamma, start=sums)
        sums = all_sums[-1] * ~dones[-1, :, None]
        _, ended_returns, ended_lengths = all_sums[dones].T
        episode_returns += ended_returns.tolist()

        # 2. advantages, from one pass over all rows with the weights that acted: so the first ratio is one.
        # (Before the environments are made anew the last row is a truncation: GAE ends there anyway.)
        with torch.no_grad():
            if args.norm_reward:  # nothing acts on rewards, so their scale may count these rows already
                agent.return_moments.update(torch.as_tensor(all_sums[..., :1], device=device).flatten(0, 1))
                rewards = agent.normalize_rewards(rewards)
            obs, next_obs = agent.normalize_obs(raw_obs), agent.normalize_obs(raw_next_obs)
            old_values, next_values = agent.value(obs), agent.value(next_obs)
            old_logprobs = gaussian_logprobs(actions, agent.action_mean(obs), agent.log_std)
            advantages, returns = compute_gae(
                rewards, old_values, next_values, terminations, truncations, args.gamma, args.gae_lambda
            )
        advantages = gather(advantages.unsqueeze(-1), -1)  # (T, N, processes): all shuffle alike
        batch = [x.flatten(0, 1) for x in (obs, actions, old_logprobs, old_values, advantages, returns)]

        # 3. epochs: K passes over the shuffled rows, in one flat loop, so that one break ends them all
        losses, logprob_pairs = [], []
        for mb in minibatches(batch, args.minibatch_size // WORLD_SIZE, args.update_epochs):
            weights.grad, means, new_logprobs = gradient_of(agent, mb, args)
            losses.append(means.clone())  # a captured graph writes the next ones to the same place
            logprob_pairs.append((new_logprobs.clone(), mb[2]))  # new, old
            if args.target_kl and total(approx_kl(*logprob_pairs[-1])) / WORLD_SIZE > args.target_kl:
                break
            optimizer.step()
        if args.norm_obs:
            # frozen until here: what has acted has learned (the first iteration saw them unscaled)
            agent.obs_moments.update(gather(raw_obs.flatten(0, 1)))

        # 4. log: means over every minibatch of the iteration
        policy_loss, critic_loss, entropy, grad_norm = total(torch.stack(losses).mean(0)) / WORLD_SIZE
        check_finite(run_dir, step, policy_loss=policy_loss, value_loss=critic_loss, grad_norm=grad_norm)
        check_finite(run_dir, step, obs_var=agent.obs_moments.var, return_var=agent.return_moments.var)
        logprobs = [gather(torch.cat(column)) for column in zip(*logprob_pairs, strict=True)]  # new, old
        scalars = {
            "losses/policy_loss": policy_loss,
            "losses/value_loss": critic_loss,
            "losses/entropy": entropy,
            "losses/approx_kl": approx_kl(*logprobs),
            "losses/clipfrac": clip_fraction(*logprobs, args.clip_coef),
            "losses/explained_variance": explained_variance(
                *(gather(x).flatten() for x in (old_values, returns))
            ),
            "losses/grad_norm": grad_norm,
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/SPS": args.batch_size / (time.perf_counter() - started),
        }
        if dones.any():
            scalars["charts/episodic_return"] = ended_returns.mean()
            scalars["charts/episodic_length"] = ended_lengths.mean()
        for tag, value in scalars.items():
            writer.add_scalar(tag, float(value), step)
        writer.flush()  # before any checkpoint: a resumed run can drop surplus events, not restore lost ones
        progress.set_postfix_str(f"return {np.mean(episode_returns[-20:]):.1f}" if episode_returns else "")
        progress.update(args.batch_size)

    progress.close()
    envs.close()
    save_checkpoint(run_dir, args, args.num_iterations, agent, optimizer, episode_returns)
    if RANK > 0:
        return episode_returns
    evaluation = evaluate(agent, args, run_dir)
    # one step later than the checkpoint, so that a run resumed here drops it and writes it again
    writer.add_scalar("eval/episodic_return", np.mean(evaluation), last_step + 1)
    writer.close()
    hint = "" if episode_returns else ", where no episode ended between checkpoints: raise --checkpoint-every"
    print(f"run: {run_dir}{hint}")
    return episode_returns


# ---------------------------------------------------------------------------------------- the plumbing


SCRIPT, FORMAT = "ppo_continuous", 1  # what a checkpoint says of itself
PATIENCE = 300  # seconds in which a worker must have done its step
FREE_OPTIONS = {"resume", "evaluate", "eval_episodes", "capture_video", "async_envs", "track"}


class UserError(ValueError):
    """A mistake that the user can mend; main() tells it in one line and exits with code 2."""


def look_at_envs(args: Args) -> gym.vector.VectorEnv:
    """One environment, for its spaces and to try the camera. Tells in one line what is wrong with it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            envs = make_envs(args, 1, Path(folder) / "videos" if args.capture_video else None)
            if args.capture_video:
                envs.reset()  # takes the first picture
                envs.close()
    except UserError:
        raise
    except (gym.error.Error, ImportError, AttributeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{args.env_id}: {error}") from error
    observations, actions = envs.single_observation_space, envs.single_action_space
    if not isinstance(actions, gym.spaces.Box) or not np.issubdtype(actions.dtype, np.floating):
        raise UserError(
            f"{args.env_id} has actions {actions}, and this script needs a Box of real numbers; "
            f"try python ppo_discrete.py --env-id {args.env_id}"
        )
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        raise UserError(f"{args.env_id} has observations {observations}, which do not flatten to a vector")
    return envs


class Watched(gym.Wrapper):
    """Tells which environment failed, and where. Many tasks leave their bounds: of a Box the shape counts."""

    def __init__(self, env: gym.Env, index: int) -> None:
        super().__init__(env)
        self.index, self.step_of_episode, space = index, 0, env.observation_space
        self.fits = space.contains if isinstance(space, gym.spaces.Discrete) else lambda obs: True
        if isinstance(space, gym.spaces.Box):
            self.fits = lambda obs: np.shape(obs) == space.shape

    def reset(self, **options):
        self.step_of_episode = 0
        return self.watched(self.env.reset, **options)

    def step(self, action):
        self.step_of_episode += 1
        return self.watched(self.env.step, action)

    def watched(self, function: Callable, *inputs, **options):
        try:
            obs, *_ = result = function(*inputs, **options)
            if not self.fits(obs):
                raise ValueError(f"the observation {obs} is not what {self.env.observation_space} says")
        except Exception as error:  # whatever an environment can raise
            where = f"environment {self.index}, step {self.step_of_episode} of an episode"
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
            raise gym.error.Error(f"{where}: {what}") from error
        return result


class Workers(gym.vector.AsyncVectorEnv):
    """A process for each environment. One that dies, or is silent for PATIENCE seconds, is told of."""

    def reset(self, **options):
        return self.answers(self.reset_async, self.reset_wait, **options)

    def step(self, actions):
        return self.answers(self.step_async, self.step_wait, actions)

    def answers(self, ask: Callable, wait: Callable, *inputs, **options):
        try:
            ask(*inputs, **options)
            return wait(timeout=PATIENCE)
        except (multiprocessing.TimeoutError, EOFError, ConnectionError, gym.error.Error) as error:
            silent = [i for i, pipe in enumerate(self.parent_pipes) if pipe and not pipe.poll()]
            ends = [process.sentinel for process in self.processes]
            dead = [ends.index(end) for end in multiprocessing.connection.wait(ends, timeout=1)]
            for process in self.processes:
                process.kill()
            self.closed = True  # nobody is left to be told of the end
            if isinstance(error, gym.error.Error):
                raise
            index = RANK * self.num_envs + (dead or silent or [0])[0]
            what = "died" if dead else f"is silent for {PATIENCE} seconds"
            raise UserError(f"the process of environment {index} {what}") from error


@torch.no_grad()
def evaluate(agent: Agent, args: Args, run_dir: Path) -> list[float]:
    """Plays args.eval_episodes episodes without noise and gives their returns, unscaled.

    Every environment plays the same number of them, so that short episodes do not crowd out long ones.
    What has not ended after 30,000 steps (half an hour of Atari) counts as it is then: it may never end.
    """
    num_envs = max(n for n in range(1, 11) if args.eval_episodes % n == 0)
    envs = make_envs(args, num_envs, run_dir / "videos" if args.capture_video else None)
    # the last 1 keeps these seeds apart from those of training
    obs, _ = envs.reset(seed=[derive_seed(args.seed, 0, i, 1) for i in range(num_envs)])
    returns, sums, lengths = [], np.zeros(num_envs), np.zeros(num_envs)
    remaining = np.full(num_envs, args.eval_episodes // num_envs)
    while remaining.any():
        obs, *outcome, _ = envs.step(agent.act(obs, deterministic=True))
        rewards, terminations, truncations = (torch.as_tensor(x).cpu().numpy() for x in outcome)
        sums, lengths = sums + rewards, lengths + 1
        for i in np.flatnonzero((terminations | truncations | (lengths == 30_000)) & (remaining > 0)):
            returns.append(float(sums[i]))
            sums[i], lengths[i], remaining[i] = 0, 0, remaining[i] - 1
    envs.close()
    mean, std = np.mean(returns), np.std(returns)
    print(f"evaluation: return {mean:.1f} +- {std:.1f} over {len(returns)} deterministic episodes")
    return returns


def set_up_torch(args: Args) -> torch.device:
    """The device to learn on, with one thread and repeatable arithmetic."""
    torch.set_num_threads(1)  # the tensors are small: more threads would only wait for each other
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group()  # gloo for tensors on CPUs, nccl for those on GPUs
    if not args.cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--cuda needs a GPU, and torch finds none here; leave it out to learn on the CPU")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda")


def compiled(function: Callable, args: Args) -> Callable:
    """The function as one compiled graph (on a GPU captured, so that one launch plays all of it)."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise UserError(
            f"--compile needs a torch that traces gradients, 2.13 does; this is {torch.__version__}"
        )
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("--compile needs a C++ compiler, g++ or clang++, and finds none; leave it out")
    torch._dynamo.config.trace_autograd_ops = True
    print("--compile: the first iteration takes some seconds longer", file=sys.stderr)
    return torch.compile(
        function, fullgraph=True, dynamic=False, mode="reduce-overhead" if args.cuda else None
    )


def check_finite(run_dir: Path, step: int, **tensors: Tensor) -> None:
    """Stops the run at a nan or an infinity. Tensors are (T, N, ...) rows that begin at step, or numbers."""
    for name, x in tensors.items():
        bad = (~torch.isfinite(x)).nonzero()
        if len(bad):
            where = f"step {step}"
            if x.dim() >= 2:
                t, i = bad[0, :2].tolist()
                where = f"step {step + (t + 1) * x.shape[1] * WORLD_SIZE}, "
                where += f"in environment {RANK * x.shape[1] + i}"
            value = x[tuple(bad[0])].item()
            raise UserError(f"{name} is {value} at {where}; {run_dir} keeps the checkpoint before it")


def check_observation(obs: np.ndarray | Tensor, shape: tuple[int, ...]) -> None:
    """Refuses what would be broadcast, or seen on another scale than in training."""
    if np.shape(obs)[-len(shape) :] != shape:
        raise UserError(
            f"an observation has shape {np.shape(obs)}, and the agent was trained on {shape}; what is "
            "no vector (Discrete, Dict, ...) goes through gymnasium.spaces.flatten first"
        )
    if len(shape) == 3 and obs.dtype not in (np.uint8, torch.uint8):
        raise UserError(f"an image is of {obs.dtype}; the agent was trained on bytes (uint8)")


def check_unchanged(args: Args, run_dir: str) -> None:
    """Refuses options that differ from the saved run's; a resumed one may grow longer."""
    saved = load_args(run_dir)
    changed = {name for name in vars(args) if getattr(args, name) != getattr(saved, name)} - FREE_OPTIONS
    changed |= {"track"} if args.evaluate and args.track and not saved.track else set()
    if changed == {"total_timesteps"} and args.resume and args.total_timesteps > saved.total_timesteps:
        print(f"going on to {args.total_timesteps} steps; schedules now follow this length", file=sys.stderr)
    elif changed:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(changed))
        raise UserError(f"{names}: a saved run keeps its own options (--resume lets --total-timesteps grow)")


def open_run(args: Args) -> tuple[Path, dict | None]:
    """The folder of the run and, if it is to go on, its checkpoint."""
    if args.resume:
        check_unchanged(args, args.resume)
        checkpoint = load_checkpoint(args.resume)
        if checkpoint["iteration"] == args.num_iterations:
            print(f"{args.resume} is complete: nothing is left to train, so it is evaluated", file=sys.stderr)
        return Path(args.resume), checkpoint
    now = total(torch.tensor(time.time(), dtype=torch.float64)) / WORLD_SIZE  # the same in all processes
    run_dir = Path(args.run_dir or f"runs/{args.run_name}__{SCRIPT}__{args.seed}__{int(now)}")
    if RANK > 0:
        return run_dir, None
    if (run_dir / "checkpoint.pt").exists():
        raise UserError(f"{run_dir} holds a run already: --resume {run_dir}, or give another --run-dir")
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.run_dir))  # no two runs in a folder that nobody named
    except OSError as error:
        raise UserError(f"cannot make the folder {run_dir}: {error.strerror}") from error
    return run_dir, None


def open_writer(args: Args, run_dir: Path, resumed_at: int | None) -> SummaryWriter:
    """TensorBoard events in run_dir. purge_step drops what a killed run wrote after its last checkpoint."""
    if RANK > 0:
        return SilentWriter(run_dir)
    if args.track:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--track needs Weights & Biases: pip install wandb") from error
        wandb.init(id=run_dir.name, resume="allow", dir=run_dir, config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=0 if resumed_at is None else resumed_at + 1)
    if resumed_at is None:
        options = {name: value for name, value in vars(args).items() if value is not None}
        table = "\n".join(f"|{name}|{value}|" for name, value in options.items())
        writer.add_text("hyperparameters", "|option|value|\n|-|-|\n" + table)
        for summary in hparams(options, {"eval/episodic_return": 0}):
            writer.file_writer.add_summary(summary)
        writer.flush()
    return writer


class SilentWriter:
    """Stands for a SummaryWriter in all processes but the first, which tells for all."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir

    def __getattr__(self, name: str) -> Callable:
        return lambda *inputs, **options: None


def save_checkpoint(run_dir: Path, args: Args, iteration: int, agent, optimizer, returns: list) -> None:
    """Writes run_dir/checkpoint.pt aside, then renames it: a crash leaves the old or the new, whole."""
    if RANK > 0:  # which has the same to save
        return
    options = vars(args) | {"resume": None, "evaluate": None, "checkpoint_every": args.checkpoint_interval}
    checkpoint = {"script": SCRIPT, "format": FORMAT, "args": options, "iteration": iteration}
    checkpoint |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint["episode_returns"] = torch.tensor(returns, dtype=torch.float64)
    path, written, buffer = run_dir / "checkpoint.pt", run_dir / "checkpoint.pt.tmp", io.BytesIO()
    torch.save(checkpoint, buffer)  # not into the file: torch would hide what is wrong with a disk
    with open(written, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)


def load_checkpoint(run_dir: str | Path) -> dict:
    """Reads run_dir/checkpoint.pt with weights_only=True, so nothing in it can execute."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder of a run, such as runs/NAME")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not look at the checksums
                raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script, version = checkpoint["script"], checkpoint["format"]
    except Exception as error:  # whatever a file from outside can make of zipfile and torch
        raise UserError(f"{path} is damaged, or no checkpoint of {SCRIPT}.py") from error
    if (script, version) != (SCRIPT, FORMAT):
        raise UserError(f"{path} is of {script}.py, format {version}; this is {SCRIPT}.py, format {FORMAT}")
    return checkpoint


def load_args(run_dir: str | Path) -> Args:
    """The arguments of a saved run. To resume it: train(dataclasses.replace(load_args(run), resume=run))."""
    options = load_checkpoint(run_dir)["args"]
    try:
        return Args(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{run_dir} has options that this {SCRIPT}.py does not take: {error}") from error


def load_agent(run_dir: str | Path, device: str = "cpu") -> Agent:
    """The agent of a saved run with its statistics: load_agent(run_dir).act(obs, deterministic=True)."""
    state = load_checkpoint(run_dir)["agent"]
    obs_size = len(state["obs_moments.mean"])
    agent = Agent(obs_size, state["action_low"], state["action_high"], load_args(run_dir))
    agent.load_state_dict(state)
    return agent.to(device)


def parse_args() -> Args:
    """The command line. Beside --resume or --evaluate the defaults are what the run was trained with."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume")
    early.add_argument("--evaluate")
    known, _ = early.parse_known_args()
    run_dir = known.resume or known.evaluate
    return tyro.cli(Args, default=load_args(run_dir) if run_dir else None)


def main() -> None:
    """Trains or evaluates as the command line says; tells a user's errors in one line."""
    try:
        if os.name == "posix" and WORLD_SIZE == 1:  # SIGTERM is as Ctrl-C, but for the workers
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        # TensorBoard's thread tells of a full disk at length, and then the next flush raises it here
        known = "_AsyncWriterThread"
        threading.excepthook = lambda x: type(x.thread).__name__ == known or threading.__excepthook__(x)
        args = parse_args()
        if args.evaluate and WORLD_SIZE > 1:
            raise UserError("--evaluate needs no more than one process: start it without torchrun")
        if args.evaluate:
            check_unchanged(args, args.evaluate)
            look_at_envs(args).close()
            evaluate(load_agent(args.evaluate), args, Path(args.evaluate))
        else:
            train(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        if RANK > 0:
            os._exit(0)  # gloo's threads can crash an interpreter that ends as others do
    except (UserError, gym.error.Error, OSError) as error:  # OSError: a full disk, a forbidden folder
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        tqdm.write("stopped; --resume RUN_DIR continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
