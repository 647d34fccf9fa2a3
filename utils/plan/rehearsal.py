"""One step of the real trainer on tensors that have shapes and no data: what lies in memory when, and whose it is.

Nothing is loaded and nothing is computed, so a 70B takes seconds and no memory. All is counted that the libraries
allocate through torch's dispatcher: weights, what autograd keeps, gradients, optimizer state, logits, the KV cache.
Not counted: buffers inside of kernels, what the CUDA context holds, fragmentation.
"""

import contextlib
import gc
import logging
import sys
import warnings
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from utils.plan.ledger import Ledger, without_data


@dataclass
class Rehearsal:
    """What a step holds. `peaks`: {(phase, moment): {owner: bytes}}, one process alone, each moment at its fullest.

    `trained`, `frozen`: (numbers as stored, bytes) of the policy's parameters; of 4-bit weights one stores several.
    `weights`: bytes of the policy with all that belongs to it. `numbers`: its parameters, as what they stand for.
    """

    peaks: dict
    trained: tuple
    frozen: tuple
    weights: float
    numbers: float
    layer: int  # bytes of a decoder layer's parameters, the teacher's where that is larger
    largest: int  # bytes of the policy's largest parameter
    teacher_largest: int  # the same of a teacher, 0 without one
    foreseen: bool  # each pass asks the policy once and in the same order, and nothing else does
    accumulates: bool  # several passes a step
    critic: tuple = (0, 0)  # bytes of parameters that only the critic has, and of frozen ones that the policy has too


def extend(two, three, layers):
    """The Rehearsal of so many layers, from those of two and three. `layers`: {owner: count}, "" for all others.

    All that is held at a moment grows by the same with each layer, so this is exact where the layers are alike.
    """

    def grow(few, more, owner=""):
        return few + (more - few) * (layers.get(owner, layers[""]) - 2)

    peaks = {
        key: {o: grow(few.get(o, 0), more.get(o, 0), o) for o in {*few, *more}}
        for key, few in two.peaks.items()
        if (more := three.peaks.get(key)) is not None
    }
    pairs = {n: tuple(map(grow, getattr(two, n), getattr(three, n))) for n in ("trained", "frozen", "critic")}
    sums = grow(two.weights, three.weights), grow(two.numbers, three.numbers)
    sizes = two.layer, two.largest, two.teacher_largest
    trained, frozen, critic = pairs.values()
    return Rehearsal(peaks, trained, frozen, *sums, *sizes, two.foreseen, two.accumulates, critic)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_model(shape, task, dtype, attn_implementation, four_bit):
    """The model of a config, with no data in it; as models.load_model makes one."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from utils.models.load import cast_before_score, four_bit_config

    kind = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    shape.num_labels = 1 if task == "SEQ_CLS" else shape.num_labels
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = kind.from_config(shape, dtype=dtype, **kwargs)
    if four_bit:
        pack(model, four_bit_config(dtype))
    if task == "SEQ_CLS" and hasattr(model, "score"):  # an encoder's head has other names, and is not trained here
        model.score.float()
        cast_before_score(model)
    return model


@torch.no_grad()
def pack(model, quantization):
    """Puts bitsandbytes' 4-bit layers in place of the linear ones, as loading does."""
    import bitsandbytes
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers import AutoHfQuantizer

    stored = quantization.bnb_4bit_quant_storage
    sizes = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with _disable_current_modes():  # what it puts in place lies nowhere, on the meta device
        replace_with_bnb_linear(model, quantization.llm_int8_skip_modules, quantization)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            kinds = {"quant_type": "nf4", "quant_storage": stored}
            packed, state = bitsandbytes.functional.quantize_4bit(sizes[name], compress_statistics=True, **kinds)
            weight = torch.nn.Parameter(packed, requires_grad=False)
            weight.quant_state, weight.compress_statistics, weight.bnb_quantized = state, True, True
            weight.quant_type, weight.quant_storage = "nf4", stored
            module.weight, module.quant_state, module.support_avx512bf16_for_cpu = weight, state, False
            if module.bias is not None:
                module.bias = torch.nn.Parameter(torch.empty(module.out_features, dtype=stored), requires_grad=False)
    model.is_loaded_in_4bit, model.is_quantized, model.quantization_method = True, True, "bitsandbytes"
    model.config.quantization_config, model.hf_quantizer = quantization, AutoHfQuantizer.from_config(quantization)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and parameter.dtype != stored or parameter.dim() < 2)


# ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rehearse(
    method,
    config,
    lora,
    shape,
    tokenizer,
    rows,
    *,
    dtype,
    train_mode,
    attn_implementation,
    sharded,
    lengths,
    others=(),
    find=None,
    on_gpu=True,
):
    """The Rehearsal of a run's second step.

    `shape`: the policy's config. `rows`: the longest ones, a batch of them. `lengths`: tokens of prompt and answer.
    `sharded`: weights are held in `dtype`, as engines hold them that share parameters out. `others`: of frozen models
    beside it, (the trainer's keyword, config, in 4 bits or not). `find`: the config of a model that the trainer would
    load by itself, from its path. `on_gpu`: the losses' kernels are a GPU's.
    """
    from transformers import set_seed

    from rlhf_args.methods import load
    from utils.data import prepare
    from utils.models.load import fit_config
    from utils.plan.gpu_kernels import as_on_gpu

    reset_accelerate()
    set_seed(config.seed)
    ledger, held = Ledger(), getattr(torch, dtype)
    whole = held if sharded or train_mode != "full" else torch.float32
    config.bf16 = config.bf16 and not sharded
    kind = load(method.trainer)
    with quietly(), without_data(ledger), without_loading(find), as_if_computed(kind):
        model = make_model(shape, method.task, whole, attn_implementation, four_bit=train_mode == "qlora")
        fit_config(model, tokenizer)
        frozen = {}
        for name, described, four_bit in others:
            ledger.owner = name
            kept = whole if name in method.models else held
            task = "SEQ_CLS" if name == "reward_model" else "CAUSAL_LM"
            frozen[name] = (
                make_model(described, task, kept, attn_implementation, four_bit).eval().requires_grad_(False)
            )
            fit_config(frozen[name], tokenizer)
        judge = frozen.pop("reward_model", None)
        ledger.owner = "weights"
        given = {"reward_funcs": [no_reward]} if method.sample_reward else {}
        trainer = kind(
            model=model,
            args=config,
            processing_class=tokenizer,
            train_dataset=prepare.as_dataset(rows),
            peft_config=lora,
            **given,
            **frozen,
        )
        if config.gradient_checkpointing:  # as Trainer.train does it
            trainer.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        if sharded:
            trainer.model.to(held)
        taught = frozen.get("teacher_model")
        teacher_largest = max(map(size_of, taught.parameters())) if taught else 0
        layer = max(sum(map(size_of, find_layers(one)[0].parameters())) for one in (trainer.model, taught) if one)
        del model, frozen, taught
        gc.collect()
        weights = ledger.held["weights"]
        ledger.peaks = {}
        ledger.reach("")
        trainer.create_optimizer()
        trainer.model_wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    inputs = None if hasattr(trainer, "rehearsed") else next(iter(trainer.get_train_dataloader()))
    with quietly(), without_data(ledger), as_on_gpu() if on_gpu else contextlib.nullcontext():
        make_state(trainer, optimizer, ledger)
        if inputs is None:
            if config.lmbda > 0:
                answer(trainer, judge, ledger, *lengths)
            inputs = trainer.rehearsed(*lengths)
        asked = learn(trainer, optimizer, ledger, inputs, config.gradient_accumulation_steps)
    counts = [count_stored(trainer.model, trained) for trained in (True, False)]
    largest = max(map(size_of, trainer.model.parameters()))
    foreseen = asked == 1 and not any(phase == "rollout" for phase, _ in ledger.peaks)
    accumulates = config.gradient_accumulation_steps > 1
    sizes = layer, largest, teacher_largest
    numbers, critic = count_numbers(trainer.model), split_critic(trainer.model)
    return Rehearsal(ledger.peaks, *counts, weights, numbers, *sizes, foreseen, accumulates, critic)


def split_critic(model):
    """(bytes of parameters that only a critic has, bytes of those that it shares with the policy)."""
    named = list(model.named_parameters(remove_duplicate=False))
    policy = {id(parameter) for name, parameter in named if "critic." not in name}
    critic = {id(parameter): parameter for name, parameter in named if "critic." in name}
    sizes = [0, 0]
    for key, parameter in critic.items():
        sizes[key in policy] += size_of(parameter)
    return tuple(sizes)


def reset_accelerate():
    """So that the next trainer decides anew what it computes in."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(cpu=True)


@contextlib.contextmanager
def quietly():
    """Inside, nothing is said of rows that are all the same, or of a model that cannot learn."""
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def no_reward(completions, **kwargs):
    return [0.0] * len(completions)


@contextlib.contextmanager
def without_loading(find):
    """Inside, a model that a trainer loads by itself is made of its config, which `find` gives for its path."""
    from transformers import AutoModel

    def make(path, dtype, **kwargs):
        return AutoModel.from_config(find(path), dtype=dtype)

    with mock.patch.object(AutoModel, "from_pretrained", make):
        yield


@contextlib.contextmanager
def as_if_computed(kind):
    """Inside, the trainer finds the reference's log-probabilities in its rows, where it would compute them first."""
    if not hasattr(kind, "_precompute_ref_logps"):
        yield
        return
    module = sys.modules[kind.__module__]
    rows = {"_precompute_ref_logps": lambda self, dataset, *args, **kwargs: dataset}
    with mock.patch.multiple(kind, **rows), mock.patch.object(module, "hash_module", lambda model: ""):
        yield


def count_stored(model, trained):
    """(numbers, bytes) of the parameters that are trained, or of those that are not."""
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad == trained]
    return sum(p.numel() for p in chosen), sum(map(size_of, chosen))


def size_of(parameter):
    return parameter.numel() * parameter.element_size()


