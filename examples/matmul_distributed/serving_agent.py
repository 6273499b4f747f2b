"""Starts the two agents of this machine.

python serving_agent.py [address for agents] [first port]
"""

import sys

from mindspore_serving.server import distributed

ADDRESS, PORT = (*sys.argv[1:], *("127.0.0.1:6200", "7000")[len(sys.argv) - 1 :])


def start_agents():
    distributed.startup_agents(
        distributed_address=ADDRESS,
        model_files=[f"model/device{rank}/matmul.mindir" for rank in range(2)],
        agent_start_port=int(PORT),
        agent_ip=None,
        rank_start=None,
    )


if __name__ == "__main__":
    start_agents()
