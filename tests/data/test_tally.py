import pickle

from dist_peft.data.tally import Tally


def test_parts_add_up_to_the_whole() -> None:
    events = [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"), ("b", "5")]
    whole = Tally()
    for event in events:
        whole.count(*event)
    assert whole.list_entries() == [("a", 2, "1"), ("b", 2, "2"), ("c", 1, "4")]
    joined, part = Tally(), Tally()
    for event in events:
        part.clear()
        part.count(*event)
        joined.add(pickle.loads(pickle.dumps(part)))
    assert joined.list_entries() == whole.list_entries()
    assert joined.total() == 5
    assert (joined.get_count("a"), joined.get_count("z")) == (2, 0)
