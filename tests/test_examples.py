"""The training example, run as a user runs it."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_char.py"


def train(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_training_agrees_with_pytorch(device, tmp_path):
    picture = tmp_path / "curves.png"
    done = train("--device", device, "--steps", "10", "--plot", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "the curves agree" in said
    assert picture.exists() or "matplotlib is not installed" in said


def test_training_refuses_too_few_steps():
    done = train("--steps", "3")
    assert done.returncode == 2
    assert "--steps is 3, must be at least 10" in done.stderr
