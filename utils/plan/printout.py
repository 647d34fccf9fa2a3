"""What --plan prints: python train_rlhf.py --plan FLAGS, or bash rlhf_run.sh --plan"""

import re
from collections.abc import Iterator

from utils.plan.engines import ENGINES, SHARES, Case, Estimate, gib
from utils.plan.planner import CONTEXT, Planner
from utils.runtime.environment import GIB
from utils.runtime.errors import Refused

BATCH_FLAGS = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
PHASES = ("answers", "load", "rollout", "forward", "backward", "update")
OWNERS = {"ref_model": "reference", "teacher_model": "teacher", "reward_model": "reward model"}  # as printed


def print_plan(argv: list[str], name: str | None = None) -> int:
    """Prints the plan of a command line. Returns 0 if the run fits, else 2. `name`: the method of train_gkd.py."""
    planner = Planner(argv, name)
    return print_table(planner) if planner.wants_table else print_case(planner)


def print_case(planner: Planner) -> int:
    estimate, room = planner.estimate(planner.case), describe_room(planner)
    print_phases(planner, estimate)
    if estimate.peak <= planner.room:
        print(f"fits      {gib(estimate.peak)} of {room}", flush=True)
        print_faster(planner)
        return 0
    print(f"too large {gib(estimate.peak)} of {room}", flush=True)
    print_ways_out(planner)
    return 2


def print_phases(planner: Planner, estimate: Estimate) -> None:
    """The run in two lines, and its memory by phase and owner."""
    common, config, case = planner.run.common, planner.run.config, planner.case
    sizes = f"{say_numbers(estimate.total)} parameters, {say_numbers(estimate.trained)} trained"
    model = f"{common.model_name_or_path} ({sizes}), {common.dtype}"
    gpus = f"{case.processes} x {gib(planner.memory, 0)}"
    print(f"plan      {planner.name}, {common.train_mode}, {model}, {gpus}, {case.engine}")
    batch = f"{config.per_device_train_batch_size} a pass, {config.gradient_accumulation_steps} passes a step"
    recompute = "on" if config.gradient_checkpointing else "off"
    print(f"rows      {batch}: {planner.longest.said}; gradient checkpointing {recompute}")
    shown = {phase: estimate.phases[phase] for phase in PHASES if phase in estimate.phases}
    table = {owner: [held.get(owner, 0) for held in shown.values()] for held in shown.values() for owner in held}
    table = {OWNERS.get(owner, owner): row for owner, row in table.items() if max(row) >= GIB / 200}
    print(f"{'per GPU, GiB':<20}" + "".join(f"{phase:>10}" for phase in shown))
    for owner, row in (table | {"all": [sum(held.values()) for held in shown.values()]}).items():
        print(f"  {owner:<18}" + "".join(f"{size / GIB:>10.2f}" for size in row))
    if estimate.host:
        print(f"host      {gib(estimate.host)} of host memory on a node with {case.processes} processes")


def print_table(planner: Planner) -> int:
    """The peak under every engine and train mode."""
    words, modes, processes = planner.case.words, planner.method.train_modes, planner.case.processes
    engines = ENGINES[1:] if processes > 1 else (ENGINES[0], *SHARES)
    model, gpus = planner.run.common.model_name_or_path, f"{processes} x {gib(planner.memory, 0)}"
    print(f"plan      {planner.name}, {model}, {gpus}: {planner.longest.said}")
    print(f"{'peak, GiB a GPU':<20}" + "".join(f"{mode:>14}" for mode in modes))
    for engine in engines:
        cases = [Case((*words, "--train_mode", mode), engine, processes) for mode in modes]
        peaks = [planner.estimate(case).peak for case in cases]
        cells = [f"{peak / GIB:.1f}{' ' if peak <= planner.room else '!'}" for peak in peaks]
        print(f"{engine:<20}" + "".join(f"{cell:>14}" for cell in cells))
    print(f"!: more than {describe_room(planner)}")
    return 0


