"""Train residual networks with stochastic depth, fold, export, prove and deploy them."""

import os

# onnxruntime 1.31 for Linux numbers its users, and reports to Microsoft which model was opened, with the
# model's metadata. It looks at this when it is imported; all of sdpipe comes behind this file.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
