"""Golden sets on disk: layout, manifest, tensors, transactions, remotes."""
