"""Every claim of docs/architecture.md, and the rules of docs/decisions, with the test that fails
when it stops being true. Rules about the source itself are tested here."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_peft.adapters.lora.layer import LoraLinear
from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import LoraConfig, QuantConfig, TrainConfig
from dist_peft.core.span import Span, row_span
from dist_peft.engine.engine_protocol import Engine
from dist_peft.engine.single import SingleEngine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.codec import make_codec
from dist_peft.train.optimizers import make_optimizer_factory
from tests.support.adapters import fill, frozen_model, tiny_llama
from tests.support.import_edges import find_import_edges

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dist_peft"
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}

HERE = "tests/test_architecture.py::"
RULES = "tests/test_engineering.py::"
ZERO, FSDP2 = "tests/engine/test_zero.py::", "tests/engine/test_fsdp2.py::"
MATMUL = "tests/quant/test_frozen_matmul.py::"
WORLD = "tests/core/test_world.py::"

# Page -> a phrase of it -> the tests that check it. ``test_every_block_of_the_page_is_checked``
# wants a phrase of each paragraph, list item and table row of architecture.md.
CLAIMS: dict[str, dict[str, list[str]]] = {
    "architecture.md": {
        "each row is quantized on the rank that will keep it": [
            "tests/model/test_load.py::test_each_rank_reads_and_keeps_its_own_rows"
        ],
        "A package imports only packages below it": [
            f"{RULES}test_tool_is_content",
            f"{HERE}test_the_pages_layers_are_those_of_import_linter",
        ],
        "a method imports what methods share": [f"{HERE}test_imports_of_adapters_have_no_cycle"],
        "Each library stays in the few files": [f"{RULES}test_library_stays_in_its_place"],
        "No file has more than 400 lines": [f"{RULES}test_file_and_function_sizes"],
        "every file has a test at the mirrored path": [f"{RULES}test_has_mirrored_test"],
        "A verb is a file of `app/commands`": [
            "tests/app/test_cli.py::test_every_command_is_a_module_with_arguments"
        ],
        "no other module of `app` derives one configuration from another": [
            f"{HERE}test_configurations_are_derived_in_one_module",
            "tests/app/test_resolved_config.py::test_quantization_is_that_of_the_files",
        ],
        "`SolvedBase`, goes into the resolution": [
            "tests/app/test_resolved_config.py::test_solved_base_takes_the_place_of_the_base"
        ],
        "no adapter knows a codec's name": [f"{HERE}test_no_adapter_knows_a_codecs_name"],
        "no engine knows an adapter's": [f"{HERE}test_no_engine_knows_an_adapters_name"],
        "there is no class for it": [f"{HERE}test_qlora_is_no_class"],
        "Nothing is assigned to a module of another library": [
            f"{HERE}test_other_libraries_are_changed_in_one_file",
            "tests/engine/test_compat.py::test_the_patch_goes_when_the_oldest_torch_needs_none",
        ],
        "A tour of one run, in reading order": [f"{HERE}test_packages_and_files_of_the_tour_exist"],
        "on 8 ranks": [f"{HERE}test_the_row_of_the_example"],
        "with one `uint8` parameter": [f"{HERE}test_the_skeletons_linears_are_packed_and_on_meta"],
        "rank 3 keeps rows 1536 to 2047": [f"{HERE}test_the_row_of_the_example"],
        "512 x 8192 bytes": [
            f"{HERE}test_the_row_of_the_example",
            "tests/store/test_reader.py::test_the_system_is_asked_for_exactly_these_bytes",
            "tests/store/test_reader.py::test_ranks_read_disjoint_rows_that_cover_the_tensor",
        ],
        "A codec is row-local": ["tests/quant/test_codec.py::test_is_row_local_bit_for_bit"],
        "The row is now 2120 bytes": [f"{HERE}test_the_row_of_the_example"],
        "never broadcast": [f"{HERE}test_only_a_hessian_factor_is_broadcast"],
        "never in a checkpoint": [
            f"{HERE}test_a_checkpoint_has_trainable_parameters_only",
            f"{ZERO}test_state_goes_on_at_another_world_size_and_in_another_engine",
        ],
        "Forward gathers a block's *bytes*": [
            f"{FSDP2}test_bytes_gathered_are_packed_bytes_times_passes",
            f"{ZERO}test_bytes_gathered_are_packed_bytes_times_passes",
        ],
        "drops the dequantized weight": [f"{MATMUL}test_no_decoded_weight_waits_for_backward"],
        "Backward gathers and dequantizes again": [
            f"{MATMUL}test_backward_uses_the_bytes_of_that_moment",
            f"{MATMUL}test_storage_may_be_freed_between_forward_and_backward",
        ],
        "Only adapters have gradients and optimizer state": [
            f"{HERE}test_a_checkpoint_has_trainable_parameters_only"
        ],
        "written in PEFT's format": [
            "tests/adapters/test_directory.py::test_peft_computes_the_same",
            f"{ZERO}test_gather_cannot_give_an_empty_tensor",
        ],
        "reads row 1600 again": [
            "tests/export/test_merge_weights.py::test_original_base_equals_peft",
            "tests/export/test_merge_weights.py::test_decoded_base_is_what_training_saw",
            "tests/export/test_merge_weights.py::test_chunks_do_not_change_a_byte",
        ],
        "`engine/engine_protocol.py`:": [f"{HERE}test_the_page_names_every_member_of_the_protocol"],
        "no class of an engine is named outside of `engine`": [
            f"{HERE}test_the_rest_asks_an_engine"
        ],
        "| `single` | whole | whole |": ["tests/engine/test_single.py::test_spans_are_whole"],
        "FSDP2 shards of packed rows (`DTensor`)": [
            f"{FSDP2}test_each_rank_rests_on_its_own_rows",
            f"{FSDP2}test_equals_single",
        ],
        "gathered a block at a time, in every stage": [
            f"{ZERO}test_each_rank_rests_on_its_own_rows",
            f"{ZERO}test_equals_single",
        ],
        "DeepSpeed never sees the base": [
            f"{ZERO}test_bytes_gathered_are_packed_bytes_times_passes"
        ],
        "Gradients are summed over ranks, not averaged": [
            f"{FSDP2}test_equals_single",
            f"{ZERO}test_equals_single",
        ],
        "the number of target tokens of the whole optimizer step": [
            "tests/train/test_loop.py::test_loss_is_the_mean_over_all_targets",
            "tests/train/test_loop.py::test_micro_batches_do_not_matter",
        ],
        "a context in which a model computes the base's function": [
            "tests/adapters/test_adapter_switch.py::test_logits_are_those_of_the_base",
            "tests/adapters/test_adapter_switch.py::test_initial_factors_stay",
            "tests/adapters/test_adapter_switch.py::test_refused_where_the_base_is_gone",
        ],
        "takes it out again where the merger also has": [
            "tests/export/test_task_change.py::test_one_change_goes_and_another_comes",
            "tests/export/test_task_change.py::test_factors_are_divided_out",
            "tests/export/test_task_change.py::test_dora_is_put_in_and_not_taken_out",
        ],
        "keeps as two more moments of the optimizer": [
            "tests/train/test_importance.py::test_equal_to_the_formula_and_after_a_resume",
            "tests/app/test_adalora.py::test_cut_in_the_middle_phase_and_in_the_last",
        ],
        "no other code asks for the kind of a batch or data set": [
            "tests/train/test_objective.py::test_no_code_asks_for_the_kind_of_a_batch_or_data_set"
        ],
        "sums the losses of a micro-batch": [
            "tests/train/test_objective.py::test_token_loss_and_its_statistics"
        ],
        "raises the same error on all": [f"{WORLD}test_error_of_one_is_error_of_all"],
        "One rank prints the message": [
            "tests/app/test_cli.py::test_two_ranks_tell_a_mistake_once",
            "tests/app/test_exit_codes.py::test_an_expected_error_is_one_message",
        ],
        "Code that asks which rank it runs on": [f"{HERE}test_rank_dependent_code"],
        "`World.run_on_first(phase, action)` writes for all": [
            f"{WORLD}test_first_rank_writes_and_its_error_is_every_ranks"
        ],
    },
    "decisions/0001-one-uint8-parameter.md": {
        "Scales lie in the row next to the codes": [
            "tests/quant/test_nf4.py::test_layout_is_the_documented_one"
        ],
        "payload and first-level absmax are bit-equal to bitsandbytes": [
            "tests/quant/test_nf4.py::test_payload_and_absmax_equal_bitsandbytes"
        ],
    },
    "decisions/0002-gradients-are-summed.md": {
        "the engine must sum": [f"{FSDP2}test_equals_single", f"{ZERO}test_equals_single"]
    },
    "decisions/0003-base-dropout-off.md": {
        "masks depend on (seed, module, step, sample)": [
            "tests/model/test_sample_dropout.py::test_mask_depends_on_seed_path_step_and_sample",
            "tests/model/test_sample_dropout.py::test_recomputation_gives_the_same_gradient",
        ]
    },
    "decisions/0007-right-or-refused.md": {
        "Contents are compared, not paths": [
            "tests/app/test_run_identity.py::test_same_contents_elsewhere_are_the_same_run",
            "tests/app/test_resuming.py::test_refused_by_key_with_both_values",
        ],
        "a refused command changes nothing on disk": [
            "tests/app/test_finished_run.py::test_refused_override_changes_nothing"
        ],
        "Trust in code comes from the command line alone": [
            "tests/app/test_finished_run.py::test_configuration_file_cannot_switch_remote_code_on",
            "tests/app/test_finished_run.py::test_checkpoint_of_a_stranger_runs_nothing",
        ],
        "Bytes that are made must not depend on the machine": [
            "tests/quant/test_exact_math.py::test_packed_bytes_are_those_of_every_machine"
        ],
        "A verification that cannot fail is none": [
            "tests/export/test_verify.py::test_lost_adapter_has_relative_error_one"
        ],
        "A new configuration key is refused at a resume": [
            "tests/app/test_resuming.py::test_every_key_is_refused_unless_it_was_thought_of"
        ],
    },
}

# -- the table ---------------------------------------------------------------------------------


def read_page(page: str) -> str:
    return (ROOT / "docs" / page).read_text()


def squeeze(text: str) -> str:
    return " ".join(text.split())


def list_blocks(text: str) -> list[str]:
    """Paragraphs, list items and table rows of a page, without headings, code and table heads."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^#.*$|^\|[^\n]*\n\|[-|]+\|$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(?=\|| *\d+\. | *- )", "\n", text, flags=re.MULTILINE)
    return [squeeze(block) for block in re.split(r"\n\s*\n", text) if block.strip()]


