"""What a run leaves behind, and what is done with it: `pytest tests/results/test_results.py`."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_rlhf
from rlhf_args.methods import METHODS
from tests.conftest import command, make_model, read_rows, slow_but, write_rows
from tests.matrix.cells import rollout_flags
from utils import chat, merge_lora
from utils.models import load
from utils.results import proof, report, saves

DATA = {
    "DPO": "data/preference.jsonl",
    "SFT": "data/sft.jsonl",
    "KTO": "data/kto.jsonl",
    "Reward": "data/reward.jsonl",
}


def train(model, out, *more, method="DPO", steps=3):
    words = [
        "--rlhf_type",
        method,
        "--model_name_or_path",
        str(model),
        "--train_data_path",
        METHODS[method].sample_data,
    ]
    words += ["--output_dir", str(out), "--max_samples", "12", "--max_steps", str(steps), "--logging_steps", "1"]
    words += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "2", "--save_strategy", "no"]
    return train_rlhf.main([*words, *map(str, more)])


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unusable_rows_are_written_down_with_their_reason(tiny_model, tmp_path):
    good = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    rows = [good] * 8 + [{**good, "rejected": "4"}, {**good, "chosen": " "}, {**good, "prompt": "long " * 99}]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    more = ("--train_data_path", path, "--max_length", "64", "--max_drop_fraction", "0.5")
    assert train(tiny_model, tmp_path / "out", *more) == 0
    found = [(row["where"], row["reason"]) for row in read_rows(tmp_path / "out" / "dropped.jsonl")]
    assert found == [
        (f"{path}:9", "chosen equals rejected"),
        (f"{path}:10", "empty answer"),
        (f"{path}:11", "prompt longer than max_length"),
    ]
    card = json.loads((tmp_path / "out" / "run_card.json").read_text())
    assert card["train_rows"] == 8 and sum(card["dropped_rows"].values()) == 3
    launch = [card[key] for key in ("LAUNCH", "NUM_PROCESSES", "NNODES", "engine", "device")]
    assert launch == [None, 1, 1, "none", "cpu"] and card["command"].startswith("python train_rlhf.py")


def test_overwriting_clears_a_folder_behind_a_link_and_deletes_no_target_of_a_link(tmp_path):
    """Of the output folder itself, and of what lies in it; training and rejection sampling share the function."""
    (tmp_path / "disk" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "disk" / "metrics.jsonl").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (tmp_path / "disk" / "best").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "disk" / "dangling").symlink_to("gone")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    saves.prepare_output_dir(tmp_path / "out", True, [])
    assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "kept").exists()
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["dropped.jsonl"]


def test_an_interrupted_run_has_its_report_and_is_finished_by_resume_auto(tiny_model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    each_step = ("--save_strategy", "steps", "--save_steps", "1", "--eval_fraction", "0.2")
    follow = report.Report.on_step_end

    def stop_at_two(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return follow(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(report.Report, "on_step_end", stop_at_two)
        assert train(tiny_model, out, *each_step, steps=4) == 130
    assert (out / "report.png").exists() and not (out / "run_card.json").exists()
    assert train(tiny_model, out, *each_step, steps=4) == 2  # an unfinished run, and not said what to do with it
    assert train(tiny_model, out, *each_step, "--resume_from_checkpoint", "auto", steps=4) == 0
    assert [line["step"] for line in read_rows(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert train(tiny_model, tmp_path / "whole", *each_step, steps=4) == 0
    straight, resumed = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "whole", out))
    assert straight.keys() == resumed.keys() and all(straight[name].equal(resumed[name]) for name in straight)


def test_a_finished_run_is_kept_unless_asked(tiny_model, tmp_path):
    assert train(tiny_model, tmp_path / "out") == 0
    before = (tmp_path / "out" / "run_card.json").read_text()
    assert train(tiny_model, tmp_path / "out") == 2
    assert (tmp_path / "out" / "run_card.json").read_text() == before
    assert train(tiny_model, tmp_path / "out", "--overwrite_output_dir", steps=2) == 0
    assert len(read_rows(tmp_path / "out" / "metrics.jsonl")) == 2


def test_tensorboard_writes_only_when_asked(tiny_model, tmp_path):
    pytest.importorskip("tensorboard", reason="requirements-dev.txt has it")
    assert train(tiny_model, tmp_path / "quiet") == 0
    assert not list((tmp_path / "quiet").rglob("events.out*"))
    assert train(tiny_model, tmp_path / "asked", "--report_to", "tensorboard") == 0
    assert list((tmp_path / "asked").rglob("events.out*"))


# ── proof of the save ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: {"a": t["a"]}, "2 numbers where 4 were trained"),
        (lambda t: t, "no weight differs from the start"),
    ],
)
def test_a_save_that_is_no_training_is_found(spoil, message, tmp_path):
    start = {"a": torch.ones(2), "b": torch.ones(2)}
    for name, tensors in (("start", start), ("end", spoil(start))):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    with pytest.raises(RuntimeError, match=message):
        saves.check_trained(tmp_path / "end", tmp_path / "start", expected=4)


def test_a_run_that_moves_nothing_fails_in_one_line(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(tiny_model, out, "--learning_rate", "1e-60", "--train_mode", "full") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"failed: {out} is not a sound save: no weight differs from the start"


# ── adapters, merging, talking ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sft_adapter(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "adapter"
    assert train(tiny_model, out, method="SFT") == 0
    return out


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
@pytest.mark.parametrize("method", ["DPO", "KTO"])
def test_an_adapter_as_model_is_its_own_reference(method, mode, sft_adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(sft_adapter, out, "--train_mode", mode, "--eval_fraction", "0.4", method=method) == 0
    card = json.loads((out / "run_card.json").read_text())
    # With the base as reference the margin would not start at zero. Under qlora TRL rounds the trained adapter to
    # bfloat16 (8 bits) and its frozen twin not.
    assert card["held_out"]["before"]["margin"] == pytest.approx(0, abs=1e-3)
    assert card["held_out"]["after"]["margin"] != card["held_out"]["before"]["margin"]
    said = capsys.readouterr().out
    assert (
        f"a frozen copy of {sft_adapter}" in said if mode == "full" else f"the adapter {sft_adapter} as it was" in said
    )
    assert not (out / "ref").exists()


@pytest.mark.parametrize(("mode", "loads"), [("lora", 1), ("qlora", 1), ("full", 2)])
def test_an_adapter_needs_no_second_copy_of_the_base(mode, loads, tiny_model, tmp_path, monkeypatch):
    made, load_model = [], load.load_model
    monkeypatch.setattr(load, "load_model", lambda *a, **k: made.append(1) or load_model(*a, **k))
    monkeypatch.setattr(proof, "verify_in_fresh_process", lambda folder: "")  # which loads in a process of its own
    assert train(tiny_model, tmp_path / "out", "--train_mode", mode) == 0
    assert len(made) == loads


def test_the_base_of_qlora_is_nf4_stored_as_it_is_computed(tiny_model):
    tokenizer = load.load_tokenizer(tiny_model)
    model = load.load_policy(
        tiny_model, task="SEQ_CLS", train_mode="qlora", dtype="bfloat16", tokenizer=tokenizer, seed=0, deepspeed=False
    )
    asked = model.config.quantization_config
    assert (asked.bnb_4bit_quant_type, asked.bnb_4bit_use_double_quant) == ("nf4", True)
    assert asked.bnb_4bit_compute_dtype == asked.bnb_4bit_quant_storage == torch.bfloat16  # or ZeRO-3 cannot shard it
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32 and model.config.pad_token_id == tokenizer.pad_token_id


def test_nothing_is_sent_home():
    late = "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    done = command("-c", f"import train_rlhf; train_rlhf.main([]); {late}")
    assert done.stdout == "True\n"


@pytest.mark.parametrize("method", ["DPO", "Reward"])
def test_merging_keeps_what_the_adapter_does(method, tiny_model, tmp_path, capsys):
    assert train(tiny_model, tmp_path / "adapter", method=method) == 0
    assert merge_lora.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert "keeps 100.0% of the adapter's effect" in capsys.readouterr().out
    assert merge_lora.main([str(tmp_path / "merged"), str(tmp_path / "again")]) == 2
    assert merge_lora.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2


def test_a_merge_into_what_is_no_folder_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    for output in ("file", "file/merged", "link"):
        code = "import sys; from utils import merge_lora; print(merge_lora.main(sys.argv[1:]), 'torch' in sys.modules)"
        done = command("-c", code, tmp_path / "adapter", tmp_path / output)
        assert done.stdout == "2 False\n"
        (problem,) = done.stderr.splitlines()
        assert problem.startswith(f"refused: {tmp_path / output}: ") and "ame a" in problem


def test_a_merge_that_rounding_would_undo_is_saved_in_float32(tmp_path, capsys):
    folder = make_model(tmp_path / "base")
    weights = load_file(f"{folder}/model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, f"{folder}/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert train(folder, tmp_path / "adapter", "--learning_rate", "1e-6", steps=1) == 0
    assert merge_lora.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "in bfloat16 the merge keeps" in said and "float32: reopened" in said
    shutil.rmtree(tmp_path / "merged")
    assert merge_lora.main([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 1


def test_chat_answers_through_the_template(sft_adapter, monkeypatch, capsys):
    asked = []
    answer = chat.answer

    def listen(model, tokenizer, messages, *rest):
        asked.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return answer(model, tokenizer, messages, *rest)

    monkeypatch.setattr(chat, "answer", listen)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert chat.main([str(sft_adapter), "--max_new_tokens", "4"]) == 0
    assert asked == ["<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_reward_model_does_not_chat(mode, tiny_model, tmp_path, capsys):
    assert train(tiny_model, tmp_path / "reward", "--train_mode", mode, method="Reward") == 0
    assert chat.main([str(tmp_path / "reward")]) == 2
    assert "a reward model, not a language model" in capsys.readouterr().err


# ── every loss that the trainers offer ───────────────────────────────────────────────────────────────────────────────

LOSSES = [(name, loss) for name, method in METHODS.items() for loss in method.losses]
FIRST = [(name, loss) for name, method in METHODS.items() for loss in method.losses[:2]]


@pytest.mark.parametrize(("method", "loss"), slow_but(FIRST, LOSSES))
def test_every_loss_passes_through(method, loss, tiny_model, tmp_path):
    needed = ["--label_smoothing", "0.1"] if loss in ("exo_pair", "robust") else rollout_flags(method)
    assert train(tiny_model, tmp_path / "out", "--loss_type", loss, *needed, method=method, steps=1) == 0
    asked = json.loads((tmp_path / "out" / "run_card.json").read_text())["arguments"]["loss_type"]
    assert asked in (loss, [loss])


def test_losses_of_dpo_combine(tiny_model, tmp_path):
    more = ("--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.5")
    assert train(tiny_model, tmp_path / "out", *more, steps=1) == 0


def test_an_unknown_loss_is_refused(tiny_model, tmp_path, capsys):
    assert train(tiny_model, tmp_path / "out", "--loss_type", "sigmoidd") == 2
    assert "refused: --loss_type sigmoidd: DPO takes sigmoid, hinge, ipo" in capsys.readouterr().err


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.sample_reward])
def test_answers_are_sampled_with_a_cache_also_under_gradient_checkpointing(method, tiny_model, tmp_path, monkeypatch):
    from transformers import GenerationMixin
    from transformers.models.qwen2 import Qwen2Model

    generate, forward, widths = GenerationMixin.generate, Qwen2Model.forward, []

    def watched(self, *args, **kwargs):
        with monkeypatch.context() as patched:
            patched.setattr(Qwen2Model, "forward", record)
            return generate(self, *args, **kwargs)

    def record(self, input_ids=None, **kwargs):
        widths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    more = ("--gradient_checkpointing", "True", *rollout_flags(method))
    assert train(tiny_model, tmp_path / "out", *more, method=method, steps=1) == 0
    prompts = [width for width in widths if width > 1]
    assert len(widths) > 8 and len(prompts) < len(widths) / 4  # each answer: its prompt once, then token by token
