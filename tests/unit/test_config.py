import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvbm.config import IGNORED_ENV, Config, iter_settings, load_config
from kvbm.errors import ConfigError

ROOT = Path(__file__).parents[2]

# One valid value other than the default for each key: as the environment spells it, and what it means.
SAMPLES: dict[str, tuple[str, Any]] = {
    "host.cache_gb": ("2.5", 2.5),
    "host.num_blocks": ("128", 128),
    "host.policy": ("segmented-lru", "segmented-lru"),
    "host.checksum": ("off", False),
    "host.offload_min_priority": ("36", 36),
    "disk.cache_gb": ("100", 100.0),
    "disk.num_blocks": ("256", 256),
    "disk.dir": ("/mnt/a:/mnt/b", "/mnt/a:/mnt/b"),
    "disk.disable_filter": ("on", True),
    "disk.write_gb_per_day": ("0.5", 0.5),
    "disk.min_free_gb": ("0", 0.0),
    "disk.zerofill_fallback": ("1", True),
    "disk.disable_o_direct": ("true", True),
    "disk.allocator": ("open-direct", "open-direct"),
    "disk.policy": ("lru", "lru"),
    "disk.backend": ("nixl-posix", "nixl-posix"),
    "disk.threads": ("2", 2),
    "disk.max_queued_blocks": ("16", 16),
    "disk.timeout_s": ("2.5", 2.5),
    "disk.exchange": ("1", True),
    "disk.skip_slow_loads": ("no", False),
    "transfer.max_concurrent": ("8", 8),
    "transfer.max_batch_blocks": ("32", 32),
    "transfer.copy_method": ("dma", "dma"),
    "transfer.max_queued_blocks": ("64", 64),
    "transfer.timeout_s": ("0.5", 0.5),
    "engine.init_timeout_s": ("60", 60.0),
    "engine.allow_untested": ("yes", True),
    "engine.load_failure_policy": ("engine", "engine"),
    "observe.metrics": ("1", True),
    "observe.port": ("7000", 7000),
    "observe.host": ("127.0.0.1", "127.0.0.1"),
    "observe.admin_token": ("secret", "secret"),
    "observe.max_requests": ("10", 10),
    "observe.log_interval_s": ("60", 60.0),
    "observe.log_json": ("1", True),
    "observe.history_blocks": ("1000", 1000),
    "observe.record": ("true", True),
    "observe.record_file": ("/var/trace.jsonl", "/var/trace.jsonl"),
    "observe.record_max_mb": ("1.5", 1.5),
    "observe.events": ("0", False),
    "observe.events_mode": ("passthrough", "passthrough"),
}
ENV_NAMES = {
    "host.cache_gb": "DYN_KVBM_CPU_CACHE_GB",
    "host.num_blocks": "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS",
    "host.policy": "KVBM_HOST_POLICY",
    "host.checksum": "KVBM_HOST_CHECKSUM",
    "host.offload_min_priority": "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY",
    "disk.cache_gb": "DYN_KVBM_DISK_CACHE_GB",
    "disk.num_blocks": "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS",
    "disk.dir": "DYN_KVBM_DISK_CACHE_DIR",
    "disk.disable_filter": "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER",
    "disk.write_gb_per_day": "KVBM_DISK_WRITE_GB_PER_DAY",
    "disk.min_free_gb": "KVBM_DISK_MIN_FREE_GB",
    "disk.zerofill_fallback": "DYN_KVBM_DISK_ZEROFILL_FALLBACK",
    "disk.disable_o_direct": "DYN_KVBM_DISK_DISABLE_O_DIRECT",
    "disk.allocator": "DYN_KVBM_DISK_ALLOCATOR_TYPE",
    "disk.policy": "KVBM_DISK_POLICY",
    "disk.backend": "KVBM_DISK_BACKEND",
    "disk.threads": "KVBM_DISK_THREADS",
    "disk.max_queued_blocks": "KVBM_DISK_MAX_QUEUED_BLOCKS",
    "disk.timeout_s": "KVBM_DISK_TIMEOUT_S",
    "disk.exchange": "KVBM_DISK_EXCHANGE",
    "disk.skip_slow_loads": "KVBM_DISK_SKIP_SLOW_LOADS",
    "transfer.max_concurrent": "DYN_KVBM_MAX_CONCURRENT_TRANSFERS",
    "transfer.max_batch_blocks": "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE",
    "transfer.copy_method": "KVBM_TRANSFER_COPY_METHOD",
    "transfer.max_queued_blocks": "KVBM_TRANSFER_MAX_QUEUED_BLOCKS",
    "transfer.timeout_s": "KVBM_TRANSFER_TIMEOUT_S",
    "engine.init_timeout_s": "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS",
    "engine.allow_untested": "KVBM_ALLOW_UNTESTED_ENGINE",
    "engine.load_failure_policy": "KVBM_LOAD_FAILURE_POLICY",
    "observe.metrics": "DYN_KVBM_METRICS",
    "observe.port": "DYN_KVBM_METRICS_PORT",
    "observe.host": "KVBM_METRICS_HOST",
    "observe.admin_token": "KVBM_ADMIN_TOKEN",
    "observe.max_requests": "DYN_KVBM_CACHE_STATS_MAX_REQUESTS",
    "observe.log_interval_s": "DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS",
    "observe.log_json": "DYN_LOGGING_JSONL",
    "observe.history_blocks": "KVBM_OBSERVE_HISTORY_BLOCKS",
    "observe.record": "DYN_KVBM_ENABLE_RECORD",
    "observe.record_file": "KVBM_RECORD_FILE",
    "observe.record_max_mb": "KVBM_RECORD_MAX_MB",
    "observe.events": "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR",
    "observe.events_mode": "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE",
}
KEYS = list(SAMPLES)


