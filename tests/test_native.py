"""The compiled step against autograd, and its promises: same bits on any threads, no access out of bounds."""

import copy
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lenet_sweep.config import schema
from lenet_sweep.errors import DeviceError
from lenet_sweep.paths import cache_folder
from lenet_sweep.runs import hardware
from lenet_sweep.training import compiler, engine, model, native, optim
from lenet_sweep.training.backend import TorchBackend, choose_backend
from lenet_sweep.training.compiler import Unavailable
from lenet_sweep.training.data import Split, load_data
from lenet_sweep.training.native import NativeBackend
from lenet_sweep.training.randomness import generator
from lenet_sweep.training.state import TrainingState

CPU = torch.device("cpu")
GELU = (
    "model.channels=[3,17]", "model.kernel_size=1", "model.hidden=[1,50,21]", "model.activation=gelu",
    "model.pool=max",
)  # fmt: skip
# So wide that the optimizer's threads share the first dense layer's weights, in odd parts.
WIDE = ("model.activation=sigmoid", "model.pool=max", "model.hidden=[403,84]")
SINGLE = ("model.channels=[5]", "model.kernel_size=9", "model.hidden=[]")  # sigmoid, if nothing else is said
NETWORKS = [
    (),
    ("model=lenet_relu_max",),
    WIDE,
    (*SINGLE, "model.activation=tanh"),
    ("model.channels=[7,13,3]", "model.kernel_size=3", "model.hidden=[33]", "model.activation=leaky_relu",
     "model.pool=max"),
    ("model.channels=[2,4]", "model.kernel_size=5", "model.padding=none", "model.activation=silu"),
    GELU,
]  # fmt: skip
# The same activations in a LeNet's own shape. Each network takes two seconds to compile.
MORE = [
    ("model.activation=tanh", "model.pool=avg"),
    ("model.activation=leaky_relu", "model.pool=max"),
    ("model.activation=gelu", "model.pool=max"),
    ("model.activation=silu", "model.pool=avg"),
]


@pytest.fixture(scope="module", autouse=True)
def compiled(make_config):
    """Compile what most tests here load."""
    compile_all([make_config(*overrides).model for overrides in NETWORKS])


def compile_all(networks, flags=()):
    """The libraries of these networks, compiled on all cores: side by side that takes half as long."""
    with ThreadPoolExecutor(hardware.cores()) as pool:
        return list(pool.map(lambda network: compiler.library(network, flags), networks))


@pytest.fixture(scope="module")
def mini(make_config):
    config = make_config("data=fashion_mnist_mini")
    return load_data(config.data, seed=0, device=CPU, say=lambda line: None)


@pytest.fixture
def make_native(make_config):
    def make(*overrides, threads=2):
        config = make_config("data=fashion_mnist_mini", *overrides)
        return NativeBackend(model.build(config.model, generator(config.seed, "init")), config.model, threads)

    return make


