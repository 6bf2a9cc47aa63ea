"""Models of timm: Vision Transformers of its class of that name, distilled ones, and Swin."""