def load(extra: dict[str, Any] | None = None, env: dict[str, str] | None = None, **overrides: Any) -> Config:
    return load_config(extra, environ=env or {}, **overrides)


def problems_of(*args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    title, *problems = str(caught.value).split("\n- ")
    assert title == "wrong KVBM configuration:"
    return problems


def get(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "kvbm.toml"
    path.write_text(text)
    return str(path)


class TestDefaults:
    def test_values(self) -> None:
        config = load()
        assert {key: get(config, key) for key in KEYS} == {
            "host.cache_gb": 0.0,
            "host.num_blocks": None,
            "host.policy": "lru",
            "host.checksum": None,
            "host.offload_min_priority": 0,
            "disk.cache_gb": 0.0,
            "disk.num_blocks": None,
            "disk.dir": "/tmp",
            "disk.disable_filter": None,
            "disk.write_gb_per_day": 0.0,
            "disk.min_free_gb": 1.0,
            "disk.zerofill_fallback": False,
            "disk.disable_o_direct": False,
            "disk.allocator": "default",
            "disk.policy": "segmented-lru",
            "disk.backend": "posix",
            "disk.threads": 8,
            "disk.max_queued_blocks": 1024,
            "disk.timeout_s": 10.0,
            "disk.exchange": False,
            "disk.skip_slow_loads": True,
            "transfer.max_concurrent": 4,
            "transfer.max_batch_blocks": 128,
            "transfer.copy_method": "auto",
            "transfer.max_queued_blocks": 4096,
            "transfer.timeout_s": 30.0,
            "engine.init_timeout_s": 1800.0,
            "engine.allow_untested": False,
            "engine.load_failure_policy": "recompute",
            "observe.metrics": False,
            "observe.port": 6880,
            "observe.host": "0.0.0.0",
            "observe.admin_token": None,
            "observe.max_requests": 1000,
            "observe.log_interval_s": 5.0,
            "observe.log_json": False,
            "observe.history_blocks": 262144,
            "observe.record": False,
            "observe.record_file": "/tmp/kvbm-trace.jsonl",
            "observe.record_max_mb": 256.0,
            "observe.events": True,
            "observe.events_mode": "dedup",
        }
        assert config.sources == dict.fromkeys(KEYS, "default")
        assert config.notices == ()

    def test_defaults_are_valid_values(self) -> None:
        config = load()
        defaults = {key: get(config, key) for key in KEYS}
        assert {key: get(load(defaults), key) for key in KEYS} == defaults

    def test_frozen(self) -> None:
        with pytest.raises(AttributeError):
            load().host.cache_gb = 1  # type: ignore[misc]

    def test_travels_between_processes(self) -> None:
        config = load(host__cache_gb=2)
        assert pickle.loads(pickle.dumps(config)) == config
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config

    def test_the_process_environment_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "7")
        assert load_config().host.cache_gb == 7


class TestSources:
    @pytest.mark.parametrize("key", KEYS)
    def test_environment(self, key: str) -> None:
        text, value = SAMPLES[key]
        config = load(env={ENV_NAMES[key]: text})
        assert get(config, key) == value
        assert type(get(config, key)) is type(value)
        assert config.sources == dict.fromkeys(KEYS, "default") | {key: f"environment {ENV_NAMES[key]}"}

    @pytest.mark.parametrize("key", KEYS)
    def test_extra_nested_and_dotted(self, key: str) -> None:
        section, _, name = key.partition(".")
        value = SAMPLES[key][1]
        for extra in ({key: value}, {section: {name: value}}):
            config = load(extra)
            assert get(config, key) == value
            assert config.sources[key] == "kv_connector_extra_config"

    @pytest.mark.parametrize("key", KEYS)
    def test_keywords_nested_dotted_and_underscored(self, key: str) -> None:
        section, _, name = key.partition(".")
        value = SAMPLES[key][1]
        for keywords in ({key: value}, {section: {name: value}}, {f"{section}__{name}": value}):
            config = load(**keywords)
            assert get(config, key) == value
            assert config.sources[key] == "keyword argument"

    @pytest.mark.parametrize("key", KEYS)
    def test_file(self, key: str, tmp_path: Path) -> None:
        section, _, name = key.partition(".")
        path = toml(tmp_path, f"[{section}]\n{name} = {msgspec.json.encode(SAMPLES[key][1]).decode()}\n")
        config = load(config_file=path)
        assert get(config, key) == SAMPLES[key][1]
        assert config.sources[key] == f"file {path}"

    def test_precedence(self, tmp_path: Path) -> None:
        env = {"KVBM_CONFIG": toml(tmp_path, "[transfer]\nmax_concurrent = 2\n")}
        extra: dict[str, Any] = {}
        keywords: dict[str, Any] = {}
        seen = [load().transfer.max_concurrent, load(extra, env, **keywords).transfer.max_concurrent]
        env["DYN_KVBM_MAX_CONCURRENT_TRANSFERS"] = "3"
        seen.append(load(extra, env, **keywords).transfer.max_concurrent)
        extra["transfer"] = {"max_concurrent": 5}
        seen.append(load(extra, env, **keywords).transfer.max_concurrent)
        keywords["transfer__max_concurrent"] = 6
        config = load(extra, env, **keywords)
        seen.append(config.transfer.max_concurrent)
        assert seen == [4, 2, 3, 5, 6]
        assert config.sources["transfer.max_concurrent"] == "keyword argument"

    def test_sources_merge_key_by_key(self, tmp_path: Path) -> None:
        path = toml(tmp_path, "[host]\ncache_gb = 1\nchecksum = false\n[engine]\nallow_untested = true\n")
        config = load(
            {"host": {"policy": "segmented-lru"}},
            {"KVBM_CONFIG": path, "DYN_KVBM_CPU_CACHE_GB": "2"},
            transfer={"timeout_s": 5},
        )
        assert (config.host.cache_gb, config.host.checksum, config.host.policy) == (2, False, "segmented-lru")
        assert (config.engine.allow_untested, config.transfer.timeout_s) == (True, 5)
        assert config.sources["host.cache_gb"] == "environment DYN_KVBM_CPU_CACHE_GB"
        assert config.sources["host.checksum"] == f"file {path}"

    def test_none_withdraws_a_block_count(self) -> None:
        env = {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "10"}
        config = load(None, env, host__num_blocks=None)
        assert config.host.num_blocks is None
        assert config.sources["host.num_blocks"] == "keyword argument"

    def test_none_may_be_written_as_text(self) -> None:
        config = load({"host.num_blocks": "None"}, {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "none"})
        assert config.host.num_blocks is None

    def test_an_empty_variable_is_not_set(self) -> None:
        names = (*ENV_NAMES.values(), *IGNORED_ENV, "KVBM_CONFIG", "KVBM_NO_SUCH_NAME")
        assert load(env=dict.fromkeys(names, "  ")) == load()

    def test_other_variables_are_left_alone(self) -> None:
        assert load(env={"PATH": "/bin", "MY_KVBM_X": "1", "DYN_LOG": "debug", "kvbm_x": "1"}) == load()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("KVBM_SERVICE_HOST", "10.0.0.1"),
            ("KVBM_SERVICE_PORT", "80"),
            ("KVBM_SERVICE_PORT_HTTP", "80"),
            ("KVBM_PORT", "tcp://10.0.0.1:80"),
            ("KVBM_PORT_80_TCP", "tcp://10.0.0.1:80"),
            ("KVBM_PORT_80_TCP_ADDR", "10.0.0.1"),
            ("KVBM_LEADER_PORT_9000_UDP_PROTO", "udp"),
        ],
    )
    def test_what_kubernetes_adds_for_a_service_is_left_alone(self, name: str, value: str) -> None:
        assert load(env={name: value}) == load()


