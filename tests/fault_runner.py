"""Run a script as from the shell, but write checkpoints slowly: python fault_runner.py SCRIPT ...

Writing pauses for half a second in the middle of the file; meanwhile, a file "writing" exists beside it.
"""

import builtins
import sys
import time
from pathlib import Path

from suite import SCRIPTS


class SlowFile:
    def __init__(self, path, mode):
        self.file, self.sign = builtins.open(path, mode), Path(path).parent / "writing"  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.sign.touch()
        time.sleep(0.5)
        self.sign.unlink()
        return self.file.write(data[len(data) // 2 :])


if __name__ == "__main__":
    ppo = next(script for script in SCRIPTS if script.__name__ == sys.argv[1])
    ppo.open = lambda path, mode="r": (SlowFile if mode == "wb" else builtins.open)(path, mode)
    sys.argv = [f"{ppo.__name__}.py", *sys.argv[2:]]
    ppo.main()
