"""A stand-in for the model of `llara encode`, so that a million passages measure the writer and not a forward pass."""

from collections.abc import Callable

from tests.children import command
from tests.encoding.helpers import FakeRetriever

DIM = 256


class Quick(FakeRetriever):
    """Gives vectors of a usual size at once, and remembers nothing."""

    dim = DIM

    class _Nothing(list[object]):
        def append(self, item: object) -> None:
            """Keeps nothing: what a stand-in remembers must not count as memory of the job."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self._Nothing()  # type: ignore[assignment]


def encode(*words: object) -> Callable[[], int]:
    """Returns the command line `llara encode WORDS`, with the stand-in where it would load its model."""
    run = command("encode", "--model", "mini", *words, "--device", "cpu", "--json")

    def job() -> int:
        import llara.retriever

        llara.retriever.Retriever = Quick()  # type: ignore[assignment, misc]
        return run()

    return job
