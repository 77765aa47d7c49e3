"""What more than one file of tests works with."""

import os

# Of two test processes side by side each has one core, and so have the programs that it starts
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch

torch.manual_seed(0)  # of networks that are built while tests are collected


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The files that need the pipeline run in one process, which is given them first, as they take longest."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    together = ("tests/test_pipeline", "tests/test_browser.py", "tests/test_paper.py")
    scheduler._split_scope = lambda test: "pipeline" if test.startswith(together) else test
    return scheduler


@pytest.fixture(autouse=True)
def the_same_weights_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The tiny pipeline, run once in a copy of the repository: its folder."""
    from test_pipeline import copy_of_the_repository, repro

    folder = copy_of_the_repository(tmp_path_factory.mktemp("pipeline"))
    done = repro(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder
