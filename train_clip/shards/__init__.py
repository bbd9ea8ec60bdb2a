"""Extension: pairs in WebDataset shards, read where they lie in their tars (`--shards`), and `data shards`."""
