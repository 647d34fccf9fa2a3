"""Every method of the table in every train mode, through the entry script: `pytest tests/trainers/test_methods.py`.

A row added to the table is tested here without a line being added. The second part compares each loss trajectory with
TRL's own trainer, called directly on the same rows.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import train_rlhf
from rlhf_args.methods import METHODS, load
from tests.conftest import ROOT, read_rows, slow_but, undocumented
from tests.matrix.answers import spread
from tests.matrix.cells import rollout_flags
from utils.data import prepare, template
from utils.data.rows import hold_out, load_rows
from utils.models.load import load_tokenizer, make_lora
from utils.results.report import SAMPLE_TOKENS

MODES = {
    "full": ["--train_mode", "full"],
    "lora": ["--train_mode", "lora"],
    "dora": ["--train_mode", "lora", "--use_dora"],
    "qlora": ["--train_mode", "qlora"],
}
CELLS = [(name, mode) for name, method in METHODS.items() for mode in MODES if MODES[mode][1] in method.train_modes]
# the others with -m slow: DPO, Reward and PPO train all there is, a whole model, a head that scores, and two models
FAST = [cell for cell in CELLS if cell[1] in ("full", "lora") or cell[0] in ("DPO", "Reward", "PPO")]
STEPS = [
    "--max_samples",
    "16",
    "--max_steps",
    "3",
    "--logging_steps",
    "1",
    "--learning_rate",
    "2e-2",
    "--per_device_train_batch_size",
    "4",
    "--save_strategy",
    "no",
    "--dtype",
    "float32",
]


def train(name, mode, model, out, *more):
    words = [
        "--rlhf_type",
        name,
        *MODES[mode],
        "--model_name_or_path",
        model,
        "--train_data_path",
        METHODS[name].sample_data,
        "--output_dir",
        str(out),
        *STEPS,
        *rollout_flags(name),
        *more,
    ]
    return train_rlhf.main(words)


@pytest.fixture(scope="module")
def reload():
    """Asks a process that has trained nothing what the model in a folder answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.reloader"],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def ask(folder, method, mode, texts):
        asked = {
            "folder": str(folder),
            "task": method.task,
            "four_bit": mode == "qlora",
            "texts": texts,
            "max_new_tokens": SAMPLE_TOKENS,
        }
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        line = next((line for line in process.stdout if line.startswith("ANSWER")), None)
        assert line, "the reloading process died"
        return json.loads(line.removeprefix("ANSWER"))

    yield ask
    process.stdin.close()
    process.wait(timeout=60)


@pytest.mark.parametrize(("name", "mode"), slow_but(FAST, CELLS))
def test_trains_and_reloads_in_a_new_process(name, mode, tiny_model, tmp_path, reload):
    method, out = METHODS[name], tmp_path / "out"
    assert train(name, mode, tiny_model, out, "--eval_fraction", "0.25") == 0

    card = json.loads((out / "run_card.json").read_text())
    assert (card["method"], card["world_size"], card["dropped_rows"]) == (name, 1, {})
    lines = read_rows(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3] and all("loss" in line for line in lines)
    assert {path.name for path in out.iterdir()} >= {"tokenizer.json", "chat_template.jinja", "report.png"}
    assert undocumented(name, out) == []

    # What the trained model said while it was trained, a new process must hear from the folder; and it is not what
    # the start said, so a folder that holds the start would be found out.
    before = [sample["before"] for sample in card["samples"]]
    after = [sample["after"] for sample in card["samples"]]
    assert before != after
    tokenizer = load_tokenizer(out)
    rows = load_rows([method.sample_data], None, method.columns, name, max_samples=16)
    hold_out(rows, 0.25, card["seed"])
    sides = [template.render(tokenizer, values)[:2] for _, values in rows.held_out[:2]]
    if method.task == "SEQ_CLS":
        heard = reload(out, method, mode, [prompt + answer for prompt, answers in sides for answer in answers])
        assert heard == pytest.approx(after, rel=1e-4, abs=1e-5)  # float32 sums in another order once merged
    else:
        assert reload(out, method, mode, [prompt for prompt, _ in sides]) == after


@pytest.mark.parametrize(
    ("name", "mode"),  # tests/matrix has qlora
    slow_but([(name, "full") for name in METHODS], [cell for cell in CELLS if cell[1] != "qlora"]),
)
def test_trains_in_bfloat16(name, mode, tiny_model, tmp_path):
    """Mixed precision as on a GPU: what is float32 and what is bfloat16 must meet nowhere without a cast."""
    assert train(name, mode, tiny_model, tmp_path / "out", "--bf16", "True", "--eval_fraction", "0.25") == 0
    card = json.loads((tmp_path / "out" / "run_card.json").read_text())
    assert (card["arguments"]["dtype"], card["arguments"]["bf16"]) == ("bfloat16", True)
    if METHODS[name].models and mode in ("full", "lora"):  # DoRA rescales, 4-bit adapters are rounded: nearly so
        before = card["held_out"]["before"]
        assert before["kl" if METHODS[name].sample_reward else "margin"] == 0  # the reference is the start, exactly


def losses_of_trl():
    """The methods whose loss is a TRL trainer's own: all but PPO, which test_ppo.py compares with TRL 1.12's."""
    trainers = {name: load(method.trainer) for name, method in METHODS.items()}
    ours = {name for name, kind in trainers.items() if kind.__module__.startswith("trainers.")}
    return [name for name, kind in trainers.items() if name not in ours or "_compute_loss" not in vars(kind)]


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", losses_of_trl())
def test_losses_are_those_of_trl_called_directly(name, mode, tiny_model, tmp_path):
    method = METHODS[name]
    assert train(name, mode, tiny_model, tmp_path / "ours") == 0
    ours = [line["loss"] for line in read_rows(tmp_path / "ours" / "metrics.jsonl")]

    tokenizer = load_tokenizer(tiny_model)
    template.fit_tokenizer(tokenizer, chat=True)
    rows = load_rows([method.sample_data], None, method.columns, name, max_samples=16)
    prepared = prepare.prepare_rows(rows.train, tokenizer, method.columns, 1024)
    sampling = {"max_completion_length": 8, "num_generations": 2, "beta": 0.05} if method.sample_reward else {}
    config = load(method.config)(
        **sampling,
        output_dir=str(tmp_path / "trl"),
        max_steps=3,
        logging_steps=1,
        learning_rate=2e-2,
        bf16=False,
        use_cpu=True,
        per_device_train_batch_size=4,
        save_strategy="no",
    )
    lora = make_lora(method.task, 32, 16, 0.05, None, False) if mode == "lora" else None
    trl_trainer = next(kind for kind in load(method.trainer).__mro__ if kind.__module__.startswith("trl."))
    model = tiny_model
    if method.task == "SEQ_CLS":  # its new head is drawn from the seed, by TRL and here alike before LoRA is
        torch.manual_seed(config.seed)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    trainer = trl_trainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        peft_config=lora,
        train_dataset=prepare.as_dataset(prepared),
        **({"reward_funcs": [spread]} if method.sample_reward else {}),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert len(ours) == 3
    assert ours == theirs  # float32, one thread, the same seed: to the last digit
