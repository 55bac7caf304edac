"""What training and unpacking compute faster than the model's own modules."""
