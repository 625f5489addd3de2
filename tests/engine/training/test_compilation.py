"""Programs that are kept between runs, and shared by runs at the same time."""

import threading

import jax
import pytest
from jax._src import compilation_cache

from engine.training.compilation import keep_programs

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def no_cache():
    """As where the user has chosen none; the tests' own comes back."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_cache_that_the_user_has_chosen_stays():
    before = [getattr(jax.config, name) for name in OPTIONS]
    keep_programs()
    assert [getattr(jax.config, name) for name in OPTIONS] == before


def test_nobody_reads_what_another_run_is_writing(no_cache, tmp_path, monkeypatch):
    """Two runs with one folder, of which one is halfway through an entry."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    keep_programs()
    folder = jax.config.jax_compilation_cache_dir
    assert folder == str(tmp_path / "compiled")
    found = [compilation_cache.get_file_cache(folder) for _ in range(2)]
    writer, reader = (cache for cache, _ in filter(None, found))
    halfway, read, answers = threading.Event(), threading.Event(), []

    def in_halves(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            halfway.set()
            read.wait(timeout=0.3)  # in vain: the reader waits for the other half
            file.write(data[len(data) // 2 :])

    def ask():
        answers.append(reader.get("a"))
        read.set()

    monkeypatch.setattr(type(writer._path), "write_bytes", in_halves)
    program = bytes(range(100))
    writing = threading.Thread(target=writer.put, args=("a", program))
    writing.start()
    halfway.wait()
    asking = threading.Thread(target=ask)
    asking.start()
    for thread in (asking, writing):
        thread.join()
    assert answers == [program]
