"""Everything that knows Lightning: the module, the data module, micro-batches, optimizer, callbacks."""
