"""Run a script as the shell does, but write checkpoints slowly: python fault_runner.py SCRIPT OPTIONS...

Each write pauses for half a second in the middle of the file; meanwhile the run folder has a file "writing".
"""

import io
import sys
import time
from pathlib import Path

import torch
from suite import SCRIPTS


def write_slowly(path, data):
    """Replace Path.write_bytes."""
    sign = path.parent / "writing"
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        sign.touch()
        time.sleep(0.5)
        sign.unlink()
        file.write(data[len(data) // 2 :])


def save_slowly(content, file):
    """Replace torch.save to a file; to a buffer, save as before."""
    if isinstance(file, io.BytesIO):
        return save(content, file)
    buffer = io.BytesIO()
    save(content, buffer)
    write_slowly(Path(file.name), buffer.getvalue())


save = torch.save

if __name__ == "__main__":
    ppo = next(script for script in SCRIPTS if script.__name__ == sys.argv[1])
    Path.write_bytes, torch.save = write_slowly, save_slowly
    sys.argv = [f"{ppo.__name__}.py", *sys.argv[2:]]
    ppo.main()
