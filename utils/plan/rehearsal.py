"""Two steps of the real trainer on tensors that have shapes and no data: the memory of each moment, by owner.

Nothing is loaded or computed, so a 70B model takes seconds and no memory. Counted: everything that the libraries
allocate through torch's dispatcher (weights, saved activations, gradients, optimizer state, logits, the KV cache).
Not counted: buffers inside kernels, the CUDA context, fragmentation.
"""

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from trainers.critics import find_layers
from utils.cli.run import Run
from utils.plan import hollow
from utils.plan.asked import Models
from utils.plan.engines import Rehearsal
from utils.plan.hollow import hollow_model, size_of
from utils.plan.ledger import Ledger, without_data

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, Trainer


def rehearse(run: Run, models: Models, lengths: tuple[int, int], sharded: bool, on_gpu: bool) -> Rehearsal:
    """The Rehearsal of the second step of a run, whose `train` is one batch of the longest row.

    `lengths`: tokens of prompt and answer. `sharded`: an engine that holds the weights in --dtype. `on_gpu`: count the
    loss kernels of a GPU.
    """
    from transformers import set_seed

    from rlhf_args.methods import load
    from utils.plan.gpu_kernels import as_on_gpu

    reset_accelerate()
    config, kind, ledger = run.config, load(run.method.trainer), Ledger()
    set_seed(config.seed)
    config.bf16 = config.bf16 and not sharded
    with quietly(), without_data(ledger), new_objects_collected():
        with hollow.without_loading(models.find), with_reference_precomputed(kind):
            trainer, judge, sizes = make_rehearsed(run, kind, models, sharded, ledger)
            gc.collect()
            weights, ledger.peaks = ledger.held["weights"], {}
            ledger.reach("")
            trainer.create_optimizer()
            trainer.model_wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
            trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    samples = hasattr(trainer, "rehearsed")  # the policy answers, then learns from made-up answers
    inputs = {} if samples else next(iter(trainer.get_train_dataloader()))
    with quietly(), without_data(ledger), as_on_gpu() if on_gpu else contextlib.nullcontext():
        make_first_step(trainer, optimizer, ledger)
        if config.samples_answers():
            roll_out(trainer, judge, ledger, lengths)
        calls = make_second_step(trainer, optimizer, ledger, trainer.rehearsed(*lengths) if samples else inputs)
    foreseen = calls == 1 and all(phase != "rollout" for phase, _ in ledger.peaks)
    return Rehearsal(ledger.peaks, weights, foreseen, config.gradient_accumulation_steps > 1, **sizes)


def rehearse_answers(
    shape: "PretrainedConfig", rows: int, lengths: tuple[int, int], dtype: str, in_4bit: bool
) -> dict[str, float]:
    """{owner: bytes} of a teacher alone that answers this many prompts at once. `lengths`: as in rehearse()."""
    ledger = Ledger()
    with quietly(), without_data(ledger), torch.no_grad():
        ledger.owner = "teacher_model"
        model = hollow_model(shape, "CAUSAL_LM", getattr(torch, dtype), None, in_4bit).eval()
        ledger.enter("answers", "KV cache")
        generate_token(model, rows, *lengths)
    return ledger.peaks["answers", ""]


# ── the trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────


def make_rehearsed(
    run: Run, kind: type, models: Models, sharded: bool, ledger: Ledger
) -> "tuple[Trainer, PreTrainedModel | None, dict[str, Any]]":
    """(the trainer with hollow models, the reward model, fields of Rehearsal that describe the models)."""
    from utils.data import prepare
    from utils.models.load import fit_config

    common, config, method = run.common, run.config, run.method
    held = getattr(torch, common.dtype)
    trained_in = held if sharded or common.train_mode != "full" else torch.float32
    attention = "eager" if common.attn_implementation == "eager" else None  # only eager attention keeps the scores
    model = hollow_model(models.policy, method.task, trained_in, attention, common.train_mode == "qlora")
    fit_config(model, run.tokenizer)
    others: dict[str, Any] = {}
    for name, shape, in_4bit in models.frozen:
        ledger.owner = name
        task = "SEQ_CLS" if name == "reward_model" else "CAUSAL_LM"
        dtype = trained_in if name in method.models else held
        others[name] = hollow_model(shape, task, dtype, attention, in_4bit).eval().requires_grad_(False)
        fit_config(others[name], run.tokenizer)
    ledger.owner = "weights"
    judge, teacher = others.pop("reward_model", None), others.get("teacher_model")
    if method.sample_reward:
        others["reward_funcs"] = [lambda completions, **kwargs: [0.0] * len(completions)]
    given = {"args": config, "processing_class": run.tokenizer, "peft_config": models.lora}
    trainer = kind(model=model, train_dataset=prepare.as_dataset(run.train), **given, **others)
    if config.gradient_checkpointing:  # Trainer.train does it, which is not called
        trainer.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    if sharded:
        trainer.model.to(held)
    sizes = {
        "trained": hollow.count_stored(trainer.model, True),
        "frozen": hollow.count_stored(trainer.model, False),
        "critic": hollow.split_critic(trainer.model),
        "numbers": hollow.count_unpacked(trainer.model),
        "layer": max(size_of(*find_layers(one)[0].parameters()) for one in (trainer.model, teacher) if one),
        "largest": max(map(size_of, trainer.model.parameters())),
        "teacher_largest": max(map(size_of, teacher.parameters())) if teacher else 0,
    }
    return trainer, judge, sizes


