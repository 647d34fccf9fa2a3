"""Faster defaults change nothing but rounding, and --plain is TRL to the last digit: utils/training/pace.py.

    pytest tests/training/test_pace.py               on the tiny model, in float32
    pytest tests/training/test_pace.py -m slow       the other train modes, and two processes

21 rows of unequal lengths, 4 passes of 2 a step: two whole steps and one of two passes and a half, twice over.
"""

import functools
import json
import random
import shutil
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

import train_rlhf
from rlhf_args.methods import DIALOGUE, METHODS, PROMPT, UNPAIRED, load
from tests.conftest import make_model, read_rows, slow_but, write_rows
from tests.matrix.cells import run_cell
from utils.cli import arguments, recipes
from utils.cli.run import Run
from utils.data import deal, prepare, template
from utils.data.rows import load_rows
from utils.models import folders
from utils.models.load import load_tokenizer, make_lora
from utils.results import report
from utils.rewards.functions import load_functions
from utils.runtime import environment
from utils.runtime.errors import Refused
from utils.survival import resume
from utils.training import pace
from utils.training.chapters import prepare_text

# A sum in another order is off by some 1e-7 of its size, float32's rounding, and a loss here by ten times that: it
# hangs on differences of sums. Adam divides a gradient by its size, and noise by the size of noise: hence its epsilon.
TOLERANCE = 5e-6
# A gradient of a pair is a difference of two that nearly cancel, and what is left is off by as much more of its size.
NORM_TOLERANCE = 1e-4
FLAGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-5,  # at 1e-3 the steps are wild, and a rounding grows with each
    "adam_epsilon": 1e-4,
    "logging_steps": 1,
    "save_strategy": "no",
}
REWARD = "def letters(completions, **kwargs):\n    return [float(sum(map(ord, str(c))) % 7) for c in completions]\n"
ROLLOUT = {"max_completion_length": 8, "num_generations": 4, "max_steps": 4, "beta": 0.05, "num_iterations": 2}


