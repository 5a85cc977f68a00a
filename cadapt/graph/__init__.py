"""Reading and rewriting a model's torch.fx graph: tracing, finding sites, splicing calls. Knows no adapter."""
