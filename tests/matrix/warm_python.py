"""A Python whose libraries are imported already: each process asked of it is a fork of one that has trained nothing.

The matrix starts some eight hundred processes, and the imports would cost each of them eight seconds. `warm_python()`
gives a program to use as PYTHON: it takes what python takes (-u, -m, -c, a file), hands its arguments, environment,
folder and standard streams to the server, passes signals on and ends as the fork ends. Not for GPUs: CUDA does not
survive a fork.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from pathlib import Path

LIBRARIES = (
    "accelerate.commands.launch",
    "bitsandbytes",
    "matplotlib.pyplot",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "transformers.models.qwen2.modeling_qwen2",
)
ROOT = Path(__file__).parents[2]
CLIENT = """#!{python} -IS
import json, os, signal, socket, struct, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
def passed_on(number, frame):
    server.sendall(struct.pack("i", number))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, passed_on)
asked = json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [struct.pack("i", len(asked))], [0, 1, 2])
server.sendall(asked)
status = struct.unpack("i", server.recv(4))[0]
if status < 0 and status != -signal.SIGKILL:
    signal.signal(-status, signal.SIG_DFL)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def warm_python(folder):
    """The path of a program that behaves as this Python does, without the time that imports take."""
    address, client = str(Path(folder) / "warm.socket"), Path(folder) / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    command = [sys.executable, "-m", "tests.matrix.warm_python", address, str(client)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"warm\n", "the warm Python did not start"
    try:
        yield str(client)
    finally:
        server.kill()
        server.wait()


def serve(address, client):
    import_everything()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("warm", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            watch(connection, client)
            os._exit(0)
        connection.close()


def watch(connection, client):
    """Runs one asked-for process: passes signals to it, ends it when its client ended, says how it ended."""
    header, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    size, asked = struct.unpack("i", header)[0], b""
    while len(asked) < size:
        asked += connection.recv(size - len(asked))
    child = os.fork()
    if child == 0:
        os._exit(become(*json.loads(asked), descriptors, client))
    for descriptor in descriptors:
        os.close(descriptor)
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([ended, connection], [], [])
        if ended in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(struct.pack("i", status))
            return
        number = connection.recv(4)
        os.kill(child, struct.unpack("i", number)[0] if number else signal.SIGKILL)
        if not number:
            return


def become(argv, env, folder, descriptors, client):
    """Runs in the fork what `python ARGV` would, and returns its exit status."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        buffering = 1 if stream == "stderr" or "-u" in argv[1:2] else -1
        handle = open(("stdin", "stdout", "stderr").index(stream), mode, buffering=buffering, closefd=False)
        setattr(sys, stream, handle)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    sys.executable = client
    words = [word for word in argv[1:] if word != "-u"] if argv[1] == "-u" else argv[1:]
    what, sys.argv = words[0], words
    try:
        if what == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif what == "-m":
            sys.path.insert(0, folder)
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(what).resolve().parent))
            runpy.run_path(what, run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  as the interpreter does
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def import_everything():
    """What the project imports, from the libraries; its own modules are read anew by every process."""
    import cpuinfo

    from utils.runtime import environment

    environment.calm_libraries()
    os.environ["MPLBACKEND"] = "Agg"
    for name in LIBRARIES:
        importlib.import_module(name)
    described = cpuinfo.get_cpu_info()  # two seconds, which DeepSpeed asks for three times a process
    cpuinfo.get_cpu_info = lambda: described
    from rlhf_args.methods import EVERY, load

    for method in EVERY.values():
        load(method.config), load(method.trainer)
    for name in list(sys.modules):
        file = getattr(sys.modules[name], "__file__", None)
        if name != "__main__" and file and Path(file).is_relative_to(ROOT) and "site-packages" not in file:
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != ROOT]


if __name__ == "__main__":
    serve(*sys.argv[1:])
