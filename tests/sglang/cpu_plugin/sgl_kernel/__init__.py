"""In place of SGLang's kernels, of which no build for CPUs exists: all names exist, and raise when called.

A Llama with the attention of torch calls none.
"""

from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on CPUs")

    return missing
