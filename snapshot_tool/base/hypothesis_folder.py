"""Keeping hypothesis from leaving files behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from hypothesis import configuration


@contextmanager
def own_home() -> Iterator[None]:
    """Give hypothesis a temporary home: even without a database it leaves a .hypothesis folder."""
    # The user's own tests may have set one, and nothing public tells which.
    before = vars(configuration).get("__hypothesis_home_directory")
    with TemporaryDirectory(prefix="snap-") as home:
        configuration.set_hypothesis_home_dir(home)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(before)