def describe_room(planner: Planner) -> str:
    return f"{gib(planner.room)} ({gib(planner.room + CONTEXT)} on the GPU, less {gib(CONTEXT)} for CUDA and NCCL)"


def say_numbers(numbers: float) -> str:
    return f"{numbers / 1e9:.2f}B" if numbers >= 1e9 else f"{numbers / 1e6:.1f}M"


# ── changes of the command line ──────────────────────────────────────────────────────────────────────────────────────


def print_faster(planner: Planner) -> None:
    """Says if the run fits without recomputation, which takes a quarter of the time."""
    said, case = with_flags(planner.case, "--gradient_checkpointing", "False")
    if planner.run.config.gradient_checkpointing and (peak := planner.estimate(case).peak) <= planner.room:
        print(f"faster    {said} would fit too: {gib(peak)}")


def print_ways_out(planner: Planner) -> None:
    """Up to four single changes that make the run fit; if none does, the change with the smallest peak."""
    fitting: set[str] = set()
    nearest = "", float("inf")
    for said, case in single_changes(planner):
        knob = re.split("[ =]", said)[0]
        if knob in fitting:  # a smaller change of the same flag is enough
            continue
        try:
            estimate = planner.estimate(case)
        except (Refused, ValueError):  # flags that exclude each other
            continue
        nearest = min(nearest, (said, estimate.peak), key=lambda change: change[1])
        if estimate.peak <= planner.room:
            if not fitting:
                print("would fit, the least loss of speed first:")
            host = f", and {gib(estimate.host, 0)} of host memory on each node" if estimate.host else ""
            print(f"  {said:<80} {gib(estimate.peak)}{host}", flush=True)
            fitting.add(knob)
        if len(fitting) == 4:
            return
    if not fitting and nearest[0]:
        print(f"no single change makes it fit. The nearest:\n  {nearest[0]:<80} {gib(nearest[1])}")


def single_changes(planner: Planner) -> Iterator[tuple[str, Case]]:
    """(the text to type, the changed Case), the least loss of speed first."""
    case, method, common, config = planner.case, planner.method, planner.run.common, planner.run.config
    full, alone = common.train_mode == "full", case.processes == 1
    if method.models and full and alone and config.precompute_ref_log_probs is False:
        yield with_flags(case, "--precompute_ref_log_probs", "True")
    later = SHARES[SHARES.index(case.engine) + 1 :] if case.engine in SHARES else SHARES
    engines = {engine: (f"LAUNCH={engine}", Case(case.words, engine, case.processes)) for engine in later}
    rows, passes, slices = (getattr(config, flag) for flag in BATCH_FLAGS)
    while rows % 2 == 0 and rows // 2 >= method.min_batch_size:
        rows, passes, slices = rows // 2, passes * 2, slices and slices * 2
        given = zip(BATCH_FLAGS, (rows, passes, slices), strict=True)
        yield with_flags(case, *(word for flag, value in given if value for word in (f"--{flag}", str(value))))
    if not config.gradient_checkpointing:
        yield with_flags(case, "--gradient_checkpointing", "True")
    if not alone:
        yield from (change for engine, change in engines.items() if "offload" not in engine)
    if config.teacher_load_in_4bit is False:
        yield with_flags(case, "--teacher_load_in_4bit", "True")
    for mode in {"full": ("lora", "qlora"), "lora": ("qlora",)}.get(common.train_mode, ()):
        yield with_flags(case, "--train_mode", mode)
    if alone:
        for processes in (2, 4, 8):
            yield f"LAUNCH=zero3 NUM_PROCESSES={processes}", Case(case.words, "zero3", processes)
    yield from (change for engine, change in engines.items() if "offload" in engine)
    flag = "max_completion_length" if config.max_completion_length else "max_length"
    if limit := getattr(config, flag):
        yield with_flags(case, f"--{flag}", str(limit // 2))


def with_flags(case: Case, *words: str) -> tuple[str, Case]:
    return " ".join(words), Case((*case.words, *words), case.engine, case.processes)
