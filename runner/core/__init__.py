"""What everything stands on: errors, text, files, processes. It knows nothing of training."""
