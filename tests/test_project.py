"""Test the project as a whole: shared text, self-contained files, and the claims of its documentation."""

import ast
import functools
import importlib.metadata
import io
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from collections import defaultdict

import pytest
from suite import PAGES, ROOT, SCRIPTS, load_module, section

# Names whose text differs between the scripts, with the reasons.
DIFFERENT: dict[str, str] = {
    "Args": "the options of the variant",
    "Agent": "the distribution of the actions, and the network for images",
    "make_envs": "Atari games and images are for discrete actions",
    "CheckedEnv": "discrete actions can be masked",
    "minibatch_gradient": "the loss of the variant",
    "train": "the variant itself",
    "make_agent": "the action spaces that the script is for",
    "evaluate": "discrete actions can be masked; answers are compared, not played",
    "load_agent": "the arguments of Agent",
    "set_up_torch": "the matrices of a language model are worth more than one thread",
    "open_run": "RLHF runs in three stages",
    "new_run_dir": "RLHF has no environment to name a run after",
    "open_writer": "the metric that sums up a run",
    "save_checkpoint": "the penalty's coefficient; three stages and four models",
    "main": "what a saved run can do",
}
# Maximum lines of code of each script, without blank lines, comments and docstrings.
BUDGETS = {"ppo_continuous": 500, "ppo_penalty": 550, "ppo_discrete": 600, "ppo_rlhf_llm": 1050}
# Utilities. The algorithm is the rest: options, mathematics, model, environments, train().
PLUMBING = {
    *("UserError", "require", "make_agent", "evaluate", "set_up_torch", "compiled", "check_finite", "main"),
    *(
        "open_run",
        "new_run_dir",
        "open_writer",
        "save_checkpoint",
        "load_checkpoint",
        "load_agent",
        "parse_args",
    ),
}


def definitions(script):
    """Return the top-level functions and classes of a script: name -> text."""
    text = (ROOT / f"{script.__name__}.py").read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def test_one_name_has_one_text_in_all_scripts():
    texts = defaultdict(set)
    for script in SCRIPTS:
        for name, text in definitions(script).items():
            texts[name].add(text)
    different = {name for name, variants in texts.items() if len(variants) > 1}
    assert different == set(DIFFERENT), "make the texts equal, or add or remove an entry of DIFFERENT"