def make_rows(columns, count=21):
    draw = random.Random(1)

    def turn(role):
        return [{"role": role, "content": "x" * draw.randint(1, 150)}]

    for number in range(count):
        asked, one, other = turn("user"), turn("assistant"), turn("assistant")
        if columns == DIALOGUE:
            yield {"messages": asked + one}
        elif columns == UNPAIRED:
            yield {"prompt": asked, "completion": one, "label": number % 3 == 0}
        elif columns == PROMPT:
            yield {"prompt": asked}
        else:
            yield {"prompt": asked, "chosen": one, "rejected": other}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and a reward function."""
    folder = tmp_path_factory.mktemp("place")
    make_model(folder / "model")
    (folder / "rewards.py").write_text(REWARD)
    return folder


def flags_of(name, place):
    method = METHODS[name]
    flags = FLAGS | (ROLLOUT if method.columns == PROMPT else {})
    return flags | ({"reward_funcs": f"{place}/rewards.py:letters"} if method.sample_reward else {})


def words_of(name, place, out, *more):
    rows = write_rows(place / f"{name}.jsonl", list(make_rows(METHODS[name].columns)))
    flags = {"rlhf_type": name, "model_name_or_path": place / "model", "train_data_path": rows, "output_dir": out}
    flags |= flags_of(name, place)
    return [*(str(word) for flag, value in flags.items() for word in (f"--{flag}", value)), *map(str, more)]


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """Runs the command: (loss and gradient norm of each step, run_card.json). Of the same flags once."""

    @functools.cache
    def run(name, mode, *more):
        out = tmp_path_factory.mktemp("run") / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report.Report, "draw", lambda self: None)  # a third of the time
            assert train_rlhf.main(words_of(name, place, out, "--train_mode", mode, *more)) == 0
        return steps_of(read_rows(out / "metrics.jsonl")), json.loads((out / "run_card.json").read_text())

    return run


def steps_of(log):
    steps = [(line["loss"], line["grad_norm"]) for line in log if "loss" in line]
    assert len(steps) >= 4 and len({norm for _, norm in steps}) == len(steps)
    return torch.tensor(steps, dtype=torch.float64)


def run_trl(name, mode, place, out):
    """The same of TRL's trainer called directly, as its documentation shows it."""
    import trl
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    method, model, more = METHODS[name], str(place / "model"), {}
    tokenizer = load_tokenizer(model)
    template.fit_tokenizer(tokenizer, chat=True)
    rows = load_rows([f"{place}/{name}.jsonl"], None, method.columns, name)
    prepared = prepare.prepare_rows(rows.train, tokenizer, method.columns, 1024)
    flags = {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    flags |= flags_of(name, place)
    if functions := flags.pop("reward_funcs", None):
        more["reward_funcs"] = load_functions([functions], rows.train, tokenizer)
    config = load(method.config)(output_dir=str(out), **flags)
    assert config.gradient_checkpointing  # as TRL has it, on a CPU too
    torch.manual_seed(config.seed)
    scores = method.task == "SEQ_CLS"
    kind, labels = (AutoModelForSequenceClassification, {"num_labels": 1}) if scores else (AutoModelForCausalLM, {})
    # CPO's is in trl.experimental; trainers/cpo_trainer.py has it with one tokenisation for all methods
    trainer = getattr(trl, f"{name}Trainer", None) or load(method.trainer)
    trainer = trainer(
        model=kind.from_pretrained(model, dtype=torch.float32, **labels),
        args=config,
        processing_class=tokenizer,
        train_dataset=prepare.as_dataset(prepared),
        peft_config=make_lora(method.task, 32, 16, 0.05, None, False) if mode == "lora" else None,
        **more,
    )
    trainer.train()
    return steps_of(trainer.state.log_history)


def assert_near(one, other):
    for place, tolerance in enumerate((TOLERANCE, NORM_TOLERANCE)):
        torch.testing.assert_close(one[:, place], other[:, place], rtol=tolerance, atol=tolerance)


# ── --plain is TRL, and the faster defaults are --plain but for rounding ─────────────────────────────────────────────

FAST = [("DPO", "lora"), ("Reward", "lora"), ("SFT", "full")]
CELLS = [(name, mode) for name in ("DPO", "KTO", "Reward", "SFT", "CPO", "RLOO") for mode in ("full", "lora")]


@pytest.mark.parametrize(("name", "mode"), slow_but(FAST, CELLS))
def test_plain_is_trl_to_the_last_digit(name, mode, run, place, tmp_path):
    steps, card = run(name, mode, "--plain")
    assert steps.equal(run_trl(name, mode, place, tmp_path))
    assert card["arguments"]["gradient_checkpointing"]
    assert [line["text"] for line in card["preflight"] if line["kind"] == "pace"] == [
        "--plain: no faster default, all as TRL has it"
    ]


DEAL, ONCE = "deal_by_length", "precompute_ref_log_probs"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "mode", "more", "chosen"),
    [
        ("DPO", "lora", [f"--{ONCE}", "False"], {DEAL}),
        ("DPO", "lora", [f"--{DEAL}", "False"], {ONCE}),
        ("KTO", "lora", [], {ONCE}),
        ("Reward", "lora", [], {DEAL}),
        ("SFT", "full", [], {DEAL}),
        pytest.param("CPO", "lora", [], set(), marks=SLOW),
        pytest.param("DPO", "full", [], {DEAL, ONCE}, marks=SLOW),
        pytest.param("DPO", "full", ["--loss_type", "ipo"], {DEAL, ONCE}, marks=SLOW),
        pytest.param("KTO", "full", ["--loss_type", "apo_zero_unpaired"], {DEAL, ONCE}, marks=SLOW),
        pytest.param("Reward", "full", ["--center_rewards_coefficient", "0.1"], {DEAL}, marks=SLOW),
        pytest.param("SFT", "lora", ["--lora_dropout", "0"], {DEAL}, marks=SLOW),
        pytest.param("SFT", "full", ["--loss_type", "dft"], {DEAL}, marks=SLOW),
        pytest.param("SimPO", "lora", [], {DEAL}, marks=SLOW),
        pytest.param("CPO", "full", ["--cpo_alpha", "0"], {DEAL}, marks=SLOW),
    ],
)
def test_a_faster_default_changes_no_more_than_rounding(name, mode, more, chosen, run):
    steps, card = run(name, mode, *more)
    asked = {flag for flag in (DEAL, ONCE) if card["arguments"].get(flag)}
    said = {
        flag for flag in (DEAL, ONCE) for line in card["preflight"] if line["kind"] == "pace" and flag in line["text"]
    }
    assert asked == said == chosen
    flags = [] if name == "DPO" and mode == "lora" else more  # whose two faster defaults are typed away in turn
    assert_near(steps, run(name, mode, *flags, "--plain")[0])


def test_every_dpo_loss_that_may_be_dealt_is_one_of_rows():
    """Those that sort a pass or take its mean over tokens are not among them; the others are."""
    ((_, losses),) = METHODS["DPO"].by_row
    assert set(METHODS["DPO"].losses) - set(losses) == {"aot", "aot_unpaired", "sft"}


