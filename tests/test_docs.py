"""README, recipes and scripts say what the code does: `pytest tests/test_docs.py`."""

import inspect
import re
import subprocess
import sys

import pytest
import yaml

from rlhf_args.methods import EVERY, METHODS, load, method_table
from tests.conftest import ROOT
from utils.cli import arguments
from utils.cli.recipes import expand


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_method_table_is_the_one_the_code_makes(name):
    found = re.search(r"<!-- methods.*?-->\n(.*?)\n<!-- /methods -->", (ROOT / name).read_text(encoding="utf-8"), re.S)
    assert found and found[1] == method_table(), "write the output of `python -m rlhf_args.methods` there"


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_both_commands_stand_in_the_readme(name):
    readme = (ROOT / name).read_text(encoding="utf-8")
    assert "pip install -r requirements.txt && bash rlhf_run.sh" in readme
    assert "pip install -r requirements-dev.txt && python -m pytest" in readme
    assert "pip install -q -r requirements-dev.txt && python -m pytest" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("name", EVERY)
def test_every_method_has_a_page_that_starts_with_its_command(name):
    page = (ROOT / "docs" / "methods" / f"{name.lower()}.md").read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if line.startswith("    "))
    assert f"{EVERY[name].entry}_run.sh" in command and (name in METHODS) == ("RLHF_TYPE=" in command)
    assert "## What the log says" in page


def pages():
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall("^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_docs_leads_to_a_file_and_a_heading():
    found = 0
    for page in pages():
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
            found += 1
    assert found > 50


def test_the_index_links_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").rglob("*.md") if f"{page.name})" not in index]
    assert missing == []


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_every_file_that_the_readme_names_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:utils|trainers|rlhf_args|tests|docs|data|recipes|accelerate_configs)/[\w./]*)`", text)
    )
    named = {path for path in named if "METHOD" not in path}
    assert len(named) > 40
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_both_readmes_have_the_same_sections_code_and_tables():
    def shape(name):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return [
            line[:3] if line.startswith("## ") else line[:1] for line in lines if line.startswith(("## ", "|", "```"))
        ]

    assert shape("README.md") == shape("README_zh.md")


@pytest.mark.parametrize("name", METHODS)
def test_every_row_of_the_table_names_what_exists(name):
    method = METHODS[name]
    assert (ROOT / method.sample_data).exists()
    assert (ROOT / (method.config.split(":")[0].replace(".", "/") + ".py")).exists()
    config, trainer = load(method.config), load(method.trainer)
    assert config.__name__ == f"{name}Config" and trainer.__name__.endswith("Trainer")


def recipes():
    found = sorted((ROOT / "recipes").glob("*.yaml"))
    assert found
    return found


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.name)
def test_every_recipe_is_read_by_the_real_command_line(path):
    words = expand(["--config", str(path)])
    asked = yaml.safe_load(path.read_text())
    if "num_completions" in asked:
        common, config, left, problems = arguments.parse_rejection(words)
        assert not problems
        _, then = arguments.parse(["--output_dir", "out", *left], config.then)
        asked = {
            flag: value for flag, value in asked.items() if f"--{flag}" not in left or getattr(then, flag) != value
        }
        assert len(left) == 4  # learning_rate and max_length, the training's own
        for flag, value in asked.items():
            assert getattr(common, flag, getattr(config, flag, None)) in (value, [value]), flag
        return
    name = arguments.peek_shared(words)[1] if "rlhf_type" in asked else "GKD"
    common, config = arguments.parse(words, name)
    for flag, value in asked.items():
        found = getattr(common, flag, getattr(config, flag, None))
        assert found == value or found == [value], flag


def test_flags_on_the_command_line_win_over_a_recipe():
    words = expand(["--config", str(recipes()[0]), "--lora_rank", "8", "--learning_rate=3e-6"])
    name = arguments.peek_shared(words)[1]
    common, config = arguments.parse(words, name)
    assert (common.lora_rank, config.learning_rate) == (8, 3e-6)


@pytest.mark.parametrize("name", METHODS)
def test_help_shows_our_flags_before_trls(name, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.parse(["--rlhf_type", name, "--help"], name)
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert (
        0 < shown.index("--train_data_path TRAIN_DATA_PATH") < shown.index("--per_device_train_batch_size PER_DEVICE")
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_default_that_differs_from_trls_has_its_reason_on_the_line_above(name):
    ours = load(METHODS[name].config)
    trl = next(kind for kind in ours.__mro__ if kind.__module__.startswith("trl."))
    for kind in ours.__mro__[: ours.__mro__.index(trl)]:
        source = inspect.getsource(kind).splitlines()
        for key in kind.__annotations__:
            if ours.__dataclass_fields__[key].default != getattr(trl.__dataclass_fields__.get(key), "default", None):
                line = next(n for n, text in enumerate(source) if text.strip().startswith(f"{key}:"))
                assert source[line - 1].strip().startswith("# "), f"{kind.__name__}.{key}"


def test_simpo_and_cposimpo_differ_from_trl_as_the_readme_says():
    simpo, both = load(METHODS["SimPO"].config), load(METHODS["CPOSimPO"].config)
    assert (simpo.loss_type, simpo.cpo_alpha, simpo.beta) == ("simpo", 0.0, 2.0)
    assert (both.loss_type, both.cpo_alpha, both.beta) == ("simpo", 0.5, 2.0)


def test_no_method_name_is_branched_on_outside_the_table():
    names = "|".join(METHODS)
    branch = re.compile(rf"(==|!=| in) *[\[(]?[\"']({names})[\"']")
    files = [
        path
        for path in ROOT.rglob("*.py")
        if not {"tests", "bench", ".venv", "venv"} & set(path.relative_to(ROOT).parts)
    ]
    assert len(files) > 15
    assert [f"{path}: {line}" for path in files for line in path.read_text().splitlines() if branch.search(line)] == []


def test_ruff_finds_nothing():
    for what in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *what, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_type_hints_are_complete_and_right():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_library_that_is_imported_stands_in_the_requirements():
    import ast
    import re
    import sys
    from importlib.metadata import packages_distributions

    files = [
        *ROOT.glob("*.py"),
        *(file for room in ("utils", "trainers", "rlhf_args") for file in (ROOT / room).rglob("*.py")),
    ]
    imported = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    ours = {"common_args", "rlhf_args", "trainers", "utils"}
    optional = {"liger_kernel", "vllm"}  # used where they are installed
    pinned = {name.lower() for name in re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)}
    of = packages_distributions()
    libraries = imported - ours - optional - set(sys.stdlib_module_names)
    assert {"torch", "trl", "psutil"} <= libraries
    assert [name for name in sorted(libraries) if not {one.lower() for one in of[name]} & pinned] == []
