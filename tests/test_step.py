"""One step: its pieces, what it keeps in memory, how often it waits, what it does in bf16, what of it is compiled."""

import copy
import math

import pytest
import torch
from torch import nn

from at_smooth import (
    Adversary,
    AttackSpec,
    Batch,
    Data,
    Engine,
    Observer,
    OptionError,
    Regularizer,
    Runtime,
    Settings,
    Threat,
    create,
)
from at_smooth.compilation import Compilation
from at_smooth.divergence import all_finite, surely_finite
from at_smooth.lowering import converted_weights

PGD = AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 2, "random_start": False})


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.fixture
def engine(toy_data):
    def make(network=linear, attack=PGD, precision="fp32", compile=False, data=None, fast_layers=True, **kept):
        parts = {name: kept.pop(name) for name in ("regularizer", "smoother") if name in kept}
        torch.manual_seed(0)
        return Engine(
            network(),
            data or toy_data(),
            method=create("methods", "at"),
            attack=attack,
            settings=Settings(**{"epochs": 2, "batch_size": 18, "eval_steps": 1, "test_every": 0, **kept}),
            runtime=Runtime.choose("cpu", precision, compile, fast_layers=fast_layers),
            **parts,
        )

    return make


def weights(engine):
    return torch.cat([value.flatten().double() for value in engine.model.state_dict().values()])


# --- pieces


@pytest.mark.parametrize(("n", "count", "sizes"), [(7, 1, [7]), (7, 3, [3, 2, 2]), (5, 4, [3, 2]), (2, 9, [2])])
def test_pieces_cover_the_batch_and_have_two_examples_at_least(n, count, sizes):
    batch = Batch(torch.rand(n, 1, 2, 2), torch.arange(n), torch.arange(n) + 10)
    pieces = batch.pieces(count)
    assert [len(piece) for piece in pieces] == sizes
    for name in ("clean", "labels", "indices"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))


@pytest.mark.parametrize("accumulate", [2, 4, 100])
def test_pieces_give_the_weights_of_the_whole_batch_where_no_batchnorm_sees_them(engine, accumulate):
    whole, inpieces = engine(), engine(accumulate=accumulate)
    rows, others = whole.fit(), inpieces.fit()
    assert torch.allclose(weights(whole), weights(inpieces), rtol=1e-5, atol=1e-7)
    for one, other in zip(rows, others, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["train_acc"] == other["train_acc"]


def test_each_piece_is_attacked_and_differentiated_by_itself(engine):
    sizes = []

    class Look(Regularizer):
        def terms(self, step):
            sizes.append(len(step.logits))
            return {"method": step.loss}

    engine(convolutions, regularizer=Look(), accumulate=3, epochs=1).fit()
    assert sizes == [6] * 6  # two batches of 18


def test_a_piece_that_is_not_finite_is_the_one_in_the_dump(engine):
    class Bomb(Regularizer):
        def terms(self, step):
            return {"method": step.loss * (float("nan") if step.progress > 0 and 5 in step.indices else 1)}

    from at_smooth import DivergedError

    with pytest.raises(DivergedError) as caught:
        engine(regularizer=Bomb(), accumulate=3).fit()
    assert 5 in caught.value.dump["indices"]
    assert len(caught.value.dump["labels"]) == 6


# --- waiting and memory


def test_a_step_waits_for_the_device_once(engine, monkeypatch):
    waits, counting = [], []

    def counted(name):
        original = getattr(torch.Tensor, name)

        def wrapped(self, *args):
            if counting:
                waits.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, wrapped)

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
        counted(name)

    class Watch(Observer):
        def stepped(self, engine):
            if counting:
                assert waits == ["tolist"]
            waits.clear()
            counting[:] = [True]

        def measured(self, engine):
            counting.clear()

    engine(convolutions, regularizer=create("regularizers", "kd-std-adv"), accumulate=2, batch_size=6).fit(Watch())


