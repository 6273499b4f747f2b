"""A client as it was written for MindSpore Serving: python serving_client.py [grpc_address]"""

import os
import sys

from mindspore_serving.client import Client


def read_images():
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "images")
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as fp:
            yield int(name.split("_")[0]), fp.read()


def run_classify(address):
    client = Client(address, "digits", "classify")
    labels, images = zip(*read_images())
    result = client.infer([{"image": image} for image in images])
    if isinstance(result, dict):
        sys.exit(result["error"])
    right = 0
    for label, item in zip(labels, result):
        print("label", int(item["label"]), "score", round(float(item["score"]), 4), "truth", label)
        right += int(item["label"]) == label
    print("accuracy", right / len(labels), "on", len(labels), "images")


if __name__ == "__main__":
    run_classify(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:5500")
