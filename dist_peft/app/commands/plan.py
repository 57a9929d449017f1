"""``dist-peft plan``: memory, traffic and time of a run, without weights and without a GPU."""

import argparse
from pathlib import Path

from dist_peft.app.config_arguments import add_config_arguments, parse_path
from dist_peft.app.json_output import print_document
from dist_peft.core.config.io import load_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.plan.cluster import GPUS, Cluster, parse_byte_count, parse_link_rate
from dist_peft.plan.picture import draw_memory_bar
from dist_peft.plan.plan_report import format_plan
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.run_plan import plan_run
from dist_peft.plan.search import format_proposals, search_plans

__all__ = ["DOES_NOT_FIT", "add_arguments", "run"]

DOES_NOT_FIT = 3
"""Exit code where the planned run needs more memory than the cards have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft plan``."""
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=int, default=1, help="hosts (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=1, help="cards of each (default: 1)")
    parser.add_argument("--gpu-memory", required=True, help="of a card, such as 24GiB")
    parser.add_argument("--gpu", help=f"for times: {', '.join(r.name for r in GPUS.values())}")
    parser.add_argument("--link", help="network of a node, for times, such as 400Gbit")
    parser.add_argument(
        "--base-config",
        type=parse_path,
        help="config.json with the shapes, instead of that of base.path",
    )
    parser.add_argument("--out", type=parse_path, help="picture of the memory: a .svg or .png file")
    parser.add_argument("--search", action="store_true", help="also plan changes of the run")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace, world: World) -> int:
    """Print the plan; return 3 where it does not fit.

    Raises:
        UserError: the configuration, the base's description or an option is wrong.
    """
    config = load_config(args.config, args.overrides)
    cluster = _parse_cluster(args)
    setup_log(None, world.rank, world.size)
    if not world.is_first:
        return 0
    planned = build_planned_model(config, args.base_config)
    plan = plan_run(planned, cluster)
    if args.out is not None:
        cards = "1 card" if cluster.ranks == 1 else f"{cluster.ranks} cards"
        title = f"{Path(config.base.path).name} on {cards}, engine {plan.engine}"
        draw_memory_bar(plan.memory, title, args.out)
    proposals = list(search_plans(planned, cluster, args.base_config)) if args.search else []
    if args.json:
        found = {"search": [p.to_json() for p in proposals]} if args.search else {}
        print_document(plan.to_json() | found, indent=1)
    else:
        print("\n".join(format_plan(plan, planned.config, cluster)))
        if args.search:
            print("\n".join(format_proposals(proposals)))
    return 0 if plan.memory.fits else DOES_NOT_FIT


def _parse_cluster(args: argparse.Namespace) -> Cluster:
    for name in ("nodes", "gpus_per_node"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(args, name)}: give a number of 1 or more")
    rates = None
    if args.gpu is not None:
        rates = GPUS.get(args.gpu.lower())
        if rates is None:
            known = ", ".join(r.name for r in GPUS.values())
            raise UserError(f"--gpu {args.gpu} is not known; known are {known}")
    link = None if args.link is None else parse_link_rate(args.link)
    memory = parse_byte_count(args.gpu_memory)
    return Cluster(args.nodes, args.gpus_per_node, memory, rates, link)
