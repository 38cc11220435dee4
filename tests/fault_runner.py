"""Run a script as the shell does, but write checkpoints slowly: python fault_runner.py SCRIPT OPTIONS...

Each write pauses for half a second in the middle of the file; meanwhile the run folder has a file "writing".
"""

import sys
import time
from pathlib import Path

from suite import SCRIPTS


def write_slowly(path, data):
    sign = path.parent / "writing"
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        sign.touch()
        time.sleep(0.5)
        sign.unlink()
        file.write(data[len(data) // 2 :])


if __name__ == "__main__":
    ppo = next(script for script in SCRIPTS if script.__name__ == sys.argv[1])
    Path.write_bytes = write_slowly
    sys.argv = [f"{ppo.__name__}.py", *sys.argv[2:]]
    ppo.main()
