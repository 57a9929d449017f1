"""Bad values in the section of a sweep, and sweeps in the wrong place."""

import json

from tests.bad_input.case import Row, write

RATES = "sweep={lr: [1.0e-2, 1.0e-3]}"


def _value(name: str, sweep: str, *words: str, args: tuple[str, ...] = ()) -> Row:
    return Row(name, "train", words, args=(f"sweep={sweep}", *args))


ROWS = [
    _value("sweep empty", "{}", "sweep", "2 to 256 points, not 0"),
    _value("sweep of an empty list", "{lr: []}", "2 to 256 points, not 0"),
    _value("sweep of one value", "{lr: [1.0e-3]}", "2 to 256 points, not 1"),
    _value("sweep a list", "[1.0e-3, 1.0e-2]", "sweep", "section"),
    _value("sweep of equal points", "{lr: [1.0e-3, 1.0e-3]}", "points 0 and 1 are equal"),
    _value(
        "sweep of an unknown axis", "{keep_zeros: [true, false]}", "unknown key sweep.keep_zeros"
    ),
    _value("sweep of a value that is no list", "{lr: 1.0e-3}", "sweep.lr", "list"),
    _value("sweep of lists and points", "{lr: [1.0e-3, 1.0e-2], points: [{r: 2}]}", "not both"),
    _value("sweep of a negative rate", "{lr: [1.0e-3, -1]}", "sweep.lr.1", "greater than 0"),
    _value("sweep of rank 0", "{r: [4, 0]}", "sweep.r.1", "greater than or equal to 1"),
    _value("point with an unknown key", "{points: [{r: 2}, {rr: 3}]}", "sweep.points.1.rr"),
    _value("point without its targets", "{target_modules: [[q_proj], [no_such]]}", "no_such"),
    _value(
        "sweep of too many",
        "{seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],"
        " r: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]}",
        "256 points, not 272",
    ),
    _value(
        "halving that keeps none",
        "{lr: [1.0e-3, 1.0e-2], halving: {every: 2, keep: 0}}",
        "sweep.halving.keep",
        "greater than 0",
    ),
    _value(
        "halving that keeps all",
        "{lr: [1.0e-3, 1.0e-2], halving: {every: 2, keep: 1}}",
        "sweep.halving.keep",
        "less than 1",
    ),
    _value(
        "halving after no steps",
        "{lr: [1.0e-3, 1.0e-2], halving: {every: 0}}",
        "sweep.halving.every",
        "greater than or equal to 1",
    ),
    _value(
        "halving without evaluations",
        "{lr: [1.0e-3, 1.0e-2], halving: {every: 2}}",
        "sweep.halving compares held-out losses",
        "train.eval_every",
    ),
    Row(
        "sweep of another method",
        "train",
        ("sweep: adapter.kind bottleneck", "one by one"),
        args=(RATES, "adapter={kind: bottleneck}"),
    ),
    Row(
        "sweep from one checkpoint",
        "train",
        ("sweep: resume", "auto or never"),
        args=(RATES, "resume=run/checkpoints/step-000002"),
    ),
    Row(
        "sweep into a run",
        "resume",
        ("save.dir run holds a run without a sweep", "another"),
        args=(RATES,),
    ),
    Row(
        "run into a sweep",
        "train",
        ("save.dir new holds a sweep", "sweep section"),
        write("new/sweep.json", json.dumps({"rung": 0, "points": []})),
    ),
]
