"""Sends the held-out images and prints how many are read right: python serving_client.py [grpc_address]"""

import sys
import time

from pictures import load

from inflight.client import Client


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8081"
    labels, files = zip(*load())
    with Client(address, "digits", "classify") as client:
        start = time.perf_counter()
        results = client.infer([{"image": file} for file in files])
        seconds = time.perf_counter() - start
    if isinstance(results, dict):
        sys.exit(results["error"])
    right = sum(int(result["label"]) == label for label, result in zip(labels, results))
    print(f"first: label {int(results[0]['label'])}, score {float(results[0]['score']):.4f}")
    print(f"accuracy {right / len(files):.4f} on {len(files)} held-out images, {len(files) / seconds:.0f} images/s")


if __name__ == "__main__":
    main()
