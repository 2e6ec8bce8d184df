"""One thread: two busy processes on two cores make grouped matrix products many times slower."""

import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

import own_home
import pytest
import rich
import torch
from filelock import FileLock

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole fast suite; none beside this one for a few files, or for slow tests, which may be large."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(2, os.cpu_count() or 1) if whole and config.option.markexpr == "not slow and not gpu" else 0


def pytest_unconfigure() -> None:
    own_home.remove()


@pytest.fixture(autouse=True, scope="session")
def frozen() -> None:
    """Garbage is collected seldom, and never among imported modules: that was two fifths of a tiny training run."""
    from accelerate.utils import memory

    import slimmoe_hf.commands  # noqa: F401

    memory.gc = SimpleNamespace(collect=int)  # every Trainer has it done before it trains

    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def console() -> None:
    """Commands send this process's console to stderr; functions print where it stood."""
    rich.reconfigure(stderr=False)


@pytest.fixture(scope="session")
def whole_run() -> Path:
    """A recipe's folder: its model, its text, and in `run` what came of it. One for all processes: copy what you change."""
    from recipes import whole_recipe, write_recipe

    from slimmoe_hf.pipeline import run_recipe

    folder = own_home.shared_folder() / "whole"
    with FileLock(f"{folder}.lock"):
        done = Path(f"{folder}.done")  # a report is there before what is written after it
        if not done.exists():
            folder.mkdir(exist_ok=True)
            run_recipe(write_recipe(folder, whole_recipe(folder)))
            done.touch()
    return folder


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where uncut runs lie that several tests of a file compare with."""
    return tmp_path_factory.mktemp("wholes")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are not looked at draw empty sheets: drawing takes longer than their training."""
    from slimmoe_hf import plots

    monkeypatch.setattr(plots, "png", lambda picture: repr(picture).encode())


@pytest.fixture
def routing_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """PhiMoE samples its routing in training; promise 3 is about everything else."""
    from transformers.models.phimoe import modeling_phimoe

    sparsemixer = modeling_phimoe.sparsemixer
    monkeypatch.setattr(
        modeling_phimoe,
        "sparsemixer",
        lambda scores, jitter_eps, training, top_k: sparsemixer(scores, jitter_eps, False),
    )


@pytest.fixture
def as_loud_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cli.main` silences this whole process, which other tests listen to."""
    from slimmoe_hf import commands

    monkeypatch.setattr(commands, "be_quiet", lambda: None)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts of streamed models that are read, in order."""
    from streams import count_reads

    return count_reads(monkeypatch)
