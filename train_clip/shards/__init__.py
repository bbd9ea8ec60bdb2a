"""Extension: pairs in WebDataset shards (`--shards`, `data shards`), and in data sets of Hugging Face (`--dataset`)."""
