"""MLflow: runs as a view of the files that a training leaves.

The files are the truth. `publish()` brings a run in MLflow up to what a `RunRecord` says, and may be called
again at any time: it sends what is missing. `LiveTracker` does that in the background while a training goes
on, so that a server that hangs or is down delays nothing; what it missed, `sdpipe track` sends later.

A run is found again by its fingerprint, so a training that was killed and continued stays one run.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any

from sdpipe.errors import SdpipeError, TrackingError, tell, without_passwords
from sdpipe.files import sha256_of
from sdpipe.training.interruption import tell_in_time
from sdpipe.training.logged_models import has_onnx, log_onnx
from sdpipe.training.mlflow_store import connected, imported, is_server, reach, store_uri
from sdpipe.training.run_record import RunRecord, Status, note_path, remove_note, times_of, write_note

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PATIENCE_S = 15.0  # how long the end of a stage waits for a slow server
_CONTACT_S = 60.0  # how long `sdpipe track` waits for a server's first answer
_TELL_S = 15.0
_METRICS_PER_CALL = 1000  # MLflow's limit for one log_batch


def publish(record: RunRecord) -> str:
    """Bring MLflow up to `record`; returns the MLflow run id. Raises TrackingError if the store refuses."""
    with connected() as (mlflow, experiment_id):
        return _Publisher(mlflow, experiment_id).publish(record)


def quietly(work: Callable[[], object]) -> None:
    """Do what concerns MLflow for a stage: a store that is down costs PATIENCE_S and a warning at most."""
    try:
        _within(PATIENCE_S, work)
    except SdpipeError as error:
        _warn(str(error))


@contextmanager
def awaited() -> Iterator[None]:
    """Talk to MLflow while somebody waits for it, who is told so after _TELL_S.

    Raises TrackingError where a server does not tell of the experiment in _CONTACT_S: MLflow's own time-out
    is of each read, and an answer that comes by a byte a second never meets it. Behind that a large file may
    take its time, as the making of a database's tables may.
    """
    imported()
    text = f"waiting for MLflow at {without_passwords(store_uri())}; a large file may take its time"
    timer = threading.Timer(_TELL_S, tell, [text])
    timer.daemon = True
    timer.start()
    try:
        if is_server(store_uri()):
            _within(_CONTACT_S, reach)
        yield
    finally:
        timer.cancel()


def _within(patience_s: float, work: Callable[[], object]) -> None:
    """Do it in a thread, which neither Ctrl-C nor the end of the process waits for.

    Raises TrackingError if it takes longer, and what it raises of sdpipe's own.
    """
    raised: list[SdpipeError] = []

    def attempt() -> None:
        try:
            work()
        except SdpipeError as error:
            raised.append(error)

    thread = threading.Thread(target=attempt, name="mlflow", daemon=True)
    thread.start()
    thread.join(patience_s)
    if thread.is_alive():
        uri = without_passwords(store_uri())
        raise TrackingError(f"MLflow: no answer from {uri} in {patience_s:.0f} s")
    for error in raised:
        raise error


def _warn(text: str) -> None:
    tell_in_time(f"warning: {without_passwords(text)}; nothing is lost, `sdpipe track` sends it later")


class _Publisher:
    """Sends the difference between a record and the store."""

    def __init__(self, mlflow: Any, experiment_id: str) -> None:
        self.mlflow = mlflow
        self.client: MlflowClient = mlflow.MlflowClient()
        self.experiment_id = experiment_id

    def publish(self, record: RunRecord) -> str:
        started_ms, ended_ms = times_of(record)
        run_id = self._find(record) or self._create(record, started_ms)
        run = self.client.get_run(run_id)
        if self._is_no_news(record, run):
            return run_id
        if record.status == "RUNNING" and run.info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        self._send_params(run_id, record, run.data.params)
        self._send_metrics(run_id, record, run.data.metrics)
        for name, value in record.tags.items():
            if run.data.tags.get(name) != value:
                self.client.set_tag(run_id, name, value)
        self._send_files(run, record)
        if record.status != "RUNNING":
            self._end(run, record, ended_ms)
        return run_id

    def _end(self, run: "Run", record: RunRecord, ended_ms: int | None) -> None:
        """With the later time of two ends, but for the last: a clock may have been ahead of that."""
        if ended_ms is not None and record.status != "FINISHED":
            ended_ms = max(ended_ms, run.info.end_time or 0)
        is_later = record.ended_ms is not None and (ended_ms or 0) > (run.info.end_time or 0)
        if run.info.status != record.status or is_later:
            self.client.set_terminated(run.info.run_id, status=record.status, end_time=ended_ms)

    def _is_no_news(self, record: RunRecord, run: "Run") -> bool:
        """MLflow knows of this end, or of a newer one, perhaps from elsewhere, which it shall not undo.

        So what has finished stays, also where it is begun again, in another clone or on purpose. Not by the
        times alone, for a clock may have been ahead: what has trained further is newer.
        """
        was_finished: bool = run.info.status == "FINISHED"
        if was_finished != (record.status == "FINISHED"):
            return was_finished
        has_ended = run.info.status != "RUNNING"  # one that goes on again keeps the time of its last end
        if not has_ended or record.ended_ms is None or record.ended_ms > (run.info.end_time or 0):
            return False
        num_there = 0
        if record.epochs and (last := list(record.epochs[0])[-1]) in run.data.metrics:
            num_there = len(self._values(run.info.run_id, last))
        return len(record.epochs) <= num_there

    def _find(self, record: RunRecord) -> str | None:
        """Its name, a folder's, may hold what a filter of MLflow's cannot be told."""
        of_the_training = self.client.search_runs(
            [self.experiment_id], filter_string=f"tags.fingerprint = '{record.fingerprint}'"
        )
        same = (run for run in of_the_training if run.data.tags.get("run") == record.name)
        return next((str(run.info.run_id) for run in same), None)

    def _create(self, record: RunRecord, started_ms: int | None) -> str:
        tags = {"fingerprint": record.fingerprint, "run": record.name, **record.tags}
        run = self.client.create_run(
            self.experiment_id, start_time=started_ms, run_name=record.name, tags=tags
        )
        return str(run.info.run_id)

    def _send_params(self, run_id: str, record: RunRecord, logged: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        missing = [Param(name, str(value)) for name, value in record.params.items() if name not in logged]
        if missing:
            self.client.log_batch(run_id, params=missing)

    def _send_metrics(self, run_id: str, record: RunRecord, logged: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        num_logged = self._num_logged(run_id, record.epochs, logged)
        now_ms = _now_ms()
        epochs = [
            [Metric(name, float(value), now_ms, step) for name, value in row.items()]
            for step, row in enumerate(record.epochs[num_logged:], start=num_logged + 1)
        ]
        per_call = max(1, _METRICS_PER_CALL // max(map(len, epochs), default=1))
        for start in range(0, len(epochs), per_call):  # whole epochs: one is known in full, or not at all
            self.client.log_batch(run_id, metrics=list(chain(*epochs[start : start + per_call])))
        summary = [
            Metric(name, float(value), now_ms, 0)
            for name, value in record.summary.items()
            if logged.get(name) != float(value)
        ]
        for start in range(0, len(summary), _METRICS_PER_CALL):
            self.client.log_batch(run_id, metrics=summary[start : start + _METRICS_PER_CALL])

    def _num_logged(
        self, run_id: str, epochs: Sequence[Mapping[str, float]], logged: Mapping[str, float]
    ) -> int:
        """How many of the epochs, from the first, the store has as they are.

        It has others where the same training was done again with other processes or threads.
        """
        if not epochs or (last := list(epochs[0])[-1]) not in logged:
            return 0
        complete, losses = self._values(run_id, last), self._values(run_id, "train_loss")
        is_there = (
            step in complete and losses.get(step) == row.get("train_loss")
            for step, row in enumerate(epochs, start=1)
        )
        return sum(1 for _ in takewhile(bool, is_there))

    def _values(self, run_id: str, name: str) -> dict[int, float]:
        """A metric's latest value at each step."""
        history = sorted(self.client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp)
        return {metric.step: metric.value for metric in history}

    def _send_files(self, run: "Run", record: RunRecord) -> None:
        """Those that are not there: the tags say what was sent, the store whether it still has it."""
        run_id, tags = run.info.run_id, run.data.tags
        there = {file.path for file in self.client.list_artifacts(run_id)} if record.artifacts else set()
        for path in record.artifacts:
            digest = sha256_of(path)
            if path.name not in there or tags.get(f"sha256.{path.name}") != digest:
                self.client.log_artifact(run_id, str(path))
                self.client.set_tag(run_id, f"sha256.{path.name}", digest)
        if record.model is not None:
            digest = sha256_of(record.model)
            if tags.get("model_sha256") != digest or not has_onnx(self.mlflow, run):
                log_onnx(self.mlflow, run_id, record.model)
                self.client.set_tag(run_id, "model_sha256", digest)