class TestFile:
    def test_named_by_each_source(self, tmp_path: Path) -> None:
        paths = []
        for gb in (1, 2, 3):
            path = tmp_path / f"{gb}.toml"
            path.write_text(f"host.cache_gb = {gb}")
            paths.append(path)
        env = {"KVBM_CONFIG": str(paths[0])}
        assert load(None, env).host.cache_gb == 1
        assert load({"config_file": str(paths[1])}, env).host.cache_gb == 2
        assert load({"config_file": str(paths[1])}, env, config_file=paths[2]).host.cache_gb == 3

    def test_unreadable(self, tmp_path: Path) -> None:
        (problem,) = problems_of(None, {"KVBM_CONFIG": str(tmp_path / "none.toml")})
        assert "none.toml" in problem
        assert "environment KVBM_CONFIG" in problem
        assert "No such file" in problem
        (problem,) = problems_of(config_file=tmp_path)
        assert "directory" in problem
        (problem,) = problems_of(config_file=3)
        assert problem.startswith("config_file = 3 (keyword argument): must be")

    def test_not_toml(self, tmp_path: Path) -> None:
        (problem,) = problems_of(config_file=toml(tmp_path, "[host\ncache_gb = 1"))
        assert "line 1" in problem
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        (problem,) = problems_of(config_file=tmp_path / "binary")
        assert "TOML" in problem

    def test_problems_name_the_file(self, tmp_path: Path) -> None:
        path = toml(tmp_path, "config_file = 'x'\n[host]\ncache_gb = nan\ncach_gb = 1\n[hosts]\nx = 1\n")
        problems = problems_of(config_file=path)
        assert problems == [
            f"config_file (file {path}): a file can't name another, remove it",
            f"host.cache_gb = nan (file {path}): must be a number >= 0",
            f"unknown key 'host.cach_gb' (file {path}): did you mean host.cache_gb?",
            f"unknown key 'hosts' (file {path}): did you mean host?",
        ]


