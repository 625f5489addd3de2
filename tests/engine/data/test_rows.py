import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from engine.data.rows import as_rows
from engine.errors import InputError

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]


def prompts(rows) -> list[str]:
    return [row["prompt"] for _, batch in rows.batches(3) for row in batch]


def test_datasets_and_lists_from_python():
    data = Dataset.from_list(ROWS)
    assert (
        prompts(as_rows(ROWS)) == prompts(as_rows(data)) == [f"p{i}" for i in range(10)]
    )
    picked = data.select([7, 2, 5]).with_format("numpy")
    assert prompts(as_rows(picked)) == ["p7", "p2", "p5"]
    rows = as_rows(data)
    assert as_rows(rows) is rows
    np.testing.assert_array_equal(rows.indices, np.arange(10))


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "the data set has no rows"),
        (Dataset.from_list(ROWS).select([]), "the data set has no rows"),
        (DatasetDict({"a": Dataset.from_list(ROWS)}), "pick one of its splits (a)"),
        ({"prompt": ["p"]}, "the data set is a dict; give a datasets.Dataset"),
        (["text"], "row 0 (counting from 0), is a str; each row must be a dict"),
        (Dataset.from_list([{"text": "x"}]), "has no column 'chosen'"),
        (
            [{"text": "x", "id": 3}],
            "has no column 'chosen'; it has text, id, and needs",
        ),
    ],
)
def test_bad_data_from_python(data, message):
    with pytest.raises(InputError) as caught:
        as_rows(data)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "column",
    ["Prompt", "prompt ", "prompt\u00a0", "\ufeffprompt", "prompts", "promt"]
    + ["question", "Instruction", "query", "input"],
)
def test_a_prompt_under_another_name_is_refused(column):
    bad = {column: "p", "chosen": "c", "rejected": "r"}
    for data, where in (
        (Dataset.from_list([bad]), "the data set"),
        ([ROWS[0], bad], "the data set, row 1 (counting from 0)"),
    ):
        with pytest.raises(InputError) as caught:
            as_rows(data)
        expected = (
            f"{where}, has no 'prompt', but {column!r}, which is not read; rename"
        )
        assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    "column", ["id", "prompt_id", "score_chosen", "source", "text"]
)
def test_other_columns_may_be_there(column):
    data = Dataset.from_list([{column: "1", "chosen": "a b", "rejected": "a c"}])
    assert as_rows(data).sources[0].ignored == (column,)
