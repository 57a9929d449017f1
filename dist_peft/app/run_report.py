"""Write a run's report after training; merging and the quickstart add sections to its files."""

from dataclasses import replace
from pathlib import Path

from dist_peft.app.data_setup import DataLoaders
from dist_peft.app.layer_norms import measure_layer_norms
from dist_peft.app.model_card import ADAPTER, write_model_card
from dist_peft.app.model_setup import LoadedModel
from dist_peft.app.report_files import write_report_files
from dist_peft.app.run_facts import list_data_rows, list_environment_rows
from dist_peft.core.config.run import RunConfig
from dist_peft.core.world import World
from dist_peft.engine import resolve_engine_kind
from dist_peft.model.hub import public_base_name
from dist_peft.model.quantization_origin import read_quantization_origin
from dist_peft.train.metrics import format_byte_count
from dist_peft.train.run_summary import RunSummary

__all__ = ["find_public_base_name", "summarize_run", "write_run_report"]


def write_run_report(run_dir: Path, summary: RunSummary) -> Path:
    """Write the report of a finished run, and the card of its adapter."""
    norms = measure_layer_norms(run_dir / ADAPTER)
    if norms is not None:
        summary = replace(summary, layer_norms=tuple(norms.by_block), norm_meaning=norms.meaning)
    if (run_dir / ADAPTER).is_dir() and (run_dir / "config.yaml").is_file():
        write_model_card(run_dir, run_dir / ADAPTER, ADAPTER)
    return write_report_files(run_dir, summary, [])


def summarize_run(
    config: RunConfig, built: LoadedModel, loaders: DataLoaders, world: World
) -> RunSummary:
    """Return the facts of a run that its report shows in addition to the metrics."""
    engine = resolve_engine_kind(config.engine, world)
    summary = RunSummary.from_config(
        config,
        engine=engine,
        ranks=world.size,
        facts=[
            ("Trained parameters", f"{built.trained:,}"),
            ("Model as stored, all ranks", format_byte_count(built.stored_bytes)),
            ("Read from the base by rank 0", format_byte_count(built.bytes_read)),
        ],
    )
    environment = list_environment_rows(world, built.engine.device, engine)
    return replace(summary, data=tuple(list_data_rows(loaders)), environment=tuple(environment))


def find_public_base_name(config: RunConfig, built: LoadedModel) -> str:
    """Return the base's public name; of a packed base, that of its unquantized origin."""
    origin = read_quantization_origin(built.setup.directory)
    return str(origin.get("base") or public_base_name(config.base))
