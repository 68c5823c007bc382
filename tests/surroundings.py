"""What the tests rely on from the machine, set rather than hoped for; imported before anything that reads it.

Processes the tests start inherit all of it: signals, threads, language, home directory.
"""

from __future__ import annotations

import atexit
import locale
import os
import secrets
import shutil
import signal
import site
import tempfile
from contextlib import suppress
from pathlib import Path

HOME = "STEPCACHE_TESTS_HOME"
# One thread a process: as fast on models this small, the same sums everywhere, and processes can be forked.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Ray gives its workers the lowest priority: beside another busy process they would hardly run.
RAY = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
# Places of caches and settings outside the home directory, ranks and clusters we are no part of, languages, colours.
FOREIGN = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "TORCH_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS"),
    *("LANGUAGE", "PYTHONIOENCODING", "FORCE_COLOR", "CLICOLOR_FORCE", "MPLBACKEND"),
)


def heed_signals():
    """A shell that starts us in the background has Ctrl-C ignored, and so would every process we start."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGCHLD, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


def set_environment():
    for name in [n for n in os.environ if n in FOREIGN or n.startswith(("LC_", "TQDM_", "SLURM_"))]:
        del os.environ[name]
    os.environ.update(dict.fromkeys(THREADS, "1"))
    os.environ.update(LANG="C.UTF-8", LC_ALL="C.UTF-8", PYTHONUTF8="1", COLUMNS="100")
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", **RAY)
    with suppress(locale.Error):  # a system without it has UTF-8 anyway, or PYTHONUTF8 does it
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def move_home():
    """An empty home directory, one for all processes of a run: pytest's workers find it in the environment."""
    if HOME not in os.environ:
        os.environ[HOME] = tempfile.mkdtemp(prefix="stepcache-tests-home-")
        atexit.register(shutil.rmtree, os.environ[HOME], ignore_errors=True)
        ray = Path(os.environ[HOME]) / ".ray"
        ray.mkdir()
        (ray / "auth_token").write_text(secrets.token_hex(32))  # two clusters started at once would each make one
    os.environ["PYTHONUSERBASE"] = site.getuserbase()  # packages installed there are still found
    os.environ["HOME"] = os.environ[HOME]


heed_signals()
set_environment()
move_home()
