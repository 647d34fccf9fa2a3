"""What answers are sampled by, where they stop, and by which number the best checkpoint is chosen.

    python -m pytest tests/models/test_sampling_settings.py -q

The real commands, in this process, on a tiny model of bytes.
"""

import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, StopStringCriteria

import train_gkd
import train_rlhf
from rlhf_args.methods import DISTILLATION, METHODS
from tests.conftest import make_model, make_tokenizer, read_rows, slow_but
from trainers.online_trainer import Lengths, own_settings_unused, stopping_at
from utils.models import load
from utils.training import chapters

ONLINE = ["RLOO", "GRPO", "PPO"]
# Any of them alone changes what is sampled, or leaves nothing to sample.
OWN = {"min_p": 1.0, "no_repeat_ngram_size": 1, "repetition_penalty": 5.0, "top_k": 3, "suppress_tokens": [70, 71],
       "do_sample": True, "temperature": 0.2, "top_p": 0.5, "min_new_tokens": 8, "typical_p": 0.1}  # fmt: skip
VARIED = """
def varied(completion_ids, **columns):
    return [float(ids[0] % 7) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def opinionated(tiny_model, tmp_path_factory):
    """The tiny model with a generation_config.json full of settings."""
    folder = tmp_path_factory.mktemp("opinionated") / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | OWN))
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("teacher"), seed=1)


@pytest.fixture
def run(tmp_path, tiny_model, teacher, capsys):
    """run(method, flags) types a command of 2 steps of 4 answers; (status, stdout, lines of stderr)."""
    (tmp_path / "rewards.py").write_text(VARIED)

    def run(name, *more, model=tiny_model, mode="lora", script=train_rlhf.main, data=None):
        method = (METHODS | DISTILLATION)[name]
        words = f"--model_name_or_path {model} --train_data_path {data or method.sample_data} --max_steps 2 "
        words += f"--train_mode {mode} --output_dir {tmp_path}/out --overwrite_output_dir --max_samples 40 --seed 7 "
        words += "--per_device_train_batch_size 4 --logging_steps 1 --learning_rate 2e-2 --dtype float32 "
        words += "--save_strategy no " * ("--save_steps" not in more)
        if name in METHODS:
            words += f"--rlhf_type {name} "
        else:
            words, script = (
                f"{words} --teacher_model_name_or_path {teacher} --max_completion_length 16",
                train_gkd.main,
            )
        if method.sample_reward:
            words += f"--reward_funcs {tmp_path}/rewards.py:varied --max_completion_length 16 --num_generations 4 "
            words += "--num_iterations 1 "
        status = script([*words.split(), *more])
        said = capsys.readouterr()
        return status, said.out, said.err.replace("\r", "\n").splitlines()

    return run


@pytest.fixture
def refused(run, monkeypatch):
    """refused(method, flags) is what is refused before a model is loaded."""

    def load_policy(**source):
        raise AssertionError("a model is loaded")

    def refused(*args, **kwargs):
        status, _, lines = run(*args, **kwargs)
        problems = [line.removeprefix("refused: ") for line in lines if line.startswith("refused: ")]
        assert status == 2 and problems
        return problems

    monkeypatch.setattr(load, "load_policy", load_policy)
    return refused


@pytest.fixture
def unsaved(monkeypatch):
    """A run ends after its training, before the save."""
    monkeypatch.setattr(chapters, "save_and_verify", lambda *args, **kwargs: None)


def answers(folder):
    return [line["completion"][0]["content"] for line in read_rows(folder / "out" / "completions.jsonl")]


# ── the model's own settings ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name",), slow_but([("PPO",)], [(name,) for name in ONLINE]))
def test_what_a_model_samples_by_itself_does_not_reach_a_rollout(
    name, run, unsaved, tiny_model, opinionated, tmp_path
):
    found = {}
    for model in (tiny_model, opinionated):
        status, out, _ = run(name, model=model)
        assert status == 0
        found[model] = answers(tmp_path)
    assert found[tiny_model] == found[opinionated] and len(set(found[tiny_model][:4])) == 4
    assert "sampling  temperature 1; not by the model's own min_p 1, no_repeat_ngram_size 1" in out


def test_a_trained_model_is_saved_with_the_settings_that_it_came_with(run, opinionated, tmp_path):
    assert run("RLOO", model=opinionated, mode="full")[0] == 0
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: saved.get(key) for key in OWN} == OWN


def test_what_a_model_samples_by_itself_does_not_reach_a_distillation(run, tiny_model, opinionated, tmp_path):
    losses = []
    for model in (tiny_model, opinionated):
        status, out, _ = run("GKD", "--lmbda", "1", model=model, mode="full")
        assert status == 0
        losses.append([line["loss"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")])
    assert losses[0] == losses[1]
    assert "sampling  temperature 1; not by the model's own min_p 1" in out
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["min_p"] == 1.0


def test_the_settings_of_the_run_do_reach_a_rollout(run, unsaved, tmp_path):
    status, out, _ = run("RLOO", "--top_k", "1")  # the likeliest token each time
    assert status == 0 and len(set(answers(tmp_path)[:4])) == 1
    assert "sampling  temperature 1, top_k 1\n" in out


def test_a_models_settings_are_hidden_for_a_while_only():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    own, own.min_p = model.generation_config, 0.5
    with pytest.raises(KeyError), own_settings_unused(model):
        assert model.generation_config.min_p is None
        raise KeyError
    assert model.generation_config is own and own.min_p == 0.5


# ── stop strings ─────────────────────────────────────────────────────────────────────────────────────────────────────


STOPS = [chr(code) for code in range(65, 91)]  # a tenth of the byte tokens


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A tiny model whose pad is no end of turn."""
    return make_model(tmp_path_factory.mktemp("padded"), make_tokenizer(pad="<pad>"))


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """Token ids of the answers that the reward function was given."""
    (tmp_path / "seen.py").write_text(
        "def seen(completion_ids, **columns):\n"
        f"    open({str(tmp_path / 'ids.txt')!r}, 'a').writelines(repr(ids) + '\\n' for ids in completion_ids)\n"
        "    return [float(ids[0] % 7) for ids in completion_ids]\n"
    )
    return lambda: [json.loads(line) for line in (tmp_path / "ids.txt").read_text().splitlines()]


