"""The card by itself: what it is, how exact its products are, how fast it can be at best."""

import importlib.metadata
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch import Tensor

from lenet_sweep import shapes
from lenet_sweep.config.schema import PrecisionConfig
from lenet_sweep.runs import hardware
from lenet_sweep.shapes import CLASSES, IMAGE_SHAPE
from lenet_sweep.training import devices
from tools.gpu.record import DEVICE, ON_GPU, SMALL, StepRecord
from tools.gpu.workload import BATCH, config_of, synchronize

FLOAT32_ERROR = 1e-5  # relative; float32 products err by about 1e-7, TF32 products by about 3e-4


def facts(record: StepRecord) -> None:
    """Describe the card and torch, and check that products are float32 when TF32 is off."""
    record.keep(
        torch=torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
        python=sys.version.split()[0], gpus_without_torch=hardware.here().gpus, unmet=unmet_requirements(),
    )  # fmt: skip
    if ON_GPU:
        record.claim("torch sees a CUDA GPU", torch.cuda.is_available())
        record.keep(**card())
        seen = record.values["gpus_without_torch"]
        record.claim(
            "runs.hardware counts the GPUs that torch sees", seen == torch.cuda.device_count(), f"{seen}"
        )
    check_precision(record)
    missing = [text for text in record.values["unmet"] if text.endswith("is missing")]
    record.claim("every requirement is installed", not missing, ", ".join(missing))
    other = len(record.values["unmet"]) - len(missing)
    record.summarize(
        f"{record.values.get('name', DEVICE)}, torch {torch.__version__}, cuDNN {record.values['cudnn']}",
        f"{other} packages of another version than required" if other else "",
    )


def card() -> dict[str, Any]:
    """The properties of the first GPU."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
    }


def check_precision(record: StepRecord) -> None:
    """Compare products with float64, with TF32 off and on, and keep the switches that torch then has."""
    for tf32 in (True, False):
        label = f"tf32={str(tf32).lower()}"
        with record.attempt(label):
            devices.set_arithmetic("auto", PrecisionConfig(tf32=tf32, amp=False))
            errors = product_errors()
            record.keep(**{label: {"switches": switches(), "relative_errors": errors}})
            if not tf32:
                large = {name: f"{error:.1e}" for name, error in errors.items() if error > FLOAT32_ERROR}
                record.claim(f"products are float32 with precision.{label}", not large, f"{large or ''}")


def switches() -> dict[str, Any]:
    cudnn: Any = torch.backends.cudnn
    deterministic: Any = torch.utils.deterministic
    return {
        "matmul": torch.backends.cuda.matmul.fp32_precision,
        "cudnn": cudnn.fp32_precision,
        "cudnn.conv": cudnn.conv.fp32_precision,
        "cudnn.deterministic": cudnn.deterministic,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "fill_uninitialized_memory": deterministic.fill_uninitialized_memory,
    }


def product_errors() -> dict[str, float]:
    """Relative errors against float64 of the products of a step, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    errors: dict[str, float] = {}
    for name, groups in (("conv", 1), ("grouped conv", 4)):
        x, w = normal(64, 6 * groups, 14, 14), normal(16 * groups, 6, 5, 5)
        g = normal(64, 16 * groups, 10, 10)
        errors |= {f"{name} {part}": e for part, e in convolution_errors(x, w, g, groups).items()}
    for name, batch in (("matmul", ()), ("batched matmul", (8,))):
        a, b = normal(*batch, 256, 400), normal(*batch, 400, 120)
        errors[name] = relative_error(a @ b, a.double() @ b.double())
    return errors


def convolution_errors(x: Tensor, w: Tensor, g: Tensor, groups: int) -> dict[str, float]:
    """Errors of a convolution of `x` with `w`, and of both gradients for the output's gradient `g`."""
    backward = torch.ops.aten.convolution_backward
    rest = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups, [True, True, False])
    exact = backward(g.double(), x.double(), w.double(), *rest)
    values = backward(g, x, w, *rest)
    forward = F.conv2d(x, w, groups=groups), F.conv2d(x.double(), w.double(), groups=groups)
    return {
        "output": relative_error(*forward),
        "input gradient": relative_error(values[0], exact[0]),
        "weight gradient": relative_error(values[1], exact[1]),
    }


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def unmet_requirements() -> list[str]:
    """Requirements of the project, and of the packages that it requires, which are not met here."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting, seen, problems = list(project["dependencies"]), {"torch"}, set()
    while waiting:
        need = Requirement(waiting.pop())
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            problems.add(f"{need.name} is missing")
            continue
        if not need.specifier.contains(version, prereleases=True):
            problems.add(f"{need} is required, {version} is installed")
        if need.name.lower() not in seen:
            seen.add(need.name.lower())
            waiting += importlib.metadata.requires(need.name) or []
    return sorted(problems)


def peaks(record: StepRecord) -> None:
    """Measure matrix products in three precisions and a copy: the bounds of any training step."""
    flops = shapes.training_flops(config_of("sigmoid/avg").model, IMAGE_SHAPE, CLASSES)
    record.keep(flops_per_example=flops)
    kinds = {
        "float32": (torch.float32, "ieee"),
        "tf32": (torch.float32, "tf32"),
        "bfloat16": (torch.bfloat16, "ieee"),
    }
    for name, (dtype, mode) in kinds.items():
        with record.attempt(name):
            torch.backends.cuda.matmul.fp32_precision = mode
            record.keep(**{f"{name}_flops": matmul_rate(dtype)})
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    with record.attempt("batched matmul"):
        record.keep(batched_matmul_flops=batched_matmul_rate())
    with record.attempt("copy"):
        record.keep(copy_bytes=copy_rate())
    values = {name: record.values.get(f"{name}_flops", 0.0) / 1e12 for name in kinds}
    copied = record.values.get("copy_bytes", 0.0) / 1e12
    bound = values["float32"] * 1e12 / flops
    record.keep(float32_bound_examples_per_s=bound)
    record.summarize(
        ", ".join(f"{name} {value:.3g} TFLOP/s" for name, value in values.items()),
        f"copy {copied:.3g} TB/s",
        f"float32 bound {bound:,.0f} examples/s",
    )


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product."""
    size = 512 if SMALL else 8192
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: torch.mm(a, b))


def batched_matmul_rate() -> float:
    """FLOP/s of the first linear layer of an array of 64 runs."""
    a, b = torch.randn(64, BATCH, 400, device=DEVICE), torch.randn(64, 400, 120, device=DEVICE)
    return 2 * 64 * BATCH * 400 * 120 / fastest(lambda: torch.bmm(a, b))


def copy_rate() -> float:
    """Bytes/s read and written by a copy within the device's memory."""
    source = torch.randn(1 << 20 if SMALL else 1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / fastest(lambda: target.copy_(source))


def fastest(work: Callable[[], object], repeats: int = 4) -> float:
    """Seconds of the fastest call of `work` within a while, as means over `repeats` calls."""
    work()
    synchronize()
    best, until = float("inf"), time.perf_counter() + (0.1 if SMALL else 0.7)
    while time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize()
        best = min(best, (time.perf_counter() - started) / repeats)
    return best
