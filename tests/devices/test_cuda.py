"""Train on an emulated accelerator, which finds tensors on the wrong device without a GPU.

On the emulated device (torch's "meta") a tensor is a tensor of the CPU behind a wrapper. As on a GPU, an
operation on tensors of two devices raises, except for single numbers, NumPy cannot read a tensor, and every
transfer to the host is counted. Since the CPU computes, results equal those without the device to the bit.
"""

import contextlib
import importlib
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from suite import TIMED, curve, rlhf, scripts_with, small, tiny, two_kinds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
# these accept indices on the CPU
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
transfers = []  # the operations that copied something to the host
used = set()  # the names of all operations; of cumsum only for floating point
# what torch.use_deterministic_algorithms() refuses on CUDA, by its documentation
NONDETERMINISTIC = re.compile(
    "(avg_pool[23]d|adaptive_|fractional_|max_pool3d|reflection_pad|upsample|grid_sampler|replication_pad)"
    ".*backward|max_unpool|nll_loss|ctc_loss|embedding_bag|aten.put_|histc|bincount|kthvalue|median|cumsum"
    "|scatter_reduce|resize_|_weight_norm"
)


class OnDevice(torch.Tensor):
    """A tensor on the emulated device."""

    @staticmethod
    def __new__(cls, inner):
        strides = inner.stride()
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=strides, dtype=inner.dtype, device=DEVICE
        )

    def __init__(self, inner):
        self.inner = inner

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        self.inner = value.inner

    def __format__(self, form):
        return format(self.item(), form)

    def tolist(self):
        transfers.append("tolist")
        return self.inner.tolist()

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is not aten.cumsum.default or args[0].is_floating_point():
            used.add(str(function))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        elsewhere = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
        if elsewhere and function not in MOVES | INDEXING:
            raise RuntimeError(f"{function} has tensors on two devices")
        to_host = kwargs.get("device") == CPU or (function in MOVES and not isinstance(args[0], OnDevice))
        if "device" in kwargs:
            kwargs["device"] = CPU
        if to_host or function in (
            aten._local_scalar_dense.default,
            aten.nonzero.default,
            aten.equal.default,
        ):
            transfers.append(function)
        args, plain = tree_map_only(OnDevice, lambda x: x.inner, (args, kwargs))
        result = function(*args, **plain)
        if function._schema.is_mutable:  # the result is an argument
            for tensor in tensors:
                if isinstance(tensor, OnDevice) and tensor.inner is result:
                    return tensor
        return result if to_host else tree_map_only(torch.Tensor, OnDevice, result)


class Emulation(TorchDispatchMode):
    """Create tensors on the emulated device, and move them there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") != DEVICE or OnDevice in types:
            return function(*args, **kwargs)
        return OnDevice(function(*args, **kwargs | {"device": CPU}).clone())


def moved(create):
    """Return a function that creates a tensor on the CPU and moves it to its device."""
    return lambda *args, device=None, **kwargs: create(*args, **kwargs).to(device)


@contextlib.contextmanager
def emulated(monkeypatch):
    """Emulate a device within the with block and return it."""
    optimizer = importlib.import_module("torch.optim.optimizer")
    with Emulation(), monkeypatch.context() as patch:
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
        for name in ("tensor", "as_tensor"):  # which do not reach a dispatch mode with their device
            patch.setattr(torch, name, moved(getattr(torch, name)))
        yield DEVICE


def test_the_emulation_finds_tensors_on_two_devices_and_counts_transfers(monkeypatch):
    with emulated(monkeypatch) as device:
        x = torch.ones(3).to(device)
        assert x.device == device and (x + 1).device == device and (x * torch.tensor(2.0)).device == device
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        transfers.clear()
        assert x.sum().item() == 3.0 and (x.cpu() == torch.ones(3)).all()
        assert len(transfers) == 2


def test_the_operations_that_are_not_deterministic_are_found(monkeypatch):
    used.clear()
    with emulated(monkeypatch) as device:
        torch.ones(3).to(device).cumsum(0)
    assert any(map(NONDETERMINISTIC.search, used))


@pytest.fixture
def deterministic():
    """Assert that no operation of the test lacks a deterministic form on CUDA, as --cuda requires."""
    used.clear()
    yield
    assert len(used) > 50 and not [name for name in used if NONDETERMINISTIC.search(name)]


class Pixels(gym.Env):
    """Random images in episodes of ten steps."""

    observation_space = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self):
        return self.np_random.integers(256, size=(36, 36, 3), dtype=np.uint8)

    def step(self, action):
        self.steps += 1
        return self.observe(), float(action), self.steps == 10, False, {}


gym.register("Pixels-v0", Pixels)


def equals_training_on_the_cpu(ppo, tmp_path, monkeypatch, **options):
    """Assert that two iterations on the emulated device give the same results and read nothing between."""
    options = options | dict(target_kl=None, total_timesteps=256)  # target_kl reads the KL of every minibatch
    returns = ppo.train(small(ppo, tmp_path / "cpu", **options))
    args = small(ppo, tmp_path / "device", **options)
    gradient, counts = ppo.minibatch_gradient, []

    def counted(agent, *inputs):
        assert all(x.device == DEVICE for x in agent.parameters())
        counts.append(len(transfers))
        return gradient(agent, *inputs)

    monkeypatch.setattr(ppo, "minibatch_gradient", counted)
    monkeypatch.setattr(ppo, "set_up_torch", lambda args: DEVICE)
    with emulated(monkeypatch):
        assert ppo.train(args) == returns
    untimed = ({k: v for k, v in curve(tmp_path / x).items() if k not in TIMED} for x in ("cpu", "device"))
    assert next(untimed) == next(untimed)
    per_iteration = args.num_minibatches * args.update_epochs
    assert len(counts) == 2 * per_iteration
    for first in range(0, len(counts), per_iteration):  # nothing is read within the epochs
        assert len(set(counts[first : first + per_iteration])) == 1


@two_kinds
@pytest.mark.usefixtures("deterministic")
def test_training_on_a_device_equals_training_on_the_cpu(ppo, tmp_path, monkeypatch):
    equals_training_on_the_cpu(ppo, tmp_path, monkeypatch)


@scripts_with("nature_cnn")
@pytest.mark.usefixtures("deterministic")
def test_training_from_images_on_a_device_equals_training_on_the_cpu(ppo, tmp_path, monkeypatch):
    equals_training_on_the_cpu(ppo, tmp_path, monkeypatch, env_id="Pixels-v0")


@pytest.mark.usefixtures("deterministic")
def test_all_stages_of_rlhf_on_a_device_equal_those_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf, "HELD_OUT", 16)
    less = dict(kl_in="loss", num_texts=16, num_pairs=8, answer_length=8, total_episodes=16, eval_prompts=4)
    history = rlhf.train(tiny(tmp_path / "cpu", **less))
    monkeypatch.setattr(rlhf, "set_up_torch", lambda args: DEVICE)
    monkeypatch.setattr(rlhf.Models, "autocast", lambda models: contextlib.nullcontext())
    with emulated(monkeypatch):
        assert rlhf.train(tiny(tmp_path / "device", **less)) == history
