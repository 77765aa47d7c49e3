"""What more than one file of tests works with."""

import os
import re

# Of two test processes side by side each has one core, and so have the programs that it starts
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from pathlib import Path

import pytest
import torch

PIPELINE = ("test_paper.py", "test_pipeline_browser.py", "test_pipeline.py")
LONG = ("test_pipeline_own.py", "test_browser.py", "test_distributed.py", "test_phantom.py", "test_morphometry.py")

torch.manual_seed(0)  # of networks that are built while tests are collected


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The files that need the pipeline run in one process, and every other file in one, the longest first."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = lambda test: "pipeline" if Path(file := test.split("::")[0]).name in PIPELINE else file
    return scheduler


def pytest_collection_modifyitems(items):
    """The longest first: what begins last should be short, so that both processes end together."""
    order = {name: place for place, name in enumerate((*PIPELINE, *LONG))}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def the_same_weights_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The tiny pipeline, run once in a copy of the repository: its folder. Its model is the StyleGAN, as all notebooks
    take one; the ProGAN goes through those that scans of one's own do."""
    from test_pipeline import copy_of_the_repository, repro

    folder = copy_of_the_repository(tmp_path_factory.mktemp("pipeline"))
    params = folder / "params.yaml"
    params.write_text(re.sub(r"^models: .*", "models: [stylegan]", params.read_text(), flags=re.M))
    done = repro(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(step): a training in this process saves after every step, and is killed after that one."""
    from bonelib.training import checkpoint, run

    save = checkpoint.save_state

    def kill(step):
        def dying(folder, tensors, meta):
            save(folder, tensors, meta)
            if meta["steps"] == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
        monkeypatch.setattr(checkpoint, "save_state", dying)

    return kill


@pytest.fixture
def page(tmp_path):
    """A page of a new Chromium, which may ask for nothing elsewhere and say no errors."""
    from browser import PICTURES, browser

    PICTURES.mkdir(parents=True, exist_ok=True)
    with browser(tmp_path) as page:
        yield page
        assert not page.foreign() and not page.errors
