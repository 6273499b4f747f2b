"""Calls both methods over gRPC and one over REST: python serving_client.py [grpc_address] [http_address]"""

import json
import sys
import urllib.request

import numpy as np

from inflight.client import Client


def over_grpc(address: str, method: str, dtype: type) -> None:
    instances = [{"x1": np.full((2, 2), number, dtype), "x2": np.array([[1, 2], [3, 4]], dtype)} for number in range(3)]
    with Client(address, "tensor_add", method) as client:
        results = client.infer(instances)
    for instance, result in zip(instances, results):
        assert np.array_equal(result["y"], instance["x1"] + instance["x2"]), result
    print(f"{method}: {[result['y'].tolist() for result in results]}")


def over_rest(address: str) -> None:
    body = {"instances": [{"x1": [[1.0, 2.0], [3.0, 4.0]], "x2": [[1.0, 1.0], [1.0, 1.0]]}]}
    request = urllib.request.Request(f"http://{address}/model/tensor_add:add_common", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as reply:
        print(f"REST: {reply.read().decode()}")


def main() -> None:
    grpc_address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8081"
    http_address = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1:8080"
    over_grpc(grpc_address, "add_common", np.float32)
    over_grpc(grpc_address, "add_cast", np.int64)
    over_rest(http_address)


if __name__ == "__main__":
    main()
