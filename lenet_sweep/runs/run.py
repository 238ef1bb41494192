"""One run from its config to its summary: data, network, training, and everything it leaves.

    outputs/.../config.yaml                 the whole config: it alone rebuilds the run
                metrics.jsonl               a line an epoch, written before anything is tracked
                environment.json            machine, versions, commit
                uncommitted.diff            changes of the code's checkout against its commit
                tracking.json               the run's id in the tracking store
                checkpoint.safetensors      its state after the last whole epoch
                model/weights.safetensors   the weights after the last epoch
                plots/*.png                 curves, confusion matrix, filters, activations, errors
                per_class.json              recall of each class
                result.json                 how it ended
                lenet_sweep.log

The same config run again resumes an interrupted run from its checkpoint; the result is bit-identical to
that of an uninterrupted one. In the same way a job of a sweep resumes from a finished run of the same
config with fewer epochs.
"""

import contextlib

from lenet_sweep.runs import outputs, resume
from lenet_sweep.runs.session import RunSession
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage.result import Result
from lenet_sweep.training import engine


def run(spec: RunSpec) -> Result:
    """Train what `spec` describes; leave everything in its folder and the tracking store.

    Only one process trains a config at a time, others wait. A job of a sweep that is finished already is
    not trained again; an interrupted run is resumed; `config.sweep.rerun` starts afresh in both cases.

    Raises:
        OutputError: if the folder holds another run already or cannot be written.
        DataError, DeviceError, TrackingError: if the run cannot start.
        RunFailed: if it started and did not reach its end; its status is then FAILED.
    """
    with resume.claimed(spec):
        if done := resume.finished_before(spec):
            return done
        session = RunSession.start(spec)
        try:
            profile = spec.config.profile
            with outputs.profiling(spec, session.state.device) if profile else contextlib.nullcontext():
                _train(session)
            return session.finish()
        except BaseException as error:
            session.fail(error)
            raise


def _train(session: RunSession) -> None:
    config = session.spec.config
    epochs = engine.train(
        session.state,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        first_epoch=session.next_epoch,
        on_point=session.progress.point,
    )
    while not session.is_done:
        session.record(next(epochs))