def count_numbers(model):
    """How many numbers the parameters stand for: a 4-bit weight is one of several in what stores it."""
    return sum(p.numel() * (2 * p.element_size() if hasattr(p, "quant_state") else 1) for p in model.parameters())


def make_state(trainer, optimizer, ledger):
    """The first step, which leaves the optimizer's state behind."""
    make_gradients(trainer, ledger)
    for parameter in trained_of(trainer):
        parameter.register_post_accumulate_grad_hook(lambda one: ledger.give(one.grad, "gradients"))
    ledger.owner = "optimizer"
    optimizer.step()
    optimizer.zero_grad()


def make_gradients(trainer, ledger):
    ledger.enter("update", "gradients")
    for parameter in trained_of(trainer):
        parameter.grad = torch.zeros_like(parameter)


def trained_of(trainer):
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def learn(trainer, optimizer, ledger, inputs, passes):
    """A pass and an optimizer step, beside the gradients of an earlier pass if there is one.

    Returns how many times it asked the policy.
    """
    asked = []
    compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward

    def forward_phase(*args, **kwargs):
        ledger.enter("forward", "activations")
        return compute_loss(*args, **kwargs)

    def backward_phase(*args, **kwargs):
        ledger.enter("backward", "logits and loss", "head")
        return backward(*args, **kwargs)

    trainer.compute_loss, trainer.accelerator.backward = forward_phase, backward_phase
    trainer._prepare_inputs = lambda given: given
    if passes > 1:
        make_gradients(trainer, ledger)
    follow_layers(trainer, ledger, asked)
    if trainer.args.precompute_ref_log_probs:
        names = "ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"
        inputs = {**inputs, **{name: torch.zeros(trainer.args.per_device_train_batch_size) for name in names}}
    as_fake = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    trainer.training_step(trainer.model_wrapped, as_fake, 1)
    ledger.enter("update", "optimizer")
    optimizer.step()
    return asked.count("forward")


def follow_layers(trainer, ledger, asked):
    """Marks the moments at which the first and the last layer begin and the head does, going up and going down.

    `asked` gets the phase of each time that the first one begins.
    """
    layers = find_layers(trainer.model)
    for number, layer in enumerate(layers):
        name = {0: "first layer", len(layers) - 1: "last layer"}.get(number, "layers between")
        layer.register_forward_pre_hook(lambda *_, name=name: ledger.reach(name))
        layer.register_forward_hook(lambda module, _, out, name=name: mark_backward(out, ledger, name))
    layers[0].register_forward_pre_hook(lambda *_: asked.append(ledger.phase))
    layers[-1].register_forward_hook(lambda *_: ledger.reach("head", "logits and loss"))


def find_layers(model):
    """The decoder layers: the longest list of modules that there is."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


def mark_backward(out, ledger, name):
    states = out[0] if isinstance(out, tuple) else out
    if states.requires_grad:
        states.register_hook(lambda _: ledger.reach(name))


def answer(trainer, judge, ledger, prompt, completion):
    """A rollout: all prompts are answered at once; the answers' scores."""
    ledger.enter("rollout", "KV cache")
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    batch = args.per_device_train_batch_size
    count = batch * (args.steps_per_generation or args.gradient_accumulation_steps)
    model.eval()
    with torch.no_grad():
        sample(model, count, prompt, completion)
        ledger.reach("judged")
        whole = mask = torch.ones(count, prompt + completion, dtype=torch.int64)
        if judge is not None:
            held = getattr(judge.config.get_text_config(), "max_position_embeddings", None)  # it cuts what is longer
            judge(input_ids=whole[: max(8, batch), :held], attention_mask=mask[: max(8, batch), :held])
        if hasattr(trainer, "_get_per_token_logps_and_entropies"):  # TRL's online trainers score answers once more
            for scored in filter(None, (trainer.model, trainer.ref_model)):
                trainer._get_per_token_logps_and_entropies(scored, whole, mask, completion, batch)
    model.train()


def sample(model, count, prompt, completion):
    """The prompts, and one more token with the keys and values of whole answers."""
    ids = torch.ones(count, prompt, dtype=torch.int64)
    mask = torch.ones(count, prompt + completion, dtype=torch.int64)
    cache = model(input_ids=ids, attention_mask=mask[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    for layer in cache.layers:
        rows, heads, _, size = layer.keys.shape
        for name in ("keys", "values"):
            setattr(layer, name, torch.empty(rows, heads, prompt + completion - 1, size, dtype=layer.keys.dtype))
    out = model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
    out.logits[:, -1].float().softmax(-1)


def rehearse_answers(shape, count, lengths, *, dtype, four_bit):
    """{owner: bytes} of a teacher alone that answers so many prompts at once; `lengths` as rehearse() has them."""
    ledger = Ledger()
    with quietly(), without_data(ledger), torch.no_grad():
        ledger.owner = "teacher_model"
        model = make_model(shape, "CAUSAL_LM", getattr(torch, dtype), None, four_bit).eval()
        ledger.enter("answers", "KV cache")
        sample(model, count, *lengths)
    return ledger.peaks["answers", ""]
