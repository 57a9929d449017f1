from dist_peft.core.config.run import DataSource
from dist_peft.data.meanings import UnusedColumnCheck


def test_other_columns_are_named_once() -> None:
    source = DataSource(path="a.jsonl", columns={"output": "n.0.out"}, template="{x}")
    unused = UnusedColumnCheck(source, {"input"}, "alpaca", "data.train[0]")
    for number in range(3):
        unused.check_record(
            {"id": number, "n": [], "x": "t", "input": "i", "source": "web"}, "record"
        )
    assert unused.user_notes == ["columns of a.jsonl that are not used: id, source"]
