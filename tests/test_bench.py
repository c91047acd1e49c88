"""What ``at-smooth bench`` says follows from what was timed, and what was timed is alike."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from at_smooth import BenchError, OptionError, Recipe, Runtime
from at_smooth.bench import contenders, rounds
from at_smooth.bench.figures import Measured, ratio
from at_smooth.bench.passes import bare_step, step_flops
from at_smooth.bench.rate import Stand, layers_of
from at_smooth.bench.worker import Line, serve
from at_smooth.bench.worker_process import Worker
from at_smooth.bench.workload import Variant, Workload
from at_smooth.cli import cli

CPU = Runtime.choose("cpu")


class EnoughError(Exception):
    """So many steps were wanted."""


class Steps:
    """Lets a contender take some steps."""

    def __init__(self, wanted):
        self.left = wanted

    def begin(self):
        pass

    def stepped(self):
        self.left -= 1
        if not self.left:
            raise EnoughError


@pytest.fixture
def work():
    """Makes a workload of a moment."""

    def make(model="mlp", options=None, shape=(1, 4, 4), **attack):
        recipe = Recipe(
            dataset="digits", model=model, model_options=options or {"width": 8, "depth": 1}, batch_size=4, threads=1,
            attack_options={"steps": 2, "mode": "train", **attack}, eps="8/255", device="cpu", lr=0.1,
        )  # fmt: skip
        return Workload(recipe, shape, 3)

    return make


@pytest.fixture
def convnet():
    """Two convolutions of one kind between two of others, and a head; with its images and labels."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 8, 1, stride=2), nn.Flatten(), nn.Linear(8 * 3 * 3, 5),
    )  # fmt: skip
    return model.train(), torch.rand(2, 3, 6, 6), torch.tensor([0, 3])


FORWARD = [2 * 2 * 36 * 4 * 27, *[2 * 2 * 36 * 4 * 36] * 2, 2 * 2 * 9 * 8 * 4, 2 * 2 * 72 * 5]  # a layer each


def spec(**options):
    return Workload(Recipe(attack_options=options, eps=0.1), (3, 6, 6), 5).attack


def test_a_step_costs_what_counting_by_hand_says(convnet):
    attacking = 3 * 2 * sum(FORWARD)  # forward, and back to the images through every layer
    updating = sum(FORWARD) + sum(FORWARD) + sum(FORWARD[1:])  # back to all weights, and to all inputs but the images
    assert step_flops(*convnet, spec(steps=3), CPU) == attacking + updating


def test_the_layers_of_a_network_are_found_and_counted(convnet):
    model, images, _ = convnet
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = layers_of(model, images)
    found = [(layer.module.in_channels, layer.module.out_channels, layer.shape, layer.count) for layer in layers]
    assert found == [(3, 4, (2, 3, 6, 6), 1), (4, 4, (2, 4, 6, 6), 2), (4, 8, (2, 4, 6, 6), 1)]
    stands = [Stand(layer, CPU.device, torch.bfloat16) for layer in layers]
    assert [stand.count * stand.flops for stand in stands] == [FORWARD[0], sum(FORWARD[1:3]), FORWARD[3]]
    assert all(stand.forward_seconds() > 0 and stand.backward_seconds() > 0 for stand in stands)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_without_convolutions_is_held_against_its_linear_layers():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))
    assert [layer.shape for layer in layers_of(model, torch.rand(3, 1, 4, 4))] == [(3, 16), (3, 4)]
    assert layers_of(nn.Flatten(), torch.rand(3, 1, 4, 4)) == []


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bare_passes_leave_the_parameters_and_the_modes(convnet, mode):
    model, images, labels = convnet
    model[4].eval()
    before = [parameter.clone() for parameter in model.parameters()]
    gradients = bare_step(model, images, labels, spec(steps=2, mode=mode), CPU)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert [gradient.shape for gradient in gradients] == [parameter.shape for parameter in before]
    assert model.training
    assert not model[4].training
    assert (model[1].num_batches_tracked == (3 if mode == "train" else 1)).all()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_plain_loop_and_the_engine_come_to_the_same_weights(work, monkeypatch, mode):
    networks = []
    build = Workload.network
    monkeypatch.setattr(Workload, "network", lambda self: networks.append(build(self)) or networks[-1])
    monkeypatch.setattr(contenders, "build_engine", keeping(contenders.build_engine, networks))
    task = work(model="convnet", options={"width": 4}, shape=(3, 6, 6), random_start=False, mode=mode)
    for contender in (contenders.plain, contenders.engine):
        with pytest.raises(EnoughError):
            contender(task, Variant(), Steps(25))  # into a second epoch
    plain, engine = (network.state_dict() for network in networks)
    start = build(task).state_dict()
    assert not torch.equal(plain["network.0.weight"], start["network.0.weight"])
    for name, value in plain.items():
        torch.testing.assert_close(engine[name], value, rtol=1e-4, atol=1e-5)


