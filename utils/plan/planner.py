"""Whether a run fits, before there is a GPU: python train_rlhf.py --plan FLAGS, or bash rlhf_run.sh --plan

The real trainer makes two steps of a model of two and three layers without data (utils/plan/rehearsal.py); each
further layer adds what the third one did. What engines share out follows from what they do, in shared_out().
"""

import copy
import os
import re

from rlhf_args.methods import ANSWERED
from utils.checks import flags
from utils.cli import arguments, recipes
from utils.cli.run import Run
from utils.data.rows import Rows
from utils.models import shapes, teacher
from utils.models.folders import ModelFolder
from utils.models.load import make_lora, needs_reference
from utils.plan.engines import ENGINES, SHARES, Case, count, gib, shared_out
from utils.plan.longest import Longest
from utils.rewards import models
from utils.runtime import output
from utils.runtime.environment import GIB
from utils.runtime.errors import Refused, refuse_if
from utils.training import pace

CONTEXT = 1.0 * GIB  # CUDA's context, NCCL's buffers, workspaces of kernels: about, and not planned
VISIBLE = 0.985  # of the memory on a card's box: a 40 GB A100 has 39.4 GiB
ROW_FLAGS = ("max_length", "max_prompt_length", "max_completion_length", "lmbda", "seq_kd", "packing")  # of its tokens
PHASES = ("answers", "load", "rollout", "forward", "backward", "update")
SHOWN = {
    "ref_model": "reference",
    "teacher_model": "teacher",
    "reward_model": "reward model",
}


def run(argv, name=None):
    """Prints the plan; 0 where it fits, else 2."""
    planner = Planner(argv, name)
    asked = planner.asked
    if planner.table:
        return planner.say_table()
    estimate = planner.estimate(asked)
    planner.say(asked, estimate)
    if estimate.peak <= planner.room:
        print(f"fits      {gib(estimate.peak)} of {planner.say_room()}", flush=True)
        planner.say_faster()
        return 0
    print(f"too large {gib(estimate.peak)} of {planner.say_room()}", flush=True)
    planner.say_ways_out()
    return 2


