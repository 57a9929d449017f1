"""Bad command lines and environments; several ranks."""

from tests.bad_input.case import Row, edit_json, edit_tensors, fifo, remove

TWO = {"ranks": 2}
SHORT = ("engine.start_timeout_minutes=0.08",)

ROWS = [
    # -- command lines
    Row("option unknown", "train", ("--fast",), args=("--fast",)),
    Row("error share NaN", "merge", ("share of at least 0",), args=("--max-error", "nan")),
    Row("minutes infinite", "merge", ("number of minutes",), args=("--verify-minutes", "inf")),
    Row("format unknown", "mlx", ("--format", "gguf"), args=("--format", "onnx")),
    Row("rows negative", "validate", ("--rows -1", "give the number"), args=("--rows", "-1")),
    Row("memory negative", "plan", ("--gpu-memory",), args=("--gpu-memory", "-1GiB")),
    Row("card unknown", "plan", ("--gpu Z9000", "known"), args=("--gpu", "Z9000")),
    Row("inspect nothing", "inspect base", ("base cannot", "No such"), remove("base")),
    Row(
        "inspect a FIFO",
        "inspect base",
        ("base is a named pipe",),
        lambda root: (remove("base")(root), fifo("base")(root)),
    ),
    # -- environments of one process
    Row("RANK alone", "train", ("WORLD_SIZE is not set", "launcher"), env={"RANK": "0"}),
    Row("WORLD_SIZE alone", "train", ("RANK is not set", "launcher"), env={"WORLD_SIZE": "2"}),
    Row(
        "RANK beyond WORLD_SIZE",
        "train",
        ("RANK=2", "WORLD_SIZE=2"),
        env={"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ),
    Row(
        "no MASTER_ADDR",
        "train",
        ("MASTER_ADDR is not set",),
        env={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ),
    Row("PMI_RANK alone", "train", ("PMI_RANK", "WORLD_SIZE"), env={"PMI_RANK": "0"}),
    Row("PMI_SIZE alone", "train", ("PMI_SIZE", "WORLD_SIZE"), env={"PMI_SIZE": "2"}),
    Row(
        "SLURM batch script",
        "train",
        ("batch script", "srun -n 1"),
        env={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"},
    ),
    Row(
        "SLURM host list huge",
        "train",
        ("host list",),
        env={
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_STEP_NODELIST": "n[1-999999999999]",
        },
    ),
    Row(
        "SLURM task counts huge",
        "train",
        ("SLURM_STEP_TASKS_PER_NODE",),
        env={
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "2(x99999999999)",
            "SLURM_STEP_NODELIST": "n1",
        },
    ),
    Row(
        "merge on two ranks",
        "merge",
        ("one process, not 2", "python"),
        env={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    ),
    # -- several ranks: refused together
    Row(
        "2 ranks: one never comes",
        "train",
        ("rank 1 of 2 did not come",),
        args=SHORT,
        env={
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29771",
        },
    ),
    Row(
        "2 ranks: MASTER_PORT 0",
        "train",
        ("MASTER_PORT", "1 to 65535"),
        env={"MASTER_PORT": "0"},
        **TWO,
    ),
    Row(
        "2 ranks: MASTER_PORT 99999",
        "train",
        ("MASTER_PORT", "1 to 65535"),
        env={"MASTER_PORT": "99999"},
        **TWO,
    ),
    Row(
        "2 ranks: MASTER_ADDR nowhere",
        "train",
        ("no-such-host.invalid",),
        args=SHORT,
        env={"MASTER_ADDR": "no-such-host.invalid"},
        **TWO,
    ),
    Row(
        "2 ranks: hidden_size -64",
        "train",
        ("hidden_size",),
        edit_json("base/config.json", hidden_size=-64),
        **TWO,
    ),
    Row(
        "2 ranks: tensor of NaN",
        "train",
        ("down_proj", "finite"),
        edit_tensors(
            "base/model.safetensors",
            lambda t: t["model.layers.1.mlp.down_proj.weight"][-1].fill_(float("nan")),
        ),
        **TWO,
    ),
    Row(
        "2 ranks: start timeout 1e300",
        "train",
        ("start_timeout_minutes", "less than or equal to"),
        args=("engine.start_timeout_minutes=1.0e300",),
        **TWO,
    ),
    Row(
        "2 ranks: MASTER_PORT -1",
        "train",
        ("MASTER_PORT=-1 is no port", "1 to 65535"),
        env={"MASTER_PORT": "-1"},
        **TWO,
    ),
    Row(
        "2 ranks: MASTER_PORT text",
        "train",
        ("MASTER_PORT='port' is not a number",),
        env={"MASTER_PORT": "port"},
        **TWO,
    ),
    Row("2 ranks: r 10**9", "train", ("adapter.r", "65536"), args=("adapter.r=1000000000",), **TWO),
    Row("2 ranks: lr nan", "train", ("train.lr", "finite"), args=("train.lr=.nan",), **TWO),
    Row("2 ranks: no key", "train", ("unknown key train.x",), args=("train.x=1",), **TWO),
    Row("2 ranks: no path", "train", ("base.path", "empty path"), args=("base.path=''",), **TWO),
]
