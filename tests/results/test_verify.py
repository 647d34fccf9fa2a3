"""What is saved is proven by a process that did not save it: `pytest tests/results/test_verify.py`."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_rlhf
from tests.conftest import command, make_model
from utils import chat, merge_lora, verify
from utils.models import load
from utils.results import proof
from utils.runtime.errors import Failed

KINDS = [
    ("CAUSAL_LM", "full"),
    ("CAUSAL_LM", "lora"),
    ("CAUSAL_LM", "qlora"),
    ("SEQ_CLS", "lora"),
    ("SEQ_CLS", "full"),
]


def make_trained(base, task, mode, dtype="float32"):
    """A model as it is after training, an adapter that does something, and its tokenizer."""
    from peft import get_peft_model

    tokenizer = load.load_tokenizer(base)
    source = {"task": task, "dtype": dtype, "tokenizer": tokenizer, "seed": 7}
    model = load.load_policy(base, train_mode=mode, deepspeed=False, **source)
    if mode != "full":
        model = get_peft_model(model, load.make_lora(task, 4, 8, 0.5, None, False))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if mode == "full" or "lora_B" in name or "score.modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
        if mode == "qlora" and parameter.requires_grad:  # as TRL trains over 4 bits
            parameter.data = parameter.data.bfloat16()
    return model.train(), tokenizer


def save(model, tokenizer, folder, task, mode):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    proof.record(model, tokenizer, folder, task=task, four_bit=mode == "qlora")
    return folder


@pytest.fixture(scope="module")
def sound(tiny_model, tmp_path_factory):
    """An adapter's folder with its probe."""
    model, tokenizer = make_trained(tiny_model, "CAUSAL_LM", "lora")
    return save(model, tokenizer, tmp_path_factory.mktemp("sound"), "CAUSAL_LM", "lora")


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "copy")


def change(file, edit):
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))


