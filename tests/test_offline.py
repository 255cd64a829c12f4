"""Checkpoints analysed afterwards: the same numbers as live, whoever computes them, and once."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from torch import nn

import nettrace as nt
from nettrace import measures
from nettrace.checkpoints import networks
from nettrace.offline import pools, witness, worker
from nettrace.store import parts
from nettrace.waiting import reads_window

pytestmark = [pytest.mark.filterwarnings(text) for text in training.HARMLESS]

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
Y = torch.arange(6) % 3
PROBE = nt.Probe(X, Y)
SEVERAL = {"a": PROBE, "b": nt.Probe(X[:4] + 1, Y[:4])}
COMPARING = ["ntk/distance_first", "ntk/velocity", "weights/displacement", "loss"]
#: All but those of optimizers, which a plain loop does not save, and of windows, which none has.
ALL = [
    m.name
    for m in measures.available()
    if m.is_own and "precond" not in m.name and not reads_window(m)
]
#: What is not the same each time it is measured, or is of one place.
OWN = {"nettrace_seconds", "wall_time", "checkpoint_bytes", "checkpoint_modified"}
OWN |= {"measure", "nettrace_seconds_per_measure", "nettrace_seconds_per_measure_of_pairs"}
#: What a trace of checkpoints has beside, by which the network is known.
WITNESSES = ["witness_of_outputs", "witness_of_losses"]


def build():
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3)), nn.Linear(6, 3)
    )


def smooth():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def trained(folder, steps, make=smooth, tracer=None):
    """Trains a network, and saves and measures it at some steps."""
    torch.manual_seed(1)
    model, generator = make(), torch.Generator().manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    folder.mkdir(parents=True)
    for step in range(max(steps) + 1):
        if step in steps:
            torch.save({"state_dict": model.state_dict(), "epoch": step // 2}, at(folder, step))
            if tracer is not None:
                tracer(model, step)
        model.train()
        x = torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()


def at(folder, step):
    return folder / f"step={step}.pt"


@pytest.fixture
def saved(tmp_path):
    """A folder of five checkpoints."""
    trained(tmp_path / "checkpoints", [0, 1, 2, 5, 9])
    return tmp_path / "checkpoints"


def content(trace, without=()):
    """All of a trace, to the bit, without the attributes that change along steps."""
    found = {}
    for name in [*trace.data_vars, *trace.coords]:
        if name in OWN or trace[name].attrs.get("name") in without:
            continue
        values = trace[name].values
        about = dict(trace[name].attrs)
        for changing in ("certificate", "reference_step"):
            about.pop(changing, None)
        found[name] = values.dtype.str, values.shape, values.tobytes(), repr(about)
    return found


def assert_same(one, other, without=()):
    one, other = content(one, without), content(other, without)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def analyze(checkpoints, names=COMPARING, **options):
    probe = options.pop("probe", PROBE)
    return nt.analyze(checkpoints, probe, names, **{"model": smooth, "progress": False, **options})


# The same as live ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "probe"),
    [
        pytest.param(build, PROBE, id="build"),
        pytest.param(smooth, SEVERAL, id="smooth, several", marks=pytest.mark.slow),
        pytest.param(smooth, PROBE, id="smooth", marks=pytest.mark.slow),
        pytest.param(build, SEVERAL, id="build, several", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::nettrace.MissingMeasureWarning")
def test_what_is_found_is_what_a_tracer_found_while_training(tmp_path, make, probe):
    names = ALL if isinstance(probe, dict) else [n for n in ALL if "cross" not in n]
    tracer = nt.Tracer(probe, names, to=tmp_path / "live", seed=3)
    trained(tmp_path / "checkpoints", [0, 1, 2, 5, 9], make, tracer)
    found = analyze(tmp_path / "checkpoints", names, probe=probe, model=make(), seed=3, threads=1)
    assert found.done == (0, 1, 2, 5, 9)
    live, offline = nt.open(tmp_path / "live"), found.trace
    assert len(live.data_vars) > 90
    assert live.ntk_velocity.notnull().sum() > 0
    assert_same(live, offline.drop_vars(["epoch", *WITNESSES]))
    assert offline.epoch.values.tolist() == [0, 0, 1, 2, 4]
    assert offline.checkpoint_bytes[0] == at(tmp_path / "checkpoints", 0).stat().st_size


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_what_is_found_is_what_a_callback_found_in_lightning(tmp_path, optimizer):
    from pytorch_lightning.callbacks import ModelCheckpoint

    from nettrace.callbacks import Trace

    names = [*(n for n in ALL if "cross" not in n and "hessian" not in n)]
    names += ["ntk/preconditioned_trace", "ntk/preconditioned_spectrum"]
    probe = nt.Probe(X, Y, likelihood="categorical")
    keep = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1)
    live = Trace(names, every=range(1, 5), probe=probe, to=tmp_path / "live", on_error="raise")
    make = training.delicate()
    training.fit([live, keep], make(optimizer), enable_checkpointing=True)
    found = analyze(tmp_path / "checkpoints", names, probe=probe, model=make(optimizer), threads=1)
    assert (found.done, found.failed, found.missing) == ((1, 2, 3, 4), {}, {})
    assert found.folder.resolve() == tmp_path / "analysis"
    one = nt.open(tmp_path / "live")
    assert "ntk_preconditioned_trace" in one
    of_trainer = ["epoch", "batches", "samples"]
    assert_same(one.drop_vars(of_trainer), found.trace.drop_vars(["epoch", *WITNESSES]))


def test_without_its_states_what_needs_an_optimizer_is_missing_with_the_reason(saved):
    names = ["ntk/preconditioned_trace", "ntk/trace"]
    assert "got Sequential" in analyze(saved, names).missing["ntk/preconditioned_trace"]
    module = training.network()()
    torch.save(module.state_dict(), saved / "step=20.pt")
    found = analyze(saved / "step=20.pt", names, model=module, to=saved / "other")
    assert found.done == (20,)
    assert "has no optimizer_states" in found.missing["ntk/preconditioned_trace"]
    assert found.trace.ntk_trace.notnull().all()


def test_the_look_before_a_broken_checkpoint_serves_as_the_previous(tmp_path):
    tracer = nt.Tracer(PROBE, COMPARING, every=[0, 2, 9], to=tmp_path / "live")
    trained(tmp_path / "checkpoints", [0, 1, 2, 5, 9], tracer=tracer)
    for step in (1, 5):  # fit no network of this kind
        torch.save(nn.Linear(3, 3).state_dict(), at(tmp_path / "checkpoints", step))
    found = analyze(tmp_path / "checkpoints")
    assert found.done == (0, 2, 9)
    live = nt.open(tmp_path / "live")
    offline = found.trace.drop_vars(["epoch", *WITNESSES])
    assert_same(live, offline, without={"nettrace/spot_check"})
    assert found.trace.ntk_velocity.attrs == live.ntk_velocity.attrs


# The same whoever computes it ---------------------------------------------------------------------

MODULE = """
import os, signal, time
from pathlib import Path
import torch
from torch import nn
import nettrace as nt
from nettrace.offline import pools