STOPPED = [("RLOO", "own"), ("PPO", "end"), ("RLOO", "end"), ("GRPO", "own")]


@pytest.mark.parametrize(("name", "pad"), slow_but(STOPPED[:2], STOPPED))
def test_an_answer_ends_at_a_stop_string_and_is_not_cut(name, pad, run, unsaved, tiny_model, padded, seen, tmp_path):
    kwargs = json.dumps({"stop_strings": STOPS})
    more = "--generation_kwargs", kwargs, "--missing_eos_penalty", "3", "--reward_funcs", f"{tmp_path}/seen.py:seen"
    status, out, lines = run(name, *more, model={"own": padded, "end": tiny_model}[pad])
    assert status == 0, lines
    assert f"temperature 1, stop_strings {json.dumps(STOPS)}" in out
    tokenizer, rows = make_tokenizer(), read_rows(tmp_path / "out" / "completions.jsonl")
    letters, end = tokenizer.convert_tokens_to_ids(STOPS), tokenizer.eos_token_id
    ids = seen()[-len(rows) :]  # before them those of the trial
    stopped = [one[-1] in letters for one in ids]
    assert any(stopped) and not all(stopped)
    for one, row, stop in zip(ids, rows, stopped, strict=True):
        assert not set(one[:-1]) & {*letters, end}  # nothing behind a stop string or an end, no padding
        ended = stop or one[-1] == end
        assert ended or len(one) == 16
        assert row["rewards"]["missing_eos"] == (0 if ended else -3)
    first = read_rows(tmp_path / "out" / "metrics.jsonl")[0]
    ended = [len(one) for one, stop in zip(ids[:4], stopped[:4], strict=True) if stop or one[-1] == end]
    assert first["completions/clipped_ratio"] == 1 - len(ended) / 4
    if ended:
        assert first["completions/mean_terminated_length"] == pytest.approx(sum(ended) / len(ended))
        assert first["completions/min_terminated_length"] == min(ended)
        assert first["completions/max_terminated_length"] == max(ended)


