"""Requests that schemathesis makes up from our OpenAPI, over a real leader: no 5xx, answers as promised."""

import itertools
from typing import Any

import pytest

from tests.unit.http_tools import BLOCK, TOKEN, Engine

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from hypothesis import HealthCheck, settings  # noqa: E402
from schemathesis.config import SchemathesisConfig  # noqa: E402

from kvbm.observe.api import make_app  # noqa: E402

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
CHECKS = {
    # A body may be as the schema says and ask for what the cache can't do: more blocks than it has.
    "positive_data_acceptance": {"expected-statuses": ["2xx", "400", "403", "404", "409"]},
    # It wants 401 where no token is sent; but here that is right from this machine, and otherwise 403.
    "missing_required_header": {"enabled": False},
}
_numbers = itertools.count()
ENGINE = Engine()
schema = schemathesis.openapi.from_asgi(
    "/openapi.json",
    make_app(ENGINE.admin, TOKEN),
    headers=HEADERS,
    config=SchemathesisConfig.from_dict({"checks": CHECKS}),
)


def _has_whole_float(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_whole_float, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value.is_integer()


@schema.hook
def filter_body(_: Any, body: Any) -> bool:
    """JSON Schema calls 524.0 an integer. We don't take it for a token."""
    return not _has_whole_float(body)


@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_whatever_is_asked(case: Any) -> None:
    number = next(_numbers)
    if number % 8 == 0:  # an engine at work, whose cache is not empty
        ENGINE.run(f"request-{number}", [*range(4 * BLOCK), *range(number, number + BLOCK)])
    ENGINE.step()
    case.call_and_validate(headers=HEADERS)
    assert ENGINE.leader.off_reason is None


def test_the_cache_has_outlived_it() -> None:
    assert next(_numbers) > 200
    assert ENGINE.leader.ready
    ENGINE.leader.administer(lambda upkeep, now: upkeep.resize("host", 32))
    ENGINE.run("before", list(range(500, 500 + 2 * BLOCK)))
    assert ENGINE.run("after", list(range(500, 500 + 2 * BLOCK))) == 2
