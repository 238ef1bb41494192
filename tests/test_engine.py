"""The training loop against an independently written one, and its promises about devices and randomness."""

import dataclasses
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lenet_sweep.errors import RunFailed
from lenet_sweep.training import backend, engine, model, optim
from lenet_sweep.training.backend import TorchBackend, forward
from lenet_sweep.training.data import Split, load_data
from lenet_sweep.training.metrics import CURVE_POINTS
from lenet_sweep.training.randomness import generator
from lenet_sweep.training.state import TrainingState

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mini(make_config):
    config = make_config("data=fashion_mnist_mini", "data.train_size=700", "data.val_size=100")
    return load_data(config.data, seed=0, device=CPU, say=lambda line: None)


@pytest.fixture
def setup(make_config):
    def build(*overrides):
        config = make_config("data=fashion_mnist_mini", *overrides)
        network = model.build(config.model, generator(config.seed, "init"))
        optimizer = optim.optimizer(config.optimizer, network.parameters())
        return config, network, optimizer, optim.schedule(config.schedule, optimizer, config.epochs)

    return build


def train(setup, data, *overrides, amp=False, dtype=torch.float32, threads=1, **options):
    """Train with these overrides; return all epochs' metrics and the network."""
    config, network, optimizer, schedule = setup(*overrides)
    epochs = engine.train(
        TrainingState(data, TorchBackend(network.to(dtype), amp, threads), optimizer, schedule),
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        **options,
    )
    return list(epochs), network


def numbers(metrics):
    """What of an epoch's metrics is a result, leaving out how long it took."""
    return dataclasses.replace(metrics, examples_per_s=0.0, epoch_s=0.0)


OPTIMIZERS = {
    "optimizer=sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "optimizer=momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "optimizer=nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "optimizer=adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "optimizer=adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.01),
}


@pytest.mark.parametrize(
    ("optimizer", "threads"),
    [("optimizer=sgd", 1), *((each, 3) for each in OPTIMIZERS), ("optimizer=adam", 9)],
)
def test_training_equals_an_independent_loop_over_the_same_batches(setup, mini, optimizer, threads):
    overrides = optimizer, "lr=0.05", "epochs=2", "batch_size=128"
    epochs, network = train(setup, mini, *overrides, dtype=torch.float64, threads=threads)

    oracle = setup(optimizer)[1].double()
    steps = OPTIMIZERS[optimizer](oracle.parameters())
    images, labels = mini.train.images_NCHW.double() / 255, mini.train.labels_N
    for metrics in epochs:
        order = torch.randperm(700, generator=generator(0, f"order/{metrics.epoch}"))
        loss_sum = right = 0.0
        for start in range(0, 700, 128):
            chosen = order[start : start + 128]
            outputs = oracle(images[chosen])
            loss = nn.CrossEntropyLoss(reduction="mean")(outputs, labels[chosen])
            steps.zero_grad()
            loss.backward()
            steps.step()
            loss_sum += loss.item() * len(chosen)
            right += (outputs.argmax(dim=1) == labels[chosen]).float().sum().item()
        assert metrics.train_loss == pytest.approx(loss_sum / 700, abs=1e-10)
        assert metrics.train_acc == pytest.approx(right / 700, abs=1e-9)
        with torch.no_grad():
            test_outputs = oracle(mini.test.images_NCHW.double() / 255)
        assert metrics.test_loss == pytest.approx(
            F.cross_entropy(test_outputs, mini.test.labels_N).item(), abs=1e-10
        )
        assert metrics.test_acc == (test_outputs.argmax(1) == mini.test.labels_N).double().mean().item()
    for mine, theirs in zip(network.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-9)


def test_validation_metrics_are_those_of_the_held_out_examples(setup, mini):
    (metrics,), network = train(setup, mini, "epochs=1", "lr=0.1")
    assert (metrics.val_loss, metrics.val_acc) == engine.evaluate(TorchBackend(network), mini.val)
    assert metrics.val_acc != metrics.test_acc


