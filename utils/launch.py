"""Starts a training script in one or more processes, for the run scripts: python -m utils.launch train_rlhf.py FLAGS

The environment sets LAUNCH (a name in accelerate_configs/, or auto: by the visible GPUs), NUM_PROCESSES (of this
node), and for several nodes NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NODE_TIMEOUT (seconds). With --variables
before the script, as in the run scripts, the other variables of the scripts are read too (utils/cli/variables.py).
A single process checks its own flags. Before several processes, one process checks them; if a process fails, its error
is printed last.

Exit status: that of the training script, or 2 if this launch cannot start.
"""

import errno
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from utils.cli import recipes, variables
from utils.runtime.errors import Refused, guess_name, refuse_if
from utils.runtime.paths import DEMO_MODEL, DEMO_STUDENT
from utils.survival import memory

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

CONFIGS = Path("accelerate_configs")


@dataclass
class Plan:
    """One launch. described: the accelerate config as a dict."""

    name: str
    described: dict
    processes: int  # on this node
    nodes: int
    node: int
    address: str
    port: int  # 0: any free port
    timeout: int

    @property
    def world(self) -> int:
        return self.processes * self.nodes

    @property
    def is_plain(self) -> bool:
        """True for one process without an engine."""
        return self.world == 1 and self.described["distributed_type"] == "NO"


def main(job: list[str]) -> int:
    try:
        if job[:1] == ["--variables"]:
            job = variables.fill(job[1:], os.environ)
            make_demo_models(job)
        if recipes.asks_plan(job):  # the planned launch may need GPUs that are not here
            return subprocess.call([sys.executable, *job])
        given = recipes.given_flags(job)
        if "then" in given:  # rejection sampling in rounds starts its own launches
            become([sys.executable, *job], os.environ)
        plan = read_plan(os.environ, count_gpus())
        set_environment(plan)
        if recipes.is_on(given.get("check")) or recipes.asks_help(job):
            return subprocess.call([sys.executable, *job])
        if not plan.is_plain:  # so a refusal is printed once
            if status := subprocess.call([sys.executable, *job, "--check"], stdout=subprocess.DEVNULL):
                return status
            os.environ["LAUNCH_CHECKED"] = "1"
        return launch_until_it_fits(plan, job)
    except Refused as refusal:
        refusal.say()
        return 2
    except KeyboardInterrupt:
        return 130


def make_demo_models(job: list[str]) -> None:
    """Makes the models of utils/demo_model.py that `job` names, unless they exist. Exits with 1 if it cannot."""
    for folder, flags in ((DEMO_MODEL, []), (DEMO_STUDENT, ["--student"])):
        if folder in job and not Path(folder).exists() and not recipes.asks_help(job):
            if subprocess.call([sys.executable, "-m", "utils.demo_model", *flags]):
                sys.exit(1)


def become(command: list[str], env: Mapping[str, str]) -> NoReturn:
    """Replaces this process by `command`, which then receives the signals and sets the exit status."""
    sys.stdout.flush()
    os.execvpe(command[0], command, env)


# ── the requested launch ─────────────────────────────────────────────────────────────────────────────────────────────


def read_plan(env: Mapping[str, str], gpus: int) -> Plan:
    """The Plan of the variables in `env`, on a machine with this many visible GPUs. Raises Refused."""
    import yaml

    problems: list[str] = []

    def number(name: str, default: int, least: int = 1, most: int = 10**6) -> int:
        value = env.get(name) or str(default)
        if value.isdecimal() and least <= int(value) <= most:
            return int(value)
        problems.append(f"{name}={value}: must be a whole number from {least} to {most}")
        return default

    name, nodes = env.get("LAUNCH") or "auto", number("NNODES", 1)
    processes = number("NUM_PROCESSES", 1 if name in ("cpu", "single_gpu") else max(gpus, 1))
    if name == "auto":
        name = "cpu" if not gpus else "single_gpu" if processes * nodes == 1 else "multi_gpu"
    file = CONFIGS / f"{name}.yaml"
    if not file.exists():
        known = ["auto", *sorted(path.stem for path in CONFIGS.glob("*.yaml"))]
        names = ", ".join(known) + guess_name(name, known)
        raise Refused(f"LAUNCH={name}: no such file in {CONFIGS}/. There are {names}")
    plan = Plan(
        name=name,
        described=yaml.safe_load(file.read_text(encoding="utf-8")),
        processes=processes,
        nodes=nodes,
        node=number("NODE_RANK", 0, least=0),
        address=env.get("MASTER_ADDR") or "",
        port=number("MASTER_PORT", 0, least=0, most=65535),
        timeout=number("NODE_TIMEOUT", 600),
    )
    problems += [*check_processes(plan, gpus), *check_nodes(plan), *check_compiler(plan, gpus)]
    refuse_if(problems)
    return plan


