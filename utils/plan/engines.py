"""What each engine holds on a GPU: how weights, gradients and optimizer state are shared out."""

from collections import Counter
from dataclasses import dataclass

from utils.runtime.environment import GIB

BUCKET = 5 * 10**8  # DeepSpeed's reduce_bucket_size, in numbers; training.fit_bucket makes it no larger than needed
LIVE = 10**9  # its stage3_max_live_parameters: so much of a model is gathered at once
FETCHED = 5 * 10**7  # its stage3_prefetch_bucket_size
GROUP = 10**9  # its sub_group_size: so many are updated at once
ENGINES = ("single_gpu", "multi_gpu", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2")
SHARES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2")
FROZEN = ("ref_model", "teacher_model", "reward_model")


@dataclass(frozen=True)
class Case:
    """One run to plan: its flags, and how it is launched."""

    words: tuple
    engine: str
    processes: int


@dataclass
class Estimate:
    """`phases`: {phase: {owner: bytes}} of one process at its fullest; `host`: bytes of a node's host memory."""

    phases: dict
    trained: int
    total: int
    host: float = 0

    @property
    def peak(self):
        return max(sum(owners.values()) for owners in self.phases.values())


def shared_out(one, case):
    """The Estimate of a Case from the Rehearsal of one process alone."""
    trained, host, phases = one.trained[0], 0, {}
    for (phase, moment), owners in one.peaks.items():
        owners = Counter(owners)
        if phase == "answers":
            pass  # nothing is shared out yet
        elif case.engine.startswith("zero"):
            deepspeed(owners, one, case, phase, moment)
        elif case.engine == "fsdp2":
            fully_sharded(owners, one, case.processes, phase)
        elif case.processes > 1 and phase in ("forward", "backward", "update"):
            owners["DDP's buckets"] = one.trained[1]
        if sum(owners.values()) > sum(phases.get(phase, Counter()).values()):
            phases[phase] = owners
    if "offload" in case.engine:
        host = 16 * trained
        if case.engine.startswith("zero3"):  # the frozen models go there too
            load = one.peaks["load", ""]
            host += one.weights + sum(load.get(name, 0) for name in FROZEN)
    return Estimate(phases, trained, one.numbers, host)


def deepspeed(owners, one, case, phase, moment):
    """ZeRO: optimizer state and a float32 copy in shares, from stage 2 gradients, from stage 3 weights.

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py.
    """
    stage, share, offload = int(case.engine[4]), 1 / case.processes, "offload" in case.engine
    (trained, size), (_, rest) = one.trained, one.frozen
    width = size / max(trained, 1)  # bytes of a number
    bucket, so_far = width * min(BUCKET, trained), owners["gradients"]
    owners["optimizer"] = 0 if offload else 12 * trained * share
    if stage == 3 or phase == "backward" and so_far:
        owners["DeepSpeed's buckets"] = bucket
    if phase == "backward":  # and what is reduced of it
        owners["DeepSpeed's buckets"] += min(bucket, so_far)
    if stage == 2 and phase in ("forward", "backward"):
        owners["gradients"] = share * (size if one.accumulates else max(0, so_far - bucket))
    elif stage > 1 and phase != "load":
        owners["gradients"] = 0 if offload else size * share
    if phase == "update" and not offload:  # in float32, stage 3 a group of parameters after the other
        owners["gradients"] += 4 * (min(GROUP, trained * share) if stage == 3 else trained * share)
    if stage < 3:
        return
    whole, frozen = size + rest, {name: owners[name] for name in FROZEN}
    owners["weights"] -= whole - (0 if offload else whole * share)
    for name in frozen:
        owners[name] *= 0 if offload else share
    if phase == "rollout" and moment != "judged":  # every token asks all of the policy
        owners["gathered weights"] = whole - one.critic[0]
    elif phase == "rollout":
        owners["gathered weights"] = sum(min(weights, width * LIVE) for weights in (whole, *frozen.values()))
    elif phase in ("forward", "backward"):
        owners["gathered weights"] = gathered(whole, one, width, phase, moment)
    if phase == "forward":
        held = frozen["ref_model"] + frozen["teacher_model"]
        owners["gathered weights"] += min(held, width * FETCHED)


def gathered(whole, one, width, phase, moment):
    """What ZeRO-3 holds of the policy: all that will be asked again soon, and what is fetched next. Where DeepSpeed
    cannot know that, as the policy is asked in another order each time, it gives everything back at once."""
    fetches = phase == "forward" and moment != "head"  # at the head there is nothing left to fetch
    fetched = min(whole, width * FETCHED)
    held = width * LIVE + max(one.largest, fetched) if one.foreseen else one.largest + fetched * fetches
    return min(whole, held) + fetched * fetches  # a piece that comes is there twice


def fully_sharded(owners, one, processes, phase):
    """FSDP2: float32 parameters, their gradients and the optimizer's state in shares.

    The largest piece is gathered and copied. A reference is held in float32, as the parameters are; a teacher's head
    is whole from its answer until the backward pass.
    Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_collectives.py; trainers/gkd_trainer.py, Head.
    """
    (trained, size), (_, rest) = one.trained, one.frozen
    share, whole, so_far = 1 / processes, size + rest, owners["gradients"]
    owners["weights"] += (4 * trained + rest + one.critic[1]) * share - whole  # no two modules share a parameter here
    if phase in ("backward", "update"):
        owners["gradients"] = 4 * share * (trained if one.accumulates else trained * so_far / max(size, 1))
    owners["optimizer"] = 8 * trained * share if owners["optimizer"] else 0
    head = one.teacher_largest if owners["teacher_model"] else 0
    copied = 2 * max(one.largest, one.layer, head)
    taken = {"rollout": copied, "forward": copied + 2 * head, "backward": one.largest + one.layer + head}
    owners["gathered weights"] = taken.get(phase, 0)
    owners["ref_model"] *= share * 4 * trained / size if trained else share
    owners["teacher_model"] *= share


def gib(size, digits=1):
    return f"{size / GIB:.{digits}f} GiB"


def count(numbers):
    return f"{numbers / 1e9:.2f}B" if numbers >= 1e9 else f"{numbers / 1e6:.1f}M"
