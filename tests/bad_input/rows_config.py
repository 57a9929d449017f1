"""Bad values in configuration files and overrides."""

from tests.bad_input.case import Row, edit_yaml, fifo, remove, write


def _value(name: str, setting: str, *words: str, command: str = "train") -> Row:
    """A row of one override that is refused by the name of its key."""
    key = setting.partition("=")[0]
    return Row(name, command, (key, *words), args=(setting,))


ROWS = [
    # -- the file
    Row("yaml missing", "train", ("config.yaml does not exist", "--config"), remove("config.yaml")),
    Row("yaml empty", "train", ("config.yaml", "base is required"), write("config.yaml", "")),
    Row(
        "yaml not utf-8",
        "train",
        ("config.yaml is not valid YAML",),
        write("config.yaml", b"a: \xe9"),
    ),
    Row(
        "yaml a list",
        "train",
        ("config.yaml must hold sections", "base:"),
        write("config.yaml", "[1, 2]"),
    ),
    Row("yaml a number", "train", ("config.yaml", "sections"), write("config.yaml", "7")),
    Row(
        "yaml a tab",
        "train",
        ("config.yaml is not valid YAML", "line"),
        write("config.yaml", "base:\n\tpath: x"),
    ),
    Row(
        "yaml a tag of python",
        "train",
        ("config.yaml is not valid YAML", "python/object"),
        write("config.yaml", "base: !!python/object/apply:os.system [ls]"),
    ),
    Row(
        "yaml deep nesting",
        "train",
        ("config.yaml", "nested"),
        write("config.yaml", "a: " + "[" * 3000 + "]" * 3000),
    ),
    Row(
        "yaml deep mapping",
        "train",
        ("config.yaml", "nested"),
        write("config.yaml", "{a: " * 2500 + "1" + "}" * 2500),
    ),
    Row(
        "yaml alias bomb",
        "train",
        ("config.yaml is not valid YAML", "expansion"),
        write(
            "config.yaml",
            "\n".join(
                [
                    "a0: &a0 [x, x]",
                    *(
                        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]"
                        for i in range(1, 14)
                    ),
                ]
            ),
        ),
    ),
    Row(
        "yaml a key twice",
        "train",
        ("config.yaml", "duplicate key"),
        write("config.yaml", "base: {path: a}\nbase: {path: b}\n"),
    ),
    Row("yaml a FIFO", "train", ("config.yaml is no file", "--config"), fifo("config.yaml")),
    Row(
        "yaml a recursive alias",
        "train",
        ("config.yaml is not valid YAML", "recursive"),
        write("config.yaml", "base: &b\n  path: *b\n"),
    ),
    Row(
        "yaml a reference to nothing",
        "train",
        ("config.yaml", "NOT_THERE"),
        edit_yaml("config.yaml", base__path="${oc.env:NOT_THERE}"),
    ),
    Row(
        "yaml a reference to itself",
        "train",
        ("config.yaml", "${...} reference"),
        write("config.yaml", "base: {path: '${base.path}'}"),
    ),
    Row(
        "yaml trust in the file",
        "train",
        ("trust_remote_code", "command line"),
        edit_yaml("config.yaml", base__trust_remote_code=True),
    ),
    # -- overrides
    Row(
        "override without =", "train", ("override 'train.lr'", "key.sub=value"), args=("train.lr",)
    ),
    Row("override of broken YAML", "train", ("override 'train.lr=[1'",), args=("train.lr=[1",)),
    Row(
        "override with a NUL", "train", ("save.dir", "control characters"), args=("save.dir=a\0b",)
    ),
    Row(
        "override of deep nesting",
        "train",
        ("override", "nested"),
        args=("train.lr=" + "[" * 3000 + "]" * 3000,),
    ),
    # -- keys
    _value("unknown key", "train.learning_rate=1", "unknown key"),
    _value(
        "unknown key of the quantization",
        "base.quant={kid: nf4}",
        "unknown key base.quant.kid",
        "kind",
    ),
    _value("section null", "data=null", "must be a section"),
    # -- habits of other trainers
    _value("key of transformers", "train.save_steps=5", "here it is save.every"),
    _value("method of other trainers", "adapter.kind=qlora", "write adapter.kind: lora and base.q"),
    _value("text for a list", "adapter.target_modules=q_proj", "write adapter.target_modules: [q_"),
    # -- numbers
    _value("r 0", "adapter.r=0", "greater than or equal to 1"),
    _value("r 10**9", "adapter.r=1000000000", "adapter.r"),
    _value("r 10**30", f"adapter.r={10**30}", "adapter.r"),
    _value("r of a pattern 10**9", "adapter.rank_pattern={q_proj: 1000000000}", "1000000000"),
    _value("alpha nan", "adapter.alpha=.nan", "finite"),
    _value("dropout 1", "adapter.dropout=1.0", "less than 1"),
    _value("through no quantizer", "adapter.through_quantizer=true", "set base.quant"),
    Row(
        "through nested scales",
        "train",
        ("adapter.through_quantizer", "base.quant.double_quant: false"),
        args=("adapter.through_quantizer=true", "base.quant={kind: nf4}"),
    ),
    Row(
        "through with dropout",
        "train",
        ("through_quantizer", "leave out dropout"),
        args=("adapter.through_quantizer=true", "adapter.dropout=0.1"),
    ),
    _value(
        "virtual tokens 10**9",
        "adapter={kind: prompt, num_virtual_tokens: 1000000000}",
        "num_virtual_tokens",
    ),
    _value(
        "encoder 10**9 wide",
        "adapter={kind: ptuning, encoder_hidden_size: 1000000000}",
        "encoder_hidden_size",
    ),
    _value(
        "prefix encoder 10**9 wide",
        "adapter={kind: prefix, encoder_hidden_size: 1000000000}",
        "encoder_hidden_size",
    ),
    _value(
        "bottleneck 10**9 wide",
        "adapter={kind: bottleneck, reduction_factor: 1.0e-9}",
        "reduction_factor",
    ),
    _value("lr nan", "train.lr=nan", "number"),
    _value("steps and epochs", "train.epochs=2", "train.steps or train.epochs"),
    Row("epochs 1e300", "train", ("epochs",), args=("train.steps=null", "train.epochs=1.0e300")),
    _value("global_batch 10**12", "train.global_batch=1000000000000", "train.global_batch"),
    _value("global_batch 10**30", f"train.global_batch={10**30}", "train.global_batch"),
    _value("seed 2**64", f"train.seed={2**64}", "less than"),
    _value("device cuda without one", "train.device=cuda", "use cpu or auto"),
    Row(
        "kernels of another library",
        "train",
        ("engine.kernels", "liger"),
        args=("engine.kernels=liger",),
        env={"TRITON_INTERPRET": ""},
    ),
    _value(
        "decodes shared with nothing",
        "engine={share_decodes: true, keep_results: products}",
        "engine",
        "share_decodes contradicts keep_results: products",
    ),
    _value("early stop without evaluation", "train.early_stop=1", "train.eval_every"),
    _value("seq_len 10**12", "data.seq_len=1000000000000", "data.seq_len"),
    _value("timeout 1e300", "engine.timeout_minutes=1.0e300", "less than or equal to"),
    _value("start timeout 1e300", "engine.start_timeout_minutes=1.0e300", "less than or equal to"),
    _value("group size 10**12", "base.quant={kind: int, group_size: 1000000000000}", "group_size"),
    _value("fp8 of 4 bits", "base.quant={kind: fp8, bits: 4}", "fp8 has 8 bits"),
    _value("mxfp4 in groups of 64", "base.quant={kind: mxfp4, group_size: 64}", "groups of 32"),
    _value("nvfp4 by hqq", "base.quant={kind: nvfp4, solver: hqq}", "solver hqq is for kind: int"),
    _value(
        "packed ends of gptq",
        "base.quant={kind: int, solver: gptq, embeddings: true}",
        "embeddings",
        "solver hqq",
    ),
    Row(
        "packed ends and an adapted embedding",
        "train",
        ("adapter.embeddings", "base.quant.embeddings"),
        args=("base.quant={embeddings: true}", "adapter.embeddings=true"),
    ),
    Row(
        "packed ends and a trained head",
        "train",
        ("lm_head", "base.quant.embeddings", "adapter.parts"),
        args=("base.quant={embeddings: true}", "adapter={kind: partial, parts: [head]}"),
    ),
    Row(
        "packed ends, written in advance",
        "quantize",
        ("base.quant.embeddings", "set it to false"),
        args=("base.quant={kind: int, embeddings: true}",),
    ),
    _value("attention nonsense", "base.attention=sparkling", "sparkling"),
    # -- names and paths
    Row(
        "zeros kept with DoRA",
        "train",
        ("keep_zeros does not go with use_dora",),
        args=("adapter.keep_zeros=true", "adapter.use_dora=true"),
    ),
    Row(
        "zeros kept of HQQ",
        "train",
        ("adapter.keep_zeros", "solver hqq", "solver: rtn"),
        args=("adapter.keep_zeros=true", "base.quant={kind: int, solver: hqq}"),
    ),
    _value("zeros kept of a dense base", "adapter.keep_zeros=true", "prune"),
    _value("targets that match nothing", "adapter.target_modules=[zzz]", "zzz"),
    _value("targets a broken regex", "adapter.target_modules=['(']", "regular expression"),
    _value(
        "targets a slow regex",
        "adapter.target_modules=['(.*.*.*.*.*.*.*.*.*.*.*.*)*x']",
        "target_modules",
    ),
    _value(
        "ranks of a slow regex",
        "adapter.rank_pattern={'(a*)*(.*.*.*.*.*.*.*.*.*.*.*)*x': 3}",
        "rank_pattern",
    ),
    _value("train a number", "data.train=5", "valid list"),
    _value("eval a number", "data.eval=5", "data.eval"),
    _value("train of none", "data.train=[]", "at least 1 item"),
    _value("save.dir empty", "save.dir=''", "save.dir", "an empty path"),
    _value("save.dir a file", "save.dir=train.jsonl", "train.jsonl is a file"),
    _value("save.dir too long", f"save.dir={'x' * 300}", "save.dir", "too long"),
    _value("save.dir the base", "save.dir=base", "base"),
    _value("base.path empty", "base.path=''", "base.path", "an empty path"),
    _value("base.path nowhere", "base.path=./nowhere", "nowhere does not exist"),
    _value("base.path too long", f"base.path=./{'x' * 300}", "base.path", "too long"),
    _value("base.path not on the hub", "base.path=no-such-org/no-such-model", "hub"),
    _value("cache_dir too long", f"data.cache_dir={'x' * 300}", "cache_dir"),
    _value("cache_dir empty", "data.cache_dir=''", "cache_dir", "an empty path"),
    _value("resume nowhere", "resume=nowhere", "nowhere"),
    _value("resume empty", "resume=''", "resume", "an empty path"),
    _value("adapter none", "adapter={kind: none}", "nothing would be trained"),
    _value(
        "fused adapters nowhere", "adapter.adapters=[nowhere, neither]", "nowhere", command="fuse"
    ),
    Row(
        "fused adapters of one name",
        "fuse",
        ("two of adapters are called run", "name them"),
        args=("adapter.adapters=[run/adapter, run/adapter]",),
    ),
]
