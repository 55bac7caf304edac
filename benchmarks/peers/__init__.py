"""What runs the peers, as scripts in environments of their own (`make foreign`)."""