def test_short_run_equals_prefix_of_long_run(setup, mini):
    short, _ = train(setup, mini, "epochs=2", "lr=0.3", "schedule=step", "schedule.step_size=1")
    long, _ = train(setup, mini, "epochs=3", "lr=0.3", "schedule=step", "schedule.step_size=1")
    assert [numbers(m) for m in long[:2]] == [numbers(m) for m in short]


@pytest.mark.parametrize("threads", [1, 3])
def test_same_seed_gives_the_same_bits_and_another_seed_other_ones(setup, mini, threads):
    seeds = (0, 0, 1)
    runs = [train(setup, mini, "epochs=1", "lr=0.1", f"seed={seed}", threads=threads) for seed in seeds]
    first, again, other = ([numbers(m) for m in epochs] for epochs, _ in runs)
    assert first == again
    assert first != other


def test_curve_has_five_points_and_ends_in_the_epochs_own_numbers(setup, mini):
    (first, second), _ = train(setup, mini, "epochs=2", "batch_size=70")  # 10 steps an epoch
    assert [p.epoch for p in second.curve] == pytest.approx([1.2, 1.4, 1.6, 1.8, 2.0])
    for metrics in (first, second):
        assert metrics.curve[-1].train_loss == metrics.train_loss
        assert metrics.curve[-1].train_acc == metrics.train_acc


def test_epoch_of_fewer_than_five_steps_has_a_point_for_each(setup, mini):
    (metrics,), _ = train(setup, mini, "epochs=1", "batch_size=350")
    assert [p.epoch for p in metrics.curve] == [0.5, 1.0]


