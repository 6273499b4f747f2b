"""Serves tensor_add with two replicas: python serving_server.py [grpc_address] [http_address]"""

import sys
from pathlib import Path

from inflight.config import ListenConfig, ServableConfig
from inflight.server import Server


def main() -> None:
    grpc_address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8081"
    http_address = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1:8080"
    server = Server()
    server.start_servables([ServableConfig(Path(__file__).resolve().parent, "tensor_add", device_ids=(0, 1))])
    print("gRPC:", server.start_grpc(ListenConfig(grpc_address)), flush=True)
    print("HTTP:", server.start_http(ListenConfig(http_address)), flush=True)
    server.wait()


if __name__ == "__main__":
    main()
