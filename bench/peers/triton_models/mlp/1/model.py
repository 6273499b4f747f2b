"""`mlp` for Triton's Python backend: ONNX Runtime with two threads, once for all requests of a dynamic batch."""

import os

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        options.inter_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "mlp.onnx")
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        (result,) = self.session.run(["y"], {"x": np.concatenate(inputs)})
        responses, start = [], 0
        for rows in inputs:
            part = result[start : start + len(rows)]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", part)]))
            start += len(rows)
        return responses
