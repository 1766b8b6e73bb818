"""Turns a checkpoint into a bundle: ONNX encoders, tokenizer, prompt banks, manifest, report."""