def reset_accelerate() -> None:
    """Lets the next trainer choose its precision anew."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(cpu=True)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, the libraries do not warn of identical rows or of a model that cannot learn."""
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def new_objects_collected() -> Iterator[None]:
    """Inside, gc.collect() looks only at objects made inside: five times as fast."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def with_reference_precomputed(kind: type) -> Iterator[None]:
    """Inside, the trainer does not compute the reference's log-probabilities: make_second_step() makes them up."""
    if not hasattr(kind, "_precompute_ref_logps"):
        yield
        return
    skipped = mock.patch.object(kind, "_precompute_ref_logps", lambda self, dataset, *args, **kwargs: dataset)
    with skipped, mock.patch.object(sys.modules[kind.__module__], "hash_module", lambda model: ""):
        yield


# ── the steps ────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_first_step(trainer: "Trainer", optimizer: torch.optim.Optimizer, ledger: Ledger) -> None:
    """An optimizer step on made-up gradients, which leaves the optimizer's state behind."""
    for parameter in make_gradients(trainer, ledger):
        parameter.register_post_accumulate_grad_hook(lambda one: ledger.give(one.grad, "gradients"))
    ledger.owner = "optimizer"
    optimizer.step()
    optimizer.zero_grad()


def make_gradients(trainer: "Trainer", ledger: Ledger) -> list[torch.nn.Parameter]:
    """The trained parameters, each with a gradient."""
    ledger.enter("update", "gradients")
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    return trained


def make_second_step(
    trainer: "Trainer", optimizer: torch.optim.Optimizer, ledger: Ledger, inputs: dict[str, Any]
) -> int:
    """The last pass and the optimizer step. Returns how many times the forward pass ran the policy."""
    calls: list[str] = []
    compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward

    def forward_phase(*args: Any, **kwargs: Any) -> Any:
        ledger.enter("forward", "activations")
        return compute_loss(*args, **kwargs)

    def backward_phase(*args: Any, **kwargs: Any) -> None:
        ledger.enter("backward", "logits and loss", "head")
        backward(*args, **kwargs)

    trainer.compute_loss, trainer.accelerator.backward = forward_phase, backward_phase
    trainer._prepare_inputs = lambda given: given
    if trainer.args.gradient_accumulation_steps > 1:  # the gradients of the passes before
        make_gradients(trainer, ledger)
    follow_layers(trainer, ledger, calls)
    if trainer.args.precompute_ref_log_probs:
        names = "ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"
        inputs = {**inputs, **{name: torch.zeros(trainer.args.per_device_train_batch_size) for name in names}}
    fake = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    trainer.training_step(trainer.model_wrapped, fake, 1)
    ledger.enter("update", "optimizer")
    optimizer.step()
    return calls.count("forward")


def follow_layers(trainer: "Trainer", ledger: Ledger, calls: list[str]) -> None:
    """Begins a moment of the ledger at the first, a middle and the last layer and at the head, in both directions.

    `calls` gets the phase of each run of the first layer.
    """
    layers = find_layers(trainer.model)
    for number, layer in enumerate(layers):
        moment = {0: "first layer", len(layers) - 1: "last layer"}.get(number, "layers between")
        layer.register_forward_pre_hook(lambda *_, moment=moment: ledger.reach(moment))
        layer.register_forward_hook(lambda module, _, out, moment=moment: mark_backward(out, ledger, moment))
    layers[0].register_forward_pre_hook(lambda *_: calls.append(ledger.phase))
    layers[-1].register_forward_hook(lambda *_: ledger.reach("head", "logits and loss"))


def mark_backward(out: Any, ledger: Ledger, moment: str) -> None:
    """Begins the moment when the backward pass reaches this output of a layer."""
    states = out[0] if isinstance(out, tuple) else out
    if states.requires_grad:
        states.register_hook(lambda _: ledger.reach(moment))


def roll_out(trainer: "Trainer", judge: "PreTrainedModel | None", ledger: Ledger, lengths: tuple[int, int]) -> None:
    """A rollout: the policy answers all prompts at once, and the answers are scored."""
    ledger.enter("rollout", "KV cache")
    prompt, completion = lengths
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    batch = args.per_device_train_batch_size
    rows = batch * (args.steps_per_generation or args.gradient_accumulation_steps)
    model.eval()
    with torch.no_grad():
        generate_token(model, rows, prompt, completion)
        ledger.reach("judged")
        whole = mask = torch.ones(rows, prompt + completion, dtype=torch.int64)
        if judge is not None:
            limit = getattr(judge.config.get_text_config(), "max_position_embeddings", None)  # longer rows are cut
            judge(input_ids=whole[: max(8, batch), :limit], attention_mask=mask[: max(8, batch), :limit])
        if hasattr(trainer, "_get_per_token_logps_and_entropies"):  # TRL's online trainers score the answers again
            for scored in filter(None, (trainer.model, trainer.ref_model)):
                trainer._get_per_token_logps_and_entropies(scored, whole, mask, completion, batch)
    model.train()


def generate_token(model: "PreTrainedModel", rows: int, prompt: int, completion: int) -> None:
    """Reads the prompts, and generates the last token, with the KV cache of whole answers."""
    ids = torch.ones(rows, prompt, dtype=torch.int64)
    mask = torch.ones(rows, prompt + completion, dtype=torch.int64)
    cache = model(input_ids=ids, attention_mask=mask[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    for layer in cache.layers:
        batch, heads, _, size = layer.keys.shape
        for name in ("keys", "values"):
            setattr(layer, name, torch.empty(batch, heads, prompt + completion - 1, size, dtype=layer.keys.dtype))
    out = model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
    out.logits[:, -1].float().softmax(-1)
