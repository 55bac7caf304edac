"""What a person sees: plans, progress, status, explanations and summaries, as text."""