def keeping(build, networks):
    def build_and_keep(*given):
        engine = build(*given)
        networks.append(engine.model)
        return engine

    return build_and_keep


def test_ratios_are_those_of_the_steps_of_a_round():
    slow = [{"seconds": [2.0, 9.0, 2.0]}, {"seconds": [8.0]}, {"seconds": [3.0]}]
    fast = [{"seconds": [1.0]}, {"seconds": [4.0, 4.0]}, {"seconds": [1.0]}]
    assert ratio(slow, fast) == 2.0


@pytest.fixture
def measured(work):
    """A benchmark with known times: 100 operations a step, 200 a second at most in bf16."""

    def thrice(seconds, rise):
        return [{"seconds": [seconds], "peak_mb": 100.0 + rise, "rise_mb": rise}] * 3

    found = Measured(work(), (Variant("fp32"), Variant("bf16", True)), {})
    for precision, seconds in (("fp32", 0.4), ("bf16", 0.2)):
        found.about[f"rate {precision}"] = {"kind": "convolution", "step_flops": 100, "layer_flops": 40}
        found.rounds[f"rate {precision}"] = [{"forward_seconds": seconds, "backward_seconds": 2 * seconds}] * 3
    found.rounds.update({
        "plain": thrice(4.0, 20.0), "engine fp32": thrice(2.0, 15.0), "bare fp32": thrice(1.6, 1.0),
        "engine bf16+compile": thrice(1.0, 99.0), "bare bf16+compile": thrice(0.8, 9.0),
    })  # fmt: skip
    return found


def test_figures_follow_from_the_times(measured):
    fp32, fast = measured.variants
    assert (measured.speedup(fp32), measured.speedup(fast)) == (2.0, 4.0)
    assert measured.overhead(fast) == pytest.approx(0.25)
    assert measured.plain_overhead() == pytest.approx(1.5)
    assert measured.rate("bf16") == pytest.approx(200)
    assert measured.rate("bf16", "backward") == pytest.approx(100)
    assert measured.share("engine bf16+compile", "bf16") == pytest.approx(0.5)
    assert measured.share("plain", "fp32") == pytest.approx(0.25)
    assert measured.memory_over_plain(fp32) == 0.75


def test_attacks_by_torchs_own_layers_are_held_against_the_same_bare_passes(measured):
    direct = Variant(direct=True)
    measured.variants = (*measured.variants, direct)
    measured.rounds["engine fp32+direct"] = [{"seconds": [2.4], "peak_mb": 100.0, "rise_mb": 10.0}] * 3
    assert measured.overhead(direct) == pytest.approx(0.5)
    assert [row[0] for row in measured.table().rows].count("bare passes fp32") == 1
    assert measured.to_dict()["overhead_fp32_direct"] == pytest.approx(0.5)


@pytest.mark.parametrize(("seconds", "said"), [(2.0, False), (2.05, False), (3.0, True)])
def test_where_bf16_is_slower_it_is_said(measured, seconds, said):
    measured.machine.update(processor="p", capability="c", threads=1, cores=2, gpu=None, torch="1", torchattacks="2")
    measured.variants = (Variant("fp32"), Variant("bf16"))
    measured.rounds["engine bf16"] = measured.rounds["bare bf16"] = [
        {"seconds": [seconds], "peak_mb": 100.0, "rise_mb": 10.0}
    ] * 3
    assert any("bf16 takes 1.50 times as long" in line for line in measured.lines()) == said


def test_the_memory_of_compiling_is_not_reported_as_that_of_training(measured):
    measured.machine.update(processor="p", capability="c", threads=1, cores=2, gpu=None, torch="1", torchattacks="2")
    assert {row[0]: row[-1] for row in measured.table().rows}["engine bf16+compile"] == "-"
    assert "engine bf16+compile" not in measured.to_dict()["memory_mb"]
    assert any("engine fp32: 0.75 times, at most the plain loop's" in line for line in measured.lines())


def test_a_network_that_multiplies_nothing_has_no_rate(measured):
    for about in measured.about.values():
        about["layer_flops"] = 0
    assert measured.rate("fp32") is None
    assert measured.to_dict()["share_bf16_compile"] is None


@pytest.mark.parametrize(
    ("text", "key"),
    [
        *(("fp32", "fp32"), ("bf16", "bf16"), ("bf16+compile", "bf16_compile"), ("fp32+direct", "fp32_direct")),
        *(("fp32+compile+direct", "fp32_compile_direct"), ("fp16", None), ("bf16+", None)),
        ("fp32+direct+direct", None),
    ],
)
def test_variants_are_read(text, key):
    if key:
        assert Variant.parse(text).key == key
        assert str(Variant.parse(text)) == text
    else:
        with pytest.raises(OptionError, match="there is no variant"):
            Variant.parse(text)