HERE = Path(__file__).parent

class Net(nn.Sequential):
    def forward(self, x):
        if float(self[2].bias.detach()[0]) == 666:
            time.sleep(3)  # Dask starts no worker in place of one that dies while it begins
            os.kill(os.getpid(), signal.SIGKILL)
        if (HERE / "slow").exists():
            time.sleep(0.3)
        return super().forward(x)

def build():
    while (HERE / "wait").exists():
        time.sleep(0.05)
    if (HERE / "kill").exists():
        (HERE / "kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return Net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

def begin(*arguments):
    if (HERE / "early").exists():
        (HERE / "early").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    pools._begin(*arguments)

def probe():
    return torch.randn(6, 4), torch.arange(6) % 3

@nt.measure("own/norm", needs=["previous.outputs"])
def norm(outputs):
    "Of the outputs before."
    return outputs.norm()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that workers can import, by its path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(measures.registry, "_MEASURES", dict(measures.registry._MEASURES))
    path = tmp_path / "own_module.py"
    path.write_text(MODULE)
    yield str(path)
    sys.modules.pop("own_module", None)


def test_two_processes_find_what_one_does_and_survive_workers_that_are_killed(
    tmp_path, module, saved, monkeypatch
):
    options = {
        "names": [*COMPARING, "own/norm"],
        "probe": f"{module}:probe",
        "model": f"{module}:build",
        "modules": [module],
        "threads": 1,
    }
    one = analyze(saved, **options, to=tmp_path / "one")
    monkeypatch.setattr(pools, "_begin", sys.modules["own_module"].begin)
    for when in ("early", "kill"):  # before it begins, and while it measures
        (tmp_path / when).touch()
    two = analyze(saved, **options, to=tmp_path / "two", jobs=2)
    assert not {"early", "kill"} & set(os.listdir(tmp_path))
    assert (two.done, two.failed) == (one.done, {})
    assert_same(one.trace, two.trace)
    assert one.trace.own_norm.notnull().sum() == 4


@pytest.mark.parametrize("deadly", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_checkpoint_that_kills_workers_is_reported_and_the_others_go_on(
    tmp_path, module, saved, deadly
):
    kill_at(saved, deadly)
    options = {"model": f"{module}:build", "threads": 1}
    found = analyze(saved, **options, jobs=2)
    assert found.done == tuple(step for step in (0, 1, 2, 5, 9) if step != deadly)
    assert set(found.failed) == {at(saved, deadly)}
    assert "2 workers died during this checkpoint" in found.failed[at(saved, deadly)]
    assert "jobs=1" in found.failed[at(saved, deadly)]
    at(saved, deadly).write_bytes(b"")  # the others find what they do where it is broken
    other = analyze(saved, **options, to=tmp_path / "other")
    assert_same(other.trace, found.trace, without={"nettrace/spot_check"})


def kill_at(folder, step):
    """Lets workers die that see a checkpoint."""
    state = torch.load(at(folder, step))
    state["state_dict"]["2.bias"][0] = 666
    torch.save(state, at(folder, step))


@pytest.mark.parametrize("threads", [True, False], ids=["threads", "processes"])
def test_an_executor_finds_the_same(saved, tmp_path, threads):
    one = analyze(saved, model=smooth(), to=tmp_path / "one", threads=1)
    pool = ThreadPoolExecutor(3) if threads else ProcessPoolExecutor(1, get_context("spawn"))
    model = (lambda: smooth()) if threads else smooth()
    with pool as executor:
        other = analyze(saved, model=model, to=tmp_path / "two", executor=executor, threads=1)
    assert other.done == one.done
    assert_same(one.trace, other.trace)


def test_a_dask_cluster_finds_the_same(saved, tmp_path):
    distributed = pytest.importorskip("distributed")
    one = analyze(saved, model=smooth(), to=tmp_path / "one", threads=1)
    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(n_workers=2, resources={"MEMORY": 2**32}, **options) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        two = analyze(saved, model=smooth(), to=tmp_path / "two", dask=client, threads=1)
        assert_same(one.trace, two.trace)
        with pytest.raises(ValueError, match=r"no worker has more than 4.00 GiB"):
            analyze(saved, model=smooth(), to=tmp_path / "no", dask=client, memory_budget="5GiB")


@pytest.mark.slow
def test_a_dask_cluster_of_processes_survives_a_worker_that_is_killed(saved, tmp_path, module):
    dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
    options = {"model": f"{module}:build", "threads": 1}
    one = analyze(saved, **options, to=tmp_path / "one")
    (tmp_path / "kill").touch()
    few = dask.config.set({"distributed.scheduler.allowed-failures": 1})
    with (
        few,
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit="3GiB"
        ) as cluster,
    ):
        address = cluster.scheduler_address
        two = analyze(saved, **options, to=tmp_path / "two", dask=address)
        with pytest.raises(
            ValueError, match=r"a worker has 3.00 GiB: pass a smaller memory_budget"
        ):
            analyze(saved, **options, to=tmp_path / "no", dask=address, memory_budget="4GiB")
        kill_at(saved, 2)
        three = analyze(saved, **options, to=tmp_path / "three", dask=address)
    assert not (tmp_path / "kill").exists()
    assert (two.done, two.failed) == (one.done, {})
    assert_same(one.trace, two.trace)
    assert three.done == (0, 1, 9)  # the one after it compares with it
    assert "lack of memory" in three.failed[at(saved, 2)]


def test_a_dask_cluster_without_workers_is_not_waited_for_without_end(
    saved, tmp_path, module, monkeypatch
):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(pools, "_PATIENCE", 1)
    (tmp_path / "wait").touch()
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        threading.Timer(2, cluster.scale, [0]).start()
        try:
            with pytest.raises(RuntimeError, match=r"no worker for 1 seconds: start some and"):
                analyze(saved, model=f"{module}:build", dask=cluster.scheduler_address)
        finally:
            (tmp_path / "wait").unlink()


def test_what_is_no_address_of_a_scheduler_is_refused(saved):
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match=r"such as tcp://host:8786, got 'bla': missing port"):
        analyze(saved, dask="bla")