def test_the_fused_optimizer_is_the_default_and_steps_as_the_other(run):
    steps, card = run("SFT", "full")
    assert card["arguments"]["optim"] == "adamw_torch_fused"
    assert_near(steps, run("SFT", "full", "--optim", "adamw_torch")[0])


# ── what is chosen ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def chosen(place, tmp_path):
    """The flags of a run after the choices: (the shared ones, the method's, what is said)."""

    def choose(name, *more):
        words = recipes.expand(words_of(name, place, tmp_path / "out", *more))
        common, config = arguments.parse(words, name)
        rows = load_rows(common.train_data_path, None, METHODS[name].columns, name)
        prepare_text(Run([], name, common, config, rows))
        return common, config, [finding.text for finding in rows.findings if finding.kind == "pace"]

    return choose


@pytest.mark.parametrize(
    "more",
    [
        "--num_train_epochs 1",
        "--max_steps 5",  # 5 x 8 rows of 21
        "--precompute_ref_log_probs False",
        "--sync_ref_model --train_mode full",
        "--disable_dropout False",
        "--neftune_noise_alpha 5",
        "--resume weights_only --train_mode full",
        "--plain",
    ],
)
def test_the_reference_is_not_computed_once(more, chosen):
    assert not chosen("DPO", *more.split())[1].precompute_ref_log_probs


@pytest.mark.parametrize("more", ["", "--max_steps 6", "--train_mode full", "--resume weights_only"])
def test_the_reference_is_computed_once(more, chosen):
    common, config, said = chosen("DPO", *more.split())
    times = 6 * 8 / 21 if "max_steps" in more else 2
    assert config.precompute_ref_log_probs
    assert said[0] == f"--precompute_ref_log_probs: each row is seen {times:g} times, the reference computed once"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("DPO", "--deal_by_length False"),
        ("DPO", "--plain"),
        ("DPO", "--gradient_accumulation_steps 1"),
        ("DPO", "--loss_type sigmoid sft"),
        ("DPO", "--loss_type aot"),
        ("DPO", "--train_sampling_strategy group_by_length"),
        ("DPO", '--accelerator_config {"even_batches":false}'),
        ("DPO", "--disable_dropout False"),
        ("KTO", ""),
        ("CPO", ""),
        ("ORPO", ""),
        ("SimPO", "--cpo_alpha 0.5"),
        ("SFT", "--packing --train_mode full"),
        ("SFT", "--neftune_noise_alpha 5 --train_mode full"),
        ("SFT", ""),  # LoRA's dropout, which SFT leaves on
        ("RLOO", ""),
    ],
)
def test_rows_are_not_dealt_where_it_would_change_more_than_rounding_or_gain_nothing(name, more, chosen):
    assert not chosen(name, *more.split())[0].deal_by_length


def test_where_dropout_is_why_rows_are_not_dealt_it_is_said_and_a_typed_flag_wins(chosen):
    (said,) = chosen("SFT")[2]
    assert said.startswith("rows are not dealt by length, as dropout draws by pass; --deal_by_length would: padding")
    for more in (["--deal_by_length"], ["--lora_dropout", "0"], ["--deal_by_length", "--plain"]):
        assert chosen("SFT", *more)[0].deal_by_length


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("KTO", "", "--deal_by_length with --loss_type kto"),
        ("GRPO", "", "--deal_by_length with this method (Group Relative Policy Optimization"),
        ("SFT", "--packing", "--deal_by_length with --packing True"),
    ],
)
def test_dealing_is_refused_where_a_row_depends_on_those_beside_it(name, more, said, chosen):
    with pytest.raises(Refused, match=r"cannot change places\. Leave --deal_by_length out") as refused:
        chosen(name, "--deal_by_length", *more.split())
    assert refused.value.problems[0].startswith(said)


def test_a_mixture_of_experts_is_balanced_over_a_pass_and_not_dealt(chosen, monkeypatch):
    monkeypatch.setattr(folders, "read_base_config", lambda *path: {"text_config": {"num_local_experts": 8}})
    assert not chosen("DPO")[0].deal_by_length


