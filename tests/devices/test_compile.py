"""Test --compile: the same learning step as one compiled graph."""

import copy

import pytest
import torch
from suite import CONTROL, SCRIPTS, resumed, same, small

# raised in torch when its compiler is imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture
def graphs():
    """Return a function that counts the graphs that torch has compiled since the test began."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


REAL = [script for script in SCRIPTS if script.__name__ == "ppo_discrete"]


@pytest.mark.parametrize(
    ("ppo", "backend"),
    # only tracing depends on the script, so aot_eager is enough; inductor takes up to a minute
    [
        (CONTROL[0], "aot_eager"),
        *(pytest.param(script, "aot_eager", marks=pytest.mark.slow) for script in CONTROL[1:]),
        *(pytest.param(script, "inductor", marks=pytest.mark.slow) for script in REAL),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_compiled_it_learns_the_same_with_one_graph_for_all_iterations(
    ppo, backend, tmp_path, monkeypatch, graphs
):
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_function(function, **options, backend=backend)
    )
    weights = {False: [], True: []}
    monkeypatch.setattr(
        ppo,
        "save_checkpoint",
        lambda run_dir, args, i, agent, *_: weights[args.compile].append(copy.deepcopy(agent)),
    )
    # values that change between iterations must not cause a recompilation
    options = dict(checkpoint_every=1, learning_rate=1e-3) | (
        {"anneal_clip": True} if hasattr(ppo.Args, "anneal_clip") else {}
    )
    for compile in (False, True):
        ppo.train(small(ppo, tmp_path / str(compile), compile=compile, **options))
    assert graphs() == 1
    eager, compiled = (dict(agents[1].named_parameters()) for agents in weights.values())
    start = dict(weights[False][0].named_parameters())
    for name, parameter in eager.items():
        torch.testing.assert_close(compiled[name], parameter, rtol=1e-4, atol=1e-6)
        assert not parameter.numel() or (parameter - start[name]).abs().max() > 1e-4


@pytest.mark.parametrize("ppo", CONTROL, ids=lambda script: script.__name__)
def test_one_process_can_compile_for_any_number_of_different_options(ppo, monkeypatch, graphs):
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_function(function, **options, backend="eager")
    )

    def scaled(x, args):
        return args.ent_coef * x

    for i in range(10):
        args = ppo.Args(ent_coef=i / 8)
        assert ppo.compiled(scaled, args)(torch.ones(()), args) == i / 8


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path, graphs):
    (ppo,) = REAL
    ppo.train(small(ppo, tmp_path / "long", compile=True, anneal_lr=False))
    ppo.train(small(ppo, tmp_path / "short", compile=True, anneal_lr=False, total_timesteps=256))
    resumed(ppo, tmp_path / "short", total_timesteps=512)
    long, short = (ppo.load_checkpoint(tmp_path / name) for name in ("long", "short"))
    assert same(long["agent"], short["agent"]) and same(long["optimizer"], short["optimizer"])
