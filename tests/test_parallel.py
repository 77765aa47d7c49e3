"""Worker processes: one thread each, quick to start again, and gone with whoever started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bonelib.core.parallel import THREAD_SETTINGS, cores, side_by_side, workers

OWNER = """
import os, time
from bonelib.core.parallel import workers
with workers(1) as pool:
    print(pool.submit(os.getpid).result(), pool.submit(os.getppid).result(), flush=True)
    pool.submit(time.sleep, 60).result()
"""


def test_a_worker_has_one_thread_and_the_owner_keeps_its_own():
    before, threads = {name: os.environ.get(name) for name in THREAD_SETTINGS}, torch.get_num_threads()
    for _ in range(2):
        with workers(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
    assert {name: os.environ.get(name) for name in THREAD_SETTINGS} == before and torch.get_num_threads() == threads


@pytest.mark.parametrize("mine, count, each", [(2, 3, 1), (2, 1, 2), (1, 3, 1)])
def test_small_work_side_by_side_has_the_threads_of_the_process_and_leaves_them(mine, count, each):
    before = torch.get_num_threads()
    torch.set_num_threads(mine)
    try:
        with side_by_side(count) as every:
            found = every(lambda i: (i, torch.get_num_threads()), range(count))
        assert found == [(i, each) for i in range(count)] and torch.get_num_threads() == mine
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills processes with their parent")
def test_workers_and_what_starts_them_die_with_their_owner():
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    found = [int(number) for number in owner.stdout.readline().split()]
    assert len(found) == 2 and all(_alive(number) for number in found)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    until = time.monotonic() + 20
    while any(_alive(number) for number in found) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(_alive(number) for number in found)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_workers_follow_the_cores_that_the_job_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= cores() <= len(allowed)


STAGE = """
import os, time
from bonelib.core.parallel import die_with_run
die_with_run()
print(os.getpid(), os.getppid(), flush=True)
time.sleep(60)
"""
RUN = "import subprocess, sys; subprocess.run(['/bin/sh', '-c', sys.executable + ' -c \"$STAGE\"; true'])"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills processes with their parent")
def test_a_stage_ends_with_its_run_though_a_shell_stands_between():
    how = dict(stdout=subprocess.PIPE, text=True, env=os.environ | {"STAGE": STAGE})
    run = subprocess.Popen([sys.executable, "-c", RUN], **how)
    stage, shell = (int(number) for number in run.stdout.readline().split())
    assert shell != run.pid and _alive(stage)
    run.send_signal(signal.SIGKILL)
    run.wait()
    until = time.monotonic() + 30
    while (_alive(stage) or _alive(shell)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _alive(stage) and not _alive(shell)


def _alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_blocks_go_back_to_the_system_though_a_stage_keeps_freed_memory():
    code = (
        "import numpy as np; from bonelib.core.parallel import map_large_blocks; map_large_blocks()\n"
        "def held(): return next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmRSS'))\n"
        "before = held(); blocks = [np.ones(2**20) for _ in range(8)]; most = held(); del blocks\n"
        "print(most - before > 60_000 and held() - before < 10_000)"
    )
    env = {
        **os.environ,
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
