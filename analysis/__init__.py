"""What the results say, read from MLflow alone: tables, figures, the transfer matrix, a report, the paper's numbers."""