@pytest.fixture(scope="module")
def noise():
    """Without the blank areas of real images, where all sums of a pool are equal and rounding picks one."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (300, 1, 28, 28), dtype=torch.uint8, generator=draw)
    return Split(images, torch.randint(10, (300,), generator=draw))


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gradients(step):
    return [parameter.grad.clone() for parameter in step.network.parameters()]


@pytest.mark.parametrize(
    "overrides",
    [*NETWORKS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE)],
    ids=lambda o: " ".join(o) or "lenet",
)
def test_gradients_and_totals_are_those_of_autograd_in_double_precision(make_native, noise, overrides):
    step = make_native(*overrides)
    for size in (1, 37, 256):
        indices = torch.randperm(300, generator=torch.Generator().manual_seed(size))[:size]
        totals = step.gradients(noise, indices).tolist()
        batch = noise.take(indices)
        oracle = copy.deepcopy(step.network).double()
        logits = oracle(batch.images_NCHW.double() / 255)
        loss = F.cross_entropy(logits, batch.labels_N)
        expected = torch.autograd.grad(loss, list(oracle.parameters()))
        assert totals[0] == pytest.approx(loss.item() * size, rel=1e-5)
        assert totals[1] == (logits.argmax(1) == batch.labels_N).sum().item()
        for found, gradient in zip(gradients(step), expected, strict=True):
            assert (found - gradient).norm() <= 2e-4 * gradient.norm() + 1e-7


@pytest.mark.parametrize("overrides", [(), ("model=lenet_relu_max",)])
@pytest.mark.parametrize("size", [3, 256, 700])
def test_number_of_threads_changes_no_bit(make_native, mini, overrides, size):
    indices = torch.randperm(2000)[:size]
    results = []
    for threads in (1, 2, 3, 8):
        step = make_native(*overrides, threads=threads)
        totals = step.gradients(mini.train, indices).tolist()
        results.append((totals, [g.tolist() for g in gradients(step)], step.totals(mini.test).tolist()))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_number_of_threads_changes_no_bit_of_the_trained_weights(make_config, mini, set_threads, optimizer):
    config = make_config("data=fashion_mnist_mini", f"optimizer={optimizer}", "lr=0.01", *WIDE)
    trained = []
    for threads in (1, 2, 3, 8):
        network = model.build(config.model, generator(0, "init"))
        step = NativeBackend(network, config.model, threads)
        steps = optim.optimizer(config.optimizer, network.parameters())
        set_threads(threads)
        for indices in torch.arange(500).split(100):
            step.gradients(mini.train, indices)
            steps.step()
        trained.append([weight.tolist() for weight in network.parameters()])
    assert all(weights == trained[0] for weights in trained)


def test_torch_has_one_thread_beside_those_of_a_step_and_all_of_them_again_afterwards(
    make_config, mini, set_threads
):
    set_threads(2)
    config = make_config("data=fashion_mnist_mini")
    seen = {}
    for make in (TorchBackend, lambda network: NativeBackend(network, config.model, 2)):
        step = make(model.build(config.model, generator(0, "init")))
        optimizer = optim.optimizer(config.optimizer, step.network.parameters())
        schedule = optim.schedule(config.schedule, optimizer, 1)
        threads = seen[step.name] = []
        for _ in engine.train(
            TrainingState(mini, step, optimizer, schedule),
            epochs=1,
            batch_size=400,
            seed=0,
            on_point=lambda _, threads=threads: threads.append(torch.get_num_threads()),
        ):
            assert torch.get_num_threads() == 2
    assert seen == {"torch": [1] * 5, "native": [1] * 5}


def test_training_follows_autograd(make_config, mini):
    config = make_config("data=fashion_mnist_mini", "epochs=2", "lr=0.5", "optimizer=momentum")
    curves = []
    for make in (TorchBackend, lambda network: NativeBackend(network, config.model, 2)):
        network = model.build(config.model, generator(0, "init"))
        optimizer = optim.optimizer(config.optimizer, network.parameters())
        schedule = optim.schedule(config.schedule, optimizer, 2)
        state = TrainingState(mini, make(network), optimizer, schedule)
        epochs = engine.train(state, epochs=2, batch_size=128, seed=0)
        curves.append([point.train_loss for metrics in epochs for point in metrics.curve])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_evaluation_and_prediction_are_those_of_autograd(make_native, mini):
    step = make_native("model=lenet_relu_max")
    oracle = TorchBackend(step.network)
    assert engine.evaluate(step, mini.test) == pytest.approx(engine.evaluate(oracle, mini.test), abs=1e-5)
    assert torch.equal(step.predict(mini.test), oracle.predict(mini.test))


def test_gradients_that_were_taken_away_are_noticed(make_native, mini):
    step = make_native()
    step.network.zero_grad()
    with pytest.raises(AssertionError, match="zero_grad"):
        step.gradients(mini.train, torch.arange(10))


def test_instances_share_nothing(make_native, mini):
    first, second = make_native("seed=1"), make_native("seed=2", threads=1)
    some, others = torch.arange(100), torch.arange(100, 160)
    first.gradients(mini.train, some)
    alone = [gradient.tolist() for gradient in gradients(first)]
    second.gradients(mini.train, others)
    assert [gradient.tolist() for gradient in gradients(first)] == alone
    first.gradients(mini.train, some)
    assert [gradient.tolist() for gradient in gradients(first)] == alone


@pytest.mark.parametrize("overrides", [(), ("model=lenet_relu_max",), GELU])
def test_a_weight_that_is_no_number_shows_in_the_loss(make_native, mini, overrides):
    step = make_native(*overrides)
    with torch.no_grad():
        next(step.network.parameters())[0, 0, 0, 0] = float("nan")
    assert torch.isnan(step.gradients(mini.train, torch.arange(50))[0])
    assert torch.isnan(step.totals(mini.test)[0])


def test_denormal_numbers_survive_in_the_process(make_native, mini):
    make_native().gradients(mini.train, torch.arange(64))
    assert (np.float32(1e-40) * np.float32(0.5)) > 0
    assert (torch.tensor([1e-40]) * 0.5).item() > 0


def test_a_step_that_differs_from_autograd_is_not_used(make_native, monkeypatch):
    definitions = compiler._definitions
    monkeypatch.setattr(native, "_checked", set())
    monkeypatch.setattr(
        compiler, "_definitions", lambda c: [d.replace("=Sigmoid", "=Tanh") for d in definitions(c)]
    )
    with pytest.raises(Unavailable, match="differ from autograd"):
        make_native(*SINGLE)  # as compiled code it is one of NETWORKS


def test_too_large_a_network_is_left_to_torch(make_native, monkeypatch):
    monkeypatch.setattr(native, "MAX_WORKSPACE_BYTES", 1000)
    with pytest.raises(Unavailable, match="working memory"):
        make_native()


def test_auto_takes_the_native_step_and_falls_back_with_a_reason(make_config, monkeypatch):
    config = make_config("data=fashion_mnist_mini")
    network = model.build(config.model, generator(0, "init"))
    step, why = choose_backend(network, CPU, config.model, "auto", amp=False)
    assert (step.name, why) == ("native", None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    step, why = choose_backend(network, CPU, config.model, "auto", amp=False)
    assert step.name == "torch"
    assert "no C++ compiler" in why
    with pytest.raises(DeviceError, match="backend=native: no C"):
        choose_backend(network, CPU, config.model, "native", amp=False)


def test_every_activation_and_pool_of_the_config_has_a_module_and_a_struct():
    source = compiler.SOURCE.read_text(encoding="utf-8")
    for names, modules, structs in (
        (schema.Activation, model.ACTIVATIONS, compiler.NATIVE_ACTIVATIONS),
        (schema.Pool, model.POOLS, compiler.NATIVE_POOLS),
    ):
        assert set(get_args(names)) == set(modules) == set(structs)
        assert len(set(structs.values())) == len(structs)
        for struct in structs.values():
            assert re.search(rf"^struct {struct} {{", source, re.MULTILINE), struct


def test_every_activation_and_pool_is_compared_with_autograd(make_config):
    compared = [make_config(*overrides).model for overrides in NETWORKS]
    assert {network.activation for network in compared} == set(model.ACTIVATIONS)
    assert {network.pool for network in compared} == set(model.POOLS)


@pytest.mark.parametrize(("table", "name"), [("NATIVE_ACTIVATIONS", "activation"), ("NATIVE_POOLS", "pool")])
def test_layer_without_a_struct_falls_back_to_torch_with_a_reason(make_config, monkeypatch, table, name):
    config = make_config("data=fashion_mnist_mini").model
    missing = getattr(config, name)
    structs = {key: struct for key, struct in getattr(compiler, table).items() if key != missing}
    monkeypatch.setattr(compiler, table, structs)
    network = model.build(config, generator(0, "init"))
    step, why = choose_backend(network, CPU, config, "auto", amp=False)
    assert step.name == "torch"
    assert f"it does not support {name}={missing}" in why
    with pytest.raises(DeviceError, match=f"backend=native: it does not support {name}={missing}"):
        choose_backend(network, CPU, config, "native", amp=False)


def test_amp_and_other_devices_take_torchs_step_without_a_word(make_config):
    config = make_config("data=fashion_mnist_mini").model
    step, why = choose_backend(model.build(config, generator(0, "init")), CPU, config, "auto", amp=True)
    assert (step.name, why) == ("torch", None)


def test_command_without_compiler_says_so_in_one_line_and_trains(command_in, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    done = command_in(tmp_path, "+debug=fast", "tracking=none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the native backend is not available") == 1


def test_many_processes_compile_once_and_all_get_it(tmp_path):
    code = textwrap.dedent("""
        import sys
        from lenet_sweep.training import compiler
        from lenet_sweep.config.schema import ModelConfig
        config = ModelConfig(name="x", activation="tanh", pool="max", channels=(2,), kernel_size=5,
                             padding="first", hidden=(), init="pytorch")
        compiled = []
        run = compiler._compile
        compiler._compile = lambda command: (compiled.append(1), run(command))
        path = compiler.library(config)
        import ctypes
        ctypes.CDLL(str(path)).gradients
        print(path, len(compiled))
    """)
    env = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    lines = [process.communicate(timeout=120)[0].split() for process in started]
    assert len({path for path, _ in lines}) == 1
    assert sorted(count for _, count in lines) == ["0", "0", "0", "1"]


def test_cache_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "lenet_sweep").mkdir()
    (tmp_path / "lenet_sweep").chmod(0o777)
    assert tmp_path not in cache_folder().parents


def test_flags_and_network_decide_the_librarys_name(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "_compile", lambda command: None)
    lenet, other = make_config().model, make_config("model.pool=max").model
    names = {compiler.library(lenet), compiler.library(other), compiler.library(lenet, ("-O1",))}
    assert len(names) == 3
    assert compiler.library(lenet) in names


SANITIZED = """
import ctypes, sys
library, parameters = ctypes.CDLL(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")]
libc = ctypes.CDLL(None)
P, L = ctypes.c_void_p, ctypes.c_int64
library.workspace_bytes.restype = L
library.workspace_bytes.argtypes = [ctypes.c_int, L]
library.gradients.argtypes = [P] * 5 + [L, ctypes.c_int] + [P] * 2
library.evaluate.argtypes = [P] * 3 + [L, ctypes.c_int] + [P] * 3

def zeros(size):  # with guards of the sanitizer right before and after
    memory = P()
    libc.posix_memalign(ctypes.byref(memory), ctypes.c_size_t(64), ctypes.c_size_t(size))
    ctypes.memset(memory, 0, size)
    return memory.value

tensors = [zeros(4 * n) for n in parameters]
gradients = [zeros(4 * n) for n in parameters]
pointers = lambda of: (P * len(of))(*of)
images, labels = zeros(300 * 784), zeros(300 * 8)
ctypes.memset(images, 200, 300 * 784)
for size, threads in ((1, 1), (16, 2), (37, 3), (300, 2)):
    indices = zeros(8 * size)
    (L * size).from_address(indices)[:] = range(300 - size, 300)
    workspace, totals = zeros(library.workspace_bytes(threads, size)), zeros(16)
    library.gradients(pointers(tensors), pointers(gradients), images, labels, indices, size, threads,
                      workspace, totals)
    library.evaluate(pointers(tensors), images, labels, size, threads, workspace, totals, zeros(8 * size))
    assert (ctypes.c_double * 2).from_address(totals)[1] == size
print("clean")
"""


@pytest.fixture(scope="module")
def sanitized(make_config):
    """The library of each network with the sanitizers in it."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
    networks = [make_config(*overrides).model for overrides in NETWORKS]
    return dict(zip(networks, compile_all(networks, flags), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", NETWORKS, ids=lambda o: " ".join(o) or "lenet")
def test_sanitizers_find_no_access_out_of_bounds_and_nothing_undefined(make_config, sanitized, overrides):
    config = make_config(*overrides).model
    library = sanitized[config]
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    sizes = [p.numel() for p in model.build(config, generator(0, "init")).parameters()]
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library), ",".join(map(str, sizes))],
        env={"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "clean\n", done.stderr[-3000:]


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        ("a.cpp:1: note: here\na.cpp:2:3: error: bad thing\na.cpp:4: error: worse", "bad thing"),
        ("ld: cannot find -lm\n", "ld: cannot find -lm\n"),
        ("x" * 300, "x" * 200),
    ],
)
def test_first_error_of_a_failed_compilation_is_told(monkeypatch, stderr, told):
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(compiler.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Unavailable) as caught:
        compiler._compile(["g++"])
    assert str(caught.value) == f"the compiler failed: {told}"


def test_compiler_that_cannot_run_is_told(tmp_path):
    with pytest.raises(Unavailable, match=r"the compiler could not run: .*Permission denied"):
        compiler._compile([str(tmp_path)])


def test_native_backend_is_likely_where_a_compiler_is_and_amp_is_not(monkeypatch):
    answers = [compiler.native_is_likely(*of) for of in (("auto", False), ("native", False))]
    assert answers == [True, True]
    assert not compiler.native_is_likely("torch", False)
    assert not compiler.native_is_likely("auto", True)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert not compiler.native_is_likely("auto", False)