def test_tasks_are_sent_in_runs_where_neighbours_are_compared():
    tasks = [(k, ("a",)) for k in range(70)]
    assert [len(run) for run in pools.runs(tasks, 2, True)] == [8] * 8 + [6]
    assert [len(run) for run in pools.runs(tasks[:9], 2, True)] == [1] * 9
    assert {len(run) for run in pools.runs(tasks, 2, False)} == {1}
    assert [task for run in pools.runs(tasks, 3, True) for task in run] == tasks


def test_what_cannot_be_sent_is_said_with_a_way_out(saved):
    with pytest.raises(ValueError, match=r"cannot be sent.*model='module:name'.*jobs=1"):
        analyze(saved, model=lambda: smooth(), jobs=2)
    assert not (saved.parent / "analysis").exists()


# Once ---------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """The names of checkpoints that are loaded, in order."""
    found = []

    def load(checkpoint, allow_pickle):
        found.append(checkpoint.step)
        return original(checkpoint, allow_pickle)

    original = networks.load
    monkeypatch.setattr(networks, "load", load)
    return found


def test_a_rerun_looks_once_and_measures_nothing(saved, loads):
    first = analyze(saved)
    assert loads == [0, 1, 2, 5, 9]
    before = content(first.trace), sorted(os.listdir(first.folder))
    loads.clear()
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    again = analyze(saved)
    assert (again.done, again.skipped, again.anew) == ((), (0, 1, 2, 5, 9), None)
    assert loads == [0]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    assert before == (content(again.trace), sorted(os.listdir(first.folder)))
    assert "5 done before" in str(again)


