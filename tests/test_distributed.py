"""One process and several on the same batches: the same model, and a clear end when a process is lost or drifts."""

import csv
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from bonelib import InputError
from bonelib.core.config import section
from bonelib.networks.config import CriticNet
from bonelib.networks.registry import build_critic
from bonelib.scans.dataset import load_stacks
from bonelib.training import checkpoint, distributed, hagan, loop, losses, run
from bonelib.training.config import Train, training_section

PROGAN = dict(
    generator=dict(kind="progan", widths=[4, 4, 4], latent=8, noise=0.5),
    critic=dict(widths=[4, 4, 4], convs=2, standardise=True),
    schedule=dict(samples=[16, 32], fade=[0, 16], batch=[4, 4], final_decay=0.5),
    n_critic=2,
    rate=4e-3,
    drift=0.1,  # without it the bias of the score gets no gradient but rounding, which Adam makes large
    ema=2,
)
STYLEGAN = PROGAN | dict(
    generator=dict(kind="stylegan", widths=[4, 4], latent=8, style=8, noise=0.5, base_convs=1),
    critic=dict(widths=[4, 4], whole=True),
    schedule=dict(samples=[8, 40], fade=[0, 8], batch=[4, 4], final_decay=0.5),
    haar=True,
    loss="relativistic",
    penalty=1.0,
    adaptive=dict(target=0.1, ramp=50),
    snapshots=dict(number=2),
)
HAGAN = dict(
    generator=dict(kind="hagan", stages=2, widths=[16, 16], fine=[], low=[16], encoder=[16], latent=8, division=2),
    critic=dict(high=[4, 4], head=[4, 4], low=[4]),
    samples=48,
    batch=8,
    ema=2,
)
MODELS = dict(progan=PROGAN, stylegan=STYLEGAN, hagan=HAGAN)
TIMEOUT_S = 60
SHORT_S = 3
running = []

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["bonelib.training.loop"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with params.yaml, stacks and grades."""
    folder = tmp_path_factory.mktemp("place")
    rng, split = np.random.default_rng(0), ["train"] * 6 + ["held-out"] * 2
    (folder / "stacks").mkdir()
    np.save(folder / "stacks/volumes.npy", rng.random((8, 4, 36, 28)).astype(np.float16))
    rows = [f"s{i},p{i},{i},0,{split[i]}\n" for i in range(8)]
    (folder / "stacks/stacks.csv").write_text("scan,patient,volume,start,split\n" + "".join(rows))
    checkpoint.write_json(folder / "stacks/stacks.json", dict(stack_slices=4, data_hash="0"))
    (folder / "grades.csv").write_text("scan,grade\n")
    values = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8"))
    preprocess = dict(shape=[4, 36, 28], stack_slices=4, stacks_per_scan=1)
    profile = values["profiles"]["tiny"] | dict(preprocess=preprocess, superres={}, train=MODELS)
    values |= dict(seed=3, profile="small", cohort=dict(source=str(folder)), profiles={"small": profile})
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return folder


def arguments(place, folder, model, *more):
    paths = [f"--{name}={place / file}" for name, file in INPUTS]
    return ["small", model, *paths, f"--to={folder}/model", f"--state={folder}/state", f"--timeout={TIMEOUT_S}", *more]


INPUTS = (("params", "params.yaml"), ("stacks", "stacks"), ("grades", "grades.csv"))


def train_alone(place, folder, model):
    how = training_section(MODELS[model], "train")
    data = load_stacks(place / "stacks", place / "grades.csv")
    loop.train(how, data, folder / "model", state=folder / "state", seed=3, say=lambda *a, **k: None)
    return folder / "model"


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while running:
        process = running.pop()
        process.kill()
        process.join()


def of_rank(environment, log, task, args):
    """What a child does: all it says goes to the file `log`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(task(int(environment["RANK"]), *args))


def start(folder, size, task, *args):
    """`size` processes with torchrun's environment; each calls task(rank, *args)."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(size))
    started = []
    for rank in range(size):
        environment = where | dict(RANK=str(rank), LOCAL_RANK=str(rank))
        given = (environment, folder / f"log-{rank}", task, args)
        started.append(processes.Process(target=of_rank, args=given, daemon=True))
        started[-1].start()
    running.extend(started)
    return started


def ended(started, seconds=60):
    """The exit codes of processes, all of which must end within `seconds`."""
    until = time.monotonic() + seconds
    for process in started:
        process.join(max(0, until - time.monotonic()))
    return [process.exitcode for process in started]


def log(folder, rank):
    return (folder / f"log-{rank}").read_text()


def call_main(rank, args, before, *more):
    """The command line, with a fault built in by `before(rank, *more)`."""
    before(rank, *more)
    sys.argv = ["loop", *args]
    return loop.main()


def at_generator_update(number, act):
    """Call `act(parameters)` after the gradient steps of the generator's update `number`, counted from 1."""
    step, count = run.update, []

    def counted(adam, *args):
        done = step(adam, *args)
        count.append(1)
        if len(count) == number * (PROGAN["n_critic"] + 1):
            act(adam.param_groups[0]["params"])
        return done

    run.update = counted


def same_model(a, b, within=2e-4):  # what rounding of float32 may grow to; a mistake shows in float64, below
    for name in ("generator", "critic", "growth"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
        assert ours.keys() == theirs.keys() and len(ours) > 2
        for key in ours:
            half = ours[key].dtype == torch.float16
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-3 if half else within)
    ours, theirs = (list(csv.reader((folder / "curves.csv").read_text().splitlines())) for folder in (a, b))
    assert ours[0] == theirs[0] and len(ours) == len(theirs) > 2
    np.testing.assert_allclose(np.array(ours[1:], float), np.array(theirs[1:], float), rtol=0, atol=within)


def watch(rank, folder):
    """Keep the checksums of a rank's weights, and let no other rank than 0 write, lock or say anything."""
    check = distributed.assert_replicas_equal

    def kept(parameters, ranks, update):
        with open(folder / f"sums-{rank}", "a") as file:
            file.write(f"{update} {distributed.checksum(parameters).item()}\n")
        check(parameters, ranks, update)

    distributed.assert_replicas_equal = kept
    if rank:
        for name in ("write_whole", "save_state", "locked"):
            setattr(checkpoint, name, None)
        loop.write_model = loop.print = None
    run.SAVE_EVERY_S = run.SAY_EVERY_S = 0.0


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_make_what_one_makes_and_rank_0_alone_writes(place, tmp_path, model):
    one, two = train_alone(place, tmp_path / "one", model), tmp_path / "two"
    assert ended(start(two, 2, call_main, arguments(place, two, model), watch, two)) == [0, 0]
    same_model(one, two / "model", within=1e-5 if model == "hagan" else 2e-4)
    sums = [(two / f"sums-{rank}").read_text() for rank in range(2)]
    assert len(set(sums[0].splitlines())) == 7 and sums[0] == sums[1]  # at the start and after 6 updates
    assert "48/48 samples" in log(two, 0) and log(two, 1) == ""
    assert not list(two.glob("**/.part-*"))


def in_double(rank):
    """All in float64, in which rounding cannot hide a mistake, nor grow to look like one."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    for module, name in product((loop, hagan), ("build_generator", "build_critic", "build_encoder")):
        if build := getattr(module, name, None):
            setattr(module, name, lambda *args, build=build, **how: build(*args, **how | dict(precision="float64")))


@pytest.mark.parametrize("model", ["progan", "hagan"])
def test_four_processes_of_one_sample_each_make_what_one_makes_to_the_last_digits(place, tmp_path, model):
    for size in (1, 4):
        folder = tmp_path / str(size)
        assert ended(start(folder, size, call_main, arguments(place, folder, model), in_double)) == [0] * size
    same_model(tmp_path / "1/model", tmp_path / "4/model", within=1e-11)


def poke_rank_1(rank):
    def poke(parameters):
        with torch.no_grad():
            weight = parameters[0].view(-1)
            weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))

    if rank == 1:
        at_generator_update(3, poke)


def test_a_rank_that_drifts_by_one_bit_ends_the_training_and_names_the_update(place, tmp_path):
    assert ended(start(tmp_path, 2, call_main, arguments(place, tmp_path, "progan"), poke_rank_1)) == [1, 1]
    for rank in range(2):
        assert "after update 3 the weights of rank 1 are not those of rank 0" in log(tmp_path, rank)
        assert "Traceback" not in log(tmp_path, rank)
    assert not (tmp_path / "model").exists()


def kill_rank_1(rank):
    run.SAVE_EVERY_S = 0.0
    if rank == 1:
        at_generator_update(4, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def test_a_killed_rank_ends_the_job_and_one_process_goes_on_from_its_state(place, tmp_path):
    begun = time.monotonic()
    codes = ended(start(tmp_path, 2, call_main, arguments(place, tmp_path, "progan"), kill_rank_1))
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - begun < 20
    assert "rank 0 of 2: rank 1 does not answer" in log(tmp_path, 0) and "Traceback" not in log(tmp_path, 0)
    assert list((tmp_path / "state").glob("state-0000000024.json"))  # of update 3
    same_model(train_alone(place, tmp_path / "one", "progan"), train_alone(place, tmp_path, "progan"))


def test_two_processes_go_on_from_the_state_of_one(place, tmp_path, killed_at):
    whole = train_alone(place, tmp_path / "whole", "progan")
    killed_at(4)
    with pytest.raises(KeyboardInterrupt):
        train_alone(place, tmp_path, "progan")
    assert ended(start(tmp_path, 2, call_main, arguments(place, tmp_path, "progan"), watch, tmp_path)) == [0, 0]
    assert "continues at 32 of 48 samples" in log(tmp_path, 0)
    same_model(whole, tmp_path / "model")


def hang_rank_1(rank):
    if rank == 1:
        at_generator_update(2, lambda _: time.sleep(100))


def test_a_hung_rank_is_given_up_after_the_timeout_and_named(place, tmp_path):
    begun = time.monotonic()
    started = start(tmp_path, 2, call_main, arguments(place, tmp_path, "progan", f"--timeout={SHORT_S}"), hang_rank_1)
    assert ended(started[:1], 30) == [1] and SHORT_S < time.monotonic() - begun < SHORT_S + 15
    assert ended(started[1:], 0) == [None]  # it hangs until it is killed
    assert "rank 0 of 2: rank 1 does not answer" in log(tmp_path, 0) and "Traceback" not in log(tmp_path, 0)


def ask_rank_1(rank):
    if rank == 1:
        at_generator_update(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def test_a_request_to_stop_that_reaches_one_rank_stops_all_of_them_with_a_state(place, tmp_path):
    assert ended(start(tmp_path, 2, call_main, arguments(place, tmp_path, "progan"), ask_rank_1)) == [2, 2]
    for rank in range(2):
        assert f"rank {rank} of 2: {tmp_path}/state: stopped on request at 24 of 48 samples" in log(tmp_path, rank)
    assert list((tmp_path / "state").glob("state-0000000024.safetensors"))


def spoil_rank_1(rank, folder):
    step = run.update

    def spoiled(adam, loss, clip, ranks):
        with open(folder / f"steps-{rank}", "a+") as file:
            file.seek(0)
            bad = rank == 1 and len(file.read()) in (4, 5)
            done = step(adam, loss * float("nan") if bad else loss, clip, ranks)
            file.write("+" if done else "-")
        return done

    run.update, run.MAX_LEFT_OUT = spoiled, 1.0


def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_on_all(place, tmp_path):
    assert ended(start(tmp_path, 2, call_main, arguments(place, tmp_path, "progan"), spoil_rank_1, tmp_path)) == [0, 0]
    assert [(tmp_path / f"steps-{rank}").read_text() for rank in range(2)] == ["++++--" + 12 * "+"] * 2
    assert all(t.isfinite().all() for t in load_file(tmp_path / "model/generator.safetensors").values())


def spoil_high_rates(rank, size):
    """On the last rank alone, losses from a network's fifth step on are not finite until the rate was halved."""
    step = run.update

    def spoiled(adam, loss, clip, ranks):
        bad = rank == size - 1 and adam.state and adam.param_groups[0]["lr"] > PROGAN["rate"] / 2
        steps = int(adam.state[adam.param_groups[0]["params"][0]]["step"]) if bad else 0
        return step(adam, loss * float("nan") if steps >= 4 else loss, clip, ranks)

    run.update, run.MAX_LEFT_OUT, run.MAX_IN_A_ROW, loop.ROLLBACK_POINTS = spoiled, 1.0, 1, 3


def test_all_ranks_go_back_together_when_one_diverges(place, tmp_path):
    for size in (1, 2):
        folder = tmp_path / str(size)
        args = arguments(place, folder, "progan")
        assert ended(start(folder, size, call_main, args, spoil_high_rates, size)) == [0] * size
        assert "diverged at 40 samples; goes back to 32, with 1/2 of the rate" in log(folder, 0)
    assert log(tmp_path / "2", 1) == ""
    same_model(tmp_path / "1/model", tmp_path / "2/model")


def critic_and_volumes():
    torch.manual_seed(0)
    critic = build_critic(CriticNet(widths=(4, 4, 4)))
    return critic, torch.rand(4, 1, 4, 36, 28), torch.rand(4, 1, 4, 36, 28)


def send_back(critic, real, fake, penalty=10.0):
    on_real, on_fake = critic(torch.cat([real, fake])).chunk(2)
    slope = losses.slopes(critic.input_gradient((real + fake) / 2))
    losses.critic_loss(on_real, on_fake, slope, penalty=penalty, drift=1e-3).backward()


def gradient(critic):
    return torch.cat([p.grad.flatten() for p in critic.parameters() if p.grad is not None])


def penalised(rank, folder):
    with distributed.process_group(TIMEOUT_S) as ranks:
        critic, real, fake = critic_and_volumes()
        send_back(critic, real[ranks.rank :: ranks.size], fake[ranks.rank :: ranks.size])
        local = gradient(critic).clone()
        distributed.average_gradients(critic.parameters(), ranks)
        checkpoint.save_tensors(folder / f"gradient-{rank}", dict(local=local, mean=gradient(critic)))


def test_the_penalty_has_the_gradient_of_the_whole_batch(tmp_path):
    assert ended(start(tmp_path, 2, penalised, tmp_path)) == [0, 0]
    critic, *volumes = critic_and_volumes()
    send_back(critic, *volumes)
    whole, found = gradient(critic).clone(), [load_file(tmp_path / f"gradient-{rank}") for rank in range(2)]
    assert torch.equal(found[0]["mean"], found[1]["mean"])
    assert (found[0]["mean"] - whole).norm() < 1e-5 * whole.norm() < 0.01 * (found[0]["local"] - whole).norm()
    critic.zero_grad()
    send_back(critic, *volumes, penalty=0.0)
    assert (gradient(critic) - whole).norm() > 0.1 * whole.norm()  # the penalty is a good part of it


def test_a_batch_that_cannot_be_divided_is_refused_by_its_key(place, tmp_path):
    three = distributed.Ranks(0, 3, torch.device("cpu"))
    with pytest.raises(InputError, match=r"schedule.batch: the 4 samples of stage 1 .* 3 processes"):
        data = load_stacks(place / "stacks")
        loop.train(section(Train, PROGAN, "train"), data, tmp_path, state=tmp_path / "state", seed=3, ranks=three)
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_find_each_other_say_so(monkeypatch):
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2).items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(InputError, match="did not find each other.*MASTER_ADDR"), distributed.process_group(1):
        pass
    monkeypatch.delenv("RANK")
    with pytest.raises(InputError, match="did not find each other.*RANK"), distributed.process_group(1):
        pass


def test_the_command_line_names_what_it_does_not_know(place, tmp_path, monkeypatch, capsys):
    good = arguments(place, tmp_path, "progan")
    for wrong, says in [
        (["huge", *good[1:]], "no profile 'huge'; accepted are small"),
        (["small", "gan", *good[2:]], "no model 'gan'; accepted are hagan, progan, stylegan"),
        ([*good, "--stacks=nowhere"], "nowhere/volumes.npy: no such file"),
    ]:
        monkeypatch.setattr(sys, "argv", ["loop", *wrong])
        assert loop.main() == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_torchrun_and_a_plain_process_make_the_same_model(place, tmp_path, monkeypatch):
    root = Path(__file__).parent.parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    args = arguments(place, tmp_path / "two", "stylegan", "--seed=7")
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(root))
    subprocess.run([*launch, "bonelib.training.loop", *args], check=True, cwd=tmp_path, env=environment, timeout=120)
    monkeypatch.setattr(sys, "argv", ["loop", *arguments(place, tmp_path / "one", "stylegan", "--seed=7")])
    assert loop.main() == 0
    same_model(tmp_path / "one/model", tmp_path / "two/model")