def test_a_workload_goes_through_json(work):
    task = work(model="convnet", options={"width": 4}, shape=(3, 6, 6))
    assert Workload.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_a_killed_worker_is_one_clear_message(work):
    with Worker("bare", Variant(), work()) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(BenchError, match=r"'bare fp32' ended before it was done \(killed by SIGKILL"):
            worker.begin()


class Threaded:
    """Does what a worker's process does in a thread, which has all imported already."""

    def __init__(self, contender, variant, workload):
        self.name = contender if contender == "plain" else f"{contender} {variant}"
        self._task = {"contender": contender, "variant": asdict(variant), "workload": workload.to_dict()}
        asking, answering = os.pipe(), os.pipe()
        self._questions, self._answers = os.fdopen(asking[1], "w"), os.fdopen(answering[0])
        line = Line(os.fdopen(asking[0]), os.fdopen(answering[1], "w"))
        self._thread = threading.Thread(target=serve, args=[line], daemon=True)
        self._thread.start()

    def begin(self):
        return self.round(self._task)

    def round(self, question):
        print(json.dumps(question), file=self._questions, flush=True)
        return json.loads(self._answers.readline())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._questions.close()
        self._thread.join()


@pytest.fixture(params=["threads", pytest.param("processes", marks=pytest.mark.slow)])
def _workers(request, monkeypatch):
    if request.param == "threads":
        monkeypatch.setattr(rounds, "Worker", Threaded)


@pytest.mark.usefixtures("_workers")
def test_the_command_prints_a_table_and_writes_every_figure(tmp_path):
    path = tmp_path / "bench.json"
    variants = ["--variant", "fp32", "--variant", "bf16"]
    options = "--model convnet -N width=4 --image-size 6 --classes 3 --batch-size 4 --steps 1 --threads 1 --device cpu"
    result = CliRunner().invoke(
        cli, ["bench", *options.split(), "--rounds", "1", *variants, "--json", str(path)],
        env={"COLUMNS": "100"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("plain loop", "engine fp32", "bare passes fp32", "convolution rate in fp32", "machine: "):
        assert words in result.output
    assert max(map(len, result.output.splitlines()[:8])) <= 100
    figures = json.loads(path.read_text())
    assert figures["speedup_fp32"] == pytest.approx(figures["step_ms"]["plain"] / figures["step_ms"]["engine fp32"])
    assert {"overhead_fp32", "share_fp32", "share_plain", "machine", "workload"} <= set(figures)
    assert all(len(rounds) == 1 for rounds in figures["rounds"].values())
    assert figures["step_gflop"] > 0
    again = CliRunner().invoke(cli, ["bench", "--json", str(path)])
    assert again.exit_code == 2
    assert "exists already" in again.output
    assert json.loads(path.read_text()) == figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("protocol",
         "--model convnet --train 32 --val 8 --test 8 --batch-size 16 --steps 1 --eval-steps 1 --no-compile",
         "epoch, as asked, --validate-every 10"),
        ("scaling", "--axis classes --rounds 1 --threads 1", "over the upper half"),
    ],
)  # fmt: skip
def test_the_scripts_print_their_tables(repository, tmp_path, script, options, words):
    path = tmp_path / "found.json"
    command = [sys.executable, str(repository / "benchmarks" / f"{script}.py"), *options.split(), "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert words in done.stdout
    assert json.loads(path.read_text())["machine"]["torch"] == torch.__version__
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0  # the file is taken


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no Linux")
def test_ctrl_c_leaves_no_worker_behind(command):
    running = command("bench", "--model", "convnet", "--device", "cpu")
    assert "warming up" in running.stderr.readline()
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert len(workers) > 3
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 130
    assert "SIGINT: stopped" in running.communicate()[1]
    assert not [worker for worker in workers if Path("/proc", worker).exists()]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--variant", "fp64"], "there is no variant 'fp64'"),
        (["--model", "nope"], "no plugin 'nope'"),
        (["--eps", "a lot"], "eps"),
        (["--rounds", "0"], "--rounds"),
        (["-N", "width"], "not of the form key=value"),
        (["--model", "convnet", "-N", "stages=4", "--image-size", "2"], "4 stages need images"),
        (["--dataset", "digits", "--device", "nowhere"], "device 'nowhere' cannot be used"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, words):
    result = CliRunner().invoke(cli, ["bench", *options])
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always has the working directory on its path")
def test_a_worker_imports_nothing_from_the_working_directory(work, tmp_path, monkeypatch):
    for library in ("torch", "numpy", "json"):
        (tmp_path / f"{library}.py").write_text("raise RuntimeError('of the working directory')")
    monkeypatch.chdir(tmp_path)
    with Worker("bare", Variant(), work()) as worker:
        assert worker.begin() == {"ready": True}
