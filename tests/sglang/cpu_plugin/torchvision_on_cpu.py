"""Lets torchvision's wheel, a build for CUDA, be imported with a torch for CPUs.

Its library can't be loaded there, and the Python side misses operators that it would have declared.
"""

import importlib.abc
import sys
from typing import Any


class _Declare(importlib.abc.MetaPathFinder):
    library: Any = None  # torch forgets the operators when this goes

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        _Declare.library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _Declare.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Declare())