@pytest.mark.parametrize("page", CLAIMS)
def test_claims_are_on_the_page(page: str) -> None:
    text = squeeze(read_page(page))
    assert not [phrase for phrase in CLAIMS[page] if phrase not in text]


def test_every_block_of_the_page_is_checked() -> None:
    phrases = CLAIMS["architecture.md"]
    blocks = list_blocks(read_page("architecture.md"))
    assert len(blocks) > 20
    assert not [block for block in blocks if not any(phrase in block for phrase in phrases)]


@pytest.mark.parametrize("page", CLAIMS)
def test_the_tests_of_claims_exist(page: str) -> None:
    for tests in CLAIMS[page].values():
        assert tests
        for test in tests:
            file, name = test.split("::")
            tree = ast.parse((ROOT / file).read_text())
            assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, test


# -- layers ------------------------------------------------------------------------------------


def test_packages_and_files_of_the_tour_exist() -> None:
    """The tree has each package of dist_peft, and the tour of a run names files that are there."""
    section = read_page("architecture.md").split("## Packages")[1].split("\n## ")[0]
    tree = section.split("```")[1]
    packages = {line.split()[0].rstrip("/") for line in tree.splitlines() if line[:2] == "  "}
    package = ROOT / "dist_peft"
    assert packages == {p.parent.name for p in package.glob("*/__init__.py")}
    others = {line.split()[0] for line in tree.splitlines()[1:] if line and line[0] != " "}
    assert others and all((ROOT / name).is_dir() for name in others)
    files = re.findall(r"`([a-z_/0-9]+\.py)`", section)
    assert len(files) > 10 and all((package / file).is_file() for file in files)


