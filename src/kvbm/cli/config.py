"""`kvbm config`: the effective settings, and where each came from."""

import argparse
from typing import Any

from kvbm.cli.output import print_json, print_table
from kvbm.config import SECRETS, Config, iter_settings, load_config


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "config",
        help="the effective settings, and where each came from",
        description="The effective settings, and where each came from: defaults, the file that KVBM_CONFIG "
        "names, the environment. What an engine is given in kv_connector_extra_config can't be seen here.",
    )
    parser.add_argument("--all", action="store_true", help="also those that nobody has set")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = load_config()
    shown = {
        key: setting
        for key, setting in effective(config).items()
        if args.all or setting["source"] != "default"
    }
    if args.json:
        print_json({"settings": shown, "notices": config.notices})
        return 0
    if shown:
        rows = [(key, _as_written(item["value"]), item["source"]) for key, item in shown.items()]
        print_table(("setting", "value", "from"), rows)
    else:
        print("Nothing is set; `kvbm config --all` shows the defaults.")
    if not config.enabled:
        print("\nKVBM is off: give it memory with DYN_KVBM_CPU_CACHE_GB (or DYN_KVBM_DISK_CACHE_GB).")
    for notice in config.notices:
        print(f"\nNote: {notice}.")
    return 0


def effective(config: Config) -> dict[str, dict[str, Any]]:
    """Key to value and source; of a secret only that it is set."""
    settings = {}
    for key in (setting.key for setting in iter_settings()):
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if key in SECRETS and value is not None:
            value = "set"
        settings[key] = {"value": value, "source": config.sources[key]}
    return settings


def _as_written(value: Any) -> str:
    """As it would be written in the environment."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
