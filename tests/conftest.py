"""What more than one file of tests works with."""

import pytest
import torch

torch.manual_seed(0)  # of networks that are built while tests are collected


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