class Planner:
    """What is asked for, and the estimates made of it so far."""

    def __init__(self, argv, name=None, on_gpu=True):
        words = recipes.expand(argv)
        if name is None:
            shared, name = arguments.parse_common(words)
        else:
            shared, problems = arguments.peek(words, arguments.load(arguments.EVERY[name].arguments))
            refuse_if(problems)
        self.name, self.method = name, arguments.EVERY[name]
        words = tuple(recipes.translate(words, dict(self.method.renamed)))
        engine, processes = read_launch(shared, os.environ)
        os.environ["LAUNCH_PROCESSES"] = str(processes)  # a rollout is shared by all of them
        self.asked = Case(words, engine, processes)
        self.table, self.made, self.on_gpu = shared.plan == "all", {}, on_gpu
        self.memory, visible = read_memory(shared.gpu_memory)
        self.room = visible - CONTEXT
        common, config = self.parse(words)
        refuse_if([*flags.check_mode(common, self.name, self.method), *check_models(common, config, self.method)])
        self.path = common.model_name_or_path
        self.shape = find_config(self.path, common.model_revision, config.trust_remote_code)
        refuse_if(list(self.check_critic(config)))
        self.found = {}
        self.longest = self.find_longest(common, config)

    def parse(self, words):
        """The flags, with what the run would choose by itself of what decides about memory."""
        common, config = arguments.parse(list(words), self.name, planned=True)
        if config.max_steps < 1 and common.model_name_or_path and not common.plain:
            pace.compute_reference_once(Run([], self.name, common, config, Rows([])))
        return common, config

    def check_critic(self, config):
        """A critic that begins as another model is extended with the policy, layer by layer."""
        path = config.value_model_path
        if not path:
            return
        critic = find_config(path, trust_remote_code=config.trust_remote_code)
        here, there = (one.get_text_config().num_hidden_layers for one in (self.shape, critic))
        if here != there:
            yield (
                f"--value_model_path {path}: {there} layers, and the policy has {here}: a plan takes as many in both. "
                "Leave it out"
            )

    def find_longest(self, common, config):
        limits = tuple(getattr(config, name) for name in ROW_FLAGS)
        if limits not in self.found:
            self.found[limits] = Longest(common, config, self.method, self.name)
        return self.found[limits]

    def estimate(self, case):
        """The Estimate of a Case."""
        sharded = case.engine in SHARES
        key = case.words, sharded
        if key not in self.made:
            self.made[key] = self.rehearse(case.words, sharded)
        return shared_out(self.made[key], case)

    def rehearse(self, words, sharded):
        """The Rehearsal of one process alone, extended from few layers to all of them."""
        from utils.plan import rehearsal

        common, config = self.parse(words)
        layers = {"": self.shape.get_text_config().num_hidden_layers}
        for name, shape, _ in self.others(common, config):
            layers[name] = shape.get_text_config().num_hidden_layers
        if min(layers.values()) <= 3:
            one = self.rehearse_layers(words, sharded, max(layers.values()))
        else:
            one = rehearsal.extend(*(self.rehearse_layers(words, sharded, count) for count in (2, 3)), layers)
        if config.seq_kd:
            one.peaks["answers", ""] = self.rehearse_answers(common, config)
        return one

    def rehearse_layers(self, words, sharded, count):
        """The same of a model of so many layers, and of others of as many."""
        from utils.plan import rehearsal

        common, config = self.parse(words)
        longest = self.find_longest(common, config)
        return rehearsal.rehearse(
            self.method,
            config,
            self.lora(common),
            cut(self.shape, count),
            longest.tokenizer,
            longest.batch(config.per_device_train_batch_size),
            dtype=common.dtype,
            train_mode=common.train_mode,
            attn_implementation="eager"
            if common.attn_implementation == "eager"
            else None,  # the others hold no scores
            sharded=sharded,
            lengths=longest.lengths,
            others=[(name, cut(shape, count), four) for name, shape, four in self.others(common, config)],
            find=lambda path: cut(find_config(path), count),
            on_gpu=self.on_gpu,
        )

    def rehearse_answers(self, common, config):
        """{owner: bytes} of the teacher that answers before there is a student, whole on each GPU."""
        from utils.plan import rehearsal

        path, count = config.teacher_model_name_or_path, config.answers_batch_size
        held = {"dtype": common.dtype, "four_bit": teacher.in_4bit(common, config)}
        lengths = self.find_longest(common, config).lengths
        key = path, count, lengths, *held.values()
        if key not in self.made:
            shape = find_config(path, config.teacher_model_revision, config.trust_remote_code)
            self.made[key] = rehearsal.rehearse_answers(shape, count, lengths, **held)
        return self.made[key]

    def lora(self, common):
        if common.train_mode == "full":
            return None
        if ModelFolder.at(self.path).adapter:
            from peft import LoraConfig

            return LoraConfig.from_pretrained(self.path, inference_mode=False)
        shape = common.lora_rank, common.lora_alpha, common.lora_dropout, common.lora_target_modules
        return make_lora(self.method.task, *shape, common.use_dora)

    def others(self, common, config):
        """(the trainer's keyword, config, in 4 bits) of each frozen model that the trainer holds beside the policy."""
        if common.train_mode == "full" and needs_reference(config, self.method):
            yield from ((name, self.shape, False) for name in self.method.models)
        judge = getattr(common, "reward_model_path", None)
        if judge and not models.on_policy_base(judge, self.path, common.train_mode, common.model_revision):
            yield "reward_model", find_config(judge, None, config.trust_remote_code), False
        path = config.teacher_model_name_or_path
        if path and not teacher.shares_base(common, config):
            described = find_config(path, config.teacher_model_revision, config.trust_remote_code)
            yield "teacher_model", described, teacher.in_4bit(common, config)

    # ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────

    def say(self, case, estimate):
        common, config = self.parse(case.words)
        held = f"{count(estimate.total)} numbers, {count(estimate.trained)} trained"
        cards = f"{case.processes} x {gib(self.memory, 0)}"
        print(
            f"plan      {self.name}, {common.train_mode}, {self.path} ({held}), {common.dtype}, {cards}, {case.engine}"
        )
        rows, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
        recompute = "on" if config.gradient_checkpointing else "off"
        print(
            f"rows      {rows} a pass, {passes} passes a step: {self.longest.said}; gradient checkpointing {recompute}"
        )
        owners = list(dict.fromkeys(owner for phase in estimate.phases.values() for owner in phase))
        phases = [phase for phase in PHASES if phase in estimate.phases]
        print(f"{'per GPU, GiB':<20}" + "".join(f"{phase:>10}" for phase in phases))
        for owner in owners:
            sizes = [estimate.phases[phase].get(owner, 0) for phase in phases]
            if max(sizes) >= GIB / 200:
                print(f"  {SHOWN.get(owner, owner):<18}" + "".join(f"{size / GIB:>10.2f}" for size in sizes))
        print(f"  {'all':<18}" + "".join(f"{sum(estimate.phases[phase].values()) / GIB:>10.2f}" for phase in phases))
        if estimate.host:
            print(f"host      {gib(estimate.host)} of memory a node of {case.processes} processes")

    def say_room(self):
        return f"{gib(self.room)} ({gib(self.room + CONTEXT)} are there, {gib(CONTEXT)} for CUDA and NCCL)"

    def say_faster(self):
        """That recomputation could be left out, which takes a quarter of the time, if it could."""
        said, case = self.typed(("--gradient_checkpointing", "False"))
        if self.parse(self.asked.words)[1].gradient_checkpointing and (peak := self.estimate(case).peak) <= self.room:
            print(f"faster    {said} would fit too: {gib(peak)}")

    def say_ways_out(self):
        """The single changes that make it fit, the cheapest in time first; or the smallest peak that one reaches."""
        turned, best = set(), None
        for said, case in self.ways_out():
            knob = re.split("[ =]", said)[0]
            if knob in turned:  # as little of each as it takes
                continue
            try:
                estimate = self.estimate(case)
            except (Refused, ValueError):  # flags that exclude each other
                continue
            if estimate.peak <= self.room:
                if not turned:
                    print("would fit, the least loss of speed first:")
                host = f", and {gib(estimate.host, 0)} of a node's memory" if estimate.host else ""
                print(f"  {said:<80} {gib(estimate.peak)}{host}", flush=True)
                turned.add(knob)
            if best is None or estimate.peak < best[1]:
                best = said, estimate.peak
            if len(turned) == 4:
                break
        if not turned and best:
            print(f"no single change makes it fit; the one that comes nearest:\n  {best[0]:<80} {gib(best[1])}")

    def ways_out(self):
        """(what to type, Case) of each single change, the cheapest in time first."""
        case = self.asked
        common, config = self.parse(case.words)
        full, alone = common.train_mode == "full", case.processes == 1
        if self.method.models and full and alone and config.precompute_ref_log_probs is False:
            yield self.typed(("--precompute_ref_log_probs", "True"))
        later = SHARES[SHARES.index(case.engine) + 1 :] if case.engine in SHARES else SHARES
        smaller, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
        generating = config.steps_per_generation
        while smaller % 2 == 0 and smaller // 2 >= self.method.min_batch_size:
            smaller, passes, generating = smaller // 2, passes * 2, generating and generating * 2
            words = ["--per_device_train_batch_size", smaller, "--gradient_accumulation_steps", passes]
            words += ["--steps_per_generation", generating] if generating else []
            yield self.typed(tuple(map(str, words)))
        if not config.gradient_checkpointing:
            yield self.typed(("--gradient_checkpointing", "True"))
        for engine in () if alone else [engine for engine in later if "offload" not in engine]:
            yield f"LAUNCH={engine}", Case(case.words, engine, case.processes)
        if config.teacher_load_in_4bit is False:
            yield self.typed(("--teacher_load_in_4bit", "True"))
        for mode in {"full": ("lora", "qlora"), "lora": ("qlora",)}.get(common.train_mode, ()):
            yield self.typed(("--train_mode", mode))
        if alone:
            for processes in (2, 4, 8):
                yield f"LAUNCH=zero3 NUM_PROCESSES={processes}", Case(case.words, "zero3", processes)
        for engine in [engine for engine in later if "offload" in engine]:
            yield f"LAUNCH={engine}", Case(case.words, engine, case.processes)
        for flag in ("max_completion_length", "max_length"):
            if getattr(config, flag):
                yield self.typed((f"--{flag}", str(getattr(config, flag) // 2)))
                break

    def typed(self, words):
        return " ".join(words), Case((*self.asked.words, *words), self.asked.engine, self.asked.processes)

    def say_table(self):
        """The peak under every engine in every mode."""
        modes, processes = self.method.train_modes, max(self.asked.processes, 1)
        engines = ENGINES[:1] if processes == 1 else ENGINES[1:]
        engines = (*engines, *(SHARES if processes == 1 else ()))
        print(f"plan      {self.name}, {self.path}, {processes} x {gib(self.memory, 0)}: {self.longest.said}")
        print(f"{'peak, GiB a GPU':<20}" + "".join(f"{mode:>14}" for mode in modes))
        for engine in engines:
            cells = []
            for mode in modes:
                peak = self.estimate(Case((*self.asked.words, "--train_mode", mode), engine, processes)).peak
                cells.append(f"{peak / GIB:.1f}{' ' if peak <= self.room else '!'}")
            print(f"{engine:<20}" + "".join(f"{cell:>14}" for cell in cells))
        print(f"!: more than {self.say_room()}")
        return 0


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def read_launch(shared, env):
    """(engine, processes) that --plan ENGINE, --num_processes and the run script's variables say. Raises Refused."""
    launch = env.get("LAUNCH") or "auto"
    here = env.get("NUM_PROCESSES") or (1 if launch in ("cpu", "single_gpu") else count_gpus() or 1)
    counts = {"--num_processes ": shared.num_processes, "NUM_PROCESSES=": here, "NNODES=": env.get("NNODES") or 1}
    given = {name: str(value) for name, value in counts.items() if value is not None}
    wrong = [f"{name}{value}" for name, value in given.items() if not value.isdecimal() or value == "0"]
    wrong = [f"{said}: how many, 1 or more" for said in wrong]
    refuse_if(wrong)
    processes = shared.num_processes or int(here) * int(env.get("NNODES") or 1)
    engine = shared.plan if shared.plan not in ("launched", "all") else launch
    if engine in ("auto", "cpu"):
        engine = "single_gpu"
    if engine not in ENGINES:
        raise Refused([f"--plan {engine}: no such launch. There are all, {', '.join(ENGINES)}"])
    return ("multi_gpu" if engine == "single_gpu" and processes > 1 else engine), processes


def count_gpus():
    import torch

    return torch.cuda.device_count()


def read_memory(said):
    """(what a card is called, bytes of it that are there) of "40GB", "80GiB" or "24"; unsaid: of the GPU that is here,
    or a 40 GB one. Raises Refused."""
    if said is None:
        import torch

        if torch.cuda.is_available():
            return (torch.cuda.get_device_properties(0).total_memory,) * 2
        said = "40GB"
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|G)?", said, re.IGNORECASE)
    if not found or not float(found[1]):
        raise Refused([f"--gpu_memory {said}: what a card is sold as, like 40GB"])
    return float(found[1]) * GIB, float(found[1]) * GIB * VISIBLE


def check_models(common, config, method):
    if not common.model_name_or_path:
        yield f"--model_name_or_path: missing. A model folder, a Hub id, or one of {', '.join(shapes.SHAPES)}"
    if method.columns == ANSWERED and not config.teacher_model_name_or_path:
        yield f"--teacher_model_name_or_path: missing. A model folder, a Hub id, or one of {', '.join(shapes.SHAPES)}"


def find_config(path, revision=None, trust_remote_code=False):
    """The config of a named shape, a folder, an adapter's base, or a Hub id. Raises Refused."""
    from transformers import AutoConfig

    shape = shapes.find_shape(path)
    if shape is not None:
        return shape
    adapter = ModelFolder.at(path).adapter
    path = adapter["base_model_name_or_path"] if adapter else path
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = output.first_line(error)
        raise Refused(
            [f"{path}: its config.json cannot be read ({reason}). A folder, a Hub id, or {', '.join(shapes.SHAPES)}"]
        ) from None


def cut(shape, layers):
    """A copy of a config with so many layers, or as many as it has."""
    shape = copy.deepcopy(shape)
    text = shape.get_text_config()
    layers = min(layers, text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # the kind of each layer
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return shape


# ── what engines share out ───────────────────────────────────────────────────────────────────────────────────────────
