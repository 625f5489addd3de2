"""Files of log-probabilities: whole, of the right weights, and of every pair."""

import shutil

import numpy as np
import pytest

from engine.data.logps_cache import Belongs, StoredLogps

BELONGS = Belongs("data", "weights")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    return tmp_path


def values(*pairs):
    return np.array([(-p - 1, -2 * p - 1) for p in pairs], np.float32)


def store(*pairs, belongs=BELONGS, count=5):
    stored = StoredLogps(belongs, count)
    stored.add(np.array(pairs), values(*pairs))
    stored.flush()
    return stored


def test_pieces_add_up_and_end_as_one_file():
    store(3, 1)
    stored = store(0)
    assert stored.missing.tolist() == [False, False, True, False, True]
    assert len(list(stored.folder.iterdir())) == 2
    stored.add(np.array([4, 2]), values(4, 2))
    stored.finish()
    assert len(list(stored.folder.iterdir())) == 1
    np.testing.assert_array_equal(StoredLogps(BELONGS, 5).values, values(*range(5)))


def test_values_are_of_their_data_and_their_reference_alone():
    store(0, 1, 2, 3, 4)
    assert StoredLogps(Belongs("other", "weights"), 5).missing.all()
    other = StoredLogps(Belongs("data", "other"), 5)
    assert other.missing.all() and other.has_others


@pytest.mark.parametrize("where", [10, 200, -200, -10])
def test_a_damaged_file_is_named_and_not_used(where, caplog):
    (path,) = store(0, 1, 2, 3, 4).folder.iterdir()
    data = bytearray(path.read_bytes())
    data[where] ^= 0xFF
    path.write_bytes(data)
    found = StoredLogps(BELONGS, 5)
    # A bit that says nothing (of a date, of a permission) may be any: values may not.
    assert found.missing.all() or np.array_equal(found.values, values(*range(5)))
    assert found.missing.all() == (f"{path} is damaged" in caplog.text)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_file_that_was_cut_is_named(size, caplog):
    (path,) = store(0, 1, 2, 3, 4).folder.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    assert StoredLogps(BELONGS, 5).missing.all()
    assert f"{path} is damaged" in caplog.text and "scored again" in caplog.text


def test_a_file_put_where_it_does_not_belong_is_not_used(caplog):
    theirs = store(0, 1, 2, 3, 4, belongs=Belongs("data", "other")).folder
    shutil.copytree(theirs, theirs.parent / "weights")
    assert StoredLogps(BELONGS, 5).missing.all()
    assert "belongs to other data or another reference" in caplog.text


def test_more_pairs_than_there_are(caplog):
    store(0, 1, 2, 3, 4)
    assert StoredLogps(BELONGS, 4).missing.all()
    assert "do not fit together" in caplog.text


def test_a_folder_that_takes_nothing_is_said(cache, caplog):
    (cache / "reference").write_text("a file")
    assert not store(0, 1).missing[:2].any()  # kept in memory
    assert "are not kept in" in caplog.text
