"""What users of KVBM have set, and where each value comes from. The keys are declared in `settings`.

Sources, in rising precedence: defaults, a TOML file, the environment, the connector's
`kv_connector_extra_config`, keyword arguments. All problems of all sources are reported in one `ConfigError`.
"""

import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from kvbm.errors import ConfigError
from kvbm.settings import DiskConfig, EngineConfig, HostConfig, ObserveConfig, TransferConfig


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The effective settings. Made by `load_config`, which validates."""

    host: HostConfig
    disk: DiskConfig
    transfer: TransferConfig
    engine: EngineConfig
    observe: ObserveConfig
    sources: Mapping[str, str]
    """Where each value comes from: dotted key to source."""
    notices: tuple[str, ...]
    """What the user should know about settings that have no effect, to be logged once."""

    @property
    def enabled(self) -> bool:
        """Whether any cache was configured."""
        return (self.host.num_blocks or self.host.cache_gb) > 0 or self.has_disk

    @property
    def has_disk(self) -> bool:
        return (self.disk.num_blocks or self.disk.cache_gb) > 0


class Setting(msgspec.Struct, frozen=True):
    """One setting, as the documentation shows it."""

    key: str
    type: str
    default: str
    env: str
    doc: str


_SECTIONS = {
    "host": HostConfig,
    "disk": DiskConfig,
    "transfer": TransferConfig,
    "engine": EngineConfig,
    "observe": ObserveConfig,
}
_FIELDS = {
    f"{section}.{field.name}": field
    for section, struct in _SECTIONS.items()
    for field in msgspec.structs.fields(struct)
}


def iter_settings() -> Iterator[Setting]:
    """All settings in the order of the documentation."""
    for key, field in _FIELDS.items():
        allowed, about = field.type.__metadata__[-2:]
        default = "none" if field.default is None else str(field.default).lower()
        yield Setting(key, allowed.description, default, about.extra["env"], about.description)


_SETTINGS = {setting.key: setting for setting in iter_settings()}
_KEY_OF_ENV = {setting.env: setting.key for setting in _SETTINGS.values()}
SECRETS = {"observe.admin_token"}
"""Keys whose values are never shown."""

_FILE_KEY = "config_file"
_FILE_ENV = "KVBM_CONFIG"

_OBJECT = "this version has no object tier yet"
_PORTS = "no ports are needed, leader and workers use the engine's channel"
_NUMA = "host memory is placed near the GPU in any case"
_NCCL = "every rank of TensorRT-LLM keeps and loads its own copy"
IGNORED_ENV: dict[str, str] = {
    "DYN_KVBM_OBJECT_*": _OBJECT,
    "DYN_KVBM_NIXL_BACKEND_*": "KVBM_DISK_BACKEND is the name that has an effect",
    "DYN_KVBM_TRANSFER_BATCH_SIZE": "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE is the name that has an effect",
    "DYN_KVBM_DISABLE_WRITE_COMBINED": "host memory is never write-combined",
    "DYN_KVBM_ENABLE_NUMA": _NUMA,
    "DYN_MEMORY_DISABLE_NUMA": _NUMA,
    "DYN_KVBM_LEADER_ZMQ_HOST": _PORTS,
    "DYN_KVBM_LEADER_ZMQ_PUB_PORT": _PORTS,
    "DYN_KVBM_LEADER_ZMQ_ACK_PORT": _PORTS,
    "DYN_KVBM_BARRIER_ID_PREFIX": _PORTS,
    "DYN_KVBM_TRTLLM_ZMQ_PORT": "KV events of TensorRT-LLM are not merged with those of KVBM yet",
    "DYN_KVBM_NCCL_MLA_MODE": _NCCL,
    "DYN_KVBM_NCCL_MAX_CTAS": _NCCL,
}
"""Names that NVIDIA's KVBM reads or documents and that have no effect here, and why; `*` ends a prefix."""

# Kubernetes puts the address of a service named "kvbm" into every pod as KVBM_SERVICE_HOST, KVBM_PORT, ...
_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?$")
_FLAG_TYPES = ("true or false", "true, false or none")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _env_core(name: str) -> str:
    return name.removeprefix("DYN_").removeprefix("KVBM_").lower()


# What a user may have had in mind, in lower case, and the right name for it.
_KEY_GUESSES = {
    **{setting.env.lower(): setting.key for setting in _SETTINGS.values()},
    **{key: key for key in (*_SETTINGS, _FILE_KEY)},
}
_ENV_GUESSES = {
    **{setting.key.replace(".", "_"): setting.env for setting in _SETTINGS.values()},
    **{_env_core(name): name for name in (*IGNORED_ENV, *_KEY_OF_ENV, _FILE_ENV) if not name.endswith("*")},
}


class _Given(NamedTuple):
    key: str
    value: Any
    source: str


