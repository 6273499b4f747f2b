"""A start script as it was written for MindSpore Serving: python serving_server.py [grpc_address] [http_address]"""

import os
import sys

from mindspore_serving import server


def start():
    grpc_address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:5500"
    http_address = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1:1500"
    servable_dir = os.path.dirname(os.path.realpath(sys.argv[0]))
    config = server.ServableStartConfig(servable_directory=servable_dir, servable_name="tensor_add", device_ids=(0, 1))
    server.start_servables(config)
    server.start_grpc_server(address=grpc_address)
    server.start_restful_server(address=http_address)


if __name__ == "__main__":
    start()
