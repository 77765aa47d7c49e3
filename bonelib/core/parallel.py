"""Processes that leave nothing behind, and worker processes that do not fight for the cores."""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context, parent_process
from pathlib import Path

THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PRELOADED = ("torch", "scipy.ndimage", "scipy.stats", "nibabel")  # no code of our own, which may change under a kernel


def die_with_parent() -> None:
    """End this process when its parent ends, also by `kill -9` (Linux; elsewhere nothing).

    Where the parent is a shell that runs this command, as under DVC, the process ends with the shell's parent as well.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        name, _, above = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")
        if name.endswith("sh"):
            threading.Thread(target=_end_after, args=(int(above.split()[1]),), daemon=True).start()


def _end_after(process: int) -> None:
    with contextlib.suppress(OSError):
        select.select([os.pidfd_open(process)], [], [])
        os.kill(os.getpid(), signal.SIGKILL)


def peak_memory() -> float:
    """The most memory this process has held so far, in MB (2^20 bytes).

    On Linux read from /proc: what `getrusage` says there is carried over from the process that started this one.
    """
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _context():
    """How workers are started: from a process that has imported once what all of them need, or anew."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _begin() -> None:
    """Of a worker: to have one thread, and to end with whoever owns the pool, which need not be its parent."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner() -> None:
    parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def workers(count: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` worker processes (one a core by default) of one thread each.

    What is still waiting when the block is left by an error is given up.
    """
    before = {name: os.environ.get(name) for name in THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))  # inherited by what workers start from, at the first task
    pool = ProcessPoolExecutor(count or os.cpu_count(), _context(), _begin)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def map_large_blocks() -> None:
    """Have glibc map every block of a megabyte on its own, so that it goes back to the system as soon as it is freed.

    Else glibc learns to keep such blocks between smaller ones, and a kernel grows by hundreds of megabytes.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system has another way
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # -3 = M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: giving back and fetching again what a feature map takes costs more than its use."""
    with contextlib.suppress(OSError, AttributeError):
        for setting, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(setting, value)