class Net(nn.Sequential):
    """Its activation is not seen in its `repr`."""

    def __init__(self, activation, stops_at=None):
        super().__init__(*smooth())
        self.activation, self.stops_at = activation, stops_at

    def forward(self, x):
        if self.stops_at is not None and torch.equal(self[2].bias.detach(), self.stops_at):
            raise KeyboardInterrupt
        return self[2](self.activation(self[0](x)))


def likely(factor=1, scale=1, x=X):
    """Probes whose functions have the same names."""
    return nt.Probe(
        x,
        Y[: len(x)],
        forward=lambda model, inputs: scale * model(inputs),
        losses=lambda f, y: factor * nn.functional.cross_entropy(f, y, reduction="none"),
        likelihood="categorical",
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"model": Net(torch.tanh)}, {"model": Net(torch.relu)}),
        ({"model": lambda: Net(torch.tanh)}, {"model": lambda: Net(torch.relu)}),
        ({"probe": likely()}, {"probe": likely(factor=10)}),
        ({"probe": likely()}, {"probe": likely(scale=3)}),
        (
            {"probe": {"a": likely(), "b": likely(x=X[:4])}},
            {"probe": {"a": likely(), "b": likely(10, x=X[:4])}},
        ),
        (
            {"probe": SEVERAL, "model": Net(torch.tanh), "names": ["ntk/cross"]},
            {"probe": SEVERAL, "model": Net(torch.relu), "names": ["ntk/cross"]},
        ),
    ],
    ids=["object", "function", "losses", "forward", "several", "pair"],
)
def test_what_gives_other_values_under_the_same_name_is_measured_anew(
    saved, tmp_path, before, after
):
    options = {"names": ["loss/mean", "ntk/velocity"]}
    first = analyze(saved, **{**options, **before})
    assert (first.done, first.anew) == ((0, 1, 2, 5, 9), None)
    fresh = analyze(saved, to=tmp_path / "fresh", **{**options, **after})
    names = after.get("names", ["loss/mean"])
    found = analyze(saved, **{**options, **after, "names": names})
    assert (found.done, found.skipped) == ((0, 1, 2, 5, 9), ())
    assert "measured anew: the network, its forward or its losses give other" in str(found)
    assert_same(found.trace, fresh.trace)
    assert analyze(saved, **{**options, **after}).done == ()
    back = analyze(saved, **{**options, **before})
    assert len(back.done) == 5
    assert analyze(saved, **{**options, **before}).done == ()


