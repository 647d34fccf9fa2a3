"""How each engine divides weights, gradients and optimizer state among the GPUs."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from utils.runtime.environment import GIB

BUCKET = 5 * 10**8  # DeepSpeed's reduce_bucket_size, in numbers; training.fit_bucket makes it no larger than needed
LIVE = 10**9  # its stage3_max_live_parameters: gathered at the same time
FETCHED = 5 * 10**7  # its stage3_prefetch_bucket_size
GROUP = 10**9  # its sub_group_size: updated at the same time
ENGINES = ("single_gpu", "multi_gpu", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2")
SHARES = ENGINES[2:]
Held = defaultdict[str, float]  # {owner: bytes}
FROZEN = ("ref_model", "teacher_model", "reward_model")


@dataclass(frozen=True)
class Case:
    """A run to plan: its flags and its launch."""

    words: tuple[str, ...]
    engine: str
    processes: int


@dataclass
class Rehearsal:
    """The memory of one process alone. A pair is (numbers as stored, bytes)."""

    peaks: dict[tuple[str, str], dict[str, float]]  # {(phase, moment): {owner: bytes}} when the moment holds most
    weights: float  # bytes of the policy, with its adapter, critic and buffers
    foreseen: bool  # every pass runs the policy exactly once, always in the same order
    accumulates: bool  # several passes a step
    trained: tuple[float, float]  # the policy's trained parameters
    frozen: tuple[float, float]  # the policy's frozen parameters
    critic: tuple[float, float]  # bytes of the critic's own parameters, bytes of those shared with the policy
    numbers: float  # the policy's parameters, each packed 4-bit weight counted
    layer: int  # bytes of the larger of a decoder layer of the policy and one of the teacher
    largest: int  # bytes of the policy's largest parameter
    teacher_largest: int  # bytes of the teacher's largest parameter; 0 without a teacher


def extend(two: Rehearsal, three: Rehearsal, layers: dict[str, int]) -> Rehearsal:
    """The Rehearsal of many layers from those of two and three. `layers`: {owner: layers}, "" for all other owners.

    Memory grows by the same amount with each layer, so the result is exact if the layers are alike.
    """

    def grow(few: float, more: float, owner: str = "") -> float:
        return few + (more - few) * (layers.get(owner, layers[""]) - 2)

    peaks = {
        key: {owner: grow(few.get(owner, 0), more.get(owner, 0), owner) for owner in {**few, **more}}
        for key, few in two.peaks.items()
        if (more := three.peaks.get(key)) is not None
    }
    grown: dict[str, Any] = {name: grow(getattr(two, name), getattr(three, name)) for name in ("weights", "numbers")}
    for name in ("trained", "frozen", "critic"):
        grown[name] = tuple(map(grow, getattr(two, name), getattr(three, name)))
    return replace(two, peaks=peaks, **grown)


@dataclass
class Estimate:
    """`phases`: {phase: {owner: bytes}} on each GPU when the phase holds most; `host`: bytes of memory on a node."""

    phases: dict[str, Held]
    trained: float
    total: float
    host: float = 0

    @property
    def peak(self) -> float:
        return max(sum(owners.values()) for owners in self.phases.values())


def shared_out(one: Rehearsal, case: Case) -> Estimate:
    """The Estimate of a Case from the Rehearsal of one process alone."""
    trained, host = one.trained[0], 0.0
    phases: dict[str, Held] = {}
    for (phase, moment), held in one.peaks.items():
        owners = Held(float, held)
        if case.engine.startswith("zero") and phase != "answers":  # the teacher answers before the engine starts
            share_as_deepspeed(owners, one, case, phase, moment)
        elif case.engine == "fsdp2" and phase != "answers":
            share_as_fsdp2(owners, one, case.processes, phase)
        elif case.processes > 1 and phase in ("forward", "backward", "update"):
            owners["DDP's buckets"] = one.trained[1]
        if sum(owners.values()) > sum(phases.get(phase, {}).values()):
            phases[phase] = owners
    if "offload" in case.engine:
        host = 16 * trained
        if case.engine.startswith("zero3"):  # with the frozen models
            load = one.peaks["load", ""]
            host += one.weights + sum(load.get(name, 0) for name in FROZEN)
    return Estimate(phases, trained, one.numbers, host)


def share_as_deepspeed(owners: Held, one: Rehearsal, case: Case, phase: str, moment: str) -> None:
    """ZeRO divides the optimizer state and a float32 copy, from stage 2 on gradients, in stage 3 weights.

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py.
    """
    stage, share, offload = int(case.engine[4]), 1 / case.processes, "offload" in case.engine
    (trained, size), (_, rest) = one.trained, one.frozen
    width = size / max(trained, 1)  # bytes of a number
    bucket, so_far = width * min(BUCKET, trained), owners["gradients"]
    owners["optimizer"] = 0 if offload else 12 * trained * share
    if stage == 3 or phase == "backward" and so_far:
        owners["DeepSpeed's buckets"] = bucket
    if phase == "backward":  # a second bucket is being reduced
        owners["DeepSpeed's buckets"] += min(bucket, so_far)
    if stage == 2 and phase in ("forward", "backward"):
        owners["gradients"] = share * (size if one.accumulates else max(0, so_far - bucket))
    elif stage > 1 and phase != "load":
        owners["gradients"] = 0 if offload else size * share
    if phase == "update" and not offload:  # in float32; stage 3 updates one group of parameters at a time
        owners["gradients"] += 4 * (min(GROUP, trained * share) if stage == 3 else trained * share)
    if stage < 3:
        return
    whole, frozen = size + rest, {name: owners[name] for name in FROZEN}
    owners["weights"] -= whole - (0 if offload else whole * share)
    for name in frozen:
        owners[name] *= 0 if offload else share
    if phase == "rollout" and moment != "judged":  # generation keeps the whole policy
        owners["gathered weights"] = whole - one.critic[0]
    elif phase == "rollout":
        owners["gathered weights"] = sum(min(weights, width * LIVE) for weights in (whole, *frozen.values()))
    elif phase in ("forward", "backward"):
        owners["gathered weights"] = gathered_by_zero3(whole, one, width, phase, moment)
    if phase == "forward":
        owners["gathered weights"] += min(frozen["ref_model"] + frozen["teacher_model"], width * FETCHED)


def gathered_by_zero3(whole: float, one: Rehearsal, width: float, phase: str, moment: str) -> float:
    """Bytes of the policy gathered for a pass: parameters needed again soon, and those prefetched.

    If passes run the policy in different orders, DeepSpeed cannot foresee the next use and releases at once.
    """
    fetched = min(whole, width * FETCHED)
    arriving = fetched if phase == "forward" and moment != "head" else 0  # held twice; nothing follows the head
    held = width * LIVE + max(one.largest, fetched) if one.foreseen else one.largest + arriving
    return min(whole, held) + arriving


def share_as_fsdp2(owners: Held, one: Rehearsal, processes: int, phase: str) -> None:
    """FSDP2 divides the float32 parameters, their gradients and the optimizer state.

    It gathers and copies the largest piece. A reference is float32, as the parameters are; a teacher's head stays
    whole from its forward pass to the backward pass.
    Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_collectives.py; trainers/gkd_trainer.py, Head.
    """
    (trained, size), (_, rest) = one.trained, one.frozen
    share, so_far = 1 / processes, owners["gradients"]
    owners["weights"] += (4 * trained + rest + one.critic[1]) * share - size - rest  # modules cannot share parameters
    if phase in ("backward", "update"):
        owners["gradients"] = 4 * share * (trained if one.accumulates else trained * so_far / max(size, 1))
    owners["optimizer"] = 8 * trained * share if owners["optimizer"] else 0
    head = one.teacher_largest if owners["teacher_model"] else 0
    copied = 2 * max(one.largest, one.layer, head)
    taken = {"rollout": copied, "forward": copied + 2 * head, "backward": one.largest + one.layer + head}
    owners["gathered weights"] = taken.get(phase, 0)
    owners["ref_model"] *= share * 4 * trained / size if trained else share
    owners["teacher_model"] *= share


def gib(size: float, digits: int = 1) -> str:
    return f"{size / GIB:.{digits}f} GiB"