def check_processes(plan: Plan, gpus: int) -> Iterator[str]:
    asked = f"LAUNCH={plan.name} with NUM_PROCESSES={plan.processes}"
    if plan.name == "cpu":
        return
    if plan.name in ("single_gpu", "multi_gpu") and not gpus:
        yield f"LAUNCH={plan.name}: no GPU is visible. Type LAUNCH=cpu (with NUM_PROCESSES=2: DDP on the CPU)"
    elif gpus and plan.processes > gpus:
        yield f"{asked}: one process per GPU, and {gpus} are visible. Type NUM_PROCESSES={gpus}"
    elif plan.name == "single_gpu" and plan.world > 1:
        yield f"LAUNCH=single_gpu with {plan.world} processes: it runs one process. Type LAUNCH=multi_gpu"
    elif plan.name == "multi_gpu" and plan.world == 1:
        yield f"{asked}: DDP needs at least two processes. Type LAUNCH=single_gpu"


def check_nodes(plan: Plan) -> Iterator[str]:
    if plan.node >= plan.nodes:
        yield f"NODE_RANK={plan.node} with NNODES={plan.nodes}: ranks count from 0 to {plan.nodes - 1}"
    if plan.nodes > 1 and not (plan.address and plan.port):
        yield f"NNODES={plan.nodes}: the first node's address is missing. Type MASTER_ADDR=HOST MASTER_PORT=29500"
    elif plan.port and plan.node == 0 and is_taken(plan.port):
        free = ", or remove it for any free port" if plan.nodes == 1 else ""
        yield f"MASTER_PORT={plan.port}: in use here. Type another, the same on every node{free}"


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def check_compiler(plan: Plan, gpus: int) -> Iterator[str]:
    """DeepSpeed compiles its CPU code at the first use: the offloaded optimizer, and communication on a CPU."""
    settings = plan.described.get("deepspeed_config")
    if settings is None or gpus and settings.get("offload_optimizer_device", "none") != "cpu":
        return
    missing = [tool for tool in ("c++", "ninja") if not shutil.which(tool, path=search_path())]
    if missing:
        other = plan.name.removesuffix("_offload") if gpus else "cpu"
        yield (
            f"LAUNCH={plan.name}: DeepSpeed compiles its CPU code, and {' and '.join(missing)} is not installed. "
            f"Install it (apt-get install g++; pip install ninja), or type LAUNCH={other}"
        )
    from torch.utils.cpp_extension import get_default_build_root

    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/lock"):
        if time.time() - lock.stat().st_mtime > 600:  # every later run would wait for this lock forever
            yield f"{lock}: left by a run that was killed while DeepSpeed compiled. Type rm {lock}"


def count_gpus() -> int:
    import torch

    return 0 if os.environ.get("LAUNCH") == "cpu" else torch.cuda.device_count()