def test_a_file_that_is_edited_is_measured_anew(saved, module):
    options = {"names": ["loss/mean"], "model": f"{module}:build"}
    analyze(saved, **options)
    assert analyze(saved, **options).done == ()
    Path(module).write_text(MODULE.replace("nn.Tanh()", "nn.ReLU()") + "# other\n")
    sys.modules.pop("own_module")
    assert len(analyze(saved, **options).done) == 5


def test_what_an_interruption_left_of_another_network_is_measured_anew(saved, tmp_path):
    names = ["loss/mean"]
    analyze(saved, names, model=Net(torch.tanh))
    stops_at = torch.load(at(saved, 2))["state_dict"]["2.bias"]
    with pytest.raises(KeyboardInterrupt):
        analyze(saved, names, model=Net(torch.relu, stops_at))
    found = analyze(saved, names, model=Net(torch.relu))
    assert (found.done, found.skipped) == ((2, 5, 9), (0, 1))
    assert_same(found.trace, analyze(saved, names, model=Net(torch.relu), to=tmp_path / "x").trace)


def test_what_was_measured_otherwise_in_between_is_measured_anew(saved):
    for seed, done in [(0, 5), (1, 5), (0, 5), (0, 0)]:
        assert len(analyze(saved, ["fisher/trace_mc"], seed=seed).done) == done


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_network_that_cannot_be_evaluated_any_more_is_reported(saved, error):
    def fails(x):
        raise error("no such activation")

    analyze(saved, ["loss/mean"], model=Net(torch.tanh))
    found = analyze(saved, ["loss/mean"], model=Net(fails))
    assert (found.done, found.skipped, len(found.failed)) == ((), (), 5)
    assert "no such activation" in found.failed[at(saved, 0)]


class Noisy(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


def test_a_network_that_draws_random_numbers_is_known_again(saved):
    first = analyze(saved, ["loss"], model=Noisy(*smooth()))
    assert first.done
    again = analyze(saved, ["loss"], model=Noisy(*smooth()))
    assert (again.done, again.skipped, again.anew) == ((), first.done, None)


def test_traces_without_witnesses_are_believed(saved, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(worker, "together", lambda several: {})
        before = analyze(saved, ["loss/mean"], model=Net(torch.tanh))
    assert "witness_of_outputs" not in before.trace.coords
    found = analyze(saved, ["loss/mean"], model=Net(torch.relu))
    assert (len(found.skipped), found.anew) == (5, None)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.complex64])
def test_a_network_is_known_to_a_thousandth(kind):
    outputs = torch.randn(2**19, 5, dtype=kind, generator=torch.Generator().manual_seed(0))
    seen = [witness.seen(PROBE, o) for o in (outputs, outputs * (1 + 1e-5), outputs * 1.1)]
    now, near, far = (witness.together([one, one]) for one in seen)
    recorded = {name: total for name, (total, _) in now.items()}
    assert np.isnan(recorded["witness_of_losses"])
    assert witness.agree(near, recorded)
    assert not witness.agree(far, recorded)
    outputs[0, 0] = float("inf")
    assert not witness.agree(witness.together([witness.seen(PROBE, outputs)]), recorded)


