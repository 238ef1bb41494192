"""Several runs trained as one array; each leaves what it would leave by itself."""

import contextlib
from collections.abc import Sequence

from lenet_sweep.errors import LenetSweepError, RunFailed
from lenet_sweep.runs import outputs, resume
from lenet_sweep.runs.session import EXPECTED_ERRORS, RunSession, failure_reason
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.storage.result import Outcome
from lenet_sweep.training import fused
from lenet_sweep.training.data import Data


def run_array(specs: Sequence[RunSpec]) -> list[Outcome]:
    """Train jobs with equal `plan.array_key` as one array; each leaves what `run` would leave.

    Returns, in order, what `run` would have returned or raised. As many are trained at once as fit in the
    device's memory.
    """
    outcomes: dict[int, Outcome] = {}
    with contextlib.ExitStack() as claims:
        # In one order everywhere, or two processes could wait for each other for ever.
        for spec in sorted(specs, key=lambda spec: spec.config_hash):
            claims.enter_context(resume.claimed(spec))
        for i, spec in enumerate(specs):
            if done := resume.finished_before(spec):
                outcomes[i] = done
        while left := [i for i in range(len(specs)) if i not in outcomes]:
            _Array(outcomes).train({i: specs[i] for i in left})
    return [outcomes[i] for i in range(len(specs))]


class _Array:
    """Runs that are trained together, by their indices; each that has ended gets its entry in `outcomes`."""

    def __init__(self, outcomes: dict[int, Outcome]) -> None:
        self._outcomes = outcomes
        self._sessions: dict[int, RunSession] = {}

    def train(self, specs: dict[int, RunSpec]) -> None:
        """Start as many of `specs` as there is memory for, at least one, and train them until they end."""
        try:
            data = self._start(specs)
            if data:
                with self._profiling():
                    self._train(data)
        except EXPECTED_ERRORS as error:
            self._fail_all(error)
        except BaseException as error:
            self._fail_all(error)
            raise

    def _start(self, specs: dict[int, RunSpec]) -> Data | None:
        room, data = 1, None
        for i, spec in specs.items():
            if len(self._sessions) == room:
                break
            try:
                self._sessions[i] = session = RunSession.start(spec, fused=True, data=data)
            except LenetSweepError as error:
                self._outcomes[i] = error
                continue
            except EXPECTED_ERRORS as error:
                self._outcomes[i] = RunFailed(failure_reason(error))
                continue
            if data is None:
                data = session.state.data
                room = fused.width(session.state.device, session.state.network, spec.config.batch_size)
        return data

    def _train(self, data: Data) -> None:
        for i, session in self._sessions.items():
            if session.is_done:
                self._finish(i)
        indices = [i for i in self._sessions if i not in self._outcomes]
        if not indices:
            return
        sessions = [self._sessions[i] for i in indices]
        members = [_member(session) for session in sessions]
        config = sessions[0].spec.config
        for row, outcome in fused.train(
            members,
            data,
            batch_size=config.batch_size,
            amp=config.precision.amp,
            on_point=lambda row, point: sessions[row].progress.point(point),
        ):
            try:
                if isinstance(outcome, RunFailed):
                    raise outcome
                sessions[row].record(outcome)
            except (RunFailed, OSError) as error:  # such as a full disk: the others continue
                self._fail(indices[row], error)
            else:
                if sessions[row].is_done:
                    self._finish(indices[row])
            members[row].stopped = indices[row] in self._outcomes

    def _finish(self, i: int) -> None:
        try:
            self._outcomes[i] = self._sessions[i].finish()
        except EXPECTED_ERRORS as error:
            self._fail(i, error)

    def _fail(self, i: int, error: BaseException) -> None:
        session = self._sessions[i]
        if session.result:  # the error came after its end
            self._outcomes[i] = session.result
            return
        try:
            session.fail(error)
        except RunFailed as failure:
            self._outcomes[i] = failure

    def _fail_all(self, error: BaseException) -> None:
        with contextlib.ExitStack() as ends:  # carries all of them out, even if one raises
            for i in self._sessions.keys() - self._outcomes.keys():
                ends.callback(self._fail, i, error)

    def _profiling(self) -> contextlib.AbstractContextManager[None]:
        """One profile of the whole array, in the folder of the first run that asks for one."""
        for session in self._sessions.values():
            if session.spec.config.profile:
                return outputs.profiling(session.spec, session.state.device)
        return contextlib.nullcontext()


def _member(session: RunSession) -> fused.Member:
    state, config = session.state, session.spec.config
    return fused.Member(
        state.network,
        state.optimizer,
        state.schedule,
        seed=config.seed,
        epochs=config.epochs,
        first_epoch=session.next_epoch,
    )