def code_lines(text):
    """Return the numbers of the lines that are not blank, comments or docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*ignored, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def test_lines_of_code_are_counted():
    text = 'def f(x):  # one\n    """Docstring."""\n\n    # comment\n    return [\n        x,\n    ]\n'
    assert code_lines(text) == {1, 5, 6, 7}


def imported(script):
    """Return the names of the packages that a script imports."""
    nodes = list(ast.walk(ast.parse((ROOT / f"{script.__name__}.py").read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
class TestScript:
    def test_imports_nothing_of_this_project(self, script):
        allowed = {"gymnasium", "numpy", "torch", "tqdm", "tyro"} | sys.stdlib_module_names
        assert imported(script) <= allowed | {
            "ale_py",
            "peft",
            "transformers",
            "wandb",
        }  # imported only on demand

    def test_its_metadata_block_names_what_it_imports_in_ranges_that_hold_what_is_pinned(self, script):
        text = (ROOT / f"{script.__name__}.py").read_text()
        block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text).group(1)
        metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
        ranges = {re.match(r"[\w-]+", entry).group(): entry for entry in metadata["dependencies"]}
        pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
        assert set(ranges) == imported(script) & set(pins) | {"tensorboard"}  # imported by torch
        for name, entry in ranges.items():
            lowest = re.search(r">=([\d.]+)", entry)
            if lowest:
                number = lambda version: [int(x) for x in re.findall(r"\d+", version)[:3]]  # noqa: E731
                assert number(lowest.group(1)) <= number(pins[name])
            importlib.metadata.version(name)

    @pytest.mark.slow
    def test_alone_in_an_empty_folder_it_runs(self, script, short_run):
        assert (short_run(script.__name__) / "checkpoint.pt").exists()

    def test_importing_it_does_nothing(self, script, tmp_path):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script.__name__}"
        result = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
        )
        assert result.stdout == result.stderr == "" and not list(tmp_path.iterdir())

    def test_it_keeps_to_its_budget_of_lines_with_one_statement_on_each(self, script):
        text = (ROOT / f"{script.__name__}.py").read_text()
        assert len(code_lines(text)) <= BUDGETS[script.__name__]
        assert max(map(len, text.splitlines())) <= 110
        statements = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
        assert len(statements) == len(set(statements))

    def test_at_least_half_of_it_serves_the_algorithm(self, script):
        if not hasattr(script, "make_envs"):
            return  # RLHF has more utilities, for its three stages
        text = (ROOT / f"{script.__name__}.py").read_text()
        lines, plumbing = code_lines(text), set()
        for node in ast.parse(text).body:
            if getattr(node, "name", None) in PLUMBING or isinstance(node, ast.Import | ast.ImportFrom):
                plumbing.update(range(node.lineno, node.end_lineno + 1))
        assert len(lines & plumbing) <= len(lines) / 2

    def test_no_function_but_train_is_longer_than_40_lines(self, script):
        tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        long = {node.name for node in functions if node.end_lineno - node.lineno + 1 > 40}
        assert long <= {"train"}


# options for a run of a few seconds: of a control script, of RLHF
SHORT = [
    "--total-timesteps 2048 --eval-episodes 1",
    "--layers 1 --width 16 --num-texts 64 --num-pairs 20 --total-episodes 64 --answer-length 8"
    " --eval-prompts 10",
]


def table(title):
    """Return the rows of the first table in a section of the documentation, as lists of cells."""
    rows = [line.strip("|").split("|") for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize("title", ["Details", "Details of RLHF"])
def test_the_details_table_names_functions_defaults_and_switches_that_exist(title):
    scripts = [script for script in SCRIPTS if hasattr(script, "make_envs") == (title == "Details")]
    texts = {script: (ROOT / f"{script.__name__}.py").read_text() for script in scripts}
    for detail, where, _source, default, switch in table(title):
        parts = [part for name in re.findall(r"`([\w.]+)`", where) for part in name.split(".")]
        assert any(
            all(re.search(rf"(def|class) {part}\b", text) for part in parts) for text in texts.values()
        ), detail
        for option in re.findall(r"`--(?:no-)?([\w-]+)", switch):
            assert any(hasattr(script.Args(), option.replace("-", "_")) for script in scripts), detail
        # `option = value`, preceded by the name of a script if it applies to that script only
        stated = re.findall(r"(?:`(ppo_\w+)`: )?`(\w+) = ([^`]+)`", default)
        assert stated or "=" not in default, detail
        for _, option, _ in stated:
            values = {script: value for script, name, value in stated if name == option}
            for script in scripts:
                if hasattr(script.Args(), option):
                    actual = repr(getattr(script.Args(), option))
                    assert actual == values.get(script.__name__, values.get("")), (detail, script)


@pytest.fixture
def tables(monkeypatch):
    pytest.importorskip("scipy", reason="requirements-extra.txt")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_module(ROOT / "benchmarks" / "tables.py", "tables")


def test_the_tables_of_the_documentation_are_those_of_the_benchmarks(tables):
    found = [(page, *match) for page, text in PAGES.items() for match in tables.MARK.findall(text)]
    assert len(found) > 10
    for page, _, name, text in found:
        assert text == tables.TABLES[name](), (page.name, name)


@pytest.mark.parametrize(
    ("words", "turns"),
    [
        (
            r"([\d.]+) times\s+the speed of stable-baselines3",
            ("HalfCheetah-v5", "eager", "stable-baselines3"),
        ),
        (r"([\d.]+) times with `--compile`", ("HalfCheetah-v5", "--compile", "stable-baselines3")),
        (r"([\d.]+) times as fast as TRL", ("RLHF", "eager", "TRL")),
    ],
)
def test_the_readme_quotes_the_measured_speed(tables, words, turns):
    (quoted,) = re.findall(words, PAGES[ROOT / "README.md"])
    assert float(quoted) == round(float(tables.ratio(*turns).split()[0]), 1)


def test_the_changelog_has_the_version_and_the_formats_of_the_checkpoints():
    changes = (ROOT / "CHANGELOG.md").read_text()
    latest = changes.split("\n## ")[1]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert latest.startswith(version) and f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    for script in SCRIPTS:
        assert f"`{script.__name__}.py` (format {script.FORMAT})" in latest


def a_run(last_100=0.0, seconds=10.0, curve=""):
    return dict(last_100_episodes=str(last_100), seconds=str(seconds), steps="100", curve=curve)


def test_table_1_has_0_for_the_random_policy_and_1_for_the_best_run(tables, monkeypatch):
    returns = {variant: 0.0 for variant in tables.TABLE_1} | {"clipping 0.2": 30.0, "clipping 0.1": 20.0}
    runs = {(variant, "Reacher-v5", 1): a_run(last_100) for variant, last_100 in returns.items()}
    runs |= {("clipping 0.1", "Reacher-v5", 2): a_run(18.0), ("random", "Reacher-v5", 1): a_run(10.0)}
    monkeypatch.setattr(tables, "RUNS", runs)
    header, _, *lines = tables.table_1().splitlines()
    rows = {line.split(" | ")[0]: line for line in lines}
    assert header == "| setting | paper | ours (worst run) | Reacher (1) |"  # most settings have one seed
    assert rows["| clipping 0.2"] == "| clipping 0.2 | 0.82 | 1.00 (1.00) | 1.00 |"
    assert rows["| clipping 0.1"] == "| clipping 0.1 | 0.76 | 0.45 (0.40) | 0.45 |"
    assert rows["| fixed KL 10"] == "| fixed KL 10 | 0.69 | -0.50 (-0.50) | -0.50 |"


def test_a_task_is_solved_where_the_mean_of_two_blocks_of_episodes_reaches_the_bar(tables, monkeypatch):
    curves = ["25:0 50:10 75:4 100:8", "25:0 50:2 75:2 100:0"]
    runs = {("ppo", "Task-v0", seed): a_run(curve=curve) for seed, curve in enumerate(curves)}
    monkeypatch.setattr(tables, "RUNS", runs)
    assert tables.seconds_to_solve("ppo", "Task-v0", 6) == [7.5, float("inf")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_links_to_exists(page):
    paths = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page])
    assert not [path for path in paths if not (page.parent / path).exists()]


def test_the_readme_links_to_every_page_and_is_short():
    readme = PAGES[ROOT / "README.md"]
    assert all(f"(docs/{page.name})" in readme for page in PAGES if page.parent.name == "docs")
    assert len(readme.splitlines()) <= 200 and max(map(len, readme.splitlines())) <= 120


def code_blocks(language):
    """Return the code blocks of all pages as (mark, text); the mark is a comment before the block, if any."""
    pattern = rf"(?:<!-- test: (.*?) -->\n)?```{language}\n(.*?)```"
    return [block for page in PAGES.values() for block in re.findall(pattern, page, re.DOTALL)]


def run_python(block, folder):
    """Run lines of Python in a folder, with the scripts on the path."""
    words = [sys.executable, "-c", block]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=env)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_python_lines_of_the_documentation_run(tmp_path):
    for mark, block in code_blocks("python"):
        if mark.startswith("by hand: "):
            continue
        if mark.startswith("run with "):
            total = mark.removeprefix("run with ")
            block, count = re.subn(total.split("=")[0] + r"=[\d_]+", total, block)
            assert count == 1
            run_python(block, tmp_path)
            continue
        (script,), (run,) = (
            re.findall(r"from (ppo_\w+) import", block),
            set(re.findall(r'"(runs/\w+)"', block)),
        )
        (env_id,) = re.findall(r'gym.make\("([\w-]+)"\)', block)
        train = [sys.executable, str(ROOT / f"{script}.py"), "--env-id", env_id, "--run-dir", run]
        options = ["--total-timesteps", "2048", "--eval-episodes", "1"]
        subprocess.run([*train, *options], check=True, capture_output=True, cwd=tmp_path)
        run_python(block, tmp_path)


def commands():
    """Return (mark, command) for every command in the documentation that is not marked "by hand"."""
    found = []
    for mark, block in code_blocks("bash"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.split("  #")[0].strip()
            if line and not mark.startswith("by hand: "):
                found.append((mark, line))
    return list(dict.fromkeys(found))


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """Return a function: script -> folder of a short run, which is made once."""

    @functools.cache
    def make(script):
        folder = tmp_path_factory.mktemp(script)
        shutil.copy(ROOT / f"{script}.py", folder)
        run(f"python {script}.py {SHORT[script == 'ppo_rlhf_llm']} --run-dir runs/NAME", folder)
        return folder / "runs" / "NAME"

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("mark", "line"), commands(), ids=lambda x: str(x)[:60])
def test_every_command_of_the_documentation_runs(mark, line, tmp_path, short_run):
    """Run the command as written, except that a training command marked "long" gets fewer steps."""
    if "mujoco" in mark:
        pytest.importorskip("mujoco", reason="needs requirements-extra.txt")
    if "atari" in mark:
        pytest.importorskip("ale_py", reason="needs requirements-extra.txt")
    if "moviepy" in mark:
        pytest.importorskip("moviepy", reason="needs requirements-extra.txt")
    for path in [
        *ROOT.glob("ppo_*.py"),
        ROOT / "requirements.txt",
        ROOT / "README.md",
        ROOT / "pyproject.toml",
    ]:
        shutil.copy(path, tmp_path)
    if "runs/NAME" in line:
        (script,) = re.findall(r"ppo_\w+", line) or ["ppo_continuous"]
        shutil.copytree(short_run(script), tmp_path / "runs" / "NAME")
    if "long" in mark and "runs/NAME" not in line and "--help" not in line:
        line = re.sub(r" --total-timesteps [\d_]+", "", line) + " " + SHORT["rlhf" in line]
        line += " --update-epochs 1" if "atari" in mark else ""
    run(line, tmp_path)


def run(line, folder):
    line = re.sub(r"^python ", f"{sys.executable} ", line)
    result = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=folder, timeout=300)
    assert result.returncode == 0, f"{line}\n{result.stderr}"
