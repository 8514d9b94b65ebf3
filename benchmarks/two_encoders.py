"""Two encoders that are started on one output folder at the same moment.

    python benchmarks/two_encoders.py [--races 50]

Both are `llara encode` with a tiny random model. Who gets the folder waits, before its first batch, until the other has
ended, so that the two do meet. One must win, with the bytes of a run that was alone; the other must end with exit code
2 and name the process that holds the folder. The last line is one JSON object.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from common.checkout import scratch
from common.tiny_job import encode, prepare, undisturbed

from llara.model import EmbeddingModel
from tests.children import preload
from tests.encoding.helpers import tree
from tests.encoding.rivals import patient, race


def one_race(root: Path, number: int, expected: dict[str, str]) -> str:
    """Returns what went wrong; empty where nothing did."""
    folder = root / f"race{number}"
    folder.mkdir()
    refused, encoding = folder / "refused", encode("vectors")

    def job() -> int:
        # In the child alone: the job itself knows nothing of races.
        EmbeddingModel.embed = patient(EmbeddingModel.embed, refused)  # type: ignore[method-assign]
        return encoding()

    done = race(job, refused, folder)
    fault = done.fault
    if not fault and tree(folder / "vectors") != expected:
        fault = "the winner's bytes are not those of a run that was alone"
    if not fault and json.loads(done.ended[0].out)["reused_shards"]:
        fault = "the winner found shards that were not its own"
    shutil.rmtree(folder)
    return fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", type=int, default=50)
    races = parser.parse_args().races
    preload()
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        root = prepare(Path(folder))
        expected = undisturbed(root)
        faults = [fault for number in range(races) if (fault := one_race(root, number, expected))]
    for fault in faults:
        print(fault)
    print(f"{races} races: {races - len(faults)} with one winner, whose rival was told who holds the folder")
    figures = {"races": races, "faults": len(faults)}
    met = races >= 50 and not faults
    print(json.dumps({"name": "two_encoders", "figures": figures, "target": {"races": 50, "faults": 0}, "met": met}))


if __name__ == "__main__":
    main()