class LiveTracker:
    """Publishes a growing record from a thread of its own; a store that fails never stops a training.

    What the store does not hear of a run's end, `sdpipe track` sends: a note of it stays.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = replace(record, started_ms=_now_ms())
        write_note(self._record)
        self._changed = threading.Condition()
        self._version = 1
        self._closed = False
        self._delivered = False
        self._told = False
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def update(self, epochs: Sequence[Mapping[str, float]]) -> None:
        """Give the epochs so far; returns at once."""
        self._put(replace(self._record, epochs=tuple(epochs)))

    def close(
        self, status: Status, summary: Mapping[str, float] | None = None, patience_s: float | None = None
    ) -> None:
        """Give the outcome and wait for the store, at most PATIENCE_S or `patience_s`."""
        patience_s = PATIENCE_S if patience_s is None else patience_s
        summary = summary or self._record.summary
        ended = replace(self._record, status=status, summary=summary, ended_ms=_now_ms())
        if not self._closed:  # a process that is asked to end while it says how it ended has said it
            self._put(ended, last=True)
        self._thread.join(patience_s)
        with self._changed:
            # As KILLED goes what has said nothing; no disk that hangs shall keep who was asked to end. On a
            # full one the first note stands.
            if not self._delivered and status != "KILLED":
                with suppress(OSError):
                    write_note(ended)
        if self._thread.is_alive():
            self._tell(f"MLflow: no answer from {store_uri()} in {patience_s:.0f} s")

    def _put(self, record: RunRecord, *, last: bool = False) -> None:
        with self._changed:
            self._record = record
            self._version += 1
            self._closed = last
            self._changed.notify()

    def _run(self) -> None:
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._version > seen)  # noqa: B023
                record, seen, last = self._record, self._version, self._closed
            try:
                publish(record)
            except SdpipeError as error:
                self._tell(str(error))
            else:
                if last:
                    with self._changed:
                        self._delivered = True
                        remove_note(note_path(record))
            if last:
                return

    def _tell(self, text: str) -> None:
        if not self._told:
            _warn(text)
        self._told = True


def _now_ms() -> int:
    return int(time.time() * 1000)