class TestValues:
    @pytest.mark.parametrize("text", ["1", "true", "TRUE", "yes", "Yes", "on", " on "])
    def test_true(self, text: str) -> None:
        assert load(env={"KVBM_ALLOW_UNTESTED_ENGINE": text}).engine.allow_untested is True

    @pytest.mark.parametrize("text", ["0", "false", "False", "no", "NO", "off"])
    def test_false(self, text: str) -> None:
        assert load(env={"KVBM_HOST_CHECKSUM": text}).host.checksum is False

    @pytest.mark.parametrize("text", ["none", "None", " NONE "])
    def test_none_is_neither_true_nor_false(self, text: str) -> None:
        config = load({"host.checksum": True}, host__checksum=text)
        assert config.host.checksum is None
        assert config.sources["host.checksum"] == "keyword argument"
        assert load({"host.checksum": True}, host__checksum=None).host.checksum is None

    @pytest.mark.parametrize("policy", ["lru", "segmented-lru", "my_package.policies:Mine"])
    def test_policies(self, policy: str) -> None:
        assert load(host__policy=policy).host.policy == policy

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("host.cache_gb", 0),
            ("host.num_blocks", 1),
            ("disk.cache_gb", 0),
            ("disk.num_blocks", 1),
            ("disk.write_gb_per_day", 0),
            ("disk.min_free_gb", 0),
            ("disk.threads", 1),
            ("disk.max_queued_blocks", 1),
            ("disk.timeout_s", 0.001),
            ("transfer.max_concurrent", 1),
            ("transfer.max_batch_blocks", 1),
            ("transfer.max_queued_blocks", 1),
            ("transfer.timeout_s", 0.001),
            ("engine.init_timeout_s", 0.001),
        ],
    )
    def test_smallest(self, key: str, value: float) -> None:
        assert get(load({key: value}), key) == value
        assert get(load({key: str(value)}), key) == value

    @pytest.mark.parametrize(
        ("key", "wrong", "allowed"),
        [
            (
                "host.cache_gb",
                [-1, "-0.1", "nan", "inf", float("inf"), "4GB", True, None, [4]],
                "a number >= 0",
            ),
            ("host.num_blocks", [-1, 2.5, "2.5", "x", "inf", True], "an integer >= 0, or none"),
            (
                "host.policy",
                ["LRU", "fifo", "mod:", ":Class", "mod:Class\nx", 3, None, "a b:C"],
                "lru, segmented-lru or module:Class",
            ),
            ("host.checksum", ["maybe", "2", 1, [True]], "true, false or none"),
            ("disk.cache_gb", [-1, "nan", "5GB", None], "a number >= 0"),
            ("disk.num_blocks", [-1, 2.5, True], "an integer >= 0, or none"),
            ("disk.dir", ["", " ", ":", " : ", None, 5, ["/tmp"]], "directories, joined by `:`"),
            ("disk.disable_filter", ["maybe", 1], "true, false or none"),
            ("disk.write_gb_per_day", [-1, "inf", None], "a number >= 0"),
            ("disk.zerofill_fallback", [None, "y", 0], "true or false"),
            ("disk.allocator", ["direct", None], "default or open-direct"),
            ("disk.policy", ["fifo", None], "lru, segmented-lru or module:Class"),
            ("disk.backend", ["nixl", "POSIX", None], "posix, nixl-posix or nixl-gds-mt"),
            ("disk.threads", [0, 1.5, None], "an integer >= 1"),
            ("disk.timeout_s", [0, "-1", None], "a number > 0"),
            ("transfer.max_concurrent", [0, -1, 1.5, "four", None], "an integer >= 1"),
            ("transfer.max_batch_blocks", [0, "0"], "an integer >= 1"),
            ("transfer.copy_method", ["fast", "DMA", "none", None, 1], "auto, dma, kernel or staged"),
            ("transfer.max_queued_blocks", [0, "-5"], "an integer >= 1"),
            ("transfer.timeout_s", [0, "-1", "nan", float("inf"), "1e999", 10**400, None], "a number > 0"),
            ("engine.init_timeout_s", [0, float("nan")], "a number > 0"),
            ("engine.allow_untested", ["", "y", 0], "true or false"),
            ("engine.load_failure_policy", ["fail", "", None, 1], "recompute or engine"),
        ],
    )
    def test_wrong(self, key: str, wrong: list[Any], allowed: str) -> None:
        for value in wrong:
            (problem,) = problems_of({key: value})
            assert problem == f"{key} = {value!r} (kv_connector_extra_config): must be {allowed}"

    def test_an_overridden_value_is_still_checked(self) -> None:
        (problem,) = problems_of(None, {"DYN_KVBM_CPU_CACHE_GB": "much"}, host__cache_gb=1)
        assert problem == (
            "host.cache_gb = 'much' (environment DYN_KVBM_CPU_CACHE_GB): must be a number >= 0"
        )

    def test_several_problems_are_one_error(self) -> None:
        problems = problems_of(
            {"host": {"policy": "fifo"}, "transfer": 5},
            {"DYN_KVBM_CPU_CACHE_GB": "-1", "KVBM_HOST_CHEKSUM": "1"},
            engine={"init_timeout": 5},
        )
        assert problems == [
            "unknown environment variable KVBM_HOST_CHEKSUM: did you mean KVBM_HOST_CHECKSUM?",
            "transfer = 5 (kv_connector_extra_config): must be a table of "
            "max_concurrent, max_batch_blocks, copy_method, max_queued_blocks, timeout_s",
            "host.cache_gb = '-1' (environment DYN_KVBM_CPU_CACHE_GB): must be a number >= 0",
            "host.policy = 'fifo' (kv_connector_extra_config): must be lru, segmented-lru or module:Class",
            "unknown key 'engine.init_timeout' (keyword argument): did you mean engine.init_timeout_s?",
        ]

    def test_the_same_key_twice_in_one_source(self) -> None:
        (problem,) = problems_of({"host": {"cache_gb": 1}, "host.cache_gb": 2})
        assert problem == "host.cache_gb (kv_connector_extra_config): given twice, keep one"