def load_config(
    extra: Mapping[str, Any] | None = None,
    *,
    extra_name: str = "kv_connector_extra_config",
    environ: Mapping[str, str] | None = None,
    **overrides: Any,
) -> Config:
    """Merge all sources, or raise one `ConfigError` that names every problem in them.

    `extra` is what the engine hands to its connector, under a name that errors should give it; `environ` is
    `os.environ` unless given. Keys are nested mappings or dotted names, as keywords also `host__cache_gb`.
    `config_file` names the TOML file.
    """
    problems: list[str] = []
    from_environ, notices = _read_environ(os.environ if environ is None else environ, problems)
    keywords = {name.replace("__", "."): value for name, value in overrides.items()}
    given = [
        *from_environ,
        *_flatten(extra or {}, extra_name, problems),
        *_flatten(keywords, "keyword argument", problems),
    ]
    files = [item for item in given if item.key == _FILE_KEY]
    given = [item for item in given if item.key != _FILE_KEY]
    if files:
        given = [*_read_file(files[-1], problems), *given]

    values = {key: field.default for key, field in _FIELDS.items()}
    sources = dict.fromkeys(_FIELDS, "default")
    for key, value, source in given:
        if key not in _FIELDS:
            guesses = {name: name for name in _SECTIONS} if isinstance(value, Mapping) else _KEY_GUESSES
            problems.append(f"unknown key {key!r} ({source}): {_suggest(key.lower(), guesses)}")
        elif sources[key] == source:
            problems.append(f"{key} ({source}): given twice, keep one")
        else:
            sources[key] = source
            try:
                values[key] = _convert(key, value)
            except (msgspec.ValidationError, ValueError):  # the first is no ValueError in older msgspec
                shown = "***" if key in SECRETS else repr(value)
                problems.append(f"{key} = {shown} ({source}): must be {_SETTINGS[key].type}")
    if problems:
        raise ConfigError("wrong KVBM configuration:" + "".join(f"\n- {problem}" for problem in problems))

    for tier in ("host", "disk"):
        count, size = f"{tier}.num_blocks", f"{tier}.cache_gb"
        values[count] = values[count] or None
        if values[count] and values[size]:
            notices.append(f"{size} ({sources[size]}) has no effect: {count} ({sources[count]}) wins")
    sections = {
        section: struct(**{name: values[f"{section}.{name}"] for name in struct.__struct_fields__})
        for section, struct in _SECTIONS.items()
    }
    return Config(**sections, sources=sources, notices=tuple(notices))


def _convert(key: str, value: Any) -> Any:
    if isinstance(value, str):
        value = value.strip()
        if value.lower() == "none":
            value = None
        elif _SETTINGS[key].type in _FLAG_TYPES:
            value = {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}.get(value.lower(), value)
    value = msgspec.convert(value, _FIELDS[key].type, strict=not isinstance(value, str))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(value)
    return value


def _read_environ(environ: Mapping[str, str], problems: list[str]) -> tuple[list[_Given], list[str]]:
    given, notices = [], []
    for name, value in sorted(environ.items()):
        if not value.strip():  # compose files and charts can't unset a variable, only empty it
            continue
        if name in _KEY_OF_ENV or name == _FILE_ENV:
            given.append(_Given(_KEY_OF_ENV.get(name, _FILE_KEY), value, f"environment {name}"))
        elif reason := _why_ignored(name):
            notices.append(f"{name} is set, but {reason}: ignored")
        elif name.startswith(("DYN_KVBM_", "KVBM_")) and not (
            _KUBERNETES.search(name) or value.startswith("tcp://")
        ):
            problems.append(f"unknown environment variable {name}: {_suggest(_env_core(name), _ENV_GUESSES)}")
    return given, notices


def _read_file(origin: _Given, problems: list[str]) -> list[_Given]:
    path = origin.value
    try:
        with open(os.fspath(path), "rb") as file:
            tables = tomllib.load(file)
    except (TypeError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        problems.append(f"{_FILE_KEY} = {path!r} ({origin.source}): must be a readable TOML file: {reason}")
        return []
    source = f"file {path}"
    if tables.pop(_FILE_KEY, None) is not None:
        problems.append(f"{_FILE_KEY} ({source}): a file can't name another, remove it")
    return _flatten(tables, source, problems)


def _flatten(tree: Mapping[str, Any], source: str, problems: list[str]) -> list[_Given]:
    given = []
    for name, value in tree.items():
        if name not in _SECTIONS:
            given.append(_Given(str(name), value, source))
        elif isinstance(value, Mapping):
            given += [_Given(f"{name}.{key}", item, source) for key, item in value.items()]
        else:
            keys = ", ".join(_SECTIONS[name].__struct_fields__)
            problems.append(f"{name} = {value!r} ({source}): must be a table of {keys}")
    return given


def _why_ignored(name: str) -> str | None:
    return IGNORED_ENV.get(name) or next(
        (why for known, why in IGNORED_ENV.items() if known.endswith("*") and name.startswith(known[:-1])),
        None,
    )


def _suggest(name: str, guesses: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(name, guesses, n=1)
    if close:
        return f"did you mean {guesses[close[0]]}?"
    return f"remove it, or use one of {', '.join(dict.fromkeys(guesses.values()))}"
