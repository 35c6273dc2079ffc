"""The examples, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(example: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, EXAMPLES / example, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_training_agrees_with_pytorch(device, tmp_path):
    picture = tmp_path / "curves.png"
    done = run("train_char.py", "--device", device, "--steps", "10", "--plot", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "the curves agree" in said
    assert picture.exists() or "matplotlib is not installed" in said


def test_training_refuses_too_few_steps():
    done = run("train_char.py", "--steps", "3")
    assert done.returncode == 2
    assert "--steps is 3, must be at least 10" in done.stderr


def test_a_shared_sequence_trains_as_on_one_process(device):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    done = run("long_context.py", "--device", device, "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the losses agree" in done.stdout


@pytest.mark.parametrize("slots", [1, 5])
def test_serving_from_a_cache_gives_the_same_tokens(device, slots):
    done = run("serve_paged.py", "--device", device, "--slots", str(slots), "--requests", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    same, made = re.search(r"(\d+) of (\d+) tokens are those", done.stdout).groups()
    assert int(made) > 50
    if device == "cpu":  # on a GPU rounding may decide between two that are as likely
        assert same == made


def test_serving_says_that_pages_are_too_few():
    done = run("serve_paged.py", "--device", "cpu", "--pages", "2")
    assert "a request needs more pages than there are" in done.stderr


def test_packed_finetuning_has_the_losses_of_padded(device):
    pytest.importorskip("transformers", "5", reason="needs transformers 5 or newer")
    done = run("finetune_packed.py", "--device", device, "--steps", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the losses agree" in done.stdout
    packed, padded = map(int, re.findall(r"(\d+) rows", done.stdout))
    assert packed < 0.6 * padded


def test_a_diffusion_block_in_8_bits_gives_the_same_image(device):
    done = run("diffusion_block.py", "--device", device, "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the images agree" in done.stdout
    *_, off = re.findall(r"in_8_bits: (\S+) of the image's norm off", done.stdout)
    assert 1e-5 < float(off) < 0.02


def test_the_diffusion_block_refuses_no_steps():
    done = run("diffusion_block.py", "--steps", "0")
    assert done.returncode == 2
    assert "--steps is 0, must be at least 1" in done.stderr