class TestUnknownNames:
    @pytest.mark.parametrize(
        ("key", "meant"),
        [
            ("cache_gb", "host.cache_gb"),
            ("host.cachegb", "host.cache_gb"),
            ("host.Cache_GB", "host.cache_gb"),
            ("hots.cache_gb", "host.cache_gb"),
            ("transfer.max_batch_block", "transfer.max_batch_blocks"),
            ("DYN_KVBM_CPU_CACHE_GB", "host.cache_gb"),
            ("configfile", "config_file"),
        ],
    )
    def test_key(self, key: str, meant: str) -> None:
        assert problems_of({key: 1}) == [
            f"unknown key {key!r} (kv_connector_extra_config): did you mean {meant}?"
        ]
        assert problems_of(**{key: 1}) == [f"unknown key {key!r} (keyword argument): did you mean {meant}?"]

    def test_key_like_no_other(self) -> None:
        (problem,) = problems_of({"zzz": 1})
        assert all(key in problem for key in (*KEYS, "config_file"))

    def test_table_like_no_other(self) -> None:
        (problem,) = problems_of({"zzz": {"cache_gb": 1}})
        assert problem.endswith("remove it, or use one of host, disk, transfer, engine, observe")

    def test_key_that_is_no_string(self) -> None:
        (problem,) = problems_of({7: 1})
        assert problem.startswith("unknown key '7'")

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("DYN_KVBM_CPU_CACHE_GIB", "DYN_KVBM_CPU_CACHE_GB"),
            ("KVBM_CPU_CACHE_GB", "DYN_KVBM_CPU_CACHE_GB"),
            ("DYN_KVBM_HOST_POLICY", "KVBM_HOST_POLICY"),
            ("KVBM_HOST_CACHE_GB", "DYN_KVBM_CPU_CACHE_GB"),
            ("DYN_KVBM_MAX_CONCURENT_TRANSFERS", "DYN_KVBM_MAX_CONCURRENT_TRANSFERS"),
            ("DYN_KVBM_DISK_CACHE_GBS", "DYN_KVBM_DISK_CACHE_GB"),
            ("DYN_KVBM_METRIC_PORT", "DYN_KVBM_METRICS_PORT"),
            ("KVBM_CONFIG_PATH", "KVBM_CONFIG"),
        ],
    )
    def test_variable(self, name: str, meant: str) -> None:
        assert problems_of(env={name: "1"}) == [f"unknown environment variable {name}: did you mean {meant}?"]

    def test_variable_like_no_other(self) -> None:
        (problem,) = problems_of(env={"DYN_KVBM_QQQ": "1"})
        assert all(name in problem for name in (*ENV_NAMES.values(), "KVBM_CONFIG"))