def test_ddp_looks_for_unused_weights_only_where_there_may_be_some(chosen, monkeypatch):
    assert chosen("DPO")[1].ddp_find_unused_parameters is None  # one process
    monkeypatch.setenv("LAUNCH_PROCESSES", "2")
    _, config, said = chosen("CPO")
    assert config.ddp_find_unused_parameters is False
    assert said == ["--ddp_find_unused_parameters False: every trained weight is used in every pass"]
    assert chosen("CPO", "--ddp_find_unused_parameters", "True")[1].ddp_find_unused_parameters is True
    assert chosen("CPO", "--plain")[1].ddp_find_unused_parameters is None
    assert not chosen("DPO")[1].precompute_ref_log_probs  # which several processes refuse
    monkeypatch.setattr(folders, "read_base_config", lambda *path: {"num_experts": 8})
    assert chosen("CPO")[1].ddp_find_unused_parameters is None
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert chosen("CPO")[1].ddp_find_unused_parameters is None


@pytest.fixture
def gpu(monkeypatch):
    """As if flash attention and Liger were installed beside a GPU; nothing is trained on it."""
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(pace, "has_liger", lambda job: True)
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    monkeypatch.setattr(arguments, "resolve_dtype", lambda dtype, *others: dtype)
    monkeypatch.setattr(environment, "device_defaults", lambda: {"use_cpu": True, "dataloader_pin_memory": False})


@pytest.mark.parametrize(
    ("name", "more", "attention", "padding_free", "liger"),
    [
        ("SFT", "", "flash_attention_2", True, True),
        (
            "SFT",
            "--max_length 250 --max_drop_fraction 1",
            "flash_attention_2",
            False,
            True,
        ),  # rows are longer, and would not be cut
        ("SFT", "--padding_free False", "flash_attention_2", False, True),
        ("SFT", "--packing", "flash_attention_2", False, True),
        ("SFT", "--attn_implementation sdpa", "sdpa", False, True),
        ("SFT", "--attn_implementation flash_attention_2", "flash_attention_2", True, True),
        ("SFT", "--dtype float32", None, False, True),
        ("SFT", "--train_mode full", None, False, True),  # held in float32
        ("SFT", "--use_liger_kernel False", "flash_attention_2", True, False),
        ("SFT", "--plain", None, False, False),
        ("DPO", "", "flash_attention_2", False, True),  # TRL 1.16 ignores its padding_free
        ("Reward", "", "flash_attention_2", None, False),
    ],
)
def test_on_a_gpu_the_kernels_are_chosen_that_are_installed(name, more, attention, padding_free, liger, gpu, chosen):
    common, config, said = chosen(name, *more.split())
    assert common.attn_implementation == attention
    assert getattr(config, "padding_free", None) is padding_free
    assert config.use_liger_kernel is liger
    if name == "SFT":
        assert config.max_length == (None if padding_free else 250 if "250" in more else 1024)
    assert ("--use_liger_kernel: it is installed, and has kernels for this model" in said) is liger


def test_without_a_gpu_no_kernel_is_chosen(chosen):
    common, config, _ = chosen("SFT")
    assert (common.attn_implementation, config.padding_free, config.use_liger_kernel) == (None, False, False)


@pytest.mark.parametrize(
    ("more", "amx", "dtype"),
    [
        ("", True, "float32"),  # a run gives the same on every CPU unless it is asked for
        ("--dtype bfloat16", True, "bfloat16"),
        ("--dtype bfloat16", False, "float32"),
        ("--dtype float32", True, "float32"),
    ],
)
def test_bfloat16_on_a_cpu_that_multiplies_it_is_taken_where_it_is_typed(more, amx, dtype, chosen, monkeypatch):
    monkeypatch.setattr(environment, "has_amx", lambda: amx)
    common, config, _ = chosen("DPO", *more.split())
    assert (common.dtype, config.bf16) == (dtype, dtype == "bfloat16")


def test_a_flag_of_a_recipe_is_typed_and_one_that_is_switched_off_too(tmp_path):
    (tmp_path / "recipe.yaml").write_text("deal_by_length: false\n")
    words = recipes.expand(["--config", str(tmp_path / "recipe.yaml"), "--no_disable_dropout", "--train-mode", "full"])
    assert recipes.typed_flags(words) == {"deal_by_length", "disable_dropout", "train_mode"}


# ── dealing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def steps_taken(order, batch, passes, processes, drop_last, dealt=None):
    """The rows of each step's passes, as accelerate shares them out: [[rows of a pass on all processes, ...], ...]."""
    shares = []
    for rank in range(processes):
        batches = BatchSampler(dealt or order, batch, drop_last)
        shares.append(list(BatchSamplerShard(batches, processes, rank) if processes > 1 else batches))
    assert len({len(share) for share in shares}) == 1
    whole = [[row for part in parts for row in part] for parts in zip(*shares, strict=True)]
    return [whole[start : start + passes] for start in range(0, len(whole), passes)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 12, 16, 21])
