"""What runs in AppWorld's virtual environment; of these, only `kinds` is imported elsewhere."""
