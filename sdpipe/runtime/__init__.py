"""Prediction from the ONNX file alone: no torch, onnx, mlflow or dvc is imported here."""
