"""A client as it was written for MindSpore Serving: python serving_client.py [grpc_address]"""

import sys

import numpy as np

from mindspore_serving.client import Client


def run_predict(address):
    client = Client(address, "add_sub_pipeline", "predict")
    instances = [{"x1": np.ones((2, 2)) * i, "x2": np.ones((2, 2)), "x3": np.ones((2, 2)) * 3} for i in range(3)]
    result = client.infer(instances)
    for instance, item in zip(instances, result):
        assert np.array_equal(item["y"], instance["x1"] + instance["x2"] - instance["x3"]), item
    print(result)


if __name__ == "__main__":
    run_predict(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:5500")