def test_host_reads_the_device_five_times_an_epoch_and_once_an_evaluation(setup, mini, monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or tolist(tensor))
    for reader in ("item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, reader, _refuse)
    train(setup, dataclasses.replace(mini, val=None), "epochs=2", "batch_size=70")
    assert len(reads) == 2 * (CURVE_POINTS + 1)


def _refuse(tensor, *_):
    raise AssertionError("the host waited for the device")


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_gradient_step_never_waits_for_the_device(setup, optimizer):
    # Tensors on the meta device have no values: whatever asks for one raises.
    _, network, _, _ = setup(f"optimizer={optimizer}")
    network = network.to("meta")
    steps = optim.optimizer(setup(f"optimizer={optimizer}")[0].optimizer, network.parameters())
    batch = Split(
        torch.empty(8, 1, 28, 28, dtype=torch.uint8, device="meta"),
        torch.empty(8, dtype=torch.int64, device="meta"),
    )
    totals = TorchBackend(network).gradients(batch, torch.empty(4, dtype=torch.int64, device="meta"))
    steps.step()
    assert totals.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        totals.tolist()


def test_forward_pass_stays_on_a_fake_gpu(setup):
    # Under FakeTensorMode an operation that mixes devices raises, as it would on a real GPU.
    _, network, _, _ = setup()
    with FakeTensorMode(allow_non_fake_inputs=True):
        gpu = torch.device("cuda")
        on_gpu = nn.Sequential(*(layer for layer in network)).to(gpu)
        split = Split(
            torch.empty(2500, 1, 28, 28, dtype=torch.uint8),
            torch.zeros(2500, dtype=torch.int64),
        ).to(gpu)
        batch = split.take(torch.randperm(2500).to(gpu)[:256])
        logits_NK = forward(on_gpu, batch.images_NCHW)
        assert logits_NK.device.type == "cuda"
        assert logits_NK.dtype == torch.float32
        assert TorchBackend(on_gpu).predict(split).device.type == "cuda"


def test_fake_gpu_catches_a_tensor_left_on_the_cpu(setup):
    # The oracle of the test above: it would see a mistake.
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(4, 1, 28, 28, dtype=torch.uint8, device="cuda")
        with pytest.raises((RuntimeError, TypeError), match="device"):
            forward(nn.Linear(28, 10, device="cpu"), images)


def test_loss_that_is_not_finite_ends_the_run_with_epoch_and_step(setup, mini):
    with pytest.raises(RunFailed, match=r"the loss became (nan|inf) in epoch 1, by step \d of 6"):
        train(
            setup, mini, "epochs=3", "lr=1000", "model=lenet_relu_max", "batch_size=128", "optimizer=momentum"
        )


def test_test_loss_that_is_not_finite_ends_the_run(setup, mini, monkeypatch):
    monkeypatch.setattr(engine, "evaluate", lambda *of: (float("nan"), 0.1))
    with pytest.raises(RunFailed, match="the test loss became nan after epoch 1"):
        train(setup, mini, "epochs=1", "lr=0.1")


@pytest.mark.parametrize("threads", [1, 2])
def test_evaluation_is_done_in_eval_mode_without_gradients_and_training_goes_on_in_train_mode(
    setup, mini, threads, monkeypatch
):
    monkeypatch.setattr(backend, "EVALUATION_BATCH", 500)  # all threads have something to do
    seen = []
    _, network, optimizer, schedule = setup("epochs=2")
    network.register_forward_hook(
        lambda module, inputs, output: seen.append((module.training, output.requires_grad, len(output)))
    )
    step = TorchBackend(network, threads=threads)
    list(engine.train(TrainingState(mini, step, optimizer, schedule), epochs=2, batch_size=350, seed=0))
    step.predict(mini.val)
    training = [(True, True, 350 // threads)] * threads * 2
    testing = [(False, False, 500 // threads)] * threads
    assert seen == [*training, *testing, (False, False, 100)] * 2 + [(False, False, 100)]


def test_evaluation_does_not_depend_on_its_batch_size(setup, mini, monkeypatch):
    _, network, _, _ = setup()
    whole = engine.evaluate(TorchBackend(network), mini.test)
    monkeypatch.setattr(backend, "EVALUATION_BATCH", 64)
    parts = engine.evaluate(TorchBackend(network), mini.test)
    assert parts == pytest.approx(whole, abs=1e-6)


def test_amp_changes_the_numbers_a_little_and_only_when_asked_for(setup, mini):
    (plain,), _ = train(setup, mini, "epochs=1", "lr=0.1")
    (half,), _ = train(setup, mini, "epochs=1", "lr=0.1", amp=True)
    assert plain.train_loss != half.train_loss
    assert plain.train_loss == pytest.approx(half.train_loss, rel=0.02)


def test_times_are_those_of_the_training_and_of_the_whole_epoch(setup, mini):
    started = time.perf_counter()
    epochs, _ = train(setup, mini, "epochs=2", "lr=0.1")
    took = time.perf_counter() - started
    for metrics in epochs:
        assert 0 < 700 / metrics.examples_per_s < metrics.epoch_s
    assert sum(metrics.epoch_s for metrics in epochs) < took


@pytest.mark.gpu
def test_gpu_learns_what_the_cpu_learns(setup, mini):
    gpu = torch.device("cuda")
    on_gpu = dataclasses.replace(mini, train=mini.train.to(gpu), test=mini.test.to(gpu), val=None)
    config, network, _, _ = setup("epochs=1", "lr=0.1")
    network = network.to(gpu)
    steps = optim.optimizer(config.optimizer, network.parameters())
    schedule = optim.schedule(config.schedule, steps, 1)
    state = TrainingState(on_gpu, TorchBackend(network), steps, schedule)
    (metrics,) = engine.train(state, epochs=1, batch_size=128, seed=0)
    (expected,), _ = train(setup, mini, "epochs=1", "lr=0.1", "batch_size=128")
    assert metrics.train_loss == pytest.approx(expected.train_loss, abs=1e-4)
