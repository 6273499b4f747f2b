"""Asks over gRPC and over REST; every element of the answers is -48.

python serving_client.py [gRPC address] [REST address]
"""

import json
import sys
import urllib.request

import numpy as np

from mindspore_serving.client import Client

GRPC, REST = (*sys.argv[1:], *("127.0.0.1:5500", "127.0.0.1:1500")[len(sys.argv) - 1 :])


def run_matmul():
    client = Client(GRPC, "matmul", "predict")
    result = client.infer({"x": np.ones((128, 96), np.float32)})
    print("gRPC:", result[0]["y"].shape, np.unique(result[0]["y"]))


def run_matmul_rest():
    body = json.dumps({"instances": {"x": [[1.0] * 96] * 128}}).encode()
    with urllib.request.urlopen(f"http://{REST}/model/matmul:predict", body) as reply:
        y = np.array(json.load(reply)["instances"][0]["y"])
    print("REST:", y.shape, np.unique(y))


if __name__ == "__main__":
    run_matmul()
    run_matmul_rest()
