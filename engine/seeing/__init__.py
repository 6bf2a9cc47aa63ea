"""What a model that is spread over ranks attends to."""
