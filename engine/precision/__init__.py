"""Number formats: which layer computes in what, and the loss scale of fp16."""
