"""What a model attends to: attention rows out of any forward pass, and what is made of them (docs/seeing.md)."""