class TestNotices:
    @pytest.mark.parametrize("name", [name.replace("*", "X") for name in IGNORED_ENV])
    def test_a_variable_without_effect(self, name: str) -> None:
        config = load(env={name: "1"})
        (notice,) = config.notices
        assert notice.startswith(f"{name} is set, but ")
        assert notice.endswith(": ignored")
        assert config.sources == load().sources

    def test_text(self) -> None:
        env = {"DYN_KVBM_OBJECT_BUCKET": "b", "DYN_KVBM_NCCL_MAX_CTAS": "4"}
        assert load(env=env).notices == (
            "DYN_KVBM_NCCL_MAX_CTAS is set, but every rank of TensorRT-LLM keeps and loads its own copy: "
            "ignored",
            "DYN_KVBM_OBJECT_BUCKET is set, but this version has no object tier yet: ignored",
        )

    def test_no_variable_is_both_a_setting_and_ignored(self) -> None:
        assert not set(IGNORED_ENV) & set(ENV_NAMES.values())

    def test_a_secret_is_not_shown(self) -> None:
        (problem,) = problems_of({"observe": {"admin_token": 271828}})
        assert "observe.admin_token = ***" in problem
        assert "271828" not in problem

    def test_a_block_count_wins_over_a_size(self) -> None:
        config = load(None, {"DYN_KVBM_CPU_CACHE_GB": "4"}, host__num_blocks=10)
        assert (config.host.num_blocks, config.host.cache_gb) == (10, 4)
        assert config.notices == (
            "host.cache_gb (environment DYN_KVBM_CPU_CACHE_GB) has no effect: "
            "host.num_blocks (keyword argument) wins",
        )
        config = load(None, {"DYN_KVBM_DISK_CACHE_GB": "4"}, disk__num_blocks=10)
        assert (config.disk.num_blocks, config.disk.cache_gb) == (10, 4)
        assert config.notices == (
            "disk.cache_gb (environment DYN_KVBM_DISK_CACHE_GB) has no effect: "
            "disk.num_blocks (keyword argument) wins",
        )


