"""Starts a training script on one or many processes, as the run scripts do: python -m utils.launch train_rlhf.py FLAGS

Read from the environment: LAUNCH (a name in accelerate_configs/, or auto: by the GPUs that are there), NUM_PROCESSES
(on this node), and for several nodes NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NODE_TIMEOUT (seconds). With
--variables before the script, as the run scripts type it, their other variables too (utils/cli/variables.py).
One process checks its own flags. Several are preceded by a check in one process; when one of them fails, its error
comes last.

Exit status: that of the training script; 2 also where this launch cannot start.
"""

import difflib
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
from dataclasses import dataclass
from pathlib import Path

from utils.cli import recipes, variables
from utils.runtime.errors import Refused
from utils.runtime.paths import DEMO_MODEL, DEMO_STUDENT
from utils.survival import memory

CONFIGS = Path("accelerate_configs")


@dataclass
class Plan:
    """One launch. `described`: the accelerate config, as a dict."""

    name: str
    described: dict
    processes: int  # on this node
    nodes: int
    node: int
    address: str
    port: int  # 0: any that is free
    timeout: int

    @property
    def world(self):
        return self.processes * self.nodes

    @property
    def is_plain(self):
        """True for one process without an engine."""
        return self.world == 1 and self.described["distributed_type"] == "NO"


def main(job):
    try:
        if job[:1] == ["--variables"]:
            job = variables.fill(job[1:], os.environ)
            make_demo_models(job)
        if recipes.asks_plan(job):  # of a launch that this machine need not be able to start
            return subprocess.call([sys.executable, *job])
        given = recipes.given_flags(job)
        if "then" in given:  # rejection sampling in rounds starts its own launches
            become([sys.executable, *job], os.environ)
        plan = read_plan(os.environ, count_gpus())
        set_environment(plan)
        if recipes.is_on(given.get("check")) or recipes.asks_help(job):
            return subprocess.call([sys.executable, *job])
        if not plan.is_plain:  # a refusal is one message and status 2, however many processes follow
            if status := subprocess.call([sys.executable, *job, "--check"], stdout=subprocess.DEVNULL):
                return status
            os.environ["LAUNCH_CHECKED"] = "1"
        return launch_until_it_fits(plan, job)
    except Refused as refusal:
        refusal.say()
        return 2
    except KeyboardInterrupt:
        return 130


def make_demo_models(job):
    """Makes the models of utils/demo_model.py that `job` names and that are not there. Exits with 1 if it cannot."""
    for folder, flags in ((DEMO_MODEL, []), (DEMO_STUDENT, ["--student"])):
        if folder in job and not Path(folder).exists() and not recipes.asks_help(job):
            if subprocess.call([sys.executable, "-m", "utils.demo_model", *flags]):
                sys.exit(1)


def become(command, env):
    """This process becomes `command`, so that a signal or an exit status is the command's own."""
    sys.stdout.flush()
    os.execvpe(command[0], command, env)


# ── what was asked for ───────────────────────────────────────────────────────────────────────────────────────────────


def read_plan(env, gpus):
    """The Plan that `env` asks for on a machine with so many visible GPUs. Raises Refused."""
    import yaml

    problems = []

    def number(name, default, least=1, most=10**6):
        value = env.get(name) or str(default)
        if value.isdecimal() and least <= int(value) <= most:
            return int(value)
        problems.append(f"{name}={value}: a whole number from {least} to {most}")
        return default

    name, nodes = env.get("LAUNCH") or "auto", number("NNODES", 1)
    processes = number("NUM_PROCESSES", 1 if name in ("cpu", "single_gpu") else max(gpus, 1))
    if name == "auto":
        name = "cpu" if not gpus else "single_gpu" if processes * nodes == 1 else "multi_gpu"
    file = CONFIGS / f"{name}.yaml"
    if not file.exists():
        known = ["auto", *sorted(path.stem for path in CONFIGS.glob("*.yaml"))]
        near = difflib.get_close_matches(name, known, 1)
        guess = f". Did you mean {near[0]}?" if near else ""
        raise Refused([f"LAUNCH={name}: no such file in {CONFIGS}/. There are {', '.join(known)}{guess}"])
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
    if problems:
        raise Refused(problems)
    return plan


def check_processes(plan, gpus):
    asked = f"LAUNCH={plan.name} with NUM_PROCESSES={plan.processes}"
    if plan.name == "cpu":
        return
    if plan.name in ("single_gpu", "multi_gpu") and not gpus:
        yield f"LAUNCH={plan.name}: no GPU is visible. Type LAUNCH=cpu; NUM_PROCESSES=2 with it is DDP on the CPU"
    elif gpus and plan.processes > gpus:
        yield f"{asked}: one process a GPU, and {gpus} can be seen. Type NUM_PROCESSES={gpus}"
    elif plan.name == "single_gpu" and plan.world > 1:
        yield f"LAUNCH=single_gpu with {plan.world} processes: one GPU is one process. Type LAUNCH=multi_gpu"
    elif plan.name == "multi_gpu" and plan.world == 1:
        yield f"{asked}: DDP needs two processes or more. Type LAUNCH=single_gpu"


