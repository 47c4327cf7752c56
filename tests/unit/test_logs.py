"""Log lines as JSON, in a process of their own: pytest has handlers everywhere."""

import json
import subprocess
import sys
from typing import Any


def lines_of(code: str) -> list[dict[str, Any]]:
    code = f"import logging; from kvbm.observe.logs import log_json; log_json(); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_line_is_an_object() -> None:
    (line,) = lines_of(
        "log = logging.getLogger('kvbm.somewhere'); log.debug('not shown');"
        "log.info('KVBM: host tier ready, %d blocks of \"%s\"', 5, 'x\\ny')"
    )
    assert line.pop("time") > 1e9
    assert line == {
        "level": "INFO",
        "logger": "kvbm.somewhere",
        "message": 'KVBM: host tier ready, 5 blocks of "x\ny"',
        "event": 'KVBM: host tier ready, %d blocks of "%s"',
        "values": [5, "x\ny"],
    }


def test_an_error_keeps_its_traceback() -> None:
    (line,) = lines_of("logging.getLogger('kvbm').error('KVBM: %s', 'broken', exc_info=ValueError('why'))")
    assert line["values"] == ["broken"]
    assert line["error"].endswith("ValueError: why")
