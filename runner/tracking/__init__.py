"""MLflow runs, their metrics followed live from TensorBoard files, and sweeps of them."""