def check_nodes(plan):
    if plan.node >= plan.nodes:
        yield f"NODE_RANK={plan.node} with NNODES={plan.nodes}: ranks count from 0 to {plan.nodes - 1}"
    if plan.nodes > 1 and not (plan.address and plan.port):
        yield f"NNODES={plan.nodes}: the first node's address is missing. Type MASTER_ADDR=HOST MASTER_PORT=29500"
    elif plan.port and plan.node == 0 and is_taken(plan.port):
        free = ", or none: a free one is taken" if plan.nodes == 1 else ""
        yield f"MASTER_PORT={plan.port}: in use here. Name another, the same on every node{free}"


def is_taken(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def check_compiler(plan, gpus):
    """DeepSpeed compiles what it runs on the CPU when it is first used: the offloaded optimizer, its communication."""
    settings = plan.described.get("deepspeed_config")
    if settings is None or gpus and settings.get("offload_optimizer_device", "none") != "cpu":
        return
    missing = [tool for tool in ("c++", "ninja") if not shutil.which(tool, path=search_path())]
    if missing:
        yield (
            f"LAUNCH={plan.name}: DeepSpeed compiles what runs on the CPU, and {' and '.join(missing)} is not here. "
            f"Install it (apt-get install g++; pip install ninja), or type "
            f"LAUNCH={plan.name.removesuffix('_offload') if gpus else 'cpu'}"
        )
    from torch.utils.cpp_extension import get_default_build_root

    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/lock"):
        if time.time() - lock.stat().st_mtime > 600:  # whoever comes next would wait for it for ever
            yield f"{lock}: left by a run that was killed while DeepSpeed compiled. Type rm {lock}"


def count_gpus():
    import torch

    return 0 if os.environ.get("LAUNCH") == "cpu" else torch.cuda.device_count()


def search_path():
    """PATH with this Python's own programs (ninja) in front, also where its environment is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


# ── start, and say how it ended ──────────────────────────────────────────────────────────────────────────────────────


def set_environment(plan):
    """What the check and every process inherit; the engine's variables are those that accelerate sets again later."""
    env = {"LAUNCH_NAME": plan.name, "LAUNCH_PROCESSES": str(plan.world), "PATH": search_path()}
    # seconds that a large checkpoint has once a signal came; a second signal does not wait
    env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1800")
    for name in ("zero_stage", "offload_optimizer_device"):
        if name in plan.described.get("deepspeed_config", {}):
            env[f"ACCELERATE_DEEPSPEED_{name.upper()}"] = str(plan.described["deepspeed_config"][name])
    if "fsdp_config" in plan.described:
        env["FSDP_VERSION"] = str(plan.described["fsdp_config"].get("fsdp_version", 2))
    if not count_gpus():
        # Large tensors come and go at every step: keep their memory instead of returning it (a fifth of the time).
        env |= {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    elif plan.name == "single_gpu":
        env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ.update(env)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.processes)))


def launch_until_it_fits(plan, job):
    """launch, and again in smaller passes as often as the processes ask for it; one process does that by itself."""
    if plan.world == 1 or plan.nodes > 1:
        return launch(plan, job)
    with tempfile.NamedTemporaryFile() as handover:
        os.environ[memory.HANDOVER] = handover.name
        status = launch(plan, job)
        words = Path(handover.name).read_text(encoding="utf-8").splitlines()
    return launch_until_it_fits(plan, memory.add_words(job, words)) if words else status


def launch(plan, job):
    """Runs the job under accelerate and returns its exit status; after a failure the last line names its reason."""
    from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for chatter in ("torch.distributed", "accelerate"):  # forty lines, none of which says why
        logging.getLogger(chatter).setLevel(logging.CRITICAL)
    words = ["--config_file", str(CONFIGS / f"{plan.name}.yaml"), "--num_processes", str(plan.world)]
    words += ["--num_machines", str(plan.nodes), "--machine_rank", str(plan.node)]
    words += ["--main_process_port", str(plan.port), "--num_cpu_threads_per_process", os.environ["OMP_NUM_THREADS"]]
    if plan.nodes > 1:
        words += ["--main_process_ip", plan.address, "--same_network", "--rdzv_conf", f"timeout={plan.timeout}"]
    if plan.name == "cpu" and plan.world > 1:
        words.append("--multi_gpu")  # accelerate's word for a process group of its own making
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
        kill_children()  # of a second signal: after the first one they were waited for
        return 128 + error.sigval
    return 0


def kill_children():
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()


def when(failure):
    """When a process failed, in seconds, as far as it tells who failed first: what follows from another comes last."""
    if failure.exitcode == -signal.SIGTERM:  # ended by the launcher, because of another
        return math.inf
    if isinstance(failure.message, dict):  # what environment.record_failure left
        return failure.message["extraInfo"]["exactly"]
    # an abort is how NCCL and gloo end a process that lost touch with another; the rest was killed, or left
    return failure.timestamp + 3600 * (failure.exitcode == -signal.SIGABRT)


def say_failure(failure):
    """What a failed process left in its error file, on one line; or the signal that ended it."""
    if failure.exitcode == -9:
        return "killed by signal 9, which is what the system does when memory runs out"
    if failure.exitcode < 0:
        return f"killed by signal {-failure.exitcode}"
    if isinstance(failure.message, dict):  # what environment.record_failure left
        return " ".join(failure.message["message"].split())[:500]
    return f"exit status {failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
