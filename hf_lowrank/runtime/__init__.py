"""Forecasts of exported models, in ONNX Runtime, OpenVINO or a PyTorch program: `exporting` writes what is read here."""
