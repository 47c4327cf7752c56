"""Log lines for machines: one JSON object a line, as Dynamo has them with DYN_LOGGING_JSONL."""

import json
import logging
from typing import Any


class JsonLines(logging.Formatter):
    """event: the line with its values left out, the same whenever the same happens; values: those."""

    def format(self, record: logging.LogRecord) -> str:
        values = record.args if isinstance(record.args, tuple) else (record.args,) if record.args else ()
        line: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "event": str(record.msg),
            "values": values,
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json() -> None:
    """All lines of KVBM in this process go to standard error as JSON, and nowhere else."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("kvbm")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