def test_each_step_has_the_rows_and_weights_that_it_had(count, processes, drop_last):
    order, lengths = list(range(count)), [7 * row % 13 + 1 for row in range(count)]
    random.Random(0).shuffle(order)
    sampler = deal.Dealt(order, lengths, 2, 3, processes, drop_last)
    assert len(sampler) == len(list(sampler))
    before = steps_taken(order, 2, 3, processes, drop_last)
    after = steps_taken(order, 2, 3, processes, drop_last, sampler)

    def weights(step):
        return Counter(row for rows in step for row in rows for _ in range(12 // len(rows)))  # 12 = 2 x 2 x 3

    assert [weights(step) for step in after] == [weights(step) for step in before]
    for step in after:
        full = [[lengths[row] for row in rows] for rows in step if len(rows) == 2 * processes]
        assert full == [sorted(rows, reverse=True) for rows in full]
        assert all(min(rows) >= max(later) for rows, later in zip(full, full[1:], strict=False))


def test_the_padding_that_is_said_is_that_of_the_passes(chosen, place):
    # 20 tokens in the passes (1, 9) (2, 8), padded to 2 x 9 + 2 x 8 = 34; dealt, in (9, 8) (2, 1), to 18 + 4 = 22
    config, _ = chosen("SFT", "--train_sampling_strategy", "sequential", "--gradient_accumulation_steps", "2")[1:]
    job = Run([], "SFT", None, config, None, train=prepare.Prepared(sizes=[[1], [9], [2], [8]]))
    assert pace.padding(job, dealt=False) == pytest.approx(1 - 20 / 34)
    assert pace.padding(job, dealt=True) == pytest.approx(1 - 20 / 22)
    # a pair is padded to its longer answer: ((3, 5), (5, 1)): 14 of 4 x 5
    job = Run([], "SFT", None, config, None, train=prepare.Prepared(sizes=[[3, 5], [5, 1]]))
    assert pace.padding(job, dealt=False) == pytest.approx(1 - 14 / 20)


def test_a_resume_within_an_epoch_goes_on_with_the_rows_that_are_left(place, tmp_path, monkeypatch):
    monkeypatch.setattr(report.Report, "draw", lambda self: None)
    more = ("--save_strategy", "steps", "--save_steps", 1, "--resume_from_checkpoint", "auto")
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train_rlhf.main(words_of("DPO", place, whole, *more)) == 0
    assert json.loads((whole / "run_card.json").read_text())["arguments"]["deal_by_length"]
    shutil.copytree(whole, again)
    (again / "run_card.json").unlink()
    for step in range(3, 7):  # what a kill after the second of an epoch's three steps leaves
        shutil.rmtree(again / f"checkpoint-{step}")
    assert train_rlhf.main(words_of("DPO", place, again, *more)) == 0
    assert steps_of(read_rows(again / "metrics.jsonl")).equal(steps_of(read_rows(whole / "metrics.jsonl")))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_run_goes_on_from_its_checkpoint_with_other_defaults_of_speed(chosen, place, tmp_path):
    """They change rounding alone, as --auto_batch does; a run that is made longer may come to compute them."""
    rows = load_rows([write_rows(tmp_path / "rows.jsonl", list(make_rows(METHODS["DPO"].columns)))], None,
                          METHODS["DPO"].columns, "DPO")  # fmt: skip
    described = []
    for more in ([], ["--plain"], ["--num_train_epochs", "1"]):
        common, config, _ = chosen("DPO", *more)
        described.append(resume.describe_run(Run([], "DPO", common, config, rows)))
    assert resume.differences(described[0], described[1]) == []
    assert resume.differences(described[0], described[2]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "SFT", "Reward"])
def test_two_processes_take_the_same_rows_in_each_step(name, warm, place, tmp_path):
    """13 rows, 8 a step: accelerate fills the second of an epoch with three of the first rows, in both the same."""
    write_rows(tmp_path / "data.jsonl", list(make_rows(METHODS[name].columns, 13)))
    steps = []
    for more in ([], ["--plain"]):
        out = tmp_path / f"out{len(more)}"
        flags = ["--num_train_epochs", 2, "--adam_epsilon", 1e-4, *more]
        asked = {"TRAIN_DATA": tmp_path / "data.jsonl", "ACCUMULATION": 2, "EVAL_FRACTION": 0, "LEARNING_RATE": 1e-3}
        done = run_cell(warm, place / "model", out, name, "full", "ddp", *flags, steps=-1, **asked)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("--deal_by_length: a step's rows" in done.stdout) is not more
        steps.append(steps_of(read_rows(out / "metrics.jsonl")))
    assert_near(*steps)
