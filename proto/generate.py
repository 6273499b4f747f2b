"""Writes the Python modules of every .proto file here: python proto/generate.py inflight/proto

Two edits follow protoc. The modules get a descriptor pool of their own, so that another package with the same messages
(tritonclient, the real MindSpore) can be imported beside them. And they lose the check of protobuf's version, which
would refuse every release older than the generator, although the generated code runs on them.
"""

import re
import sys
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
VERSION_CHECK = re.compile(
    r"^from google\.protobuf import runtime_version as _runtime_version\n"
    r"|^_runtime_version\.ValidateProtobufRuntimeVersion\(.*?^\)\n",
    re.MULTILINE | re.DOTALL,
)


def main(folder: Path) -> int:
    names = sorted(file.name for file in HERE.glob("*.proto"))
    failed = protoc.main(["protoc", f"-I{HERE}", f"--python_out={folder}", f"--pyi_out={folder}", *names])
    if failed:
        return int(failed)
    for name in names:
        module = folder / name.replace(".proto", "_pb2.py")
        text = VERSION_CHECK.sub("", module.read_text())
        module.write_text(text.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
