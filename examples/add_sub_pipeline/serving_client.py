"""Calls the pipeline with whole numbers and with float32: python serving_client.py [grpc_address]"""

import sys

import numpy as np

from inflight.client import Client


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8081"
    numbers = np.arange(4).reshape(2, 2)
    with Client(address, "add_sub_pipeline", "predict") as client:
        results = client.infer([{"x1": numbers, "x2": numbers + n, "x3": numbers} for n in range(3)])
    for n, result in enumerate(results):
        assert np.array_equal(result["y"], numbers + n), result
    print("predict:", [result["y"].tolist() for result in results])

    x = numbers.astype(np.float32)
    with Client(address, "add_sub_pipeline", "predict_both") as client:
        (both,) = client.infer({"x1": x, "x2": x, "x3": x})
    assert np.array_equal(both["total"], 2 * x), both
    assert np.array_equal(both["y"], x), both
    print("predict_both:", both["total"].tolist(), both["y"].tolist())


if __name__ == "__main__":
    main()