def test_the_pages_layers_are_those_of_import_linter() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [
        layer for layer in contracts["contracts"][0]["layers"] if not layer.startswith("__main")
    ]
    block = read_page("architecture.md").split("```")[1]
    lines = [line for line in block.strip().splitlines() if not line.startswith(" ")]
    assert [re.split(r"\s{2,}", line)[0] for line in lines] == layers


def test_imports_of_adapters_have_no_cycle() -> None:
    found = find_import_edges("adapters")
    levels = found.list_levels()  # a ValueError names a cycle
    height = {part: number for number, level in enumerate(levels) for part in level}
    assert all(height[a] > height[b] for a, b in found.between_parts)
    assert len(found.parts) <= 25 and len(found.between_parts) <= 78
    methods = {part for part in found.parts if (PACKAGE / "adapters" / part).is_dir()}
    tables = {"adapter_format", "directory", "method_table"}
    assert len(methods) >= 9
    assert not {(a, b) for a, b in found.between_parts if a in methods and b in tables}


def test_a_cycle_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "dist_peft" / "adapters"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from dist_peft.adapters.b import x\n")
    (folder / "b.py").write_text("import dist_peft.adapters.a\n")
    found = find_import_edges("adapters", tmp_path)
    assert found.between_parts == {("a", "b"), ("b", "a")}
    with pytest.raises(ValueError, match="cycle among a, b"):
        found.list_levels()


