"""What more than one file of tests works with."""

import os

# Of two test processes side by side each has one core, and so have the programs that it starts
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch

torch.manual_seed(0)  # of networks that are built while tests are collected


def pytest_collection_modifyitems(items):
    """All that needs the pipeline runs in one process, which is given it first, as it takes longest."""
    for item in items:
        if "pipeline" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("pipeline"))


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
