"""The suite runs on 8 fake CPU devices, without a network, and with warnings as errors (pyproject.toml)."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

assert "jax" not in sys.modules, "the devices are counted when jax is imported: nothing may import it before this file"

# Hundreds of programs are compiled here to run for a moment: without LLVM's optimizations and XLA's fusion emitters
# that takes a fifth of the time, and as one LLVM module a quarter less of it (docs/log.md). AS_SHIPPED=1 compiles as
# users do.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)
FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
os.environ["XLA_FLAGS"] = " ".join(FLAGS if "AS_SHIPPED" in os.environ else [*FLAGS, QUICK])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # [B] with [B,T] is a mistake more often than it is meant
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and a fork do not go together
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's models here are tiny: more threads wait for each other

# Traced programs are millions of small objects; the collector, asked at every 700 new ones, goes through them all.
gc.set_threshold(100_000, 20, 20)

# What signatures say of shapes and dtypes is checked at every call, in the modules that say it.
ROOT = Path(__file__).parent.parent
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "specjax").rglob("*.py")}
SHAPED = [name for path, name in NAMES.items() if "from jaxtyping import" in path.read_text(encoding="utf-8")]
install_import_hook(SHAPED, "shape_checks.checked")

# What is kept between starts goes to a folder of this process, which its children share.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="specjax-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Files go to the workers whole and in this order, so that both end together: the longest first, then all others.
LONGEST = "parity plan processes quantised peft_variants dpo generate sharding fit run adapter_stack moments".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What is imported is here to stay, and no garbage is looked for in it; programs are shared from now on."""
    gc.collect()
    gc.freeze()
    if "jax" in sys.modules:
        import programs

        programs.share()


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """A file's programs go with it."""
    yield
    if "programs" in sys.modules:
        sys.modules["programs"].KEPT.clear()


# What is built for several files. Nothing heavy is imported before a fixture is asked for.


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A float32 Llama that transformers wrote, to be read alone."""
    from helpers import torch_model

    path = tmp_path_factory.mktemp("llama") / "model"
    torch_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def one_device():
    """The command's tests of a file see one device; what wants several says `with on_devices(8)`."""
    from helpers import on_devices

    with on_devices(1):
        yield


@pytest.fixture(scope="module")
def steps_made_once():
    """Runs of a file that train the same step trace and compile it once."""
    import helpers

    with helpers.steps_made_once():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random Llama with a tokenizer, in a folder where a file's runs go too, and beside it `data/` to learn from."""
    from run_fixtures import write_base, write_data

    folder = tmp_path_factory.mktemp("run")
    write_data(folder / "data")
    return write_base(folder / "base")