def saved_bytes(work):
    """How much the graphs that a function builds keep, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storages.values())


def test_the_attack_keeps_no_activations_for_gradients_of_weights():
    import torchattacks

    model = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, 3))
    images, labels = torch.rand(50, 1, 8, 8), torch.arange(50) % 3
    spec = AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 1})
    ours = saved_bytes(lambda: Adversary(model, spec)(images, labels))
    plain = saved_bytes(lambda: torchattacks.PGD(model, 0.1, 0.025, 1)(images, labels))
    activations = 6 * images.numel() * 4  # between the layers, which only their weights' gradients need
    assert ours <= plain - activations


# --- bf16


class Standardized(nn.Conv2d):
    """A convolution that does arithmetic with its weights first, in float32."""

    def forward(self, images):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(images, weight, self.bias)


def special():
    return nn.Sequential(
        Standardized(1, 4, 3),
        nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


@pytest.mark.parametrize("network", [linear, convolutions, special])
def test_weights_converted_once_give_what_autocast_gives(network):
    torch.manual_seed(0)
    model, runtime = network(), Runtime.choose("cpu", "bf16")
    images, labels = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    again = copy.deepcopy(model)
    parameters = list(model.parameters())
    adversary = Adversary(model, PGD)
    with runtime.attacking(model):
        dtypes = {parameter.dtype for parameter in model[-1].parameters()}
        converted = adversary(images, labels)
    assert dtypes == {torch.bfloat16}
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    with runtime.autocast():
        assert torch.equal(converted, Adversary(again, PGD)(images, labels))


def test_weights_are_put_back_when_an_attack_fails():
    model = linear()
    before = list(model.parameters())
    with pytest.raises(RuntimeError), converted_weights(model, torch.bfloat16):
        raise RuntimeError
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_attacks_under_autocast_have_gradients(norm, objective):
    torch.manual_seed(0)
    model, runtime = convolutions(), Runtime.choose("cpu", "bf16")
    images, labels = torch.rand(6, 1, 4, 4) * 0.5 + 0.25, torch.tensor([0, 1, 2, 0, 1, 2])
    seen = []

    def watch(module, inputs):
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: seen.append(gradient.abs().sum().item()))

    model.register_forward_pre_hook(watch)
    spec = AttackSpec.parse("pgd", Threat(norm, 0.1), {"steps": 3}).maximising(objective)
    with runtime.attacking(model):
        with torch.no_grad():
            model(images)  # what fills autocast's cache with weights that have no gradient
        perturbed = Adversary(model, spec)(images, labels)
    assert len(seen) == 3
    assert all(0 < each < math.inf for each in seen)
    assert not torch.equal(perturbed, images)


def test_training_in_bf16_keeps_weights_and_measurements_in_float32(engine):
    dtypes, logits = set(), {}

    class Look(Observer):
        def stepped(self, engine):
            dtypes.update(value.dtype for value in engine.model.state_dict().values() if value.is_floating_point())

    trained = engine(convolutions, precision="bf16")
    trained.model.register_forward_hook(
        lambda module, inputs, out: logits.setdefault(module.training, set()).add(out.dtype)
    )
    trained.fit(Look())
    assert dtypes == {torch.float32}
    assert logits == {True: {torch.bfloat16}, False: {torch.float32}}


@pytest.mark.parametrize(("fast_layers", "works"), [(False, 3), (True, 2)])
def test_many_networks_in_one_process_are_all_compiled(engine, graphs, fast_layers, works):
    """Attack, loss, and the attack that measures RA, unless its layers are faster as they are."""

    def counted(width):
        before = len(graphs)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Linear(width, 3))
        engine(lambda: network, compile=True, epochs=1, fast_layers=fast_layers).fit()
        return len(graphs) - before

    assert {counted(width) for width in range(4, 10)} == {works}


# --- what is finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_and_what_is_only_large_is_not(value):
    tensors = [torch.ones(3, 3), torch.full((5,), 3e38), torch.zeros(2)]
    assert all_finite(tensors)
    assert surely_finite([tensors[0], tensors[2]])
    tensors[0][1, 1] = value
    assert not all_finite(tensors)
    assert not surely_finite([tensors[0], tensors[2]])


def test_a_large_gradient_is_no_divergence(engine):
    class Large(Regularizer):
        def terms(self, step):
            return {"method": step.loss, "large": step.logits.mean() * 1e25}

    assert len(engine(regularizer=Large(), lr=1e-30, momentum=0, epochs=1).fit()) == 1


# --- compilation


@pytest.fixture
def graphs(monkeypatch):
    """Compiles without a compiler: what torch traces is counted, and runs as it was."""
    sizes = []

    def backend(graph, examples):
        sizes.append(len(examples))
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **how: original(call, backend=backend, **how))
    torch._dynamo.reset()
    yield sizes
    torch._dynamo.reset()


def test_each_kind_of_work_is_compiled_once(engine, graphs, toy_images, monkeypatch):
    data = Data.split(toy_images(), validation=0.4)
    assert data.train.n % 16 > 0
    assert 16 < data.val.n < 32  # each leaves a smaller batch
    monkeypatch.setattr("at_smooth.engine._SMALL", 0)

    def compiled(epochs):
        torch._dynamo.reset()
        graphs.clear()
        regularizer, smoother = create("regularizers", "kd-std-adv"), create("smoothers", "swa", {"start": 1})
        how = {"precision": "bf16", "compile": True, "data": data, "batch_size": 16}
        engine(convolutions, epochs=epochs, regularizer=regularizer, smoother=smoother, **how).fit()
        return len(graphs)

    # Attack and loss of the student and of the robust teacher, which may share them; the standard teacher's loss; the
    # two teachers' own passes. RA is measured uncompiled.
    assert 2 <= compiled(2) == compiled(5) <= 7


def test_compiled_or_not_it_trains_alike(engine, graphs):
    compiled, asis = engine(convolutions, compile=True), engine(convolutions)
    compiled.fit()
    assert graphs
    asis.fit()
    assert torch.allclose(weights(compiled), weights(asis), rtol=1e-4, atol=1e-6)
    assert list(compiled.model.state_dict()) == list(asis.model.state_dict())


def test_without_compile_nothing_is_compiled(engine, graphs):
    engine(convolutions).fit()
    assert not graphs


def test_a_model_that_cannot_be_compiled_is_said_to_be_so(engine, monkeypatch):
    def fails(graph, examples):
        raise FileNotFoundError("no compiler")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **how: original(call, backend=fails, **how))
    torch._dynamo.reset()
    with pytest.raises(OptionError, match=r"cannot be compiled here.*Leave --compile out"):
        engine(compile=True).fit()


def test_other_failures_are_left_alone():
    with pytest.raises(KeyError), Compilation(True).of("step"):
        raise KeyError