def change_tensor(folder, part, edit):
    """Edits the tensors whose names have `part` in them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = [name for name in tensors if part in name]
    assert found
    save_file(tensors | {name: edit(tensors[name]) for name in found}, folder / "adapter_model.safetensors")


# ── a sound save ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("task", "mode"), KINDS)
def test_a_sound_save_is_reopened_as_it_was_in_memory(task, mode, tiny_model, tmp_path, capsys):
    model, tokenizer = make_trained(tiny_model, task, mode)
    save(model, tokenizer, tmp_path, task, mode)
    assert model.training  # as it was
    assert verify.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    what = "scores" if task == "SEQ_CLS" else "logits"
    # the same sums on the same processor
    assert (
        said.startswith(f"verified  {tmp_path}: ")
        and f"{what} of a fresh process equal those in memory exactly" in said
    )
    if mode != "full":  # the model recorded is the trained one, not its base
        change(tmp_path / "adapter_config.json", lambda config: config | {"lora_alpha": 0})
        assert verify.main([str(tmp_path)]) == 1


def test_what_trl_and_ppo_attach_to_a_model_is_no_part_of_the_probe(sound, tiny_model, tmp_path):
    from trl.trainer.utils import add_fused_lm_head

    from trainers.critics import Critic, add_critic
    from trainers.ppo_trainer import PolicyOutput

    model, tokenizer = make_trained(tiny_model, "CAUSAL_LM", "lora")
    add_fused_lm_head(model.get_base_model(), temperature=0.5)
    add_critic(model.get_base_model(), Critic(64), PolicyOutput)
    proof.record(model, tokenizer, tmp_path, task="CAUSAL_LM")
    assert (tmp_path / "probe.json").read_text() == (sound / "probe.json").read_text()


def test_the_probe_is_computed_as_the_weights_are_held_not_under_autocast(sound, tiny_model, tmp_path, request):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # of another test's trainer, which had no autocast
    request.addfinalizer(lambda: AcceleratorState._reset_state(True))
    model, tokenizer = make_trained(tiny_model, "CAUSAL_LM", "lora")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(model)
    ids = json.loads((sound / "probe.json").read_text())["input_ids"]
    under_autocast = proof.compute_outputs(model.eval(), ids, "CAUSAL_LM")
    proof.record(model, tokenizer, tmp_path, task="CAUSAL_LM", accelerator=accelerator)
    assert (tmp_path / "probe.json").read_text() == (sound / "probe.json").read_text()
    again = proof.compute_outputs(model.eval(), ids, "CAUSAL_LM")
    assert again.equal(under_autocast)  # the autocast is back in its place
    best = torch.tensor(json.loads((sound / "probe.json").read_text())["values"])
    assert not under_autocast.topk(64).values.equal(best)  # and it would have made a difference


def test_a_model_that_answers_with_nan_is_not_recorded(tiny_model, tmp_path):
    model, tokenizer = make_trained(tiny_model, "CAUSAL_LM", "full")
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(Failed, match="answers the probe with NaN"):
        proof.record(model, tokenizer, tmp_path, task="CAUSAL_LM")
    assert not (tmp_path / "probe.json").exists()


# ── what is not ──────────────────────────────────────────────────────────────────────────────────────────────────────


def swap_base(folder):
    change(
        folder / "adapter_config.json", lambda c: c | {"base_model_name_or_path": make_model(folder / "other", seed=9)}
    )


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


SPOILED = [
    (lambda f: change_tensor(f, "layers.0.mlp.up_proj.lora_B", lambda t: t * math.nan),
     "layers.0.mlp.up_proj.lora_B.weight has NaN or infinity in it"),
    (lambda f: change_tensor(f, "layers.1.mlp.up_proj.lora_A", lambda t: t / 0),
     "layers.1.mlp.up_proj.lora_A.weight has NaN or infinity in it"),
    (lambda f: change_tensor(f, "layers.0.mlp.up_proj.lora_B", lambda t: t[:0]),
     "layers.0.mlp.up_proj.lora_B.weight is empty"),
    (lambda f: change_tensor(f, "lora_B", torch.zeros_like), "every lora_B is zero"),
    (lambda f: change_tensor(f, "layers.0.mlp.up_proj.lora_B", lambda t: t * 1.5),
     "logits of a fresh process differ from those in memory by up to"),
    (cut, "adapter_model.safetensors is not a whole safetensors file"),
    (swap_base, "logits of a fresh process differ from those in memory by up to"),
    (lambda f: change(f / "adapter_config.json", lambda c: c | {"base_model_name_or_path": "/no/such/model"}),
     "its base model /no/such/model does not exist"),
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "it cannot be reopened"),
    (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), "its chat template is not the one in memory"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: not valid JSON"),
    (lambda f: (f / "adapter_model.bin").write_bytes(b"x"), "adapter_model.bin: pickled weights"),
    (lambda f: (f / "probe.json").write_text("{"), "probe.json is not valid JSON"),
    (lambda f: change(f / "probe.json", lambda p: {}), "probe.json has no chat_template, device, dtype, exact_to"),
    (lambda f: change(f / "probe.json", lambda p: p | {"input_ids": p["input_ids"][:-1]}),
     "its tokenizer makes other tokens of the probe"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILED)
def test_what_is_wrong_with_a_save_is_said_in_one_line(spoil, message, copy, capsys):
    assert verify.main([str(copy)]) == 0
    spoil(copy)
    capsys.readouterr()
    assert verify.main([str(copy)]) == 1
    said = capsys.readouterr()
    lines = [
        line for line in said.err.splitlines() if line and "Loading weights" not in line
    ]  # a bar of the tests' own
    assert said.out == "" and len(lines) == 1, lines
    assert lines[0].startswith(f"{copy} is not sound: ") and message in lines[0]


@pytest.fixture
def in_pieces(tiny_model, tmp_path):
    """A whole model in several files, which nobody recorded a probe of."""
    model, tokenizer = make_trained(tiny_model, "CAUSAL_LM", "full")
    model.save_pretrained(tmp_path / "pieces", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "pieces")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 2
    return tmp_path / "pieces"


def test_an_index_names_what_is_there(in_pieces, capsys):
    assert verify.main([str(in_pieces)]) == 0
    assert "27 tensors" in capsys.readouterr().out
    first, index = in_pieces / "model-00001-of-00004.safetensors", in_pieces / "model.safetensors.index.json"
    tensors = load_file(first)
    gone = tensors.popitem()[0]
    save_file(tensors, first, {"format": "pt"})
    assert verify.main([str(in_pieces)]) == 1
    assert f"{gone} is not in {first.name}" in capsys.readouterr().err
    first.unlink()
    assert verify.main([str(in_pieces)]) == 1
    assert f"{first.name} is missing, which {index.name} names" in capsys.readouterr().err
    index.unlink()
    assert verify.main([str(in_pieces)]) == 1
    assert "is one of several files, and there is no model.safetensors.index.json" in capsys.readouterr().err


def test_a_checkpoint_is_verified_by_its_files_and_its_manifest(in_pieces, capsys):
    from utils.survival import checkpoints

    (in_pieces / "optimizer.pt").write_bytes(b"pickled, and no weights")
    (in_pieces / "training_args.bin").write_bytes(b"neither")
    checkpoints.seal(in_pieces, {"--rlhf_type": "DPO"})
    assert verify.main([str(in_pieces)]) == 0
    assert "its files alone: no probe.json was recorded there" in capsys.readouterr().out
    (in_pieces / "optimizer.pt").write_bytes(b"cut")
    assert verify.main([str(in_pieces)]) == 1
    assert "optimizer.pt has 3 of 23 bytes" in capsys.readouterr().err


def make_probe(exact_to, values, task="CAUSAL_LM", device="another"):
    return {"task": task, "exact_to": exact_to, "tokens": [[2, 0]] * len(values), "values": values, "device": device}


@pytest.mark.parametrize(
    ("exact_to", "off", "status"),
    [
        # the two differ by `off` and 0: up to `off`, in the mean off / 2; allowed in the mean: a quarter of TOLERANCE
        ("float32", 4e-4, "to 4e-4"),
        ("float32", 6e-4, None),  # mean 3e-4 > 2.5e-4
        ("bfloat16", 0.02, "to 0.02"),
        ("bfloat16", 0.4, "to 0.4"),
        ("bfloat16", 0.6, None),  # mean 0.3 > 0.25
        ("nf4", 0.7, "to 0.7"),
        ("nf4", 0.8, None),  # mean 0.4 > 0.375
    ],
)
def test_how_near_is_near_enough_depends_on_the_rounding(exact_to, off, status):
    found = torch.tensor([[-1.0, -3.0, -0.5 + off]])
    probe = make_probe(exact_to, [[-0.5, -1.0]])
    if status:
        assert proof.compare_outputs("out", probe, found).endswith(status)
    else:
        with pytest.raises(Failed, match=f"Rounding to {exact_to} allows"):
            proof.compare_outputs("out", probe, found)
    here = proof.name_device(torch.device("cpu"))
    near = off / 2 < (1e-3 if exact_to == "float32" else 0.05) / 4  # TOLERANCE of float32, else SAME_DEVICE
    with contextlib.nullcontext() if near else pytest.raises(Failed, match=f"Rounding to {exact_to} allows"):
        proof.compare_outputs("out", probe | {"device": here}, found)


@pytest.mark.parametrize(("mode", "same"), [("lora", False), ("qlora", True)])
def test_fsdp2_rounds_an_adapter_that_is_held_in_float32(tiny_model, mode, same, monkeypatch, tmp_path):
    model, tokenizer = make_trained(tiny_model, "CAUSAL_LM", mode, dtype="bfloat16")
    precision = types.SimpleNamespace(mixed_precision_policy=types.SimpleNamespace(param_dtype=torch.bfloat16))
    state = types.SimpleNamespace(fsdp_plugin=precision)
    accelerator = types.SimpleNamespace(state=state, is_main_process=True, autocast=contextlib.nullcontext)
    monkeypatch.setattr(proof, "unwrapped", lambda model, accelerator: contextlib.nullcontext(model))
    proof.record(model, tokenizer, tmp_path, task="CAUSAL_LM", four_bit=mode == "qlora", accelerator=accelerator)
    assert bool(proof.read_probe(tmp_path)["device"]) == same


def test_another_likeliest_token_is_a_tie_or_another_model():
    probe = make_probe("bfloat16", [[-1.0, -1.25]] * 4)  # token 2 before token 0, at four positions
    same, tie = [-1.25, -5.0, -1.0], [-1.0, -5.0, -1.1]  # token 0 is the likeliest now, as likely as token 2 was
    said = proof.compare_outputs("out", probe, torch.tensor([tie, same, same, same]))
    assert said.endswith("(another token is the likeliest at 1 of 4 positions, where they tie)")
    with pytest.raises(Failed, match="another token is the likeliest at 2 of 4 positions"):  # 2 / 4 > 0.25
        proof.compare_outputs("out", probe, torch.tensor([tie, tie, same, same]))
    with pytest.raises(Failed, match="another token is the likeliest at 1 of 4 positions"):  # token 1, by 0.5 + 1 > 1
        proof.compare_outputs("out", probe, torch.tensor([[-1.25, 0.5, -1.0], same, same, same]))


def test_scores_may_differ_in_proportion_to_their_size():
    probe = make_probe("float32", [[1000.0]], task="SEQ_CLS")  # 1e-3 x 1000 = 1, a quarter in the mean
    assert proof.compare_outputs("out", probe, torch.tensor([[1000.2]])).startswith("scores of a fresh process equal")
    with pytest.raises(Failed):
        proof.compare_outputs("out", probe, torch.tensor([[1000.5]]))


@pytest.mark.parametrize(
    "words", [["no/such/folder"], ["."], ["data"], ["data/kto.jsonl"], ["--device", "tpu", "."], []]
)
def test_what_is_no_model_is_a_bad_argument(words, capsys):
    try:
        status = verify.main(words)
    except SystemExit as ended:  # argparse
        status = ended.code
    assert status == 2 and capsys.readouterr().out == ""


# ── the fresh process ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fresh_process_says_what_it_found(copy):
    assert proof.verify_in_fresh_process(copy).endswith("logits of a fresh process equal those in memory exactly")
    change_tensor(copy, "lora_B", lambda t: t * 1.5)
    with pytest.raises(Failed, match=f"^{copy} is not sound: logits of a fresh process differ"):
        proof.verify_in_fresh_process(copy)


def test_it_stands_outside_the_launch_and_starts_no_trainer(sound):
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    launched |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "TORCHELASTIC_RUN_ID": "x",
        "DS_ACCELERATOR": "cpu",
    }
    launched |= {
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "ROLE_RANK": "0",
        "ROLE_WORLD_SIZE": "2",
        "ROLE_NAME": "x",
    }
    kept = {"HOME": "/home", "HF_HOME": "/hub", "OMP_NUM_THREADS": "1", "RANKING": "1"}
    env = proof.clean_environment(launched | kept | {"CUDA_VISIBLE_DEVICES": "3"})
    assert env.pop("PYTHONPATH") and env == kept | {"CUDA_VISIBLE_DEVICES": ""}
    assert proof.clean_environment({"CUDA_VISIBLE_DEVICES": "3"}, "cuda")["CUDA_VISIBLE_DEVICES"] == "3"
    loaded = "print({'trl', 'deepspeed', 'datasets'} & set(sys.modules))"
    done = command("-c", f"import sys; from utils import verify; print(verify.main([{str(sound)!r}])); {loaded}")
    assert done.stdout.splitlines()[1:] == ["0", "set()"]


def test_it_works_from_another_folder_than_the_projects(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert proof.verify_in_fresh_process(sound).startswith("verified  ")


def test_one_that_was_killed_proves_nothing_and_breaks_nothing(sound, tmp_path, monkeypatch):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    said = proof.verify_in_fresh_process(sound)
    assert said.startswith(f"not verified: the process that reopened {sound} was killed (signal 9: out of memory?)")
    assert said.endswith(f"type python -m utils.verify {sound}")


# ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("task", "dtype"), [("CAUSAL_LM", "float32"), ("CAUSAL_LM", "bfloat16"), ("SEQ_CLS", "float32")]
)
def test_a_merge_is_proven_by_a_fresh_process(task, dtype, tiny_model, tmp_path, capsys):
    model, tokenizer = make_trained(tiny_model, task, "lora")
    save(model, tokenizer, tmp_path / "adapter", task, "lora")
    merged = tmp_path / "merged"
    assert merge_lora.main([str(tmp_path / "adapter"), str(merged), "--dtype", dtype]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith(f"verified  {merged}: ") and "equal those in memory to" in said[1]
    probe, before = (json.loads((folder / "probe.json").read_text()) for folder in (merged, tmp_path / "adapter"))
    assert probe["exact_to"] == dtype and probe["values"] == before["values"]  # those of base + adapter
    kept = load_file(merged / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    save_file(kept | {name: kept[name] + 10}, merged / "model.safetensors", {"format": "pt"})
    assert verify.main([str(merged)]) == 1


# ── a model's own code ───────────────────────────────────────────────────────────────────────────────────────────────

CODE = """
from pathlib import Path
Path({file!r}).write_text("executed")
from transformers import Qwen2Config, Qwen2ForCausalLM
class Config(Qwen2Config):
    model_type = "brought_along"
