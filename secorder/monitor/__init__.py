"""What is shown of measurements: statistics, tables, charts, findings. Reads results; knows no autograd."""
