"""Generates inflight/proto/*_pb2.py and .pyi from proto/*.proto: `python tools/gen_proto.py`.

The generated modules are made independent of their surroundings: each registers its messages in a pool of its own
(another package in the process may define the same names: tritonclient does, MindSpore aborts on it), and none
checks the protobuf version it was generated with (the serialized descriptor is stable).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "proto"
TARGET = ROOT / "inflight" / "proto"


def generate(source: Path) -> None:
    status = protoc.main(
        [
            "protoc",
            f"-I{SOURCES}",
            f"--python_out={TARGET}",
            f"--pyi_out={TARGET}",
            str(source.relative_to(SOURCES)),
        ]
    )
    if status != 0:
        sys.exit(f"protoc failed for {source}")
    module = TARGET / source.with_name(f"{source.stem}_pb2.py").name
    text = module.read_text()
    text = re.sub(r"_runtime_version\.ValidateProtobufRuntimeVersion\(.*?\n\)\n", "", text, flags=re.S)
    text = text.replace("from google.protobuf import runtime_version as _runtime_version\n", "")
    text = text.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()")
    module.write_text(text)


if __name__ == "__main__":
    for path in sorted(SOURCES.glob("*.proto")):
        generate(path)