def test_configurations_are_derived_in_one_module() -> None:
    places = {place for place, node in iterate_nodes("app") if is_call_of(node, "model_copy")}
    assert places == {"app/resolved_config.py"}


# -- sums, not products ------------------------------------------------------------------------


def iterate_nodes(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield (file, node) for every node of the package, or of some folders."""
    for place, tree in TREES.items():
        if not folders or place.startswith(tuple(f"{folder}/" for folder in folders)):
            yield from ((place, node) for node in ast.walk(tree))


def is_call_of(node: ast.AST, *names: str) -> bool:
    """Whether ``node`` calls a function or method of one of these names."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Attribute):
        return called.attr in names
    return isinstance(called, ast.Name) and called.id in names


def list_codec_classes() -> set[str]:
    found = {n.name for _, n in iterate_nodes("quant") if isinstance(n, ast.ClassDef)}
    classes = {name for name in found if name.endswith("Codec")} - {"Codec"}
    assert {"Nf4Codec", "RawCodec", "AffineCodec"} <= classes
    return classes


def test_no_adapter_knows_a_codecs_name() -> None:
    codecs = list_codec_classes()
    names = {"nf4", "raw", "int2", "int3", "int4", "int8"}
    found = []
    for place, node in iterate_nodes("adapters"):
        knows = (isinstance(node, ast.Constant) and node.value in names) or (
            isinstance(node, ast.Name) and node.id in codecs
        )
        if knows:
            found.append(f"{place}: {ast.unparse(node)}")
    assert not found


def test_no_engine_knows_an_adapters_name() -> None:
    kinds = {"lora", "qalora", "ia3", "bottleneck", "fusion", "prefix", "ptuning", "prompt"}
    kinds |= {"vera", "loha", "lokr", "adalora"}
    found = [
        f"{place}: {node.value}"
        for place, node in iterate_nodes("engine")
        if isinstance(node, ast.Constant) and node.value in kinds
    ]
    assert not found


def test_qlora_is_no_class() -> None:
    classes = [node.name for _, node in iterate_nodes() if isinstance(node, ast.ClassDef)]
    assert len(classes) > 200 and not [name for name in classes if name.lower().startswith("qlora")]


def test_the_rest_asks_an_engine() -> None:
    engines = {
        node.name
        for _, node in iterate_nodes("engine")
        if isinstance(node, ast.ClassDef) and node.name.endswith("Engine") and node.name != "Engine"
    }
    assert engines == {"SingleEngine", "Fsdp2Engine", "ZeroEngine"}
    users = {
        place
        for place, node in iterate_nodes()
        if (isinstance(node, ast.Name | ast.alias) and getattr(node, "id", None) in engines)
        or (isinstance(node, ast.alias) and node.name in engines)
    }
    assert {place for place in users if not place.startswith("engine/")} == {
        "plan/traced_engine.py"
    }


def test_the_page_names_every_member_of_the_protocol() -> None:
    members = {name for name in vars(Engine) if not name.startswith("_")} - {"bytes_gathered"}
    page = read_page("architecture.md")
    section = page[page.index("## The engine protocol") : page.index("The rest of the program")]
    assert set(re.findall(r"`(\w+)`", section)) == members


def test_only_a_hessian_factor_is_broadcast() -> None:
    """And texts, with their lengths."""
    calls = [
        (place, ast.unparse(node.args[0]))
        for place, node in iterate_nodes()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("broadcast", "broadcast_tensor")
    ]
    assert sorted(calls) == [
        ("app/calibration_sums.py", "result"),  # of an adapter's initialization
        ("app/chat_model.py", "token"),  # that is generated
        ("app/run_samples.py", "tokens"),
        ("compress/gptq_driver.py", "factor.order"),
        ("compress/gptq_driver.py", "factor.upper"),
        ("compress/prune_driver.py", "factor.diagonal"),
        ("compress/prune_driver.py", "factor.upper"),
        ("compress/solved_blocks.py", "whole"),  # before training, of a solve that was stopped
        ("core/text_exchange.py", "data"),
        ("core/text_exchange.py", "length"),
        ("core/text_exchange.py", "lengths"),
        ("core/world.py", "tensor"),
        ("engine/chunk_gather.py", "chunk"),  # an all-gather: each rank sends its own rows
        ("engine/routed_gather.py", "buffer"),  # the same, of experts that are routed to
    ]


# -- one row's way -----------------------------------------------------------------------------


def test_the_row_of_the_example() -> None:
    span = row_span(4096, 8, 3)
    assert span == Span(1536, 2048) and 1600 in range(span.start, span.stop)
    assert (len(span), 4096 * torch.bfloat16.itemsize) == (512, 8192)
    assert make_codec(QuantConfig(), torch.bfloat16).num_row_bytes(4096) == 2120


def test_the_skeletons_linears_are_packed_and_on_meta() -> None:
    codec = make_codec(QuantConfig(), torch.bfloat16)
    linear = FrozenLinear(4096, 4096, codec, False, torch.bfloat16, "", "meta")
    ((name, packed),) = linear.named_parameters()
    assert (name, packed.dtype, packed.is_meta) == ("packed", torch.uint8, True)
    assert packed.shape == (4096, 2120) and not packed.requires_grad


def test_a_checkpoint_has_trainable_parameters_only() -> None:
    original = tiny_llama()
    model = frozen_model(original)
    adapter = LoraAdapter(LoraConfig(r=3), seed=0, arithmetic=torch.float32)
    adapter.attach_to_model(model)
    fill(model, original)
    engine = SingleEngine(torch.device("cpu"))
    factory = make_optimizer_factory(TrainConfig(), engine.device)
    engine.setup_optimizer(model, factory, adapter.get_lr_scale)
    own = {
        f"{path}.{name}"
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLinear)
        for name in layer.shapes
    }
    assert len(own) == 2 * 14
    kinds = ("param", "exp_avg", "exp_avg_sq")
    state = engine.training_state_dict(model)
    assert set(state) == {f"{kind}/{name}" for kind in kinds for name in own}
    loss = nn.functional.mse_loss(model(torch.tensor([[1, 2, 3]])).logits, torch.zeros(1, 3, 67))
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == own


