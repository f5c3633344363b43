"""The DVC stages: thin scripts that read params.yaml, call one library function and write outputs."""
