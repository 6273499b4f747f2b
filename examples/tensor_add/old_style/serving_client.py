"""A client as it was written for MindSpore Serving: python serving_client.py [grpc_address]"""

import sys

import numpy as np

from mindspore_serving.client import Client


def run(address, method, dtype):
    client = Client(address, "tensor_add", method)
    instances = [{"x1": np.ones((2, 2), dtype) * i, "x2": np.array([[1, 2], [3, 4]], dtype)} for i in range(3)]
    result = client.infer(instances)
    for instance, item in zip(instances, result):
        assert np.array_equal(item["y"], instance["x1"] + instance["x2"]), item
    print(method, result)


if __name__ == "__main__":
    grpc_address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:5500"
    run(grpc_address, "add_common", np.float32)
    run(grpc_address, "add_cast", np.int64)