# -- ranks -------------------------------------------------------------------------------------

# Folders and files that may ask which rank this is.
RANK_PLACES = (
    "core/",
    "engine/",
    "train/checkpoint",
    "train/metrics.py",
    "train/progress.py",
    "app/run_directory.py",
)

# Called with the rank, which they need to name or silence their output.
RANK_TAKERS = {"setup_log", "MetricsWriter", "ProgressDisplay", "open_metrics"}

# Function -> why it cannot be ``World.run_on_first``.
RANK_FUNCTIONS = {
    "_run_until_exit": "one rank prints the error that all ranks raise",
    "name_run_directory": "one rank writes log.txt, also where another has failed",
    "end_stalled_run": "each rank reports that it ends, and writes its traceback",
    "_report_failure": "every rank writes its traceback, one prints the message",
    "_name_rank": "the rank is named in a message",
    "RunProbe.restore": "the file of the first rank decides",
    "EvaluationHistory.read_from_run": "the file of the first rank decides",
    "_find_unevaluated_record": "the file of the first rank decides",
    "SolvedBlocks.restore_block": "the first rank reads what all receive",
    "SolvedBlocks.save_block": "the first rank keeps what it writes",
    "count_resting_bytes": "a plan is made for the rank that keeps most",
    "run": "a verb prints its result on one rank, without a process group",
    "write_trained_weights": "the first rank keeps a file open between collectives",
    "open_base_writer": "the first rank keeps a file open between collectives",
    "_train_tasks_sequentially": "whether a task is finished is read where tasks.json is written",
    "open_sweep_file": "sweep.json is read where it is written",
    "read_held_out_losses": "the file of the first rank decides",
    "SweepLoop._is_complete": "the directories that the first rank sees decide",
    "SweepLoop._lacks_adapter": "the directories that the first rank sees decide",
    "SweepLoop._record": "the first rank writes what all ranks change in memory",
    "CalibrationSums.map_sums": "ranks take turns to decompose a sum",
    "CalibrationSums._sum_local_batches": "the first rank has the first sample",
    "BlockLoop._factorize_on_one_rank": "ranks take turns to factor a Hessian",
    "BlockLoop._accumulate_local_hessian": "the first rank has the first sample",
    "AdapterTraining.write_adapter": "the rank that writes the adapter alone keeps it gathered",
    "hash_base_files": "files of the base are dealt to ranks",
    "_share_text": "the first rank writes what all receive",
    "_make_scratch": "the first rank removes the directory that it has made",
    "_print_result": "one rank prints the result of all",
    "hash_unread_tensors": "chunks of the base's files are dealt to ranks",
}


