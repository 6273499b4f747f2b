"""On PYTHONPATH: a process and its children find neither torch nor transformers, whatever is installed."""

from __future__ import annotations

import sys

MISSING = ("torch", "torch_npu", "transformers", "gguf")


class _Missing:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _Missing())  # type: ignore[arg-type]