class Model(Qwen2ForCausalLM):
    config_class = Config
"""


@pytest.fixture
def with_code(tiny_model, tmp_path):
    """(a model that brings code along, an adapter on it, the file that the code writes when it is executed)."""
    file, folder = tmp_path / "executed", shutil.copytree(tiny_model, tmp_path / "with_code")
    (folder / "modeling_x.py").write_text(CODE.format(file=str(file)))
    own = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    change(folder / "config.json", lambda c: c | {"model_type": "brought_along", "auto_map": own})
    model, tokenizer = make_trained(tiny_model, "CAUSAL_LM", "lora")
    save(model, tokenizer, tmp_path / "adapter", "CAUSAL_LM", "lora")
    change(tmp_path / "adapter" / "adapter_config.json", lambda c: c | {"base_model_name_or_path": str(folder)})
    return folder, tmp_path / "adapter", file


TRAIN = ["--rlhf_type", "DPO", "--train_data_path", "data/preference.jsonl", "--max_samples", "4", "--max_steps", "1"]
COMMANDS = {
    "utils.verify": (verify.main, lambda model, adapter, out: [model]),
    "utils.verify of an adapter": (verify.main, lambda model, adapter, out: [adapter]),
    "utils.merge_lora": (merge_lora.main, lambda model, adapter, out: [adapter, out]),
    "utils.chat": (chat.main, lambda model, adapter, out: [model]),
    "utils.chat of an adapter": (chat.main, lambda model, adapter, out: [adapter]),
    "train_rlhf.py": (
        train_rlhf.main,
        lambda model, adapter, out: [*TRAIN, "--model_name_or_path", model, "--output_dir", out],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_models_own_code_is_not_executed_unasked(name, with_code, tmp_path, monkeypatch, capsys):
    model, adapter, file = with_code
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail(f"asked: {asked}"))
    main, words = COMMANDS[name]
    assert main([str(word) for word in words(model, adapter, tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("refused: ") and "custom code" in said[0]
    assert not file.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["utils.verify of an adapter", "utils.merge_lora", "utils.chat of an adapter"])
def test_pickled_weights_are_not_read(name, copy, tmp_path, capsys):
    tensors = load_file(copy / "adapter_model.safetensors")
    torch.save(tensors, copy / "adapter_model.bin")
    (copy / "adapter_model.safetensors").unlink()
    main, words = COMMANDS[name]
    assert main([str(word) for word in words(None, copy, tmp_path / "out")]) == (1 if main is verify.main else 2)
    assert "only pickled weights (adapter_model.bin), which can run code when read" in capsys.readouterr().err


def test_it_would_have_been_executed(with_code, tmp_path):
    model, _, file = with_code
    words = f"from_pretrained({str(model)!r}, trust_remote_code=True)"
    words = f"import transformers; transformers.AutoModelForCausalLM.{words}"
    done = subprocess.run(
        [sys.executable, "-c", words],
        env={"PATH": "", "HF_MODULES_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert file.read_text() == "executed"