def test_a_students_answer_ends_at_a_stop_string(run, unsaved, tmp_path):
    status, _, lines = run("GKD", "--lmbda", "1", "--generation_kwargs", json.dumps({"stop_strings": STOPS}))
    assert status == 0, lines
    assert min(line["completions/clipped_ratio"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")) < 1


def test_a_stop_string_is_found_at_the_token_that_completes_it():
    tokenizer = make_tokenizer()
    stops = Lengths(StopStringCriteria(tokenizer, ["ab"]))
    answers = ["xabab", "xxxxx", "aabxx"]
    ids = torch.tensor([[tokenizer.convert_tokens_to_ids("a"), *tokenizer(one)["input_ids"]] for one in answers])
    for length in range(2, 7):
        stops(ids[:, :length], None)
    assert stops.lengths == [3, None, 3]


def test_a_model_stops_at_a_criterion_for_a_while_only():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(make_tokenizer()), n_positions=32, n_embd=4, n_layer=1, n_head=1)
    )
    usual = model.generate
    with stopping_at(StopStringCriteria(make_tokenizer(), ["a"]), model):
        assert model.generate != usual
    assert model.generate == usual


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


BAD = {
    '{"stop_string": ["."]}': ["stop_string.", "Did you mean stop_strings?"],
    '{"temperature": 0.3}': ["temperature", "Type --temperature 0.3"],
    '{"max_new_tokens": 9}': ["Type --max_completion_length 9"],
    '{"num_beams": 2}': ["num_beams"],
    '{"do_sample": false}': ["do_sample"],
    '{"stop_strings": []}': ["stop_strings []"],
    '{"stop_strings": ["a", 3]}': ['stop_strings ["a", 3]'],
    '{"suppress_tokens": "x"}': ['{"suppress_tokens": "x"}'],
    '{"min_length": "x"}': ['{"min_length": "x"}'],
    "{bad": ["{bad", "JSON", "character 2"],
    "bad": ["bad", "JSON"],
}


@pytest.mark.parametrize("given", BAD)
def test_a_setting_that_generation_does_not_take_is_refused(given, refused):
    (problem,) = refused("RLOO", "--generation_kwargs", given)
    assert problem.startswith("--generation_kwargs") and all(part in problem for part in BAD[given])


def test_all_wrong_settings_are_refused_at_once(refused):
    more = ["--top_p", "0", "--top_k", "-1", "--min_p", "2", "--repetition_penalty", "0"]
    assert [problem.split(":")[0] for problem in refused("PPO", *more)] == [
        "--top_p 0",
        "--top_k -1",
        "--min_p 2",
        "--repetition_penalty 0",
    ]


@pytest.mark.parametrize("flag", ["--mask_truncated_completions", "--use_transformers_continuous_batching"])
def test_stop_strings_are_refused_where_they_would_not_count(flag, refused):
    (problem,) = refused("GRPO", "--generation_kwargs", '{"stop_strings": ["."]}', flag, "True")
    assert problem.startswith(f"{flag} with stop_strings")


def test_settings_of_answers_that_nobody_gives_are_refused(refused):
    assert refused("GKD", "--lmbda", "0", "--min_p", "0.1")[0].startswith("--min_p")


@pytest.mark.parametrize("name", ["RLOO", "GRPO", "PPO", "DPO"])
def test_a_dropout_that_has_no_effect_is_refused_with_the_flag_that_gives_it_one(name, refused):
    (problem,) = refused(name, "--lora_dropout", "0.1")
    assert problem.startswith("--lora_dropout 0.1") and "--disable_dropout False" in problem


