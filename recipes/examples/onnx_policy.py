"""An exported policy, with numpy and onnxruntime alone: `python recipes/examples/onnx_policy.py [--model FILE.onnx]`.

`python recipes/export.py checkpoint=RUN output=policy.onnx` writes the file. Observations go in raw, one a row; actions
come out in the environment's own bounds. The metadata tell what the observations are.
"""

import argparse
import json

import numpy as np
import onnxruntime

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="policy.onnx")
session = onnxruntime.InferenceSession(parser.parse_args().model, providers=["CPUExecutionProvider"])
metadata = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
print(f"of step {metadata['step']} for {metadata['environment']}, {metadata['observation_dim']} numbers an observation")

observations = np.zeros((3, metadata["observation_dim"]), dtype=np.float32)
inputs = {"observation": observations}
if metadata["noise_shape"] is not None:  # the policy chooses among draws, which are made of standard Normals
    shape = (len(observations), *metadata["noise_shape"])
    inputs["noise"] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
(actions,) = session.run(["action"], inputs)
print("actions:", *actions.tolist())
