"""A new method is one row, one config file and its page: `pytest -m slow tests/trainers/test_new_method.py`.

A copy of the project gains IPO under its own name; the tests that loop over the table must pick it up and pass.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROW = """    "IPO": Method(
        title="Identity Preference Optimization",
        source="arXiv 2310.12036",
        config="rlhf_args.ipo_config:IPOConfig",
        trainer="trl:DPOTrainer",
        columns=PAIR,
        sample_data="data/preference.jsonl",
        models=("ref_model",),
        losses=DPO_LOSSES,
    ),
"""
CONFIG = '''from dataclasses import dataclass, field

import trl


@dataclass
class IPOConfig(trl.DPOConfig):
    """IPO: DPO's trainer with the squared loss."""

    # This loss is what makes DPO's trainer IPO.
    loss_type: list[str] = field(default_factory=lambda: ["ipo"], metadata={"help": "ipo; others as for DPO."})
'''


def python(copy, *words):
    return subprocess.run([sys.executable, "-m", *words], cwd=copy, text=True, capture_output=True, timeout=600)


@pytest.mark.slow
def test_a_method_added_by_one_row_and_one_file_is_covered_by_the_tests(tmp_path):
    copy = tmp_path / "project"
    left_out = {ROOT / name for name in (".git", ".venv", "venv", "models", "output")}  # not utils/models
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: [n for n in names if Path(folder, n) in left_out])
    table = copy / "rlhf_args" / "methods.py"
    table.write_text(table.read_text().replace('    "CPO": Method(', ROW + '    "CPO": Method('))
    (copy / "rlhf_args" / "ipo_config.py").write_text(CONFIG)
    pages = copy / "docs" / "methods"
    (pages / "ipo.md").write_text((pages / "dpo.md").read_text())
    rows = python(copy, "rlhf_args.methods").stdout.strip()
    for name in ("README.md", "README_zh.md"):
        text = (copy / name).read_text(encoding="utf-8")
        between = r"(<!-- methods.*?-->\n).*?(<!-- /methods -->)"
        text = re.sub(between, lambda found: f"{found[1]}{rows}\n{found[2]}", text, flags=re.S)
        (copy / name).write_text(text, encoding="utf-8")

    done = python(
        copy,
        "pytest",
        "tests/trainers/test_methods.py",
        "tests/test_docs.py",
        "-n0",
        "-m",
        "",
        "-vk",
        "IPO or readme or table",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for cell in ("new_process[IPO-full]", "new_process[IPO-qlora]", "trl_called_directly[IPO-lora]"):
        assert re.search(rf"{re.escape(cell)} PASSED", done.stdout), cell
