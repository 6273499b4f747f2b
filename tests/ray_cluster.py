"""Ray's own test cluster in a process, `python -m tests.ray_cluster`, which takes orders on its standard input.

Orders are lines: `add CPUS [RESOURCE]` starts a machine, which may have one of a resource of its own, and prints its
number, `kill NUMBER` kills every process of it with SIGKILL, `end` ends all. The first line that it prints is the
address of the head.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import psutil


def kill(node: Any) -> None:
    """Kills a machine as a loss of power would: its raylet, and all that it has started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    victims = [raylet, *raylet.children(recursive=True)]
    for kind in node.all_processes.values():
        victims += [psutil.Process(each.process.pid) for each in kind if each.process.poll() is None]
    for victim in victims:
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def main() -> None:
    from ray.cluster_utils import Cluster

    quiet = {"include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **quiet})
    nodes: list[Any] = []
    print(cluster.address, flush=True)
    for line in sys.stdin:
        order, _, given = line.strip().partition(" ")
        if order == "add":
            cpus, *own = given.split()
            node = cluster.add_node(num_cpus=int(cpus), object_store_memory=80 << 20, resources=dict.fromkeys(own, 1))
            nodes.append(node)
            print(len(nodes) - 1, flush=True)
        elif order == "kill":
            kill(nodes[int(given)])
            print("killed", flush=True)
        elif order == "end":
            break
    cluster.shutdown()


if __name__ == "__main__":
    main()
