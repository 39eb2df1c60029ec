"""How long does ``thinkkv train recipes/tiny.yaml`` take, from nothing to the last file? A process of its own, timed.

    python benchmarks/tiny_recipe.py --threads 2

The run's folder is thrown away; its time goes into ``results/tiny_recipe.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import save

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the recipe in a scratch folder and write a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "tiny_recipe.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "thinkkv.sdk.cli", "train", "tiny.yaml", "--out", folder, "--json"]
        begun = time.monotonic()
        done = subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads)},
            stdout=subprocess.PIPE,
            check=True,
        )
        seconds = time.monotonic() - begun
    found = {"threads": arguments.threads, "seconds": round(seconds, 1), "stages": json.loads(done.stdout)["stages"]}
    save(arguments.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
