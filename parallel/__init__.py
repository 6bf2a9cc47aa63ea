"""How tensors are split over ranks and moved between them; knows nothing of Vision Transformers or of training."""