class TestEnabled:
    @pytest.mark.parametrize(
        ("cache_gb", "num_blocks", "enabled"),
        [(0, None, False), (0, 0, False), (1.5, None, True), (1.5, 0, True), (0, 8, True), (1.5, 8, True)],
    )
    def test_a_size_enables(self, cache_gb: float, num_blocks: int | None, enabled: bool) -> None:
        sizes = {"cache_gb": cache_gb, "num_blocks": num_blocks}
        config = load(host=sizes)
        assert config.enabled is enabled
        assert config.has_disk is False
        assert config.host.num_blocks == (num_blocks or None)
        config = load(disk=sizes)  # without a host cache blocks pass through a small one
        assert config.enabled is config.has_disk is enabled
        assert config.disk.num_blocks == (num_blocks or None)


class TestDocumentation:
    def test_rows(self) -> None:
        rows = {row.key: row for row in iter_settings()}
        assert {key: row.env for key, row in rows.items()} == ENV_NAMES
        assert rows["host.num_blocks"].default == "none"
        assert rows["host.checksum"].default == "none"
        assert rows["host.checksum"].type == "true, false or none"
        assert rows["engine.load_failure_policy"].type == "recompute or engine"
        assert all(row.doc.endswith(".") for row in rows.values())

    def test_table_is_current(self) -> None:
        text = (ROOT / "docs/configuration.md").read_text()
        start = text.index("| Key |")
        printed = subprocess.run(
            [sys.executable, ROOT / "scripts/settings_table.py"],
            capture_output=True,
            text=True,
            check=True,
            env=dict(os.environ),
        ).stdout
        assert text[start : text.index("\n\n", start) + 1] == printed

    def test_every_ignored_variable_is_explained(self) -> None:
        rows = (ROOT / "docs/configuration.md").read_text().splitlines()
        for name, why in IGNORED_ENV.items():
            assert any(f"`{name}`" in row and f"| {why} |" in row for row in rows), name


def test_errors_name_the_extra_config_as_its_engine_does() -> None:
    with pytest.raises(ConfigError, match=r"host.cache_bg.*\(\"kvbm\" in SGLang's extra config\)"):
        load_config({"host": {"cache_bg": 4}}, extra_name='"kvbm" in SGLang\'s extra config', environ={})
