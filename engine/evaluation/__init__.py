"""What a model's features are worth: neighbours, linear probes, few shots, clusters, zero shots, retrieval
(docs/evaluation.md).

All of it works on features that are shared out over ranks (`rows.py`), and knows no model: `extract.py` alone does.
"""