def test_a_measure_that_is_added_is_computed_alone(saved, tmp_path):
    whole = analyze(saved, ["loss/mean", "ntk/velocity"], to=tmp_path / "whole")
    analyze(saved, ["loss/mean"])
    added = analyze(saved, ["loss/mean", "ntk/velocity"])
    assert added.done == (0, 1, 2, 5, 9)
    asked = [part.provenance["measures"] for part in parts(added.folder)]
    assert asked == [["loss/mean"], ["ntk/velocity"]]
    assert_same(added.trace, whole.trace)


def test_checkpoints_that_are_added_compare_with_those_that_are_done(saved, tmp_path, loads):
    whole = analyze(saved, to=tmp_path / "whole")
    at(saved, 9).rename(tmp_path / "late.pt")
    analyze(saved)
    loads.clear()
    (tmp_path / "late.pt").rename(at(saved, 9))
    added = analyze(saved)
    assert added.done == (9,)
    assert set(loads) == {0, 5, 9}
    assert_same(added.trace, whole.trace, without={"nettrace/spot_check"})


def test_what_is_missing_is_tried_again_only_if_that_is_asked_for(saved):
    for options, done in [({}, 5), ({}, 0), ({"retry": True}, 5)]:
        found = analyze(saved, ["loss/mean", "ntk/cross"], **options)
        assert len(found.done) == done
        assert set(found.missing) == {"ntk/cross"}  # also where it was found before
        assert "there is one" in found.missing["ntk/cross"]
    assert [part.provenance["measures"] for part in parts(found.folder)][1] == ["ntk/cross"]


