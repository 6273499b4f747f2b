"""Waits for the agents (serving_agent.py), then serves over gRPC and REST.

python serving_server.py [address for agents] [gRPC address] [REST address]
"""

import os
import sys

from mindspore_serving import server
from mindspore_serving.server import distributed

AGENTS, GRPC, REST = (*sys.argv[1:], *("127.0.0.1:6200", "127.0.0.1:5500", "127.0.0.1:1500")[len(sys.argv) - 1 :])


def start():
    servable_dir = os.path.dirname(os.path.realpath(sys.argv[0]))
    distributed.start_servable(
        servable_dir,
        "matmul",
        rank_table_json_file="rank_table_2pcs.json",
        version_number=1,
        distributed_address=AGENTS,
        wait_agents_time_in_seconds=0,
    )
    server.start_grpc_server(GRPC)
    server.start_restful_server(REST)


if __name__ == "__main__":
    start()