def search_path() -> str:
    """PATH with the programs of this Python (ninja) in front, also if its environment is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


# ── the start, and how it ended ──────────────────────────────────────────────────────────────────────────────────────


def set_environment(plan: Plan) -> None:
    """Sets the variables for the check and all processes; accelerate later sets those of the engine again."""
    env = {"LAUNCH_NAME": plan.name, "LAUNCH_PROCESSES": str(plan.world), "PATH": search_path()}
    # seconds to save a checkpoint after a signal; a second signal does not wait
    env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1800")
    for name in ("zero_stage", "offload_optimizer_device"):
        if name in plan.described.get("deepspeed_config", {}):
            env[f"ACCELERATE_DEEPSPEED_{name.upper()}"] = str(plan.described["deepspeed_config"][name])
    if "fsdp_config" in plan.described:
        env["FSDP_VERSION"] = str(plan.described["fsdp_config"].get("fsdp_version", 2))
    if not count_gpus():
        # Each step allocates large tensors: malloc keeps their memory, which saves a fifth of the time.
        env |= {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    elif plan.name == "single_gpu":
        env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ.update(env)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.processes)))


def launch_until_it_fits(plan: Plan, job: list[str]) -> int:
    """launch, repeated with smaller batches if the processes ask for it; a single process restarts itself."""
    if plan.world == 1 or plan.nodes > 1:
        return launch(plan, job)
    with tempfile.NamedTemporaryFile() as handover:
        os.environ[memory.HANDOVER] = handover.name
        status = launch(plan, job)
        words = Path(handover.name).read_text(encoding="utf-8").splitlines()
    return launch_until_it_fits(plan, memory.add_words(job, words)) if words else status


def launch(plan: Plan, job: list[str]) -> int:
    """Runs the job under accelerate and returns its exit status; after a failure the last line is its reason."""
    from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for chatter in ("torch.distributed", "accelerate"):  # they log forty lines without the reason
        logging.getLogger(chatter).setLevel(logging.CRITICAL)
    words = ["--config_file", str(CONFIGS / f"{plan.name}.yaml"), "--num_processes", str(plan.world)]
    words += ["--num_machines", str(plan.nodes), "--machine_rank", str(plan.node)]
    words += ["--main_process_port", str(plan.port), "--num_cpu_threads_per_process", os.environ["OMP_NUM_THREADS"]]
    if plan.nodes > 1:
        words += ["--main_process_ip", plan.address, "--same_network", "--rdzv_conf", f"timeout={plan.timeout}"]
    if plan.name == "cpu" and plan.world > 1:
        words.append("--multi_gpu")  # accelerate then creates a process group
    args = launch_command_parser().parse_args([*words, *job])
    if plan.is_plain:
        become(*prepare_simple_launcher_cmd_env(_validate_launch_command(args)[0]))
    try:
        launch_command(args)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: when(item[1]))
        if failure.exitcode != 2:
            print(f"failed: process {rank} of {plan.world}: {say_failure(failure)}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except DistError as error:
        where = f"{plan.address}:{plan.port}, node {plan.node} of {plan.nodes}"
        print(f"failed: the nodes did not find each other within {plan.timeout} s ({where}): {error}", file=sys.stderr)
        return 1
    except SignalException as error:
        kill_children()  # after a second signal; after the first one they were waited for
        return 128 + error.sigval
    return 0


def kill_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()


def when(failure: "ProcessFailure") -> float:
    """Time of a failure in seconds, later for failures that follow from another one. The smallest was the first."""
    if failure.exitcode == -signal.SIGTERM:  # terminated by the launcher because another process failed
        return math.inf
    if isinstance(failure.message, dict):  # from environment.record_failure
        return failure.message["extraInfo"]["exactly"]
    # NCCL and gloo abort a process that lost the connection to another one
    return failure.timestamp + 3600 * (failure.exitcode == -signal.SIGABRT)


def say_failure(failure: "ProcessFailure") -> str:
    """One line: the error that the process recorded, or the signal that ended it."""
    if failure.exitcode == -9:
        return "killed by signal 9: the system does this when memory runs out"
    if failure.exitcode < 0:
        return f"killed by signal {-failure.exitcode}"
    if isinstance(failure.message, dict):  # from environment.record_failure
        return " ".join(failure.message["message"].split())[:500]
    return f"exit status {failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
