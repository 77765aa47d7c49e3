"""What more than one file of tests works with."""

import pytest


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The tiny pipeline, run once in a copy of the repository: its folder."""
    from test_pipeline import copy_of_the_repository, repro

    folder = copy_of_the_repository(tmp_path_factory.mktemp("pipeline"))
    done = repro(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder
