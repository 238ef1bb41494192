"""Runs trained as one array against the same runs trained alone by `engine.train`."""

import contextlib
import dataclasses
import functools
import itertools
import math
import random
from types import SimpleNamespace

import psutil
import pytest
import torch

from lenet_sweep.config.schema import ConstantScheduleConfig, CosineScheduleConfig, StepScheduleConfig
from lenet_sweep.errors import RunFailed
from lenet_sweep.sweeps import plan
from lenet_sweep.training import backend, cuda_graph, engine, fused, model, optim
from lenet_sweep.training.backend import TorchBackend
from lenet_sweep.training.data import Data, Split, load_data
from lenet_sweep.training.metrics import CURVE_POINTS, EpochMetrics
from lenet_sweep.training.randomness import generator
from lenet_sweep.training.state import TrainingState

CPU = torch.device("cpu")
BATCH = 16  # of 40 examples: two whole batches and a half one
PRESETS = ("lenet", "lenet_relu_max")
LRS = {"sgd": 0.3, "momentum": 0.1, "nesterov": 0.1, "adam": 0.003, "adamw": 0.003}

CONSTANT = ConstantScheduleConfig(name="constant")
STEP = StepScheduleConfig(name="step", step_size=1, gamma=0.5)
COSINE = CosineScheduleConfig(name="cosine", eta_min=0.0)
RUNS = (  # lr relative to LRS, seed, epochs, schedule
    (1.0, 0, 2, CONSTANT),
    (0.5, 1, 3, COSINE),
    (2.0, 2, 1, CONSTANT),
    (0.7, 0, 3, STEP),
    (0.1, 3, 2, COSINE),
    (1.1, 4, 1, STEP),
    (0.9, 1, 2, CONSTANT),
    (0.3, 5, 3, CONSTANT),
)


@pytest.fixture(scope="module")
def mini(make_config):
    config = make_config("data=fashion_mnist_mini", "data.train_size=40", "data.val_size=10")
    data = load_data(config.data, seed=0, device=CPU, say=lambda line: None)
    return dataclasses.replace(data, test=data.test.take(torch.arange(30)))


@pytest.fixture(scope="module")
def member(make_config):
    """A fresh run: member("model.pool=max", lr=0.1, seed=2), in float64 unless asked otherwise.

    `numbers` are the optimizer's. To compose a config for each run would take most of the tests' time.
    """

    def make(*overrides, seed=0, epochs=1, schedule=CONSTANT, dtype=torch.float64, device=CPU, **numbers):
        config = make_config("data=fashion_mnist_mini", *overrides)
        network = model.build(config.model, generator(seed, "init")).to(device, dtype)
        optimizer = optim.optimizer(dataclasses.replace(config.optimizer, **numbers), network.parameters())
        return fused.Member(network, optimizer, optim.schedule(schedule, optimizer, epochs), seed, epochs)

    return make


@pytest.fixture(scope="module")
def nth(member):
    """The run of `RUNS[i]`, fresh."""

    def make(preset, optimizer, i, **changes):
        factor, seed, epochs, schedule = RUNS[i]
        fields = {"lr": LRS[optimizer] * factor, "weight_decay": 0.01 * seed, "seed": seed}
        fields |= {"epochs": epochs, "schedule": schedule}
        return member(f"model={preset}", f"optimizer={optimizer}", **fields | changes)

    return make


def alone(member, data, amp=False, **options):
    """Train `member` by the engine; return its metrics."""
    return list(
        engine.train(
            TrainingState(data, TorchBackend(member.network, amp), member.optimizer, member.schedule),
            epochs=member.epochs,
            seed=member.seed,
            first_epoch=member.first_epoch,
            **{"batch_size": BATCH, **options},
        )
    )


def together(members, data, **options):
    """Train `members` as an array; return what each yielded."""
    results = [[] for _ in members]
    for index, result in fused.train(members, data, **{"batch_size": BATCH, **options}):
        results[index].append(result)
    return results


def assert_same(result, expected, tolerance):
    """All that an epoch's metrics say but how long it took, or all that an optimizer's state holds."""
    if isinstance(expected, EpochMetrics):
        skipped = {"examples_per_s": 0.0, "epoch_s": 0.0}
        result, expected = (dataclasses.asdict(m) | skipped for m in (result, expected))
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for key in expected:
            assert_same(result[key], expected[key], tolerance)
    elif isinstance(expected, list | tuple):
        for ours, theirs in zip(result, expected, strict=True):
            assert_same(ours, theirs, tolerance)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=0)
    elif isinstance(expected, float):
        assert result == pytest.approx(expected, abs=tolerance, rel=0)
    else:
        assert result == expected


def assert_same_state(member, oracle, tolerance):
    """What a checkpoint would hold, and the mode that the network is left in."""
    for part in ("network", "optimizer", "schedule"):
        ours, theirs = (getattr(m, part).state_dict() for m in (member, oracle))
        assert_same(ours, {k: v for k, v in theirs.items() if k != "lr_lambdas"} | _lambdas(ours), tolerance)
    assert member.network.training == oracle.network.training


def _lambdas(state):
    return {key: value for key, value in state.items() if key == "lr_lambdas"}


@pytest.fixture(scope="module")
def oracle(nth, mini):
    """The run of `RUNS[i]` trained alone, and its metrics; each is trained once."""

    @functools.cache
    def train(preset, optimizer, i):
        run = nth(preset, optimizer, i)
        return run, alone(run, mini)

    return train


FEW = [(optimizer, *of) for optimizer in LRS for of in (("lenet", 1), ("lenet_relu_max", 3))]
ALL = [(optimizer, PRESETS[i % 2], len(RUNS)) for i, optimizer in enumerate(LRS)]


@pytest.mark.parametrize(("optimizer", "preset", "size"), [*FEW, *ALL])
def test_run_in_an_array_of_any_order_equals_the_run_alone(nth, mini, oracle, preset, optimizer, size):
    chosen = random.Random(size).sample(range(len(RUNS)), size)
    members = [nth(preset, optimizer, i) for i in chosen]
    results = together(members, mini)
    for i, run, result in zip(chosen, members, results, strict=True):
        expected_run, expected = oracle(preset, optimizer, i)
        assert_same(result, expected, 1e-10)
        assert_same_state(run, expected_run, 1e-10)


@pytest.mark.parametrize("optimizer", LRS)
@pytest.mark.parametrize("preset", PRESETS)
def test_in_float32_it_equals_it_but_for_rounding(nth, mini, preset, optimizer):
    # An epoch of three steps: with ReLU and max pooling, rounding grows tenfold every few steps.
    # Where a gradient is nothing but rounding, Adam divides it by itself; a larger eps lets it vanish.
    eps = {"eps": 1e-4} if optimizer.startswith("adam") else {}

    def make(i):
        return nth(preset, optimizer, i, epochs=1, dtype=torch.float32, **eps)

    members = [make(i) for i in range(3)]
    for i, result in enumerate(together(members, mini)):
        solo = make(i)
        assert_same(result, alone(solo, mini), 1e-5)
        assert_same_state(members[i], solo, 1e-5)
        assert {p.dtype for p in members[i].network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "kinds",
    [
        [("sgd", {}), ("momentum", {}), ("nesterov", {}), ("momentum", {"momentum": 0.5})],
        [("adam", {}), ("adamw", {}), ("adam", {"betas": (0.5, 0.9), "eps": 0.1})],
    ],
)
def test_optimizers_of_a_kind_can_share_an_array(member, mini, kinds):
    def make(kind):
        name, numbers = kind
        return member(f"optimizer={name}", lr=0.01, weight_decay=0.1, epochs=2, **numbers)

    members = [make(kind) for kind in kinds]
    for run, kind, result in zip(members, kinds, together(members, mini), strict=True):
        solo = make(kind)
        assert_same(result, alone(solo, mini), 1e-10)
        assert_same_state(run, solo, 1e-10)


def test_one_batch_serves_all_runs_whose_orders_agree_and_only_those(member, mini, monkeypatch):
    gathered = []
    take = Split.take
    monkeypatch.setattr(Split, "take", lambda split, i: gathered.append(tuple(i.shape)) or take(split, i))
    runs = [{"lr": 0.1, "seed": 7}, {"lr": 0.2, "seed": 7}, {"lr": 0.2, "seed": 8}]
    results = together([member(**run) for run in runs[:2]], mini)
    assert gathered == [(16,), (16,), (8,)]
    gathered.clear()
    together([member(**run) for run in runs], mini)
    assert gathered == [(3, 16), (3, 16), (3, 8)]
    gathered.clear()
    later = member(seed=7, epochs=2)
    later.first_epoch = 2
    together([member(**runs[0]), later], mini)
    assert gathered[0] == (2, 16)
    for run, result in zip(runs[:2], results, strict=True):
        assert_same(result, alone(member(**run), mini), 1e-10)


def test_members_come_in_turn_and_leave_after_their_last_epoch_or_when_stopped(member, mini):
    members = [member(lr=0.1, seed=seed, epochs=epochs) for seed, epochs in ((0, 3), (1, 1), (2, 9))]
    turns, left = [], {}
    for index, metrics in fused.train(members, mini, batch_size=BATCH):
        turns.append((index, metrics.epoch))
        if (index, metrics.epoch) in ((1, 1), (2, 2)):
            members[index].stopped = True
            left[index] = {k: t.clone() for k, t in members[index].network.state_dict().items()}
    assert turns == [(0, 1), (1, 1), (2, 1), (0, 2), (2, 2), (0, 3)]
    for index, weights in left.items():
        assert_same(members[index].network.state_dict(), weights, 0)


def test_state_of_a_member_shares_no_memory_with_the_array(member, mini):
    # safetensors refuses tensors that share memory, and the array's is overwritten.
    run = member("optimizer=nesterov", lr=0.1)
    together([run, member("optimizer=nesterov", lr=0.1, seed=1)], mini)
    held = [*run.network.parameters(), *(state["momentum_buffer"] for state in run.optimizer.state.values())]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in held)


def test_networks_with_other_layers_are_kept_out(member, mini):
    with pytest.raises(AssertionError, match="same layers"):
        together([member(), member("model.activation=relu")], mini)


def test_no_members_and_members_at_their_end_yield_nothing(member, mini):
    done = member(epochs=2)
    done.first_epoch = 3
    assert together([], mini) == []
    assert together([done], mini) == [[]]


@pytest.mark.parametrize("optimizer", LRS)
def test_either_path_goes_on_where_the_other_stopped(nth, mini, oracle, optimizer):
    def switched(first, second, run):
        epochs, run.epochs = run.epochs, 1
        metrics = first(run)
        run.epochs, run.first_epoch = epochs, 2
        return metrics + second(run)

    def by_engine(run):
        return alone(run, mini)

    def by_array(run):
        # Beside a run that has momentum and is in another epoch.
        other = {"adam": "adamw", "adamw": "adam"}.get(optimizer, "nesterov")
        beside = nth("lenet_relu_max", other, 7)
        return together([beside, run], mini)[1]

    expected_run, expected = oracle("lenet_relu_max", optimizer, 1)
    for first, second in itertools.permutations((by_engine, by_array)):
        run = nth("lenet_relu_max", optimizer, 1)
        assert_same(switched(first, second, run), expected, 1e-10)
        assert_same_state(run, expected_run, 1e-10)


@pytest.mark.parametrize("batch_size", [10, 40])  # 40: it shows only after the epoch's one step
def test_run_whose_loss_is_no_number_fails_alone_and_with_the_engines_words(member, mini, batch_size):
    def make(i):
        run = member("model=lenet_relu_max", lr=0.1, seed=i, epochs=2)
        if i == 1:
            run.optimizer.param_groups[0]["lr"] = run.schedule.base_lrs[0] = 1e200
        return run

    points = []
    results = together(
        [make(i) for i in range(3)],
        mini,
        batch_size=batch_size,
        on_point=lambda i, point: points.append((i, point)),
    )
    with pytest.raises(RunFailed) as failure:
        alone(make(1), mini, batch_size=batch_size)
    ((error,),) = results[1:2]
    assert isinstance(error, RunFailed)
    assert str(error) == str(failure.value)
    assert all(math.isfinite(point.train_loss) for _, point in points)
    for i in (0, 2):
        expected = alone(make(i), mini, batch_size=batch_size)
        assert_same(results[i], expected, 1e-10)
        assert [p for index, p in points if index == i] == [p for m in results[i] for p in m.curve]


def test_speed_is_of_the_runs_own_examples(member, mini, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(fused.time, "perf_counter", lambda: next(ticks))  # start, trained, evaluated
    for (metrics,) in together([member(seed=i) for i in range(3)], mini):
        assert (metrics.examples_per_s, metrics.epoch_s) == (40, 2)


def test_without_held_out_examples_there_are_no_val_metrics(member, mini):
    ((metrics,),) = together([member()], dataclasses.replace(mini, val=None))
    assert (metrics.val_loss, metrics.val_acc) == (None, None)


def test_evaluation_does_not_depend_on_its_batch_size(member, mini, monkeypatch):
    array = fused._Array([0, 1], [member(seed=i) for i in range(2)], mini, amp=False)
    whole = array.evaluate(mini.test)
    monkeypatch.setattr(backend, "EVALUATION_BATCH", 17)
    assert_same(array.evaluate(mini.test), whole, 1e-12)


def test_amp_rounds_as_it_does_alone(member, mini):
    def make(seed):
        return member("model=lenet_relu_max", lr=0.1, seed=seed, dtype=torch.float32)

    halves = together([make(0), make(1)], mini, amp=True)
    fulls = together([make(0), make(1)], mini)
    for seed in range(2):
        (expected,), (half,), (full,) = alone(make(seed), mini, amp=True), halves[seed], fulls[seed]
        assert half.train_loss == pytest.approx(expected.train_loss, abs=2e-3)
        assert half.train_loss != full.train_loss


def test_host_reads_the_device_five_times_an_epoch_and_once_an_evaluation(member, mini, monkeypatch):
    members = [member(seed=i) for i in range(3)]
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or tolist(tensor))
    for reader in ("item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, reader, _refuse)
    together(members, dataclasses.replace(mini, val=None), batch_size=4)
    assert len(reads) == CURVE_POINTS + 1


def _refuse(tensor, *_):
    raise AssertionError("the host waited for the device")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_step_never_waits_for_the_device_and_leaves_every_tensor_in_its_place(member, optimizer, preset):
    # A CUDA graph demands both. Tensors on the meta device have no values: whatever asks for one raises.
    def array_on(device):
        members = [member(f"model={preset}", f"optimizer={optimizer}", seed=i) for i in range(2)]
        for run in members:
            run.network.to(device)
        images = torch.empty(64, 1, 28, 28, dtype=torch.uint8, device=device).zero_()
        split = Split(images, torch.zeros(64, dtype=torch.int64, device=device))
        return fused._Array([0, 1], members, Data(split, split, None, ()), amp=False)

    array_on(torch.device("meta")).step(torch.zeros(2, 8, dtype=torch.int64, device="meta"))
    array = array_on(CPU)
    held = [array.weights_RP, array.steps_R, array.totals_R2, *array.slots.values(), *array.rates.values()]
    before = [tensor.clone() for tensor in held]
    array.begin_epoch()
    array.step(torch.zeros(8, dtype=torch.int64))
    now = [array.weights_RP, array.steps_R, array.totals_R2, *array.slots.values(), *array.rates.values()]
    assert [t.data_ptr() for t in now] == [t.data_ptr() for t in held]
    assert not any(torch.equal(old, new) for old, new in zip(before[:3], now[:3], strict=True))


class FakeGraphs:
    """torch.cuda's part in capturing: what is called meanwhile is kept, and done when it is replayed."""

    def __init__(self, monkeypatch, refuses=False):
        self.captured, self.replays, self.refuses = None, 0, refuses
        stream = SimpleNamespace(wait_stream=lambda other: None, device=CPU)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(work=[]))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        if self.refuses:  # as torch.cuda.graph does: it ends the capture, which raises another error
            try:
                raise ValueError("a copy to the CPU")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        self.captured = graph
        graph.replay = lambda: self.replay(graph)
        yield
        self.captured = None

    def replay(self, graph):
        self.replays += 1
        for work in graph.work:
            work()

    def recordable(self, step):
        def call(indices):
            work = functools.partial(step, indices)
            if self.captured:
                self.captured.work.append(work)
            else:
                work()

        return call


@pytest.mark.parametrize("refuses", [False, True])
def test_replayed_graphs_do_the_steps_that_were_asked_for(member, mini, monkeypatch, caplog, refuses):
    gpu = FakeGraphs(monkeypatch, refuses)
    plain, graphed = (
        fused._Array([0, 1], [member(seed=i) for i in range(2)], mini, amp=False) for _ in range(2)
    )
    step = cuda_graph.GraphedStep(gpu.recordable(graphed.step), CPU)
    order_RN = torch.stack([torch.randperm(40, generator=generator(i, "order/1")) for i in range(2)])
    for array in (plain, graphed):
        array.begin_epoch()
    for _ in range(5):
        for indices_RN in order_RN.split(BATCH, dim=-1):
            plain.step(indices_RN)
            step(indices_RN)
    assert torch.equal(graphed.weights_RP, plain.weights_RP)
    assert torch.equal(graphed.totals_R2, plain.totals_R2)
    # Ten whole batches and five half ones, WARM_UP of each carried out before there is a graph.
    assert gpu.replays == (0 if refuses else 15 - 2 * cuda_graph.WARM_UP)
    failed = ["CUDA graph capture failed, so all steps run eagerly: a copy to the CPU"]
    assert caplog.messages == (failed if refuses else [])


MAY_DIFFER = ("lr=0.3", "epochs=3", "seed=5", "model.init=pytorch", "optimizer=nesterov", "schedule=cosine",
              "optimizer.weight_decay=0.1", "target_loss=0.1", "tracking=none")  # fmt: skip
MUST_AGREE = ("batch_size=64", "device=cpu", "threads=1", "precision.amp=true", "optimizer=adam",
              "model.pool=max", "model.activation=relu", "model.channels=[6,12]",
              "data=fashion_mnist_mini", "data.train_size=100")  # fmt: skip


def test_array_key_tells_which_runs_can_share_an_array(make_config):
    key = plan.array_key(make_config())
    assert [o for o in MAY_DIFFER if plan.array_key(make_config(o)) != key] == []
    assert [o for o in MUST_AGREE if plan.array_key(make_config(o)) == key] == []
    assert plan.array_key(make_config("optimizer=adam")) == plan.array_key(make_config("optimizer=adamw"))


@pytest.mark.parametrize("chosen", ["data.train_size=100", "data.val_size=100"])
def test_seeds_must_agree_where_they_choose_the_examples(make_config, chosen):
    keys = [
        plan.array_key(make_config(chosen, f"seed={seed}", lr))
        for seed, lr in ((0, "lr=1"), (0, "lr=2"), (1, "lr=1"))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_width_follows_free_memory(member, monkeypatch):
    def width(free, batch_size=256, dtype=torch.float32):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        return fused.width(CPU, member(dtype=dtype).network, batch_size)

    gigabyte = 10**9
    assert width(0) == 1
    assert 30 <= width(8 * gigabyte) <= 100
    assert width(16 * gigabyte) == pytest.approx(2 * width(8 * gigabyte), abs=1)
    assert width(16 * gigabyte, dtype=torch.float64) == width(8 * gigabyte)
    assert width(8 * gigabyte, batch_size=2560) < width(8 * gigabyte) / 3
    assert width(10**6 * gigabyte) * 1000 * 6 * 28 * 28 <= 2**31  # the first layer's outputs for all runs


def test_memory_that_an_earlier_array_left_to_the_allocator_counts_as_free(member, monkeypatch):
    gpu, network = torch.device("cuda", 0), member(dtype=torch.float32).network
    free, reserved, allocated = 10**9, 9 * 10**9, 2 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 10**9))
    assert fused.width(gpu, network, 256) == fused.width(CPU, network, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", LRS)
def test_on_a_gpu_graphs_give_what_the_run_alone_gives_within_the_promised_memory(member, mini, optimizer):
    gpu = torch.device("cuda")
    data = dataclasses.replace(mini, train=mini.train.to(gpu), test=mini.test.to(gpu), val=None)

    def make(i):
        # Five epochs: even the half batch, once an epoch, is replayed after WARM_UP.
        numbers = {"lr": LRS[optimizer], "seed": i % 4, "epochs": 5 - i % 2}
        return member(f"optimizer={optimizer}", device=gpu, **numbers)

    members = [make(i) for i in range(8)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = together(members, data)
    assert torch.cuda.max_memory_allocated() - before <= 8 * fused.run_bytes(members[0].network, BATCH)
    for i, (run, result) in enumerate(zip(members, results, strict=True)):
        solo = make(i)
        assert_same(result, alone(solo, data), 1e-9)
        assert_same_state(run, solo, 1e-9)


@pytest.mark.gpu
def test_on_a_gpu_the_step_can_be_captured(member, mini):
    gpu = torch.device("cuda")
    data = dataclasses.replace(mini, train=mini.train.to(gpu), test=mini.test.to(gpu), val=None)
    members = [member(seed=i, device=gpu) for i in range(2)]
    array = fused._Array([0, 1], members, data, amp=False)
    step = cuda_graph.GraphedStep(array.step, gpu)
    for _ in range(cuda_graph.WARM_UP + 1):
        step(torch.arange(8, device=gpu))
    assert [shape for shape, _ in step._graphs.items()] == [(8,)]