def test_a_checkpoint_that_is_replaced_is_measured_anew_with_all_that_was_asked_for(saved):
    first = analyze(saved, ["loss/mean", "ntk/trace"])
    before = first.trace.load()
    state = torch.load(at(saved, 2))
    state["state_dict"]["2.bias"] += 1
    torch.save(state, at(saved, 2))
    found = analyze(saved, ["loss/mean"])
    assert found.done == (2,)
    after = found.trace
    for name in ("loss_mean", "ntk_trace"):
        changed = (before[name] != after[name]).values.tolist()
        assert changed[2] or name == "ntk_trace"
        assert sum(changed) == changed[2]
    assert parts(found.folder)[-1].provenance["measures"] == ["loss/mean", "ntk/trace"]
    assert analyze(saved, ["loss/mean", "ntk/trace"]).done == ()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model": lambda: smooth()},
        {"probe": nt.Probe(X, Y, losses=lambda f, y: f[:, 0] ** 2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_is_measured_anew(saved, change):
    analyze(saved, ["loss/mean", "fisher/trace_mc"])
    found = analyze(saved, ["loss/mean"], **change)
    assert len(found.done) == 5
    assert parts(found.folder)[-1].provenance["measures"] == ["loss/mean", "fisher/trace_mc"]
    assert analyze(saved, ["loss/mean"], **change).done == ()


def test_other_samples_are_refused(saved):
    analyze(saved, ["loss/mean"])
    with pytest.raises(ValueError, match=r"the trace of another probe.*folder of its own by --to"):
        analyze(saved, ["loss/mean"], probe=nt.Probe(X + 1, Y))


# Faults -------------------------------------------------------------------------------------------


def test_what_is_broken_is_reported_and_the_rest_goes_on(saved):
    whole = at(saved, 1).read_bytes()
    at(saved, 1).write_bytes(whole[: len(whole) // 2])
    torch.save(nn.Linear(3, 3).state_dict(), at(saved, 5))
    found = analyze(saved)
    assert found.done == (0, 2, 9)
    assert set(found.failed) == {at(saved, 1), at(saved, 5)}
    for path in found.failed:
        assert f"failed: {path}: " in str(found)
    at(saved, 1).write_bytes(whole)
    assert analyze(saved).done == (1,)


def test_a_probe_that_does_not_fit_fails_each_checkpoint_and_writes_nothing(saved):
    found = analyze(saved, probe=nt.Probe(torch.randn(3, 7), Y[:3]))
    assert found.done == ()
    assert len(found.failed) == 5
    assert "cannot be multiplied" in found.failed[at(saved, 0)]
    assert not found.folder.exists() or parts(found.folder) == []


@pytest.mark.parametrize(
    ("folders", "given", "says"),
    [
        ("seed-1 seed-2", "", r"in 2 folders.*of one run.*{}/seed-1, {}/seed-2; or"),
        ("seed-1 seed-2", "seed-1 seed-2", None),
        ("seed-1 seed-2", "seed-*/*.pt", None),
        (". old", "", r"'{}/step=\*.pt', {}/old; or"),
        ("step-5 step-6", "", None),
        ("epoch_1 epoch_2", "", None),
        ("a/step-5 b/step-6", "", r"{}/a, {}/b; or"),
    ],
)
def test_one_folder_holds_one_run(tmp_path, folders, given, says):
    for number, folder in enumerate(folders.split()):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        name = "model.pt" if "-" in folder and "seed" not in folder else f"step={number}.pt"
        torch.save(smooth().state_dict(), tmp_path / folder / name)
    paths = [tmp_path / path for path in given.split(" ")]
    if says is None:
        assert len(analyze(paths, ["loss/mean"]).done) == 2
    else:
        with pytest.raises(ValueError, match=says.format(tmp_path, tmp_path)):
            analyze(paths, ["loss/mean"])


@pytest.mark.parametrize(
    "options", [{"checkpoints": ""}, {"checkpoints": ["a.pt", ""]}, {"to": ""}]
)
def test_a_path_that_is_empty_is_refused(saved, monkeypatch, options):
    monkeypatch.chdir(saved)
    with pytest.raises(ValueError, match="got an empty text: is it a variable of the shell"):
        analyze(**{"checkpoints": saved, **options})


def test_samples_that_are_drawn_anew_each_time_are_refused(saved, tmp_path, module):
    Path(module).write_text(
        MODULE.replace(
            "torch.randn(6, 4)", "torch.tensor([[float(time.time_ns() % 10**6)] * 4] * 6)"
        )
    )
    with pytest.raises(ValueError, match="gives other samples each time: set the seed"):
        analyze(saved, probe=f"{module}:probe")


class Interrupted(nn.Sequential):
    def forward(self, x):
        if float(self[2].bias.detach()[0]) == 666:
            raise KeyboardInterrupt
        return super().forward(x)


def test_an_interruption_keeps_what_is_written(saved):
    state = torch.load(at(saved, 5))
    kept = state["state_dict"]["2.bias"][0].clone()
    state["state_dict"]["2.bias"][0] = 666
    torch.save(state, at(saved, 5))
    with pytest.raises(KeyboardInterrupt):
        analyze(saved, model=Interrupted(*smooth()))
    assert nt.open(saved.parent / "analysis").step.values.tolist() == [0, 1, 2]
    state["state_dict"]["2.bias"][0] = kept
    torch.save(state, at(saved, 5))
    assert analyze(saved, model=Interrupted(*smooth())).done == (5, 9)


SCRIPT = """
import signal, sys, torch, nettrace as nt
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background lack
if __name__ == "__main__":
    probe = nt.Probe(torch.ones(6, 4), torch.arange(6) % 3)
    nt.analyze(sys.argv[1], probe, ["loss"], model=sys.argv[2], jobs=2, to=sys.argv[3])
"""


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_workers_end_with_the_process_that_started_them(saved, tmp_path, module, how):
    (tmp_path / "slow").touch()
    (tmp_path / "script.py").write_text(SCRIPT)
    trace = tmp_path / "trace"
    command = [sys.executable, "script.py", str(saved), f"{module}:build", str(trace)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: trace.exists() and any(len(part.steps) for part in parts(trace)))
    children = [int(c) for c in _children(running.pid)]
    running.send_signal(how)
    assert running.wait(20) != 0
    assert len(children) >= 2
    wait_for(lambda: not any(_is_running(child) for child in children))
    (tmp_path / "slow").unlink()
    probe = nt.Probe(torch.ones(6, 4), Y)
    found = analyze(saved, ["loss"], probe=probe, model=f"{module}:build", to=trace)
    assert found.skipped
    assert len(found.skipped) + len(found.done) == 5


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _children(process):
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def _is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(saved, tmp_path, module):
    script = SCRIPT.replace('if __name__ == "__main__":', "if True:")
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "script.py", str(saved), f"{module}:build", str(tmp_path / "trace")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "guard what it does by if __name__ == '__main__'" in run.stderr


# Spot checks --------------------------------------------------------------------------------------


@pytest.fixture
def certified(tmp_path, monkeypatch):
    """The steps at which networks are certified, and a function that makes it fail at some."""
    found, bad = [], []

    def certify(jacobian, seed):
        found.append(seed)
        if seed in bad:
            raise nt.SpotCheckError("as asked")
        return original(jacobian, seed=seed)

    original = worker.certify
    monkeypatch.setattr(worker, "certify", certify)
    trained(tmp_path / "checkpoints", range(9))
    return found, bad


def test_spot_checks_go_by_the_position_of_checkpoints(certified, tmp_path):
    found, bad = certified
    bad.append(3)
    folder = tmp_path / "checkpoints"
    whole = analyze(folder, ["ntk/trace"], to=tmp_path / "whole")
    assert found == [0, 1, 3, 4, 5, 6, 7]
    present = whole.trace.ntk_trace.notnull().values.tolist()
    assert present == [True] * 3 + [False] + [True] * 5
    assert "as asked" in whole.missing["ntk/trace"]
    held = {step: at(folder, step).read_bytes() for step in (2, 5)}
    for step in held:
        at(folder, step).write_bytes(b"")
    analyze(folder, ["ntk/trace"])
    for step, data in held.items():
        at(folder, step).write_bytes(data)
    found.clear()
    analyze(folder, ["ntk/trace"])
    assert found == [1, 3, 5]


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [("checkpoints/a-step=3.pt", "analysis"), ("mine/step=3.pt", "mine/analysis")],
)
def test_the_trace_lies_beside_the_checkpoints(tmp_path, monkeypatch, path, expected):
    monkeypatch.chdir(tmp_path)
    Path(path).parent.mkdir()
    torch.save(smooth().state_dict(), path)
    found = analyze(path, ["loss/mean"])
    assert found.folder == Path(expected)
    assert found.trace.step.values.tolist() == [3]
    assert f"the trace is in {expected}" in str(found)


def test_a_bar_is_shown_where_it_is_asked_for(saved, capfd):
    assert analyze(saved, ["loss/mean"], progress="always").done
    assert "5/5" in capfd.readouterr().err
    analyze(saved, ["loss/accuracy"], progress=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"jobs": 0}, "jobs to be an integer of at least 1, got 0"),
        ({"threads": 1.5}, "threads to be an integer"),
        ({"jobs": 2, "dask": "tcp://nowhere:1"}, "one of jobs, executor and dask"),
        ({"names": ["ntk/trac"]}, "did you mean 'ntk/trace'"),
        ({"memory_budget": "much"}, "2GiB"),
        ({"model": "nowhere:build"}, "no module 'nowhere'"),
        ({"modules": ["nowhere"]}, "no module 'nowhere'"),
        ({"probe": "nowhere:probe"}, "no module 'nowhere'"),
        ({"max_seconds": 0}, "max_seconds above 0"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_done_is_said_at_once(saved, options, says):
    with pytest.raises(ValueError, match=says):
        analyze(saved, **options)
    assert not (saved.parent / "analysis").exists()


def test_the_template_and_random_states_stay_as_they_are(saved):
    model = smooth()
    before = training.state(model)
    analyze(saved, model=model)
    assert training.differences(before, training.state(model)) == []


def test_provenance_says_what_was_measured(saved):
    found = analyze(saved, ["loss/mean"], model=smooth(), threads=1, seed=4)
    (part,) = parts(found.folder)
    assert part.start is None
    assert part.provenance["model"].startswith("torch.nn.modules.container:Sequential ")
    assert part.provenance["data"] == "Probe of 6 samples: float32 (6, 4)"
    assert (part.provenance["seed"], part.provenance["threads"]) == (4, 1)
    assert part.provenance["checkpoints"] == str(saved)
    assert json.dumps(part.provenance)
    assert np.isfinite(found.trace.loss_mean).all()
