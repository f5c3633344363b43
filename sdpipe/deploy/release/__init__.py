"""What leaves the pipeline: the files behind their gates, the model card, MLflow's registry."""
