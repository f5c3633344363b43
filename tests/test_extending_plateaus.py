"""A finished run whose learning rate fell by its validation errors, and that is asked for more epochs."""

from pathlib import Path

from conftest import same, train_alone, train_config
from test_extending import keep_and_extend

from sdpipe.data.store import DataSet


def test_more_epochs_wait_on_from_the_errors_before_them(dataset: DataSet, tmp_path: Path) -> None:
    """Weights and history are those of a training that had all epochs from the start."""
    config = train_config(epochs=6, milestones=[], plateau_epochs=1, learning_rate=1.0)
    whole = train_alone(config, dataset, tmp_path / "whole")
    rates = [record.learning_rate for record in whole.progress.history]
    assert rates[2] < rates[0], "the example has a plateau in the first three epochs"
    extended, (told,) = keep_and_extend(config, dataset, tmp_path)
    assert told == "extending the finished training 0123456789abcdef of 3 epochs"
    assert extended.progress.history == whole.progress.history
    assert same(extended.state, whole.state)
