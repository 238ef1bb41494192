"""Jobs of a sweep are composed exactly as Hydra composes them, including errors."""

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode
from hypothesis import given, settings
from hypothesis import strategies as st

from lenet_sweep.cli.compose import Composer, to_config
from lenet_sweep.paths import conf_dir


@pytest.fixture(scope="module")
def context():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
    return HydraContext(config_loader=loader, callbacks=Callbacks())


@pytest.fixture(scope="module")
def master(context):
    return context.config_loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)


@pytest.fixture(scope="module")
def composer(context, master):
    return Composer(context, master)


@pytest.fixture(scope="module")
def plain(context, master):
    """A job without overrides, as Hydra composes it."""
    return composed_by_hydra(context, master, [])


def outcome(compose):
    """The config, or the type and message of the error and of its cause."""
    try:
        return compose()
    except Exception as error:
        return type(error), str(error), type(error.__cause__), str(error.__cause__)


def composed_by_hydra(context, master, job):
    return outcome(lambda: to_config(context.config_loader.load_sweep_config(master, job)))


VALID = (
    "lr=0.1",
    "lr=1e-3",
    "seed=7",
    "threads=auto",
    "threads=2",
    "model=lenet_relu_max",
    "model=lenet",
    "model.pool=max",
    "model.kernel_size=3",
    "model.channels=[8,16]",
    "model.hidden=[]",
    "model={pool: max, channels: [4, 8]}",
    "optimizer=adam",
    "optimizer=nesterov",
    "optimizer.lr=0.05",
    "optimizer.weight_decay=${lr}",
    "optimizer.lr=${optimizer.weight_decay}",
    "data=fashion_mnist_mini",
    "data.train_size=${batch_size}",
    "data.train_size=null",
    "data.root='a, \"quoted\" folder'",
    'data.root="it\'s"',
    "data.root=${oc.env:HOME}",
    "precision={tf32: true}",
    "++precision.tf32=true",
    "++lr=0.3",
    "target_loss=0.5",
    "schedule=step",
    "tracking=none",
    "+debug=overfit",
    "+debug=fast",
    "batch_size=64",
    "tracking@tracking=none",
)
INVALID = (
    "lrr=0.1",
    "+lrr=0.1",
    "++lrr=0.1",
    "+lr=0.1",
    "+model.pool=max",
    "model.foo=1",
    "+model.foo=1",
    "~lr",
    "~lr=0.9",
    "~lr=0.8",
    "~model.pool",
    "~optimizer",
    "~optimizer.lr",
    "~nothing",
    "lr@here=0.1",
    "model@here=lenet",
    "+model@here=lenet",
    "model=sigmod",
    "model=3",
    "lr={a: 1}",
    "model.pool={a: 1}",
    "model.pool.deep=1",
    "optimizer.momentum=${nothing}",
    "optimizer.betas=[0.5,0.6]",  # a key that only adam has
    "schedule.gamma=0.5",
    "lr=abc",
    "lr=null",
    "lr=???",
    "model.channels=[6,[16]]",
    "model.channels.0=8",
    "hydra.job.name=other",
    "hydra.nothing=1",
    "+experiment=learning_rates",
)


@pytest.mark.parametrize("override", VALID + INVALID)
def test_job_of_one_override_is_composed_as_hydra_does_it(context, master, composer, plain, override):
    expected = composed_by_hydra(context, master, [override])
    assert outcome(lambda: composer.compose([override])) == expected
    # The second time uses the cached composition, which the first job must not have changed.
    assert outcome(lambda: composer.compose([override])) == expected
    assert composer.compose([]) == plain


@settings(max_examples=30, derandomize=True)
@given(st.lists(st.sampled_from(VALID), max_size=5), st.lists(st.sampled_from(INVALID), max_size=1))
def test_job_of_any_overrides_in_any_order_is_composed_as_hydra_does_it(context, master, composer, job, bad):
    job = [*job[:2], *bad, *job[2:]]
    assert outcome(lambda: composer.compose(job)) == composed_by_hydra(context, master, job)


def test_jobs_that_choose_the_same_groups_cost_one_composition(context, master, monkeypatch):
    loader, calls = context.config_loader, []
    load = loader.load_sweep_config
    monkeypatch.setattr(loader, "load_sweep_config", lambda *given: calls.append(given) or load(*given))
    composer = Composer(context, master)
    jobs = composer.expand(
        ["model=lenet,lenet_relu_max", "model.pool=avg,max", "model.channels=[6,16],[8,16]", "~target_loss"]
    )
    for job in jobs:
        outcome(lambda job=job: composer.compose(job))
    assert (len(jobs), len(calls)) == (8, 2)