@pytest.mark.parametrize("more", [["--lora_dropout", "0"], ["--lora_dropout", "0.1", "--disable_dropout", "False"]])
def test_a_dropout_that_is_what_it_says_is_taken(more, run):
    assert run("RLOO", *more, "--check")[0] == 0


# ── the best checkpoint ──────────────────────────────────────────────────────────────────────────────────────────────


BEST = "--load_best_model_at_end True --eval_strategy steps --eval_steps 1 --save_steps 1 --eval_fraction 0.1".split()


@pytest.mark.parametrize(("name",), slow_but([("RLOO",)], [(name,) for name in ONLINE]))
def test_the_best_checkpoint_of_a_policy_is_the_one_with_the_highest_held_out_reward(name, run, tmp_path):
    status, out, lines = run(name, *BEST, "--max_steps", "3", "--save_total_limit", "2")
    assert status == 0, lines
    assert "best      of the evaluated checkpoints the one with the highest eval_reward\n" in out
    rewards = {line["step"]: line["eval_reward"] for line in read_rows(tmp_path / "out" / "eval.jsonl")[:4]}
    assert len(set(rewards.values())) > 1
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    best = max((1, 2, 3), key=lambda step: rewards[step])
    assert state["best_global_step"] == best and state["best_metric"] == rewards[best]
    assert state["best_model_checkpoint"] == str(tmp_path / "out" / f"checkpoint-{best}")
    kept = {int(folder.name.split("-")[1]) for folder in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == ({best, 3} if best < 3 else {2, 3})


def test_the_best_checkpoint_of_a_student_has_the_lowest_divergence(run):
    status, out, _ = run("GKD", *BEST, "--metric_for_best_model", "reverse_kl", "--check")
    assert status == 0 and "the one with the lowest eval_reverse_kl\n" in out


@pytest.mark.parametrize(
    ("name", "asked", "near"),
    [
        ("DPO", "eval_accuracy", "eval_rewards/accuracies"),
        ("DPO", "rewards/accuracis", "eval_rewards/accuracies"),
        ("Reward", "eval_acuracy", "eval_accuracy"),
        ("PPO", "eval_explained_varianse", "eval_explained_variance"),
        ("GKD", "forward_kle", "eval_forward_kl"),
    ],
)
def test_a_number_that_no_evaluation_has_is_refused_with_the_nearest(name, asked, near, refused):
    (problem,) = refused(name, *BEST, "--metric_for_best_model", asked)
    assert problem.startswith(f"--metric_for_best_model {asked}:") and problem.endswith(f"Did you mean {near}?")
    assert "eval_loss" in problem


def test_a_number_that_this_run_does_not_have_ends_it_before_its_first_step(run, tmp_path):
    status, _, lines = run("RLOO", *BEST, "--metric_for_best_model", "eval_rewards/nobody/mean")
    (failure,) = [line for line in lines if line.startswith("failed: ")]
    assert status == 1 and "eval_rewards/nobody/mean" in failure and "eval_rewards/varied/mean" in failure
    assert not any("Traceback" in line for line in lines) and not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(("name",), slow_but([("DPO",), ("GKD",)], [(name,) for name in (*METHODS, *DISTILLATION)]))
def test_the_table_names_all_that_an_evaluation_logs(name, run, unsaved, tmp_path):
    assert run(name, "--eval_fraction", "0.2", "--max_steps", "1")[0] == 0
    line = read_rows(tmp_path / "out" / "eval.jsonl")[-1]
    logged = {key.removeprefix("eval_") for key in line if key.startswith("eval_")}
    logged -= {"loss", "runtime", "samples_per_second", "steps_per_second"}
    patterns = (METHODS | DISTILLATION)[name].evaluated
    assert {log for log in logged if not any(fnmatch(log, pattern) for pattern in patterns)} == set()
    plain = {pattern for pattern in patterns if "*" not in pattern}
    assert plain - logged <= {
        "aux_loss",
        "kl",
        "entropy",
        "rewards/margins",
    }  # of experts, of a reference, of both labels
