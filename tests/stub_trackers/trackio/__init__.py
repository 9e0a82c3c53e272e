"""A stand-in for the package trackio, put on sys.path by tests; it records what it is given."""

from contextvars import ContextVar
from types import SimpleNamespace

calls = []
context_vars = SimpleNamespace(current_space_id=ContextVar("space", default=None))


class _Config(dict):
    def update(self, *given, allow_val_change=False):
        super().update(*given)


config = _Config()


class Table:
    def __init__(self, *, dataframe):
        self.dataframe = dataframe


def init(project, *, name=None, space_id=None, resume="never", private=None, bucket_id=None):
    assert space_id is None, "nothing is sent to a Space"
    calls.append(("init", name))
    return SimpleNamespace(config=config)


def log(metrics, step=None):
    assert all(kind != "finish" for kind, _ in calls), "the run is over"
    calls.append(("log", metrics))


def finish():
    calls.append(("finish", None))