def find_rank_dependent_code() -> Iterator[tuple[str, str]]:
    """Yield (file, function) of every use of a rank outside of ``RANK_PLACES``."""
    for place, tree in TREES.items():
        if place.startswith(RANK_PLACES):
            continue
        taken = {
            id(argument)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and is_call_of(call, *RANK_TAKERS)
            for argument in call.args
        }
        for name, function in iterate_functions(tree):
            if any(id(n) not in taken and asks_for_rank(n) for n in ast.walk(function)):
                yield place, name


def iterate_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield functions, and methods as CLASS.METHOD; inner functions belong to theirs."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{node.name}.{member.name}", member


def asks_for_rank(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        if node.attr not in ("is_first", "is_first_of_node", "rank"):
            return False
        return ast.unparse(node.value).rpartition(".")[2] == "world"
    if isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant):
        return node.comparators[0].value == 0 and ast.unparse(node.left).endswith("rank")
    return False


def test_rank_dependent_code() -> None:
    found = list(find_rank_dependent_code())
    assert {function for _, function in found} == set(RANK_FUNCTIONS)
    assert {place.partition("/")[0] for place, _ in found} == {"app", "compress", "plan", "train"}


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ("self.world.is_first", True),
        ("world.rank", True),
        ("rank == 0", True),
        ("world.local_rank == 0", True),
        ("world.size == 1", False),
        ("config.rank", False),
    ],
)
def test_a_question_for_the_rank_is_recognized(code: str, asks: bool) -> None:
    assert any(asks_for_rank(node) for node in ast.walk(ast.parse(code))) is asks


# -- other libraries ---------------------------------------------------------------------------


def list_foreign_names(tree: ast.AST) -> set[str]:
    """Names that a file binds to modules, or to members of modules, of other libraries."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dist_peft"):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and is_call_of(node.value, "import_module"):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def list_foreign_assignments(tree: ast.AST) -> list[str]:
    """Assignments to attributes of other libraries' modules; the environment is no module."""
    names = list_foreign_names(tree)
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif is_call_of(node, "setattr", "delattr"):
            assert isinstance(node, ast.Call)
            targets = [ast.Attribute(node.args[0], "any")]
        for target in targets:
            owner = target
            while isinstance(owner, ast.Attribute | ast.Subscript):
                owner = owner.value
            is_member = owner is not target and isinstance(owner, ast.Name)
            if is_member and owner.id in names and "os.environ" not in ast.unparse(target):
                found.append(ast.unparse(node))
    return found


def test_other_libraries_are_changed_in_one_file() -> None:
    found = {place for place, tree in TREES.items() if list_foreign_assignments(tree)}
    assert found == {"engine/compat.py"}


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("import torch\ntorch.nn.Linear = None", 1),
        ("from torch import nn\nsetattr(nn, 'Linear', None)", 1),
        ("import importlib\nds = importlib.import_module('x')\nds.ops.table['a'] = 1", 1),
        ("import os\nos.environ['A'] = '1'", 0),
        ("from dist_peft.core import log\nlog.x = 1", 0),
        ("model.layer.weight = None", 0),
    ],
)
def test_an_assignment_to_a_library_is_recognized(code: str, count: int) -> None:
    assert len(list_foreign_assignments(ast.parse(code))) == count
