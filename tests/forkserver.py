"""Scripts as processes of their own, without seconds of imports each: forked from a process that has imported torch.

`run_script` is what the tests call. Run as a script, this file is that process: it reads requests from its standard
input, one a line, and answers each with exit codes. Real processes instead: set STEPCACHE_REAL_PROCESSES=1.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from contextlib import suppress
from pathlib import Path

POSSIBLE = sys.platform == "linux"  # elsewhere a fork of a process with its system libraries loaded is not safe


# ---------------------------------------------------------------------------------------------- in the tests' process


def free_port():
    """A port nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(python, ranks):
    """The command that starts `ranks` processes of what follows it, on a free port."""
    start = [python, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return [*start, "--master_addr=127.0.0.1", f"--master_port={free_port()}"]


def run_script(arguments, cwd, env, ranks=1, timeout=600, real=False):
    """`python *arguments` (a script or -c) as `subprocess.run` would, on as many ranks as torchrun would.

    PYTHONPATH is refused: what the server has imported was found without it.
    """
    assert "PYTHONPATH" not in env
    arguments = [str(a) for a in arguments]
    if real or not POSSIBLE or os.environ.get("STEPCACHE_REAL_PROCESSES") or _server() is None:
        start = [sys.executable] if ranks == 1 else torchrun(sys.executable, ranks)
        return subprocess.run(
            [*start, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        start = {"arguments": arguments, "cwd": os.path.abspath(cwd), "said": list(map(str, said))}
        environments = [dict(env)] if ranks == 1 else [{**env, **place} for place in places(ranks)]
        code = _ask({"processes": [{**start, "env": e} for e in environments], "timeout": timeout})
        stdout, stderr = (path.read_text(encoding="utf-8") for path in said)
    if code is None:
        raise subprocess.TimeoutExpired(arguments, timeout, stdout, stderr)
    return subprocess.CompletedProcess(arguments, code, stdout, stderr)


def on_ranks(function, *arguments, ranks=2):
    """`function(rank, *arguments)` in a process for each rank, as torch.multiprocessing's spawn would run it."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = f"import sys; sys.path[:] = {sys.path!r}; import os, pickle; import {function.__module__} as module; "
    code += f"module.{function.__name__}(int(os.environ['RANK']), *pickle.loads({pickle.dumps(arguments)!r}))"
    with tempfile.TemporaryDirectory() as folder:  # a file, since torchrun takes no -c
        (Path(folder) / "rank.py").write_text(code)
        done = run_script(["rank.py"], folder, env, ranks)
    assert done.returncode == 0, done.stderr


def places(ranks):
    """What torchrun tells its processes."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@functools.cache
def _server():
    """Started at the first request, once in a test process; None where some library it imports starts threads.

    A fork has only one of them, and whoever waits for another waits forever.
    """
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(_stop, server)
    threads = server.stdout.readline().strip()
    assert threads, f"the fork server ended with code {server.wait()}"
    if threads != "1":
        warnings.warn(f"libraries start {threads} threads: scripts are real processes, and slow", stacklevel=3)
    return server if threads == "1" else None


def _stop(server):
    with suppress(OSError):
        server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


def _ask(request):
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the fork server ended with code {server.wait()}"
    return json.loads(answer)


# ---------------------------------------------------------------------------------------------- in the server's process


def import_what_scripts_import():
    import diffusers
    import numpy  # noqa: F401
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    assert diffusers.QwenImagePipeline  # diffusers imports its parts when they are asked for
    print(len(os.listdir("/proc/self/task")), flush=True)
    gc.freeze()  # otherwise every fork's first collection would copy all of it


def serve():
    """Answer requests; in a forked process, return what it is to become."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close our standard input
    for line in requests:
        request = json.loads(line)
        running = []
        for process in request["processes"]:
            pid = os.fork()
            if pid == 0:
                requests.close()
                answers.close()
                return process
            running.append(pid)
        answers.write(json.dumps(wait(running, request["timeout"])) + "\n")
        answers.flush()
    return None


def wait(running, timeout):
    """The first exit code that is not 0, or 0; None after the time is up. As torchrun, one failure ends the others."""
    deadline = time.monotonic() + timeout
    left, code = set(running), 0
    while left:
        for pid in tuple(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                code = code or os.waitstatus_to_exitcode(status)
        late = time.monotonic() > deadline
        if late or code:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return None if late else code
        time.sleep(0.002)
    return code


def become(process):
    """Be `python *arguments` in this fork, to its end.

    Not to the interpreter's end: taking all the imported modules apart again takes over a second.
    """
    import numpy

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in enumerate((os.devnull, *process["said"])):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if stream else os.O_RDONLY)
        os.dup2(opened, stream)
        os.close(opened)
    os.chdir(process["cwd"])
    os.environ.clear()
    os.environ.update(process["env"])
    random.seed()
    numpy.random.seed()
    sys.argv = process["arguments"]
    code = execute()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def execute():
    """What sys.argv names, as the main module; its exit code."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if sys.argv[0] == "-c":
        source, name, sys.path[0] = sys.argv.pop(1), "<string>", ""
    else:
        name = main.__file__ = os.path.abspath(sys.argv[0])
        source, sys.path[0] = Path(name).read_bytes(), os.path.dirname(name)
    try:
        exec(compile(source, name, "exec"), vars(main))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    import_what_scripts_import()
    mine = serve()
    if mine is not None:
        become(mine)
